"""Fair Robust Learning (FRL): from class-wise errors to multipliers, class weights and class radii. Pure functions.

The paper minimises R_nat(f) + R_bdy(f) subject to v(i) = R(f, i) - R(f) - tau <= 0 for every class i, for the natural
and for the boundary error (Eq. 17); R(f) is the average over classes. Errors are fractions. Multipliers rise where a
constraint is violated (Algorithm 1, steps 6 and 7). In the Lagrangian

    sum_i R(f, i) / C + sum_i phi_i (R(f, i) - R(f) - tau)

class i has the weight 1/C + phi_i - mean(phi). These sum to 1 and are never negative as long as ||phi||_1 <= 1.

Algorithm 1 as printed leaves the average R(f) out of its updates; Eq. 17 and the authors' code subtract it.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from frlkit import KitError
from frlkit.values import Positive, Share, Size, checked


@checked
class Rule:
    """How class-wise errors become class weights and class radii; the fields of a retraining run that decide it."""

    scheme: Literal["multipliers", "dafa", "one_class"] = "multipliers"  # one_class: see `one_class`
    alpha_nat: Size = 0.0  # rate of the natural multipliers
    alpha_bdy: Size = 0.0  # rate of the boundary multipliers
    alpha_margin: Annotated[float, Field(ge=-1e6, le=1e6)] = 0.0  # rate of the radii's logarithms; negative shrinks the
    # radii of hard classes
    tau_nat: Share = 0.05
    tau_bdy: Share = 0.07
    target: Literal["boundary", "robust", "joint"] = "boundary"  # error of the second constraint; robust: Agarwal's
    # baseline; joint: robust too, and its multiplier weights both losses, whose sum is the robust error (Eq. 13 to 15)
    bound: Share = 1.0  # on the sum of each kind's multipliers
    radius_low: Share = 1.0  # caps of a class's radius, in multiples of the run's
    radius_high: Annotated[float, Field(ge=1, le=1e6)] = 2.0
    smoothing: Positive = 1.0  # weight of the newest violations in their running mean
    weighting: Literal["lagrangian", "softmax", "printed", "intercept"] = "lagrangian"  # see `setting`
    subtract_average: bool = True
    accumulate: bool = True  # False: every update starts from nothing, as in the report
    clamp_state: bool = True  # False: the radii's logarithms wind up beyond their caps, as in the authors' code
    strength: Annotated[float, Field(ge=0, le=1e3)] = 1.0  # dafa's lambda
    chosen: Annotated[int, Field(ge=0, le=10**6)] = 0  # one_class: which


class State(NamedTuple):
    """What one update hands to the next; all (C,) float64 but `violations`, (2, C): natural, and boundary or robust."""

    phi_nat: Tensor
    phi_bdy: Tensor
    log_radius: Tensor
    violations: Tensor | None = None


class Setting(NamedTuple):
    """What training uses: class weights of both losses, each summing to 1, and the factor of each radius; all (C,)."""

    weights_nat: Tensor
    weights_bdy: Tensor
    radius_factors: Tensor


def initial(classes: int) -> State:
    """Multipliers zero, every radius the run's own (Algorithm 1, step 3; its printed radius 0 could never grow)."""
    return State(*(torch.zeros(classes, dtype=torch.float64) for _ in range(3)))


def violations(errors: Tensor, tau: float, subtract_average: bool = True) -> Tensor:
    """v(i) = R(f, i) - R(f) - tau of class-wise errors (C,); without the average, R(f, i) - tau as printed."""
    return errors - subtract_average * errors.mean() - tau


def project(phi: Tensor, bound: float) -> Tensor:
    """The nearest-in-direction allowed multipliers: negative ones become 0, and their sum is scaled down to `bound`."""
    phi = phi.clamp(min=0)
    return phi * min(1.0, bound / max(float(phi.sum()), math.ulp(0.0)))


def class_weights(phi: Tensor) -> Tensor:
    """1/C + phi_i - mean(phi): (C,), sums to 1; non-negative where the multipliers sum to at most 1."""
    return 1 / len(phi) + phi - phi.mean()


def update(state: State, natural: Tensor, boundary: Tensor, rule: Rule) -> State:
    """Steps 6 and 7 of Algorithm 1: the next state from class-wise natural and boundary errors (C,), as fractions.

    A rule with only ``alpha_nat`` and ``alpha_bdy`` is option 1 (Reweight), with ``alpha_nat`` and ``alpha_margin``
    option 2 (Remargin), with all three option 3. Raises `KitError` where an error is no fraction.
    """
    for name, errors in (("natural", natural), ("boundary", boundary)):
        if not bool(((errors >= 0) & (errors <= 1)).all()):  # NaN compares false
            raise KitError(f"{name} errors {errors.tolist()} are not allowed: use fractions, 0 to 1")
    second = boundary if rule.target == "boundary" else natural + boundary
    kinds = ((natural, rule.tau_nat), (second, rule.tau_bdy))
    found = torch.stack([violations(errors.double(), tau, rule.subtract_average) for errors, tau in kinds])
    if state.violations is not None:
        found = (1 - rule.smoothing) * state.violations + rule.smoothing * found
    begin = state if rule.accumulate else initial(len(natural))
    phi_nat, phi_bdy = begin.phi_nat + rule.alpha_nat * found[0], begin.phi_bdy + rule.alpha_bdy * found[1]
    if rule.weighting == "lagrangian":
        phi_nat, phi_bdy = project(phi_nat, rule.bound), project(phi_bdy, rule.bound)
    elif rule.weighting in ("printed", "intercept"):
        phi_nat, phi_bdy = phi_nat.clamp(min=0), phi_bdy.clamp(min=0)
    log_radius = begin.log_radius + rule.alpha_margin * found[1]
    if rule.clamp_state:
        log_radius = log_radius.clamp(*_log_caps(rule))
    return State(phi_nat, phi_bdy, log_radius, found)


def setting(state: State, rule: Rule) -> Setting:
    """The class weights and the radii's factors, within their caps, that belong to a state.

    Weights by `rule.weighting`: "lagrangian" 1/C + phi_i - mean(phi); "softmax" the report's softmax(1 + phi), which
    ignores whatever all classes share, so that average and tolerance have no effect; "printed" 1/C + phi_i, the weights
    of Algorithm 1 as printed, whose sum grows; "intercept" all equal, since the output layer moves. With a joint target
    the natural loss has both multipliers (Eq. 14, with R_rob = R_nat + R_bdy).
    """
    natural = state.phi_nat + state.phi_bdy if rule.target == "joint" else state.phi_nat
    weights = {
        "lagrangian": class_weights,
        "softmax": lambda phi: (1 + phi).softmax(0),
        "printed": lambda phi: 1 / len(phi) + phi,
        "intercept": lambda phi: torch.full_like(phi, 1 / len(phi)),
    }[rule.weighting]
    return Setting(weights(natural), weights(state.phi_bdy), state.log_radius.clamp(*_log_caps(rule)).exp())


def offsets(state: State) -> Tensor:
    """The multipliers less their mean, (C,): what the controls without training add to output biases or log norms."""
    total = state.phi_nat + state.phi_bdy
    return total - total.mean()


def _log_caps(rule: Rule) -> tuple[float, float]:
    return (math.log(rule.radius_low) if rule.radius_low > 0 else -math.inf), math.log(rule.radius_high)


def one_class(classes: int, rule: Rule) -> State:
    """Class `rule.chosen` alone is trained at `rule.radius_high` times the radius: the theory's thought experiment."""
    if rule.chosen >= classes:
        raise KitError(f"chosen = {rule.chosen} is not allowed: the classes are 0 to {classes - 1}")
    state = initial(classes)
    state.log_radius[rule.chosen] = math.log(rule.radius_high)
    return state


def dafa(similarity: Tensor, rule: Rule) -> State:
    """DAFA's one-shot weights W, for the losses and, as factors, for the radii (Lee et al., ICLR 2024).

    similarity[i, j], (C, C): the mean probability of class j over attacked images of class i. Of each pair the harder
    class (smaller own probability) takes from the easier: W_i = 1 + lambda * sum_j s_ij, with s_ij = p_i(j) p_j(j)
    where i is the harder, and -p_j(i) p_i(i) where j is. The weights average 1.
    """
    own = similarity.diag().double()
    gain = similarity.double() * own[None, :] * (own[:, None] < own[None, :])
    weights = 1 + rule.strength * (gain.sum(1) - gain.sum(0))
    if not bool((weights > 0).all()):
        raise KitError(f"strength = {rule.strength} is not allowed here: it makes a class weight negative; lower it")
    share = weights / len(weights)
    return State(share, share.clone(), weights.log())

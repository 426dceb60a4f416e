"""The paper's Gaussian example in closed form: which class a linear model fails, how often, and why.

P(y=+1) = `prior`; x | y=+1 ~ N(θ, (Kσ)²I) and x | y=-1 ~ N(-θ, σ²I), where θ is γ on m robust features and η on d
non-robust ones. A linear model sign(w·x + b) enters only through c = b/‖w‖₂, S = w·θ/‖w‖₂ (signal) and τ = ‖w‖₁/‖w‖₂
(what an ℓ∞ attacker gains per unit of radius):

    R(f,-1;ε₀) = Φ((c - S + τε₀)/σ)        R(f,+1;ε₀) = Φ((-c - S + τε₀)/(Kσ))

Radii ε are ℓ∞; radii, c and S are in feature units; pairs, such as errors (fractions), are (class -1, class +1). The
paper's annex has slips, and its extracted text lost the roots: these are the corrected formulas, proved in notebook 02.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Real
from typing import Annotated

import numpy as np
from pydantic import BeforeValidator, Field
from scipy.optimize import minimize
from scipy.special import expit, exprel, log_ndtr, ndtr

from frlkit import KitError
from frlkit.values import checked

Pair = tuple[float, float]  # class -1, class +1
PLAIN = BeforeValidator(lambda value: value.item() if isinstance(value, np.generic) else value)  # numpy's numbers too
RADIUS = "a finite radius of at least 0, in feature units"
TIGHT = {"ftol": 1e-15, "gtol": 1e-9}


def _need(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise KitError(f"{name} = {value!r} is not allowed: use {allowed}")


@checked
class GaussianTask:
    """The paper's Eq. (1). Arguments outside the ranges below raise `KitError`."""

    m: Annotated[int, PLAIN, Field(ge=1)]  # robust features
    d: Annotated[int, PLAIN, Field(ge=0)]  # non-robust features
    gamma: Annotated[float, PLAIN]  # mean of a robust feature, in feature units
    eta: Annotated[float, PLAIN, Field(ge=0)]  # mean of a non-robust feature, below gamma
    sigma: Annotated[float, PLAIN, Field(gt=0)]  # standard deviation of class -1, in feature units
    K: Annotated[float, PLAIN, Field(ge=1)]  # that of class +1 is so many times larger
    prior: Annotated[float, PLAIN, Field(gt=0, lt=1)] = 0.5  # P(y=+1); the paper's theorems have 1/2

    def __post_init__(self) -> None:
        _need(self.gamma > self.eta, "gamma", self.gamma, f"a mean above eta = {self.eta!r}")

    @property
    def theta(self) -> np.ndarray:
        """The mean of class +1, shape (m + d,)."""
        return np.repeat([self.gamma, self.eta], [self.m, self.d])

    def natural(self) -> LinearRule:
        """The minimiser of the natural error (Theorem 1, Lemma 1): weights in the ratio γ:η, ‖w‖₂ = 1."""
        return self.robust(0.0)

    def robust(self, eps: float) -> LinearRule:
        """The minimiser of the robust error at training radius `eps` >= 0 (Theorem 2, Lemma 2), with ‖w‖₂ = 1.

        The weights are θ soft-thresholded at ε. Above γ every feature hurts: the best rule reads one robust feature. At
        γ every non-negative weighting of the robust features has the same robust (not natural) error; equal weights,
        the limit from below, are returned. A constant answer can win: see `intercept`. Weights of the classes act as
        prior odds do: the optimum with K times the weight on class +1's robust error is that at prior K/(K+1).
        """
        _need(isinstance(eps, Real) and not isinstance(eps, bool) and 0 <= eps < math.inf, "eps", eps, RADIUS)
        w = np.maximum(self.theta - eps, 0.0)
        if eps >= self.gamma:
            w[: 1 if eps > self.gamma else self.m] = 1.0
        direction = LinearRule(self, w / np.linalg.norm(w), 0.0)
        return replace(direction, b=intercept(direction.S - direction.tau * eps, self.sigma, self.K, self.prior))

    def omega(self, eps: float) -> float:
        """Ω of Corollary 1: the natural-error gap R₊ - R₋ of the robust model over that of the natural model."""
        return math.prod(self.decompose(eps))

    def decompose(self, eps: float) -> tuple[float, float]:
        """Ω as (information part, threshold part); for ε > 0 the first is at least 1 and the second above 1.

        Between the two models stands the robust one with the intercept best for natural data: up to there only features
        are lost, from there only the intercept moves. `KitError` unless K > 1 and the prior is 1/2.
        """
        _need(self.K > 1, "K", self.K, "K > 1 for Ω (at K = 1 both gaps are zero)")
        _need(self.prior == 0.5, "prior", self.prior, "prior = 0.5 for Ω (Corollary 1 assumes equal classes)")
        robust = self.robust(eps)
        halfway = replace(robust, b=intercept(robust.S, self.sigma, self.K))
        start, middle, end = self.natural().log_gap(), halfway.log_gap(), robust.log_gap()
        with np.errstate(over="ignore"):  # inf, where the natural gap is below 1e-308 of the robust one
            return float(np.exp(middle - start)), float(np.exp(end - middle))

    def sample(self, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw `n` points, class sizes in exact proportion: x of shape (n, m + d), y of shape (n,) with values ±1."""
        y = np.where(np.arange(n) < round(n * self.prior), 1.0, -1.0)
        spread = self.sigma * np.where(y > 0, self.K, 1.0)[:, None]
        return y[:, None] * self.theta + spread * np.random.default_rng(seed).standard_normal((n, self.m + self.d)), y


@dataclass(frozen=True, eq=False)
class LinearRule:
    """sign(w·x + b) on `task`, w of shape (m + d,) and not all zero; b = ±inf is the constant answer ±1."""

    task: GaussianTask
    w: np.ndarray
    b: float

    @property
    def S(self) -> float:  # noqa: N802
        """Signal w·θ/‖w‖₂, in feature units."""
        return float(self.w @ self.task.theta / np.linalg.norm(self.w))

    @property
    def tau(self) -> float:
        """Exposure ‖w‖₁/‖w‖₂ to an ℓ∞ attack."""
        return float(np.abs(self.w).sum() / np.linalg.norm(self.w))

    @property
    def c(self) -> float:
        """Intercept b/‖w‖₂, in feature units."""
        return float(self.b / np.linalg.norm(self.w))

    def scores(self, eps0: float = 0.0) -> np.ndarray:
        """The z-scores (class -1, class +1) at test radius `eps0` whose Φ are the errors; the theorems' Z."""
        _need(isinstance(eps0, Real) and not isinstance(eps0, bool) and 0 <= eps0 < math.inf, "eps0", eps0, RADIUS)
        reach = self.tau * eps0 - self.S
        return np.array([self.c + reach, -self.c + reach]) / [self.task.sigma, self.task.K * self.task.sigma]

    def errors(self, eps0: float = 0.0) -> Pair:
        """Exact error of (class -1, class +1) under an ℓ∞ attack of radius `eps0`; 0 gives the natural errors."""
        return tuple(ndtr(self.scores(eps0)).tolist())

    def gap(self, eps0: float = 0.0) -> float:
        """R(f,+1;ε₀) - R(f,-1;ε₀): by how much the class with the larger variance fares worse."""
        return float(np.diff(self.errors(eps0))[0])

    def levelled(self, eps0: float = 0.0) -> LinearRule:
        """The rule with b moved so that both errors at test radius `eps0` are equal: Φ(-2(S - τε₀)/(σ(K+1)))."""
        c = (self.S - self.tau * eps0) * (self.task.K - 1) / (self.task.K + 1)
        return replace(self, b=float(c * np.linalg.norm(self.w)))

    def log_gap(self) -> float:
        """ln of the natural gap, which must be positive (`KitError`): accurate where errors underflow, and as K → 1."""
        K, (minus, plus) = self.task.K, self.scores()
        width = ((K - 1) * self.S - (K + 1) * self.c) / (K * self.task.sigma)  # plus - minus, without cancelling
        _need(width > 0, "gap", self.gap(), "a rule that errs more on class +1")
        middle = (minus + plus) / 2
        if width * (1 + abs(middle)) < 0.01:  # the integral of the density by the midpoint rule and its next term
            log_density = -(middle**2) / 2 + math.log1p((middle**2 - 1) * width**2 / 24)
            return math.log(width / math.sqrt(2 * math.pi)) + log_density
        minus, plus = log_ndtr([minus, plus])
        return float(plus + np.log(-np.expm1(minus - plus)))


def intercept(S: float, sigma: float, K: float, prior: float = 0.5) -> float:
    """The c = b/‖w‖₂ that minimises (1-p)·Φ((c-S)/σ) + p·Φ((-c-S)/(Kσ)): w₀/S in Lemmas 1 and 2.

    c = [(K²+1)S - 2K√(S² + ½(K²-1)σ²L)]/(K²-1) with L = ln K at prior ½ and ln(K(1-p)/p) at prior p, in a form that is
    accurate for every K. Finite at prior ½ and K > 1, ±inf where no threshold beats a constant answer: +1 for a large
    enough prior, and for K = 1 without signal (S <= 0) the likelier class (at prior ½: -1, the limit K → 1).
    """
    L = math.log(K) + (math.log1p(-prior) - math.log(prior))  # at prior ½ the bracket is 0, or it swamps a tiny ln K
    a, k2 = 2 * S / sigma, (K - 1) * (K + 1)
    inside = a * a + 2 * k2 * L
    if k2 == 0 and a <= 0:
        return 0.0 if a == L == 0 else math.copysign(math.inf, prior - 0.5 if prior != 0.5 else -1)
    if k2 > 0 and inside <= 0:  # no stationary point: the risk falls all the way to the constant answer +1
        return math.inf
    D = 2 * L / (a + math.sqrt(inside)) if S >= 0 else (math.sqrt(inside) - a) / k2
    z_minus, z_plus = -a / (K + 1) - K * D, -a / (K + 1) + D
    if (1 - prior) * ndtr(z_minus) + prior * ndtr(z_plus) > 1 - prior:  # a local minimum only
        return math.inf
    return S * (K - 1) / (K + 1) - K * sigma * D


def remargin(task: GaussianTask, eps_minus: float, eps_plus: float) -> LinearRule:
    """Remargin in closed form: the optimum when class -1 trains at radius ε₋ and class +1 at ε₊, both in [η, γ].

    Equal robust weights and c = c*(√m(γ - (ε₋+ε₊)/2)) - √m(ε₋ - ε₊)/2, c* from `intercept`. At equal priors, raising ε₊
    lowers class +1's error if and only if its robust error at its own radius ε₊ is below 50 %.
    """
    radii, allowed = (eps_minus, eps_plus), f"radii from eta = {task.eta!r} to gamma = {task.gamma!r} (robust features)"
    _need(all(task.eta <= radius <= task.gamma for radius in radii), "(eps_minus, eps_plus)", radii, allowed)
    root, only_robust = math.sqrt(task.m), np.repeat([1 / math.sqrt(task.m), 0.0], [task.m, task.d])
    c = intercept(root * (task.gamma - (eps_minus + eps_plus) / 2), task.sigma, task.K, task.prior)
    return LinearRule(task, only_robust, c - root * (eps_minus - eps_plus) / 2)


def penalised(task: GaussianTask, eps: float, phi_nat: Pair, phi_bdy: Pair = (0.0, 0.0)) -> LinearRule:
    """FRL's inner problem BEST(f, φ, ε), Eq. (17): minimise Σ P(y)·[(1+φ_nat)·R_nat(f,y) + (1+φ_bdy)·R_bdy(f,y)].

    R_bdy = R_rob - R_nat at radius `eps`; equal multipliers weigh the robust error. Found numerically among constant
    answers and rules whose robust features share one weight, and the others one from 0 to that. See `effective_radius`.
    """
    phis = (*phi_nat, *phi_bdy)
    _need(all(0 <= phi < math.inf for phi in phis), "(*phi_nat, *phi_bdy)", phis, "finite multipliers of at least 0")
    shares, nat, bdy = np.array([1 - task.prior, task.prior]), np.array(phi_nat), np.array(phi_bdy)

    def risk(p: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = 0.0, np.zeros(3)
        for e, weights in ((0.0, shares * (nat - bdy)), (eps, shares * (1 + bdy))):
            means, spreads, sides, slopes = _margins(task, p, e)
            z = -means / spreads
            pull = -weights * np.exp(-z * z / 2) / (math.sqrt(2 * math.pi) * spreads)  # the slope in each mean
            value, slope = value + weights @ ndtr(z), slope + pull @ sides + pull * z @ slopes
        return value, slope

    rules = [rule.levelled(e) for rule in (task.natural(), task.robust(eps)) for e in (0.0, eps)]
    starts = [[1.0, rule.w[-1] / rule.w[0] if task.d else 0.0, rule.b / rule.w[0]] for rule in rules]
    bounds = [(1, 1), (0, 1 if task.d else 0), (None, None)]
    found = (minimize(risk, start, jac=True, bounds=bounds, options=TIGHT) for start in starts)
    best = min(found, key=lambda result: result.fun)
    rule = LinearRule(task, np.repeat(best.x[:2], [task.m, task.d]), float(best.x[2]))
    low, high = shares * (1 + nat)  # what always answering +1, always answering -1 cost; a huge b is no better
    return rule if best.fun < (1 - 1e-9) * min(low, high) else replace(rule, b=math.inf if low < high else -math.inf)


def effective_radius(rule: LinearRule, eps: float, phi_nat: Pair, phi_bdy: Pair = (0.0, 0.0)) -> float:
    """λ = ε·A_rob/(A_rob + A_nat): while 0 <= λ < γ, `penalised`'s optimum has θ soft-thresholded at λ as its weights.

    A_rob = Σ P(y)(1+φ_bdy)φ(z_rob)/σ_y and A_nat = Σ P(y)(φ_nat - φ_bdy)φ(z_nat)/σ_y, φ(z) the normal density. Natural
    multipliers shrink the radius, boundary multipliers stretch it; non-robust features are in use if and only if λ < η.
    """
    _need(math.isfinite(rule.b), "b", rule.b, "a rule that is no constant answer")
    scale = np.array([1 - rule.task.prior, rule.task.prior]) / [1, rule.task.K]
    natural, robust = (scale * np.exp(-(rule.scores(e) ** 2) / 2) for e in (0.0, eps))
    pull = np.add(1, phi_bdy) @ robust
    return float(eps * pull / (pull + np.subtract(phi_nat, phi_bdy) @ natural))


def corrected_bound(task: GaussianTask, eps: float) -> Pair:
    """Lower bounds on Ω's information and threshold parts for ε in [η, γ), at prior ½ and mγ² >= ½σ² ln K.

    With z₋(S), z₊(S) the scores at the best intercept for signal S, W = z₊ - z₋, h(x) = (1 - e⁻ˣ)/x, T = ‖θ‖, s = √m γ:
    [W(s)/W(T)]·max{1, exp(½[z₊(T)² - z₊(s)²])·h(ln K)/h(W(T)|z₊(T)|)}, and 1 + min{z₊ of f_adv - z₊(s), 2|z₊(s)|} over
    W(s)·h(W(s)|z₊(s)|). Notebook 02 proves them. `KitError` outside these conditions.
    """
    _need(task.K > 1 and task.prior == 0.5, "(K, prior)", (task.K, task.prior), "K > 1 and prior = 0.5")
    _need(task.m * (task.gamma / task.sigma) ** 2 >= math.log(task.K) / 2, "gamma", task.gamma, "m(γ/σ)² >= ½ ln K")
    _need(task.eta <= eps < task.gamma, "eps", eps, f"a radius from eta = {task.eta!r} to below gamma = {task.gamma!r}")
    (low, high), (kept_low, kept_high) = task.natural().scores(), replace(task, d=0).natural().scores()
    width, kept = high - low, kept_high - kept_low  # W(T), W(s)
    dense = math.exp(min((high**2 - kept_high**2) / 2, 700.0)) * exprel(-math.log(task.K)) / exprel(high * width)
    rise = min(task.robust(eps).scores()[1] - kept_high, -2 * kept_high)
    return float(kept / width * max(1.0, dense)), float(1 + rise / (kept * exprel(kept_high * kept)))


def train(task: GaussianTask, eps: float, n: int, steps: int, seed: int, sharpness: float = 0.0) -> LinearRule:
    """Train a linear model on `n` sampled points by at most `steps` steps of L-BFGS-B, all m + d weights free.

    The attacked margin is t = y(w·x + b) - ε‖w‖₁, the loss logistic. With `sharpness` k > 0, `steps` more steps go on
    with the sigmoid 1/(1 + exp(k·t/(σ‖w‖₂))), a smooth count of errors. Writing w = u - v with u, v >= 0 makes ‖w‖₁
    smooth, so that weights can become exactly zero.
    """
    (x, y), size = task.sample(n, seed), task.m + task.d
    signed = y[:, None] * np.column_stack([x, np.ones(n)])
    unfold = np.hstack([np.eye(size + 1), -np.eye(size + 1, size)])  # (u, b, v) -> (w, b)
    price = np.r_[np.full(size, eps), 0.0, np.full(size, eps)]  # ε‖w‖₁ = price @ (u, b, v)
    bounds = [(None if i == size else 0.0, None) for i in range(2 * size + 1)]

    def loss(p: np.ndarray, k: float) -> tuple[float, np.ndarray]:
        w = np.append((unfold @ p)[:-1], 0.0)
        scale = k / np.linalg.norm(w) if k else 1.0
        t = scale * (signed @ (unfold @ p) - price @ p)
        value, slope = (expit(-t), -expit(-t) * expit(t)) if k else (np.logaddexp(0, -t), -expit(-t))
        gradient = scale * (unfold.T @ (signed.T @ slope) / n - price * slope.mean())
        return float(value.mean()), gradient - (slope @ t / n * unfold.T @ w / (w @ w) if k else 0.0)

    p = np.zeros(2 * size + 1)
    for k in (0.0, sharpness / task.sigma) if sharpness else (0.0,):
        p = minimize(loss, p, k, "L-BFGS-B", jac=True, bounds=bounds, options={"maxiter": steps}).x
    return LinearRule(task, (unfold @ p)[:-1], float(p[size]))


def logistic_limit(task: GaussianTask, eps: float) -> LinearRule:
    """The minimiser of the expected robust logistic loss (convex, so two weights and b do): `train`, unlimited data."""
    z = np.linspace(-9, 9, 361)
    density = np.exp(-z * z / 2) / np.exp(-z * z / 2).sum()
    shares = np.array([1 - task.prior, task.prior])

    def risk(p: np.ndarray) -> tuple[float, np.ndarray]:
        means, spreads, sides, slopes = _margins(task, p, eps)
        t = means + np.outer(z, spreads)
        pull = -density[:, None] * expit(-t) * shares  # the slope in each margin
        return float(density @ np.logaddexp(0, -t) @ shares), pull.sum(0) @ sides + z @ pull @ slopes

    p = minimize(risk, [0.1, 0.0, 0.0], jac=True, bounds=[(0, None), (0, None), (None, None)], options=TIGHT).x
    return LinearRule(task, np.repeat(p[:2], [task.m, task.d]), float(p[2]))


def _margins(task: GaussianTask, p: np.ndarray, eps: float) -> tuple[np.ndarray, ...]:
    """Means and sds of the classes' attacked margins, their slopes in p = (weight of robust, of other features; b)."""
    reach = np.array([task.m, task.d]) * [task.gamma - eps, task.eta - eps]
    own, square = task.sigma * np.array([1, task.K]), np.array([task.m, task.d]) * p[:2]
    norm = math.sqrt(square @ p[:2])
    sides = np.array([[*reach, -1.0], [*reach, 1.0]])
    return sides @ p, norm * own, sides, np.outer(own, [*square / max(norm, math.ulp(0.0)), 0.0])

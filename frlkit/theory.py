"""The paper's Gaussian example in closed form: which class a linear model fails, how often, and why.

P(y=+1) = `prior`, x | y=+1 ~ N(θ, (Kσ)²I) and x | y=-1 ~ N(-θ, σ²I), where θ is γ on m robust features and η on d
non-robust ones. A linear model sign(w·x + b) enters only through three numbers, all in units of the features:
c = b/‖w‖₂, S = w·θ/‖w‖₂ (signal) and τ = ‖w‖₁/‖w‖₂ (what an ℓ∞ attacker gains per unit of radius). Exactly,

    R(f,-1;ε₀) = Φ((c - S + τε₀)/σ)        R(f,+1;ε₀) = Φ((-c - S + τε₀)/(Kσ))

Radii ε are ℓ∞ and in feature units; errors are fractions in the order (class -1, class +1). The paper's print lost its
roots and has slips in the proofs: notebook 02 lists them, the formulas here are the corrected ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral, Real

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, log_ndtr, ndtr

from frlkit import KitError

Errors = tuple[float, float]  # class -1, class +1


def _need(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise KitError(f"{name} = {value!r} is not allowed: use {allowed}")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _check_radius(name: str, value: float) -> None:
    _need(_is_number(value) and value >= 0, name, value, "a finite radius of at least 0, in the units of the features")


@dataclass(frozen=True)
class GaussianTask:
    """Two Gaussian classes with means ±θ and standard deviations σ (class -1) and Kσ (class +1): the paper's Eq. (1).

    Parameters
    ----------
    m, d : int
        Number of robust (m >= 1) and non-robust (d >= 0) features.
    gamma, eta : float
        Mean of a robust and of a non-robust feature, gamma > eta >= 0, in feature units.
    sigma, K : float
        Standard deviation of class -1 (> 0, feature units) and how many times larger that of class +1 is (>= 1).
    prior : float
        P(y=+1), strictly between 0 and 1. The paper's theorems have 1/2.

    Raises
    ------
    KitError
        An argument outside these ranges.
    """

    m: int
    d: int
    gamma: float
    eta: float
    sigma: float
    K: float
    prior: float = 0.5

    def __post_init__(self) -> None:
        for name, low in (("m", 1), ("d", 0)):
            value = getattr(self, name)
            whole = isinstance(value, Integral) and not isinstance(value, bool)
            _need(whole and value >= low, name, value, f"a whole number of features, at least {low}")
        for name in ("gamma", "eta", "sigma", "K", "prior"):
            _need(_is_number(getattr(self, name)), name, getattr(self, name), "a finite number")
        _need(self.eta >= 0, "eta", self.eta, "a mean of at least 0 (flip the feature's sign)")
        _need(self.gamma > self.eta, "gamma", self.gamma, f"a mean above eta = {self.eta!r} (or swap the two)")
        _need(self.sigma > 0, "sigma", self.sigma, "a standard deviation above 0")
        _need(self.K >= 1, "K", self.K, "a ratio of at least 1 (or swap the two classes)")
        _need(0 < self.prior < 1, "prior", self.prior, "a probability strictly between 0 and 1")

    @property
    def theta(self) -> np.ndarray:
        """The mean of class +1, shape (m + d,)."""
        return np.repeat([float(self.gamma), float(self.eta)], [self.m, self.d])

    def natural(self) -> LinearRule:
        """The minimiser of the natural error (Theorem 1, Lemma 1): weights in the ratio γ:η."""
        return self.robust(0.0)

    def robust(self, eps: float) -> LinearRule:
        """The minimiser of the robust error at training radius `eps` (Theorem 2, Lemma 2), with ‖w‖₂ = 1.

        The weights are θ soft-thresholded at ε: (γ-ε)₊ and (η-ε)₊. Above γ every feature hurts, and the best rule reads
        one robust feature. At ε = γ the robust error is the same for every non-negative weighting of the robust features;
        the limit from below, equal weights, is returned. See `intercept` for when the optimum is a constant classifier.

        Raises
        ------
        KitError
            A negative or infinite radius.
        """
        _check_radius("eps", eps)
        strong, weak = max(self.gamma - eps, 0.0), max(self.eta - eps, 0.0)
        used = 1 if eps > self.gamma else self.m
        size = math.sqrt(used * strong**2 + self.d * weak**2)
        if size == 0:  # eps >= gamma
            strong, size = 1.0, math.sqrt(used)
        direction = LinearRule(self, strong / size, weak / size, 0.0, used)
        return replace(direction, b=intercept(direction.S - direction.tau * eps, self.sigma, self.K, self.prior))

    def omega(self, eps: float) -> float:
        """Ω of Corollary 1: the natural-error gap R₊ - R₋ of the robust model over that of the natural model."""
        return math.exp(self._log_gap(self.robust(eps)) - self._log_gap(self.natural()))

    def decompose(self, eps: float) -> tuple[float, float]:
        """Ω as information part × threshold part; both are above 1 for ε > 0.

        Between the natural and the robust model stands a third: the robust model's weights with the intercept that is
        best for natural data. Going there from the natural model only loses features (information); going on to the
        robust model only moves the intercept (threshold).
        """
        robust, natural = self.robust(eps), self.natural()
        halfway = replace(robust, b=intercept(robust.S, self.sigma, self.K, self.prior))
        step = self._log_gap(halfway)
        return math.exp(step - self._log_gap(natural)), math.exp(self._log_gap(robust) - step)

    def _log_gap(self, rule: LinearRule) -> float:
        """ln(R₊ - R₋) of the natural errors, without cancellation or underflow."""
        _need(self.K > 1, "K", self.K, "K > 1 for Ω (at K = 1 both gaps are zero)")
        _need(self.prior == 0.5, "prior", self.prior, "prior = 0.5 for Ω (Corollary 1 assumes equal classes)")
        low, high = log_ndtr(rule.scores())
        return float(high + np.log(-np.expm1(low - high)))

    def sample(self, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw `n` labelled points: x of shape (n, m + d) and y of shape (n,) with values ±1."""
        rng = np.random.default_rng(seed)
        y = np.where(rng.random(n) < self.prior, 1.0, -1.0)
        spread = np.where(y > 0, self.K * self.sigma, self.sigma)
        return y[:, None] * self.theta + spread[:, None] * rng.standard_normal((n, self.m + self.d)), y


@dataclass(frozen=True)
class LinearRule:
    """sign(w·x + b) with one weight on `used` of the robust features and one on every non-robust feature.

    `b` = ±inf is the constant classifier that always answers that sign.
    """

    task: GaussianTask
    w_robust: float
    w_nonrobust: float
    b: float
    used: int

    @property
    def w(self) -> np.ndarray:
        """All weights, shape (m + d,)."""
        counts = [self.used, self.task.m - self.used, self.task.d]
        return np.repeat([self.w_robust, 0.0, self.w_nonrobust], counts)

    @property
    def norm(self) -> float:
        """‖w‖₂."""
        return math.sqrt(self.used * self.w_robust**2 + self.task.d * self.w_nonrobust**2)

    @property
    def S(self) -> float:  # noqa: N802
        """Signal w·θ/‖w‖₂, in feature units."""
        return (self.used * self.w_robust * self.task.gamma + self.task.d * self.w_nonrobust * self.task.eta) / self.norm

    @property
    def tau(self) -> float:
        """Exposure ‖w‖₁/‖w‖₂ to an ℓ∞ attack."""
        return (self.used * abs(self.w_robust) + self.task.d * abs(self.w_nonrobust)) / self.norm

    def scores(self, eps0: float = 0.0) -> np.ndarray:
        """The z-scores (class -1, class +1) whose Φ are the errors: Theorems 1 and 2 for the optimal rules."""
        _check_radius("eps0", eps0)
        c, reach = self.b / self.norm, self.tau * eps0 - self.S
        return np.array([(c + reach) / self.task.sigma, (-c + reach) / (self.task.K * self.task.sigma)])

    def errors(self, eps0: float = 0.0) -> Errors:
        """Exact error of (class -1, class +1) under an ℓ∞ attack of radius `eps0`; 0 gives the natural errors."""
        low, high = ndtr(self.scores(eps0))
        return float(low), float(high)

    def gap(self, eps0: float = 0.0) -> float:
        """R(f,+1;ε₀) - R(f,-1;ε₀): how much worse the class with the larger variance fares."""
        low, high = self.errors(eps0)
        return high - low


def intercept(S: float, sigma: float, K: float, prior: float = 0.5) -> float:
    """The c = b/‖w‖₂ that minimises (1-p)·Φ((c-S)/σ) + p·Φ((-c-S)/(Kσ)): w₀/S in Lemmas 1 and 2.

    At prior 1/2 this is [(K²+1)S - 2K√(S² + ½(K²-1)σ² ln K)]/(K²-1), evaluated in a form that stays accurate as K → 1
    and for large K; any other prior replaces ln K by ln(K(1-p)/p).

    Returns
    -------
    float
        In the units of S. ±inf where a constant classifier is at least as good as every threshold: always answering +1
        for a large prior (or class weight), and either answer for K = 1 and S < 0, where -inf, the limit of K → 1, breaks
        the tie. At prior 1/2 and K > 1 the result is finite.
    """
    log_odds = math.log(K) + math.log1p(-prior) - math.log(prior)
    a, k2 = 2 * S / sigma, (K - 1) * (K + 1)
    inside = a * a + 2 * k2 * log_odds
    if k2 == 0 and a <= 0:  # without signal, equal variances leave only the prior to go by
        return 0.0 if a == log_odds == 0 else (math.inf if prior > 0.5 else -math.inf)
    if k2 > 0 and inside <= 0:  # the risk falls all the way to always answering +1
        return math.inf
    root = math.sqrt(inside)
    D = 2 * log_odds / (a + root) if S >= 0 else (root - a) / k2
    low, high = -a / (K + 1) - K * D, -a / (K + 1) + D
    if (1 - prior) * ndtr(low) + prior * ndtr(high) > 1 - prior:  # a local minimum only
        return math.inf
    return S * (K - 1) / (K + 1) - K * sigma * D


def reweight(task: GaussianTask, eps: float, weight: float) -> LinearRule:
    """Reweight in closed form: the robust optimum when class +1's robust error counts `weight` times.

    Only the intercept moves: a weight acts as prior odds do. Weight K (at equal priors) equalises the two classes' robust
    errors exactly at ε₀ = ε, as long as ε < γ.
    """
    _need(_is_number(weight) and weight > 0, "weight", weight, "a finite weight above 0 (1 leaves the model as it is)")
    odds = weight * task.prior / (1 - task.prior)
    return replace(replace(task, prior=odds / (1 + odds)).robust(eps), task=task)


def remargin(task: GaussianTask, eps_minus: float, eps_plus: float) -> LinearRule:
    """Remargin in closed form: the optimum when class -1 trains at radius ε₋ and class +1 at ε₊, both from η to γ.

    c = c*(√m(γ - (ε₋+ε₊)/2)) - √m(ε₋ - ε₊)/2 on equal robust weights. Raising ε₊ lowers class +1's error if and only if
    its robust error at its own radius ε₊ is below 50 %.
    """
    for name, value in (("eps_minus", eps_minus), ("eps_plus", eps_plus)):
        allowed = f"a radius from eta = {task.eta!r} to gamma = {task.gamma!r}, where only robust features are used"
        _need(_is_number(value) and task.eta <= value <= task.gamma, name, value, allowed)
    root = math.sqrt(task.m)
    c = intercept(root * (task.gamma - (eps_minus + eps_plus) / 2), task.sigma, task.K, task.prior)
    return LinearRule(task, 1 / root, 0.0, c - root * (eps_minus - eps_plus) / 2, task.m)


def printed_bound(task: GaussianTask) -> float:
    """The lower bound on Ω printed in Eq. (12), with every unspecified Θ constant set to 1. It does not hold."""
    return (task.K**2 - 1) * math.log(task.K) * task.sigma**2 / (2 * task.gamma**2) * math.sqrt(task.d / task.m)


def corrected_bound(task: GaussianTask) -> float:
    """A lower bound on Ω that holds for every ε in [η, γ) when mγ² ≥ ½σ² ln K.

    Λ·max{1, exp(½[z₊(‖θ‖)² - z₊(√m γ)²])/K} with Λ = (√(m+dρ²) + √(m+dρ²+q'))/(√m + √(m+q')), ρ = η/γ and
    q' = σ²(K²-1) ln K/(2γ²); z₊(S) is class +1's z-score at the best intercept for signal S.

    Raises
    ------
    KitError
        mγ² < ½σ² ln K: class +1 would be wrong more often than not.
    """
    least = math.sqrt(math.log(task.K) / 2 / task.m) * task.sigma
    _need(task.gamma >= least, "gamma", task.gamma, f"at least sigma*sqrt(ln(K)/2/m) = {least:g} for this bound")
    features = task.m + task.d * (task.eta / task.gamma) ** 2
    q = task.sigma**2 * (task.K**2 - 1) * math.log(task.K) / (2 * task.gamma**2)
    ratio = (math.sqrt(features) + math.sqrt(features + q)) / (math.sqrt(task.m) + math.sqrt(task.m + q))
    z_all, z_robust = (
        (-intercept(S, task.sigma, task.K) - S) / (task.K * task.sigma)
        for S in (task.gamma * math.sqrt(features), task.gamma * math.sqrt(task.m))
    )
    return ratio * max(1.0, math.exp((z_all**2 - z_robust**2) / 2) / task.K)


def class_errors(task: GaussianTask, w: np.ndarray, b: float, eps0: float = 0.0) -> Errors:
    """Exact errors of (class -1, class +1) of any linear model sign(w·x + b), w of shape (m + d,) and not all zero."""
    reach = eps0 * np.abs(w).sum() - w @ task.theta
    scores = np.array([b + reach, -b + reach]) / np.linalg.norm(w)
    low, high = ndtr(scores / [task.sigma, task.K * task.sigma])
    return float(low), float(high)


def monte_carlo(rule: LinearRule, eps0: float, n: int, seed: int) -> tuple[Errors, Errors]:
    """Errors counted on `n` sampled and attacked points: the estimates and their standard errors, per class.

    The attack is the strongest one, x - y·ε₀·sign(w); no formula of this module is used.
    """
    x, y = rule.task.sample(n, seed)
    margins = y * ((x - y[:, None] * eps0 * np.sign(rule.w)) @ rule.w + rule.b)
    rates = [float((margins[y == label] <= 0).mean()) for label in (-1, 1)]
    spread = [math.sqrt(rate * (1 - rate) / (y == label).sum()) for rate, label in zip(rates, (-1, 1), strict=True)]
    return (rates[0], rates[1]), (spread[0], spread[1])


def _logistic(margin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ln(1 + e^-t) and its slope."""
    return np.logaddexp(0, -margin), -expit(-margin)


def _sigmoid(margin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """1/(1 + e^t), a smooth count of the errors, and its slope."""
    wrong = expit(-margin)
    return wrong, -wrong * (1 - wrong)

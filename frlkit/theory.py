"""The paper's Gaussian example in closed form: which class a linear model fails, how often, and why.

P(y=+1) = `prior`; x | y=+1 ~ N(θ, (Kσ)²I) and x | y=-1 ~ N(-θ, σ²I), where θ is γ on m robust features and η on d
non-robust ones. A linear model sign(w·x + b) enters only through c = b/‖w‖₂, S = w·θ/‖w‖₂ (signal) and τ = ‖w‖₁/‖w‖₂
(what an ℓ∞ attacker gains per unit of radius):

    R(f,-1;ε₀) = Φ((c - S + τε₀)/σ)        R(f,+1;ε₀) = Φ((-c - S + τε₀)/(Kσ))

Radii ε are ℓ∞; radii, c and S are in feature units; errors are fractions in the order (class -1, class +1). The paper's
print lost its roots and has slips in the proofs (notebook 02 lists them): the formulas here are the corrected ones.
"""

from __future__ import annotations

import math
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


def _finite(value: object, kind: type = Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)


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
        _need(_finite(self.m, Integral) and self.m >= 1, "m", self.m, "a whole number of features, at least 1")
        _need(_finite(self.d, Integral) and self.d >= 0, "d", self.d, "a whole number of features, 0 or more")
        _need(_finite(self.eta) and self.eta >= 0, "eta", self.eta, "a finite mean of at least 0 (flip the features)")
        above = f"a finite mean above eta = {self.eta!r} (robust features carry more)"
        _need(_finite(self.gamma) and self.gamma > self.eta, "gamma", self.gamma, above)
        _need(_finite(self.sigma) and self.sigma > 0, "sigma", self.sigma, "a finite standard deviation above 0")
        _need(_finite(self.K) and self.K >= 1, "K", self.K, "a finite ratio of at least 1 (or swap the two classes)")
        _need(_finite(self.prior) and 0 < self.prior < 1, "prior", self.prior, "a probability strictly between 0 and 1")

    @property
    def theta(self) -> np.ndarray:
        """The mean of class +1, shape (m + d,)."""
        return np.repeat([float(self.gamma), float(self.eta)], [self.m, self.d])

    def natural(self) -> LinearRule:
        """The minimiser of the natural error (Theorem 1, Lemma 1): weights in the ratio γ:η."""
        return self.robust(0.0)

    def robust(self, eps: float) -> LinearRule:
        """The minimiser of the robust error at training radius `eps` >= 0 (Theorem 2, Lemma 2), with ‖w‖₂ = 1.

        The weights are θ soft-thresholded at ε. Above γ every feature hurts, and the best rule reads one robust
        feature. At ε = γ every non-negative weighting of the robust features has the same robust error (not the same
        natural error); equal weights, the limit from below, are returned. A constant answer can win: see `intercept`.
        """
        _need(_finite(eps) and eps >= 0, "eps", eps, "a finite radius of at least 0, in feature units")
        w = np.maximum(self.theta - eps, 0.0)
        if eps >= self.gamma:
            w[: 1 if eps > self.gamma else self.m] = 1.0
        direction = LinearRule(self, w / np.linalg.norm(w), 0.0)
        return replace(direction, b=intercept(direction.S - direction.tau * eps, self.sigma, self.K, self.prior))

    def omega(self, eps: float) -> float:
        """Ω of Corollary 1: the natural-error gap R₊ - R₋ of the robust model over that of the natural model."""
        information, threshold = self.decompose(eps)
        return information * threshold

    def decompose(self, eps: float) -> tuple[float, float]:
        """Ω as (information part, threshold part); for ε > 0 the first is at least 1 and the second above 1.

        Between the natural and the robust model stands a third: the robust model's weights with the intercept that is
        best for natural data. Going there from the natural model only loses features (information); going on to the
        robust model only moves the intercept (threshold).

        Raises
        ------
        KitError
            K = 1 (both gaps are zero) or a prior other than 1/2 (Corollary 1 assumes equal classes).
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
        rng = np.random.default_rng(seed)
        y = np.where(np.arange(n) < round(n * self.prior), 1.0, -1.0)
        spread = np.where(y > 0, self.K * self.sigma, self.sigma)
        return y[:, None] * self.theta + spread[:, None] * rng.standard_normal((n, self.m + self.d)), y


@dataclass(frozen=True, eq=False)
class LinearRule:
    """sign(w·x + b) on `task`, w of shape (m + d,) and not all zero; b = ±inf is the constant answer ±1."""

    task: GaussianTask
    w: np.ndarray
    b: float

    @property
    def w_robust(self) -> float:
        """The weight of the first robust feature: of every one for an optimal rule (of no other if ε > γ)."""
        return float(self.w[0])

    @property
    def w_nonrobust(self) -> float:
        """The weight of the last non-robust feature: of every one for an optimal rule; 0 if d = 0."""
        return float(self.w[-1]) if self.task.d else 0.0

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
        _need(_finite(eps0) and eps0 >= 0, "eps0", eps0, "a finite radius of at least 0, in feature units")
        reach = self.tau * eps0 - self.S
        return np.array([self.c + reach, -self.c + reach]) / [self.task.sigma, self.task.K * self.task.sigma]

    def errors(self, eps0: float = 0.0) -> Errors:
        """Exact error of (class -1, class +1) under an ℓ∞ attack of radius `eps0`; 0 gives the natural errors."""
        minus, plus = ndtr(self.scores(eps0))
        return float(minus), float(plus)

    def gap(self, eps0: float = 0.0) -> float:
        """R(f,+1;ε₀) - R(f,-1;ε₀): by how much the class with the larger variance fares worse."""
        minus, plus = self.errors(eps0)
        return plus - minus

    def log_gap(self) -> float:
        """ln of the natural gap: accurate where the errors underflow, and where they nearly agree as K → 1.

        Raises
        ------
        KitError
            The gap is not positive.
        """
        K, (minus, plus) = self.task.K, self.scores()
        width = ((K - 1) * self.S - (K + 1) * self.c) / (K * self.task.sigma)  # plus - minus, without cancelling
        _need(width > 0, "gap", self.gap(), "a rule that errs more on class +1")
        middle = (minus + plus) / 2
        if width * (1 + abs(middle)) < 0.01:  # the integral of the density by the midpoint rule and its next term
            correction = np.log1p((middle**2 - 1) * width**2 / 24)
            return float(math.log(width) - middle**2 / 2 - math.log(2 * math.pi) / 2 + correction)
        minus, plus = log_ndtr([minus, plus])
        return float(plus + np.log(-np.expm1(minus - plus)))


def intercept(S: float, sigma: float, K: float, prior: float = 0.5) -> float:
    """The c = b/‖w‖₂ that minimises (1-p)·Φ((c-S)/σ) + p·Φ((-c-S)/(Kσ)): w₀/S in Lemmas 1 and 2.

    c = [(K²+1)S - 2K√(S² + ½(K²-1)σ²L)]/(K²-1) with L = ln K at prior ½ and ln(K(1-p)/p) at prior p, evaluated in a
    form that stays accurate as K → 1 and for large K.

    Returns
    -------
    float
        In the units of S; finite at prior ½ and K > 1. It is ±inf where no threshold beats a constant answer: +1 for a
        large enough prior, and for K = 1 without signal (S <= 0) the likelier class (at prior ½: -1, the limit K → 1).
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


def reweight(task: GaussianTask, eps: float, weight: float) -> LinearRule:
    """Reweight in closed form: the robust optimum at `eps` when class +1's robust error counts `weight` (> 0) times.

    A weight acts as prior odds do, so only the intercept moves. At equal priors, weight K makes both classes' robust
    errors at ε₀ = ε equal to Φ(-2S_ε/(σ(K+1))), as long as that is below 1/(1+K); beyond, it always answers +1.
    """
    _need(_finite(weight) and weight > 0, "weight", weight, "a finite weight above 0 (1 leaves the model as it is)")
    odds = weight * task.prior / (1 - task.prior)
    return replace(replace(task, prior=odds / (1 + odds)).robust(eps), task=task)


def remargin(task: GaussianTask, eps_minus: float, eps_plus: float) -> LinearRule:
    """Remargin in closed form: the optimum when class -1 trains at radius ε₋ and class +1 at ε₊, both in [η, γ].

    Equal robust weights and c = c*(√m(γ - (ε₋+ε₊)/2)) - √m(ε₋ - ε₊)/2, c* from `intercept`. At equal priors, raising ε₊
    lowers class +1's error if and only if its robust error at its own radius ε₊ is below 50 %.
    """
    for name, value in (("eps_minus", eps_minus), ("eps_plus", eps_plus)):
        allowed = f"a radius from eta = {task.eta!r} to gamma = {task.gamma!r}, where only robust features are used"
        _need(_finite(value) and task.eta <= value <= task.gamma, name, value, allowed)
    root, only_robust = math.sqrt(task.m), np.repeat([1 / math.sqrt(task.m), 0.0], [task.m, task.d])
    c = intercept(root * (task.gamma - (eps_minus + eps_plus) / 2), task.sigma, task.K, task.prior)
    return LinearRule(task, only_robust, c - root * (eps_minus - eps_plus) / 2)


def printed_bound(task: GaussianTask) -> float:
    """The lower bound on Ω printed in Eq. (12), with each unspecified Θ constant set to 1. It does not hold."""
    return (task.K**2 - 1) * math.log(task.K) * task.sigma**2 / (2 * task.gamma**2) * math.sqrt(task.d / task.m)


def corrected_bound(task: GaussianTask) -> float:
    """A lower bound on Ω for every ε in [η, γ), at equal priors and mγ² >= ½σ² ln K (KitError otherwise).

    Λ·max{1, exp(½[z₊(‖θ‖)² - z₊(√m γ)²])/K} with Λ = (√(m+dρ²) + √(m+dρ²+q'))/(√m + √(m+q')), ρ = η/γ and
    q' = σ²(K²-1) ln K/(2γ²), where z₊(S) is class +1's z-score at the best intercept for signal S.
    """
    m, least = task.m, task.sigma * math.sqrt(math.log(task.K) / (2 * task.m))
    _need(task.gamma >= least, "gamma", task.gamma, f"at least sigma*sqrt(ln(K)/(2m)) = {least:g} for this bound")
    M = m + task.d * (task.eta / task.gamma) ** 2
    q = task.sigma**2 * (task.K**2 - 1) * math.log(task.K) / (2 * task.gamma**2)
    ratio = (math.sqrt(M) + math.sqrt(M + q)) / (math.sqrt(m) + math.sqrt(m + q))
    z_all, z_robust = (
        (-intercept(S, task.sigma, task.K) - S) / (task.K * task.sigma)
        for S in (task.gamma * math.sqrt(M), task.gamma * math.sqrt(m))
    )
    with np.errstate(over="ignore"):  # inf, as Ω is in the same place
        return ratio * max(1.0, float(np.exp((z_all**2 - z_robust**2) / 2)) / task.K)


def monte_carlo(rule: LinearRule, eps0: float, n: int, seed: int) -> tuple[Errors, Errors]:
    """Errors counted on `n` points under the strongest attack x - y·ε₀·sign(w): estimates, then standard errors."""
    x, y = rule.task.sample(n, seed)
    wrong = y * ((x - y[:, None] * eps0 * np.sign(rule.w)) @ rule.w + rule.b) <= 0
    rates = np.array([wrong[y < 0].mean(), wrong[y > 0].mean()])
    spread = np.sqrt(rates * (1 - rates) / [(y < 0).sum(), (y > 0).sum()])
    return tuple(rates.tolist()), tuple(spread.tolist())


def train(task: GaussianTask, eps: float, n: int, steps: int, seed: int, sharpness: float = 0.0) -> LinearRule:
    """Train a linear model on `n` sampled points by accelerated projected gradient descent, all m + d weights free.

    The margin under the exact inner maximum is t = y(w·x + b) - ε‖w‖₁ and the loss is logistic. With `sharpness` k > 0,
    `steps` more steps minimise the sigmoid 1/(1 + exp(k·t/σ)), a smooth count of errors, from the logistic solution
    scaled to ‖w‖₂ = 1. Writing w = u - v with u, v >= 0 makes ‖w‖₁ smooth, so that weights can become exactly zero.
    """
    x, y = task.sample(n, seed)
    size = task.m + task.d
    signed = y[:, None] * np.column_stack([x, np.ones(n)])
    unfold = np.hstack([np.eye(size + 1), -np.eye(size + 1, size)])  # (u, b, v) -> (w, b)
    price = np.r_[np.full(size, eps), 0.0, np.full(size, eps)]  # ε‖w‖₁ = price @ (u, b, v)
    floor = np.where(np.arange(2 * size + 1) == size, -np.inf, 0.0)
    curvature = 2 * (np.linalg.eigvalsh(signed.T @ signed / n)[-1] + eps**2 * size)

    def descend(p: np.ndarray, k: float, sigmoid: bool) -> np.ndarray:
        rate = 4 / (k**2 * curvature)  # the second derivative of either loss is at most k²/4
        ahead, age = p, 0
        for _ in range(steps):
            t = k * (signed @ (unfold @ ahead) - price @ ahead)
            slope = -k * expit(-t) * (expit(t) if sigmoid else 1.0)
            gradient = unfold.T @ (signed.T @ slope) / n - price * slope.mean()
            new = np.maximum(ahead - rate * gradient, floor)
            age = 0 if (ahead - new) @ (new - p) > 0 else age + 1  # drop momentum that points uphill
            ahead, p = np.maximum(new + age / (age + 3) * (new - p), floor), new
        return p

    p = descend(np.zeros(2 * size + 1), 1.0, sigmoid=False)
    if sharpness:
        p = descend(p / np.linalg.norm((unfold @ p)[:-1]), sharpness / task.sigma, sigmoid=True)
    *w, b = unfold @ p
    return LinearRule(task, np.array(w), float(b))


def logistic_limit(task: GaussianTask, eps: float) -> LinearRule:
    """The minimiser of the expected robust logistic loss: where `train` ends with unlimited data.

    The problem is convex, so any descent ends there. By symmetry two weights and b suffice, and each class's margin is
    Gaussian, so its expected loss is one sum over a fine grid of z-scores.
    """
    z = np.linspace(-9, 9, 361)
    density = np.exp(-z * z / 2) / np.exp(-z * z / 2).sum()
    count, signal = np.array([task.m, task.d]), np.array([task.gamma, task.eta]) - eps
    labels, shares = np.array([-1.0, 1.0]), np.array([1 - task.prior, task.prior])
    spreads = np.array([task.sigma, task.K * task.sigma])

    def risk(p: np.ndarray) -> float:
        w, b = p[:2], p[2]
        margins = count @ (w * signal) + labels * b + np.outer(z, spreads) * math.sqrt(count @ w**2)
        return float(density @ np.logaddexp(0, -margins) @ shares)

    bounds = [(0, None), (0, None if task.d else 0), (None, None)]
    best = minimize(risk, [0.1, 0.0, 0.0], jac="3-point", bounds=bounds, options={"ftol": 1e-15, "gtol": 1e-9})
    return LinearRule(task, np.repeat(best.x[:2], count), float(best.x[2]))

"""The Gaussian theory against independent oracles: numerical minimisation, mpmath, Monte-Carlo, algebra."""

from __future__ import annotations

import math
from dataclasses import replace

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import norm

from frlkit import KitError, theory
from frlkit.theory import GaussianTask

TASK = GaussianTask(m=3, d=20, gamma=1.0, eta=0.4, sigma=1.5, K=2.0)
tasks = st.builds(
    GaussianTask,
    m=st.integers(1, 20),
    d=st.integers(0, 500),
    gamma=st.floats(0.5, 3),
    eta=st.floats(0.01, 0.49),
    sigma=st.floats(0.3, 5),
    K=st.floats(1.05, 20),
)


def risk(task: GaussianTask, w: np.ndarray, b: float, eps: float) -> float:
    """Robust error of any linear model, written out from the two normal distributions, averaged by the prior."""
    theta = np.array([task.gamma] * task.m + [task.eta] * task.d)
    attacked, size = eps * np.abs(w).sum(), np.linalg.norm(w)
    minus = norm.sf((w @ theta - b - attacked) / (task.sigma * size))
    plus = norm.sf((w @ theta + b - attacked) / (task.K * task.sigma * size))
    return (1 - task.prior) * minus + task.prior * plus


@pytest.mark.parametrize("eps", [0.0, 0.2, 0.4, 0.7, 0.95])
@pytest.mark.parametrize("prior", [0.5, 0.3, 0.6])
def test_no_linear_model_beats_the_closed_form(eps: float, prior: float) -> None:
    task = replace(TASK, prior=prior, d=4)
    rule = task.robust(eps)
    low, high = rule.errors(eps)
    best = (1 - prior) * low + prior * high
    if math.isfinite(rule.b):
        assert best == pytest.approx(risk(task, rule.w, rule.b, eps), rel=1e-12)
    else:
        assert best == pytest.approx(1 - prior)  # always answering +1
    center = np.append(rule.w, rule.b if math.isfinite(rule.b) else 0.0)
    generator = np.random.default_rng(0)
    for spread in (0.0, 0.3, 0.6, 1.0):
        start = center + spread * generator.standard_normal(len(center))
        found = minimize(lambda v: risk(task, v[:-1], v[-1], eps), start, method="BFGS")
        assert found.fun >= best - 1e-9


def test_brute_force_grid_in_two_dimensions() -> None:
    task = GaussianTask(m=1, d=1, gamma=1.0, eta=0.4, sigma=0.8, K=3.0)
    for eps in (0.0, 0.2, 0.6):
        rule = task.robust(eps)
        angles, offsets = np.meshgrid(np.linspace(-math.pi, math.pi, 721), np.linspace(-3, 3, 121), indexing="ij")
        w = np.stack([np.cos(angles), np.sin(angles)])  # unit length
        signal, attacked = w[0] * task.gamma + w[1] * task.eta, eps * np.abs(w).sum(0)
        minus = norm.sf((signal - offsets - attacked) / task.sigma)
        total = (minus + norm.sf((signal + offsets - attacked) / (task.K * task.sigma))) / 2
        at = np.unravel_index(total.argmin(), total.shape)
        value, angle, b = total[at], angles[at], offsets[at]
        assert value == pytest.approx(risk(task, rule.w, rule.b, eps), abs=2e-4)
        assert math.atan2(rule.w_nonrobust, rule.w_robust) == pytest.approx(angle, abs=0.02)
        assert rule.b == pytest.approx(b, abs=0.06)


def test_above_gamma_one_coordinate_is_best() -> None:
    task = GaussianTask(m=4, d=3, gamma=1.0, eta=0.3, sigma=1.0, K=1.5)
    rule = task.robust(1.4)
    assert np.count_nonzero(rule.w) == 1
    everything = replace(rule, w=np.array([0.5] * 4 + [0.0] * 3))
    assert sum(rule.errors(1.4)) < sum(everything.errors(1.4))


@pytest.mark.parametrize(("m", "K"), [(400, 2.0), (100, 300.0), (120, 1.0 + 1e-9)])
def test_tiny_errors_and_extreme_ratios_against_fifty_digits(m: int, K: float) -> None:
    task = GaussianTask(m=m, d=0, gamma=1.0, eta=0.0, sigma=1.0, K=K)
    with mpmath.workdps(50):
        S, k = mpmath.sqrt(m), mpmath.mpf(K)
        root = mpmath.sqrt(S**2 + (k**2 - 1) / 2 * mpmath.log(k))
        c = ((k**2 + 1) * S - 2 * k * root) / (k**2 - 1)
        expected = [float(mpmath.ncdf(c - S)), float(mpmath.ncdf((-c - S) / k))]
    assert task.natural().errors() == pytest.approx(expected, rel=1e-9, abs=0)
    if m == 400:
        assert 0 < min(expected) < 1e-25


@pytest.mark.parametrize("eps", [0.0, 0.2, 0.7])
def test_monte_carlo_agrees(eps: float) -> None:
    rule = TASK.robust(eps)
    for eps0 in (0.0, 0.3):
        rates, errors = theory.monte_carlo(rule, eps0, 40_000, seed=1)
        assert np.all(np.abs(np.subtract(rates, rule.errors(eps0))) < 4 * np.array(errors))
        assert all(0 < error < 0.005 for error in errors)


def test_theorem_2_as_printed_with_its_roots_restored() -> None:
    m, gamma, sigma, K, eps, eps0 = 3, 1.0, 1.5, 2.0, 0.5, 0.3
    B = 2 * math.sqrt(m) * (gamma - eps) / (sigma * (K**2 - 1))
    q = 2 * math.log(K) / (K**2 - 1)
    shift = math.sqrt(m) * (eps0 - eps) / sigma
    expected = norm.cdf([B - K * math.sqrt(B**2 + q) + shift, -K * B + math.sqrt(B**2 + q) + shift / K])
    assert TASK.robust(eps).errors(eps0) == pytest.approx(list(expected), rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(tasks, st.floats(0.01, 0.99))
def test_properties(task: GaussianTask, share: float) -> None:
    eps = share * task.gamma
    natural, robust = task.natural(), task.robust(eps)
    assert task.robust(0.0).errors(0.3) == natural.errors(0.3)
    if task.d:
        assert robust.w_robust * max(task.eta - eps, 0) == pytest.approx(robust.w_nonrobust * (task.gamma - eps))
    low, high = robust.scores(eps)
    assert math.log(task.K) - low**2 / 2 == pytest.approx(
        -(high**2) / 2, abs=1e-6 + 1e-9 * low**2
    )  # K phi(z-) = phi(z+)
    if min(natural.errors()) > 1e-200:
        omega = task.omega(eps)
        assert omega > 1 - 1e-9
        assert math.prod(task.decompose(eps)) == pytest.approx(omega, rel=1e-9)
    if eps >= task.eta and task.m * task.gamma**2 >= 0.5 * task.sigma**2 * math.log(task.K):
        assert task.omega(eps) > theory.corrected_bound(task) * (1 - 1e-9)
    above_half = robust.errors(eps)[1] > 0.5
    threshold = 0.5 * task.sigma**2 * math.log(task.K)
    signal = robust.S - robust.tau * eps
    if abs(signal**2 - threshold) > 1e-6:
        assert above_half == (signal**2 < threshold)


@settings(max_examples=40, deadline=None)
@given(tasks, st.floats(0.1, 10), st.floats(0, 0.9))
def test_units_do_not_matter(task: GaussianTask, unit: float, share: float) -> None:
    scaled = replace(task, gamma=task.gamma * unit, eta=task.eta * unit, sigma=task.sigma * unit)
    eps = share * task.gamma
    assert scaled.robust(eps * unit).errors(eps * unit) == pytest.approx(
        task.robust(eps).errors(eps), rel=1e-6, abs=1e-12
    )


def test_equal_variances_have_no_gap() -> None:
    task = replace(TASK, K=1.0)
    for eps in (0.0, 0.2, 0.6):
        assert task.robust(eps).gap(eps) == pytest.approx(0.0, abs=1e-15)
    near = replace(TASK, K=1 + 1e-12).robust(0.5)
    assert near.errors() == pytest.approx(task.robust(0.5).errors(), rel=1e-9)


def test_extreme_priors_end_in_a_constant_classifier() -> None:
    rule = replace(TASK, prior=0.9999).robust(0.9)
    assert rule.b == math.inf
    assert rule.errors() == (1.0, 0.0)


def test_reweight_by_k_equalises_the_robust_errors_while_they_are_small() -> None:
    equalised = 0
    for sigma in (0.4, 0.8, 1.5, 3.0):
        for eps in (0.0, 0.2, 0.6):
            task = replace(TASK, sigma=sigma)
            rule = theory.reweight(task, eps, task.K)
            low, high = rule.errors(eps)
            direction = task.robust(eps)
            common = norm.cdf(-2 * (direction.S - direction.tau * eps) / sigma / (task.K + 1))
            if common < 1 / (1 + task.K):
                equalised += 1
                assert (low, high) == pytest.approx((common, common), rel=1e-9)
            else:  # then always answering +1 costs less than the balanced rule
                assert (rule.b, low, high) == (math.inf, 1.0, 0.0)
    assert 0 < equalised < 12
    assert theory.reweight(TASK, 0.6, 1.0).errors(0.3) == pytest.approx(TASK.robust(0.6).errors(0.3), rel=1e-12)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0, 4.0])
def test_remargin_helps_only_below_half(sigma: float) -> None:
    task = replace(TASK, sigma=sigma)
    for eps_plus in (0.5, 0.6, 0.7, 0.8, 0.9):
        rule = theory.remargin(task, 0.5, eps_plus)
        grown = theory.remargin(task, 0.5, eps_plus + 1e-5)
        helps = grown.errors(0.5)[1] < rule.errors(0.5)[1]
        assert helps == (rule.errors(eps_plus)[1] < 0.5)
    same, robust = theory.remargin(task, 0.5, 0.5), task.robust(0.5)
    assert same.errors(0.5) == pytest.approx(robust.errors(0.5), rel=1e-12)


def test_remargin_is_the_minimiser_of_its_own_risk() -> None:
    eps_minus, eps_plus = 0.5, 0.7
    rule = theory.remargin(TASK, eps_minus, eps_plus)

    def own(b: float) -> float:
        shifted = replace(rule, b=b)
        return shifted.errors(eps_minus)[0] + shifted.errors(eps_plus)[1]

    grid = np.linspace(rule.b - 2, rule.b + 2, 4001)
    assert grid[np.argmin([own(b) for b in grid])] == pytest.approx(rule.b, abs=2e-3)


def test_the_papers_swap_argument_fails() -> None:
    signal = [sum(w) / math.sqrt(sum(v * v for v in w)) for w in ((1, 2, 1, 1, 1, 1), (2, 2, 1, 1, 1, 1))]
    assert [round(value, 4) for value in signal] == [2.3333, 2.3094]


def test_trained_models_reach_their_optima() -> None:
    task = GaussianTask(2, 8, 1.0, 0.3, 1.0, 3.0)
    for eps in (0.0, 0.5):
        rule = task.robust(eps)
        sharp = theory.train(task, eps, n=40_000, steps=300, seed=0, sharpness=8.0)
        assert sum(sharp.errors(eps)) == pytest.approx(sum(rule.errors(eps)), rel=0.01)
        assert (np.abs(sharp.w[2:]) < 1e-9).all() == (eps > 0)
        optimum = theory.logistic_limit(task, eps)
        trained = theory.train(task, eps, n=40_000, steps=300, seed=0)
        assert trained.w[:2].mean() == pytest.approx(optimum.w_robust, rel=0.05)
        assert trained.b == pytest.approx(optimum.b, abs=0.05)


def test_a_logistic_model_can_reverse_the_claim() -> None:
    task = GaussianTask(1, 100, 1.0, 0.5, 4.0, 2.0)
    natural, robust = theory.logistic_limit(task, 0.0), theory.logistic_limit(task, 0.8)
    assert robust.gap() / natural.gap() < 1 < task.omega(0.8)


def test_sampler_has_the_stated_moments() -> None:
    x, y = TASK.sample(40_000, seed=3)
    for label, spread in ((-1, TASK.sigma), (1, TASK.K * TASK.sigma)):
        part = x[y == label]
        assert part.mean(0) == pytest.approx(label * TASK.theta, abs=6 * spread / math.sqrt(len(part)))
        assert part.std(0) == pytest.approx(np.full(23, spread), rel=0.05)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("m", 0),
        ("m", 1.5),
        ("d", -1),
        ("gamma", 0.1),
        ("eta", -0.1),
        ("sigma", 0),
        ("K", 0.5),
        ("K", math.nan),
        ("prior", 1),
    ],
)
def test_bad_arguments_are_named(field: str, value: float) -> None:
    with pytest.raises(KitError, match=rf"^{field} = .* is not allowed: use "):
        replace(TASK, **{field: value})


def test_bad_radius_is_named() -> None:
    for call in (TASK.robust, TASK.natural().errors):
        with pytest.raises(KitError, match="is not allowed: use a finite radius"):
            call(-0.1)

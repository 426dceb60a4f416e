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


@pytest.mark.parametrize("eps", [0.0, 0.2, 0.6])
def test_brute_force_grid_in_two_dimensions(eps: float) -> None:
    task = GaussianTask(m=1, d=1, gamma=1.0, eta=0.4, sigma=0.8, K=3.0)
    angle, b = np.meshgrid(np.linspace(-math.pi, math.pi, 721), np.linspace(-3, 3, 601), indexing="ij")
    signal = np.cos(angle) + 0.4 * np.sin(angle) - eps * (np.abs(np.cos(angle)) + np.abs(np.sin(angle)))
    risks = norm.cdf((b - signal) / 0.8) / 2 + norm.cdf((-b - signal) / 2.4) / 2
    best, rule = risks.argmin(), task.robust(eps)
    assert sum(rule.errors(eps)) / 2 == pytest.approx(risks.flat[best], abs=1e-5)
    assert sum(rule.errors(eps)) / 2 <= risks.min() + 1e-12
    assert math.atan2(rule.w[1], rule.w[0]) == pytest.approx(angle.flat[best], abs=0.01)
    assert rule.b == pytest.approx(b.flat[best], abs=0.02)


def test_above_gamma_one_coordinate_is_best() -> None:
    task = GaussianTask(m=4, d=3, gamma=1.0, eta=0.3, sigma=1.0, K=1.5)
    rule = task.robust(1.4)
    assert np.count_nonzero(rule.w) == 1
    assert sum(rule.errors(1.4)) == pytest.approx(2 * risk(task, np.eye(7)[0], rule.b, 1.4), rel=1e-12)
    generator = np.random.default_rng(0)
    starts = [np.append(np.repeat([0.5, 0.0], [4, 3]), -1.0), *generator.standard_normal((5, 8))]
    for start in starts:
        found = minimize(
            lambda v: risk(task, v[:-1], v[-1], 1.4), start, method="Nelder-Mead", options={"maxiter": 500}
        )
        assert found.fun >= sum(rule.errors(1.4)) / 2 - 1e-9
    everything = replace(rule, w=np.repeat([0.5, 0.0], [4, 3]))
    everything = replace(everything, b=theory.intercept(4 * 0.5 * (1.0 - 1.4), 1.0, 1.5))
    assert sum(rule.errors(1.4)) < sum(everything.errors(1.4))


def test_at_gamma_only_the_robust_error_is_unique() -> None:
    rule = TASK.robust(TASK.gamma)
    single = replace(rule, w=np.eye(23)[0])
    assert single.errors(TASK.gamma) == pytest.approx(rule.errors(TASK.gamma), rel=1e-12)
    assert single.errors() != pytest.approx(rule.errors(), rel=1e-3)
    near = TASK.robust(TASK.gamma - 1e-9)
    assert near.errors() == pytest.approx(rule.errors(), rel=1e-6)


@pytest.mark.parametrize(("m", "K"), [(400, 2.0), (100, 300.0), (90_000, 300.0), (120, 1.0 + 1e-9)])
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


@pytest.mark.parametrize(
    "rule",
    [
        *(TASK.robust(eps) for eps in (0.0, 0.2, 0.7)),
        theory.LinearRule(replace(TASK, m=1, d=2), np.array([1.0, -0.5, 0.0]), 0.3),
    ],
)
def test_errors_are_what_counting_attacked_points_gives(rule: theory.LinearRule) -> None:
    for eps0 in (0.0, 0.3):
        x, y = rule.task.sample(40_000, seed=1)
        attacked = x - eps0 * y[:, None] * np.sign(rule.w)  # the strongest attack on a linear model
        wrong = y * (attacked @ rule.w + rule.b) <= 0
        for label, error in zip((-1, 1), rule.errors(eps0), strict=True):
            assert wrong[y == label].mean() == pytest.approx(error, abs=4 * math.sqrt(error * (1 - error) / 20_000))


def test_theorem_2_as_printed_with_its_roots_restored() -> None:
    m, gamma, sigma, K, eps, eps0 = 3, 1.0, 1.5, 2.0, 0.5, 0.3
    B = 2 * math.sqrt(m) * (gamma - eps) / (sigma * (K**2 - 1))
    q = 2 * math.log(K) / (K**2 - 1)
    shift = math.sqrt(m) * (eps0 - eps) / sigma
    expected = norm.cdf([B - K * math.sqrt(B**2 + q) + shift, -K * B + math.sqrt(B**2 + q) + shift / K])
    assert TASK.robust(eps).errors(eps0) == pytest.approx(list(expected), rel=1e-12)


@pytest.mark.parametrize("eps", [0.0, 0.4, 0.7])
def test_lemmas_1_and_2_ratios_of_the_weights_and_the_intercept(eps: float) -> None:
    m, d, gamma, eta, sigma, K = 3, 20, 1.3, 0.4, 1.5, 2.0
    rule = GaussianTask(m, d, gamma, eta, sigma, K).robust(eps)
    S2 = m * gamma**2 + d * eta**2 if eps == 0 else m * (gamma - eps) ** 2
    root = math.sqrt(4 / (K**2 - 1) ** 2 + 2 * sigma**2 * math.log(K) / (S2 * (K**2 - 1)))
    w0 = S2 * ((K**2 + 1) / (K**2 - 1) - K * root)
    assert rule.b / rule.w[0] == pytest.approx(w0 / (gamma - eps), rel=1e-12)
    assert rule.w[-1] / rule.w[0] == pytest.approx(eta / gamma if eps == 0 else 0)


def test_information_is_what_dropping_the_features_alone_costs() -> None:
    information, threshold = TASK.decompose(0.6)
    fewer = replace(TASK, d=0)
    assert information == pytest.approx(fewer.natural().gap() / TASK.natural().gap(), rel=1e-9)
    assert threshold == pytest.approx(TASK.robust(0.6).gap() / fewer.natural().gap(), rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(tasks, st.floats(0.01, 0.99))
def test_properties(task: GaussianTask, share: float) -> None:
    eps = share * task.gamma
    natural, robust = task.natural(), task.robust(eps)
    soft = np.maximum(task.theta - eps, 0)
    assert robust.w == pytest.approx(soft / np.linalg.norm(soft))
    np.testing.assert_array_equal(task.robust(0.0).w, natural.w)
    assert task.robust(0.0).b == natural.b
    low, high = robust.scores(eps)
    assert math.log(task.K) - low**2 / 2 == pytest.approx(
        -(high**2) / 2, abs=1e-6 + 1e-9 * low**2
    )  # K phi(z-) = phi(z+)
    if min(natural.errors()) > 1e-200:
        omega = task.omega(eps)
        assert omega > 1
        assert omega == pytest.approx(robust.gap() / natural.gap(), rel=1e-5)
        information, threshold = task.decompose(eps)
        assert (information >= 1 - 1e-9) and threshold > 1
        for multiplier in (0.0, 0.5, 0.9, 1.1, 3.0):  # the robust gap peaks at the training radius
            assert robust.gap(eps * multiplier) <= robust.gap(eps) + 1e-15
    if eps >= task.eta and task.m * task.gamma**2 >= 0.5 * task.sigma**2 * math.log(task.K):
        below = theory.corrected_bound(task, eps)
        assert all(low <= part * (1 + 1e-7) for low, part in zip(below, task.decompose(eps), strict=True))
        assert below[0] >= 1 and below[1] > 1
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
    with pytest.raises(KitError, match=r"^K = 1.0 is not allowed: use K > 1 for Ω"):
        task.omega(0.5)
    with pytest.raises(KitError, match=r"^prior = 0.3 is not allowed"):
        replace(TASK, prior=0.3).omega(0.5)


@pytest.mark.parametrize(("m", "K"), [(2, 1 + 1e-15), (2, 1 + 1e-9), (2, 1.01), (2, 2.0), (2, 300.0), (9000, 2.0)])
def test_omega_against_fifty_digits(m: int, K: float) -> None:
    task = GaussianTask(m=m, d=3000, gamma=1.0, eta=0.4, sigma=1.0, K=K)
    eps = 0.5
    with mpmath.workdps(60):
        k, gaps = mpmath.mpf(K), []
        for square, kept in ((m + 3000 * mpmath.mpf(0.4) ** 2, 1), (m, 1 - mpmath.mpf(eps))):
            S = mpmath.sqrt(square)
            trained = S * kept  # sqrt(m)(gamma - eps) for the robust model
            c = ((k**2 + 1) * trained - 2 * k * mpmath.sqrt(trained**2 + (k**2 - 1) / 2 * mpmath.log(k))) / (k**2 - 1)
            gaps.append(mpmath.ncdf((-c - S) / k) - mpmath.ncdf(c - S))
        assert task.omega(eps) == pytest.approx(float(gaps[1] / gaps[0]), rel=1e-9)
        assert (gaps[0] < 1e-320) == (m == 9000)  # less than a double can hold


def test_log_gap_needs_a_gap() -> None:
    rule = TASK.natural()
    assert math.exp(rule.log_gap()) == pytest.approx(rule.gap(), rel=1e-12)
    with pytest.raises(KitError, match=r"^gap = -.* is not allowed: use a rule that errs more on class \+1"):
        replace(rule, b=rule.b + 5).log_gap()


def test_equal_variances_above_gamma_leave_only_the_prior() -> None:
    for prior, answer in ((0.3, -math.inf), (0.5, -math.inf), (0.7, math.inf)):
        assert replace(TASK, K=1.0, prior=prior).robust(1.2).b == answer
    assert replace(TASK, K=1.0).robust(1.0).b == 0


def test_a_constant_answer_wins_exactly_when_no_threshold_beats_it() -> None:
    outcomes = set()
    c = np.linspace(-60, 60, 24_001)
    for S in (-1.0, 0.0, 0.5, 2.0):
        for K in (1.5, 4.0):
            for prior in (0.2, 0.5, 0.6, 0.8, 0.95):
                best = theory.intercept(S, 1.0, K, prior)
                risks = (1 - prior) * norm.cdf(c - S) + prior * norm.cdf((-c - S) / K)
                finite = bool(risks.min() < 1 - prior - 1e-9)
                outcomes.add(finite)
                assert math.isfinite(best) == finite
                if finite:
                    assert best == pytest.approx(c[risks.argmin()], abs=0.006)
    assert outcomes == {True, False}


def test_extreme_priors_end_in_a_constant_classifier() -> None:
    rule = replace(TASK, prior=0.9999).robust(0.9)
    assert rule.b == math.inf
    assert rule.errors() == (1.0, 0.0)


def reweight(task: GaussianTask, eps: float, weight: float) -> theory.LinearRule:
    """Class +1's robust error counts `weight` times: in closed form, as prior odds."""
    odds = weight * task.prior / (1 - task.prior)
    return replace(replace(task, prior=odds / (1 + odds)).robust(eps), task=task)


def test_weight_k_equalises_the_robust_errors_while_they_are_small() -> None:
    equalised = 0
    for sigma in (0.4, 0.8, 1.5, 3.0):
        for eps in (0.0, 0.2, 0.6):
            task = replace(TASK, sigma=sigma)
            rule = reweight(task, eps, task.K)
            low, high = rule.errors(eps)
            direction = task.robust(eps)
            common = norm.cdf(-2 * (direction.S - direction.tau * eps) / sigma / (task.K + 1))
            assert direction.levelled(eps).errors(eps) == pytest.approx((common, common), rel=1e-9)
            if common < 1 / (1 + task.K):
                equalised += 1
                assert (low, high) == pytest.approx((common, common), rel=1e-9)
            else:  # then always answering +1 costs less than the balanced rule
                assert (rule.b, low, high) == (math.inf, 1.0, 0.0)
    assert 0 < equalised < 12


@pytest.mark.parametrize("prior", [0.5, 0.35])
def test_reweight_minimises_the_weighted_risk(prior: float) -> None:
    task = replace(TASK, prior=prior)
    rule = reweight(task, 0.3, 1.7)
    b = np.linspace(-5, 5, 2001)
    candidates = [replace(rule, b=value).errors(0.3) for value in b]
    risks = [(1 - prior) * minus + 1.7 * prior * plus for minus, plus in candidates]
    assert rule.b == pytest.approx(b[np.argmin(risks)], abs=0.005)


@pytest.mark.parametrize("weight", [0.4, 1.0, 1.8, 30.0])
def test_equal_multipliers_weigh_the_robust_error(weight: float) -> None:
    phi = (0.0, weight - 1) if weight >= 1 else (1 / weight - 1, 0.0)
    for eps in (0.2, 0.6):
        found, closed = theory.penalised(TASK, eps, phi, phi), reweight(TASK, eps, weight)
        assert found.errors(eps) == pytest.approx(closed.errors(eps), abs=1e-6)
        assert found.errors() == pytest.approx(closed.errors(), abs=1e-5)


def penalty(rule: theory.LinearRule, eps: float, nat: np.ndarray, bdy: np.ndarray) -> float:
    """What FRL's inner problem minimises, written out."""
    natural, robust = np.array(rule.errors()), np.array(rule.errors(eps))
    shares = [1 - rule.task.prior, rule.task.prior]
    return float(shares @ ((1 + nat) * natural + (1 + bdy) * (robust - natural)))


@pytest.mark.parametrize("prior", [0.5, 0.4])
@pytest.mark.parametrize("phi_nat", [(0.0, 0.3), (0.0, 3.0), (2.0, 0.5), (0.0, 40.0)])
@pytest.mark.parametrize("phi_bdy", [(0.0, 0.0), (0.0, 0.4), (0.2, 0.0)])
def test_no_weights_at_all_beat_the_penalised_optimum(phi_nat: tuple, phi_bdy: tuple, prior: float) -> None:
    task, eps = GaussianTask(2, 5, 1.0, 0.4, 0.7, 2.0, prior), 0.5
    nat, bdy = np.array(phi_nat), np.array(phi_bdy)
    rule = theory.penalised(task, eps, phi_nat, phi_bdy)
    least = penalty(rule, eps, nat, bdy)
    generator = np.random.default_rng(0)
    for _ in range(4):
        start = np.append(np.maximum(rule.w, 0.05) + 0.4 * generator.standard_normal(7), generator.standard_normal())
        found = minimize(
            lambda v: penalty(theory.LinearRule(task, v[:-1], v[-1]), eps, nat, bdy), start, method="L-BFGS-B"
        )
        assert found.fun >= least - 1e-8
    assert least <= min((1 - prior) * (1 + nat[0]), prior * (1 + nat[1])) + 1e-12  # the constant answers


def test_natural_multipliers_bring_non_robust_features_back_exactly_below_eta() -> None:
    used = []
    for eps in (0.42, 0.5, 0.7):
        for phi in ((0.0, 0.0), (0.0, 0.5), (0.0, 2.0), (1.0, 1.0)):
            task = replace(TASK, sigma=0.7)
            rule = theory.penalised(task, eps, phi)
            radius = theory.effective_radius(rule, eps, phi)
            assert 0 < radius <= eps * (1 + 1e-12)
            soft = np.maximum(task.theta - radius, 0)
            assert rule.w / np.linalg.norm(rule.w) == pytest.approx(soft / np.linalg.norm(soft), abs=1e-4)
            used.append(bool(rule.w[-1] > 1e-6))
            assert used[-1] == (radius < task.eta)
    assert 0 < sum(used) < len(used)
    stretched = theory.penalised(TASK, 0.5, (0.0, 0.0), (0.0, 0.3))
    assert theory.effective_radius(stretched, 0.5, (0.0, 0.0), (0.0, 0.3)) > 0.5
    with pytest.raises(KitError, match=r"is not allowed: use finite multipliers of at least 0"):
        theory.penalised(TASK, 0.5, (0.0, math.nan))


def test_a_natural_multiplier_keeps_half_the_radius_and_a_large_one_ends_in_a_constant_answer() -> None:
    task, finite = replace(TASK, sigma=0.6), 0
    for eps in (0.42, 0.6, 0.8, 0.9):
        for phi in (0.5, 3.0, 10.0, 40.0):
            rule = theory.penalised(task, eps, (0.0, phi))
            if math.isfinite(rule.b):
                finite += 1
                assert 0.5 * eps < theory.effective_radius(rule, eps, (0.0, phi)) < eps
                assert rule.w[-1] == 0 or eps < 2 * task.eta
    assert finite > 8
    constant = theory.penalised(TASK, 0.6, (0.0, 1000.0))
    assert (constant.b, constant.errors(0.6)) == (math.inf, (1.0, 0.0))
    assert -math.inf < theory.penalised(TASK, 0.6, (1000.0, 0.0)).b < 0  # the wide class always has points far out
    with pytest.raises(KitError, match=r"^b = inf is not allowed: use a rule that is no constant answer"):
        theory.effective_radius(constant, 0.6, (0.0, 1000.0))


@pytest.mark.parametrize("sigma", [0.5, 1.0, 1.8, 2.5, 4.0])
def test_a_boundary_multiplier_costs_the_class_only_where_it_is_mostly_wrong(sigma: float) -> None:
    """It raises class +1's own natural error if and only if its natural and robust errors sum to above one."""
    task = replace(TASK, sigma=sigma)
    before, after = theory.penalised(task, 0.5, (0.0, 0.0)), theory.penalised(task, 0.5, (0.0, 0.0), (0.0, 0.02))
    assert (before.w[-1], after.w[-1]) == (0, 0)
    assert (after.errors()[1] > before.errors()[1]) == (before.errors()[1] + before.errors(0.5)[1] > 1)


def test_moving_the_intercept_alone_removes_the_gap() -> None:
    for eps in (0.0, 0.2, 0.7):
        for eps0 in (0.0, 0.3):
            rule = replace(TASK.robust(eps), w=3 * TASK.robust(eps).w)  # whatever the scale of w
            level = rule.levelled(eps0)
            low, high = level.errors(eps0)
            assert low == pytest.approx(high, rel=1e-12)
            assert low == pytest.approx(norm.cdf(-2 * (rule.S - rule.tau * eps0) / (TASK.sigma * 3)), rel=1e-12)
            assert (level.w == rule.w).all()


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0, 4.0])
def test_remargin_helps_exactly_below_half(sigma: float) -> None:
    task = replace(TASK, sigma=sigma)
    for eps_plus in (0.5, 0.6, 0.7, 0.8, 0.9):
        rule = theory.remargin(task, 0.5, eps_plus)
        grown = theory.remargin(task, 0.5, eps_plus + 1e-5)
        helps = grown.errors(0.5)[1] < rule.errors(0.5)[1]
        assert helps == (rule.errors(eps_plus)[1] < 0.5)
    same, robust = theory.remargin(task, 0.5, 0.5), task.robust(0.5)
    assert same.errors(0.5) == pytest.approx(robust.errors(0.5), rel=1e-12)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0, 4.0])
def test_remargin_lowers_the_boundary_error_where_two_conditions_agree(sigma: float) -> None:
    task = replace(TASK, sigma=sigma)
    for eps_plus in (0.5, 0.6, 0.7, 0.8, 0.9):
        rule, grown = theory.remargin(task, 0.5, eps_plus), theory.remargin(task, 0.5, eps_plus + 1e-5)
        boundary = [r.errors(0.5)[1] - r.errors()[1] for r in (rule, grown)]
        below_half = rule.errors(eps_plus)[1] < 0.5
        mostly_right = rule.errors()[1] + rule.errors(0.5)[1] < 1
        assert (boundary[1] < boundary[0]) == (below_half == mostly_right)


@pytest.mark.parametrize("prior", [0.5, 0.4])
def test_remargin_is_the_minimiser_of_its_own_risk(prior: float) -> None:
    eps_minus, eps_plus = 0.5, 0.7
    rule = theory.remargin(replace(TASK, prior=prior), eps_minus, eps_plus)

    def own(b: float) -> float:
        shifted = replace(rule, b=b)
        return (1 - prior) * shifted.errors(eps_minus)[0] + prior * shifted.errors(eps_plus)[1]

    grid = np.linspace(rule.b - 2, rule.b + 2, 4001)
    assert grid[np.argmin([own(b) for b in grid])] == pytest.approx(rule.b, abs=2e-3)


def test_the_papers_swap_argument_fails() -> None:
    task = GaussianTask(6, 0, 1.0, 0.0, 1.0, 2.0)
    before, after = np.array([1.0, 2, 1, 1, 1, 1]), np.array([2.0, 2, 1, 1, 1, 1])
    signal = [theory.LinearRule(task, w, 0.0).S for w in (before, after)]
    assert [round(value, 4) for value in signal] == [2.3333, 2.3094]


@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_trained_models_reach_their_optima(eps: float) -> None:
    task = GaussianTask(2, 8, 1.0, 0.3, 1.0, 3.0)
    best = task.robust(eps)
    sharp = theory.train(task, eps, 40_000, 200, seed=0, sharpness=5)
    assert sum(best.errors(eps)) <= sum(sharp.errors(eps)) == pytest.approx(sum(best.errors(eps)), rel=0.005)
    assert (sharp.w[2:] == 0).all() == (eps > 0)
    smooth, limit = theory.train(task, eps, 40_000, 200, seed=0), theory.logistic_limit(task, eps)
    assert [*smooth.w, smooth.b] == pytest.approx([*limit.w, limit.b], abs=0.04)


def test_robust_training_zeroes_features_that_only_carry_noise() -> None:
    rule = theory.train(GaussianTask(1, 30, 1.0, 0.0, 1.0, 2.0), 0.1, 20_000, 100, seed=0)
    assert (rule.w[1:] == 0).all()  # whichever way the sample makes them lean
    assert rule.w[0] > 0


@pytest.mark.parametrize(("eps", "prior"), [(0.0, 0.5), (0.2, 0.5), (0.2, 0.3), (0.6, 0.5), (0.6, 0.7)])
def test_the_logistic_limit_is_a_minimum(eps: float, prior: float) -> None:
    """The expected loss with all weights free, by Gauss-Hermite quadrature: no step from the limit lowers it."""
    task = GaussianTask(2, 2, 1.0, 0.4, 1.3, 2.0, prior)
    nodes, density = np.polynomial.hermite_e.hermegauss(80)
    density = density / density.sum()

    def loss(v: np.ndarray) -> float:
        total = 0.0
        for label, spread, share in ((-1, task.sigma, 1 - prior), (1, task.K * task.sigma, prior)):
            center = v[:4] @ task.theta + label * v[4] - eps * np.abs(v[:4]).sum()
            total += share * density @ np.logaddexp(0, -(center + spread * np.linalg.norm(v[:4]) * nodes))
        return float(total)

    limit = theory.logistic_limit(task, eps)
    center, step = np.append(limit.w, limit.b), 1e-3
    rises = [loss(center + sign * step * axis) - loss(center) for axis in np.eye(5) for sign in (-1, 1)]
    assert min(rises) > 0
    assert (limit.w[2:] == 0).all() == (eps > task.eta)
    for back, forth in zip(rises[::2], rises[1::2], strict=True):  # a smooth minimum is level, a kink rises either way
        assert abs(forth - back) < 1e-6 or min(back, forth) > 1e-5


def test_a_logistic_model_can_reverse_the_claim() -> None:
    task = GaussianTask(1, 100, 1.0, 0.5, 4.0, 2.0)
    limits = theory.logistic_limit(task, 0.0), theory.logistic_limit(task, 0.8)
    trained = theory.train(task, 0.0, 5000, 200, seed=0), theory.train(task, 0.8, 5000, 200, seed=0)
    for natural, robust in (limits, trained):
        assert 0 < robust.gap() < natural.gap()
    assert task.omega(0.8) > 3


@pytest.mark.parametrize("change", [{"K": 1.0}, {"prior": 0.2}])
def test_corrected_bound_has_corollary_1s_conditions(change: dict[str, float]) -> None:
    with pytest.raises(KitError, match=r"\(K, prior\) = .* use K > 1 and prior = 0.5"):
        theory.corrected_bound(
            GaussianTask(**{"m": 20, "d": 50, "gamma": 1.0, "eta": 0.4, "sigma": 2.0, "K": 2.0} | change), 0.5
        )


def test_corrected_bound_is_where_it_should_be() -> None:
    for K in (5.0, 50.0, 300.0):
        task = GaussianTask(m=10, d=200, gamma=1.0, eta=0.4, sigma=1.0, K=K)
        printed = (K**2 - 1) * math.log(K) / 2 * math.sqrt(20)  # Eq. (12), constants 1
        assert math.prod(theory.corrected_bound(task, 0.5)) < task.omega(0.5) < printed
    assert GaussianTask(m=10, d=200, gamma=1.0, eta=0.4, sigma=1.0, K=1e6).omega(0.5) == pytest.approx(1, abs=1e-3)
    far = GaussianTask(m=10, d=4000, gamma=1.0, eta=0.4, sigma=1.0, K=2.0)  # information: tight as d grows
    assert math.log(theory.corrected_bound(far, 0.5)[0]) == pytest.approx(math.log(far.decompose(0.5)[0]), rel=0.01)
    with pytest.raises(KitError, match=r"^gamma = 1.0 is not allowed: use m"):
        theory.corrected_bound(GaussianTask(m=1, d=9, gamma=1.0, eta=0.4, sigma=3.0, K=9.0), 0.5)
    with pytest.raises(KitError, match=r"^eps = 0.2 is not allowed: use a radius from eta = 0.4"):
        theory.corrected_bound(far, 0.2)


def test_bounds_by_hand() -> None:
    for m, K, first in ((50, 2.0, False), (3, 20.0, True)):  # which of the two terms is the larger
        task, eps = GaussianTask(m=m, d=100, gamma=2.0, eta=0.8, sigma=1.0, K=K), 1.0
        energies = [math.sqrt(m), math.sqrt(m + 100 * 0.4**2)]
        q = (K**2 - 1) * math.log(K) / 8
        low, high = (root + math.sqrt(root**2 + q) for root in energies)
        z = [replace(task, d=extra).natural().scores()[1] for extra in (0, 100)]
        widths = [(K + 1) * math.log(K) / 2 / root for root in (low, high)]  # (K+1)D with a = 4√m

        def h(x: float) -> float:
            return (1 - math.exp(-x)) / x

        term = math.exp((z[1] ** 2 - z[0] ** 2) / 2) * h(math.log(K)) / h(-z[1] * widths[1])
        assert (term < 1) == first
        information, threshold = theory.corrected_bound(task, eps)
        assert information == pytest.approx(high / low * max(1, term), rel=1e-9)
        assert information >= high / low * max(1, math.exp((z[1] ** 2 - z[0] ** 2) / 2) / K) * (1 - 1e-12)  # first form
        rise = min(task.robust(eps).scores()[1] - z[0], -2 * z[0])
        assert threshold == pytest.approx(1 + rise / widths[0] / h(-z[0] * widths[0]), rel=1e-9)


def test_remargin_refuses_radii_that_use_other_features() -> None:
    for pair in ((0.1, 0.6), (0.6, 1.1), (0.6, math.nan)):
        with pytest.raises(KitError, match=r"^\(eps_minus, eps_plus\) = \(.* is not allowed: use radii from eta"):
            theory.remargin(TASK, *pair)


def test_sampler_has_the_stated_moments() -> None:
    x, y = replace(TASK, prior=0.25).sample(40_000, seed=3)
    assert (y == 1).sum() == 10_000
    for label, spread in ((-1, TASK.sigma), (1, TASK.K * TASK.sigma)):
        part = x[y == label]
        assert part.mean(0) == pytest.approx(label * TASK.theta, abs=6 * spread / math.sqrt(len(part)))
        assert part.std(0) == pytest.approx(np.full(23, spread), rel=0.05)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("m", 0),
        ("m", 1.5),
        ("m", True),
        ("d", -1),
        ("gamma", 0.1),
        ("gamma", TASK.eta),
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
        for radius in (-0.1, math.nan, math.inf, True, "0.5"):
            with pytest.raises(KitError, match="is not allowed: use a finite radius"):
                call(radius)


def test_numbers_of_numpy_are_numbers() -> None:
    """Such as those of a grid; its truth values are none."""
    own = GaussianTask(
        *(
            kind(value)
            for kind, value in zip(
                (np.int64, np.int32, np.float64, np.float32, np.int64, np.float32, np.float16),
                (2, 3, 1.5, 0.5, 2, 4, 0.25),
                strict=True,
            )
        )
    )
    assert own == GaussianTask(2, 3, 1.5, 0.5, 2.0, 4.0, 0.25)
    assert own.robust(np.float64(0.25)).errors(np.int64(1)) == own.robust(0.25).errors(1.0)
    with pytest.raises(KitError, match=r"^m = .* is not allowed: use "):
        replace(TASK, m=np.bool_(True))

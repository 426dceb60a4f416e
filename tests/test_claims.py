"""Verdicts against statistics worked out otherwise, and claims tables: what a notebook shows is what is collected."""

from __future__ import annotations

import itertools
import json
import math
import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from frlkit import KitError
from frlkit.report import claims, names, rules, statistics
from frlkit.report.claims import Claim, Scope
from frlkit.report.rules import Comparison, Question

ROWS = [
    Claim("errors differ between classes (the paper)", "3.1 ± 0.2 % against 40.5 ± 1.0 %", "confirmed"),
    Claim("the gap <grows>", "seen & measured", "partly", "GTSRB", "a-key"),
]
FASHION = Scope("fashion_mnist")
CHANGE = [-3.0, -2.5, -3.5, -2.0, -4.0]  # mean -3, sd 0.790569, standard error 0.353553, t -8.485


def series(*values: float, name: str = "ours − theirs") -> pd.Series:
    return pd.Series(values, name=name)


def verdict(question: Question, about: Scope = FASHION) -> str:
    (claim,) = claims.judge([question], about)
    return claim.verdict


class TestRules:
    def test_lower_by_hand(self) -> None:
        """t = -8.485 with 4 degrees of freedom: two-sided p 0.00106, half-width 2.7764 standard errors."""
        (comparison,) = rules.lower("report-robust", series(*CHANGE)).comparisons
        assert comparison.supports == pytest.approx(0.00106, abs=2e-5)
        assert comparison.contradicts == 1
        assert comparison.says == "ours − theirs: -3.0 ± 0.8 points [-4.0, -2.0]"

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            (CHANGE, "confirmed"),
            ([-value for value in CHANGE], "refuted"),
            ([-3.0, 2.9, 0.1, -1.0, 1.5], "not established"),
            ([-3.0, -0.1, -0.2, -0.1, -0.1], "not established"),  # one sign is not enough
            ([-9.0, -9.1, -9.2, -9.3], "not tested"),  # four seeds
            ([-9.0], "not tested"),
            ([], "not tested"),
            ([-2.0] * 5, "confirmed"),  # all seeds agree exactly
            ([0.0] * 5, "not established"),
        ],
    )
    def test_lower_and_higher(self, values: list[float], expected: str) -> None:
        assert verdict(rules.lower("report-robust", series(*values))) == expected
        assert verdict(rules.higher("report-robust", -series(*values))) == expected

    @pytest.mark.parametrize(
        ("values", "limit", "expected"),
        [
            (CHANGE, -2.0, "confirmed"),  # t -2.83, two-sided p 0.047
            (CHANGE, -2.1, "not established"),  # t -2.55, p 0.064, of one side 0.032: a verdict may go either way
            (CHANGE, -5.0, "refuted"),
            ([3.0, -3.0, 1.0, -2.0, 0.5], 2.0, "not established"),  # not there, and yet not small
            (CHANGE[:4], 5.0, "not tested"),
        ],
    )
    def test_at_most_and_at_least(self, values: list[float], limit: float, expected: str) -> None:
        assert verdict(rules.at_most("report-robust", series(*values), limit=limit)) == expected
        assert verdict(rules.at_least("report-robust", -series(*values), limit=-limit)) == expected

    def test_at_most_by_hand(self) -> None:
        """Either verdict may be given, so each tail counts twice: t = -2.828, p 0.0474 for and 1 against."""
        (comparison,) = rules.at_most("report-robust", series(*CHANGE), limit=-2).comparisons
        assert comparison.supports == pytest.approx(0.0474, abs=1e-4)
        assert comparison.contradicts == 1
        assert comparison.says == "ours − theirs: -3.0 ± 0.8 points [-4.0, -2.0], limit -2"

    def test_lower_over_images(self) -> None:
        """Seeds that agree exactly establish nothing where a class has ten images, and do where it has a thousand."""

        def asked(images: int, seeds: int = 5) -> tuple[str, rules.Comparison]:
            wrong = np.arange(images) % 10 < np.array([[5], [3]])  # half of class 0 against three in ten
            theirs, ours = (np.tile(~np.append(each, [False]), (seeds, 1)) for each in wrong)
            labels = [0] * images + [1]
            theirs[:, -1] = ours[:, -1] = True
            question = rules.lower_over_images("report-robust", "ours − theirs", ours, theirs, labels)
            return verdict(question), question.comparisons[0]

        assert asked(10)[0] == "not established"
        found, comparison = asked(1000)
        assert found == "confirmed"
        assert comparison.says.startswith("ours − theirs: -20.0 points [-2")
        assert comparison.supports == pytest.approx(2 / statistics.DRAWS)
        assert asked(1000, seeds=4)[0] == "not tested"

    def test_every_takes_the_weakest_part_as_one_comparison(self) -> None:
        parts = [series(*CHANGE), series(*(value + 2.0 for value in CHANGE)), series(*(v + 3.0 for v in CHANGE))]
        question = rules.lower("options-pgd", *parts)
        (whole,) = rules.every(question).comparisons
        assert whole.supports == max(part.supports for part in question.comparisons)
        assert whole.contradicts == 1
        assert whole.says == f"of 3 comparisons the weakest: {question.comparisons[2].says}"
        against = rules.lower("options-pgd", series(*CHANGE), -series(*CHANGE))
        (whole,) = rules.every(against).comparisons
        assert whole.contradicts == pytest.approx(2 * 0.00106, abs=4e-5)
        (short,) = rules.every(rules.lower("options-pgd", series(*CHANGE), series())).comparisons
        assert not short.tested
        assert short.says == "of 2 comparisons the weakest: ours − theirs: no runs"


def table(rows: list[list[float]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=[f"class {k}" for k in range(len(rows[0]))])


class TestCorrelation:
    def test_one_class_can_make_it(self) -> None:
        """A single outlier among eight gives rho 0.5 with it, and nothing without it."""
        generator = np.random.default_rng(0)
        difficulty = table([[1, 2, 3, 4, 5, 6, 7, 90]] * 5)
        follows = table([[*(value + generator.normal(0, 0.1) for value in range(7)), 80] for _ in range(5)])
        assert verdict(rules.correlated("hard-least-robust", difficulty, {"PGD-AT": follows})) == "confirmed"
        assert verdict(rules.correlated("hard-least-robust", difficulty, {"PGD-AT": -follows})) == "refuted"
        lonely = table([[3, 1, 4, 2, 5, 0, 2.5, 80]] * 5)
        assert verdict(rules.correlated("hard-least-robust", difficulty, {"PGD-AT": lonely})) == "not established"

    @pytest.mark.parametrize(
        ("wrong", "expected"),
        [([90, 10, 20], "confirmed"), ([90, 85, 20], "not established"), ([9, 9], "not established")],
    )
    def test_hardest_on_images(self, wrong: list[int], expected: str) -> None:
        question = rules.hardest("own-hardest", wrong, [100] * len(wrong), ["a\nb", "c", "d"][: len(wrong)])
        assert verdict(question) == expected
        assert question.comparisons[0].says.startswith(f"a b {wrong[0]}.0 %, next ")

    def test_every_class_is_left_out(self) -> None:
        from scipy.stats import spearmanr

        x, y = np.random.default_rng(1).random((2, 3, 6))
        rho, p = statistics.rank_correlations(x, y)
        for seed, left in itertools.product(range(3), range(6)):
            kept = [k for k in range(6) if k != left]
            expected = spearmanr(x[seed][kept], y[seed][kept])
            assert (rho[seed, 1 + left], p[seed, 1 + left]) == pytest.approx((expected.statistic, expected.pvalue))
        assert rho[0, 0] == pytest.approx(spearmanr(x[0], y[0]).statistic)

    @pytest.mark.parametrize(
        ("difficulty", "target"),
        [
            ([[1.0, 2.0]] * 5, [[1.0, 2.0]] * 5),  # two classes: undefined
            ([[1.0, 2.0, 3.0]] * 5, [[1.0, 2.0, 3.0]] * 5),  # two, once one is left out
            ([[1.0] * 8] * 5, [list(range(8))] * 5),  # all alike
            ([[1.0, 2.0, 3.0, 4.0, 5.0]] * 4, [[1.0, 2.0, 3.0, 4.0, 5.0]] * 4),  # four seeds
        ],
    )
    def test_where_there_is_none(self, difficulty: list[list[float]], target: list[list[float]]) -> None:
        question = rules.correlated("hard-least-robust", table(difficulty), {"PGD-AT": table(target)})
        assert verdict(question) == "not tested"


def test_nan_is_no_seed() -> None:
    """A difference has none where one of the two lacks the seed: neither tested by them nor blurred."""
    one = pd.Series([-3.0, *[np.nan] * 4], name="A − B")
    for question in (rules.lower("both-robust", one), rules.at_most("both-robust", one, limit=1)):
        (only,) = question.comparisons
        assert not only.tested and only.says == "A − B: -3.0 points, 1 seed, 5 needed"
    whole = rules.lower("both-robust", pd.Series([-3.0, -3.1, np.nan, -2.9, -3.0, -3.2], name="A − B")).comparisons[0]
    assert whole.tested and whole.says.startswith("A − B: -3.0 ± 0.1 points [")


def test_the_weakest_of_untested_comparisons_is_the_one_that_misses_most() -> None:
    low, high, best = (pd.Series([value], name=f"{value:g}") for value in (-3.0, 4.0, -9.0))
    for question, weakest in (
        (rules.lower("both-robust", low, high, best), "4: 4.0 points"),
        (rules.higher("both-robust", low, high, best), "-9: -9.0 points"),
        (rules.at_most("both-robust", best, low, limit=2), "-3: -3.0 points"),
        (rules.lower("both-robust", high, pd.Series(dtype=float, name="C")), "C: no runs"),
    ):
        (said,) = rules.every(question).comparisons
        assert said.says.startswith(f"of {len(question.comparisons)} comparisons the weakest: {weakest}")
        assert not said.tested


def test_a_seed_that_one_side_lacks_is_left_out() -> None:
    """A difference of two methods is NaN for the seeds that only one of them has."""
    difficulty = table([[1.0, 2.0, 3.0, 4.0, 5.0]] * 6)
    target = difficulty.copy()
    target.iloc[3] = np.nan
    for question in (
        rules.correlated("hard-least-robust", difficulty, {"PGD-AT": target}),
        rules.correlated_given("hard-least-robust", difficulty, difficulty.add([0, 9, 0, 9, 0]), {"PGD-AT": target}),
    ):
        assert "5 seeds" in question.comparisons[0].says and question.comparisons[0].tested


class TestPartialCorrelation:
    """Size and difficulty go together: which of the two does the error follow?"""

    generator = np.random.default_rng(3)
    difficulty = generator.random((5, 20))
    size = 0.7 * difficulty + 0.3 * generator.random((5, 20))

    def test_against_regression_of_the_ranks(self) -> None:
        from scipy.stats import pearsonr, rankdata

        target = self.generator.random((5, 20)).round(1)  # ties
        rho, p = statistics.partial_rank_correlations(self.size, target, self.difficulty)
        for seed in range(5):
            x, y, z = (rankdata(side[seed]) for side in (self.size, target, self.difficulty))
            design = np.column_stack([np.ones(20), z])
            left = [side - design @ np.linalg.lstsq(design, side, rcond=None)[0] for side in (x, y)]
            expected = pearsonr(*left).statistic
            assert rho[seed] == pytest.approx(expected)
            t = expected * np.sqrt(17 / (1 - expected**2))
            assert p[seed] == pytest.approx(2 * scipy.stats.t.sf(abs(t), 17))

    def test_it_follows_what_makes_it(self) -> None:
        size, difficulty = table(self.size.tolist()), table(self.difficulty.tolist())
        target = {"PGD-AT": difficulty + 0.01 * size}
        assert verdict(rules.correlated_given("hard-least-robust", difficulty, size, target)) == "confirmed"
        assert verdict(rules.correlated_given("hard-least-robust", -difficulty, size, target)) == "refuted"
        assert verdict(rules.correlated("hard-least-robust", size, target)) == "confirmed"  # which size alone hides
        noise = {"PGD-AT": table(self.generator.random((5, 20)).tolist())}
        assert verdict(rules.correlated_given("hard-least-robust", size, difficulty, noise)) == "not established"

    def test_where_there_is_none(self) -> None:
        few = table([[1.0, 2.0, 3.0]] * 5)
        assert verdict(rules.correlated_given("hard-least-robust", few, few, {"PGD-AT": few})) == "not tested"
        size, difficulty = (table(side[:3].tolist()) for side in (self.size, self.difficulty))
        (short,) = rules.correlated_given("hard-least-robust", size, difficulty, {"PGD-AT": size}).comparisons
        assert not short.tested
        assert re.fullmatch(r"PGD-AT: partial rho 1\.00, 3 seeds, 5 needed", short.says)


def absent() -> rules.Question:
    return rules.lower("reweight-natural", series())


def unsure() -> rules.Question:
    return rules.lower("reweight-natural", series(1.0, -1.0, 0.5, -0.5, 0.1))


class TestHolm:
    def test_a_textbook_example(self) -> None:
        assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])

    def test_none(self) -> None:
        assert statistics.holm([]) == []

    @given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
    def test_is_the_closed_procedure_of_bonferroni(self, p_values: list[float]) -> None:
        """A hypothesis is rejected where Bonferroni rejects every intersection that holds it (Marcus et al. 1976)."""
        everyone = range(len(p_values))
        for one, adjusted in zip(everyone, statistics.holm(p_values), strict=True):
            sets = [s for size in everyone for s in itertools.combinations(everyone, size + 1) if one in s]
            closed = max(min(1.0, len(s) * min(p_values[k] for k in s)) for s in sets)
            assert adjusted == pytest.approx(closed)

    def test_more_claims_need_more_evidence(self) -> None:
        close = rules.lower("report-robust", series(-1.0, -2.5, -0.2, -1.5, -0.8))  # p 0.036
        assert claims.judge([close], FASHION)[0].verdict == "confirmed"
        alone, *_ = claims.judge([close, unsure()], FASHION)
        assert alone.verdict == "not established"

    def test_what_is_not_tested_counts_already(self) -> None:
        """Runs that are finished later can then not make another claim's evidence weaker."""
        close = rules.lower("report-robust", series(-1.0, -2.5, -0.2, -1.5, -0.8))
        first = [claims.judge([close, later], FASHION)[0] for later in (absent(), unsure())]
        assert [claim.verdict for claim in first] == ["not established"] * 2
        assert first[0].evidence == first[1].evidence


@pytest.mark.parametrize(
    ("parts", "verdict", "first"),
    [
        ([series(0.4, -0.1, 0.2, -0.3, 0.1), series(9.0, 9.5, 8.8, 9.1, 9.3)], "refuted", "9.1"),
        ([series(-9.0, -9.5, -8.8, -9.1, -9.3), series()], "not tested", "no runs"),
        ([series(-9.0, -9.5, -8.8, -9.1, -9.3), series(-2.0, -2.5, -1.8, -2.2, -3.0)], "confirmed", "-2.3"),
        ([series(-9.0, -9.5, -8.8, -9.1, -9.3), series(0.4, -0.1, 0.2, -0.3, 0.1)], "partly", "-9.1"),
    ],
)
def test_what_decides_stands_first(parts: list[pd.Series], verdict: str, first: str) -> None:
    """And a takeaway quotes it: of a confirmed claim the weakest part, of another the part that denies it."""
    (claim,) = claims.judge([rules.lower("report-robust", *parts)], FASHION)
    assert claim.verdict == verdict
    assert first in claim.evidence.split("; ")[0]


class TestScope:
    def record(self, **changed: Any) -> dict[str, Any]:
        made = {"images": 10_000, "dataset": "fashion_mnist", "epochs": 15, **changed}
        return {"images": made["images"], "config": {"dataset": made["dataset"], "epochs": made["epochs"]}}

    def test_few_decided_images_test_nothing_however_many_the_record_has(self) -> None:
        """Certificates are of some of the test images: these count, at the limit and one below it."""
        records = {"a": [self.record()]}
        assert claims.scope(records, claims.FEWEST_IMAGES).why_not == ""
        assert claims.scope(records, claims.FEWEST_IMAGES - 1).why_not == "999 test images, 1000 needed"

    @pytest.mark.parametrize(
        ("changed", "why_not"),
        [
            ({}, ""),
            ({"images": 360, "dataset": "digits"}, "360 test images, 1000 needed"),
            ({"epochs": 2}, "runs of 2 epochs, 5 needed"),
        ],
    )
    def test_small_studies_test_nothing(self, changed: dict[str, Any], why_not: str) -> None:
        about = claims.scope({"a": [self.record()], "b": [self.record(**changed)]})
        assert about.why_not == why_not
        (claim,) = claims.judge([rules.lower("aim-worst", series(*CHANGE))], about)
        assert claim.verdict == ("not tested" if why_not else "confirmed")
        assert why_not in claim.evidence
        assert "-3.0 ± 0.8" in claim.evidence

    @pytest.mark.parametrize(
        ("values", "elsewhere"),
        [
            (CHANGE, "carries over"),
            ([-value for value in CHANGE], "does not carry over"),
            ([1.0, -1.0, 0.5, -0.5, 0.1], "not established"),
            ([1.0], "not tested"),
        ],
    )
    def test_a_claim_about_other_data_is_not_refuted(self, values: list[float], elsewhere: str) -> None:
        here = verdict(rules.lower("reweight-natural", series(*values)), Scope("cifar10"))
        assert here == {"carries over": "confirmed", "does not carry over": "refuted"}.get(elsewhere, elsewhere)
        assert verdict(rules.lower("reweight-natural", series(*values)), FASHION) == elsewhere

    def test_a_verdict_names_its_data(self) -> None:
        (claim,) = claims.judge([rules.lower("reweight-natural", series(*CHANGE))], FASHION)
        assert claims.phrase(vars(claim)) == "carries over to Fashion-MNIST"
        (claim,) = claims.judge([rules.lower("report-robust", series(*CHANGE))], FASHION)
        assert claims.phrase(vars(claim)) == "confirmed on Fashion-MNIST"
        assert claims.phrase(vars(ROWS[0])) == "confirmed"


@pytest.mark.parametrize(
    ("parts", "whole"),
    [
        (["confirmed", "confirmed"], "confirmed"),
        (["confirmed", "refuted"], "partly"),
        (["confirmed", "not established"], "partly"),
        (["refuted", "not established"], "refuted"),
        (["refuted", "not tested"], "refuted"),
        (["confirmed", "not tested"], "not tested"),
        (["not established", "not tested"], "not tested"),
        ([], "not tested"),
    ],
)
def test_verdicts_together(parts: list[str], whole: str) -> None:
    assert claims.together(iter(parts)) == whole
    assert claims.together(reversed(parts)) == whole


def test_differences_pair_the_seeds_and_miss_what_is_missing() -> None:
    index = pd.MultiIndex.from_tuples(
        [
            (names.recipe(title), seed)
            for title, seed in (("Control", 0), ("Control", 1), ("Reweight", 1), ("Reweight", 2))
        ],
        names=["recipe", "seed"],
    )
    scored = pd.DataFrame({"robust worst": [50.0, 60.0, 45.0, 1.0]}, index=index)
    change = rules.minus(scored, "Reweight", "Control", "robust worst")
    assert change.to_dict() == {1: -15.0}
    assert change.name == "Reweight − Control"
    assert rules.minus(scored, "Output biases alone", "Control", "robust worst").empty
    assert rules.minus(scored, names.recipe("Control"), "Control", "robust worst").tolist() == [0.0, 0.0]


def test_unknown_claims_are_refused() -> None:
    with pytest.raises(KitError, match="'reweigth' is unknown: write it into statements.yaml"):
        claims.judge([rules.lower("reweigth", series(*CHANGE))], FASHION)


def test_statements_are_whole() -> None:
    for key, stated in claims.statements().items():
        assert set(stated) in ({"source", "says"}, {"source", "says", "data"}), key


def test_p_values_are_exact_where_seeds_agree() -> None:
    assert statistics.p_beyond([1.0, 1.0], 0, "greater") == 0
    assert statistics.p_beyond([1.0, 1.0], 0, "less") == 1
    assert statistics.p_beyond([0.0, 0.0], 0, "less") == statistics.p_beyond([0.0, 0.0], 0, "greater") == 1
    assert all(math.isnan(bound) for bound in statistics.mean_interval([1.0]))
    assert all(math.isnan(bound) for bound in statistics.prediction([1.0]))


def test_one_more_run_lies_in_its_interval_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(3.0, 2.0, (4000, 6))
    bounds = [statistics.prediction(row[:5]) for row in draws]
    inside = np.mean([low < row[5] < high for row, (low, high) in zip(draws, bounds, strict=True)])
    assert inside == pytest.approx(0.95, abs=0.012)
    assert Comparison("x", 0.2, 0.1).p == 0.1


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `display` was given, as the outputs of an executed notebook's cell."""
    outputs: list[dict[str, Any]] = []

    def display(data: dict[str, Any], *, raw: bool) -> None:
        assert raw
        outputs.append({"output_type": "display_data", "metadata": {}, "data": json.loads(json.dumps(data))})

    monkeypatch.setattr("IPython.display.display", display)
    return outputs


def test_show_and_collect(shown: list[dict[str, Any]]) -> None:
    claims.show("Disparity", ROWS)
    claims.show("Theory", ROWS[:1])
    cells = [
        {"cell_type": "markdown", "source": "# Title"},
        {"cell_type": "code", "outputs": [{"output_type": "stream", "name": "stdout", "text": "hello"}, shown[0]]},
        {"cell_type": "code", "outputs": []},
        {"cell_type": "code", "outputs": [{"output_type": "error", "ename": "E"}, shown[1]]},
    ]
    found = claims.from_notebook(cells)
    assert [table["title"] for table in found] == ["Disparity", "Theory"]
    assert [Claim(**row) for row in found[0]["claims"]] == ROWS
    assert [Claim(**row) for row in found[1]["claims"]] == ROWS[:1]


def test_html_and_text_show_every_word_verdict_first(shown: list[dict[str, Any]]) -> None:
    long = Claim("a claim of many words " * 10, "numbers " * 30, "not tested")
    claims.show("Disparity", [*ROWS, long])
    plain, html = shown[0]["data"]["text/plain"], shown[0]["data"]["text/html"]
    for claim in (*ROWS, long):
        for word in (claim.claim, claim.evidence, claim.verdict):
            assert word in plain
            assert word.strip().replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") in html
    assert "partly on GTSRB" in plain
    assert "partly on GTSRB" in html
    assert "..." not in html
    assert html.index("verdict") < html.index("claim") < html.index("evidence")


def test_takeaways_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr("IPython.display.display", told.append)
    asked = [
        rules.lower("reweight-natural", series(*CHANGE)),
        rules.lower("report-robust", series(1.0, -1.0, 0.5, -0.5, 0.1)),
        rules.lower("aim-worst", series()),
    ]
    judged = claims.judge(asked, FASHION)
    claims.answers(judged, {"reweight-natural": "Does it help?", "aim-worst": "Enough?", "report-robust": "Robust?"})
    assert told[0].data.splitlines() == [
        "- **Does it help?** Yes: carries over to Fashion-MNIST "
        "(ours − theirs: -3.0 ± 0.8 points [-4.0, -2.0], p 0.003).",
        "- **Enough?** Not tested: not tested on Fashion-MNIST (ours − theirs: no runs).",
        "- **Robust?** Open: not established on Fashion-MNIST (ours − theirs: 0.0 ± 0.8 points [-1.0, 1.0], p 1.000).",
    ]


def test_a_notebook_without_tables_has_none() -> None:
    assert claims.from_notebook([]) == []
    assert claims.from_notebook([{"cell_type": "code", "outputs": [{"data": {"text/plain": "3"}}]}]) == []


@pytest.mark.parametrize("verdict", ["Confirmed", "true", "", None, True])
def test_unknown_verdicts_are_refused(verdict: Any) -> None:
    with pytest.raises(KitError, match="use one of confirmed, partly, not established, refuted, not tested"):
        Claim("x", "y", verdict)

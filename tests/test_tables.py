"""Tables of average and worst class against numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from frlkit import claims, tables
from frlkit.evaluation import Attack


def record(seed: int, natural: list[float], robust: list[float]) -> dict[str, Any]:
    from dataclasses import asdict

    entries = [{"attack": asdict(Attack(eps)), "robust": robust} for eps in tables.RADII]
    return {"config": {"seed": seed}, "natural": natural, "attacks": entries}


RECORDS = {
    "control": [record(0, [0.1, 0.3], [0.4, 0.5]), record(1, [0.2, 0.2], [0.4, 0.6])],
    "method": [record(1, [0.1, 0.2], [0.3, 0.5]), record(0, [0.1, 0.1], [0.4, 0.4])],  # another order of seeds
}


def test_scores_by_hand() -> None:
    scored = tables.scores(RECORDS)
    row = scored.loc[("control", 0)]
    expected = {"natural": (20, 30), "boundary": (25, 30), "robust": (45, 50)}
    for kind, (average, worst) in expected.items():
        assert row[f"{kind} average"] == pytest.approx(average)
        assert row[f"{kind} worst"] == pytest.approx(worst)


def test_differences_pair_the_seeds() -> None:
    changes = tables.against(tables.scores(RECORDS), "control")
    assert list(changes.index) == [("method", 1), ("method", 0)]
    assert changes.loc[("method", 0), "robust worst"] == pytest.approx(-10)
    assert changes.loc[("method", 1), "robust worst"] == pytest.approx(-10)
    assert changes.loc[("method", 0), "natural worst"] == pytest.approx(-20)
    assert changes.loc[("method", 1), "natural worst"] == pytest.approx(0)


def test_means_over_seeds() -> None:
    assert tables.means(tables.scores(RECORDS)).loc["control", "robust worst"] == "55.0 ± 7.1"


@pytest.mark.parametrize(
    ("values", "lower", "at_most"),
    [
        ([-3.0, -2.9, -3.1], "confirmed", "confirmed"),
        ([3.0, 2.9, 3.1], "refuted", "refuted"),
        ([-3.0, 2.9, 0.1], "not established", "confirmed"),
        ([-3.0, -0.1, -0.2], "not established", "confirmed"),  # one sign, but mean below twice the sd
        ([-9.0], "not tested", "not tested"),
    ],
)
def test_verdict_on_lower(values: list[float], lower: str, at_most: str) -> None:
    assert claims.lower(pd.Series(values)) == lower
    assert claims.lower(pd.Series(values), within=True) == at_most
    assert (
        claims.opposite(lower)
        == {
            "confirmed": "refuted",
            "refuted": "confirmed",
            "not established": "confirmed",
            "not tested": "not tested",
        }[lower]
    )


def test_verdicts_together() -> None:
    assert claims.together(["confirmed", "confirmed"]) == "confirmed"
    assert claims.together(["confirmed", "refuted"]) == "partly"
    assert claims.together(iter(["refuted", "not established"])) == "not established"
    assert claims.together(["confirmed", "not tested"]) == "not tested"


def test_unbalanced_classes_have_two_averages() -> None:
    record = {"class_names": ["a", "b"], "class_counts": [30, 10], "natural": [0.1, 0.5]}
    table = tables.error_table(record, [0.2, 0.9])
    assert table.loc["average over classes"].tolist() == [30.0, 25.0, 55.0]
    assert table.loc["average over images"].tolist() == [20.0, 17.5, 37.5]
    assert "average" in tables.error_table({**record, "class_counts": [20, 20]}, [0.2, 0.9]).index
    rows = [
        ("r", seed, name, "natural", error, n) for seed in (0, 1) for name, error, n in (("a", 10, 30), ("b", 50, 10))
    ]
    errors = pd.DataFrame(rows, columns=["recipe", "seed", "class", "measure", "error", "images"])
    assert tables.summary(errors).loc[("r", "natural"), ["average", "average over images"]].tolist() == [
        "30.0 ± 0.0",
        "20.0 ± 0.0",
    ]

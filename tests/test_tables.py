"""Tables of average and worst class against numbers worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from click.testing import CliRunner, Result

from frlkit import PROJECT, KitError
from frlkit.__main__ import main
from frlkit.evaluation import Attack
from frlkit.report import claims, tables


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


SHIPPED = PROJECT / "checkpoints" / "fashion_mnist"


def table(*words: str | Path) -> Result:
    return CliRunner().invoke(main, ["table", *map(str, words)])


class TestCollected:
    """``frlkit table``, on shipped runs."""

    def test_one_row_a_method_in_numbers_by_hand(self, tmp_path: Path) -> None:
        result = table(SHIPPED / "pgd_at", SHIPPED / "dafa" / "seed0", "--output", tmp_path / "out.csv")
        assert result.exit_code == 0, result.output
        frame = pd.read_csv(tmp_path / "out.csv").set_index("recipe")
        assert list(frame.index) == ["pgd_at", "dafa"]
        assert frame["dataset"].tolist() == ["fashion_mnist"] * 2
        assert frame["seeds"].tolist() == [5, 1]
        worst = pd.Series(
            [100 * max(json.loads(path.read_text())["natural"]) for path in SHIPPED.glob("pgd_at/seed*/record.json")]
        )
        row = frame.loc["pgd_at"]
        assert row["natural, worst"] == pytest.approx(worst.mean())
        assert row["natural, worst sd"] == pytest.approx(worst.std())
        assert row["natural, worst low"] < worst.mean() < row["natural, worst high"]
        assert row["natural, worst class"] == "Shirt"
        assert frame.loc["dafa"].filter(like=" sd").isna().all()

    def test_what_is_printed_is_the_notebooks_summary(self, tmp_path: Path) -> None:
        result = table(SHIPPED / "pgd_at", "--output", tmp_path / "out.md")
        assert result.exit_code == 0, result.output
        assert (tmp_path / "out.md").read_text() == result.stdout
        head, _, row = (line.strip("| ").split(" | ") for line in result.stdout.splitlines())
        shown = dict(zip(head, row, strict=True))
        summary = tables.summary(tables.tidy(tables.collect([SHIPPED / "pgd_at"])["fashion_mnist"]))
        for measure in tables.MEASURES:
            for name, value in summary.loc["pgd_at", measure].items():
                assert shown[f"{measure}, {name}"] == value

    def test_parquet(self, tmp_path: Path) -> None:
        pytest.importorskip("pyarrow", reason="needs pyarrow: pip install pyarrow")
        for name in ("out.parquet", "out.csv"):
            assert table(SHIPPED / "trades", "--output", tmp_path / name).exit_code == 0
        found, expected = pd.read_parquet(tmp_path / "out.parquet"), pd.read_csv(tmp_path / "out.csv")
        pd.testing.assert_frame_equal(found, expected, check_dtype=False)

    def test_two_data_sets(self, tmp_path: Path) -> None:
        for dataset in ("digits", "fashion_mnist"):
            made = json.loads((SHIPPED / "natural" / "seed0" / "record.json").read_text())
            made["config"]["dataset"] = dataset
            place = tmp_path / dataset / "natural" / "seed0"
            place.mkdir(parents=True)
            (place / "record.json").write_text(json.dumps(made))
        frame = tables.by_method(tables.collect([tmp_path]), tables.statistics)
        assert frame["dataset"].tolist() == ["digits", "fashion_mnist"]

    def test_overlapping_folders_count_once(self) -> None:
        records = tables.collect([SHIPPED / "dafa", SHIPPED / "dafa" / "seed0"])
        assert len(records["fashion_mnist"]["dafa"]) == len(list((SHIPPED / "dafa").glob("seed*/record.json")))

    @pytest.mark.parametrize(
        ("change", "said"),
        [({"seed": 1, "epochs": 3}, "epochs is 3 there and 15 here"), ({}, "are the same seed")],
    )
    def test_runs_that_do_not_belong_together(self, tmp_path: Path, change: dict[str, int], said: str) -> None:
        for number, changed in enumerate(({}, change)):
            made = json.loads((SHIPPED / "natural" / "seed0" / "record.json").read_text())
            made["config"] |= changed
            place = tmp_path / str(number) / "natural" / "seed0"
            place.mkdir(parents=True)
            (place / "record.json").write_text(json.dumps(made))
        with pytest.raises(KitError, match=said):
            tables.collect([tmp_path / "0", tmp_path / "1"])

    def test_a_record_of_something_else(self, tmp_path: Path) -> None:
        (tmp_path / "record.json").write_text("{}")
        with pytest.raises(KitError, match="is no record of a run"):
            tables.collect([tmp_path])

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["nowhere"], "there are no finished runs in nowhere"),
            ([str(SHIPPED), "--output", "out.xlsx"], "use a name that ends in .csv, .parquet or .md"),
            ([], "Missing argument 'RUNS...'"),
        ],
    )
    def test_bad_words(self, words: list[str], said: str) -> None:
        result = table(*words)
        assert result.exit_code != 0
        assert isinstance(result.exception, SystemExit), result.exception
        assert result.stdout == ""
        assert said in result.stderr

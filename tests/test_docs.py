"""README's table is what the shipped records say, and its commands exist."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from frlkit import PROJECT, KitError, checkpoint, recipes, records, runs
from frlkit.evaluation import Attack
from frlkit.report import cards, claims, coverage, documents

README = (PROJECT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    for name in documents.DOCUMENTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(PROJECT / name, tmp_path / name)
    return tmp_path


def test_every_table_is_what_records_and_notebooks_say(copies: Path) -> None:
    assert documents.refresh(copies) == []


def test_an_altered_number_is_written_anew(copies: Path) -> None:
    text = (copies / "README.md").read_text(encoding="utf-8")
    number = re.search(r"\d+\.\d ± \d\.\d", text)[0]
    (copies / "README.md").write_text(text.replace(number, "99.9 ± 9.9", 1), encoding="utf-8")
    assert documents.refresh(copies) == ["README.md"]
    assert (copies / "README.md").read_text(encoding="utf-8") == text


def test_check_says_what_disagrees_and_writes_nothing(copies: Path) -> None:
    assert documents.check(copies) == []
    text = (copies / "README.md").read_text(encoding="utf-8")
    altered = text.replace(re.search(r"\d+\.\d ± \d\.\d", text)[0], "99.9 ± 9.9", 1)
    (copies / "README.md").write_text(altered, encoding="utf-8")
    assert documents.check(copies) == [
        "README.md: table 'fairness' is not what its records say: run frlkit report",
    ]
    assert (copies / "README.md").read_text(encoding="utf-8") == altered


class TestSigns:
    """Tables of another data set's runs, by hand."""

    @pytest.fixture
    def project(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(documents, "PROJECT", tmp_path)
        return tmp_path

    def put(self, project: Path, recipe: str, seed: int, robust: list[float], dataset: str = "gtsrb") -> None:
        natural, counts = [0.1, 0.3], [30, 10]
        own = {"seed": seed, "dataset": dataset, "model": "resnet18" if "model" in recipe else "cnn3"}
        wrong = [round(error * count) for error, count in zip(robust, counts, strict=True)]
        errors = {
            "robust": robust,
            "boundary": [error - clean for error, clean in zip(robust, natural, strict=True)],
            "confusion": [[30 - wrong[0], wrong[0]], [wrong[1], 10 - wrong[1]]],
        }
        record = {
            **{"dataset": dataset, "class_counts": counts, "images": 40, "config": own},
            **{"training_counts": [300, 100], "natural": natural},
            "class_names": ["Stop", "Yield"] if "gtsrb" in dataset else ["automobile", "cat"],
            "attacks": [{"attack": vars(Attack(float(eps))), **errors} for eps in (8, 16, 12)],
        }
        checkpoint.write_json(project / "checkpoints" / dataset / recipe / f"seed{seed}" / "record.json", record)

    def test_the_models_card(self, project: Path) -> None:
        """What each model was attacked with in training, and what is said to fail, by hand."""
        for recipe, method, more in (
            ("pgd_at", "pgd_at", {}),
            ("natural", "natural", {"precision": "tf32"}),
            ("n_fgsm", "n_fgsm", {"steps": 1}),
            ("intercept", "intercept", {}),
            ("head_norms", "intercept", {"moved": "norms"}),
            ("certified", "certified", {}),
        ):
            self.put(project, recipe, 0, [0.9, 1.0 if recipe == "natural" else 0.7])
            path = project / "checkpoints/gtsrb" / recipe / "seed0/record.json"
            found = json.loads(path.read_text(encoding="utf-8"))
            found["config"] |= {"method": method, "epochs": 2, "eps_255": 12.0, "steps": 10, **more}
            checkpoint.write_json(path, found)
            history = {"config": {}, "threads": 1, "epochs": [{"lr": 0.1, "loss": 1.0, "seconds": 1.0}]}
            history["epochs"][0]["validation"] = {"natural": [0.1, 0.3], "robust": [0.9, 0.7]}
            checkpoint.write_json(path.with_name("history.json"), history)
        text = cards.card(project)
        rows = [line.split(" | ") for line in text.splitlines() if line.count(" | ") == 9][1:]
        assert {row[1].strip("`"): row[6] for row in rows if "---" not in row[1]} == {
            "pgd_at": "12/255, 10 steps",
            "natural": "none; tf32",
            "n_fgsm": "12/255, 1 step",
            "intercept": "none: only the output's biases change",
            "head_norms": "none: only the output's norms change",
            "certified": "none: intervals of 12/255",
        }
        assert (
            "Known failures: under PGD-20 at 12/255, step 2/255, the worst class of each model is wrong on at least "
            "90 % of its images; of `natural`, some model is wrong on all images of a class then. "
            "6 of 6 recipes have fewer than 5 seeds: what tells them apart may be chance."
        ) in text

    def test_nothing_yet(self, project: Path) -> None:
        of_cifar10 = documents.TABLES["cifar10"]()
        assert {documents.signs(), documents.steps(), documents.split(), of_cifar10} == {documents.UNMEASURED}
        assert all(line.endswith(f"{documents.UNMEASURED} |") for line in documents.paper_scale().splitlines()[2:])

    def test_cifar10_in_both_widths_by_hand(self, project: Path) -> None:
        for seed in (0, 1):
            self.put(project, "pgd_at", seed, [0.4, 0.8 + 0.1 * seed], "cifar10")
        for recipe in ("pgd_at,steps=5", "natural"):  # are not PGD-AT
            self.put(project, recipe, 0, [0.9, 0.9], "cifar10")
        self.put(project, "pgd_at,model=preact_resnet18", 0, [0.5, 0.6], "cifar10")
        self.put(project, "algorithm1_reweight", 0, [0.2, 0.7], "cifar10")
        head, _, *lines = documents.paper_scale().splitlines()
        assert head.endswith("| ours, 3-layer CNN | ours, ResNet-18 |")
        assert "| PGD-AT, cat, natural error | 40.9 |  | 30.0 | 30.0 |" in lines
        assert "| PGD-AT, cat, robust error | 82.6 |  | 85.0 | 60.0 |" in lines
        expected = "| Reweight (others: the authors' code), robust worst |  | 76.2 (72.8 to 78.2) | 70.0 | "
        assert expected + f"{documents.UNMEASURED} |" in lines
        titles = [line.split(" | ")[0][2:] for line in documents.TABLES["cifar10"]().splitlines()[2:]]
        others = ["PGD-AT, five steps", "PGD-AT, PreAct-ResNet-18", "Reweight"]
        assert titles == ["Natural training", "PGD-AT", *others]
        (line,) = (line for line in documents.TABLES["cifar10"]().splitlines() if line.startswith("| PGD-AT |"))
        assert line.endswith(" | 10.0 ± 0.0 | 40.0 ± 0.0 |  |  | 2 |")  # best clean, best attacked; nothing at 4/255

    def test_by_hand(self, project: Path) -> None:
        for seed in (0, 1):
            self.put(project, "pgd_at", seed, [0.4, 0.8 + 0.1 * seed])
            self.put(project, "n_fgsm", seed, [0.5, 0.8])
            for recipe in ("pgd_at", "n_fgsm"):
                self.put(project, recipe, seed, [0.4, 0.8], "gtsrb17")
        clean, attacked = "20.0 | 15.0 | 30.0 | 10.0", "62.5 | 51.2 | 85.0 | 40.0"  # boundary: 30 % and 50, 60 %
        expected = f"| GTSRB-43, PGD-AT | {clean} | 42.5 | 55.0 | {attacked} | Yield (100) | 400 of 26,640 | 2 |"
        assert expected in documents.signs().splitlines()
        lines = documents.steps().splitlines()
        assert lines[2:] == [
            "| GTSRB-43 | N-FGSM, one step | natural | 0.0 ± 0.0 | Stop +0.0 (0.0), Yield +0.0 (0.0) | 2 |",
            "| GTSRB-43 | N-FGSM, one step | PGD-20 12/255 | 2.5 ± 3.5 | Stop +10.0 (0.0), Yield -5.0 (7.1) | 2 |",
            "| GTSRB-17 | N-FGSM, one step | natural | 0.0 ± 0.0 | Stop +0.0 (0.0), Yield +0.0 (0.0) | 2 |",
            "| GTSRB-17 | N-FGSM, one step | PGD-20 12/255 | 0.0 ± 0.0 | Stop +0.0 (0.0), Yield +0.0 (0.0) | 2 |",
        ]


class TestCoverage:
    FOUND = coverage.Shown(PROJECT, {"report-25": "confirmed"}, [("Theorem 9: x", "confirmed")], {"07": "a word"}, {})

    def test_rows_are_numbered_whole_and_judged_by_what_is_there(self) -> None:
        rows = coverage.rows()
        assert [row["row"] for row in rows] == list(range(1, 79))
        shown = coverage.shown()
        for row in rows:
            letter, reason = coverage.status(row, shown)
            assert letter in coverage.STATUSES
            assert bool(reason) == (letter != "R"), row

    @pytest.mark.parametrize(
        ("row", "letter", "reason"),
        [
            ({"shown": [{"verdict": "report-25"}, {"theory": "Theorem 9"}]}, "R", ""),
            ({"shown": [{"verdict": "report-11"}], "why": "w"}, "B", "claim report-11 not tested; w"),
            ({"shown": [{"verdict": "report-25"}, {"verdict": "report-11"}]}, "P", "claim report-11 not tested"),
            ({"shown": [{"theory": "Theorem 8"}], "why": "w"}, "N", "notebook 02 has no claim on Theorem 8; w"),
            ({"shown": [{"theory": "Theorem 8"}], "built": True}, "B", "notebook 02 has no claim on Theorem 8"),
            ({"shown": [{"runs": "PGD-AT", "seeds": 5}]}, "R", ""),
            ({"shown": [{"runs": "TRADES", "seeds": 99}]}, "B", "TRADES: 5 of 99 seeds"),
            (
                {"shown": [{"runs": "PGD-AT", "data": "svhn"}], "analogue": [{"runs": "PGD-AT"}]},
                "P",
                "PGD-AT on SVHN: 0 of 1 seeds",
            ),
            ({"shown": [{"runs": "pgd_at,model=preact_resnet18", "data": "cifar10"}]}, "R", ""),
            ({"shown": [{"says": "07", "text": "a word"}, {"file": "README.md"}]}, "R", ""),
            ({"shown": [{"says": "08", "text": "a word"}]}, "N", "notebook 08 does not print it"),
            ({"shown": [{"attack": 8, "of": "PGD-AT"}]}, "R", ""),
            ({"shown": [{"attack": 5, "of": "PGD-AT"}]}, "B", "PGD-AT: no PGD-20 at 5/255, step 2/255"),
        ],
    )
    def test_status(self, row: dict[str, Any], letter: str, reason: str) -> None:
        assert coverage.status(row, self.FOUND) == (letter, reason)

    def test_only_what_a_cell_prints_is_evidence(self, tmp_path: Path) -> None:
        """Neither its code nor prose beside it; and of other data counts what was collected of their notebooks."""
        outputs = [{"text": ["streamed"]}, {"data": {"text/html": "<b>shown</b>", "image/png": "drawn"}}]
        cells = [{"source": "# coded", "outputs": outputs}, {"source": "written"}]
        (tmp_path / "notebooks").mkdir()
        (tmp_path / "notebooks" / "07_x.ipynb").write_text(json.dumps({"cells": cells}), encoding="utf-8")
        (tmp_path / "checkpoints" / "gtsrb17").mkdir(parents=True)
        kept = {"both-robust": {"verdict": "carries over"}, "imbalance-size": {"verdict": "not tested"}}
        (tmp_path / "checkpoints" / "gtsrb17" / "claims.json").write_text(json.dumps(kept), encoding="utf-8")
        found = coverage.shown(tmp_path)
        words = ("streamed", "shown", "coded", "drawn", "written")
        letters = [coverage.status({"shown": [{"says": "07", "text": word}]}, found)[0] for word in words]
        assert letters == ["R", "R", "N", "N", "N"]
        there, not_there = ({"shown": [{"verdict": key, "data": "gtsrb17"}]} for key in kept)
        assert coverage.status(there, found) == ("R", "")
        assert coverage.status(not_there, found) == ("B", "claim imbalance-size not tested on GTSRB-17")

    def test_a_claim_that_nobody_stated_is_refused(self) -> None:
        with pytest.raises(KitError, match="claim 'report-26' is unknown"):
            coverage.status({"shown": [{"verdict": "report-26"}]}, self.FOUND)

    def test_every_claim_of_a_notebook_is_stated(self) -> None:
        """And every statement is asked in some notebook."""
        sources = [path.read_text(encoding="utf-8") for path in (PROJECT / "notebooks").glob("*.ipynb")]
        asked = {key for key in claims.statements() for text in sources if f'\\"{key}\\"' in text}
        assert asked == set(claims.statements())


def test_an_unknown_table_is_refused(copies: Path) -> None:
    (copies / "README.md").write_text("<!-- table tabel -->\n<!-- end -->\n", encoding="utf-8")
    with pytest.raises(KitError, match="table 'tabel' is unknown: use one of disparity"):
        documents.refresh(copies)


def test_shipped_runs_are_what_their_folders_say_and_all_different() -> None:
    """No figure can show one model under two names: every run has its own weights, record and history agree."""
    seen: dict[str, str] = {}
    folders = runs.finished(PROJECT / "checkpoints" / "fashion_mnist")
    assert len(folders) >= 20
    for folder in folders:
        recipe, seed = folder.parent.name, int(folder.name.removeprefix("seed"))
        model, config = runs.read_weights(folder / runs.WEIGHTS)
        wanted = recipes.configure(recipe, "fashion_mnist", seed)
        assert config == recipes.described(wanted)
        weights = checkpoint.digest(dict(model.state_dict()))
        assert seen.setdefault(weights, str(folder)) == str(folder)
        record, history = records.read(folder / "record.json"), records.read_history(folder / "history.json")
        assert record["config"] == history["config"] == config
        assert record["weights_sha256"] == weights
        assert record["images"] == 10_000
        assert len(history["epochs"]) == wanted.epochs
        if "start" in history and wanted.start != "random":
            start = records.read(runs.start_folder(wanted, folder) / "record.json")
            assert history["start"]["sha256"] == start["weights_sha256"]

"""The matrix claim × data set: cells by hand, claims taken over from executed notebooks of other data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from frlkit import KitError
from frlkit.report import claims, matrix


def row(verdict: str, evidence: str, key: str = "both-robust", dataset: str = "GTSRB-17") -> dict[str, str]:
    return {"claim": "c", "evidence": evidence, "verdict": verdict, "dataset": dataset, "key": key}


def write(path: Path, *rows: dict[str, str]) -> Path:
    output = {"data": {claims.MIME: {"title": "t", "claims": list(rows)}}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": [{"source": [], "outputs": [output]}]}), encoding="utf-8")
    return path


class TestCell:
    @pytest.mark.parametrize(
        ("verdict", "evidence", "expected"),
        [
            ("confirmed", "A − B: -8.3 ± 1.9 points [-10.7, -5.9], p 0.011", "confirmed: -8.3 ± 1.9 points"),
            ("partly", "A: 2.4 ± 1.8 points [0.2, 4.7], p 0; B: 10.1 ± 1 points [5, 1]", "partly: 2.4 to 10.1 points"),
            ("refuted", "A: 0.0 ± 0.1 points; B: -0.0 ± 0.1 points", "refuted: 0.0 ± 0.1 points"),
            ("confirmed", "A: rho 0.95, without x 0.93 (medians of 5 seeds); B: rho 0.95, p 0", "confirmed: rho 0.95"),
            ("refuted", "A: partial rho -0.31 (median of 5 seeds)", "refuted: partial rho -0.31"),
            ("not tested", "S: -37.8 ± 4.3 %, 3 seeds, 5 needed", "not tested: -37.8 ± 4.3 %, 3 seeds"),
            ("not tested", "A: 3 seeds, 5 needed; B: 13 seeds, 15 needed", "not tested: 3 seeds, 13 seeds"),
            ("not tested", "A − B: no runs; C − D: no runs", "no runs"),
            ("not tested", "A: 1.0 points, 1 seed, 5 needed; B: no runs", "not tested: 1.0 points, 1 seed; no runs: B"),
            ("not tested", "A − B, worst: no runs; C: -0.4 ± 1.2 points, 3 seeds, 5 needed",
             "not tested: -0.4 ± 1.2 points, 3 seeds; no runs: A − B, worst"),
            ("not tested", "A: 1.0 ± 2.0 points (200 test images, 1000 needed)",
             "not tested: 1.0 ± 2.0 points, 200 test images, 1000 needed"),
            ("carries over", "of 9 comparisons the weakest: A − B, worst: 9.0 ± 0.9 points [7, 8]",
             "carries over: 9.0 ± 0.9 points"),
        ],
    )  # fmt: skip
    def test_by_hand(self, verdict: str, evidence: str, expected: str) -> None:
        assert matrix.cell(row(verdict, evidence)) == expected


class TestCollect:
    @pytest.fixture
    def project(self, tmp_path: Path) -> Path:
        home = row("confirmed", "A: 1.0 ± 0.1 points", dataset="Fashion-MNIST")
        write(tmp_path / "project" / "notebooks" / "05_x.ipynb", home)
        (tmp_path / "project" / "checkpoints" / "gtsrb17").mkdir(parents=True)
        return tmp_path / "project"

    def test_is_kept_and_shown(self, project: Path, tmp_path: Path) -> None:
        found: Any = write(tmp_path / "output" / "05_x_gtsrb17" / "05_x_gtsrb17.ipynb", row("carries over", "A: 2.0 %"))
        assert matrix.collect(found.parent, project) == [project / "checkpoints" / "gtsrb17" / "claims.json"]
        write(found, row("does not carry over", "A: 3.0 %", "both-boundary"))  # another run: the first claim stays
        matrix.collect(found.parent, project)
        lines = {line.split(" | ")[0]: line.split(" | ") for line in matrix.table(project).splitlines()}
        says = claims.statements()["both-robust"]
        cells = lines[f"| {says['source']}: {says['says']}"]
        assert cells[1:4] == ["confirmed: 1.0 ± 0.1 points", "no runs", "carries over: 2.0 %"]
        assert cells[4].startswith("no runs")
        assert "carries over to" not in " ".join(cells)
        counted = matrix.carried(project)
        assert "| carries over |  |  | 1 |  |  |" in counted
        assert "| does not carry over |  |  | 1 |  |  |" in counted

    def test_why_there_is_nothing(self, project: Path, tmp_path: Path) -> None:
        """Another claim of the same notebook says that it does not ask this one there; another notebook's does not."""
        for place, claim in (("05_x_gtsrb17", "both-boundary"), ("01_x_cifar10", "natural-alike")):
            data = {"gtsrb17": "GTSRB-17", "cifar10": "CIFAR-10"}[place.split("_")[-1]]
            write(tmp_path / "output" / place / f"{place}.ipynb", row("carries over", "A: 2.0 %", claim, dataset=data))
        (project / "checkpoints" / "cifar10").mkdir()
        matrix.collect(tmp_path / "output", project)
        lines = {line.split(" | ")[0]: line.split(" | ") for line in matrix.table(project).splitlines()}
        cells = lines[f"| {claims.statements()['both-robust']['source']}: {claims.statements()['both-robust']['says']}"]
        assert cells[3:5] == ["not asked there", "no runs"]

    def test_the_reports_recipes_are_asked_of_its_own_data(self, project: Path) -> None:
        rows = {
            "report-25": row("not tested", "A: no runs", "report-25"),
            "remargin-labels": row("not tested", "A − B: -1.0 points, 1 seed, 5 needed", "remargin-labels"),
            "both-robust": row("not tested", "A − B: no runs"),
        }
        (project / "checkpoints" / "gtsrb17" / "claims.json").write_text(json.dumps(rows), encoding="utf-8")
        stated, lines = claims.statements(), matrix.table(project).splitlines()
        cells = {key: line.split(" | ") for key in rows for line in lines if f": {stated[key]['says']} |" in line}
        assert cells["report-25"][2:5] == ["not asked there"] * 3
        assert cells["both-robust"][2:5] == ["no runs"] * 3
        assert cells["remargin-labels"][2:4] == ["not asked there", "not tested: -1.0 points, 1 seed"]

    def test_nothing_to_keep(self, project: Path, tmp_path: Path) -> None:
        write(tmp_path / "output" / "05_x.ipynb", row("confirmed", "A: 1.0 %", dataset="Fashion-MNIST"))
        with pytest.raises(KitError, match="no notebook in .* has claims about a data set"):
            matrix.collect(tmp_path / "output", project)

    def test_what_is_no_notebook(self, tmp_path: Path) -> None:
        (tmp_path / "05_x.ipynb").write_text("[]", encoding="utf-8")
        with pytest.raises(KitError, match="is no notebook"):
            matrix.of_notebooks([tmp_path / "05_x.ipynb"])

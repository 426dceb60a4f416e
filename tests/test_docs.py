"""README's table is what the shipped records say, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

from click.testing import CliRunner

from frlkit import PROJECT, tables, training
from frlkit.__main__ import main
from frlkit.evaluation import read_record

README = (PROJECT / "README.md").read_text()


def shipped() -> dict[str, list[dict[str, object]]]:
    folder = PROJECT / "checkpoints" / "fashion_mnist"
    return {
        recipe: [read_record(folder / recipe / f"seed{seed}" / "record.json") for seed in range(5)]
        for recipe in training.RECIPES
    }


def test_the_table_comes_from_the_records() -> None:
    summary = tables.summary(tables.tidy(shipped()))
    for recipe in training.RECIPES:
        cells = [summary.loc[(recipe, measure), part] for measure in tables.MEASURES for part in ("average", "worst")]
        assert f"| {recipe} | {' | '.join(cells)} |" in README


def test_commands_exist() -> None:
    commands = re.findall(r"python -m frlkit (\w+)", README)
    assert {"train", "evaluate"} <= set(commands)
    for command in commands:
        assert CliRunner().invoke(main, [command, "--help"]).exit_code == 0


def test_links_lead_somewhere() -> None:
    for document in ("README.md", "REPORT.md"):
        links = re.findall(r"\]\((?!http)([^)]+)\)", (PROJECT / document).read_text())
        assert all((PROJECT / Path(link)).exists() for link in links)

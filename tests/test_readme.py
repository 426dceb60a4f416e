"""README and docs/: their commands, links and numbers hold, and the table of notebooks is what the notebooks say."""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from frlkit import PROJECT
from frlkit.__main__ import main
from frlkit.report import front

DOCUMENTS = [PROJECT / "README.md", PROJECT / "REPORT.md", *sorted((PROJECT / "docs").glob("*.md"))]
README = DOCUMENTS[0].read_text(encoding="utf-8")


def table(name: str) -> str:
    return re.search(rf"<!-- table {name} -->\n(.*?)\n<!-- end -->", README, re.DOTALL)[1]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
class TestDocument:
    def test_links_lead_somewhere(self, document: Path) -> None:
        links = re.findall(r"\]\((?!http)([^)#]+)", document.read_text(encoding="utf-8"))
        assert [link for link in links if not (document.parent / link).exists()] == []

    def test_commands_and_their_options_exist(self, document: Path) -> None:
        text = document.read_text(encoding="utf-8")
        code = re.findall(r"`([^`\n]+)`", text) + re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        for line in "\n".join(code).splitlines():
            called = re.search(r"(?:^|-m |&& )frlkit ([a-z]+)(.*?)(?:#|&&|$)", line)
            if called:
                help_text = CliRunner().invoke(main, [called[1], "--help"])
                assert help_text.exit_code == 0, line
                assert all(option in help_text.output for option in re.findall(r" (--[a-z-]+)", called[2])), line

    def test_targets_of_make_exist(self, document: Path) -> None:
        targets = re.findall(r"^([a-z]+):", (PROJECT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        for target in re.findall(r"`(?:[^`\n]*&& )?make ([a-z]+)", document.read_text(encoding="utf-8")):
            assert target in targets


def test_the_answer_quotes_the_table() -> None:
    """Every number of the first answer stands in the table of results, which is written from records."""
    answer = re.search(r"\*\*In short\.\*\*.*?\n\n", README, re.DOTALL)[0]
    found = re.findall(r"\d+\.\d", answer)
    assert len(found) >= 6
    means = re.findall(r"(\d+\.\d) ±", table("fairness"))
    assert [number for number in found if number not in means] == []


def test_nothing_waits_to_be_measured() -> None:
    assert not re.search(r"not (yet )?measured|not timed|\bTODO\b|\bTBD\b", README)


def test_one_picture_one_table_of_results_all_sources() -> None:
    pictures = re.findall(r"!\[[^\]]*\]\((?!http)", README)
    assert len(pictures) == 1
    for address in (
        "https://arxiv.org/abs/2010.06121",
        "https://openreview.net/forum?id=vOchfRdvPy7",
        "https://openreview.net/forum?id=Sczshz7h0K",
        "https://github.com/hannxu123/fair_robust",
    ):
        assert address in README


class TestNotebooks:
    def test_the_table_is_what_the_notebooks_say(self) -> None:
        assert table("notebooks") == front.notebooks()

    def test_a_row_each_with_time_and_badges(self, tmp_path: Path) -> None:
        shutil.copytree(PROJECT / "notebooks", tmp_path / "notebooks")
        (tmp_path / "benchmarks").mkdir()
        times = {"01_preliminary_disparity": 75.4, "03_frl_reweight": 240.0}
        written = json.dumps({"machine": "2 cores, x86_64", "seconds": times})
        (tmp_path / "benchmarks" / "notebooks.json").write_text(written, encoding="utf-8")
        head, _, *rows = front.notebooks(tmp_path).splitlines()
        assert head == "| notebook | what it answers | time, 2 cores, x86_64 | open in |"
        paths = sorted((tmp_path / "notebooks").glob("[0-9][0-9]_*.ipynb"))
        for path, row in zip(paths, rows, strict=True):
            assert f"](notebooks/{path.name})" in row
            assert row.count(f"/blob/main/notebooks/{path.name}") == 2  # Colab's and Kaggle's
        assert [row.split(" | ")[2] for row in rows][:3] == ["75 s", "", "4 min"]

    def test_without_times_no_column_of_times(self, tmp_path: Path) -> None:
        shutil.copytree(PROJECT / "notebooks", tmp_path / "notebooks")
        assert front.notebooks(tmp_path).splitlines()[0] == "| notebook | what it answers | open in |"


def test_text_files_are_read_and_written_as_utf8() -> None:
    """ruff's PLW1514 sees a file whose type it can infer; this sees the others."""
    found = []
    for path in sorted((PROJECT / "frlkit").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                before = {"read_text": 0, "write_text": 1}.get(node.func.attr, 99)
                if len(node.args) <= before < 99 and not any(word.arg == "encoding" for word in node.keywords):
                    found.append(f"{path.relative_to(PROJECT)}:{node.lineno}")
    assert found == []

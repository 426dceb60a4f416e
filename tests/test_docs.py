"""README's table is what the shipped records say, and its commands exist."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from frlkit import PROJECT, KitError, checkpoint, recipes, records, runs
from frlkit.report import documents

README = (PROJECT / "README.md").read_text()


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    for name in documents.DOCUMENTS:
        shutil.copy(PROJECT / name, tmp_path)
    return tmp_path


def test_every_table_is_what_records_and_notebooks_say(copies: Path) -> None:
    assert documents.refresh(copies) == []


def test_an_altered_number_is_written_anew(copies: Path) -> None:
    text = (copies / "README.md").read_text()
    number = re.search(r"\d+\.\d ± \d\.\d", text)[0]
    (copies / "README.md").write_text(text.replace(number, "99.9 ± 9.9", 1))
    assert documents.refresh(copies) == ["README.md"]
    assert (copies / "README.md").read_text() == text


def test_an_unknown_table_is_refused(copies: Path) -> None:
    (copies / "README.md").write_text("<!-- table tabel -->\n<!-- end -->\n")
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

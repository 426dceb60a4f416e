"""The notebooks as their users meet them: papermill from another folder, a misspelt parameter, nbval."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest

import frlkit
from frlkit import KitError
from frlkit.report import claims

NOTEBOOKS = sorted((frlkit.PROJECT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
DISPARITY, THEORY = NOTEBOOKS[:2]
SMOKE = frlkit.PROJECT / "notebooks" / "profiles" / "smoke.yaml"


def command(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(frlkit.PROJECT), "JUPYTER_PLATFORM_DIRS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=900
    )


def cells(path: Path, tag: str = "") -> list[Any]:
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    return [cell for cell in code if not tag or tag in cell.metadata.get("tags", [])]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestCommitted:
    def test_outputs_are_whole_clean_and_free_of_paths(self, path: Path) -> None:
        content = nbformat.read(path, as_version=4)
        nbformat.validate(content)
        assert "papermill" not in content.metadata
        assert [cell.execution_count for cell in cells(path)] == list(range(1, len(cells(path)) + 1))
        for cell in cells(path):
            assert "papermill" not in cell.metadata
            assert all(output.output_type != "error" and output.get("name") != "stderr" for output in cell.outputs)
        assert not re.search(r"[\"' ](/home|/root|/tmp|/work|/Users)/", path.read_text(encoding="utf-8"))

    def test_ends_with_a_claims_table(self, path: Path) -> None:
        (cell,) = cells(path, "claims")
        assert claims.from_notebook([cell])[0]["claims"]

    def test_its_claims_are_read_at_a_glance(self, path: Path) -> None:
        cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if "claims.judge(" in cell.source]
        assert all(len(source.splitlines()) <= 20 for source in cells)


REFUSED = pytest.mark.parametrize(
    ("name", "value", "words"),
    [("sed", "3", ["unknown parameter 'sed'"]), ("FIGURES", "3", ["FIGURES = 3 is not allowed", "text in quotes"])],
)


def test_papermill_refuses_a_bad_parameter_in_one_line(tmp_path: Path) -> None:
    done = command("papermill", THEORY, tmp_path / "out.ipynb", "-p", "sed", "3", "--no-progress-bar", cwd=tmp_path)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("ParameterError: ")]
    assert "unknown parameter 'sed'" in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.ipynb"]  # refused before anything was made


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@REFUSED
def test_every_notebook_refuses_a_bad_parameter_before_anything_is_made(
    path: Path, name: str, value: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cells that papermill would run, here and now instead of in a kernel of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    prepared = papermill.execute_notebook(path, None, {name: int(value)}, prepare_only=True)
    sources = [cell.source for cell in prepared.cells if cell.cell_type == "code"]
    check = next(number for number, source in enumerate(sources) if "notebook.parameters(" in source)
    scope: dict[str, Any] = {"In": (history := [])}
    with pytest.raises(KitError) as refusal:
        for source in sources[: check + 1]:
            history.append(source)
            exec(compile(source, str(path), "exec"), scope)
    assert type(refusal.value).__name__ == "ParameterError"
    assert all(word in str(refusal.value) for word in words)
    assert "p" not in scope
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_smoke_profile_runs_anywhere_and_reloads(path: Path, tmp_path: Path, smoke_runs: Path) -> None:
    words: tuple[str | Path, ...] = ("papermill", path, tmp_path / "out.ipynb", "-f", SMOKE, "--no-progress-bar")
    if path != DISPARITY:
        words += ("-p", "RUNS", smoke_runs)
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert list((tmp_path / "output" / "smoke" / "figures").glob(f"{path.name[:2]}_*.png"))
    weights = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("weights.safetensors")}
    if path == DISPARITY:
        assert len(weights) == 2
        again = command(*words, cwd=tmp_path)
        assert again.returncode == 0, again.stderr[-2000:]
        outputs = "".join(str(cell.outputs) for cell in cells(tmp_path / "out.ipynb"))
        assert not re.search(r"epoch \d+/\d+: loss", outputs)  # nothing was trained again
        assert weights == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("weights.safetensors")}


@pytest.mark.parametrize("path", [DISPARITY, *NOTEBOOKS[2:5], NOTEBOOKS[6]], ids=lambda path: path.stem)
def test_without_the_images_the_shipped_records_say_the_same(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `frlkit reproduce` runs them offline: the very claims of the notebook as it is shipped."""
    monkeypatch.setenv("FRLKIT_DATA", str(tmp_path / "none"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nobody answers: nothing can be downloaded
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    out = tmp_path / "out.ipynb"
    done = command("papermill", path, out, "-p", "FIGURES", tmp_path / "figures", "--no-progress-bar", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    offline, shipped = (
        [
            (row["key"], row["verdict"], row["evidence"])
            for table in claims.from_notebook(json.loads(file.read_text(encoding="utf-8"))["cells"])
            for row in table["claims"]
        ]
        for file in (out, path)
    )
    assert shipped
    assert offline == shipped


def nbval(path: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return command("pytest", "--nbval", "-q", "-p", "no:cacheprovider", path, cwd=cwd)


def test_nbval_theory() -> None:
    done = nbval(THEORY, THEORY.parent)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path != THEORY], ids=lambda path: path.stem)
def test_nbval_on_real_data(path: Path, fashion_mnist: object) -> None:
    done = nbval(path, path.parent)
    assert done.returncode == 0, done.stdout[-3000:]


def test_nbval_notices_an_altered_number(tmp_path: Path) -> None:
    content = nbformat.read(THEORY, as_version=4)
    tables = [
        number
        for number, cell in enumerate(content.cells)
        if any(re.search(r"\d\.\d", out.get("data", {}).get("text/plain", "")) for out in cell.get("outputs", []))
        and "nbval-ignore-output" not in cell.metadata.get("tags", [])
    ]
    content.cells = content.cells[: tables[0] + 1]
    altered = copy.deepcopy(content)
    for output in altered.cells[-1].outputs:
        for kind in ("text/plain", "text/html"):
            text = output["data"][kind]
            output["data"][kind] = re.sub(
                r"(\d\.\d*?)(\d)(?!\d)", lambda m: m[1] + str((int(m[2]) + 1) % 10), text, count=1
            )
    outcomes = {}
    for name, version in (("true", content), ("altered", altered)):
        nbformat.write(version, tmp_path / f"{name}.ipynb")
        outcomes[name] = nbval(tmp_path / f"{name}.ipynb", tmp_path).returncode
    assert outcomes == {"true": 0, "altered": 1}

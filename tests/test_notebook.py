"""Notebook parameters: everything papermill lets through must be stopped here, in one sentence."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from frlkit import PROJECT, KitError, notebook
from frlkit.notebook import ParameterError, flag, list_of, number, one_of, text

RULES = {
    "DATASET": one_of("fashion_mnist", "digits"),
    "EPOCHS": number(1, 100, whole=True),
    "SAMPLES": number(0, 1),
    "SEEDS": list_of(number(0, 9, whole=True)),
    "RECIPES": list_of(one_of("natural", "trades")),
    "DRIVE": flag(),
    "RUNS": text(),
}
GOOD: dict[str, Any] = {
    "DATASET": "digits",
    "EPOCHS": 3,
    "SAMPLES": 0.5,
    "SEEDS": [0, 2],
    "RECIPES": ["trades"],
    "DRIVE": False,
    "RUNS": "",
}
OWN = "# Parameters: change them here\n" + "\n".join(f"{name} = {value!r}" for name, value in GOOD.items())
RUNNING = "p = notebook.parameters(globals(), ...)"


def check(*injected: str, **changed: Any) -> Any:
    """Check as in a notebook whose own cell, an injected one and then this one have run."""
    return notebook.parameters({**GOOD, **changed, "In": ["", "import frlkit", OWN, *injected, RUNNING]}, **RULES)


class TestGood:
    def test_values_come_back(self) -> None:
        assert vars(check()) == GOOD

    def test_a_whole_number_where_any_will_do(self) -> None:
        assert check(SAMPLES=1).SAMPLES == 1

    @pytest.mark.parametrize("limit", [1, 100])
    def test_the_limits_are_allowed(self, limit: int) -> None:
        checked = check(EPOCHS=limit)
        assert vars(checked) == {**GOOD, "EPOCHS": limit}

    def test_outside_ipython(self) -> None:
        assert vars(notebook.parameters(GOOD, **RULES)) == GOOD

    def test_known_names_injected_by_papermill(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert check("# Parameters\nEPOCHS = 7\n", EPOCHS=7).EPOCHS == 7
        assert capsys.readouterr().out == ""


class TestNames:
    @pytest.mark.parametrize("cell", ["EPOCH = 3", "DATASET = 'digits'\nEPOCH = 3", "EPOCH: int = 3", "X = EPOCH = 3"])
    def test_a_misspelt_name_is_refused(self, cell: str) -> None:
        with pytest.raises(ParameterError, match="'EPOCH'") as caught:
            check(f"# Parameters\n{cell}\n")
        assert "EPOCHS" in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1

    def test_a_misspelt_name_in_the_notebooks_own_cell(self) -> None:
        namespace = {**GOOD, "In": ["", OWN + "\nLEARNING = 3", RUNNING]}
        with pytest.raises(ParameterError, match="'LEARNING'"):
            notebook.parameters(namespace, **RULES)

    def test_another_notebooks_name_is_only_noted(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert vars(check("# Parameters\nGD_STEPS = 3\nBATCH_SIZE = 5\n")) == GOOD
        assert capsys.readouterr().out == "not used by this notebook: BATCH_SIZE, GD_STEPS\n"

    def test_only_the_cells_just_before_count(self) -> None:
        history = ["", "# Parameters\nOLD = 1", "other = 2", OWN, RUNNING]
        assert vars(notebook.parameters({**GOOD, "In": history}, **RULES)) == GOOD

    def test_values_that_are_read_are_not_parameters(self) -> None:
        assert vars(check("# Parameters\nEPOCHS = len(ANYTHING)\n")) == GOOD

    @pytest.mark.parametrize("name", GOOD)
    def test_a_missing_name(self, name: str) -> None:
        namespace = {key: value for key, value in GOOD.items() if key != name}
        with pytest.raises(ParameterError, match=f"parameter {name} is not set: run the cell"):
            notebook.parameters(namespace, **RULES)

    def test_every_name_here_is_a_known_one(self) -> None:
        assert set(RULES) <= notebook.ALL_PARAMETERS


class TestValues:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *(("DRIVE", value) for value in ("true", "True", "", 1, 0, None)),
            *(("EPOCHS", value) for value in ("3", 3.0, True, 0, 101, math.nan, None, [3])),
            *(("SAMPLES", value) for value in ("8/255", "0.5", True, False, math.nan, math.inf, -0.1, 1.01, None)),
            *(("DATASET", value) for value in ("mnist", "Digits", "", None, ["digits"], 1)),
            *(("SEEDS", value) for value in ([], [0, 0], [0, "1"], [0, True], [-1], [0.0], "[0, 1]", 0, (0, 1), None)),
            *(("RECIPES", value) for value in ("trades", ["trades", "trades"], ["fgsm"], [["trades"]])),
            *(("RUNS", value) for value in (None, 3, Path("runs"))),
        ],
    )
    def test_refused_in_one_sentence_with_name_and_value(self, name: str, value: Any) -> None:
        with pytest.raises(ParameterError) as caught:
            check(**{name: value})
        message = str(caught.value)
        assert message.startswith(f"parameter {name} = {value!r} is not allowed: use ")
        assert len(message.splitlines()) == 1

    @pytest.mark.parametrize(
        ("name", "value", "said"),
        [
            ("EPOCHS", 0, "a whole number from 1 to 100"),
            ("SAMPLES", "8/255", "without quotes"),
            ("DRIVE", "true", "True or False"),
            ("DATASET", "mnist", "one of 'fashion_mnist', 'digits'"),
            ("SEEDS", [0, 99], "a list whose items are each a whole number from 0 to 9"),
            ("SEEDS", [], "a non-empty list without repeats"),
        ],
    )
    def test_says_what_is_allowed(self, name: str, value: Any, said: str) -> None:
        with pytest.raises(ParameterError) as caught:
            check(**{name: value})
        assert said in str(caught.value)

    def test_a_number_too_large_for_a_float(self) -> None:
        with pytest.raises(ParameterError, match="parameter EPOCHS"):
            check(EPOCHS=10**400)


class TestDisplay:
    def test_ipython_shows_one_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from IPython.core.interactiveshell import InteractiveShell
        from traitlets.config import Config

        monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
        monkeypatch.delenv("VIRTUAL_ENV", raising=False)  # IPython warns where another one than its own is active
        shell = InteractiveShell(config=Config(HistoryManager={"enabled": False}))
        shown: list[list[str]] = []
        shell._showtraceback = lambda kind, value, lines: shown.append(lines)  # type: ignore[method-assign]
        shell.run_cell("from frlkit.notebook import ParameterError\nraise ParameterError('parameter X is bad')")
        assert shown == [["ParameterError: parameter X is bad"]]

    def test_the_kind_is_named(self) -> None:
        assert KitError("no")._render_traceback_() == ["KitError: no"]
        assert ParameterError("no")._render_traceback_() == ["ParameterError: no"]


class TestFolder:
    def test_relative_to_the_working_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert notebook.folder("runs", "checkpoints") == tmp_path.resolve() / "runs"
        monkeypatch.setenv("HOME", str(tmp_path))
        assert notebook.folder("~/runs", "checkpoints") == tmp_path.resolve() / "runs"

    def test_empty_is_the_projects(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert notebook.folder("", "checkpoints") == PROJECT / "checkpoints"

    def test_drive_needs_colab(self) -> None:
        with pytest.raises(KitError, match="needs Google Colab"):
            notebook.folder("", "checkpoints", drive=True)


def test_versions_are_one_line() -> None:
    line = notebook.versions("torch", "numpy")
    assert len(line.splitlines()) == 1
    assert "torch 2" in line
    assert "numpy " in line

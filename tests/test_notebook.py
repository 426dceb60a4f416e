"""Notebook parameters as papermill and people get them wrong, and where folders are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from frlkit import PROJECT, KitError, notebook
from frlkit.notebook import ParameterError, flag, list_of, number, one_of, parameters, text

CHECK = "checked = parameters(globals(), ...)"


def run(history: list[str] | None = None, values: dict[str, Any] | None = None, **rules: Any) -> Any:
    """`parameters` in a notebook whose cells so far are `history` (the last is running) with these globals."""
    return parameters({"In": ["", *(history or []), CHECK], **(values or {})}, **rules)


class TestParameters:
    RULES = {
        "DATASET": one_of("digits", "fashion_mnist"),
        "EPOCHS": number(1, 100, whole=True),
        "SEEDS": list_of(number(0, 9, whole=True)),
        "DRIVE": flag(),
        "RUNS": text(),
    }
    GOOD = {"DATASET": "digits", "EPOCHS": 3, "SEEDS": [0, 4], "DRIVE": False, "RUNS": ""}

    def test_a_good_set(self) -> None:
        cell = "# Parameters\n" + "\n".join(f"{name} = {value!r}" for name, value in self.GOOD.items())
        checked = run(["import frlkit", cell], {**self.GOOD, "other": 1}, **self.RULES)
        assert vars(checked) == self.GOOD

    def test_an_unknown_name_in_the_injected_cell(self) -> None:
        with pytest.raises(ParameterError, match="unknown parameter 'EPOCS': this notebook has EPOCHS") as caught:
            run(["# Parameters\nEPOCHS = 3", "# Parameters\nEPOCS = 5"], {"EPOCHS": 3, "EPOCS": 5}, EPOCHS=number(1, 9))
        assert len(str(caught.value).splitlines()) == 1

    def test_an_unknown_name_in_the_notebooks_own_cell(self) -> None:
        with pytest.raises(ParameterError, match="'A', 'B'"):
            run(["# Parameters\nEPOCHS = 3\nB: int = 2\nA = 1"], {"EPOCHS": 3}, EPOCHS=number(1, 9))

    def test_other_cells_may_assign_what_they_like(self) -> None:
        history = ["# Parameters\nOLD = 1", "model = 3", "# Parameters\nEPOCHS = 3"]
        assert run(history, {"EPOCHS": 3}, EPOCHS=number(1, 9)).EPOCHS == 3

    def test_another_notebooks_parameter_is_named_and_ignored(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "SAMPLES" in notebook.ALL_PARAMETERS
        checked = run(["# Parameters\nEPOCHS = 3", "# Parameters\nSAMPLES = 5"], {"EPOCHS": 3}, EPOCHS=number(1, 9))
        assert vars(checked) == {"EPOCHS": 3}
        assert capsys.readouterr().out == "not used by this notebook: SAMPLES\n"

    def test_a_missing_name(self) -> None:
        with pytest.raises(ParameterError, match="parameter EPOCHS is not set: run the cell that begins"):
            run(EPOCHS=number(1, 9))

    def test_outside_a_notebook_there_is_no_history(self) -> None:
        assert parameters({"EPOCHS": 3}, EPOCHS=number(1, 9)).EPOCHS == 3

    @pytest.mark.parametrize(
        ("name", "value", "allowed"),
        [
            ("DRIVE", "true", "True or False"),
            ("DRIVE", "True", "True or False"),
            ("DRIVE", 1, "True or False"),
            ("EPS", "8/255", "a number from 0 to 255, without quotes"),
            ("EPS", True, "a number from 0 to 255"),
            ("EPS", math.nan, "a number from 0 to 255"),
            ("EPS", math.inf, "a number from 0 to 255"),
            ("EPS", -0.5, "a number from 0 to 255"),
            ("EPS", 255.5, "a number from 0 to 255"),
            ("EPS", 10**400, "a number from 0 to 255"),  # YAML knows no limit, floats do
            ("EPS", None, "a number from 0 to 255"),
            ("EPS", [8], "a number from 0 to 255"),
            ("EPOCHS", 3.0, "a whole number from 1 to 100"),
            ("EPOCHS", True, "a whole number from 1 to 100"),
            ("EPOCHS", 0, "a whole number from 1 to 100"),
            ("EPOCHS", 101, "a whole number from 1 to 100"),
            ("EPOCHS", "3", "a whole number from 1 to 100"),
            ("DATASET", "mnist", "one of 'digits', 'fashion_mnist'"),
            ("DATASET", ["digits"], "one of 'digits', 'fashion_mnist'"),
            ("DATASET", None, "one of 'digits', 'fashion_mnist'"),
            ("RUNS", 3, "text in quotes"),
            ("RUNS", None, "text in quotes"),
            ("SEEDS", [], "a non-empty list"),
            ("SEEDS", 3, "a non-empty list"),
            ("SEEDS", "0,1", "a non-empty list"),
            ("SEEDS", (0, 1), "a non-empty list"),
            ("SEEDS", [0, 0], "without repeats"),
            ("SEEDS", [0, True], "a list whose items are each a whole number from 0 to 9"),
            ("SEEDS", [0, 10], "a list whose items are each a whole number from 0 to 9"),
            ("SEEDS", [[0]], "a list whose items are each a whole number from 0 to 9"),
        ],
    )
    def test_a_wrong_value_is_one_sentence(self, name: str, value: Any, allowed: str) -> None:
        rules = {**self.RULES, "EPS": number(0, 255)}
        with pytest.raises(ParameterError) as caught:
            run(values={name: value}, **{name: rules[name]})
        message = str(caught.value)
        assert message.startswith(f"parameter {name} = {value!r} is not allowed: use ")
        assert allowed in message
        assert len(message.splitlines()) == 1

    @pytest.mark.parametrize("value", [0, 255, 8, 8.5, 0.0])
    def test_numbers_up_to_the_limits_are_good(self, value: float) -> None:
        assert value == run(values={"EPS": value}, EPS=number(0, 255)).EPS

    def test_a_notebook_shows_one_line_and_no_traceback(self) -> None:
        with pytest.raises(ParameterError) as caught:
            run(values={"DRIVE": "true"}, DRIVE=flag())
        assert isinstance(caught.value, KitError)
        (line,) = caught.value._render_traceback_()
        assert line == f"ParameterError: {caught.value}"
        assert "\n" not in line


class TestFolder:
    def test_empty_is_the_projects(self) -> None:
        assert notebook.folder("", "checkpoints") == PROJECT / "checkpoints"

    def test_relative_is_the_working_directorys(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert notebook.folder("some/runs", "checkpoints") == tmp_path.resolve() / "some" / "runs"
        assert notebook.folder("~/runs", "checkpoints") == tmp_path.resolve() / "home" / "runs"
        assert notebook.folder(str(tmp_path), "checkpoints", drive=True) == tmp_path.resolve()  # a name wins

    def test_drive_needs_colab(self) -> None:
        with pytest.raises(KitError, match="DRIVE = True needs Google Colab"):
            notebook.folder("", "checkpoints", drive=True)

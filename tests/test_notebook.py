"""Notebook parameters: everything papermill lets through must be stopped here, in one sentence."""

from __future__ import annotations

import ast
import json
import math
import sys
import types
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest

from frlkit import PROJECT, KitError, data, notebook
from frlkit.notebook import PARAMETERS, ParameterError

GOOD: dict[str, Any] = {
    "DATASET": "digits",
    "EPOCHS": 3,
    "ALPHAS": [0.5, 2],
    "FRL_SEEDS": [0, 2],
    "REPORT_SEEDS": [2],
    "RECIPES": ["natural", "trades"],
    "DEVICE": "cpu",
    "DRIVE": False,
    "RUNS": "",
}
OWN = "# Parameters\n" + "\n".join(
    f"{name}: {type(value).__name__} = {value!r}  # help" for name, value in GOOD.items()
)
RUNNING = "p = notebook.parameters(globals())"


def check(*injected: str, **changed: Any) -> Any:
    """Check as in a notebook whose own cell, an injected one and then this one have run."""
    return notebook.parameters({**GOOD, **changed, "In": ["", "import frlkit", OWN, *injected, RUNNING]})


class TestGood:
    def test_values_come_back(self) -> None:
        assert vars(check()) == GOOD

    def test_a_whole_number_stays_one_where_any_will_do(self) -> None:
        assert [str(each) for each in check(ALPHAS=[1, 2.5]).ALPHAS] == ["1", "2.5"]  # recipes are named after it

    @pytest.mark.parametrize("limit", [1, 10**5])
    def test_the_limits_are_allowed(self, limit: int) -> None:
        checked = check(EPOCHS=limit)
        assert vars(checked) == {**GOOD, "EPOCHS": limit}

    def test_outside_ipython(self) -> None:
        assert vars(notebook.parameters(GOOD)) == GOOD

    def test_known_names_injected_by_papermill(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert check("# Parameters\nEPOCHS = 7\n", EPOCHS=7).EPOCHS == 7
        assert capsys.readouterr().out == ""

    def test_another_cell_may_run_in_between(self) -> None:
        assert vars(check("print(EPOCHS)")) == GOOD

    def test_one_that_only_another_notebook_has_is_no_attribute(self) -> None:
        namespace = {**GOOD, "SEEDS": [0, 1], "In": ["", OWN, RUNNING]}
        assert vars(notebook.parameters(namespace)) == GOOD


class TestNames:
    @pytest.mark.parametrize("cell", ["EPOCH = 3", "DATASET = 'digits'\nEPOCH = 3", "EPOCH: int = 3", "X = EPOCH = 3"])
    def test_a_misspelt_name_is_refused(self, cell: str) -> None:
        with pytest.raises(ParameterError, match="'EPOCH'") as caught:
            check(f"# Parameters\n{cell}\n")
        assert len(str(caught.value).splitlines()) == 1

    def test_the_right_names_are_said(self) -> None:
        with pytest.raises(ParameterError, match=f"this notebook has {', '.join(GOOD)}"):
            check("# Parameters\nEPOCH = 3")

    def test_a_misspelt_name_in_the_notebooks_own_cell(self) -> None:
        namespace = {**GOOD, "In": ["", OWN + "\nLEARNING: int = 3", RUNNING]}
        with pytest.raises(ParameterError, match="'LEARNING'"):
            notebook.parameters(namespace)

    def test_another_notebooks_name_is_only_noted(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert vars(check("# Parameters\nGD_STEPS = 3\nBATCH_SIZE = 5\n")) == GOOD
        assert capsys.readouterr().out == "not used by this notebook: BATCH_SIZE, GD_STEPS\n"

    def test_only_the_newest_run_of_the_cell_counts(self) -> None:
        history = ["", OWN, "# Parameters\nOLD = 1", RUNNING, OWN, RUNNING]
        assert vars(notebook.parameters({**GOOD, "In": history})) == GOOD

    def test_values_that_are_read_are_not_parameters(self) -> None:
        assert vars(check("# Parameters\nEPOCHS = len(ANYTHING)\n")) == GOOD

    @pytest.mark.parametrize("name", GOOD)
    def test_a_missing_name(self, name: str) -> None:
        namespace = {key: value for key, value in GOOD.items() if key != name}
        with pytest.raises(ParameterError, match=f"parameter {name} is not set: run the cell"):
            notebook.parameters({**namespace, "In": ["", OWN, RUNNING]})

    def test_no_parameters_at_all(self) -> None:
        with pytest.raises(ParameterError, match="is not set: run the cell that begins with '# Parameters' first"):
            notebook.parameters({"In": ["", RUNNING]})


class TestValues:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *(("DRIVE", value) for value in ("true", "True", "", 1, 0, None)),
            *(("EPOCHS", value) for value in ("3", 3.0, True, 0, 10**5 + 1, math.nan, None, [3])),
            *(("ALPHAS", [value]) for value in ("8/255", "0.5", True, False, math.nan, math.inf, -0.1, 1001, None)),
            *(("DATASET", value) for value in ("emnist", "Digits", "", None, ["digits"], 1)),
            *(
                ("FRL_SEEDS", value)
                for value in ([], [0, 0], [0, "1"], [0, True], [-1], [0.0], "[0, 1]", 0, (0, 1), None)
            ),
            *(("RECIPES", value) for value in ("trades", ["trades", "trades"], ["fgsm"], [["trades"]])),
            *(("RECIPES", value) for value in (["natural"], ["trades", "natural"], ["natural", "trades", "natural"])),
            *(("DEVICE", value) for value in ("gpu", "", None, ["cpu"])),
            *(("RUNS", value) for value in (None, 3, Path("runs"))),
            ("REPORT_SEEDS", [2, 3]),
        ],
    )
    def test_refused_in_one_sentence_with_name_and_value(self, name: str, value: Any) -> None:
        with pytest.raises(ParameterError) as caught:
            check(**{name: value})
        message = str(caught.value)
        word = "unknown" if name == "DATASET" else "not allowed"
        assert message.startswith(f"parameter {name} = {value!r} is {word}: use ")
        assert len(message.splitlines()) == 1

    @pytest.mark.parametrize(
        ("name", "value", "said"),
        [
            ("EPOCHS", 0, "a whole number from 1 to 100,000"),
            ("EPOCHS", "8", "a whole number from 1 to 100,000, without quotes"),
            (
                "ALPHAS",
                "1",
                'a list whose items are each a number from 0 to 1,000 (with papermill: -y "ALPHAS: [a, b]")',
            ),
            ("DRIVE", "true", "True or False (with papermill: -p DRIVE True, capital T)"),
            ("DATASET", "emnist", f"one of {', '.join(data.READERS)}, or folder:PATH"),
            ("FRL_SEEDS", [0, 10**10], "a list whose items are each a whole number from 0 to 2,147,483,648"),
            ("FRL_SEEDS", [], "a non-empty list without repeats"),
            ("RECIPES", ["trades", "pgd_at"], "a list that begins with 'natural', the reference, and has another"),
            ("DEVICE", "gpu", "one of auto, cpu, cuda"),
            ("RUNS", 3, "text in quotes"),
            ("REPORT_SEEDS", [7], "seeds among FRL_SEEDS = [0, 2]"),
        ],
    )
    def test_says_what_is_allowed(self, name: str, value: Any, said: str) -> None:
        with pytest.raises(ParameterError) as caught:
            check(**{name: value})
        word = "unknown" if name == "DATASET" else "not allowed"
        assert str(caught.value) == f"parameter {name} = {value!r} is {word}: use {said}"

    def test_a_number_too_large_for_a_float(self) -> None:
        for name, value in (("EPOCHS", 10**400), ("ALPHAS", [10**400])):
            with pytest.raises(ParameterError, match=f"parameter {name}"):
                check(**{name: value})


NOTEBOOKS = sorted((PROJECT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def own_parameters(path: Path) -> dict[str, tuple[str, Any]]:
    """Name -> annotation and default of a notebook's '# Parameters' cell."""
    content = json.loads(path.read_text(encoding="utf-8"))
    (cell,) = (cell for cell in content["cells"] if "parameters" in cell["metadata"].get("tags", []))
    first, *lines = "".join(cell["source"]).splitlines()
    assert first == "# Parameters"
    found = {}
    for line in lines:
        (node,) = ast.parse(line).body
        assert isinstance(node, ast.AnnAssign), line
        found[node.target.id] = (ast.unparse(node.annotation), ast.literal_eval(node.value))
    return found


def spelt(kind: Any) -> str:
    """A declared kind as a notebook's cell writes it: without limits."""
    if get_origin(kind) is Annotated:
        return spelt(get_args(kind)[0])
    if get_origin(kind) is list:
        return f"list[{spelt(*get_args(kind))}]"
    return "str" if get_origin(kind) is Literal else kind.__name__


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebooks:
    def test_defaults_are_allowed_and_annotated_as_declared(self, path: Path) -> None:
        own = own_parameters(path)
        notebook.parameters({name: value for name, (_, value) in own.items()})
        assert {name: annotation for name, (annotation, _) in own.items()} == {n: spelt(PARAMETERS[n]) for n in own}

    def test_papermill_shows_a_type_and_a_line_for_each(self, path: Path) -> None:
        from papermill.inspection import _infer_parameters
        from papermill.iorw import load_notebook_node

        shown = _infer_parameters(load_notebook_node(str(path)))
        assert {each.name: each.inferred_type_name for each in shown} == {
            name: annotation for name, (annotation, _) in own_parameters(path).items()
        }
        assert [each.name for each in shown if not each.help] == []
        for each in shown:
            assert ast.literal_eval(each.default) == own_parameters(path)[each.name][1]


def test_every_parameter_is_some_notebooks() -> None:
    assert {name for path in NOTEBOOKS for name in own_parameters(path)} == set(PARAMETERS)


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

    def test_no_path(self) -> None:
        with pytest.raises(ParameterError, match="is no folder"):
            notebook.folder("a\0b", "checkpoints")

    def test_drive_needs_colab(self) -> None:
        with pytest.raises(KitError, match="needs Google Colab"):
            notebook.folder("", "checkpoints", drive=True)

    def test_drive_with_a_folder_is_refused(self) -> None:
        with pytest.raises(
            ParameterError, match="DRIVE = True with the folder 'runs' is not allowed: leave RUNS empty"
        ):
            notebook.folder("runs", "checkpoints", drive=True)

    @pytest.mark.parametrize("error", [ValueError("mount failed"), RuntimeError("credentials\ntrace"), Exception()])
    def test_drive_that_is_denied(self, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
        def mount(place: str) -> None:
            raise error

        colab = types.ModuleType("google.colab")
        colab.drive = types.SimpleNamespace(mount=mount)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
        monkeypatch.setitem(sys.modules, "google.colab", colab)
        with pytest.raises(KitError, match=r"Google Drive was not mounted \(.+\): run again and allow it") as caught:
            notebook.folder("", "checkpoints", drive=True)
        assert len(str(caught.value).splitlines()) == 1


def test_versions_are_one_line() -> None:
    line = notebook.versions("torch", "numpy")
    assert len(line.splitlines()) == 1
    assert "torch 2" in line
    assert "numpy " in line

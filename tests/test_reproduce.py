"""The one command: what it plans and says, what it publishes, that it skips what is done, what a kill leaves behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import papermill
import pytest
import yaml

import frlkit
from frlkit import KitError, data, reproduce
from frlkit.report import pages

CLAIMS = "application/vnd.frlkit.claims+json"
#: What every small notebook does: a figure, a table of one claim, which tells the parameters, and perhaps a long wait.
CODE = f"""
import pathlib, time
pathlib.Path(FIGURES).mkdir(parents=True, exist_ok=True)
pathlib.Path(FIGURES, f"01_{{SEED}}.png").write_bytes(b"picture")
row = {{"claim": f"{{DATASET}}, seed {{SEED}}", "evidence": "none", "verdict": "confirmed"}}
display({{"text/plain": "", "{CLAIMS}": {{"title": "Small", "claims": [row]}}}}, raw=True)
pathlib.Path(FIGURES).with_name("started").touch()
time.sleep(WAIT)
"""


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Everything under tmp_path, with the smoke profile in place of both studies."""
    monkeypatch.setattr(reproduce, "PROJECT", tmp_path)
    monkeypatch.setattr(reproduce, "PROFILES", {"fashion_mnist": "full", "digits": "smoke"})
    monkeypatch.setenv("FRLKIT_DATA", str(tmp_path / "data"))
    (tmp_path / "checkpoints" / "fashion_mnist").mkdir(parents=True)  # shipped runs
    return tmp_path


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with two small notebooks: 01 on a data set, 02 on none; the profile "smoke" waits in 01."""
    folder = tmp_path / "notebooks"
    (folder / "profiles").mkdir(parents=True)
    for stem, first in (("01_small", 'DATASET = "digits"'), ("02_theory", "")):
        parameters = nbformat.v4.new_code_cell(f'{first}\nSEED = 0\nWAIT = 0\nFIGURES = ""')
        parameters.metadata["tags"] = ["parameters"]
        body = CODE if first else CODE.replace("{DATASET}", "theory")
        heading = nbformat.v4.new_markdown_cell(f"# {stem[:2]} · Small & <simple>")
        cells = [heading, parameters, nbformat.v4.new_code_cell(body)]
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / f"{stem}.ipynb")
    for name, values in {"digits": {}, "smoke": {"SEED": 1, "WAIT": 600}}.items():
        text = yaml.safe_dump({"DATASET": "digits", **values})
        (folder / "profiles" / f"{name}.yaml").write_text(text, encoding="utf-8")
    monkeypatch.setattr(reproduce, "PROJECT", tmp_path)
    monkeypatch.setattr(reproduce, "NOTEBOOKS", folder)
    monkeypatch.setattr(
        data, "load", lambda name: SimpleNamespace(fingerprint="images")
    )  # the small notebooks look at no image
    monkeypatch.setenv("FRLKIT_DATA", str(tmp_path / "data"))
    return tmp_path


def executed_without_a_kernel(job: reproduce.Job, staged: Path, place: Path, progress: Any) -> list[dict[str, Any]]:
    """In place of `reproduce._execute`: the files of a notebook that says what its parameters are."""
    shutil.rmtree(staged, ignore_errors=True)
    (staged / "figures").mkdir(parents=True)
    words = json.dumps(job.parameters)
    for file in (f"{job.name}.ipynb", f"{job.name}.html", "figures/01.png"):
        (staged / file).write_text(words, encoding="utf-8")
    claim = {"claim": words, "evidence": "", "verdict": "confirmed"}
    output = {"data": {CLAIMS: {"title": "Small", "claims": [claim]}}}
    return [{"source": ["# Small"], "outputs": [output]}]


def missing(name: str, **_: object) -> None:
    if name == "fashion_mnist":
        raise data.DataUnavailableError("Fashion-MNIST is not there")


def test_plan_without_data_adds_a_live_run_on_digits(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data, "load", missing)
    jobs = list(reproduce.plan("fashion_mnist", elsewhere, retrain=False))
    names = {job.name: (job.live, job.parameters.get("DATASET")) for job in jobs}
    assert names["01_preliminary_disparity"] == (False, "fashion_mnist")
    assert names["01_preliminary_disparity_digits"] == (True, "digits")
    assert sum(name.startswith("02_") for name in names) == 1  # needs no data, runs once
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert "shipped records" in said[0]


def test_retrain_needs_data_and_touches_no_shipped_run(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = elsewhere / "output"
    jobs = list(reproduce.plan("digits", output, retrain=True))
    assert all(
        (elsewhere / job.parameters[name]).is_relative_to(output)
        for job in jobs
        for name in job.parameters
        if name in ("RUNS", "FIGURES")
    )
    monkeypatch.setattr(data, "load", missing)
    with pytest.raises(data.DataUnavailableError):
        list(reproduce.plan("fashion_mnist", output, retrain=True))


def test_figures_of_every_job_go_to_its_own_folder_in_the_output(elsewhere: Path) -> None:
    for output in (elsewhere / "output", elsewhere.parent / "another place"):
        jobs = list(reproduce.plan("digits", output, retrain=False))
        folders = [elsewhere / job.parameters["FIGURES"] for job in jobs]  # notebooks run in the project's folder
        assert folders == [output / job.name / "figures" for job in jobs]
        assert len(set(folders)) == len(jobs) == len(list((frlkit.PROJECT / "notebooks").glob("0*.ipynb")))


def test_a_profile_sets_the_data_set_and_an_unknown_one_is_refused(elsewhere: Path) -> None:
    jobs = list(reproduce.plan("fashion_mnist", elsewhere, retrain=True, profile="smoke"))
    assert {job.parameters.get("DATASET", "digits") for job in jobs} == {"digits"}
    assert {job.parameters.get("FRL_EPOCHS", 1) for job in jobs} == {1}
    with pytest.raises(KitError, match=r"profile = 'tiny' is unknown: use one of cifar10, digits, full, "):
        list(reproduce.plan("digits", elsewhere, retrain=False, profile="tiny"))


def test_what_differs_has_different_names(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(data, "load", lambda name: SimpleNamespace(fingerprint="images"))
    made: dict[str, Any] = {}
    studies = [(name, "") for name in (*data.READERS, "folder:mine")]
    studies += [("", path.stem) for path in (frlkit.PROJECT / "notebooks" / "profiles").glob("*.yaml")]
    for dataset, profile in studies:
        jobs = list(reproduce.plan(dataset, elsewhere, retrain=False, profile=profile))
        assert len({job.parameters.get("DATASET", dataset) for job in jobs} - {""}) == 1
        for job in jobs:
            assert made.setdefault(job.name, job) == job
    assert len(made) > 20


def test_notebooks_without_runs_on_a_data_set_are_left_out_and_named(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On 43 signs nothing was retrained; certificates are Fashion-MNIST's; the digits that stand in have them all."""
    monkeypatch.setattr(data, "load", lambda name: SimpleNamespace(fingerprint="images"))
    for dataset, left in {"gtsrb": "03, 04, 05, 07", "gtsrb17": "07", "cifar10": "07", "digits": ""}.items():
        asked = {job.name[:2] for job in reproduce.plan(dataset, elsewhere, retrain=False)}
        assert {f"0{number}" for number in range(1, 8)} - asked == {part for part in left.split(", ") if part}
        assert capsys.readouterr().out == (
            f"notebooks left out, which have no runs on {dataset}: {left}\n" * bool(left)
        )

    def nothing_but_digits(name: str) -> SimpleNamespace:
        if name != "digits":
            raise data.DataUnavailableError("GTSRB is not there")
        return SimpleNamespace(fingerprint="images")

    monkeypatch.setattr(data, "load", nothing_but_digits)
    (elsewhere / "checkpoints" / "gtsrb").mkdir()
    names = {job.name for job in reproduce.plan("gtsrb", elsewhere, retrain=False)}
    assert "03_frl_reweight_digits" in names
    assert "03_frl_reweight_gtsrb" not in names


def test_without_data_and_without_shipped_runs_there_is_nothing_to_draw(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "load", missing)
    (elsewhere / "checkpoints" / "fashion_mnist").rmdir()
    with pytest.raises(data.DataUnavailableError):
        list(reproduce.plan("fashion_mnist", elsewhere, retrain=False))


def test_unknown_data_set_is_refused(elsewhere: Path) -> None:
    with pytest.raises(KitError, match="dataset = 'cifar'"):
        list(reproduce.plan("cifar", elsewhere, retrain=False))


def test_runs_once_then_skips_and_reruns_what_changed(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    output, folder = elsewhere / "output", elsewhere / "notebooks"
    folder.mkdir()
    for source in (*reproduce.NOTEBOOKS.glob("0[125]_*.ipynb"), reproduce.NOTEBOOKS / "profiles"):
        (folder / source.name).symlink_to(source)  # the others run alone, in test_notebooks.py
    monkeypatch.setattr(reproduce, "NOTEBOOKS", folder)
    execute = papermill.execute_notebook

    def execute_what_differs(source: Path, target: Path, *values: Any, **options: Any) -> None:
        if source.name.startswith("02_"):  # needs no data and no runs: as it is shipped, which nbval has seen to
            shutil.copyfile(source, target)
        else:
            execute(source, target, *values, **options)

    monkeypatch.setattr(papermill, "execute_notebook", execute_what_differs)
    text = reproduce.reproduce("digits", output)
    said = capfd.readouterr()
    assert said.err == ""  # no warning that nobody can do anything about
    every = len(list(reproduce.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb")))
    assert said.out.startswith(f"{every} of {every} notebooks to run, into {output}:\n")
    assert "Report 1: " in text
    assert "digits" in text
    html = (output / "index.html").read_text(encoding="utf-8")
    links = [link for link in re.findall(r'(?:href|src)="([^"]+)"', html) if not link.startswith("#")]
    assert len([link for link in links if link.endswith(".png")]) > 2
    assert all((output / link).exists() for link in links)
    for stem in ("01_preliminary_disparity_digits", "02_gaussian_theory"):
        content = (output / stem / f"{stem}.html").read_text(encoding="utf-8")
        assert "claim" in content
        assert not re.search(r'(src|rel="stylesheet" href)="https?:', content)
    assert '<math display="block"' in content
    assert "unfinished" not in "".join(path.read_text(encoding="utf-8") for path in output.glob("*/*.ipynb"))
    # no figure outside the output
    assert {path.name for path in elsewhere.iterdir()} - {"notebooks"} == {"output", "checkpoints"}

    executed: list[Path] = []

    def stopped(job: reproduce.Job, *_: Any) -> None:
        executed.append(job.source)
        raise KitError("stopped")

    monkeypatch.setattr(reproduce, "_execute", stopped)
    assert reproduce.reproduce("digits", output) == text
    assert executed == []
    for run, rerun in (("dafa", "05"), ("natural", "01")):  # a run changed: what was drawn from it is made again
        next(elsewhere.rglob(f"{run}*/seed0/record.json")).write_text("{}", encoding="utf-8")
        with pytest.raises(KitError, match="stopped"):
            reproduce.reproduce("digits", output)
        assert executed.pop().name.startswith(rerun)


def test_a_kill_in_another_profile_leaves_what_was_finished(small: Path) -> None:
    """A study is finished, the same notebooks under another profile are killed in the first, the study runs again."""
    output = small / "output"
    text = reproduce.reproduce("digits", output)
    assert "digits, seed 0" in text
    index = (output / "index.html").read_bytes()
    words = f"""
from pathlib import Path
from frlkit import reproduce
reproduce.PROJECT = Path({str(small)!r})
reproduce.NOTEBOOKS = reproduce.PROJECT / "notebooks"
reproduce.reproduce("digits", Path({str(output)!r}), profile="smoke")
"""
    environment = {**os.environ, "PYTHONPATH": str(frlkit.PROJECT)}
    process = subprocess.Popen([sys.executable, "-c", words], env=environment, stdout=subprocess.DEVNULL)
    try:
        started = output / "unfinished" / "01_small_digits_smoke" / "started"
        deadline = time.monotonic() + 600
        while not started.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()  # its kernel notices and ends, too
        process.wait()
    assert (output / "index.html").read_bytes() == index
    assert not (output / "01_small_digits_smoke").exists()
    assert reproduce.reproduce("digits", output) == text
    html = (output / "index.html").read_text(encoding="utf-8")
    assert "digits, seed 0" in html
    assert "seed 1" not in html
    assert "Small &amp; &lt;simple&gt;" in html


class KilledError(BaseException):
    """A kill at a chosen moment."""


def test_a_kill_at_any_moment_of_publication_leaves_whole_notebooks(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, profiles = small / "output", small / "notebooks" / "profiles"
    monkeypatch.setattr(reproduce, "_execute", executed_without_a_kernel)
    monkeypatch.setattr(reproduce, "_made_by", lambda job: str(job.parameters))  # quicker than a hash of the kit
    monkeypatch.setattr(pages, "commit", lambda: "abc")
    events = {"left": 10**6}

    def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            events["left"] -= 1
            if events["left"] < 0:
                raise KilledError
            return operation(*given, **named)

        return call

    for owner, name in ((os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "open"), (os, "mkdir"), (Path, "unlink")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    reproduce.reproduce("digits", output)
    kills = 0
    for moment in range(200):
        (profiles / "digits.yaml").write_text(f"DATASET: digits\nSEED: {moment}\n", encoding="utf-8")
        events["left"] = moment
        try:
            reproduce.reproduce("digits", output)
            finished = True
        except KilledError:
            finished = False
            kills += 1
        events["left"] = 10**6
        for note in output.glob("0*/done.json"):  # what counts as finished is whole and of one set of parameters
            folder = note.parent
            files = [folder / f"{folder.name}.ipynb", folder / f"{folder.name}.html", folder / "figures" / "01.png"]
            claim = json.loads(note.read_text(encoding="utf-8"))["tables"][0]["claims"][0]["claim"]
            assert {file.read_text(encoding="utf-8") for file in files} == {claim}
        text = reproduce.reproduce("digits", output)
        assert f'"SEED": {moment}' in text
        assert f"&#34;SEED&#34;: {moment}" in (output / "index.html").read_text(encoding="utf-8")
        if finished:
            break
    assert finished
    assert kills > 15


def test_says_what_it_will_do(small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = small / "output"
    monkeypatch.setattr(reproduce, "_execute", executed_without_a_kernel)
    reproduce.reproduce("digits", output)
    first = capsys.readouterr().out.splitlines()
    assert first[0] == f"2 of 2 notebooks to run, into {output}:"
    assert first[1] == "  01_small_digits: not timed yet, 0 runs are finished, what is missing is trained"
    assert first[2] == "  02_theory: not timed yet, needs no data"
    assert re.fullmatch(r"in all: not timed yet; \d+ MB of disk, [\d,.]+ GB are free", first[3])
    reproduce.reproduce("digits", output)
    assert capsys.readouterr().out == ""  # nothing to do, nothing to say
    (output / "02_theory" / "02_theory.html").unlink()
    shipped = small / "checkpoints" / "digits" / "natural" / "seed0"
    shipped.mkdir(parents=True)
    (shipped / "record.json").write_text("{}", encoding="utf-8")
    (shipped / "history.json").write_text(
        '{"threads": 2, "epochs": [{"seconds": 3600}, {"seconds": 300}]}', encoding="utf-8"
    )
    reproduce.reproduce("digits", output)
    again = capsys.readouterr().out.splitlines()
    assert again[0] == f"1 of 2 notebooks to run, into {output}:"
    assert again[1] == "  01_small_digits: up to date"
    assert again[2] == "  02_theory: about 0 s, needs no data"


def test_says_what_training_took_where_the_shipped_runs_are_left_aside(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reproduce, "_execute", executed_without_a_kernel)
    monkeypatch.setattr(reproduce.Job, "to_train", lambda job: list(small.glob("checkpoints/*/*/*")))
    shipped = small / "checkpoints" / "digits" / "natural" / "seed0"
    shipped.mkdir(parents=True)
    (shipped / "history.json").write_text(
        '{"threads": 2, "epochs": [{"seconds": 3600}, {"seconds": 300}]}', encoding="utf-8"
    )
    reproduce.reproduce("digits", small / "output", retrain=True)
    assert "1 runs to train: the shipped ones' epochs took 2 h 10 min of one core" in capsys.readouterr().out


def test_runs_to_train_are_the_shipped_ones_that_the_job_does_not_find(small: Path) -> None:
    for run in ("natural/seed0", "natural/seed1", "trades/seed0"):
        (small / "checkpoints" / "digits" / run).mkdir(parents=True)
        (small / "checkpoints" / "digits" / run / "record.json").touch()
    (small / "own" / "digits" / "natural" / "seed1").mkdir(parents=True)
    (small / "own" / "digits" / "natural" / "seed1" / "record.json").touch()
    values = {"DATASET": "digits", "RUNS": "own"}
    found = reproduce.Job(small, "01", values, live=True).to_train()
    assert sorted(str(run.relative_to(small / "checkpoints" / "digits")) for run in found) == [
        str(Path("natural", "seed0")),
        str(Path("trades", "seed0")),
    ]
    assert reproduce.Job(small, "01", {"DATASET": "digits"}, live=True).to_train() == []
    assert reproduce.Job(small, "01", values, live=False).to_train() == []
    assert reproduce.Job(small, "02", {}, live=True).to_train() == []


def test_a_damaged_note_of_what_is_done_only_costs_time(tmp_path: Path) -> None:
    for content in ('{"01": {"made_by": "x"', "[]", "\0"):
        (tmp_path / "done.json").write_text(content, encoding="utf-8")
        assert reproduce._read(tmp_path / "done.json") == {}
    (tmp_path / "done.json").write_bytes(b"\xff")
    assert reproduce._read(tmp_path / "done.json") == {}
    (tmp_path / "done.json").write_text('{"01": {}}', encoding="utf-8")
    assert reproduce._read(tmp_path / "done.json") == {"01": {}}
    assert reproduce._read(tmp_path / "none.json") == {}


def test_a_failing_notebook_is_one_sentence_and_leaves_the_one_before(small: Path) -> None:
    output, source = small / "output", small / "notebooks" / "01_small.ipynb"
    reproduce.reproduce("digits", output)
    before = {path: path.read_bytes() for path in (output / "01_small_digits").rglob("*") if path.is_file()}
    content = nbformat.read(source, as_version=4)
    for line, words in (("raise ValueError('the reason')", "ValueError: the reason"), ("os._exit(1)", "process died")):
        content.cells[-1].source = f"import os\n{line}"
        nbformat.write(content, source)
        with pytest.raises(KitError, match=f"01_small_digits.*{words}"):
            reproduce.reproduce("digits", output)
        assert all(path.read_bytes() == old for path, old in before.items())


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "0 s"), (89, "89 s"), (90, "2 min"), (3599, "1 h 0 min"), (111_900, "31 h 5 min")]
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert frlkit.took(seconds) == words


def test_formulas_become_mathml_and_dollars_in_outputs_stay(tmp_path: Path) -> None:
    table = nbformat.v4.new_output("display_data", {"text/html": "<td>US$ and $x_1$</td>", "text/plain": "$x_1$"})
    cells = [
        nbformat.v4.new_markdown_cell(r"Let $\eta<\gamma$, *not* `$code$`, $x_a_b$, and $$\frac{a}{b}$$"),
        nbformat.v4.new_code_cell("1", outputs=[table]),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    html = pages.notebook(tmp_path / "a.ipynb")
    assert "<mi>η</mi><mo>&lt;</mo><mi>γ</mi>" in html
    assert re.search(r'<math display="block"[^>]*><mrow><mfrac><mrow><mi>a</mi>', html)
    assert "<em>not</em>" in html
    assert "<code>$code$</code>" in html
    assert "$x_a_b$" in html  # two subscripts: no formula, so it stays as it is
    assert "<td>US$ and $x_1$</td>" in html
    assert not re.search(r"mathjax|require\.js|mermaid", html, re.IGNORECASE)


def test_a_formula_is_translated_whole_or_not_at_all() -> None:
    rows = pages.mathml(r"\begin{aligned}a&=b\\c&=d\end{aligned}", "block")
    assert rows.count("<mtr>") == 2
    assert rows.count("<mtd ") == 4
    assert "<mi>&#x00026;</mi>" in pages.mathml(r"a\&b", "inline")
    for formula in (r"\begin{gathered}a&b\end{gathered}", r"\unknown{x}", "x_a_b", r"\left( x"):
        assert pages.mathml(formula, "inline") == ""


@pytest.mark.parametrize("path", sorted((frlkit.PROJECT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_every_formula_of_the_notebooks_is_translated(path: Path) -> None:
    html = pages.notebook(path)
    prose = re.sub(r"<(script|style|pre|code|math)\b.*?</\1>", "", html, flags=re.DOTALL)
    assert re.findall(r"\$[^$]+\$", prose) == []
    markdown = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]
    assert html.count("<math ") == len(re.findall(r"\$\$.+?\$\$|\$.+?\$", "\n\n".join(markdown), re.DOTALL))

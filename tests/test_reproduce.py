"""The one command: what it plans, what it writes, that it skips what is done."""

from __future__ import annotations

import re
from pathlib import Path

import papermill
import pytest

from frlkit import KitError, data, reproduce


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Everything under tmp_path, with the smoke profile in place of both studies."""
    monkeypatch.setattr(reproduce, "PROJECT", tmp_path)
    monkeypatch.setattr(reproduce, "PROFILES", {"fashion_mnist": "full", "digits": "smoke"})
    monkeypatch.setenv("FRLKIT_DATA", str(tmp_path / "data"))
    (tmp_path / "checkpoints" / "fashion_mnist").mkdir(parents=True)  # shipped runs
    return tmp_path


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
    jobs = list(reproduce.plan("digits", elsewhere, retrain=True))
    assert all(
        Path(job.parameters[name]).is_relative_to(elsewhere)
        for job in jobs
        for name in job.parameters
        if name in ("RUNS", "FIGURES")
    )
    monkeypatch.setattr(data, "load", missing)
    with pytest.raises(data.DataUnavailableError):
        list(reproduce.plan("fashion_mnist", elsewhere, retrain=True))


def test_a_profile_sets_the_data_set_and_an_unknown_one_is_refused(elsewhere: Path) -> None:
    jobs = list(reproduce.plan("fashion_mnist", elsewhere, retrain=True, profile="smoke"))
    assert {job.parameters.get("DATASET", "digits") for job in jobs} == {"digits"}
    assert {job.parameters.get("FRL_EPOCHS", 1) for job in jobs} == {1}
    with pytest.raises(KitError, match=r"profile = 'tiny' is unknown: use one of cifar10_slice, digits, full, "):
        list(reproduce.plan("digits", elsewhere, retrain=False, profile="tiny"))


def test_every_data_set_has_a_profile(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(data, "load", lambda name: None)
    for name in (*data.READERS, "folder:mine"):
        jobs = list(reproduce.plan(name, elsewhere, retrain=False))
        assert {job.parameters.get("DATASET", name) for job in jobs} == {name}


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


def test_runs_once_then_skips_and_reruns_what_changed(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = elsewhere / "output"
    text = reproduce.reproduce("digits", output)
    assert "Report 1a" in text
    assert "digits" in text
    page = (output / "index.html").read_text()
    links = re.findall(r'(?:href|src)="([^"]+)"', page)
    assert len([link for link in links if link.endswith(".png")]) > 2
    assert all((output / link).exists() for link in links)
    for stem in ("01_preliminary_disparity_digits", "02_gaussian_theory"):
        assert "claim" in (output / f"{stem}.html").read_text()

    executed = []
    monkeypatch.setattr(papermill, "execute_notebook", lambda source, *_, **__: executed.append(source))
    assert reproduce.reproduce("digits", output) == text
    assert executed == []
    for run, rerun in (("dafa", "05"), ("natural", "01")):  # a run changed: what was drawn from it is made again
        next(elsewhere.rglob(f"{run}/seed0/record.json")).write_text("{}")
        executed.clear()
        reproduce.reproduce("digits", output)
        assert Path(executed[0]).name.startswith(rerun)


def test_a_damaged_note_of_what_is_done_only_costs_time(tmp_path: Path) -> None:
    for content in ('{"01": {"made_by": "x"', "[]", "\0"):
        (tmp_path / "done.json").write_text(content)
        assert reproduce._noted(tmp_path / "done.json") == {}
    (tmp_path / "done.json").write_text('{"01": {}}')
    assert reproduce._noted(tmp_path / "done.json") == {"01": {}}
    assert reproduce._noted(tmp_path / "none.json") == {}


def test_a_failing_notebook_is_one_sentence(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise papermill.PapermillExecutionError(1, 1, "source", "KitError", "the reason", [])

    monkeypatch.setattr(papermill, "execute_notebook", fail)
    with pytest.raises(KitError, match="01_preliminary_disparity_digits failed with KitError: the reason"):
        reproduce.reproduce("digits", elsewhere / "output")

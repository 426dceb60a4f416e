"""A sweep: what a file expands to, what is refused, and that kills and clusters change nothing about the results."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from click.testing import CliRunner, Result
from joblib.externals.loky.process_executor import TerminatedWorkerError

from frlkit import PROJECT, KitError, checkpoint, data, disk, recipes, records, runs, training
from frlkit.__main__ import main
from frlkit.data import Dataset
from frlkit.report import studies
from frlkit.report.names import METHODS, TRIALS
from frlkit.scale import clusters, sweeps
from frlkit.scale.sweeps import Run

#: Five short runs on the digits: three alone, one that another one starts from, and that one.
SHORT = """
dataset: digits
grid:
  - recipe: natural
    seed: [0, 1, 2]
    values: {epochs: 8, batch_size: 100}
  - recipe: uniform
    steps: 2
    values: {epochs: 2, start_epochs: 2, batch_size: 100}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def call(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [*map(str, words)])


def names(planned: Sequence[Run]) -> list[str]:
    return [run.name for run in planned]


#: Ten short lines whose list is written out a hundred million long.
BOMB = "{a: &a [x, x, x, x, x, x, x, x, x]" + "".join(
    f", {name}: &{name} [{', '.join(9 * [f'*{before}'])}]" for before, name in zip("abcdefg", "bcdefgh", strict=True)
)
BOMB += "}"


class TestPlan:
    def test_every_combination_under_the_notebooks_names(self, tmp_path: Path) -> None:
        text = "grid: [{recipe: report_reweight, alpha_nat: [1, 5.0], alpha_bdy: [0.5, 5], seed: [0, 2]}]"
        planned = sweeps.plan(written(tmp_path, text), tmp_path)
        pairs = [("1", "0.5"), ("1", "5"), ("5", "0.5"), ("5", "5")]
        names_of = [f"report_reweight,alpha_nat={a},alpha_bdy={b}" for a, b in pairs]
        expected = [f"fashion_mnist/{recipe}/seed{seed}" for seed in (0, 2) for recipe in names_of]
        starts = ["fashion_mnist/pgd_at_half/seed0", "fashion_mnist/pgd_at_half/seed2"]
        assert names(planned) == starts + expected
        run = planned[-1]
        assert run.config == recipes.configure(run.recipe, "fashion_mnist", 2)
        assert run.folder == runs.folder(tmp_path, run.recipe, run.config)

    def test_defaults_and_what_an_entry_sets_itself(self, tmp_path: Path) -> None:
        text = """
        dataset: digits
        seed: [3, 4]
        values: {epochs: 2}
        grid:
          - {recipe: [natural, trades], values: {epochs: 9, lr: 0.01}}
          - {recipe: pgd_at, seed: 0, dataset: [digits, fashion_mnist]}
        """
        planned = sweeps.plan(written(tmp_path, text), tmp_path)
        found = {run.name: (run.config.epochs, run.config.lr) for run in planned}
        own = {f"digits/{recipe}/seed{seed}": (9, 0.01) for recipe in ("natural", "trades") for seed in (3, 4)}
        assert found == {**own, "digits/pgd_at/seed0": (2, 1e-3), "fashion_mnist/pgd_at/seed0": (2, 1e-3)}

    def test_the_papers_symbols(self, tmp_path: Path) -> None:
        text = "grid: [{recipe: algorithm1_both, alpha1: 1, alpha2: 2, tau: 0.1, eps: 4}]"
        run = sweeps.plan(written(tmp_path, text), tmp_path)[-1]
        assert run.recipe == "algorithm1_both,alpha_nat=1,alpha_bdy=2,tau_nat=0.1,tau_bdy=0.1,eps_255=4"

    def test_numbers_keep_their_digits(self, tmp_path: Path) -> None:
        run = sweeps.plan(written(tmp_path, "grid: [{recipe: natural, lr: 0.00123456789}]"), tmp_path)[0]
        assert run.config.lr == 0.00123456789

    def test_a_starting_run_comes_once_and_first(self, tmp_path: Path) -> None:
        text = "grid: [{recipe: [uniform, dafa], values: {start_epochs: 3}}, {recipe: pgd_at, values: {epochs: 3}}]"
        planned = sweeps.plan(written(tmp_path, text), tmp_path)
        assert [run.recipe for run in planned] == ["pgd_at", "uniform", "dafa"]
        assert planned[1].start == planned[0]

    def test_a_start_may_have_a_start(self, tmp_path: Path) -> None:
        planned = sweeps.plan(written(tmp_path, "grid: [{recipe: [intercept_uniform, pgd_at]}]"), tmp_path)
        assert [(run.recipe, run.depth) for run in planned] == [("pgd_at", 0), ("uniform", 1), ("intercept_uniform", 2)]
        assert planned[2].start == planned[1]
        assert planned[1].start == planned[0]

    def test_random_weights_are_no_run(self, tmp_path: Path) -> None:
        planned = sweeps.plan(written(tmp_path, "grid: [{recipe: random_start_both}]"), tmp_path)
        assert [(run.recipe, run.start, run.depth) for run in planned] == [("random_start_both", None, 0)]

    def test_values_are_spelled_alike(self, tmp_path: Path) -> None:
        text = "grid: [{recipe: 'uniform,epochs=03', lr: 1.0e-2}, {recipe: uniform, epochs: [3, 3.0], lr: 0.01}]"
        planned = sweeps.plan(written(tmp_path, text), tmp_path)
        assert [run.recipe for run in planned] == ["pgd_at", "uniform,epochs=3,lr=0.01"]

    def test_fields_in_any_order_are_one_run(self, tmp_path: Path) -> None:
        text = "grid: [{recipe: natural, epochs: 3, lr: 0.01}, {recipe: natural, lr: 0.01, epochs: [3, 4]}]"
        found = ["fashion_mnist/natural,epochs=3,lr=0.01/seed0", "fashion_mnist/natural,lr=0.01,epochs=4/seed0"]
        assert names(sweeps.plan(written(tmp_path, text), tmp_path)) == found
        (tmp_path / "fashion_mnist" / "natural,epochs=4,lr=0.01" / "seed7").mkdir(parents=True)  # there already
        found[1] = "fashion_mnist/natural,epochs=4,lr=0.01/seed0"
        assert names(sweeps.plan(written(tmp_path, text), tmp_path)) == found

    def test_a_plan_that_takes_long_says_so(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        passed = iter(range(0, 100, 3))
        monkeypatch.setattr(sweeps.time, "monotonic", lambda: next(passed) / 2)
        sweeps.plan(written(tmp_path, "grid: [{recipe: natural, seed: [1, 2, 3]}]"), tmp_path)
        assert capsys.readouterr().out == "planning sweep.yaml ...\n"

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("grid: [", "cannot be read"),
            ("\x00", "cannot be read"),
            ("grid: [{recipe: natural, seed: !!int x}]", "cannot be read"),
            ("grid: [{recipe: natural, seed: !!timestamp x}]", "cannot be read"),
            ("grid: [{recipe: natural, seed: 2020-13-45}]", "cannot be read"),
            ("grid: [{recipe: natural, seed: " + 5000 * "9" + "}]", "cannot be read"),
            ("grid: [{recipe: natural, seed: 0x" + 5000 * "f" + "}]", "it has a value of more than 1,000 characters"),
            (f"grid: [{{recipe: {5000 * 'x'}}}]", "it has a value of more than 1,000 characters"),
            ("grid: " + 5000 * "[", "cannot be read"),
            (
                f"grid: [{{recipe: natural, values: {{epochs: {BOMB}}}}}]",
                "epochs = {'a': ['x', 'x', 'x', 'x', 'x', 'x'",
            ),
            (f"grid: [{BOMB}]", "is no entry of a grid"),
            ("grid: [{5: 6}]", "is no entry of a grid"),
            *(
                (f"grid: [{{recipe: natural, values: {{{key}: 3}}}}]", f"{key} is not allowed among values")
                for key in ("seed", "dataset", "recipe", "method")
            ),
            ("", "has no grid"),
            ("[1, 2]", "has no grid"),
            ("grid: []", "has no grid"),
            ("grid: {recipe: natural}", "has no grid"),
            ("{grid: [{recipe: natural}], sed: 1}", "'sed' is no key of a sweep beside its grid: use grid, dataset"),
            ("grid: [natural]", "'natural' is no entry of a grid"),
            ("grid: [{seed: 1}]", "is no entry of a grid"),
            ("grid: [{recipe: fgsm}]", "recipe = 'fgsm' is unknown: use n_fgsm"),
            ("grid: [{recipe: 3}]", "recipe = '3' is unknown"),
            ("grid: [{recipe: natural, colour: red}]", "'colour' is no field of a run of natural: use method"),
            ("grid: [{recipe: natural, 7: red}]", "'7' is no field of a run of natural"),
            ("grid: [{recipe: natural, alpha1: 2}]", "'alpha_nat' is no field of a run of natural"),
            ("grid: [{recipe: natural, values: {colour: red}}]", "'colour' is no field of a run of natural"),
            ("grid: [{recipe: natural, values: 3}]", "values = 3 is not allowed: use fields and values"),
            ("grid: [{recipe: natural, seed: []}]", "seed = [] is not allowed in a grid"),
            ("grid: [{recipe: natural, seed: one}]", "seed = 'one' is not allowed: use a whole number from 0 to"),
            ("grid: [{recipe: natural, seed: -1}]", "seed = -1 is not allowed"),
            ("grid: [{recipe: natural, dataset: minst}]", "dataset = 'minst' is unknown"),
            ("grid: [{recipe: natural, model: vgg}]", "model = 'vgg' is unknown"),
            (
                "grid: [{recipe: uniform, tau_nat: [0.1, many]}]",
                "tau_nat = 'many' is not allowed: use a number from 0 to 1",
            ),
            ("grid: [{recipe: uniform, tau_nat: [0.1, 2]}]", "tau_nat = '2' is not allowed: use a number from 0 to 1"),
            ("grid: [{recipe: uniform, eps_255: .nan}]", "eps_255 = 'nan' is not allowed"),
            ("grid: [{recipe: uniform, step: [[own]]}]", "step = \"['own']\" is unknown"),
            (
                "grid: [{recipe: pgd_at, values: {epochs: 3}}, {recipe: uniform}]",
                "asked for twice, with epochs = 3 and 15",
            ),
            ("grid: [{recipe: pgd_at}, {recipe: pgd_at, values: {lr: 0.1}}]", "twice, with lr = 0.001 and 0.1"),
        ],
    )
    def test_refused_in_one_sentence_before_anything_starts(self, tmp_path: Path, text: str, said: str) -> None:
        runs = tmp_path / "runs"
        result = call("sweep", written(tmp_path, text), "--runs", runs)
        assert result.exit_code == 1
        assert isinstance(result.exception, SystemExit), result.exception
        assert result.stdout == ""
        assert said in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert not runs.exists()

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--jobs", "0"], "--jobs"),
            (["--shares", "0"], "--shares"),
            (
                ["--backend", "dask", "--address", "here:1", "--shares", "2"],
                "--shares 2 is not allowed with",
            ),
            (["--device", "tpu"], "'tpu' is not one of 'auto', 'cpu', 'cuda'"),
            (["--backend", "slurm"], "--backend"),
            (["--backend", "dask"], "--backend dask needs its cluster's address: give --address HOST:PORT"),
            (["--address", "here:1"], "--backend local with --address 'here:1' is not allowed"),
            (["--backend", "ray", "--address", "here:1", "--jobs", "2"], "--jobs 2 is not allowed with --backend ray"),
        ],
    )
    def test_bad_options(self, tmp_path: Path, words: list[str], said: str) -> None:
        result = call("sweep", written(tmp_path, SHORT), "--runs", tmp_path / "runs", *words)
        assert result.exit_code != 0
        assert isinstance(result.exception, SystemExit), result.exception
        assert said in result.stderr
        assert not (tmp_path / "runs").exists()

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(KitError, match=r"none\.yaml cannot be read"):
            sweeps.plan(tmp_path / "none.yaml", tmp_path)

    def test_a_folder_that_holds_another_run(self, tmp_path: Path) -> None:
        path = written(tmp_path, "grid: [{recipe: natural, dataset: digits}]")
        (run,) = sweeps.plan(path, tmp_path)
        finish(run, config={"epochs": 3})
        with pytest.raises(KitError, match="epochs is 3 there and 15 here"):
            sweeps.plan(path, tmp_path)

    @pytest.mark.parametrize(("dataset", "count"), [("digits", 3), ("gtsrb", 4)])
    def test_a_record_that_lacks_an_attack_is_not_done(self, tmp_path: Path, dataset: str, count: int) -> None:
        (run,) = sweeps.plan(written(tmp_path, f"grid: [{{recipe: natural, dataset: {dataset}}}]"), tmp_path)
        assert not run.done
        finish(run)
        assert run.done
        path = run.folder / "record.json"
        record = json.loads(path.read_text(encoding="utf-8"))
        assert len(record["attacks"]) == count
        for missing in range(count):
            attacks = record["attacks"][:missing] + record["attacks"][missing + 1 :]
            path.write_text(json.dumps({**record, "attacks": attacks}), encoding="utf-8")
            assert not run.done

    @pytest.mark.parametrize(
        "left", ["run.lock", "checkpoint.pt", "checkpoint.previous.pt", "record.json.0123abcd.tmp"]
    )
    def test_what_a_kill_after_the_last_attack_leaves_is_tidied_up(
        self, serial: Path, tmp_path: Path, left: str
    ) -> None:
        shutil.copytree(serial, tmp_path / "runs")
        planned = sweeps.plan(written(tmp_path, SHORT), tmp_path / "runs")
        (planned[0].folder / left).touch()
        assert [run.done for run in planned] == [False, True, True, True, True]
        with clusters.local("cpu", jobs=1) as (engine, _):
            assert sweeps.sweep(planned, engine) == {}
        assert content(tmp_path / "runs") == content(serial)


def test_changed_images_of_a_folder_are_no_finished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan and a re-check say so, as training does."""
    monkeypatch.setenv("FRLKIT_DATA", str(tmp_path))
    grey = np.linspace(0, 255, 24 * 64).astype(np.uint8).reshape(24, 8, 8)
    arrays = {"x_train": grey[:16], "y_train": [0, 1] * 8, "x_test": grey[16:], "y_test": [0, 1] * 4}
    np.savez(tmp_path / "a.npz", **arrays)
    path = written(tmp_path, "grid: [{recipe: natural, dataset: 'folder:a.npz', values: {epochs: 1, model: cnn3}}]")
    (run,) = sweeps.plan(path, tmp_path / "runs")
    runs.run(run.config, data.load("folder:a.npz"), run.folder)
    (run,) = sweeps.plan(path, tmp_path / "runs")
    assert run.done
    np.savez(tmp_path / "a.npz", **{**arrays, "x_train": grey[:16] + 1})
    sweeps._loaded.cache_clear()
    with pytest.raises(KitError, match="was made with other images of folder:a.npz"):
        sweeps.plan(path, tmp_path / "runs")
    with pytest.raises(KitError, match="was made with other images of folder:a.npz"):
        list(studies.verify(tmp_path / "runs", data.load("folder:a.npz")))
    (tmp_path / "a.npz").unlink()  # as on a cluster's driver
    assert run.done


class TestShipped:
    @pytest.mark.parametrize("path", sorted((PROJECT / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
    def test_fits_the_shipped_runs(self, path: Path) -> None:
        assert sweeps.plan(path, PROJECT / "checkpoints")  # refuses a configuration other than a shipped run's

    def test_together_they_are_the_shipped_runs(self) -> None:
        """But for the preliminary study's own, which notebook 01 trains, and frlkit 0.1's of eight epochs."""
        paths = [path for path in (PROJECT / "sweeps").glob("*.yaml") if path.stem != "digits"]
        planned = {run.folder for path in paths for run in sweeps.plan(path, PROJECT / "checkpoints")}
        shipped = set(runs.finished(PROJECT / "checkpoints" / "fashion_mnist"))
        others = {place.parent.name for place in shipped - planned}
        assert {name for name in others if name not in recipes.BASE and "epochs=8" not in name.split(",")} == set()

    def test_the_digits_sweep_has_forty_runs(self) -> None:
        assert len(sweeps.plan(PROJECT / "sweeps" / "digits.yaml", PROJECT / "checkpoints")) >= 40

    def test_every_method_has_equally_many_trials_and_the_notebook_reads_them(self) -> None:
        planned = {run.recipe for run in sweeps.plan(PROJECT / "sweeps" / "tuning.yaml", PROJECT / "checkpoints")}
        trials = {trial for others in TRIALS.values() for trial in others}
        assert planned - {"pgd_at"} == trials
        assert {len(others) for others in TRIALS.values()} == {2}
        assert set(TRIALS) <= set(METHODS)
        for title, others in TRIALS.items():
            shipped = recipes.configure(METHODS[title], "fashion_mnist", 0)
            for trial, factor in zip(others, (1 / 3, 3), strict=True):
                config = recipes.configure(trial, "fashion_mnist", 0)
                for rate in ("alpha_nat", "alpha_bdy", "alpha_margin", "strength"):
                    before, after = getattr(shipped, rate), getattr(config, rate)
                    scaled = before and trial.split(",", 1)[1].find(rate) >= 0
                    assert after == (pytest.approx(before * factor, rel=0.12) if scaled else before), (trial, rate)


def finish(run: Run, *, seconds: float = 1.0, threads: int = 1, config: dict[str, Any] | None = None) -> None:
    """What a finished run leaves, as far as a plan looks at it."""
    from dataclasses import asdict

    made = {**recipes.described(run.config), **(config or {})}
    run.folder.mkdir(parents=True)
    (run.folder / runs.WEIGHTS).touch()
    errors: dict[str, Any] = {"robust": [0.2, 0.3], "boundary": [0.1, 0.1], "confusion": [[8, 2], [3, 7]]}
    attacks = [{"attack": asdict(attack), **errors} for attack in runs.attacks_on(run.config)]
    record = {"config": made, "dataset": run.config.dataset, "class_names": ["0", "1"], "attacks": attacks}
    record |= {"training_counts": [800, 1000], "images": 200, "class_counts": [10, 10], "natural": [0.1, 0.2]}
    (run.folder / "record.json").write_text(json.dumps(record), encoding="utf-8")
    epoch = {"lr": 0.1, "loss": 2.0, "seconds": seconds, "validation": {"natural": [0.1, 0.2], "robust": [0.2, 0.3]}}
    history = {"config": made, "threads": threads, "epochs": [epoch] * run.config.epochs}
    (run.folder / "history.json").write_text(json.dumps(history), encoding="utf-8")


class TestDryRun:
    TEXT = "{dataset: digits, grid: [{recipe: natural, seed: [0, 1, 2, 3], values: {epochs: 10}}, {recipe: trades}]}"

    def test_lists_and_estimates_and_starts_nothing(self, tmp_path: Path) -> None:
        path, runs = written(tmp_path, self.TEXT), tmp_path / "runs"
        for run in sweeps.plan(path, runs)[:2]:
            finish(run, seconds=60)
        before = sorted(runs.rglob("*"))
        result = call("sweep", path, "--runs", runs, "--dry-run", "--jobs", 2)
        assert result.exit_code == 0, result.output
        *listed, last = result.stdout.splitlines()
        done = [f"done  digits/natural/seed{seed}" for seed in (0, 1)]
        left = [f"left  digits/natural/seed{seed}" for seed in (2, 3)]
        assert listed == [*done, *left, "left  digits/trades/seed0"]
        # an image takes 1/30 s: each of natural's epochs 1,800 to train and 2,000 to validate, of trades' 19,800 and
        # 2,000, and 12,000 at the end of each run; on two processes
        seconds = (2 * (10 * 3800 + 12000) + 15 * 21800 + 12000) / 30 / 2
        assert seconds == pytest.approx(122 * 60, abs=30)
        assert last == "5 runs, 2 done, 3 left; time on 2 processes: about 2 h 2 min"
        assert sorted(runs.rglob("*")) == before

    def test_nothing_finished(self, tmp_path: Path) -> None:
        result = call("sweep", written(tmp_path, self.TEXT), "--runs", tmp_path / "runs", "--dry-run")
        assert "5 runs, 0 done, 5 left" in result.stdout
        assert "unknown" in result.stdout
        assert not (tmp_path / "runs").exists()

    def test_an_estimate_by_hand(self, tmp_path: Path) -> None:
        planned = sweeps.plan(written(tmp_path, self.TEXT), tmp_path)
        finish(planned[0], seconds=3, threads=2)
        finish(planned[-1], seconds=100)
        each = 3 * 2 / 1800  # natural's own, as one thread takes it
        assert sweeps.estimate(planned, tmp_path, 4) == pytest.approx(3 * (10 * 3800 + 12000) * each / 4)

    @pytest.mark.parametrize(
        ("said", "device"),
        [
            ({"kernel": "native", "versions": {"torch": "2.15.0+cu132"}}, "CPU"),
            ({"kernel": "portable, NVIDIA H200", "versions": {"torch": "2.15.0+cu132"}}, "NVIDIA H200"),
            ({"kernel": "portable", "versions": {"torch": "2.11.0+cu130"}}, "a GPU"),  # as the first runs there were
            ({"versions": None}, "CPU"),
        ],
    )
    def test_a_gpus_time_is_not_a_processors(self, tmp_path: Path, said: dict[str, Any], device: str) -> None:
        planned = sweeps.plan(written(tmp_path, self.TEXT), tmp_path)
        finish(planned[0], seconds=3)
        path = planned[0].folder / "history.json"
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **said}), encoding="utf-8")
        assert records.device(records.read_history(path)) == device
        known = [gpu for gpu in (False, True) if sweeps.estimate(planned, tmp_path, 1, gpu) is not None]
        assert known == [device != "CPU"]

    @pytest.mark.parametrize(
        ("recipe", "training", "validating"),
        [
            ("natural", 1800, 2000),
            ("pgd_at_half", 1800 * (1 + 20 / 2), 2000),
            ("n_fgsm", 1800 * 2, 2000),
            ("uniform", 1800 * 11 + 20 * 200, 20 * 200),
            ("uniform,inner_epochs=4", 1800 * 11 + 20 * 200 / 4, 20 * 200),
            ("report_reweight", 1800 * 21 + 20 * 24 * 450, 20 * 450),  # a fifth is set aside: 450, fewer than 2,100
            ("report_reweight,update_images=100,updates=480", 1800 * 21 + 20 * 480 * 100, 20 * 450),
            ("intercept", 20 * 200, 20 * 200),
        ],
    )
    def test_images_through_the_network_by_hand(self, recipe: str, training: float, validating: float) -> None:
        config = recipes.configure(recipe, "digits", 0)
        assert sweeps._passes(config, 1800) == (pytest.approx(training), pytest.approx(validating))


class TestLoop:
    """The loop over runs, with engines that only pretend."""

    @pytest.fixture
    def planned(self, tmp_path: Path) -> list[Run]:
        text = "{dataset: digits, grid: [{recipe: natural, seed: [0, 1, 2]}, {recipe: uniform, seed: [0, 1]}]}"
        return sweeps.plan(written(tmp_path, text), tmp_path / "runs")

    def test_a_failed_run_stops_only_what_starts_from_it(self, planned: list[Run]) -> None:
        asked = []

        def engine(group: Sequence[Run]) -> Iterator[tuple[Path, str, str]]:
            for run in group:
                asked.append(run.name)
                if run.name == "digits/pgd_at/seed1":
                    yield run.folder, "the disk is full", ""
                else:
                    finish(run)
                    yield run.folder, "", ""

        failed = sweeps.sweep(planned, engine)
        assert failed == {
            "digits/pgd_at/seed1": "the disk is full",
            "digits/uniform/seed1": "digits/pgd_at/seed1, which it starts from, failed",
        }
        assert asked == [run.name for run in planned if run.name != "digits/uniform/seed1"]
        asked.clear()
        assert sweeps.sweep(planned, engine) == failed
        assert asked == ["digits/pgd_at/seed1"]  # only what is missing

    @pytest.mark.parametrize("damage", ['{"another": "run\'s"}', "no JSON"])
    def test_a_foreign_record_is_that_runs_failure_alone(self, planned: list[Run], damage: str) -> None:
        def engine(group: Sequence[Run]) -> Iterator[tuple[Path, str, str]]:
            for run in group:
                finish(run)
                if run.name == "digits/pgd_at/seed1":
                    (run.folder / "record.json").write_text(damage, encoding="utf-8")
                yield run.folder, "", ""

        failed = sweeps.sweep(planned, engine)
        assert list(failed) == ["digits/pgd_at/seed1", "digits/uniform/seed1"]
        assert "record.json cannot be read" in failed["digits/pgd_at/seed1"]

    def test_a_run_that_kills_its_process_does_not_stop_the_others(self, planned: list[Run]) -> None:
        deadly, groups = planned[1], []

        def engine(group: Sequence[Run]) -> Iterator[tuple[Path, str, str]]:
            groups.append(len(group))
            if deadly in group[:2]:  # two processes: it dies before anything is finished
                raise TerminatedWorkerError("killed")
            for run in group:
                if run is deadly:
                    raise TerminatedWorkerError("killed")
                finish(run)
                yield run.folder, "", ""

        assert list(sweeps.sweep(planned, engine)) == [deadly.name]
        assert all(run.done for run in planned if run is not deadly)
        assert len(groups) < 10

    def test_what_runs_say_is_passed_on(self, planned: list[Run], capsys: pytest.CaptureFixture[str]) -> None:
        def engine(group: Sequence[Run]) -> Iterator[tuple[Path, str, str]]:
            for run in group:
                finish(run)
                yield run.folder, "", f"a warning of {run.recipe}\n" if run.start else ""

        assert sweeps.sweep(planned, engine) == {}
        out = capsys.readouterr().out.splitlines()
        assert "digits/uniform/seed0: a warning of uniform" in out
        assert out[0] == "1/7 digits/natural/seed0 finished"
        assert out[-1] == "7/7 digits/uniform/seed1 finished"


class TestHere:
    """Runs in this very process: one job."""

    def test_failures_are_told_at_the_end(self, tmp_path: Path) -> None:
        text = """
        dataset: digits
        grid:
          - {recipe: one_class, chosen: [99, 3], values: {epochs: 1, start_epochs: 1, steps: 1}}
        """
        result = call("sweep", written(tmp_path, text), "--runs", tmp_path / "runs", "--jobs", 1)
        assert result.exit_code == 1
        assert "2 of 3 runs are finished" in result.stdout
        why = "chosen = 99 is not allowed: the classes are 0 to 9"
        assert result.stderr == f"Error: digits/one_class,chosen=99/seed0 failed: {why}\n"

    def test_a_full_gpu_fails_in_one_sentence(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. " + 99 * "Process 1 has. ")

        monkeypatch.setattr(runs, "run", full)
        text = "{dataset: digits, grid: [{recipe: natural, values: {epochs: 1}}]}"
        result = call("sweep", written(tmp_path, text), "--runs", tmp_path / "runs", "--jobs", 1)
        why = "the GPU's memory is full: run fewer at a time (--shares), and this command again"
        assert result.stderr == f"Error: digits/natural/seed0 failed: {why}\n"

    def test_ctrl_c(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def run(_: Any, __: Any, folder: Path) -> None:
            folder.mkdir(parents=True)
            (folder / "checkpoint.pt").touch()
            raise KeyboardInterrupt

        monkeypatch.setattr(runs, "run", run)
        heard = signal.getsignal(signal.SIGINT)
        result = call("sweep", written(tmp_path, SHORT), "--runs", tmp_path / "runs", "--jobs", 1)
        signal.signal(signal.SIGINT, heard), signal.set_wakeup_fd(-1)  # what a process that ends leaves behind
        assert result.exit_code == 130
        assert result.stderr == "Error: interrupted; the same command goes on from here\n"

    def test_data_that_are_nowhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import torchvision

        def download(self: Any) -> None:
            raise RuntimeError("no route to host")

        monkeypatch.setattr(torchvision.datasets.FashionMNIST, "download", download)
        monkeypatch.setenv("FRLKIT_DATA", str(tmp_path / "no data"))
        result = call("sweep", written(tmp_path, "grid: [{recipe: natural}]"), "--runs", tmp_path / "runs", "--jobs", 2)
        assert result.exit_code == 1
        assert "set FRLKIT_DATA" in result.stderr
        assert not (tmp_path / "runs").exists()


def test_processes_take_different_shares_of_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    taken = [clusters._gpu.__wrapped__(4, str(tmp_path)) for _ in range(3)]
    assert taken == ["cuda:0", "cuda:1", "cuda:0"]
    clusters._held.pop(1).release()  # as when its process ends
    assert clusters._gpu.__wrapped__(4, str(tmp_path)) == "cuda:1"
    clusters._held.clear()


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The short sweep's runs, one after the other, in this process."""
    folder = tmp_path_factory.mktemp("serial")
    planned = sweeps.plan(written(folder, SHORT), folder / "runs")
    with clusters.local("cpu", jobs=1) as (engine, _):
        assert sweeps.sweep(planned, engine) == {}
    return folder / "runs"


def content(place: Path) -> dict[str, Any]:
    """All that a sweep has made, but for the time it took: weights bit for bit, by their digest."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in place.rglob("*") if path.is_file()):
        name = str(path.relative_to(place))
        if path.suffix != ".json":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = json.loads(path.read_text(encoding="utf-8"))
            for epoch in found[name].get("epochs", []):
                del epoch["seconds"]
    return found


#: The second is the same to a shell: Python's own way out where Ctrl-C came in the middle of an exec.
INTERRUPTED = (130, -signal.SIGINT)


def start(runs: Path, *words: str) -> subprocess.Popen[str]:
    """The short sweep in a process group of its own."""
    command = [sys.executable, "-m", "frlkit", "sweep", str(written(runs.parent, SHORT)), "--runs", str(runs), *words]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "RAY_AUTH_MODE": "disabled"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def wait_for(condition: Callable[[], Any], seconds: float = 600) -> Any:
    """What a condition finds at last; a file or process that goes while it looks is none."""
    until = time.monotonic() + seconds

    def look() -> Any:
        with contextlib.suppress(FileNotFoundError, psutil.Error):
            return condition()

    while not (found := look()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)
    return found


def workers(process: subprocess.Popen[str]) -> set[psutil.Process]:
    """The processes of a sweep that carry runs out, and none that it has besides."""
    return {child for child in psutil.Process(process.pid).children() if "LokyProcess" in " ".join(child.cmdline())}


def gone(processes: Iterable[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=300)[1]


def finished(process: subprocess.Popen[str]) -> None:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert out.endswith("5 of 5 runs are finished\n")


def test_a_notebook_reads_what_a_sweep_made(serial: Path, digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def train_epoch(*_: Any, **__: Any) -> Any:
        raise AssertionError("trained again")

    monkeypatch.setattr(training, "train_epoch", train_epoch)
    lengths = {"epochs": 8, "frl_epochs": 0, "batch_size": 100}
    records, _ = studies.study(["natural"], [0, 1, 2], "digits", serial, digits, **lengths)
    assert [record["config"]["seed"] for record in records["natural"]] == [0, 1, 2]


def test_a_killed_sweep_goes_on_and_ends_as_the_serial_one(serial: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    planned = sweeps.plan(written(tmp_path, SHORT), runs)
    last = planned[-1]

    def epochs() -> set[tuple[Path, int]]:
        found = set()
        for path in runs.glob("*/*/*/checkpoint.pt"):
            with contextlib.suppress(FileNotFoundError):  # the next one takes its place
                found.add((path, path.stat().st_mtime_ns))
        return found

    with disk.only_one(last.folder):  # however fast the sweep and slow this test: it is not finished before its kill
        process = start(runs, "--jobs", "2")
        wait_for(lambda: epochs() and len(workers(process)) == 2)
        first = wait_for(lambda: workers(process))
        next(iter(first)).kill()  # a worker: the sweep has to replace it
        wait_for(lambda: workers(process) - first)
        before = epochs()
        wait_for(lambda: epochs() - before or len(list(runs.glob("*/*/*/record.json"))) == len(planned) - 1)
        others = wait_for(lambda: workers(process))
        process.kill()  # and now the sweep alone: its workers have to notice
        process.communicate()
        assert gone(others)

    assert not last.done
    with clusters.local("cpu", jobs=1) as (engine, _):
        assert sweeps.sweep(planned, engine) == {}
    assert content(runs) == content(serial)


@pytest.mark.parametrize("when", ["at work", "beginning"])
def test_ctrl_c_ends_everything_in_one_sentence(tmp_path: Path, when: str) -> None:
    """Also while the sweep's processes still import what they need."""
    runs = tmp_path / "runs"
    process = start(runs, "--jobs", "2")
    wait_for(lambda: list(runs.rglob("checkpoint.pt")) if when == "at work" else len(workers(process)) == 2)
    begun = wait_for(lambda: workers(process))
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode in INTERRUPTED
    assert err == "Error: interrupted" + (when == "at work") * "; the same command goes on from here" + "\n"
    assert gone(begun)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def environment(cache: Path) -> dict[str, str]:
    """A worker's: its own cache, where runs are at work, with the native kernel that this machine has built already."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "frlkit"
    (cache / "frlkit").mkdir(parents=True)
    for library in usual.glob("lenet5-*"):
        shutil.copy(library, cache / "frlkit")
    # Ray's workers are "nice" to everyone else, and so never get to run on a busy machine.
    quiet = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    return {**os.environ, **quiet, "PYTHONPATH": str(PROJECT), "XDG_CACHE_HOME": str(cache)}


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a server with a cache of its own, which ends with the test, and with it whatever it has started."""
    started: list[subprocess.Popen[bytes]] = []
    with (tmp_path / "log").open("wb") as log:

        def begin(*command: str | Path, cache: str) -> subprocess.Popen[bytes]:
            settings = environment(tmp_path / cache)
            started.append(subprocess.Popen(command, env=settings, stdout=log, stderr=log, cwd=tmp_path))
            return started[-1]

        yield begin
        for process in reversed(started):
            family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.terminate()
            for left in psutil.wait_procs(family, timeout=10)[1]:
                left.kill()
            process.wait(timeout=60)


def test_dask_with_a_worker_killed(serial: Path, tmp_path: Path, serve: Callable[..., subprocess.Popen[bytes]]) -> None:
    pytest.importorskip("distributed", reason="needs Dask: pip install distributed")
    address, dask = f"tcp://127.0.0.1:{free_port()}", (sys.executable, "-m", "dask")
    serve(*dask, "scheduler", "--host", address, "--no-dashboard", cache="scheduler")
    words = (*dask, "worker", address, "--no-nanny", "--nthreads", "1", "--no-dashboard")
    doomed, _ = (serve(*words, cache=name) for name in ("doomed", "other"))
    wait_for(lambda: (tmp_path / "log").read_bytes().count(b"Registered to") == 2)
    sweeping = start(tmp_path / "runs", "--backend", "dask", "--address", address)
    wait_for(lambda: list((tmp_path / "doomed").rglob("checkpoint.pt")))
    doomed.kill()
    finished(sweeping)
    assert content(tmp_path / "runs") == content(serial)
    assert not list((tmp_path / "other" / "frlkit").glob("runs/*"))  # sent back, and tidied up


def test_ray_with_a_worker_killed(serial: Path, tmp_path: Path, serve: Callable[..., subprocess.Popen[bytes]]) -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install ray")
    port, ray = free_port(), Path(sys.executable).with_name("ray")
    words = ("--head", "--block", "--port", str(port), "--node-ip-address", "127.0.0.1", "--num-cpus", "2")
    small = ("--include-dashboard=false", "--disable-usage-stats", "--object-store-memory", str(10**8))
    head = serve(ray, "start", *words, *small, cache="cache")
    wait_for(lambda: b"Ray runtime started" in (tmp_path / "log").read_bytes())
    sweeping = start(tmp_path / "runs", "--backend", "ray", "--address", f"127.0.0.1:{port}")
    wait_for(lambda: list((tmp_path / "cache").rglob("checkpoint.pt")))

    def away() -> list[psutil.Process]:
        return [
            one for one in psutil.Process(head.pid).children(recursive=True) if "ray::away" in " ".join(one.cmdline())
        ]

    wait_for(away)[0].kill()
    finished(sweeping)
    assert content(tmp_path / "runs") == content(serial)


def test_a_cluster_that_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("distributed", reason="needs Dask: pip install distributed")
    address = f"tcp://127.0.0.1:{free_port()}"
    with pytest.raises(KitError, match=f"there is no dask cluster at {address}"), clusters.cluster("dask", address):
        raise AssertionError("entered")


def test_a_library_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(KitError, match=r"pip install ray"), clusters.cluster("ray", "127.0.0.1:1"):
        raise AssertionError("entered")


class TestAway:
    """A run as a cluster's worker carries it out."""

    @pytest.fixture
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        environment(tmp_path / "cache")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        return tmp_path / "cache" / "frlkit"

    def test_a_retraining_run_from_what_was_sent(self, serial: Path, cache: Path, tmp_path: Path) -> None:
        run = sweeps.plan(written(tmp_path, SHORT), serial)[-1]
        sent = {name: (run.start.folder / name).read_bytes() for name in runs.FILES}
        files, error = clusters.away(run.recipe, run.config, sent, "cpu")
        assert error == ""
        for name in set(runs.FILES) - {"history.json"}:
            assert files[name] == (run.folder / name).read_bytes()
        assert not list(cache.glob("runs/*"))

    def test_goes_on_from_its_last_epoch(
        self, serial: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run, trained = sweeps.plan(written(tmp_path, SHORT), serial)[0], []
        original = training.train_epoch

        def train_epoch(run: training.Progress, *rest: Any) -> Any:
            trained.append(run.epoch)
            if len(trained) == 4:
                raise MemoryError("no memory left")
            return original(run, *rest)

        monkeypatch.setattr(training, "train_epoch", train_epoch)
        assert clusters.away(run.recipe, run.config, {}, "cpu") == ({}, "MemoryError: no memory left")
        files, error = clusters.away(run.recipe, run.config, {}, "cpu")
        assert (error, trained) == ("", [0, 1, 2, 3, 3, 4, 5, 6, 7])
        assert files[runs.WEIGHTS] == (run.folder / runs.WEIGHTS).read_bytes()

    def test_data_that_are_nowhere(self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def load(name: str, **_: Any) -> Dataset:
            raise data.DataUnavailableError("set FRLKIT_DATA")

        monkeypatch.setattr(clusters, "_data", load)
        monkeypatch.setattr(data, "load", load)
        config = recipes.configure("natural", "digits", 0)
        monkeypatch.setattr(clusters, "_data", lambda *words: load(words[0]))
        assert clusters.away("natural", config, {}, "cpu") == ({}, "set FRLKIT_DATA")


TWO = {"natural": [0.5] * 2, "robust": [0.5] * 2}


class TestReceived:
    """What a worker sends back is kept only if it is this run's, whole and at one with itself."""

    @pytest.fixture
    def run(self, serial: Path, tmp_path: Path) -> Run:
        """The first run of a sweep whose folder is empty; its files lie under `serial`."""
        return sweeps.plan(written(tmp_path, SHORT), tmp_path / "empty")[0]

    @pytest.fixture
    def sent(self, run: Run, serial: Path) -> dict[str, bytes]:
        return clusters.files_of(serial / run.name)

    def test_its_own_files_are_kept(self, run: Run, sent: dict[str, bytes]) -> None:
        clusters.receive(run, sent)
        assert run.done and clusters.files_of(run.folder) == sent

    @pytest.mark.parametrize("name", [runs.WEIGHTS, "history.json", "record.json", records.OUTCOMES])
    def test_a_file_cut_short(self, run: Run, sent: dict[str, bytes], name: str) -> None:
        with pytest.raises(KitError):
            clusters.receive(run, {**sent, name: sent[name][: len(sent[name]) // 2]})
        assert not run.folder.exists()

    @pytest.mark.parametrize("name", [runs.WEIGHTS, "history.json", "record.json"])
    def test_a_missing_or_foreign_file(
        self, run: Run, sent: dict[str, bytes], serial: Path, tmp_path: Path, name: str
    ) -> None:
        with pytest.raises(KitError, match=f"the worker sent no {name}"):
            clusters.receive(run, {key: value for key, value in sent.items() if key != name})
        other = sweeps.plan(written(tmp_path, SHORT), tmp_path / "empty")[1]
        with pytest.raises(KitError, match="belongs to another run|of other weights"):
            clusters.receive(run, {**sent, name: (serial / other.name / name).read_bytes()})
        assert not run.folder.exists()

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("history.json", lambda content: content.update(epochs=content["epochs"][:1])),
            ("record.json", lambda content: content.update(attacks=content["attacks"][:1])),
            ("record.json", lambda content: content.update(attacks=content["attacks"][:-1])),
            ("record.json", lambda content: content.update(weights_sha256="0" * 64)),
            ("record.json", lambda content: content.update(natural=[1.0] * 10)),
            ("record.json", lambda content: content.pop("natural")),
            ("record.json", lambda content: content["attacks"][0].update(robust=[0.0] * 10)),
            ("record.json", lambda content: content["attacks"][0].update(boundary=[-5.0] * 10)),
            ("record.json", lambda content: content["attacks"][0].update(confusion=[[0] * 10] * 10)),
            ("record.json", lambda content: content.update(dataset="mnist")),
            ("record.json", lambda content: content.update(data_sha256="0" * 64)),
            ("history.json", lambda content: content.update(data_sha256="0" * 64)),
            ("history.json", lambda content: content["epochs"][0].update(validation={})),
            ("history.json", lambda content: [epoch.update(validation=TWO) for epoch in content["epochs"]]),
        ],
        ids=[
            *(
                "epochs missing",
                "attacks missing",
                "attack missing",
                "other weights",
                "errors",
                "no errors",
                "robust",
                "boundary",
            ),
            *("counts", "other data set", "other images", "history of other images", "no validation", "two classes"),
        ],
    )
    def test_a_forged_one(self, run: Run, sent: dict[str, bytes], name: str, change: Callable[[Any], None]) -> None:
        content = json.loads(sent[name])
        change(content)
        with pytest.raises(KitError):
            clusters.receive(run, {**sent, name: json.dumps(content).encode()})
        assert not run.folder.exists()

    def test_weights_that_are_no_numbers_and_outcomes_of_others(
        self, run: Run, sent: dict[str, bytes], serial: Path, tmp_path: Path
    ) -> None:
        """A record may agree with NaN; outcomes are asked for their weights."""
        path = tmp_path / runs.WEIGHTS
        path.write_bytes(sent[runs.WEIGHTS])
        model, config = runs.read_weights(path)
        with torch.no_grad():
            model.fc2.bias.fill_(math.nan)
        runs.write_weights(path, model.state_dict(), config, 10)
        record = json.loads(sent["record.json"]) | {"weights_sha256": checkpoint.digest(dict(model.state_dict()))}
        forged = {runs.WEIGHTS: path.read_bytes(), "record.json": json.dumps(record).encode()}
        with pytest.raises(KitError, match="weights that are NaN or infinite"):
            clusters.receive(run, {**sent, **forged})
        other = sweeps.plan(written(tmp_path, SHORT), serial)[1]
        foreign = {records.OUTCOMES: (other.folder / records.OUTCOMES).read_bytes()}
        with pytest.raises(KitError, match="outcomes are of other weights"):
            clusters.receive(run, {**sent, **foreign})
        assert not run.folder.exists()

"""Several processes on one run: torchrun with gloo and two processes, against one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import frlkit
from frlkit import distributed, runs

# Every method's gradients on one batch, from weights and batch that all processes agree on; file name: the argument.
GRADIENTS = """
import sys, torch
from pathlib import Path
from frlkit import data, distributed, fairness, losses, models, recipes
from frlkit.evaluation import stream

torch.set_num_threads(1)
distributed.start(torch.device("cpu"))
digits, found = data.load("digits"), {}
x, y = digits.train.batch(slice(0, 51))  # an odd number: the shares differ
weights = torch.linspace(0.5, 1.5, 10).softmax(0)
balance = fairness.Setting(weights, weights.flip(0), torch.linspace(0.9, 2, 10))
for recipe in ("pgd_at", "pgd_at_half", "trades", "algorithm1_both", "baseline_reweight", "report_remargin"):
    model = models.build("lenet5", seed=0)
    config = recipes.configure(recipe, "digits", 0)
    loss = losses.loss(model, x, y, config, stream(0), balance if isinstance(config, recipes.FairConfig) else None)
    loss.backward()
    distributed.average_gradients(model)
    found[recipe] = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
if distributed.is_main():
    torch.save(found, Path(sys.argv[1]))
distributed.stop()
"""


def launch(folder: Path, processes: int, *words: str) -> str:
    """Run a command under torchrun, or alone where `processes` is 1; returns what it printed."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] * (processes > 1)
    environment = {**os.environ, "PYTHONPATH": str(frlkit.PROJECT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *torchrun, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    (tmp_path / "gradients.py").write_text(GRADIENTS, encoding="utf-8")
    for processes in (1, 2):
        launch(tmp_path, processes, "gradients.py", f"{processes}.pt")
    one, two = (torch.load(tmp_path / f"{processes}.pt", weights_only=True) for processes in (1, 2))
    for recipe in one:
        torch.testing.assert_close(two[recipe], one[recipe], rtol=1e-4, atol=1e-6, msg=recipe)


def test_a_shared_run_is_written_once_and_equals_one_process(tmp_path: Path) -> None:
    """A retraining run, and before it the run that it starts from."""
    words = ("-m", "frlkit", "train", "natural", "--dataset", "digits", "--batch-size", "200", "--device", "cpu")
    fair = (*words[:3], "uniform,start=natural,start_epochs=2,steps=2", *words[4:], "--epochs", "1")
    printed = launch(tmp_path, 2, *fair, "--runs", "shared")
    launch(tmp_path, 1, *fair, "--runs", "alone")
    assert printed.count("natural/seed0 epoch 1/2") == 1
    found = sorted(file.relative_to(tmp_path / "shared") for file in (tmp_path / "shared").rglob("*") if file.is_file())
    assert found == sorted(
        file.relative_to(tmp_path / "alone") for file in (tmp_path / "alone").rglob("*") if file.is_file()
    )
    for name in (file for file in found if file.name == runs.WEIGHTS):
        ours, theirs = (runs.read_weights(tmp_path / place / name)[0].state_dict() for place in ("shared", "alone"))
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-5)
    for name in (file for file in found if file.name == "record.json"):
        ours, theirs = (
            json.loads((tmp_path / place / name).read_text(encoding="utf-8")) for place in ("shared", "alone")
        )
        assert ours["natural"] == pytest.approx(theirs["natural"], abs=0.1)


def test_alone_everything_is_as_if_it_were_not_there() -> None:
    x = torch.rand(3, 2)
    assert distributed.start(torch.device("cpu")) == torch.device("cpu")
    assert distributed.is_main() and not distributed.shared()
    assert distributed.share_out(lambda rows: x[rows] + 1, x).equal(x + 1)
    assert distributed.from_main(lambda: 5) == 5

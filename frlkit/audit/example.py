"""The shipped example of anyone's weights: a LeNet-5 with ReLU and max pooling, trained by PGD-AT on the digits.

``python -m frlkit.audit.example`` trains it anew. The file is what public repositories publish: a state_dict under
"net", and nothing that says which activation or pooling it was trained with.
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import torch

from frlkit import PROJECT, checkpoint, data, models, runs
from frlkit.audit.networks import LeNet
from frlkit.recipes import configure

FILE = PROJECT / "checkpoints" / "example" / "lenet5.pth"
RECIPE = {"epochs": 15, "batch_size": 20}  # of pgd_at


def weights(path: Path = FILE) -> Path:
    """The path of the example's file; trained now, in a minute or two, where it is not there."""
    if not path.exists():
        tensors = data.load("digits")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            name = models.lend("LeNet-5, ReLU, max pooling", LeNet(10, 1, 32, 0, "ReLU", "max"))
        with tempfile.TemporaryDirectory() as place:
            config = configure("pgd_at", "digits", 0, model=name, **RECIPE)
            model = runs.run(config, tensors, Path(place) / "digits" / "pgd_at" / "seed0")
        buffer = io.BytesIO()
        torch.save({"net": model.state_dict(), "epoch": config.epochs}, buffer)
        checkpoint.write_atomically(path, buffer.getvalue())
    return path


if __name__ == "__main__":
    FILE.unlink(missing_ok=True)
    print(weights())

"""Seconds an image for CROWN's bounds, beside those of auto_LiRPA where it is installed (from its source), in one run.

    FRLKIT_DATA=... OMP_NUM_THREADS=1 python benchmarks/certificates.py --json benchmarks/certificates.json

The library: a clone of github.com/Verified-Intelligence/auto_LiRPA on PYTHONPATH, with graphviz, sortedcontainers,
appdirs and ninja beside it. Both bound the same margins of the same images, one image at a time and in turns, so that
a busy machine is as hard on one as on the other, in seconds of the processor; how far the bounds are apart is said
beside.
"""

from __future__ import annotations

import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import numpy as np

import frlkit

# isort: split
import torch
import torch.nn.functional as F
from epoch import processor
from torch import Tensor, nn

from frlkit import checkpoint, data, records, runs
from frlkit.audit import branch, crown

EPS = 8 / 255


class Plain(nn.Module):
    """LeNet-5 in operations that the library knows."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        flow = F.avg_pool2d(self.net.conv1(images).tanh(), 2)
        flow = F.avg_pool2d(self.net.conv2(flow).tanh(), 2).flatten(1)
        flow = (flow @ self.net.conv3.weight.flatten(1).T + self.net.conv3.bias).tanh()
        return self.net.fc2(self.net.fc1(flow).tanh())


def theirs(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """auto_LiRPA's lower bounds of the margins, (1, 10)."""
    import auto_LiRPA as library

    low, high = (x - EPS).clamp(min=0), (x + EPS).clamp(max=1)
    ball = library.BoundedTensor(x, library.PerturbationLpNorm(norm=float("inf"), x_L=low, x_U=high))
    rows = F.one_hot(y, 10)[:, None] - torch.eye(10)
    return library.BoundedModule(Plain(net).eval(), x).compute_bounds(x=(ball,), C=rows, method="CROWN")[0]


@click.command()
@click.option("--images", default=10, show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the result there.")
def main(images: int, out: Path | None) -> None:
    """Time both on the shipped pgd_at model, seed 0, and Fashion-MNIST's first test images."""
    model, _ = runs.read_weights(frlkit.PROJECT / "checkpoints" / "fashion_mnist" / "pgd_at" / "seed0" / runs.WEIGHTS)
    methods = {
        "frlkit, CROWN": lambda x, y: crown.margins(model, x, y, EPS),
        "frlkit, two rounds of fitting": lambda x, y: crown.margins(model, x, y, EPS, branch.FIT),
    }
    if find_spec("auto_LiRPA"):
        methods["auto_LiRPA, CROWN"] = lambda x, y: theirs(model, x, y)
    split = data.load("fashion_mnist").test
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    bounds: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(images):
        x, y = split.batch(slice(number, number + 1))
        for name, bound in methods.items():
            began = time.process_time()
            found = bound(x, y)[0].detach()
            seconds[name].append(time.process_time() - began)
            bounds[name].append(float(found[torch.arange(10) != y].min()))
    library = import_module("auto_LiRPA").__version__ if find_spec("auto_LiRPA") else None
    result = {
        "device": processor(),
        "images": images,
        "threads": torch.get_num_threads(),
        "seconds": {name: {"least": min(s), "median": float(np.median(s))} for name, s in seconds.items()},
        "mean_least_margin": {name: float(np.mean(found)) for name, found in bounds.items()},
        "versions": {**records.versions(), "auto_LiRPA": library},
    }
    for name in methods:
        click.echo(f"{name}: {min(seconds[name]):.2f} s an image, mean bound {np.mean(bounds[name]):.2f}")
    if out is not None:
        checkpoint.write_json(out, result)


if __name__ == "__main__":
    main()

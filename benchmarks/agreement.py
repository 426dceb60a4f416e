"""Do the native and the portable path agree? Same starts, same weights: pixels that differ, class-wise errors beside.

    FRLKIT_DATA=... python benchmarks/agreement.py --json benchmarks/agreement.json

Signed steps turn a rounding difference in a gradient near zero into a whole step, so single pixels may differ by up
to the ball's diameter. What counts is whether the errors differ by more than another seed of the attack would change.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import click
import numpy as np

import frlkit

# isort: split
import torch

from frlkit import attacks, data, evaluation, kernels, records, runs
from frlkit.evaluation import Attack

SEEDS = range(3)
IMAGES = 2000  # of the test set, its first


def on(path: str) -> None:
    os.environ["FRLKIT_KERNEL"] = {"native": "auto", "portable": "off"}[path]


@click.command()
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the result there.")
def main(out: Path | None) -> None:
    """Compare the two paths on the shipped pgd_at model, seed 0, and Fashion-MNIST's first test images."""
    place = frlkit.PROJECT / "checkpoints" / "fashion_mnist" / "pgd_at" / "seed0"
    model, _ = runs.read_weights(place / runs.WEIGHTS)
    if not kernels.available(model):
        raise click.ClickException("there is no native path here: nothing to compare")
    whole = data.load("fashion_mnist").test
    test = data.Split(whole.images[:IMAGES], whole.labels[:IMAGES])
    x, y = test.batch(slice(0, 500))
    adversarial, errors = {}, {}
    for path in ("native", "portable"):
        on(path)
        start = evaluation.stream(0)
        adversarial[path] = attacks.pgd(model, x, y, 8 / 255, 2 / 255, 20, generator=start)
        errors[path] = np.array([evaluation.class_errors(model, test, Attack(seed=seed)).robust for seed in SEEDS])
    apart = (adversarial["native"] - adversarial["portable"]).abs()
    result = {
        "images": len(x),
        "pixels_differing_by_more_than_1e-6": float((apart > 1e-6).double().mean()),
        "pixels_differing_by_more_than_1/255": float((apart > 1 / 255).double().mean()),
        "largest_class_difference_points": 100 * float(np.abs(errors["native"] - errors["portable"]).max()),
        "class_spread_over_attack_seeds_points": 100 * float(np.ptp(errors["portable"], axis=0).max()),
        "attack_seeds": len(SEEDS),
        "versions": records.versions(),
    }
    text = json.dumps(result, indent=1)
    click.echo(text)
    if out:
        out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()

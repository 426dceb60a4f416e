"""What the paper's scale costs here: one PGD-10 training step of a big network, timed; and what number formats change.

    FRLKIT_DATA=... python benchmarks/paper.py --json benchmarks/paper.json

The hours are an extrapolation from a few steps on random images; nothing was trained that long. The second table asks
how many images' robustness depends on the attack's number format, beside how many depend on the attack's seed.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import torchattacks
from torch import Tensor, nn

import frlkit
from frlkit import data, evaluation, losses, models, recipes, records, runs
from frlkit.evaluation import Attack

IMAGES, EPOCHS, STEPS = 45_000, 100, 10  # CIFAR-10's training images less the validation split; the paper's inner steps
TRAINED = ("folder:cifar10-jpeg-slice", "pgd_at", 0)


def timed(step: Callable[[], Any], repeats: int, device: torch.device) -> list[float]:
    """Seconds of each repeat, after one that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def one_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, config: recipes.Config, plain: bool
) -> None:
    """PGD-AT on one batch: the kit's loss, or torchattacks' PGD and cross-entropy."""
    model.train()
    if plain:
        adversarial = torchattacks.PGD(model, eps=8 / 255, alpha=2 / 255, steps=config.steps)(x, y)
        loss = nn.functional.cross_entropy(model.train()(adversarial), y)
    else:
        with evaluation.number_format(config.precision, x.device):
            loss = losses.loss(model, x, y, config, evaluation.stream(0, device=x.device))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def cost(name: str, batch: int, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """A training step the plain way (torchattacks) and ours in each number format, in turn on the same batch."""
    x, y = torch.rand(batch, 3, 32, 32, device=device), torch.arange(batch, device=device) % 10
    formats = ("float32", "bf16") if device.type == "cpu" else ("float32", "tf32", "bf16")
    steps = {"torchattacks, float32": None, **{f"kit, {precision}": precision for precision in formats}}
    rows = []
    for label, precision in steps.items():
        model = models.build(name, seed=0)
        model = model.to(device) if precision is None else models.place(model, device)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
        config = recipes.Config("pgd_at", "cifar10", name, steps=STEPS, precision=precision or "float32")

        step = partial(one_step, model, optimizer, x, y, config, plain=precision is None)
        seconds = timed(step, repeats, device)
        median = statistics.median(seconds)
        rows.append(
            {
                "model": name,
                "way": label,
                "batch": batch,
                "step_s": round(median, 3),
                "lowest_s": round(min(seconds), 3),
                "highest_s": round(max(seconds), 3),
                "images_per_s": round(batch / median, 1),
                "extrapolated_hours": round(IMAGES * EPOCHS / batch * median / 3600, 1),
            }
        )
    return rows


def formats(shipped: Path, device: torch.device) -> dict[str, Any]:
    """Class-wise robust error of a trained run when the attack computes in bf16 or tf32, beside another attack seed."""
    dataset, recipe, seed = TRAINED
    place = shipped / data.folder_name(dataset) / recipe / f"seed{seed}"
    model, config = runs.read_weights(place / runs.WEIGHTS)
    model = models.place(model, device)
    test = data.load(dataset, device=device).test
    attack = Attack()
    reference = evaluation.class_errors(model, test, attack).robust
    x, y = test.batch(slice(None))
    found = {}
    for precision in ("bf16",) if device.type == "cpu" else ("tf32", "bf16"):
        with evaluation.number_format(precision, device):
            adversarial = evaluation.pgd(
                model, x, y, 8 / 255, 2 / 255, attack.steps, generator=evaluation.stream(0, 0, device=device)
            )
        fooled = (evaluation.predict(model, adversarial) != y) | (evaluation.predict(model, x) != y)
        robust = torch.stack([fooled[y == label].double().mean() for label in range(len(reference))])
        found[precision] = 100 * float((robust.cpu().numpy() - reference).__abs__().max())
    others = [evaluation.class_errors(model, test, Attack(seed=other)).robust for other in (1, 2)]
    return {
        "run": f"{dataset} {recipe} seed {seed} ({models.TITLES[config['model']]})",
        "test_images": len(test),
        "largest_class_difference_points": found,
        "largest_class_difference_of_attack_seeds_points": 100 * max(float(abs(o - reference).max()) for o in others),
    }


@click.command()
@click.option("--model", "name", default="preact_resnet18", show_default=True)
@click.option("--batch", default=32, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--threads", type=int, help="Of torch on a CPU; default: torch's own.")
@click.option("--runs", "shipped", type=click.Path(path_type=Path), default=frlkit.PROJECT / "checkpoints")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the result there.")
def main(
    name: str, batch: int, repeats: int, device: str, threads: int | None, shipped: Path, out: Path | None
) -> None:
    """Time one training step at the paper's scale, extrapolate, and compare number formats on the shipped run."""
    place = data.pick_device(device)
    if threads:
        torch.set_num_threads(threads)
    result = {
        "device": torch.cuda.get_device_name(place)
        if place.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "extrapolated": f"{IMAGES} images, {EPOCHS} epochs, PGD-{STEPS}",
        "cost": cost(name, batch, repeats, place),
        "formats": formats(shipped, place),
        "versions": records.versions(),
    }
    text = json.dumps(result, indent=1)
    click.echo(text)
    if out:
        out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()

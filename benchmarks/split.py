"""How optimistic is a validation split of GTSRB that is drawn image by image, where 30 frames show one sign?

    FRLKIT_DATA=... python benchmarks/split.py --json benchmarks/split.json

The same network is trained twice from the same seed on a part of the tracks, once with a quarter of the images set
aside, once with a quarter of the tracks; each is measured on its own validation images and on the same test images,
whose signs neither has seen. What validation says less than the test is the split's optimism. Small and short: the
sizes of the differences count, not the errors.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from frlkit import data, evaluation, models, recipes, records, training
from frlkit.data import Dataset, Split
from frlkit.evaluation import Attack

RECIPES = {"natural": 10, "pgd_at,steps=5": 5}  # epochs of each


def pool(dataset: Dataset, tracks: int) -> Split:
    """All images of a class's first so many tracks in training and validation split together."""
    parts = (dataset.train, dataset.validation)
    images, labels, groups = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("images", "labels", "groups")
    )
    kept = torch.cat([groups[labels == label].unique()[:tracks] for label in labels.unique()])
    return Split(images, labels, groups, dataset.train.classes).take(torch.isin(groups, kept))


def trained(recipe: str, split: Split, epochs: int) -> nn.Module:
    config = recipes.configure(recipe, "gtsrb", 0, epochs=epochs, batch_size=64)
    model = models.place(models.build(config.model, int(split.classes or 0), seed=0), split.labels.device)
    images = data.Dataset("gtsrb", tuple(map(str, range(int(split.classes or 0)))), split, split, split)
    run = training.Progress(config, images, model, torch.optim.Adam(model.parameters(), lr=config.lr), None)
    for run.epoch in range(epochs):
        for _ in training.train_epoch(run):
            pass
    return model


def errors(model: nn.Module, split: Split, attack: Attack) -> dict[str, float]:
    """Average over classes of the natural and of the robust error, and the worst class's, in per cent."""
    found = evaluation.class_errors(model, split, attack)
    kinds = {"natural": found.natural, "robust": found.robust}
    return {f"{k} {how}": round(100 * float(getattr(e, how)()), 1) for k, e in kinds.items() for how in ("mean", "max")}


@click.command()
@click.option("--tracks", default=6, show_default=True, help="Of each class.")
@click.option("--test", "tested", default=3000, show_default=True, help="Test images.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the result there.")
def main(tracks: int, tested: int, out: Path | None) -> None:
    """Train with both splits, and say by how much validation is below the test."""
    torch.set_num_threads(1)
    dataset = data.load("gtsrb")
    whole, attack = pool(dataset, tracks), Attack(eps_255=12.0, step_255=3.0, steps=10)
    order = torch.randperm(len(dataset.test), generator=torch.Generator().manual_seed(0))[:tested]
    test = dataset.test.take(order)
    result: dict[str, Any] = {"tracks_of_each_class": tracks, "attack": str(attack), "test_images": tested, "runs": []}
    for recipe, epochs in RECIPES.items():
        for drawn, groups in (("by image", None), ("by track", whole.groups)):
            train, held = (whole.take(i) for i in data.stratified_split(whole.labels, 0.25, 0, groups))
            model = trained(recipe, replace(train, groups=None), epochs)
            found = {"validation": errors(model, held, attack), "test": errors(model, test, attack)}
            optimism = {k: round(found["test"][k] - v, 1) for k, v in found["validation"].items()}
            run = {"recipe": recipe, "epochs": epochs, "split": drawn, "training_images": len(train)}
            result["runs"].append({**run, "validation_images": len(held), **found, "optimism_points": optimism})
            click.echo(json.dumps(result["runs"][-1]))
    result["versions"] = records.versions()
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""The model card of all shipped models, ``checkpoints/README.md``: written from their records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from frlkit import PROJECT, records, runs
from frlkit.evaluation import STANDARD, Attack
from frlkit.recipes import RECIPES
from frlkit.report import names, rules, studies, tables

HEAD = """# Model card

Written by `frlkit report` from the records beside the weights. A run's folder, `DATASET/RECIPE/seedN`, has
`weights.safetensors` (configuration in the header), `history.json`, `record.json` and, where kept, a bit an image and
attack in `outcomes.npz`. `frlkit.runs.read_weights(PATH)` loads one, `frlkit verify` recomputes all. MIT licence.

**Use.** Research on class-wise robustness: to recompute this kit's tables, to compare with other methods, to be
attacked. Not to decide anything: under {attack}, the worst class of each is wrong on
{least} % of its images or more, and none of these models knows an image that belongs to no class. `example/lenet5.pth`
is none of them: a file as strangers publish theirs, without configuration or record, for notebook 06 to audit.

**Known failures.** Robust errors are lower bounds, from PGD-20; AutoAttack finds more (notebook 05). Classes that
resemble one another (of Fashion-MNIST T-shirt/top, Pullover, Coat, Shirt) are confused with one another: what a recipe
gains on one of them another may pay. Models of CIFAR-10 and of signs fail more, and have fewer seeds: how much is said
with each data set. None was trained for other radii than its row names, nor for other norms or corruptions.
"""


def card(project: Path = PROJECT) -> str:
    """The card as Markdown: what each model is, from which data, seeds and recipe, and its class-wise errors.

    Runs on anyone's own images, and on the digits, are not shipped, so they are left out.
    """
    by_data: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for place in [run for name in names.DATASETS for run in runs.finished(project / "checkpoints" / name)]:
        device = records.device(records.read_history(place / "history.json"))
        record = {**records.read(place / "record.json"), "device": device}
        by_data.setdefault(record["dataset"], {}).setdefault(place.parent.name, []).append(record)
    every = [record for found in by_data.values() for seeds in found.values() for record in seeds]
    least = min((studies.robust_errors(record, STANDARD[0].eps_255).max() for record in every), default=0)
    lines = [HEAD.format(attack=STANDARD[0], least=int(100 * least)).rstrip()]
    for dataset, found in by_data.items():
        lines += ["", f"## {names.DATASETS[dataset]}", "", _images(found), "", _failures(found)]
        lines += ["", *_about(found), "", *_classwise(found)]
    return "\n".join(lines) + "\n"


def _images(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """How many images the models were trained and tested with."""
    every = [record for seeds in found.values() for record in seeds]
    trained = sorted({sum(record["training_counts"]) for record in every if "training_counts" in record})
    tested = " or ".join(sorted({f"{record['images']:,}" for record in every}))
    return (
        f"Trained on {' or '.join(f'{count:,}' for count in trained)} images; a share of each class's training images "
        f'("held out") is validation, and all of the {tested} test images are tested on.'
    )


def _failures(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """How badly the worst classes do under the standard attack, which recipes lose a class, and how few seeds have."""
    attack, fewest = Attack(tables.radius(found)), rules.FEWEST_SEEDS
    every = [(recipe, record) for recipe, seeds in found.items() for record in seeds]
    robust = [(recipe, studies.robust_errors(record, attack.eps_255).max()) for recipe, record in every]
    said = f"under {attack}, the worst class of each model is wrong on at least "
    said += f"{int(100 * min(error for _, error in robust))} % of its images"
    natural = [(recipe, max(record["natural"])) for recipe, record in every]
    for errors, when in ((robust, "then"), (natural, "even without an attack")):
        if lost := dict.fromkeys(f"`{recipe}`" for recipe, error in errors if error == 1):
            said += f"; of {', '.join(lost)}, some model is wrong on all images of a class {when}"
    few = sum(len(seeds) < fewest for seeds in found.values())
    seeds = f"{few} of {len(found)} recipes have fewer than {fewest} seeds: what tells them apart may be chance"
    return f"Known failures: {said}. {seeds}."


def _attack(config: Mapping[str, Any]) -> str:
    """What a run's loss attacks its training images with."""
    radius, steps = f"{config['eps_255']:g}/255", config["steps"]
    if config["method"] == "intercept":
        return f"none: only the output's {config.get('moved', 'biases')} change"
    if config["method"] == "certified":
        return f"none: intervals of {radius}"
    return "none" if config["method"] == "natural" else f"{radius}, {steps} step{'s' * (steps != 1)}"


def _about(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    rows = []
    for recipe, seeds in found.items():
        config, name = seeds[0]["config"], recipe.split(",")[0]
        listed = ", ".join(str(record["config"]["seed"]) for record in seeds)
        source = RECIPES[name].source if name in RECIPES else ""
        title = ", ".join([RECIPES[name].title if name in RECIPES else name, *recipe.split(",", 1)[1:]])
        start = config.get("start", "random weights")
        trained = _attack(config) + (f"; {config['precision']}" if "precision" in config else "")
        share = f"{config.get('validation', 0.1):.0%}"
        where = " or ".join(dict.fromkeys(record["device"] for record in seeds))
        rows.append(
            [title, f"`{recipe}`", source, config["model"], start, config["epochs"], trained, share, where, listed]
        )
    head = ["model", "recipe", "source", "network", "starts from", "epochs", "attack in training", "held out"]
    head += ["trained on", "seeds"]
    return tables.markdown(head, rows).splitlines()


def _classwise(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Errors by class, in %, means over seeds: natural / under the standard attack at the data set's radius."""
    classes = next(iter(found.values()))[0]["class_names"]
    rows, attack = [], Attack(tables.radius(found))
    for recipe, seeds in found.items():
        natural = 100 * np.mean([record["natural"] for record in seeds], axis=0)
        robust = 100 * np.mean([studies.robust_errors(record, attack.eps_255) for record in seeds], axis=0)
        rows.append([f"`{recipe}`", *(f"{n:.1f} / {r:.1f}" for n, r in zip(natural, robust, strict=True))])
    sentence = f"Test errors by class in %, means over seeds: natural / under {attack}."
    return [sentence, "", *tables.markdown(["", *classes], rows).splitlines()]

"""The model card of all shipped models, ``checkpoints/README.md``: written from their records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from frlkit import PROJECT, records, runs
from frlkit.evaluation import STANDARD, Attack
from frlkit.recipes import RECIPES
from frlkit.report import names, studies, tables

HEAD = """# Model card

Written by `frlkit report` from the records beside the weights. A run's folder, `DATASET/RECIPE/seedN`, has
`weights.safetensors` (configuration in the header), `history.json`, `record.json` and, where kept, a bit an image and
attack in `outcomes.npz`. `frlkit.runs.read_weights(PATH)` loads one, `frlkit verify` recomputes all. MIT licence.

**Use.** Research on class-wise robustness: to recompute this kit's tables, to compare with other methods, to be
attacked. Not to decide anything: under {attack}, the worst class of each is wrong on {least} % of its images or
more, and none of these models knows an image that belongs to no class. `example/lenet5.pth` is none of them: a file as
strangers publish theirs, without configuration or record, for notebook 06 to audit.

**Known failures.** Robust errors are lower bounds, from PGD-20; AutoAttack finds more (notebook 05). Classes that
resemble one another (T-shirt/top, Pullover, Coat, Shirt) are confused with one another: what a recipe gains on one of
them another may pay. They were not trained for other radii, norms or corruptions.
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
        lines += ["", f"## {names.DATASETS[dataset]}", "", _images(found), "", *_about(found), "", *_classwise(found)]
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


def _about(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    rows = []
    for recipe, seeds in found.items():
        config, name = seeds[0]["config"], recipe.split(",")[0]
        listed = ", ".join(str(record["config"]["seed"]) for record in seeds)
        source = RECIPES[name].source if name in RECIPES else ""
        title = ", ".join([RECIPES[name].title if name in RECIPES else name, *recipe.split(",", 1)[1:]])
        start = config.get("start", "random weights")
        trained = f"{config['eps_255']:g}/255, {config['steps']} steps" if config["method"] != "natural" else "none"
        trained += f"; {config['precision']}" if "precision" in config else ""
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

"""Which runs a notebook reads, and with which lengths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frlkit import PROJECT, KitError
from frlkit.recipes import configure, described
from frlkit.report import names, studies

SHIPPED = PROJECT / "checkpoints"
LENGTHS = {"epochs": 15, "frl_epochs": 0, "batch_size": 100}


@pytest.mark.parametrize(
    ("recipe", "frl_epochs", "expected"),
    [
        ("pgd_at", 0, {"epochs": 15}),
        ("uniform", 0, {"epochs": 12, "start_epochs": 15}),
        ("uniform", 3, {"epochs": 3, "start_epochs": 15}),
        ("official_both", 0, {"epochs": 40, "start_epochs": 15}),
        ("intercept_uniform", 0, {"epochs": 24, "start_epochs": 12}),  # starts from a retrained run
        ("intercept_uniform", 3, {"epochs": 3, "start_epochs": 3}),
    ],
)
def test_lengths(recipe: str, frl_epochs: int, expected: dict[str, int]) -> None:
    values = studies.values(recipe, **{**LENGTHS, "frl_epochs": frl_epochs})
    config = vars(configure(recipe, "fashion_mnist", 0, **values))
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize("title", names.METHODS)
def test_every_title_has_a_recipe(title: str) -> None:
    configure(names.recipe(title), "fashion_mnist", 0)


def test_finished_runs_are_read_and_others_left_out(tmp_path: Path) -> None:
    record, history = (
        json.loads((SHIPPED / "fashion_mnist" / "natural" / "seed0" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("record", "history")
    )

    def put(recipe: str, seed: int, **changed: Any) -> None:
        config = described(configure(recipe, "fashion_mnist", seed, **studies.values(recipe, **LENGTHS)))
        place = tmp_path / "fashion_mnist" / recipe / f"seed{seed}"
        place.mkdir(parents=True)
        for name, made in (("record", record), ("history", history)):
            made = {**made, "config": {**config, **changed}}
            (place / f"{name}.json").write_text(json.dumps(made), encoding="utf-8")

    control = names.recipe("Control")
    put(control, 0)
    put(control, 2)
    put(names.recipe("DAFA"), 0, epochs=3)  # another length than asked for
    titles = ["Control", "DAFA", "Reweight", "no such recipe"]
    found, histories = studies.study(titles, [0, 1, 2], "fashion_mnist", tmp_path, None, **LENGTHS)
    assert list(found) == list(histories) == [control]
    with pytest.raises(KitError, match=r"no finished run of DAFA \(fashion_mnist\) in .*, and no data to train it"):
        studies.study(titles, [0], "fashion_mnist", tmp_path, None, needed=["Control", "DAFA"], **LENGTHS)
    assert [one["config"]["seed"] for one in found[control]] == [0, 2]


def test_outcomes_of_the_seeds_that_both_kept(tmp_path: Path) -> None:
    found: dict[str, list[dict[str, Any]]] = {}
    for recipe, seeds in ((names.recipe("Control"), (0, 1)), (names.recipe("DAFA"), (1, 2))):
        for seed in seeds:
            place = tmp_path / "fashion_mnist" / recipe / f"seed{seed}"
            place.mkdir(parents=True)
            right = np.array([seed == 1, True, "dafa" in recipe])
            kept = {"images": np.array(3), "weights_sha256": np.array("w"), "clean": np.packbits(right)}
            np.savez(place / "outcomes.npz", **kept)
            found.setdefault(recipe, []).append({"config": {"seed": seed}, "weights_sha256": "w"})
    ours, theirs = studies.outcomes(found, ["DAFA", "Control"], tmp_path, "clean", "fashion_mnist", **LENGTHS)
    assert ours.tolist() == [[True, True, True]]
    assert theirs.tolist() == [[True, True, False]]
    ours, _ = studies.outcomes(found, ["DAFA", "Control"], tmp_path, "PGD", "fashion_mnist", **LENGTHS)
    assert len(ours) == 0


def test_shipped_base_runs_are_found() -> None:
    found, _ = studies.finished(["PGD-AT", "TRADES"], range(5), "fashion_mnist", SHIPPED, **LENGTHS)
    assert [len(seeds) for seeds in found.values()] == [5, 5]

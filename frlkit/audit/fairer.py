"""Fair Robust Learning from anyone's own network: what it was, the control, the method, and the cheap remedy.

Runs are the core's, resumable like any other; that they start from these weights stands in their configuration and in
their folder's name, so another file of weights is another run.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from frlkit import KitError, models, runs
from frlkit.attacks import outputs
from frlkit.data import Dataset
from frlkit.recipes import FAIR, FairConfig, configure

BEFORE, CONTROL, INTERCEPT = "before", "control (equal weights)", "output biases moved"


class Shifted(nn.Module):
    """A network and a bias (C,) behind it, its last parameter: what the intercept control moves. 0 changes nothing."""

    def __init__(self, network: nn.Module, classes: int) -> None:
        super().__init__()
        self.network = network
        zeros = torch.zeros(classes, device=next(network.parameters()).device)
        self.bias = nn.ParameterList([zeros])  # a module's own parameters would come before its parts'

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images) + self.bias[0]


def going_on(recipe: str, model: nn.Module, name: str, tensors: Dataset, batch_size: int) -> tuple[str, dict[str, Any]]:
    """A retraining recipe that goes on from a network as it stands, and the fields of its configuration for it.

    Where the recipe averages weights, it does so over about one epoch of the training images: its own decay is
    Fashion-MNIST's, with which a small data set's weights would hardly leave their start. Output biases are moved
    behind a network that does not end in its own (`Shifted`). Raises `KitError` for a recipe that starts from nothing,
    or that tunes output norms which cannot be told.
    """
    asked = configure(recipe, tensors.name, 0)
    if not isinstance(asked, FairConfig):
        kind = recipe.partition(",")[0]
        raise KitError(f"recipe = {kind!r} goes on from no network: use one of {', '.join(FAIR)}")
    if asked.method == "intercept" and not _ends_in_biases(model, tensors):
        if asked.moved == "norms":
            raise KitError(
                f"recipe = {recipe!r} needs a network that ends in a linear layer with biases: use intercept"
            )
        model = Shifted(model, len(tensors.class_names))
    own: dict[str, Any] = {"model": models.lend(name, model)}
    if asked.ema:
        own["ema"] = round(max(0.0, 1 - batch_size / len(tensors.train)), 3)
    return f"{recipe},start={runs.own_start(model)}", own


def retrain(
    recipe: str, model: nn.Module, name: str, tensors: Dataset, place: Path, seed: int = 0, **values: Any
) -> nn.Module:
    """The model after a retraining recipe that goes on from a network as it stands; a finished run is reloaded.

    Parameters
    ----------
    recipe : of `recipes.FAIR`, fields may be varied: "algorithm1_both,optimizer=sgd,lr=0.01"
    model, name : from images in [0, 1] to logits, and what the run's configuration calls it, such as ``net.py:net``
    tensors : its data set, of the network's own size
    place : folder of all runs; this one's is PLACE/DATASET/RECIPE,start=weights-DIGEST/seedN
    values : further fields of the configuration

    Raises `KitError` for a recipe that starts from nothing, and what `runs.run` raises.
    """
    recipe, own = going_on(recipe, model, name, tensors, values.get("batch_size", 100))
    config = configure(recipe, tensors.name, seed, **own, **values)
    return runs.run(config, tensors, runs.folder(place, recipe, config))


def versions(
    model: nn.Module,
    name: str,
    tensors: Dataset,
    place: Path,
    recipe: str = "algorithm1_both",
    title: str = "Reweight + Remargin",
    seed: int = 0,
    **values: Any,
) -> Iterator[tuple[str, nn.Module]]:
    """The network before; retrained with equal weights; by `recipe`, called `title`; with its output biases moved.

    The last takes no training: it is what the cheap remedy gives. `values` are those of `retrain`, for the other two;
    the radius at which errors are measured holds for all.
    A recipe or value that is not allowed is refused before anything is trained.
    """
    for planned in ("uniform", recipe):
        asked, own = going_on(planned, model, name, tensors, values.get("batch_size", 100))
        configure(asked, tensors.name, seed, **own, **values)
    yield BEFORE, model
    yield CONTROL, retrain("uniform", model, name, tensors, place, seed, **values)
    yield title, retrain(recipe, model, name, tensors, place, seed, **values)
    steered = {field: value for field, value in values.items() if field == "measure_255"}
    yield INTERCEPT, retrain("intercept", model, name, tensors, place, seed, **steered)


@torch.no_grad()
def _ends_in_biases(model: nn.Module, tensors: Dataset) -> bool:
    """Whether the network's last parameter is added to its logits, and nothing else."""
    bias, classes = list(model.parameters())[-1], len(tensors.class_names)
    if bias.shape != (classes,):
        return False
    x, _ = tensors.validation.batch(slice(0, 2))
    kept, moved = bias.clone(), torch.arange(classes).to(bias)
    try:
        before = outputs(model, x)
        bias += moved
        return bool(torch.allclose(outputs(model, x) - before, moved.expand_as(before), atol=1e-3))
    finally:
        bias.copy_(kept)

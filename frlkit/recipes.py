"""What a run is: its configuration, every named recipe with its source and differences, the data sets' schedules."""

from __future__ import annotations

import difflib
import functools
import types
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, Field
from pydantic.fields import FieldInfo

from frlkit import KitError, fairness, models
from frlkit.data import check_name
from frlkit.values import Count, Pixels, Positive, Seed, Share, Size, checked, fields_of, from_text, to_text

OWN = "weights-"  # how the start of a network that was lent begins
_Lent = Annotated[str, Field(pattern=rf"^{OWN}[0-9a-f]{{16}}$")]  # told by the head of its weights' digest


@checked
class Config:
    """Everything that decides a run's result; radius and step in 1/255. A value that does not fit raises `KitError`."""

    method: Literal["natural", "pgd_at", "trades", "n_fgsm"]  # n_fgsm: its one step is as long as the radius
    dataset: Annotated[str, AfterValidator(check_name)] = "fashion_mnist"
    model: Annotated[str, AfterValidator(models.known)] = "lenet5"
    seed: Seed = 0
    epochs: Annotated[int, Field(ge=1, le=10**5)] = 15
    batch_size: Count = 100
    optimizer: Literal["adam", "sgd"] = "adam"
    lr: Annotated[float, Field(gt=0, le=1e3)] = 1e-3
    momentum: Share = 0.9  # sgd only
    weight_decay: Annotated[float, Field(ge=0, le=1e3)] = 0.0
    lr_divide: Annotated[float, Field(ge=1, le=1e6)] = 3.0  # the rate is divided by this ...
    lr_every: Annotated[int, Field(ge=1, le=10**5)] = 4  # ... after every so many epochs
    eps_255: Pixels = 8.0
    step_255: Pixels = 2.0
    steps: Annotated[int, Field(ge=1, le=10**5)] = 10
    attacked: Positive = 1.0  # pgd_at: share of each batch that is replaced by its adversarial images
    beta: Size = 6.0  # trades: weight of the KL term
    augment: Literal["none", "crop_flip"] = "none"  # of the training images (see `data.augmented`)
    precision: Literal["float32", "tf32", "bf16"] = "float32"  # of the network's products, in training and its attacks
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0  # decay, per batch, of a running average of the weights, which is
    # then what is validated, steers the multipliers and is kept; 0: none
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1  # share of the training images set aside


@checked
class FairConfig(fairness.Rule, Config):
    """A retraining run (FRL): goes on from the finished run of `start` with the same seed, data set and batch size."""

    method: Literal["frl", "pgd_at", "report_reweight", "report_remargin", "intercept", "certified"]
    start: Literal["natural", "pgd_at_half", "pgd_at", "trades", "uniform", "certified", "random"] | _Lent = "pgd_at"
    start_epochs: Annotated[int, Field(ge=1, le=10**5)] = 15  # of that run; random or a network that was lent: of none
    updates: Annotated[int, Field(ge=1, le=10**5)] = 1  # of the multipliers in each epoch, evenly spaced
    inner_epochs: Annotated[int, Field(ge=1, le=10**5)] = 1  # only every so many epochs (BEST of Algorithm 1)
    measure_255: Pixels = 8.0  # radius at which the errors behind an update are measured (PGD-20, step 2/255)
    update_images: Annotated[int, Field(ge=0, le=10**9)] = 0  # on so many random validation images; 0: on all
    moved: Literal["biases", "norms"] = "biases"  # method intercept: what of the output layer follows the multipliers
    boundary: Literal["wrong", "changed", "certified"] = "wrong"  # boundary error of an update: right clean and wrong
    # attacked; any changed prediction (the report's); what intervals leave uncertified beyond the natural error
    step: Literal["own", "largest", "fixed"] = "own"  # proportional to the sample's own radius, or the batch's largest
    predicted_targets: bool = True  # report_reweight: attacked images are trained towards, and weighted by, the
    # prediction for the clean image (the report); False: towards its probabilities, weighted by the label
    unshuffled_labels: bool = False  # report_remargin: labels stay behind when the images are shuffled (the report)
    ramp: Share = 0.0  # certified: share of the training over which radius and `losses.KAPPA` rise from 0


class Recipe(NamedTuple):
    """A named recipe: its title in tables and figures, where it comes from, and what differs from the defaults."""

    title: str
    source: str
    values: dict[str, Any]


_LOOP = {"method": "frl", "epochs": 12, "beta": 1.5, "bound": 0.5, "tau_bdy": 0.02, "ema": 0.998}
_ALGORITHM1 = {**_LOOP, "alpha_nat": 0.3}
_INTERCEPT = {"method": "intercept", "epochs": 24, "weighting": "intercept", "alpha_nat": 1.0, "alpha_bdy": 1.0}
_INTERCEPT |= {"tau_nat": 0.05, "tau_bdy": 0.02}
_LATE = {**_INTERCEPT, "start": "uniform", "start_epochs": 12}
_NORMS = {**_INTERCEPT, "moved": "norms", "alpha_nat": 0.1, "alpha_bdy": 0.1}
_PAPER = {"method": "frl", "epochs": 40, "steps": 10, "beta": 1.5, "bound": 1.0, "tau_nat": 0.05, "tau_bdy": 0.07}
_PAPER |= {"radius_low": 0.0, "radius_high": 1e6, "alpha_nat": 0.05, "lr_every": 10**5}
_PRINTED = {**_PAPER, "weighting": "printed", "subtract_average": False}
_OFFICIAL = {
    **{"method": "frl", "epochs": 40, "steps": 10, "beta": 1.5, "step": "largest", "clamp_state": False},
    **{"optimizer": "sgd", "lr": 1e-3, "weight_decay": 5e-4, "lr_every": 10**5},
    **{"bound": 0.5, "tau_nat": 0.07, "tau_bdy": 0.07, "radius_low": 0.98, "radius_high": 3.0},
}
_AUTHORS = {**_OFFICIAL, "alpha_nat": 0.05}
_AUTHORS_REWEIGHT = {**_AUTHORS, "alpha_bdy": 0.1, "tau_nat": 0.1, "tau_bdy": 0.1}
_RATES = {"alpha_bdy": 0.1, "alpha_margin": 0.4}  # in the authors' code
_REPORT = {
    **{"epochs": 20, "lr": 1e-4, "step_255": 1.0, "steps": 20, "step": "fixed", "update_images": 2100},
    **{"measure_255": 16.0, "tau_nat": 0.05, "tau_bdy": 0.05, "weighting": "softmax", "accumulate": False},
    **{"radius_low": 0.0, "radius_high": 1e6, "clamp_state": False, "start": "pgd_at_half", "validation": 0.2},
    **{"boundary": "changed", "updates": 24},
}
_REPORT_LOOP = {**_REPORT, "method": "report_reweight", "eps_255": 16.0}
_REPORT_MARGIN = {
    **{**_REPORT, "method": "report_remargin", "epochs": 10, "attacked": 0.5, "alpha_nat": 1.0, "alpha_margin": 10.0},
    **{"subtract_average": False, "unshuffled_labels": True},
}
_INTERVALS = {"method": "certified", "start": "random", "epochs": 20, "ramp": 0.6, "lr_every": 13, "lr_divide": 10.0}
_CERTIFIED = {**_ALGORITHM1, "method": "certified", "start": "certified", "start_epochs": 20, "boundary": "certified"}
_REWEIGHT, _MARGIN = {"alpha_bdy": 0.3}, {"alpha_margin": 3.0}
_BOTH = {**_REWEIGHT, **_MARGIN}
_SHRUNK = {**_ALGORITHM1, "alpha_margin": -3.0, "radius_low": 0.5, "radius_high": 1.0}
_BASELINE = {**_LOOP, "method": "pgd_at", "target": "robust", "alpha_bdy": 0.3, "tau_bdy": 0.07}
_JOINT = {**_ALGORITHM1, **_REWEIGHT, "target": "joint", "tau_bdy": 0.07}  # the sum of Reweight's two
_WIDE, _RANDOM = {"eps_255": 12.0, "step_255": 3.0}, {"start": "random", "epochs": 27}
_HALF = {"method": "pgd_at", "attacked": 0.5, "steps": 20}

#: From nothing, the preliminary study's: what differs between its models. Schedule and optimiser are the same.
BASE: dict[str, Recipe] = {
    "natural": Recipe("Natural training", "paper, report", {"method": "natural"}),
    "pgd_at_half": Recipe("PGD-AT, half of each batch (report)", "report", _HALF),
    "pgd_at": Recipe("PGD-AT, whole batch (paper)", "paper", {"method": "pgd_at", "attacked": 1.0}),
    "trades": Recipe("TRADES", "paper", {"method": "trades", "beta": 6.0}),
    "n_fgsm": Recipe("N-FGSM, one step", "de Jorge et al. 2022", {"method": "n_fgsm", "steps": 1}),
}

#: Retraining recipes: what differs from the defaults of `fairness.Rule` and `FairConfig`.
#:
#: The kit's loop (`_LOOP`): optimiser and schedule of the preliminary study, attack and loss of the authors' code, one
#: update an epoch, each sample's step in proportion to its own radius, twelve epochs, so that the last of three rates
#: is low, and weights averaged over about the last epoch. Multipliers bounded as in the authors' code, radii capped
#: at twice the radius; tau is 5 and 2 %, where the text has 5 and 7: boundary errors of Fashion-MNIST are small.
#: `_PAPER` has the text's tolerances, no caps on the radii, the multipliers' rates of the authors' code, and a learning
#: rate that never falls, so that the network can follow its multipliers to the end; `_PRINTED` also leaves the average
#: out, as printed. `_OFFICIAL` is the authors' code: SGD, 40 epochs, multipliers and radii that wind up.
#: `_REPORT` is the report's code, faults included (`REPORT_FAULTS`); weights are estimated anew every 20 batches, not
#: before every batch (``updates=480`` does that).
FAIR: dict[str, Recipe] = {
    "uniform": Recipe("Retrained, equal weights (control)", "control", _LOOP),
    "algorithm1_reweight": Recipe("Algorithm 1, Reweight", "paper", {**_ALGORITHM1, **_REWEIGHT}),
    "algorithm1_remargin": Recipe("Algorithm 1, Remargin", "paper", {**_ALGORITHM1, **_MARGIN}),
    "algorithm1_both": Recipe("Algorithm 1, Reweight + Remargin", "paper", {**_ALGORITHM1, **_BOTH}),
    "baseline_reweight": Recipe("Baseline reweight (Agarwal)", "paper; Agarwal et al. 2018", _BASELINE),
    "baseline_uniform": Recipe("Baseline's loop, equal weights (control)", "control", {**_LOOP, "method": "pgd_at"}),
    "joint_reweight": Recipe("Reweight, joint constraint (Eq. 13 to 15)", "paper, section 4.1", _JOINT),
    "natural_only": Recipe("Natural multipliers alone (control)", "control", _ALGORITHM1),
    "boundary_only": Recipe("Boundary multipliers alone (control)", "control", {**_LOOP, **_REWEIGHT}),
    "radii_only": Recipe("Radii without multipliers (control)", "control", {**_LOOP, **_MARGIN}),
    "constant_radius": Recipe(
        "Natural multipliers, 1.5 times the radius (control)", "control", {**_ALGORITHM1, **_WIDE}
    ),
    "constant_margin": Recipe("Equal weights, 1.5 times the radius (control)", "control", {**_LOOP, **_WIDE}),
    "intercept": Recipe("Output biases moved, nothing else (control)", "control", _INTERCEPT),
    "head_norms": Recipe("Norms of the output's rows tuned, nothing else (control)", "control", _NORMS),
    "intercept_uniform": Recipe("Retrained with equal weights, then biases moved (control)", "control", _LATE),
    "shrunk_margin": Recipe("Radii of hard classes shrunk", "CFA's direction, Wei et al. 2023", _SHRUNK),
    "random_start_uniform": Recipe("From random weights, equal weights (control)", "control", {**_LOOP, **_RANDOM}),
    "random_start_both": Recipe("Algorithm 1, both, from random weights", "paper", {**_ALGORITHM1, **_BOTH, **_RANDOM}),
    "printed_reweight": Recipe("Reweight as printed", "paper", {**_PRINTED, "alpha_bdy": 0.1}),
    "printed_remargin": Recipe("Remargin as printed", "paper", {**_PRINTED, "alpha_margin": 0.4}),
    "printed_both": Recipe("Both as printed", "paper", {**_PRINTED, **_RATES}),
    "eq17_reweight": Recipe("Reweight under Eq. 17", "paper", {**_PAPER, "alpha_bdy": 0.1}),
    "eq17_remargin": Recipe("Remargin under Eq. 17", "paper", {**_PAPER, "alpha_margin": 0.4}),
    "eq17_both": Recipe("Both under Eq. 17", "paper", {**_PAPER, **_RATES}),
    "official_uniform": Recipe("Authors' loop, equal weights (control)", "control", _OFFICIAL),
    "official_reweight": Recipe("Authors' code, Reweight", "authors' code", _AUTHORS_REWEIGHT),
    "official_remargin": Recipe("Authors' code, Remargin", "authors' code", {**_AUTHORS, "alpha_margin": 0.4}),
    "official_both": Recipe("Authors' code, Reweight + Remargin", "authors' code", {**_AUTHORS, **_RATES}),
    "report_uniform": Recipe("Report's loop, equal weights (control)", "control", _REPORT_LOOP),
    "report_reweight": Recipe("Report's Reweight", "report", {**_REPORT_LOOP, "alpha_nat": 1.0, "alpha_bdy": 1.0}),
    "report_remargin": Recipe("Report's Remargin", "report", _REPORT_MARGIN),
    "dafa": Recipe("DAFA", "Lee et al. 2024", {**_LOOP, "scheme": "dafa", "radius_low": 0.0}),
    "certified": Recipe("Certified training (intervals)", "Gowal et al. 2018", _INTERVALS),
    "certified_uniform": Recipe("Certified, equal weights (control)", "control", {**_CERTIFIED, "alpha_nat": 0.0}),
    "certified_reweight": Recipe("Certified, Reweight", "paper", {**_CERTIFIED, **_REWEIGHT}),
    "certified_remargin": Recipe("Certified, Remargin", "paper", {**_CERTIFIED, **_MARGIN}),
    "one_class": Recipe("One class at twice the radius", "paper, section 3", {**_LOOP, "scheme": "one_class"}),
}
RECIPES = {**BASE, **FAIR}

#: The faults of the report's Remargin, in its order of discovery, and the fields that undo each.
REPORT_FAULTS: dict[str, str] = {
    "labels stay behind when images are shuffled": "unshuffled_labels=False",
    "radii explode: no cap": "radius_high=2,clamp_state=True",
    "reset at every update": "accumulate=True",
    "no average subtracted": "subtract_average=True",
    "steps too short for the ball": "step=own",
}

_LONG = {"optimizer": "sgd", "weight_decay": 5e-4, "lr_divide": 10.0, "lr_every": 40}  # of 100 epochs (`configure`)
_COLOUR = {"model": "preact_resnet18", **_LONG, "precision": "bf16"}
_SIGNS = {**_WIDE, "precision": "bf16"}
_FLOAT = {**_WIDE, "precision": "tf32"}
_QUARTER = {**_LONG, "augment": "crop_flip", "precision": "tf32"}
#: What a data set asks for, beneath a recipe's own fields; from nothing, and when a finished run is retrained.
#:
#: CIFAR-10 and SVHN have the paper's schedule: SGD, momentum 0.9, weight decay 5e-4, the rate divided by 10 after 40 %
#: and 80 % of the epochs; retraining begins at 0.001, as in the authors' code. GTSRB's plain CNNs are trained as the
#: preliminary study's LeNet-5, at the paper's 12/255. Training is in bf16; of the 17 classes and of CIFAR-10's network
#: of a quarter of the width in float32, on a GPU TensorFloat-32, so that a processor without bf16 can go on from there.
#: Epochs, batch size: ``notebooks/profiles``.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "cifar10": ({**_COLOUR, "lr": 0.1, "augment": "crop_flip"}, {**_COLOUR, "lr": 1e-3, "augment": "crop_flip"}),
    "cifar10, preact_resnet18_w16": ({**_QUARTER, "lr": 0.1}, {**_QUARTER, "lr": 1e-3}),
    "svhn": ({**_COLOUR, "lr": 0.01}, {**_COLOUR, "lr": 1e-3}),
    "gtsrb": ({**_SIGNS, "model": "cnn3"}, {**_SIGNS, "model": "cnn3", "measure_255": 12.0}),
    "gtsrb17": ({**_FLOAT, "model": "cnn4"}, {**_FLOAT, "model": "cnn4", "measure_255": 12.0}),
    "folder": ({"model": "cnn3"}, {"model": "cnn3"}),
}

#: Fields that came after the first runs were shipped: a run's files name them only where they are not the default.
LATER = ("augment", "precision", "ema", "validation", "inner_epochs", "moved", "boundary", "ramp")


def configure(recipe: str, dataset: str, seed: int, **values: Any) -> Config:
    """The configuration of a named recipe, or of a variation such as ``"uniform,beta=6,steps=20"``.

    `values` are further fields of the configuration; they do not show in the name, and the recipe's variations win over
    them. Raises `KitError` for an unknown recipe or field, or a value that does not fit.
    """
    name, varied = _parts(recipe)
    kind, known = FairConfig if name in FAIR else Config, _fields(name)
    if unknown := set(values) - set(known):
        raise KitError(f"{min(unknown)!r} is no field of a run of {name}: use {', '.join(known)}")
    place, given = check_name(dataset).partition(":")[0], {"epochs": Config.epochs, **values, **varied}
    small = f"{place}, {given.get('model')}"
    asked, epochs = SETTINGS.get(small, SETTINGS.get(place, ({}, {})))[kind is FairConfig], given["epochs"]
    if kind is Config and "lr_every" in asked and isinstance(epochs, int):  # a shorter run has the same schedule
        asked = {**asked, "lr_every": max(1, round(asked["lr_every"] * epochs / 100))}
    own = RECIPES[name].values
    if _WIDE.items() <= own.items() and "eps_255" in asked:  # larger than what all are trained with there
        own = {**own, **{key: 1.5 * asked[key] for key in _WIDE}}
    made = {**asked, **own, **values, **varied, "dataset": dataset, "seed": seed}
    if made.get("attacked", 1) != 1 and made["method"] not in ("pgd_at", "report_remargin"):
        raise KitError(f"attacked = {made['attacked']} is not allowed with {name}: its loss attacks every image; use 1")
    return kind(**made)


def spelled(recipe: str) -> str:
    """The one spelling of a recipe's name: ``uniform,epochs=03`` is ``uniform,epochs=3``."""
    name, varied = _parts(recipe)
    return ",".join([name, *(f"{key}={to_text(value)}" for key, value in varied.items())])


def _fields(name: str) -> dict[str, FieldInfo]:
    """What a recipe can be varied in."""
    known = fields_of(FairConfig if name in FAIR else Config)
    return {key: field for key, field in known.items() if key not in ("dataset", "seed")}


@functools.lru_cache(maxsize=1024)  # a plan asks many times for each of its recipes
def _parts(recipe: str) -> tuple[str, Mapping[str, Any]]:
    """A recipe's name, and the fields varied in it."""
    name, *variations = recipe.split(",")
    if name not in RECIPES:
        near = [r for r in RECIPES if len(name) > 3 and name in r] or difflib.get_close_matches(name, RECIPES, 3, 0.5)
        hint = " or ".join([*near, "another" if near else "one"])
        raise KitError(f"recipe = {name!r} is unknown: use {hint} that `frlkit recipes` lists")
    known, varied = _fields(name), {}
    for variation in variations:
        key, _, text = variation.partition("=")
        if key not in known:
            raise KitError(f"{key!r} is no field of a run of {name}: use {', '.join(known)}")
        if key in varied:
            raise KitError(f"{key} is given twice in {recipe!r}: give it once")
        varied[key] = from_text(key, text, known[key])
    return name, types.MappingProxyType(varied)


def described(config: Config) -> dict[str, Any]:
    """A configuration as a run's files keep it."""
    defaults, values = {field.name: field.default for field in fields(config)}, asdict(config)
    return {name: values[name] for name in values if name not in LATER or values[name] != defaults[name]}


def start_of(config: Config) -> Config | None:
    """The configuration of the run that a retraining run starts from; None where its network starts as it is built."""
    if not isinstance(config, FairConfig) or config.start == "random" or config.start.startswith(OWN):
        return None
    shared = {"epochs": config.start_epochs, "batch_size": config.batch_size, "model": config.model}
    return configure(config.start, config.dataset, config.seed, **shared)

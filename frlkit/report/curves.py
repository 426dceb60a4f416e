"""Pictures of training histories, epoch by epoch on the validation split: errors, violations, multipliers, radii."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from frlkit.report import figures
from frlkit.report.names import plain, title

Histories = Mapping[str, Sequence[Mapping[str, Any]]]  # recipe -> one history per seed
PAPER_TAU = {"natural": 5.0, "boundary": 7.0}  # points


def training_curves(histories: Histories, note: str) -> Figure:
    """Loss, and natural and robust error (average and worst class) on the validation split, epoch by epoch.

    Lines are means over seeds, bands ± sd. The panels of one error share an axis. Robust errors are at the radius of
    training.
    """
    attack = _radii("PGD-10 ", (seed["config"]["eps_255"] for seeds in histories.values() for seed in seeds))
    panels = {
        "natural average": "natural error, average",
        "natural worst": "natural error, worst class",
        "robust average": f"{attack} error, average",
        "robust worst": f"{attack} error, worst class",
        "loss": "training loss (each recipe's own)",
    }
    frame = _frame(histories, list(panels), _of_epoch, first=1)
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    axes[0, 1].sharey(axes[0, 0])
    axes[1, 1].sharey(axes[1, 0])
    places = [axes[0, 0], axes[0, 1], axes[1, 0], axes[1, 1], axes[0, 2]]
    for axis, (column, heading) in zip(places, panels.items(), strict=True):
        _line(axis, frame, column, heading, "loss" if column == "loss" else "error (%)")
    axes[1, 2].axis("off")
    axes[1, 2].legend(*axes[0, 0].get_legend_handles_labels(), loc="center", frameon=False)
    figures.heading(figure, note, "validation split", _bands(histories))
    return figure


def _of_epoch(entry: Mapping[str, Any]) -> list[float]:
    natural, robust = (100 * np.array(entry["validation"][kind]) for kind in ("natural", "robust"))
    return [natural.mean(), natural.max(), robust.mean(), robust.max(), entry["loss"]]


def fairness_curves(histories: Histories, note: str) -> Figure:
    """Largest class-wise excess over the average, and average and worst robust error, by epoch (paper, 3 and 5).

    A constraint is violated where the excess lies above its tolerance τ, drawn for every tolerance in use and for the
    paper's; epoch 0 is the model that retraining starts from. Lines are means over seeds, bands ± sd; the two panels of
    either kind share an axis.
    """
    panels = {
        "natural": "natural error: worst class above average",
        "boundary": "boundary error: worst class above average",
        "average": "robust error, average",
        "worst": "robust error, worst class",
    }
    frame = _frame(histories, list(panels), _excess, first=0)
    figure, axes = plt.subplots(1, 4, figsize=(16, 4.6), layout="constrained")
    axes[1].sharey(axes[0])
    axes[3].sharey(axes[2])
    for axis, (column, heading) in zip(axes, panels.items(), strict=True):
        _line(axis, frame, column, heading, "points" if column in PAPER_TAU else "error (%)")
    for axis, kind in zip(axes, PAPER_TAU, strict=False):
        taus = _taus(histories, kind)
        _tolerances(axis, {**taus, PAPER_TAU[kind]: ["paper", *taus.get(PAPER_TAU[kind], [])]})
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figures.heading(
        figure, note, f"validation split, {_attacks(itertools.chain(*histories.values()))}", _bands(histories)
    )
    return figure


def _attacks(seeds: Iterable[Mapping[str, Any]]) -> str:
    """What measured the errors in these histories: what steered, unless that is on new images (`training`)."""
    configs = [seed["config"] for seed in seeds]
    return _radii("PGD-20 at ", (8.0 if config["update_images"] else config["measure_255"] for config in configs))


def _radii(attack: str, radii: Iterable[float]) -> str:
    return attack + " and ".join(f"{radius:g}" for radius in sorted(set(radii))) + "/255"


def _excess(entry: Mapping[str, Any]) -> list[float]:
    natural, robust = (100 * np.array(entry["validation"][kind]) for kind in ("natural", "robust"))
    boundary = robust - natural
    return [natural.max() - natural.mean(), boundary.max() - boundary.mean(), robust.mean(), robust.max()]


def class_curves(seeds: Sequence[Mapping[str, Any]], class_names: Sequence[str], note: str) -> Figure:
    """One recipe, class by class: excess of both errors over the average with τ, both multipliers, and the radius.

    From the histories of its seeds; lines are means over them, bands ± sd. Multipliers are read off the class weights
    1/C + φ - mean φ as φ minus the smallest φ, which is 0 unless every class violates its constraint. Epoch e shows the
    weights and radii that were trained with last in it.
    """
    names = [figures.literal(plain(name)) for name in class_names]
    excess = {kind: np.array([_by_class(history, kind) for history in seeds]) for kind in PAPER_TAU}
    panels = {
        **{f"{kind} error above average": values for kind, values in excess.items()},
        "multiplier φ, natural": _state(seeds, "weights_nat", lambda w, _: w - w.min(axis=1, keepdims=True)),
        "multiplier φ, boundary": _state(seeds, "weights_bdy", lambda w, _: w - w.min(axis=1, keepdims=True)),
        "radius in training (1/255)": _state(seeds, "radius_factors", lambda w, config: w * config["eps_255"]),
    }
    figure, axes = plt.subplots(1, 5, figsize=(18, 4.4), layout="constrained")
    axes[1].sharey(axes[0])
    axes[3].sharey(axes[2])
    styles = [(colour, line) for line in ("-", "--", ":", "-.") for colour in sns.color_palette("tab10", 10)]
    for axis, (heading, values) in zip(axes, panels.items(), strict=True):
        epochs = np.arange(values.shape[1]) + len(seeds[0]["epochs"]) + 1 - values.shape[1]
        spread = values.std(axis=0, ddof=1) if len(seeds) > 1 else np.zeros(values.shape[1:])
        each = zip(names, itertools.cycle(styles), values.mean(axis=0).T, spread.T, strict=False)
        for name, (colour, style), line, sd in each:
            axis.plot(epochs, line, style, color=colour, label=name)
            axis.fill_between(epochs, line - sd, line + sd, color=colour, alpha=0.15, linewidth=0)
        _by_epoch(axis, heading, "points" if "above" in heading else "")
    for axis, (kind, tau) in zip(axes, PAPER_TAU.items(), strict=False):
        _tolerances(axis, dict.fromkeys(_taus({"": seeds}, kind) or [tau], []))
    figure.legend(*axes[4].get_legend_handles_labels(), loc="outside lower center", ncols=10, frameon=False)
    figures.heading(figure, note, f"validation split, {_attacks(seeds)}", _bands({"": seeds}))
    return figure


def _by_class(history: Mapping[str, Any], kind: str) -> np.ndarray:
    """Class-wise error minus its average, in points: (epochs, C), the start first where there is one."""
    start = [history["start"]] if "start" in history else []
    rows = []
    for entry in (*start, *history["epochs"]):
        natural, robust = (np.array(entry["validation"][name]) for name in ("natural", "robust"))
        errors = natural if kind == "natural" else robust - natural
        rows.append(100 * (errors - errors.mean()))
    return np.array(rows)


def _state(seeds: Sequence[Mapping[str, Any]], field: str, read: Any) -> np.ndarray:
    """One class-wise field of every epoch, (seeds, epochs, C)."""
    return np.array([read(np.array([e[field] for e in h["epochs"]]), h["config"]) for h in seeds])


def _frame(histories: Histories, columns: Sequence[str], read: Any, first: int) -> pd.DataFrame:
    """One row a recipe, seed and epoch; `first` is 0 where the model before the first epoch counts as an epoch."""
    rows = []
    for recipe, seeds in histories.items():
        for history in seeds:
            start = [history["start"]] if first == 0 and "start" in history else []
            for epoch, entry in enumerate([*start, *history["epochs"]], start=1 - len(start)):
                rows.append((title(recipe), history["config"]["seed"], epoch, *read(entry)))
    return pd.DataFrame(rows, columns=["recipe", "seed", "epoch", *columns])


def _line(axis: Axes, frame: pd.DataFrame, column: str, heading: str, unit: str) -> None:
    spread = "sd" if frame.groupby("recipe")["seed"].nunique().max() > 1 else None
    style = {"hue": "recipe", "style": "recipe", "errorbar": spread, "palette": "colorblind"}
    sns.lineplot(frame, x="epoch", y=column, ax=axis, **style)
    _by_epoch(axis, heading, unit)
    axis.get_legend().remove()


def _by_epoch(axis: Axes, heading: str, unit: str) -> None:
    axis.set(title=heading, xlabel="epoch", ylabel=unit)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)


def _taus(histories: Histories, kind: str) -> dict[float, list[str]]:
    """The tolerances in points that multipliers or radii of these recipes follow, and the titles of those recipes.

    Not those under the report's softmax, which has no tolerance left in its weights (`fairness.setting`).
    """
    rates, found = (("alpha_nat",) if kind == "natural" else ("alpha_bdy", "alpha_margin")), {}
    for recipe, seeds in histories.items():
        config = seeds[0]["config"] if seeds else {}
        if any(config.get(rate) for rate in rates) and config.get("weighting") != "softmax":
            tau = round(100 * config["tau_nat" if kind == "natural" else "tau_bdy"], 6)
            found.setdefault(tau, []).append(title(recipe))
    return found


def _tolerances(axis: Axes, taus: Mapping[float, Sequence[str]]) -> None:
    """A line for each tolerance, with whose it is."""
    for tau, owners in sorted(taus.items()):
        axis.axhline(tau, color="black", linewidth=0.8, linestyle=":")
        whose = f" ({', '.join(owners) if len(owners) < 3 else f'{len(owners)} methods'})" if owners else ""
        where = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom", "fontsize": 8}
        axis.annotate(figures.literal(f"τ = {tau:g} %{whose}"), (0.99, tau), **where)
    axis.axhline(0, color="black", linewidth=0.5)


def _bands(histories: Histories) -> str:
    return "lines: means; " + figures.seeds([len(seeds) for seeds in histories.values() if seeds], "bands")

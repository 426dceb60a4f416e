"""Pictures of result records; errors in per cent, whiskers and bands ± sd over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from frlkit.report.tables import MEASURES

#: Recipes as figures and tables name them.
TITLES = {
    "natural": "Natural training",
    "pgd_at_half": "PGD-AT, half of each batch (report)",
    "pgd_at": "PGD-AT, whole batch (paper)",
    "trades": "TRADES",
    "uniform": "Retrained, equal weights (control)",
    "constant_margin": "Retrained at 12/255",
    "algorithm1_reweight": "Algorithm 1, Reweight",
    "algorithm1_remargin": "Algorithm 1, Remargin",
    "algorithm1_both": "Algorithm 1, Reweight + Remargin",
    "shrunk_margin": "Radii of hard classes shrunk",
    "algorithm1_remargin,alpha_margin=0": "Radii flat",
    "official_remargin,alpha_margin=0": "Authors' code, radii flat",
    "baseline_reweight": "Baseline reweight (Agarwal)",
    "official_uniform": "Authors' loop, equal weights (control)",
    "official_reweight": "Authors' code, Reweight",
    "official_remargin": "Authors' code, Remargin",
    "official_both": "Authors' code, Reweight + Remargin",
    "report_uniform": "Report's loop, equal weights (control)",
    "report_reweight,alpha_nat=1,alpha_bdy=1": "Report's Reweight 1:1",
    "report_reweight,alpha_nat=1,alpha_bdy=5": "Report's Reweight 1:5",
    "report_reweight,alpha_nat=5,alpha_bdy=1": "Report's Reweight 5:1",
    "report_remargin": "Report's Remargin, as published",
    "dafa": "DAFA",
}
COLOURS = ("#4c72b0", "#dd8452", "#8c2d04")  # natural, then robust at growing radii


def class_bars(errors: pd.DataFrame, order: Sequence[str], note: str) -> Figure:
    """Class-wise error bars, one panel per recipe: natural and under PGD at both radii; whiskers are ± sd over seeds.

    `order` sorts the classes, `note` says what data and seeds these are.
    """
    recipes = list(dict.fromkeys(errors["recipe"]))
    rows = -(-len(recipes) // 2)
    figure, axes = plt.subplots(
        rows, 2 if len(recipes) > 1 else 1, figsize=(13, 3.9 * rows), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, recipe in zip(axes.flat, recipes, strict=False):
        part = errors[errors["recipe"] == recipe]
        spread = "sd" if part["seed"].nunique() > 1 else None
        sns.barplot(
            part,
            x="class",
            y="error",
            hue="measure",
            hue_order=MEASURES,
            order=order,
            palette=list(COLOURS),
            errorbar=spread,
            ax=axis,
            err_kws={"linewidth": 1},
        )
        axis.set(title=TITLES.get(recipe, recipe), xlabel="", ylabel="error (%)", ylim=(0, 100))
        axis.set_xticks(axis.get_xticks(), order, rotation=35, ha="right")
        axis.get_legend().remove()
        axis.grid(axis="y", alpha=0.3)
    for axis in axes.flat[len(recipes) :]:
        axis.set_visible(False)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(note, x=0.01, ha="left", fontsize=11)
    return figure


def training_curves(histories: Mapping[str, Sequence[Mapping[str, Any]]], note: str) -> Figure:
    """Loss, and natural and robust error (average and worst class) on the validation split, epoch by epoch.

    Lines are means over seeds, bands ± sd.
    """
    rows = []
    for recipe, seeds in histories.items():
        for history in seeds:
            for epoch, entry in enumerate(history["epochs"], start=1):
                natural, robust = (100 * np.array(entry["validation"][kind]) for kind in ("natural", "robust"))
                values = (entry["loss"], natural.mean(), natural.max(), robust.mean(), robust.max())
                rows.append((TITLES.get(recipe, recipe), history["config"]["seed"], epoch, *values))
    panels = {
        "loss": "training loss (each recipe's own)",
        "average natural": "validation natural error, average (%)",
        "worst natural": "validation natural error, worst class (%)",
        "average robust": "validation PGD-10 8/255 error, average (%)",
        "worst robust": "validation PGD-10 8/255 error, worst class (%)",
    }
    frame = pd.DataFrame(rows, columns=["recipe", "seed", "epoch", *panels])
    spread = "sd" if frame["seed"].nunique() > 1 else None
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for axis, (column, title) in zip(axes.flat, panels.items(), strict=False):
        sns.lineplot(frame, x="epoch", y=column, hue="recipe", errorbar=spread, palette="colorblind", ax=axis)
        axis.set(title=title, ylabel="loss" if column == "loss" else "error (%)")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.get_legend().remove()
    axes[1, 2].axis("off")
    axes[1, 2].legend(*axes[0, 0].get_legend_handles_labels(), loc="center", frameon=False)
    figure.suptitle(note, x=0.01, ha="left", fontsize=11)
    return figure


def fairness_curves(histories: Mapping[str, Sequence[Mapping[str, Any]]], note: str) -> Figure:
    """Largest violation, and average and worst robust error, epoch by epoch on the validation split (paper, 3 and 5).

    A violation is a class's error minus the average, tolerance 0; epoch 0 is the model that retraining starts from.
    Lines are means over seeds, bands ± sd.
    """
    rows = []
    for recipe, seeds in histories.items():
        for history in seeds:
            scored = [history["start"]["validation"], *(entry["validation"] for entry in history["epochs"])]
            for epoch, errors in enumerate(scored):
                natural, robust = (100 * np.array(errors[kind]) for kind in ("natural", "robust"))
                boundary = robust - natural
                gaps = (natural.max() - natural.mean(), boundary.max() - boundary.mean())
                rows.append((TITLES.get(recipe, recipe), epoch, *gaps, robust.mean(), robust.max()))
    panels = {
        "natural": "largest natural violation (points)",
        "boundary": "largest boundary violation (points)",
        "average": "robust error, average (%)",
        "worst": "robust error, worst class (%)",
    }
    frame = pd.DataFrame(rows, columns=["recipe", "epoch", *panels])
    figure, axes = plt.subplots(1, 4, figsize=(15, 4.4), layout="constrained")
    for axis, (column, title) in zip(axes, panels.items(), strict=True):
        sns.lineplot(
            frame, x="epoch", y=column, hue="recipe", style="recipe", errorbar="sd", palette="colorblind", ax=axis
        )
        axis.set(title=title, ylabel="")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.get_legend().remove()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(note, x=0.01, ha="left", fontsize=11)
    return figure


def change_bars(changes: pd.DataFrame, note: str) -> Figure:
    """`value_bars` of `tables.against`: changes in percentage points."""
    return value_bars(changes, note, unit="change (points)")


def value_bars(scored: pd.DataFrame, note: str, unit: str = "error (%)") -> Figure:
    """Bars of `tables.scores`: one panel per column, one bar per recipe, whiskers ± sd over seeds."""
    figure, axes = plt.subplots(
        1,
        len(scored.columns),
        figsize=(15, 1.6 + 0.35 * scored.index.get_level_values(0).nunique()),
        sharey=True,
        layout="constrained",
    )
    frame = scored.reset_index()
    frame["recipe"] = frame["recipe"].map(lambda recipe: TITLES.get(recipe, recipe))
    for axis, column in zip(axes, scored.columns, strict=True):
        spread = "sd" if frame["seed"].nunique() > 1 else None
        sns.barplot(frame, y="recipe", x=column, errorbar=spread, color=COLOURS[0], ax=axis, err_kws={"linewidth": 1})
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title=column, xlabel=unit, ylabel="")
        axis.grid(axis="x", alpha=0.3)
    figure.suptitle(note, x=0.01, ha="left", fontsize=11)
    return figure


def grid_maps(scored: pd.DataFrame, columns: Sequence[str], note: str) -> Figure:
    """Heat maps of error (%) over two strengths: `scored` is indexed by (α natural, α boundary)."""
    figure, axes = plt.subplots(1, len(columns), figsize=(4.2 * len(columns), 3.8), layout="constrained")
    for axis, column in zip(axes, columns, strict=True):
        table = scored[column].unstack()
        sns.heatmap(table, annot=True, fmt=".1f", cmap="cividis", cbar=False, ax=axis)
        axis.set(title=f"{column} (%)", xlabel="α boundary", ylabel="α natural")
    figure.suptitle(note, x=0.01, ha="left", fontsize=11)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, and an SVG of the same name beside it; the same bytes for the same picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    with plt.rc_context({"svg.hashsalt": "frlkit"}):
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})

"""Pictures of result records; errors in per cent. Every picture says what its whiskers are and over how many seeds."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from frlkit.report import mechanism
from frlkit.report.names import title
from frlkit.report.tables import MEASURES, SECOND, SIGNS

COLOURS = ("#4c72b0", "#dd8452", "#8c2d04")  # natural, then robust at growing radii
MANY = 20  # classes


def literal(name: object) -> str:
    """A name as matplotlib shows it letter by letter: a dollar sign starts no formula."""
    return str(name).replace("$", r"\$")


def seeds(counts: Sequence[int], what: str = "whiskers") -> str:
    """What whiskers or bands are, for recipes of so many seeds each: "whiskers ± sd over 3 to 5 seeds"."""
    low, high = min(counts), max(counts)
    if high < 2:
        return f"one seed, no {what}"
    return f"{what} ± sd over {high if low == high else f'{low} to {high}'} seeds"


def _counts(frame: pd.DataFrame) -> pd.Series:
    """How many seeds each recipe of a table has, in the table's order."""
    return frame.groupby("recipe", sort=False)["seed"].nunique()


def heading(figure: Figure, *parts: str) -> None:
    """What a whole figure shows, above it: the parts that are not empty, in as many lines as its width asks for."""
    words = " · ".join(part for part in parts if part)
    lines = textwrap.wrap(words, int(12 * figure.get_figwidth()), break_long_words=False, break_on_hyphens=False)
    figure.suptitle(literal("\n".join(lines)), x=0.01, ha="left", fontsize=11)


def _named(recipe: str, counts: pd.Series) -> str:
    """A recipe's title; its number of seeds, too, where the recipes of a figure differ in it."""
    count = counts[recipe]
    return title(recipe) + (f" ({count} seed{'s' if count > 1 else ''})" if counts.nunique() > 1 else "")


def class_bars(errors: pd.DataFrame, order: Sequence[str], note: str) -> Figure:
    """Class-wise error bars, one panel per recipe: natural and under PGD at both radii.

    `errors` is `tables.tidy`'s; `order` sorts the classes, `note` says what data these are. The radius that signs are
    trained at takes the place of 8/255 there, CIFAR-10 has 4 and 8/255; many classes have a panel's row for themselves.
    """
    counts, there = _counts(errors), set(errors["measure"])
    signs, second = f"PGD-20 {SIGNS}/255", f"PGD-20 {SECOND}/255"
    measures = [MEASURES[0], signs if signs in there else MEASURES[1], MEASURES[2]]
    measures = [MEASURES[0], second, MEASURES[1]] if second in there else measures
    columns = 1 if len(counts) == 1 or len(order) > MANY else 2
    rows = -(-len(counts) // columns)
    shape = {"figsize": (13, 3.9 * rows), "sharey": True, "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(rows, columns, **shape)
    for axis, recipe in zip(axes.flat, counts.index, strict=False):
        _bars(axis, errors[errors["recipe"] == recipe], order, measures, COLOURS)
        axis.set_title(_named(recipe, counts))
    for axis in axes.flat[len(counts) :]:
        axis.set_visible(False)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    heading(figure, note, seeds(counts.tolist()))
    return figure


def _bars(
    axis: Axes, part: pd.DataFrame, order: Sequence[str], measures: Sequence[str], colours: Sequence[str]
) -> None:
    spread = "sd" if part["seed"].nunique() > 1 else None
    style = {"hue_order": measures, "palette": list(colours), "errorbar": spread, "err_kws": {"linewidth": 1}}
    sns.barplot(part, x="class", y="error", hue="measure", order=order, ax=axis, **style)
    axis.set(xlabel="", ylabel="error (%)", ylim=(0, 100))
    axis.set_xticks(axis.get_xticks(), [literal(name) for name in order], **_slant(len(order)))
    axis.get_legend().remove()
    axis.grid(axis="y", alpha=0.3)


def _slant(count: int) -> dict[str, Any]:
    """How the names of so many classes stand below an axis."""
    return {"rotation": 90, "fontsize": 8} if count > MANY else {"rotation": 35, "ha": "right"}


def before_after(errors: pd.DataFrame, before: str, after: str, order: Sequence[str], note: str) -> Figure:
    """The report's figures 2 and 3: natural and robust error (PGD-20 16/255) by class, (a) before and (b) after."""
    part = errors[errors["recipe"].isin([before, after]) & (errors["measure"] != MEASURES[1])]
    counts = _counts(part)
    measures, colours = (MEASURES[0], MEASURES[2]), (COLOURS[0], COLOURS[2])
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.2), sharey=True, layout="constrained")
    for letter, axis, recipe in zip("ab", axes, (before, after), strict=True):
        _bars(axis, part[part["recipe"] == recipe], order, measures, colours)
        axis.set_title(f"({letter}) {_named(recipe, counts)}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    heading(figure, note, seeds(counts.tolist()))
    return figure


def change_bars(changes: pd.DataFrame, note: str) -> Figure:
    """`value_bars` of changes, in percentage points."""
    return value_bars(changes, note, unit="change (points)")


def value_bars(scored: pd.DataFrame, note: str, unit: str = "error (%)") -> Figure:
    """Bars of `tables.scores`: one panel per column, one bar per recipe; all panels have one axis."""
    frame = scored.rename_axis(["recipe", "seed"]).reset_index()
    counts = _counts(frame)
    frame["recipe"] = frame["recipe"].map(lambda recipe: literal(_named(recipe, counts)))
    shape = {"figsize": (15, 1.6 + 0.35 * len(counts)), "sharey": True, "sharex": True, "layout": "constrained"}
    figure, axes = plt.subplots(1, len(scored.columns), squeeze=False, **shape)
    spread = "sd" if max(counts) > 1 else None
    for axis, column in zip(axes.flat, scored.columns, strict=True):
        sns.barplot(frame, y="recipe", x=column, errorbar=spread, color=COLOURS[0], ax=axis, err_kws={"linewidth": 1})
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title=column, xlabel=unit, ylabel="")
        axis.grid(axis="x", alpha=0.3)
    heading(figure, note, seeds(counts.tolist()))
    return figure


def pareto(scored: pd.DataFrame, pairs: Sequence[tuple[str, str]], note: str) -> Figure:
    """Average against worst class, one panel a pair of `tables.scores`' columns, every method a numbered, named point.

    The staircase bounds what some method reaches: no other beats those at its corners in both.
    """
    counts = _counts(scored.rename_axis(["recipe", "seed"]).reset_index())
    figure, axes = plt.subplots(1, len(pairs), figsize=(6.6 * len(pairs), 5.4), squeeze=False, layout="constrained")
    for axis, (average, worst) in zip(axes.flat, pairs, strict=True):
        means = mechanism.pareto(scored, average, worst)
        sd = scored[[average, worst]].groupby(level=0, sort=False).std().fillna(0)
        best = means[means["front"]].sort_values(average)
        axis.step(best[average], best[worst], where="post", color=COLOURS[1], linewidth=1.2, zorder=0)
        style = {"fmt": "o", "color": COLOURS[0], "elinewidth": 0.7, "markersize": 5}
        axis.errorbar(means[average], means[worst], xerr=sd[average], yerr=sd[worst], **style)
        axis.set(xlabel=f"{average} (%)", ylabel=f"{worst} class (%)", title=f"{worst} against {average}")
        axis.margins(0.12)
        axis.grid(alpha=0.3)
    lines = axes[0, 0].lines[:1]
    handles = [*lines, *(Line2D([], [], linestyle="none") for _ in counts)]
    labels = ["Pareto front", *(f"{k}  {literal(_named(recipe, counts))}" for k, recipe in enumerate(counts.index, 1))]
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8, handlelength=1)
    heading(figure, note, seeds(counts.tolist()))
    for axis, pair in zip(axes.flat, pairs, strict=True):
        means = scored[[*pair]].groupby(level=0, sort=False).mean()
        name_points(axis, *means.to_numpy().T, [str(number) for number in range(1, len(means) + 1)])
    return figure


def name_points(axis: Axes, x: Sequence[float], y: Sequence[float], labels: Sequence[str]) -> None:
    """Write each point's name beside it where no other name or point is, further off with a line to it if need be.

    Call it when the axes have their limits: where names meet depends on them.
    """
    size = 7.5  # of the type; all lengths here are points of a figure
    axis.figure.draw_without_rendering()
    places = axis.transData.transform(np.column_stack([x, y]).astype(float)) * 72 / axis.figure.dpi
    taken = [np.concatenate([place - 3, place + 3]) for place in places]
    ways = np.array([(1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (0, 1), (-1, 0), (0, -1)])
    for place, x_here, y_here, label in zip(places, x, y, labels, strict=True):
        half = np.array([0.6 * size * len(label), size]) / 2 + 0.5
        tried = [(gap, way * (gap + half)) for gap in (3, 8, 14, 20, 28) for way in ways]
        boxes = [np.concatenate([place + offset - half, place + offset + half]) for _, offset in tried]
        best = int(np.argmin([sum(_common(box, other) for other in taken) for box in boxes]))
        taken.append(boxes[best])
        gap, offset = tried[best]
        line = {"arrowstyle": "-", "linewidth": 0.5, "color": "grey", "shrinkA": 0, "shrinkB": 2} if gap > 3 else None
        style = {"textcoords": "offset points", "ha": "center", "va": "center", "fontsize": size, "arrowprops": line}
        axis.annotate(literal(label), (x_here, y_here), xytext=tuple(offset), **style)


def _common(box: np.ndarray, other: np.ndarray) -> float:
    """The area that two boxes (left, bottom, right, top) have in common."""
    return float(np.prod(np.clip(np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2]), 0, None)))


def one_class(table: pd.DataFrame, note: str) -> Figure:
    """Notebook 04's single classes: the change of a class's errors over its robust error at its own radius.

    `table` has a row a class, "own radius" (%) and columns "change, MEASURE" (points). Theory changes sign at 50 %.
    """
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    own = table["own radius"].astype(float)
    for measure, marker in zip(MEASURES, "os^", strict=True):
        axis.scatter(own, table[f"change, {measure}"].astype(float), marker=marker, label=measure)
    middle = table[f"change, {MEASURES[1]}"].astype(float)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.axvline(50, color="black", linewidth=0.8, linestyle="--", label="one half")
    axis.set(xlabel="robust error of the class at its own radius, 16/255 (%)", ylabel="change of its error (points)")
    axis.legend(frameon=False)
    heading(figure, note)
    name_points(axis, own, middle, list(table.index))
    return figure


def confusion_map(change: pd.DataFrame, note: str) -> Figure:
    """Heat map of a change of `mechanism.confusion`, in points of the true class's images.

    On the diagonal red is more images that are right, elsewhere more of this mistake.
    """
    figure, axis = plt.subplots(figsize=(11, 7), layout="constrained")
    size = float(np.abs(change.to_numpy()).max())
    labels = {"xticklabels": [literal(n) for n in change.columns], "yticklabels": [literal(n) for n in change.index]}
    change = change.round(1) + 0.0  # no minus zero
    style = {"cmap": "RdBu_r", "vmin": -size, "vmax": size, "annot": len(change) <= MANY, "fmt": ".1f"}
    bar = {"label": "points of the true class: on the diagonal right, elsewhere mistaken"}
    sns.heatmap(change, ax=axis, cbar_kws=bar, **style, **labels)
    axis.set(xlabel="ends in (target)", ylabel="true class (source)")
    axis.set_xticks(axis.get_xticks(), axis.get_xticklabels(), **_slant(len(change.columns)))
    axis.tick_params(axis="y", rotation=0, labelsize=8 if len(change) > MANY else None)
    heading(figure, note)
    return figure


def grid_maps(scored: pd.DataFrame, columns: Sequence[str], note: str) -> Figure:
    """Heat maps of error (%) over two strengths: `scored` is indexed by (α natural, α boundary)."""
    figure, axes = plt.subplots(1, len(columns), figsize=(4.2 * len(columns), 3.8), layout="constrained")
    for axis, column in zip(axes, columns, strict=True):
        table = scored[column].unstack()
        sns.heatmap(table, annot=True, fmt=".1f", cmap="cividis", cbar=False, ax=axis)
        axis.set(title=f"{column} (%)", xlabel="α boundary", ylabel="α natural")
    heading(figure, note)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, and an SVG of the same name beside it; the same bytes for the same picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    figure.set_layout_engine("none")  # everything has its place now: to find it again takes as long as drawing
    with plt.rc_context({"svg.hashsalt": "frlkit"}):
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})


def show(figure: Figure, path: Path) -> None:
    """Save a notebook's figure and display the very PNG that was written; pyplot forgets the figure."""
    from IPython.display import Image, display  # of notebooks: not in the base install

    save(figure, path)
    plt.close(figure)
    display(Image(path.read_bytes()))

"""The report card's pictures: narrow enough for a phone, each drawn for light and for dark pages."""

from __future__ import annotations

import io
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from frlkit.report import names
from frlkit.report.figures import literal

WIDTH = 4.8  # inches: at the page's scale a phone's width, so that letters stay readable there
LISTED = 30  # classes that a picture names; of more, the hardest
MATRIX = 100  # classes of a heat map, whose squares would be smaller than a pixel beyond
NAMED = 12  # classes of a heat map with numbers in it
#: Scheme -> ink, paper, lines, then colours: natural, boundary, hardest classes, easiest, verified.
SCHEMES = {
    "light": ("#1d2430", "#ffffff", "#d7dce3", "#4c72b0", "#dd8452", "#b3261e", "#11703a", "#64a281"),
    "dark": ("#e4e8ee", "#1d232c", "#38414e", "#7d9fd8", "#e39a6d", "#ff9b91", "#6fd39a", "#4f9470"),
}
_MAPS = {"light": "Reds", "dark": "magma"}


def drawn(draw: Callable[[str], Figure]) -> dict[str, bytes]:
    """A picture as PNG for each scheme: the same bytes for the same picture."""
    found = {}
    for scheme, (ink, paper, line, *_) in SCHEMES.items():
        inks = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")
        style: dict[str, Any] = dict.fromkeys(inks, ink) | {"axes.edgecolor": line, "grid.color": line, "font.size": 9}
        style |= dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), paper)
        style |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 8}
        with plt.rc_context(style), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of matplotlib, on letters that no font here has
            figure = draw(scheme)
            buffer, pixels = io.BytesIO(), io.BytesIO()
            figure.savefig(pixels, dpi=160)
            plt.close(figure)
            # Pages are mailed: 64 colours do, in a third of the bytes.
            Image.open(pixels).convert("RGB").quantize(64).save(buffer, "png", optimize=True)
        found[scheme] = buffer.getvalue()
    return found


def label(name: str, number: int) -> str:
    """A class's name as a picture can show it: short, on one line; its number where the font lacks its letters."""
    short = names.plain("".join(c for c in name if unicodedata.category(c)[0] != "C" or c.isspace()))
    short = short if len(short) <= 24 else f"{short[:23]}…"
    font = font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()
    return literal(short) if short and all(ord(letter) in font for letter in short) else f"class {number}"


def class_bars(audit: Mapping[str, Any], order: Sequence[int], intervals: Sequence[tuple[float, float]]) -> Any:
    """Natural plus boundary error is the robust error: a bar a class in this order, and the sum's interval."""

    def draw(scheme: str) -> Figure:
        ink, _, _, natural_colour, boundary_colour, *_ = SCHEMES[scheme]
        shown = list(order[:LISTED])
        natural, robust = (100 * np.array(audit[key])[shown] for key in ("natural", "robust"))
        low, high = 100 * np.array(intervals)[shown].T
        figure, axis = plt.subplots(figsize=(WIDTH, 1.3 + 0.24 * len(shown)), layout="constrained")
        rows = np.arange(len(shown))
        axis.barh(rows, natural, color=natural_colour, label="natural error (clean images)", height=0.7)
        axis.barh(rows, robust - natural, left=natural, color=boundary_colour, label="boundary error", height=0.7)
        ends = np.maximum([robust - low, high - robust], 0)
        style = {"fmt": "none", "ecolor": ink, "elinewidth": 1, "capsize": 2}
        axis.errorbar(robust, rows, xerr=ends, label="95 % interval of their sum, the robust error", **style)
        axis.set(xlim=(0, 100), xlabel="error (% of the class's images)", ylim=(len(shown) - 0.4, -0.6))
        axis.set_yticks(rows, [label(audit["class_names"][k], k) for k in shown])
        axis.grid(axis="x")
        axis.set_axisbelow(True)
        figure.legend(loc="outside upper left", ncols=1)
        return figure

    return drawn(draw)


def confusion(audit: Mapping[str, Any]) -> Any:
    """Heat map under attack: a row a true class (source), a column what it is taken for (target), % of the row."""

    def draw(scheme: str) -> Figure:
        table = np.array(audit["confusion"]["robust"], dtype=float)[:MATRIX, :MATRIX]
        shares = 100 * table / np.maximum(np.array(audit["labels_per_class"])[:MATRIX, None], 1)
        off = np.where(np.eye(*shares.shape, dtype=bool), np.nan, shares)  # the right ones would outshine all
        few = len(table) <= NAMED
        side = min(WIDTH - 0.3, 1.5 + 0.5 * len(table)) if few else WIDTH - 0.7  # a colour bar beside it
        figure, axis = plt.subplots(figsize=(WIDTH, side), layout="constrained")
        top = max(float(np.nanmax(off)), 1e-9)
        picture = axis.imshow(off, cmap=_MAPS[scheme], vmin=0, vmax=top)
        if few:
            for row, column in np.argwhere(np.round(np.nan_to_num(off)) >= 1):
                on_dark = (off[row, column] > 0.6 * top) == (scheme == "light")  # the maps run the other way round
                text = {"color": "white" if on_dark else SCHEMES["light"][0], "fontsize": 7}
                axis.text(column, row, f"{off[row, column]:.0f}", ha="center", va="center", **text)
        else:
            figure.colorbar(picture, ax=axis, shrink=0.6, label="% of the row's images")
        _ticks(axis, audit["class_names"][:MATRIX])
        said = ", by number" * (len(table) > LISTED)
        axis.set(xlabel=f"taken for (target{said})", ylabel=f"true class (source{said})")
        return figure

    return drawn(draw)


def _ticks(axis: Axes, class_names: Sequence[str]) -> None:
    """Names on both axes where there is room, else numbers."""
    if len(class_names) > LISTED:
        return
    shown = [label(name, number) for number, name in enumerate(class_names)]
    axis.set_xticks(range(len(shown)), shown, rotation=90, fontsize=8)
    axis.set_yticks(range(len(shown)), shown, fontsize=8)


def lines(audit: Mapping[str, Any], x: Sequence[float], robust: Any, ticks: Sequence[str], title: str) -> Any:
    """Lines over radii or rungs, `robust` (len(x), C) in fractions; the hardest three and the easiest named."""

    def draw(scheme: str) -> Figure:
        ink, _, line, _, boundary, hard, easy, _ = SCHEMES[scheme]
        errors = 100 * np.array(robust)
        rank = errors.sum(0).argsort()
        named = list(dict.fromkeys([*rank[::-1][:3].tolist(), int(rank[0])]))
        figure, axis = plt.subplots(figsize=(WIDTH, 3.6), layout="constrained")
        for k in rank.tolist():
            if k not in named:
                axis.plot(x, errors[:, k], color=line, linewidth=1)
        styles = [(hard, "-"), (hard, "--"), (hard, ":")][: len(named) - 1] + [(easy, "-")]
        for k, (colour, dash) in zip(named, styles, strict=True):
            axis.plot(x, errors[:, k], color=colour, linestyle=dash, label=label(audit["class_names"][k], k))
        axis.plot(x, errors.mean(1), color=ink, linewidth=2.2, label="mean over classes")
        axis.set(ylim=(0, 100), ylabel="error (%)", xlabel=title)
        if ticks:
            axis.set_xticks(list(x), ticks)
        axis.grid()
        figure.legend(loc="outside upper left", ncols=2)
        return figure

    return drawn(draw)


def certified(audit: Mapping[str, Any], order: Sequence[int]) -> Any:
    """Falsified by an attack, undecided, verified: a bar a class, in the order of `class_bars`."""

    def draw(scheme: str) -> Figure:
        _, _, line, _, boundary, *_, verified = SCHEMES[scheme]
        shown = list(order[:LISTED])
        figure, axis = plt.subplots(figsize=(WIDTH, 1.3 + 0.24 * len(shown)), layout="constrained")
        left = np.zeros(len(shown))
        for key, colour in (("falsified", boundary), ("undecided", line), ("verified", verified)):
            width = 100 * np.array(audit["certified"][key])[shown]
            axis.barh(range(len(shown)), width, left=left, color=colour, label=key, height=0.7)
            left += width
        axis.set(xlim=(0, 100), xlabel="% of the class's images", ylim=(len(shown) - 0.4, -0.6))
        axis.set_yticks(range(len(shown)), [label(audit["class_names"][k], k) for k in shown])
        figure.legend(loc="outside upper left", ncols=3)
        return figure

    return drawn(draw)


def compared(audits: Sequence[Mapping[str, Any]], order: Sequence[int]) -> Any:
    """Robust error by class, a mark an audit: hardest class of the first first."""

    def draw(scheme: str) -> Figure:
        ink, _, line, *colours = SCHEMES[scheme]
        shown = list(order[:LISTED])
        errors = 100 * np.array([np.array(audit["robust"])[shown] for audit in audits])
        figure, axis = plt.subplots(figsize=(WIDTH, 1.4 + 0.26 * len(shown)), layout="constrained")
        rows = np.arange(len(shown))
        axis.hlines(rows, errors.min(0), errors.max(0), color=line, linewidth=3, zorder=0)
        for number, (audit, values) in enumerate(zip(audits, errors, strict=True)):
            colour = ink if not number else colours[(number - 1) % len(colours)]
            style = {"marker": "|osD^v<>"[number % 8], "markersize": 9 if not number else 5, "linestyle": ""}
            style |= {"markeredgewidth": 1.5, "label": label(audit["title"], number)}
            apart = 0.12 * (number - (len(audits) - 1) / 2)  # marks of equal errors stay visible
            axis.plot(values, rows + apart, color=colour, **style)
        axis.set(xlim=(0, 100), xlabel="robust error (%)", ylim=(len(shown) - 0.4, -0.6))
        axis.set_yticks(rows, [label(audits[0]["class_names"][k], k) for k in shown])
        axis.grid(axis="x")
        figure.legend(loc="outside upper left", ncols=2)
        return figure

    return drawn(draw)

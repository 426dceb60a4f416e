"""An audit's report card: one HTML page that can be mailed, for readers who have not read the paper.

`write` draws one audit, or several of one data set side by side ("before", "control", ...): the page with its pictures
inside, the same pictures as PNG files beside it, and the numbers as JSON. Every sentence is computed from the numbers.
"""

from __future__ import annotations

import base64
import html
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from frlkit import KitError, checkpoint, took
from frlkit.evaluation import Attack
from frlkit.report import card_figures as draw
from frlkit.report import card_words as words
from frlkit.report import names, statistics
from frlkit.report.pages import TEMPLATES

FILE = "card.html"
LEVEL = 0.05
PAIRS = 8  # rows of the table of who is taken for whom


def write(audits: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """Write ``card.html``, ``card.json`` and ``card_*.png`` into a folder; returns the page's path.

    `audits` are what `frlkit.audit.audit` returns. Of several, the first is what the others are compared with, and
    each has a ``title``. Raises `KitError` where there is none, or where they are not of the same classes and attack.
    """
    known = _alike(audits)
    parts: list[dict[str, Any]] = []
    files = {}
    for number, audit in enumerate(known):
        found, suffix = summary(audit), f"_{number}" * (len(known) > 1)
        pictures = _pictures(audit, found)
        files |= {f"card_{name}{suffix}": both for name, both in pictures.items()}
        inline = {name: _inline(both) for name, both in pictures.items()}
        parts.append({"audit": audit, "summary": found, "pictures": inline, "says": words.sentences(audit, found)})
    versus = comparison(known)
    if versus:
        files["card_compared"] = draw.compared(known, np.argsort(-np.array(known[0]["robust"])).tolist())
        versus |= {"picture": _inline(files["card_compared"])}
    for name, both in files.items():
        checkpoint.write_atomically(folder / f"{name}.png", both["light"])
    kept = [{**part["audit"], "summary": part["summary"], "says": part["says"]} for part in parts]
    checkpoint.write_json(folder / "card.json", kept)
    checkpoint.write_atomically(folder / FILE, _page(parts, versus).encode())
    return folder / FILE


def _alike(audits: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The audits, each with a title; `KitError` where they cannot stand side by side."""
    if not audits:
        raise KitError("a report card needs an audit: give a list of one or more")
    known = [{"title": names.plain(audit.get("title") or audit["reading"]["model"]), **audit} for audit in audits]
    for audit in known[1:]:
        if other := [key for key in ("class_names", "labels_per_class", "attack") if audit[key] != known[0][key]]:
            raise KitError(f"{audit['title']} has another {other[0]} than {known[0]['title']}: audit both alike")
    if twice := [title for title, count in Counter(audit["title"] for audit in known).items() if count > 1]:
        raise KitError(f"title = {twice[0]!r} is there twice: give each audit of a card a title of its own")
    return known


def _pictures(audit: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """An audit's pictures by name, as `card_figures.drawn` gives them."""
    order = [each["number"] for each in found["classes"]]
    intervals = [each["robust_interval"] for each in sorted(found["classes"], key=lambda each: each["number"])]
    radii, errors = zip(*((point["eps_255"], point["robust"]) for point in audit["curve"]), strict=True)
    pictures = {
        "classes": draw.class_bars(audit, order, intervals),
        "confusion": draw.confusion(audit),
        "curve": draw.lines(audit, radii, errors, (), "radius ε of the attack (1/255)"),
    }
    if rungs := audit.get("ladder"):
        ticks = [str(rung["rung"]).replace(", ", ",\n", 1).replace(" (", "\n(") for rung in rungs]
        errors = [rung["robust"] for rung in rungs]
        pictures["ladder"] = draw.lines(audit, range(len(rungs)), errors, ticks, "attack, ever stronger")
    if "verified" in audit.get("certified", {}):
        pictures["certified"] = draw.certified(audit, order)
    return pictures


def _inline(both: Mapping[str, bytes]) -> dict[str, str]:
    return {name: f"data:image/png;base64,{base64.b64encode(content).decode()}" for name, content in both.items()}


def _page(parts: Sequence[Mapping[str, Any]], versus: Mapping[str, Any]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value.replace(" %", "\u00a0%") if isinstance(value, str) else value,  # on one line
    )
    environment.filters |= {"percent": words.percent, "bracket": _bracket, "named": words.named, "took": took}
    environment.globals |= {"attack": lambda values: str(Attack(**values)), "dataset": names.dataset}
    return environment.get_template("card.html.j2").render(
        parts=parts, versus=versus, limit=draw.LISTED, most=draw.MATRIX
    )


def _bracket(interval: Sequence[float]) -> str:
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def show(path: Path) -> None:
    """Display a card's page in a notebook, in a frame of its own, since a page's style is not a notebook's."""
    from IPython.display import HTML, display  # of notebooks: not in the base install

    page = html.escape(path.read_text(encoding="utf-8"))
    style = "width: 100%; height: 60rem; border: 1px solid #8884"
    display(HTML(f'<div><iframe srcdoc="{page}" style="{style}" title="report card"></iframe></div>'))


def summary(audit: Mapping[str, Any]) -> dict[str, Any]:
    """What the card says in numbers: fractions with 95 % intervals (Wilson), hardest class first.

    Returns ``classes`` (with ``taken_for``: the class that most of the attacked mistakes end in, or None), ``hardest``
    (`statistics.hardest`: is it established, and which classes it cannot be told from), ``spread`` of the natural,
    boundary and robust error over classes, ``pairs`` (source, target, share of the source's images), and ``receives``:
    the share of all mistakes that end in each class.
    """
    images = np.array(audit["labels_per_class"])
    wrong = {kind: np.round(np.array(audit[kind]) * images).astype(int) for kind in ("natural", "boundary", "robust")}
    intervals = {kind: statistics.wilson(counts, images) for kind, counts in wrong.items()}
    worst, p = statistics.hardest(wrong["robust"], images)
    taken = np.array(audit["confusion"]["robust"])[:, : len(images)].copy()
    np.fill_diagonal(taken, 0)
    classes = [
        {
            **{"number": k, "name": audit["class_names"][k], "images": int(images[k])},
            **{kind: float(audit[kind][k]) for kind in wrong},
            **{f"{kind}_interval": intervals[kind][k] for kind in wrong},
            "taken_for": int(taken[k].argmax()) if taken[k].any() else None,
        }
        for k in np.argsort(-wrong["robust"] / images, kind="stable").tolist()
    ]
    flat = np.argsort(-(taken / images[:, None]), axis=None, kind="stable")[:PAIRS]
    pairs = [tuple(map(int, np.unravel_index(place, taken.shape))) for place in flat]
    other = [float(p[k]) for k in range(len(images)) if k != worst]
    rivals = [each["number"] for each in classes if each["number"] != worst and p[each["number"]] >= LEVEL]
    return {
        "classes": classes,
        "hardest": {"class": worst, "p": max(other), "established": not rivals, "not_told_from": rivals},
        "spread": {kind: _spread(np.array(audit[kind])) for kind in wrong},
        "pairs": [
            {"source": s, "target": t, "images": int(taken[s, t]), "share": float(taken[s, t] / images[s])}
            for s, t in pairs
            if taken[s, t]
        ],
        "receives": (taken.sum(0) / max(taken.sum(), 1)).tolist(),
    }


def _spread(errors: np.ndarray) -> dict[str, float]:
    found = statistics.spread(errors[None], int(errors.argmax()))
    return {name: float(found[name][0]) for name in ("average", "worst", "range", "Gini")}


def comparison(audits: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several audits against the first, and against the control where one is titled so; {} for a single audit.

    ``rows`` has a row an audit; ``says`` the sentences. Differences of the hardest classes' robust errors come with a
    bootstrap 95 % interval over test images, drawn for each model on its own, which is wider than pairs would be.
    """
    if len(audits) < 2:
        return {}
    generator = np.random.default_rng(0)
    images = np.array(audits[0]["labels_per_class"])
    drawn = {
        audit["title"]: (generator.binomial(images, audit["robust"], (statistics.DRAWS, len(images))) / images).max(1)
        for audit in audits
    }
    rows = []
    for audit in audits:
        robust = _spread(np.array(audit["robust"]))
        natural = _spread(np.array(audit["natural"]))
        hardest = int(np.argmax(audit["robust"]))
        rows.append({"title": audit["title"], "natural": natural, "robust": robust, "hardest": hardest})
    first = audits[0]["title"]
    control = next((audit["title"] for audit in audits if re.search("control|equal weights", audit["title"], re.I)), "")
    worst = {row["title"]: row["robust"]["worst"] for row in rows}
    says = []
    for title in list(worst)[1:]:
        for reference in dict.fromkeys([first, control] if title != control else [first]):
            if reference:
                low, high = np.percentile(drawn[title] - drawn[reference], [2.5, 97.5])
                says.append(words.change(title, reference, worst[title] - worst[reference], float(low), float(high)))
    return {"rows": rows, "says": says, "class_names": audits[0]["class_names"]}

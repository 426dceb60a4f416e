"""An audit's report card: one HTML page that can be mailed, for readers who have not read the paper.

`write` draws one audit, or several of one data set side by side ("before", "control", ...): the page with its pictures
inside, the same pictures as PNG files beside it, and the numbers as JSON. Every sentence is computed from the numbers.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from frlkit import KitError, checkpoint, took
from frlkit.evaluation import Attack
from frlkit.report import card_figures as draw
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
    if not audits:
        raise KitError("a report card needs an audit: give a list of one or more")
    known = [{"title": names.plain(audit.get("title") or audit["reading"]["model"]), **audit} for audit in audits]
    for audit in known[1:]:
        if other := [key for key in ("class_names", "labels_per_class", "attack") if audit[key] != known[0][key]]:
            raise KitError(f"{audit['title']} has another {other[0]} than {known[0]['title']}: audit both alike")
    parts, files = [], {}
    for number, audit in enumerate(known):
        found = summary(audit)
        pictures, curve = {}, audit["curve"]
        order = [each["number"] for each in found["classes"]]
        in_order = [found["classes"][order.index(k)]["robust_interval"] for k in range(len(order))]
        pictures["classes"] = draw.class_bars(audit, order, in_order)
        pictures["confusion"] = draw.confusion(audit)
        radii = [point["eps_255"] for point in curve]
        pictures["curve"] = draw.lines(audit, radii, [p["robust"] for p in curve], (), "radius ε of the attack (1/255)")
        if rungs := audit.get("ladder"):
            ticks = [str(rung["rung"]).replace(", ", ",\n", 1).replace(" (", "\n(") for rung in rungs]
            errors = [rung["robust"] for rung in rungs]
            pictures["ladder"] = draw.lines(audit, range(len(rungs)), errors, ticks, "attack, ever stronger")
        if "verified" in audit.get("certified", {}):
            pictures["certified"] = draw.certified(audit, order)
        suffix = f"_{number}" if len(known) > 1 else ""
        files |= {f"card_{name}{suffix}": both for name, both in pictures.items()}
        inline = {name: _inline(both) for name, both in pictures.items()}
        parts.append({"audit": audit, "summary": found, "pictures": inline, "says": sentences(audit, found)})
    versus = comparison(known)
    if versus:
        worst_first = np.argsort(-np.array(known[0]["robust"])).tolist()
        files["card_compared"] = draw.compared(known, worst_first)
        versus |= {"picture": _inline(files["card_compared"])}
    for name, both in files.items():
        checkpoint.write_atomically(folder / f"{name}.png", both["light"])
    kept = [{**part["audit"], "summary": part["summary"], "says": part["says"]} for part in parts]
    checkpoint.write_json(folder / "card.json", kept)
    checkpoint.write_atomically(folder / FILE, _page(parts, versus).encode())
    return folder / FILE


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
    )
    environment.filters |= {"percent": percent, "bracket": _bracket, "named": named, "took": took}
    environment.globals |= {"attack": lambda values: str(Attack(**values)), "dataset": names.dataset}
    return environment.get_template("card.html.j2").render(parts=parts, versus=versus, limit=draw.LISTED)


def percent(share: float, digits: int = 1) -> str:
    """A fraction in per cent: "12.3 %"."""
    return f"{100 * share:.{digits}f} %"


def _bracket(interval: Sequence[float]) -> str:
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def named(name: str) -> str:
    """A class's name on one line, and something where it has none."""
    return names.plain(name) or "(no name)"


def _isolated(name: str) -> str:
    """A name within a sentence, whichever way its letters run (Unicode's isolates)."""
    return f"\u2068{named(name)}\u2069"


def summary(audit: Mapping[str, Any]) -> dict[str, Any]:
    """What the card says in numbers: fractions with 95 % intervals (Wilson), hardest class first.

    Returns ``classes`` (with ``taken_for``: the class that most of the attacked mistakes end in, or None), ``hardest``
    (`statistics.hardest`: is it established, and which classes it cannot be told from), ``spread`` of the natural,
    boundary and robust error over classes, the ``worst_interval`` of the hardest (bootstrap), ``pairs`` (source,
    target, share of the source's images), and ``receives``: the share of all mistakes that end in each class.
    """
    images = np.array(audit["labels_per_class"])
    wrong = {kind: np.round(np.array(audit[kind]) * images).astype(int) for kind in ("natural", "boundary", "robust")}
    intervals = {kind: statistics.wilson(counts, images) for kind, counts in wrong.items()}
    worst, p = statistics.hardest(wrong["robust"], images)
    rivals = [k for k in range(len(images)) if k != worst and p[k] >= LEVEL]
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
    return {
        "classes": classes,
        "hardest": {"class": worst, "p": max(other), "established": not rivals, "not_told_from": rivals},
        "spread": {kind: _spread(np.array(audit[kind])) for kind in wrong},
        "worst_interval": statistics.worst_interval(np.array([audit["robust"]]), images),
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


def sentences(audit: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, str]:
    """What each picture means, in one sentence or a few, by the picture's name; "trust" is about the whole."""
    called = [_isolated(name) for name in audit["class_names"]]
    eps = f"{audit['attack']['eps_255']:g}/255"
    worst, easiest, spread = found["classes"][0], found["classes"][-1], found["spread"]
    says = {
        "headline": f"On the images as they are, {percent(spread['natural']['average'])} are misclassified (mean over "
        f"classes); when every pixel may be changed by up to {eps}, {percent(spread['robust']['average'])}. "
        f"{called[worst['number']]} is hit hardest, {percent(worst['robust'])}; {called[easiest['number']]} least, "
        f"{percent(easiest['robust'])}.",
        "classes": _established(audit, found, called),
        "spread": _gap(spread),
        "confusion": _taken(found, called),
        "curve": _radii(audit, worst["number"], easiest["number"], called),
        "trust": f"{len(audit['doubts'])} reasons to doubt these numbers."
        if len(audit["doubts"]) > 1
        else "A reason to doubt these numbers."
        if audit["doubts"]
        else "The audit's checks found nothing suspicious: gradients are there to attack with, errors grow with the "
        "radius until every image falls, labels and predictions belong together.",
    }
    if audit.get("ladder"):
        says["ladder"] = _rungs(audit["ladder"], called)
    if audit.get("certified"):
        says["certified"] = _proved(audit["certified"])
    return says


def _established(audit: Mapping[str, Any], found: Mapping[str, Any], called: Sequence[str]) -> str:
    hardest, rivals = found["hardest"], [called[k] for k in found["hardest"]["not_told_from"]]
    if hardest["established"]:
        size = "p < 0.001" if hardest["p"] < 0.001 else f"p = {hardest['p']:.3f}"
        return (
            f"That {called[hardest['class']]} is the hardest class under attack is established: the distance to every "
            f"other class is more than chance ({size})."
        )
    listed = ", ".join(rivals[:4]) + (f" and {len(rivals) - 4} more" if len(rivals) > 4 else "")
    of = min(audit["labels_per_class"])
    return (
        f"Which class is hardest under attack is not established: {called[hardest['class']]} has the largest error, "
        f"but on so many images ({of} or more a class) it cannot be told from {listed}."
    )


def _gap(spread: Mapping[str, Mapping[str, float]]) -> str:
    before, after = spread["natural"]["range"], spread["robust"]["range"]
    moved = "widens this gap to" if after > before else "narrows this gap to" if after < before else "leaves it at"
    return (
        f"Between the hardest and the easiest class lie {100 * before:.1f} points on clean images; the attack {moved} "
        f"{100 * after:.1f}. The Gini coefficient, 0 where all classes err alike, is {spread['natural']['Gini']:.2f} "
        f"clean and {spread['robust']['Gini']:.2f} under attack."
    )


def _taken(found: Mapping[str, Any], called: Sequence[str]) -> str:
    if not found["pairs"]:
        return "The attack fools no image, so no class is taken for another."
    first, sink = found["pairs"][0], int(np.argmax(found["receives"]))
    source, target, all_told = called[first["source"]], called[first["target"]], percent(found["receives"][sink])
    return (
        f"Under attack {source} is taken for {target} in {percent(first['share'])} of its images, more than for any "
        f"other pair; {called[sink]} receives {all_told} of all mistakes."
    )


def _radii(audit: Mapping[str, Any], worst: int, easiest: int, called: Sequence[str]) -> str:
    curve = audit["curve"]

    def half(k: int) -> str:
        reached = [point["eps_255"] for point in curve if point["robust"][k] >= 0.5]
        if not reached:
            return f"never, up to {curve[-1]['eps_255']:g}/255"
        return "even without an attack" if reached[0] == 0 else f"from {reached[0]:g}/255 on"

    return (
        f"The larger the change an attacker may make, the more images fall: half of those of {called[worst]} "
        f"{half(worst)}, half of those of {called[easiest]} {half(easiest)}."
    )


def _rungs(ladder: Sequence[Mapping[str, Any]], called: Sequence[str]) -> str:
    means = [float(np.mean(rung["robust"])) for rung in ladder]
    text = f"Ever stronger attacks on {ladder[-1]['images']} images: the mean error is {percent(means[0])} at the "
    text += f"first rung and {percent(means[-1])} under {ladder[-1]['rung']}."
    if len(ladder) < 3:
        return text
    more = np.subtract(ladder[-1]["robust"], ladder[1]["robust"])
    missed = means[-1] - means[1]
    if missed <= 0:
        return f"{text} The strongest finds nothing that {ladder[1]['rung']} missed."
    worst = called[int(more.argmax())]
    return f"{text} {ladder[1]['rung']} missed {100 * missed:.1f} points of it, {100 * more.max():.1f} in {worst}."


def _proved(certified: Mapping[str, Any]) -> str:
    if "not_supported" in certified:
        return f"Nothing is proved: {certified['not_supported']}."
    verified, falsified, open_ = (float(np.mean(certified[key])) for key in ("verified", "falsified", "undecided"))
    return (
        f"It is proved that no change of up to {certified['eps_255']:g}/255, by whatever attack, fools the network on "
        f"{percent(verified)} of {certified['images']} images; attacks fool it on {percent(falsified)}; for the other "
        f"{percent(open_)} neither is known."
    )


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
                says.append(_change(title, reference, worst[title] - worst[reference], float(low), float(high)))
    return {"rows": rows, "says": says, "class_names": audits[0]["class_names"]}


def _change(title: str, reference: str, change: float, low: float, high: float) -> str:
    verdict = "lower" if high < 0 else "higher" if low > 0 else "not established to differ"
    points = [f"{100 * value:+.1f}".replace("-", "\u2212") for value in (change, low, high)]
    return (
        f"{_isolated(title)} against {_isolated(reference)}: the hardest class's robust error changes by {points[0]} "
        f"points [{points[1]}, {points[2]}]: {verdict}."
    )

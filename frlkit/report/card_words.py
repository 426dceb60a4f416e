"""The report card's sentences: what each picture means, computed from an audit and its `card.summary`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from frlkit.report import names


def percent(share: float, digits: int = 1) -> str:
    """A fraction in per cent: "12.3 %"."""
    return f"{100 * share:.{digits}f} %"


def named(name: str) -> str:
    """A class's name on one line, and something where it has none."""
    return names.plain(name) or "(no name)"


def isolated(name: str) -> str:
    """A name within a sentence, whichever way its letters run (Unicode's isolates)."""
    return f"“\u2068{named(name)}\u2069”"


def sentences(audit: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, str]:
    """What each picture means, in one sentence or a few, by the picture's name; "trust" is about the whole."""
    called = [isolated(name) for name in audit["class_names"]]
    eps = f"{audit['attack']['eps_255']:g}/255"
    worst, easiest, spread = found["classes"][0], found["classes"][-1], found["spread"]
    alike = worst["robust"] == easiest["robust"]
    hardest, least = (f"{called[each['number']]}, {percent(each['robust'])}" for each in (worst, easiest))
    if alike:
        hit = f"All classes are hit alike, {percent(worst['robust'])}."
    elif found["hardest"]["established"]:
        hit = f"Hit hardest is {hardest}; least {least}."
    else:
        hit = f"The largest error is that of {hardest} of its {worst['images']} images; the smallest of {least}."
    says = {
        "headline": f"On the images as they are, {percent(spread['natural']['average'])} are misclassified (mean over "
        f"classes); when every pixel may be changed by up to {eps}, {percent(spread['robust']['average'])}. {hit}",
        "classes": "No class is hardest: all err alike under attack." if alike else _established(audit, found, called),
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
    few, more = rivals[:4], len(rivals) - 4
    listed = ", ".join(few) + (f" and {more} more" if more > 0 else "")
    of = min(audit["labels_per_class"])
    return (
        f"Which class is hardest under attack is not established: {called[hardest['class']]} has the largest error, "
        f"but on so many images ({of} or more a class) it cannot be told from {listed}."
    )


def _gap(spread: Mapping[str, Mapping[str, float]]) -> str:
    before, after = spread["natural"]["range"], spread["robust"]["range"]
    way = "widens" if after > before else "narrows" if after < before else "leaves"
    moved = f"{way} this gap to" if way != "leaves" else "leaves it at"
    return (
        f"Between the hardest and the easiest class lie {100 * before:.1f} points on clean images; the attack {moved} "
        f"{100 * after:.1f}. The Gini coefficient, 0 where all classes err alike, is {spread['natural']['Gini']:.2f} "
        f"clean and {spread['robust']['Gini']:.2f} under attack."
    )


def _taken(found: Mapping[str, Any], called: Sequence[str]) -> str:
    if not found["pairs"]:
        return "The attack fools no image, so no class is taken for another."
    first, sink = found["pairs"][0], int(np.argmax(found["receives"]))
    often = (
        f"{called[first['source']]} is taken for {called[first['target']]} in {percent(first['share'])} of its images"
    )
    if len(called) == 2:
        return f"Under attack {often}. With two classes, a mistake can only be the other one."
    return (
        f"Under attack {often}, and no pair is more frequent; {called[sink]} receives "
        f"{percent(found['receives'][sink])} of all mistakes."
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


CERTIFIED = "certified"  # the ladder's last rung, which is no attack


def _rungs(ladder: Sequence[Mapping[str, Any]], called: Sequence[str]) -> str:
    attacks = [rung for rung in ladder if rung["rung"] != CERTIFIED]
    means = [float(np.mean(rung["robust"])) for rung in attacks]
    text = f"Ever stronger attacks on {attacks[-1]['images']} images: the mean error is {percent(means[0])} at the "
    text += f"first rung and {percent(means[-1])} under {attacks[-1]['rung']}."
    if len(attacks) > 2:
        more = np.subtract(attacks[-1]["robust"], attacks[1]["robust"])
        missed, worst = means[-1] - means[1], called[int(more.argmax())]
        if missed > 0:
            text += f" {attacks[1]['rung']} missed {100 * missed:.1f} points of it, {100 * more.max():.1f} in {worst}."
        else:
            text += f" The strongest finds nothing that {attacks[1]['rung']} missed."
    for rung in ladder[len(attacks) :]:
        most = percent(float(np.mean(rung["robust"])))
        text += f" No attack, known or not, can bring it above {most}: so much is proved."
    return text


def _proved(certified: Mapping[str, Any]) -> str:
    if "not_supported" in certified:
        return f"Nothing is proved: {certified['not_supported']}."
    verified, falsified, open_ = (float(np.mean(certified[key])) for key in ("verified", "falsified", "undecided"))
    return (
        f"It is proved that no change of up to {certified['eps_255']:g}/255, by whatever attack, fools the network on "
        f"{percent(verified)} of {certified['images']} images; attacks fool it on {percent(falsified)}; for the other "
        f"{percent(open_)} neither is known."
    )


def change(title: str, reference: str, change: float, low: float, high: float) -> str:
    verdict = "lower" if high < 0 else "higher" if low > 0 else "not established to differ"
    points = [f"{100 * value:+.1f}".replace("-", "\u2212") for value in (change, low, high)]
    return (
        f"{isolated(title)} against {isolated(reference)}: the hardest class's robust error changes by {points[0]} "
        f"points [{points[1]}, {points[2]}]: {verdict}."
    )

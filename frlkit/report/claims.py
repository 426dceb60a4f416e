"""Claims and their verdicts, after Holm's procedure over all comparisons of a notebook, and the tables that show them.

A notebook asks `judge` a list of questions, each made by one of `frlkit.report.rules` from numbers seed by seed; what
is claimed, by whom and of which data stands in ``statements.yaml``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from frlkit import KitError
from frlkit.report import names, statistics
from frlkit.report.rules import Comparison, Question

#: Of a claim about other data, "confirmed" reads "carries over", and so on.
CARRIED = {
    "confirmed": "carries over",
    "partly": "carries over in part",
    "refuted": "does not carry over",
}
VERDICTS = ("confirmed", "partly", "not established", "refuted", "not tested", *CARRIED.values())
MIME = "application/vnd.frlkit.claims+json"

LEVEL = 0.05
FEWEST_IMAGES = 1000  # to test on
FEWEST_EPOCHS = 5


@dataclass(frozen=True)
class Claim:
    """One row: what was claimed (and by whom), the numbers that bear on it, and what they say (one of `VERDICTS`).

    `dataset` is what the numbers were measured on, in words; `key` the claim's name in ``statements.yaml``.
    """

    claim: str
    evidence: str
    verdict: str
    dataset: str = ""
    key: str = ""

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise KitError(f"verdict = {self.verdict!r}: use one of {', '.join(VERDICTS)}")


@dataclass(frozen=True)
class Scope:
    """What verdicts are about: the data set, and why there can be none (empty where there can)."""

    dataset: str
    why_not: str = ""


def scope(records: Mapping[str, Sequence[Mapping[str, Any]]], images: int | None = None) -> Scope:
    """The scope of these records, recipe -> one per seed; few `images` (default: the records') or short runs allow no
    verdicts."""
    every = [record for seeds in records.values() for record in seeds]
    images = images or min(record["images"] for record in every)
    epochs = min(record["config"]["epochs"] for record in every)
    why_not = ""
    if images < FEWEST_IMAGES:
        why_not = f"{images} test images, {FEWEST_IMAGES} needed"
    elif epochs < FEWEST_EPOCHS:
        why_not = f"runs of {epochs} epochs, {FEWEST_EPOCHS} needed"
    return Scope(every[0]["config"]["dataset"], why_not)


@functools.cache
def statements() -> dict[str, dict[str, str]]:
    """Every claim that can be judged: key -> source, says and, where it was made about certain data, data."""
    return yaml.safe_load((Path(__file__).parent / "statements.yaml").read_text(encoding="utf-8"))


def judge(questions: Iterable[Question], about: Scope) -> list[Claim]:
    """Every question's claim with its verdict, after Holm's procedure over all comparisons of all questions.

    A comparison below 0.05 supports or contradicts; above, nothing is established. Raises `KitError` for a key that is
    not in ``statements.yaml``.
    """
    asked = list(questions)
    family = [c for question in asked for c in question.comparisons]  # untested ones too: theirs count as 1 till then
    adjusted = iter(statistics.holm([comparison.p for comparison in family]))
    found = []
    for question in asked:
        if question.key not in statements():
            raise KitError(f"claim {question.key!r} is unknown: write it into statements.yaml")
        verdicts, evidence = [], []
        for comparison in question.comparisons:
            p = next(adjusted)
            p = p if comparison.tested and not about.why_not else None
            verdicts.append(_verdict(comparison, p))
            evidence.append(comparison.says + ("" if p is None else f", p {_small(p)}"))
        verdict = together(verdicts)
        order = sorted(range(len(verdicts)), key=lambda k: _decides(verdict, verdicts[k], question.comparisons[k]))
        found.append(_claim(question.key, [evidence[k] for k in order], verdict, about))
    return found


def _decides(verdict: str, own: str, comparison: Comparison) -> tuple[bool, float]:
    """The order of a claim's evidence: first what its verdict hangs on, weakest support or clearest refutation."""
    if verdict == "confirmed":
        return False, -comparison.supports
    return own != verdict, comparison.contradicts if verdict == own == "refuted" else 0.0


def _verdict(comparison: Comparison, p: float | None) -> str:
    if p is None:
        return "not tested"
    if p >= LEVEL:
        return "not established"
    return "confirmed" if comparison.supports < comparison.contradicts else "refuted"


def _small(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _claim(key: str, evidence: list[str], verdict: str, about: Scope) -> Claim:
    stated = statements()[key]
    if stated.get("data", about.dataset) != about.dataset:
        verdict = CARRIED.get(verdict, verdict)
    reason = [f"({about.why_not})"] if about.why_not else []
    says = f"{stated['source']}: {stated['says']}"
    return Claim(says, " ".join(["; ".join(evidence), *reason]), verdict, names.dataset(about.dataset), key)


def together(verdicts: Iterable[str]) -> str:
    """One verdict on a claim of several parts: "partly" where some confirm and others were tested and do not.

    A part that was not tested leaves the claim untested, unless another refutes it and none confirms.
    """
    found = set(verdicts)
    if len(found) == 1:
        return found.pop()
    if "confirmed" not in found and "refuted" in found:
        return "refuted"
    if not found or "not tested" in found:
        return "not tested"
    return "partly" if "confirmed" in found else "not established"


def phrase(row: Mapping[str, str]) -> str:
    """A row's verdict with its data set: "confirmed on Fashion-MNIST", "carries over to GTSRB"."""
    if not row.get("dataset"):
        return row["verdict"]
    return f"{row['verdict']} {'to' if row['verdict'] in CARRIED.values() else 'on'} {row['dataset']}"


def show(title: str, claims: list[Claim]) -> None:
    """Display the table in a notebook: HTML, plain text, and a machine-readable copy that `from_notebook` finds."""
    from IPython.display import display  # of notebooks: not in the base install

    rows = [asdict(claim) for claim in claims]
    seen = [{"verdict": phrase(row), "claim": row["claim"], "evidence": row["evidence"]} for row in rows]
    with pd.option_context("display.max_colwidth", None, "display.html.use_mathjax", False):
        html = pd.DataFrame(seen).to_html(index=False, border=0)
    display({"text/html": html, "text/plain": plain(rows), MIME: {"title": title, "claims": rows}}, raw=True)


ANSWERS = {"confirmed": "Yes", "carries over": "Yes", "partly": "In part", "carries over in part": "In part"}
ANSWERS |= {"refuted": "No", "does not carry over": "No", "not established": "Open", "not tested": "Not tested"}


def answers(judged: Iterable[Claim], questions: Mapping[str, str]) -> None:
    """Display a notebook's takeaways: each question (by its claim's key) with the answer that the verdict gives, and
    what decided it."""
    from IPython.display import Markdown, display

    by_key = {claim.key: claim for claim in judged}
    lines = []
    for key, question in questions.items():
        claim = by_key[key]
        parts = claim.evidence if ANSWERS[claim.verdict] == "In part" else claim.evidence.split("; ")[0]
        lines.append(f"- **{question}** {ANSWERS[claim.verdict]}: {phrase(vars(claim))} ({parts}).")
    display(Markdown("\n".join(lines)))


def plain(rows: Sequence[Mapping[str, str]]) -> str:
    """The table as lines of text, verdict first, for a terminal."""
    width = max((len(phrase(row)) for row in rows), default=0)
    return "\n".join(f"{phrase(row):>{width}} | {row['claim']}\n{'':>{width}} | {row['evidence']}" for row in rows)


def from_notebook(cells: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every claims table among an executed notebook's cells, as {"title", "claims"} dictionaries."""
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return [output["data"][MIME] for output in outputs if MIME in output.get("data", {})]

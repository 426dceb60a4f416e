"""Claims tables: claim, evidence, verdict. A notebook shows one; ``python -m frlkit reproduce`` collects them all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from frlkit import KitError
from frlkit.report import tables

VERDICTS = ("confirmed", "partly", "not established", "refuted", "not tested")
MIME = "application/vnd.frlkit.claims+json"


@dataclass(frozen=True)
class Claim:
    """One row: what was claimed (and by whom), the numbers that bear on it, and what they say (one of `VERDICTS`)."""

    claim: str
    evidence: str
    verdict: str

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise KitError(f"verdict = {self.verdict!r}: use one of {', '.join(VERDICTS)}")


def lower(change: pd.Series, *, within: bool = False) -> str:
    """The verdict on "this is lower", from a change seed by seed: see `tables.established`.

    With `within`, a change that is not established still confirms: the claim is "at most".
    """
    if len(change) < 2:
        return "not tested"
    if tables.established(change):
        return "confirmed" if change.mean() < 0 else "refuted"
    return "confirmed" if within else "not established"


def together(verdicts: Iterable[str]) -> str:
    """One verdict on a claim about several methods: theirs where they agree, "partly" where some confirm."""
    found = set(verdicts)
    if len(found) == 1:
        return found.pop()
    if "not tested" in found:
        return "not tested"
    return "partly" if "confirmed" in found else "not established"


def opposite(verdict: str) -> str:
    """The verdict on "this is not lower", from `lower`'s: a change that is not established does not refute it."""
    return {"confirmed": "refuted", "refuted": "confirmed", "not established": "confirmed"}.get(verdict, verdict)


def show(title: str, claims: list[Claim]) -> None:
    """Display the table in a notebook: HTML, plain text, and a machine-readable copy that `from_notebook` finds."""
    from IPython.display import display  # of notebooks: not in the base install

    rows = [asdict(claim) for claim in claims]
    with pd.option_context("display.max_colwidth", None):
        html = pd.DataFrame(rows).to_html(index=False, border=0)
    display({"text/html": html, "text/plain": plain(rows), MIME: {"title": title, "claims": rows}}, raw=True)


def plain(rows: list[dict[str, str]]) -> str:
    """The table as lines of text, verdict first, for a terminal."""
    return "\n".join(f"{row['verdict']:>15} | {row['claim']}\n{'':>15} | {row['evidence']}" for row in rows)


def from_notebook(cells: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every claims table among an executed notebook's cells, as {"title", "claims"} dictionaries."""
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return [output["data"][MIME] for output in outputs if MIME in output.get("data", {})]

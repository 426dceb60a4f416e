"""What of both texts is examined: `coverage.yaml` against the records, notebooks and figures that are there.

Status of a row: R, the experiment reproduced, whatever it says (all its evidence is there, with its verdicts), P partly
(some of it, or an analogue), B built and not run, N not. The reason is what is missing, and the row's own words.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from frlkit import PROJECT, KitError
from frlkit.evaluation import Attack
from frlkit.records import read
from frlkit.report import claims, matrix, names, tables

SHORTER = " (first edition's length only)"
STATUSES = {"R": "experiment reproduced, whatever it says", "P": "partly", "B": "built, not run", "N": "not"}


class Shown(NamedTuple):
    """What a project's notebooks say and claim, read once."""

    project: Path
    verdicts: Mapping[str, str]  # claim's key -> verdict
    theory: Sequence[tuple[str, str]]  # notebook 02's claims and verdicts
    printed: Mapping[str, str]  # notebook's number -> all that its cells print
    elsewhere: Mapping[str, Mapping[str, Any]]  # data set -> claim's key -> row, of all data sets


def shown(project: Path = PROJECT) -> Shown:
    """Read the notebooks of a checkout. Raises `KitError` where one is no notebook."""
    verdicts, theory, printed = {}, [], {}
    for path in sorted((project / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        try:
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            printed[path.name[:2]] = "\n".join(_texts(cells))
            rows = [row for table in claims.from_notebook(cells) for row in table["claims"]]
        except (ValueError, KeyError, TypeError) as error:
            raise KitError(f"{path} is no notebook ({error}): take it from the repository again") from None
        verdicts |= {row["key"]: row["verdict"] for row in rows if row.get("key")}
        theory += [(row["claim"], row["verdict"]) for row in rows] if path.name.startswith("02") else []
    return Shown(project, verdicts, theory, printed, matrix.every(project))


def _texts(cells: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The texts among cells' outputs. What a cell says in its own words, code or prose, is no evidence."""
    for output in (output for cell in cells for output in cell.get("outputs", [])):
        texts = {"text/plain": output["text"]} if "text" in output else output.get("data", {})
        yield from ("".join(text) for kind, text in texts.items() if kind.startswith("text/"))


def _runs(evidence: Mapping[str, Any], found: Shown) -> str:
    """Missing runs of a title (or recipe), as words; empty where there are enough."""
    dataset, asked = evidence.get("data", "fashion_mnist"), evidence.get("seeds", 1)
    recipe = names.METHODS.get(evidence["runs"], evidence["runs"])  # as it stands now, not `names.edition`
    place = found.project / "checkpoints" / dataset

    def seeds(name: str) -> int:
        return len(list((place / name).glob("seed*/record.json")))

    if (count := seeds(recipe)) >= asked:
        return ""
    shorter = seeds(names.edition(recipe)) >= asked
    return f"{names.title(recipe)}{_where(evidence)}: {count} of {asked} seeds" + (SHORTER if shorter else "")


def _verdict(evidence: Mapping[str, Any], found: Shown) -> str:
    key = evidence["verdict"]
    if key not in claims.statements():
        raise KitError(f"coverage.yaml: claim {key!r} is unknown: use one of statements.yaml")
    return "" if _judged(evidence, found) != "not tested" else f"claim {key} not tested{_where(evidence)}"


def _judged(evidence: Mapping[str, Any], found: Shown) -> str:
    """The verdict on a claim, of the notebooks or, for other data, of what was collected of theirs."""
    if (data := evidence.get("data", matrix.HOME)) == matrix.HOME:
        return found.verdicts.get(evidence["verdict"], "not tested")
    return found.elsewhere[data].get(evidence["verdict"], {}).get("verdict", "not tested")


def _where(evidence: Mapping[str, Any]) -> str:
    return f" on {names.dataset(evidence['data'])}" if evidence.get("data", matrix.HOME) != matrix.HOME else ""


def _theory(evidence: Mapping[str, Any], found: Shown) -> str:
    words = evidence["theory"]
    there = any(words in claim and verdict != "not tested" for claim, verdict in found.theory)
    return "" if there else f"notebook 02 has no claim on {words}"


def _says(evidence: Mapping[str, Any], found: Shown) -> str:
    there = evidence["text"] in found.printed.get(evidence["says"], "")
    return "" if there else f"notebook {evidence['says']} does not print it"


def _attack(evidence: Mapping[str, Any], found: Shown) -> str:
    """Whether all records of a title on Fashion-MNIST have PGD-20 at a radius."""
    folder = found.project / "checkpoints" / "fashion_mnist" / names.recipe(evidence["of"])
    entries = [read(path)["attacks"] for path in sorted(folder.glob("seed*/record.json"))]
    wanted = asdict(Attack(evidence["attack"]))
    there = bool(entries) and all(any(entry["attack"] == wanted for entry in attacks) for attacks in entries)
    return "" if there else f"{evidence['of']}: no {Attack(evidence['attack'])}"


def _file(evidence: Mapping[str, Any], found: Shown) -> str:
    return "" if (found.project / evidence["file"]).exists() else f"no {evidence['file']}"


#: Kind of evidence -> what says, in words, what of it is missing.
KINDS: dict[str, Callable[[Mapping[str, Any], Shown], str]] = {
    "runs": _runs,
    "verdict": _verdict,
    "theory": _theory,
    "says": _says,
    "attack": _attack,
    "file": _file,
}


def rows() -> list[dict[str, Any]]:
    """`coverage.yaml`, row by row."""
    return yaml.safe_load(Path(__file__).with_name("coverage.yaml").read_text(encoding="utf-8"))


def status(row: Mapping[str, Any], found: Shown) -> tuple[str, str]:
    """A row's letter of `STATUSES`, and the reason where it is not R."""
    missing = _missing(row["shown"], found)
    lacking = [words for words in missing if words]
    if not lacking:
        return "R", ""
    reason = "; ".join([*dict.fromkeys(lacking), *([row["why"]] if "why" in row else [])])
    stands_in = "analogue" in row and not any(_missing(row["analogue"], found))
    if stands_in or len(lacking) < len(missing) or any(words.endswith(SHORTER) for words in lacking):
        return "P", reason
    return (
        "B" if row.get("built") or any({"runs", "verdict", "attack"} & set(e) for e in row["shown"]) else "N"
    ), reason


def _missing(evidence: Sequence[Mapping[str, Any]], found: Shown) -> list[str]:
    return [next(KINDS[kind](one, found) for kind in KINDS if kind in one) for one in evidence]


def table(project: Path = PROJECT) -> str:
    """All rows as Markdown: number, item, status, evidence, and what is missing."""
    found = shown(project)
    lines = []
    for row in rows():
        letter, reason = status(row, found)
        lines.append([row["row"], row["item"], letter, _evidence(row, found), reason])
    counts = Counter(line[2] for line in lines)
    total = ", ".join(f"{counts[letter]} {letter} ({words})" for letter, words in STATUSES.items())
    head = ["#", "item", "status", "evidence", "not R because"]
    asked = {(one["verdict"], _where(one)): one for row in rows() for one in row["shown"] if "verdict" in one}
    verdicts = Counter(_judged(asked[key], found) for key in sorted(asked))
    judged = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
    return f"{len(lines)} rows: {total}. Verdicts among their evidence: {judged}.\n\n{tables.markdown(head, lines)}"


def _evidence(row: Mapping[str, Any], found: Shown) -> str:
    words = []
    for one in row["shown"]:
        if "runs" in one:
            words.append(f"runs: {names.title(names.recipe(one['runs']))}")
        elif "verdict" in one:
            words.append(f"claim {one['verdict']}{_where(one)}: {_judged(one, found)}")
        elif "file" in one:
            words.append(f"`{one['file']}`")
        elif "attack" in one:
            words.append(f"PGD-20 at {one['attack']}/255")
        else:
            words.append(f"notebook {one.get('says', '02')}")
    return "; ".join(dict.fromkeys(words))

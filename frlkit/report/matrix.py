"""Which statements hold on which data: one table, claim × data set, from the claims of executed notebooks.

The committed notebooks are Fashion-MNIST's. What the same notebooks say of another data set's shipped runs is kept
beside those, in ``checkpoints/DATASET/claims.json`` (`collect`).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from frlkit import PROJECT, KitError, checkpoint
from frlkit.report import claims, names, tables

HOME = "fashion_mnist"
#: The columns, and of each why there may be nothing; SVHN is a user's own download.
DATASETS = {HOME: "not asked", **dict.fromkeys(("gtsrb", "gtsrb17", "cifar10"), "no runs"), "svhn": "no data"}
KEPT = "claims.json"
_NUMBER = re.compile(r": ((?:partial )?rho )?(-?\d[\d.]*(?: ± \d[\d.]*)?)( points| %|(?! seed)(?!\d))")
_REASON = re.compile(r"\d+ seeds?(?=, \d+ needed)|\((.* needed)\)$|no (?:partial )?rank correlation.*")
#: The keys of claims about the report's own recipes, which are Fashion-MNIST's.
_REPORTS = re.compile(r"report-|remargin-(worse|labels|variance|slightly)$")

Row = Mapping[str, Any]


def of_notebooks(paths: Iterable[Path]) -> dict[str, dict[str, Row]]:
    """The claims of executed notebooks: data set -> claim's key -> row. Raises `KitError` where one is no notebook."""
    known = {names.dataset(name): name for name in DATASETS}
    found: dict[str, dict[str, Row]] = {}
    for path in paths:
        try:
            shown = claims.from_notebook(json.loads(path.read_text(encoding="utf-8"))["cells"])
        except (ValueError, KeyError, TypeError) as error:
            raise KitError(f"{path} is no notebook ({error}): name a folder of executed ones") from None
        for row in (row for table in shown for row in table["claims"] if row.get("key")):
            if row["dataset"] in known:
                found.setdefault(known[row["dataset"]], {})[row["key"]] = {**row, "notebook": path.name[:2]}
    return found


def collect(folder: Path, project: Path = PROJECT) -> list[Path]:
    """Keep what the executed notebooks in a folder, such as ``frlkit reproduce``'s output, say of other data sets.

    What was known of claims that are not among them stays. Returns the files written; raises `KitError` where there are
    no such claims.
    """
    written = []
    for dataset, rows in of_notebooks(sorted(folder.rglob("[0-9][0-9]_*.ipynb"))).items():
        place = project / "checkpoints" / dataset
        if dataset != HOME and place.exists():
            kept = {**_kept(place), **rows}
            checkpoint.write_json(place / KEPT, {key: kept[key] for key in claims.statements() if key in kept})
            written.append(place / KEPT)
    if not written:
        raise KitError(f"no notebook in {folder} has claims about a data set of checkpoints/ other than {HOME}")
    return written


def _kept(place: Path) -> dict[str, Row]:
    path = place / KEPT
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise KitError(f"{path} cannot be read ({error}): delete it, and collect its claims again") from None


def every(project: Path = PROJECT) -> dict[str, dict[str, Row]]:
    """All that was judged: data set -> claim's key -> row."""
    own = of_notebooks(sorted((project / "notebooks").glob("[0-9][0-9]_*.ipynb")))
    return {name: {**own.get(name, {}), **_kept(project / "checkpoints" / name)} for name in DATASETS}


def cell(row: Row) -> str:
    """A verdict with its number, or the range of its comparisons' numbers; where there is none, why."""
    parts = row["evidence"].split("; ")
    numbers = [found for part in parts if (found := _NUMBER.search(part))]
    says = [f"{found[1] or ''}{found[2]}{found[3] or ''}" for found in numbers[:1]]
    middles = {float(text): text for text in (found[2].split()[0] for found in numbers)}  # -0.0 and 0.0 are one
    if len(middles) > 1:
        low, high = (middles[f(middles)] for f in (min, max))
        says = [f"{numbers[0][1] or ''}{low} to {high}{numbers[0][3] or ''}"]
    if row["verdict"] == "not tested":
        says += dict.fromkeys(found[1] or found[0] for part in parts if (found := _REASON.search(part)))
    lacking = [part.removesuffix(": no runs") for part in parts if part.endswith(": no runs")]
    if lacking and not says:
        return "no runs"
    text = ": ".join([row["verdict"], *([", ".join(says)] if says else [])])
    return f"{text}; no runs: {', '.join(lacking)}" if lacking else text


def table(project: Path = PROJECT) -> str:
    """Claim × data set as Markdown: verdict and number in each cell, or why there is none."""
    judged, lines = every(project), []
    for key, stated in claims.statements().items():
        if stated.get("data") == "two Gaussians" or key.startswith("own-"):  # of anyone's own model
            continue
        lines.append([f"{stated['source']}: {stated['says']}", *(_shown(judged, d, key) for d in DATASETS)])
    return tables.markdown(["claim", *map(names.dataset, DATASETS)], lines)


def _shown(judged: Mapping[str, Mapping[str, Row]], dataset: str, key: str) -> str:
    """A claim's cell, or why there is none: its notebook has not asked it of these data, or was not run on them."""
    found = cell(judged[dataset][key]) if key in judged[dataset] else DATASETS[dataset]
    asked = {row.get("notebook") for row in judged[dataset].values()}
    mine = {row.get("notebook") for rows in judged.values() for row in (rows.get(key, {}),) if row}
    elsewhere = _REPORTS.match(key) and found == "no runs"
    return "not asked there" if elsewhere or (key not in judged[dataset] and asked & mine) else found


def carried(project: Path = PROJECT) -> str:
    """How many of the paper's own statements hold on each data set, as Markdown."""
    judged = every(project)
    asked = [key for key, stated in claims.statements().items() if stated["source"].startswith("Paper")]
    counts = {d: Counter(re.split("[:;]", _shown(judged, d, key))[0] for key in asked) for d in judged}
    order = [*claims.CARRIED, *claims.CARRIED.values(), "not established", "not tested", "not asked there"]
    order += dict.fromkeys(DATASETS.values())
    lines = [[v, *(counts[d][v] or "" for d in judged)] for v in order if any(counts[d][v] for d in judged)]
    return tables.markdown([f"the paper's {len(asked)} statements", *map(names.dataset, DATASETS)], lines)

"""``python -m frlkit report``: the tables of README.md and REPORT.md, written from records, notebooks and benchmarks.

A table stands between ``<!-- table NAME -->`` and ``<!-- end -->``; everything else in a document is prose.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from frlkit import PROJECT, KitError, checkpoint, models, recipes, records
from frlkit.report import claims, published, tables

DOCUMENTS = ("README.md", "REPORT.md")
#: Retraining recipes of README's table, after the model that they start from.
FAIR = (
    *("pgd_at", "uniform", "baseline_reweight", "algorithm1_reweight", "algorithm1_remargin", "algorithm1_both"),
    *("official_uniform", "official_reweight", "official_both", "dafa"),
)
FAIR_SEEDS = range(5)


def refresh(project: Path = PROJECT) -> list[str]:
    """Write every table anew; returns the documents that changed. Raises `KitError` for an unknown table's name."""
    changed = []
    for name in DOCUMENTS:
        text = (project / name).read_text()
        fresh = re.sub(r"(<!-- table (.+?) -->\n).*?(<!-- end -->)", _replacement, text, flags=re.DOTALL)
        if fresh != text:
            checkpoint.write_atomically(project / name, fresh.encode())
            changed.append(name)
    return changed


def _replacement(found: re.Match[str]) -> str:
    if found[2] not in TABLES:
        raise KitError(f"table {found[2]!r} is unknown: use one of {', '.join(TABLES)}")
    return f"{found[1]}{TABLES[found[2]]()}\n{found[3]}"


def shipped(recipes: Sequence[str], seeds: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """Test records of shipped runs on Fashion-MNIST, recipe -> one per seed."""
    place = PROJECT / "checkpoints" / "fashion_mnist"
    return {
        recipe: [records.read(place / recipe / f"seed{seed}" / "record.json") for seed in seeds] for recipe in recipes
    }


def disparity() -> str:
    summary = tables.summary(tables.tidy(shipped(list(recipes.BASE), range(5))))
    names = ("natural", "8/255", "16/255")
    head = ["", *(f"{name}, {part}" for name in names for part in ("average", "worst"))]
    cells = [(measure, part) for measure in tables.MEASURES for part in ("average", "worst")]
    rows = [[recipe, *(summary.loc[(recipe, measure), part] for measure, part in cells)] for recipe in recipes.BASE]
    return tables.markdown(head, rows)


def fairness() -> str:
    means = tables.means(tables.scores(shipped(FAIR, FAIR_SEEDS)))
    return tables.markdown(["", *means.columns], [[recipe, *row] for recipe, row in means.iterrows()])


def claims_of(number: str) -> Callable[[], str]:
    def render() -> str:
        (notebook,) = (PROJECT / "notebooks").glob(f"{number}_*.ipynb")
        found = claims.from_notebook(json.loads(notebook.read_text())["cells"])
        rows = [[row["claim"], row["evidence"], row["verdict"]] for table in found for row in table["claims"]]
        return tables.markdown(["claim", "evidence", "verdict"], rows)

    return render


def speed() -> str:
    """Both paths' ratios, from ``benchmarks/results_*.json``."""
    found = [json.loads(path.read_text()) for path in sorted((PROJECT / "benchmarks").glob("results_*.json"))]
    rows = []
    for number, first in enumerate(found[0]["rows"]):
        cells = [table["rows"][number] for table in found]
        texts = [f"{row['ratio']} × ({row['lowest']} to {row['highest']}), {row['images_per_s']:,}/s" for row in cells]
        rows.append([first["work"], f"{first['baseline_images_per_s']:,}/s", *texts])
    frl = [table["frl_epoch"] for table in found]
    texts = [f"{row['ratio']} × ({row['kit_s']} s)" for row in frl]
    rows.append(["FRL epoch, the report's way", f"{frl[0]['report_s']} s", *texts])
    return tables.markdown(["", "baseline", *(table["kernel"] for table in found)], rows)


UNMEASURED = "not measured yet"


def paper_scale() -> str:
    """CIFAR-10 at the paper's scale: paper, independent reruns, ours where ``checkpoints/cifar10`` has a record."""

    def ours(recipe: str) -> dict[str, Any]:
        path = PROJECT / "checkpoints" / "cifar10" / recipe / "seed0" / "record.json"
        return records.read(path) if path.exists() else {}

    rows = []
    found = ours("pgd_at")
    for name, errors in published.PAPER_CIFAR10.items():
        for kind, value in errors.items():
            mine = UNMEASURED
            if found:
                measured = found["natural"] if kind == "natural" else records.robust_errors(found, 8)
                mine = f"{100 * measured[found['class_names'].index(name)]:.1f}"
            rows.append([f"PGD-AT, {name}, {kind} error", f"{value:.1f}", "", mine])
    for recipe, columns in published.RERUNS.items():
        found = ours(recipe)
        scored = tables.scores({recipe: [found]}).iloc[0] if found else {}
        for column, value in columns.items():
            rows.append([f"{recipe}, {column}", "", value, f"{scored[column]:.1f}" if found else UNMEASURED])
    rows += [[f"{name}, any method", "no numbers in the text", "", UNMEASURED] for name in ("SVHN", "GTSRB")]
    return tables.markdown(["CIFAR-10, errors in %", "paper", "reruns by others", "ours"], rows)


def cost() -> str:
    """Seconds of a training step at the paper's scale, from ``benchmarks/paper.json``, and hours extrapolated."""
    found = json.loads((PROJECT / "benchmarks" / "paper.json").read_text())
    rows = [
        [
            f"{models.TITLES[row['model']]}, {row['way']}",
            f"{row['step_s']} s ({row['lowest_s']} to {row['highest_s']})",
            f"{row['images_per_s']}/s",
            f"{row['extrapolated_hours']:.0f} h",
        ]
        for row in found["cost"]
    ]
    head = [f"{found['device']}, batch {found['cost'][0]['batch']}", "one step", "images", "extrapolated"]
    return tables.markdown(head, rows)


def slice_() -> str:
    """The 3-layer CNN on a tenth of CIFAR-10, JPEG re-encoded, from its shipped records."""
    place = PROJECT / "checkpoints" / "folder-cifar10-jpeg-slice"
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(place.glob("*/seed*/record.json")):
        found.setdefault(path.parents[1].name, []).append(records.read(path))
    means = tables.means(tables.scores({recipe: found[recipe] for recipe in recipes.BASE if recipe in found}))
    return tables.markdown(["", *means.columns], [[recipe, *row] for recipe, row in means.iterrows()])


TABLES: dict[str, Callable[[], str]] = {
    "disparity": disparity,
    "fairness": fairness,
    "speed": speed,
    "paper": paper_scale,
    "cost": cost,
    "slice": slice_,
    **{f"claims {number}": claims_of(number) for number in ("01", "02", "03", "04", "05")},
}

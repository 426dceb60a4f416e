"""``python -m frlkit report``: the tables of README, REPORT and docs/, written from records, notebooks and benchmarks.

A table stands between ``<!-- table NAME -->`` and ``<!-- end -->``; everything else in a document is prose.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from frlkit import PROJECT, KitError, checkpoint, models, recipes, records
from frlkit.report import cards, claims, coverage, front, matrix, names, published, tables

DOCUMENTS = ("README.md", "REPORT.md", "docs/results.md", "docs/speed.md")
CARD = "checkpoints/README.md"
#: README's retrained models, by title; those without finished runs are left out.
FAIR = (
    *("PGD-AT", "TRADES", "Control", "Natural multipliers alone"),
    *("Reweight", "Remargin", "Reweight + Remargin", "DAFA"),
    *("Baseline control", "Baseline reweight", "Biases of PGD-AT moved", "Biases of the control moved"),
    "Output norms of PGD-AT tuned",
    *(title for title in names.METHODS if title.startswith("Authors'")),
)
UNMEASURED = "not measured yet"
_TABLE = re.compile(r"(<!-- table (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def refresh(project: Path = PROJECT) -> list[str]:
    """Write every table anew, and the models' card; returns the documents that changed.

    Raises `KitError` for an unknown table's name.
    """
    changed = {name: text for name, text in _fresh(project).items() if text != _read(project / name)}
    for name, text in changed.items():
        checkpoint.write_atomically(project / name, text.encode("utf-8"))
    return list(changed)


def check(project: Path = PROJECT) -> list[str]:
    """Where documents and records disagree, in sentences; empty where they agree. Writes nothing."""
    found = []
    for name, fresh in _fresh(project).items():
        before, after = (_tables(text) for text in (_read(project / name), fresh))
        stale = [table for table in after if before.get(table) != after[table]]
        found += [f"{name}: table {table!r} is not what its records say: run frlkit report" for table in stale]
        if not stale and _read(project / name) != fresh:
            found.append(f"{name} is not what its records say: run frlkit report")
    return found


def _fresh(project: Path) -> dict[str, str]:
    """Every document as it should be."""
    made = {name: _TABLE.sub(_replacement, _read(project / name)) for name in DOCUMENTS}
    return {**made, **({CARD: cards.card(project)} if (project / CARD).parent.exists() else {})}


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _tables(text: str) -> dict[str, str]:
    return {found[2]: found[0] for found in _TABLE.finditer(text)}


def _replacement(found: re.Match[str]) -> str:
    if found[2] not in TABLES:
        raise KitError(f"table {found[2]!r} is unknown: use one of {', '.join(TABLES)}")
    return f"{found[1]}{TABLES[found[2]]()}\n{found[3]}"


def shipped(titles: Sequence[str], dataset: str = "fashion_mnist") -> dict[str, list[dict[str, Any]]]:
    """Test records of shipped runs on a data set, recipe -> one per seed; those titles that have any."""
    place = PROJECT / "checkpoints" / dataset
    found = {recipe: sorted((place / recipe).glob("seed*/record.json")) for recipe in map(names.recipe, titles)}
    return {recipe: [records.read(path) for path in paths] for recipe, paths in found.items() if paths}


def disparity() -> str:
    found = shipped(list(recipes.BASE))
    summary = tables.summary(tables.tidy(found))
    head = ["", *(f"{name}, {part}" for name in ("natural", "8/255", "16/255") for part in ("average", "worst"))]
    cells = [(measure, part) for measure in tables.MEASURES for part in ("average", "worst")]
    rows = [[f"`{r}`", *(summary.loc[(r, measure), part] for measure, part in cells)] for r in found]
    return tables.markdown(head, rows)


def fairness(titles: Sequence[str] = FAIR, dataset: str = "fashion_mnist") -> str:
    """The paper's Table 1: average and worst class of each error of these titles that have shipped runs.

    For CIFAR-10 its Tables 3 and 4's best classes, and its Figure 1's other radius where the records have it.
    """
    found = shipped(titles, dataset)
    if not found:
        return UNMEASURED
    means, paper = tables.means(tables.scores(found)), dataset == "cifar10"
    more = {f"{kind} best": (kind.replace("robust", tables.MEASURES[1]), "best") for kind in ("natural", "robust")}
    second = f"PGD-20 {tables.SECOND}/255"
    more |= {f"{tables.SECOND}/255 {part}": (second, part) for part in ("average", "worst")}
    rows = []
    for recipe, row in means.iterrows():
        every = tables.summary(tables.tidy({recipe: found[recipe]})).stack().to_dict() if paper else {}
        cells = [every.get((recipe, *where), "") for where in more.values()] if paper else []
        rows.append([names.title(recipe), *row, *cells, len(found[recipe])])
    return tables.markdown(["", *means.columns, *(more if paper else ()), "seeds"], rows)


def claims_of(number: str) -> Callable[[], str]:
    def render() -> str:
        (notebook,) = (PROJECT / "notebooks").glob(f"{number}_*.ipynb")
        found = claims.from_notebook(json.loads(notebook.read_text(encoding="utf-8"))["cells"])
        rows = [[claims.phrase(row), row["claim"], row["evidence"]] for table in found for row in table["claims"]]
        return tables.markdown(["verdict", "claim", "evidence"], rows)

    return render


def speed() -> str:
    """Both paths' ratios, from ``benchmarks/results_*.json``."""
    found = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted((PROJECT / "benchmarks").glob("results_*.json"))
    ]
    rows = []
    for number, first in enumerate(found[0]["rows"]):
        cells = [table["rows"][number] for table in found]
        texts = [f"{row['ratio']} × ({row['lowest']} to {row['highest']}), {row['images_per_s']:,}/s" for row in cells]
        rows.append([first["work"], f"{first['baseline_images_per_s']:,}/s", *texts])
    frl = [table["frl_epoch"] for table in found]
    texts = [f"{row['ratio']} × ({row['kit_s']} s)" for row in frl]
    rows.append(["FRL epoch, the report's way", f"{frl[0]['report_s']} s", *texts])
    return tables.markdown(["", "baseline", *(table["kernel"] for table in found)], rows)


def paper_scale() -> str:
    """CIFAR-10: the paper's text, independent reruns, and the shipped runs, a column a network, means over seeds."""
    networks: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for recipe, seeds in shipped(list(names.METHODS), "cifar10").items():
        networks.setdefault(seeds[0]["config"]["model"], {})[recipe.partition(",model=")[0]] = seeds
    heads = [f"ours, {models.TITLES[network]}" for network in networks] or ["ours"]

    def ours(title: str, measured: Callable[[tables.Records], float]) -> list[str]:
        recipe = names.recipe(title)
        there = [{recipe: runs[recipe]} if recipe in runs else {} for runs in networks.values()] or [{}]
        return [f"{measured(found):.1f}" if found else UNMEASURED for found in there]

    rows = []
    for name, errors in published.PAPER_CIFAR10.items():
        for kind, value in errors.items():
            measure = "natural" if kind == "natural" else "PGD-20 8/255"
            cells = ours("PGD-AT", lambda r, n=name, m=measure: tables.classwise(tables.tidy(r), "pgd_at", m)[n].mean())
            rows.append([f"PGD-AT, {name}, {kind} error", f"{value:.1f}", "", *cells])
    for title, columns in published.RERUNS.items():
        for column, value in columns.items():
            cells = ours(title, lambda r, c=column: tables.scores(r)[c].mean())
            rows.append([f"{title} (others: the authors' code), {column}", "", value, *cells])
    rows += [["SVHN, any method", "no numbers in the text", "", *(UNMEASURED for _ in heads)]]
    return tables.markdown(["CIFAR-10, errors in %", "paper", "reruns by others", *heads], rows)


def signs() -> str:
    """The paper's Tables 2 and 4 from shipped runs on GTSRB: averages over classes and images, worst and best class."""
    lines = []
    for dataset in ("gtsrb", "gtsrb17"):
        found = shipped(list(names.METHODS), dataset)
        table = tables.statistics(tables.tidy(found)).to_dict("index") if found else {}
        for recipe, seeds in found.items():
            scored, first = tables.scores({recipe: seeds}).mean(), seeds[0]
            clean, attacked = (table[recipe, measure] for measure in ("natural", f"PGD-20 {tables.SIGNS}/255"))
            parts = ("average", "average over images", "worst", "best")
            cells = [clean[part] for part in parts] + [scored[f"boundary {part}"] for part in ("average", "worst")]
            cells = [f"{value:.1f}" for value in (*cells, *(attacked[part] for part in parts))]
            sizes = dict(zip(first["class_names"], first["training_counts"], strict=True))
            hardest = dict.fromkeys(row["worst class"] for row in (clean, attacked))
            cells.append("; ".join(f"{name} ({sizes[name]:,})" if name in sizes else name for name in hardest))
            about = f"{names.dataset(dataset)}, {names.title(recipe)}"
            lines.append([about, *cells, tables.trained_on(first), len(seeds)])
    kinds = ("average over classes", "over images", "worst", "best")
    head = [f"natural, {part}" for part in kinds] + ["boundary, average over classes", "boundary, worst"]
    head += [f"{tables.SIGNS}/255, {part}" for part in kinds] + ["worst class, clean; attacked (its training images)"]
    return tables.markdown(["", *head, "training images", "seeds"], lines) if lines else UNMEASURED


def steps() -> str:
    """Cheaper attacks in training beside ten steps, class by class: from the shipped runs of ``sweeps/steps.yaml``."""
    lines = []
    for dataset, eps in (("fashion_mnist", 8), ("gtsrb", tables.SIGNS), ("gtsrb17", tables.SIGNS)):
        for recipe in ("pgd_at,steps=5", "n_fgsm", "pgd_at,precision=float32"):
            errors = tables.tidy(found) if len(found := shipped([recipe, "pgd_at"], dataset)) == 2 else None
            for measure in () if errors is None else ("natural", f"PGD-20 {eps}/255"):
                ours, ten = (tables.classwise(errors, r, measure) for r in (recipe, "pgd_at"))
                change = (ours - ten).dropna()
                most = change.mean().abs().sort_values(ascending=False, kind="stable").index[:3]
                changes = ", ".join(f"{name} {change.mean()[name]:+.1f} ({ten.std()[name]:.1f})" for name in most)
                cells = [tables.plus_minus(change.mean(axis=1)), changes]
                lines.append([names.dataset(dataset), names.title(recipe), measure, *cells, len(change)])
    head = ["", "recipe", "error", "average", "classes that change most (their sd over seeds)", "seeds"]
    return tables.markdown(head, lines) if lines else UNMEASURED


def split() -> str:
    """What a validation split drawn image by image hides: from ``benchmarks/split.json``."""
    path = PROJECT / "benchmarks" / "split.json"
    if not path.exists():
        return UNMEASURED
    found = json.loads(path.read_text(encoding="utf-8"))
    lines = []
    for run in found["runs"]:
        cells = [
            f"{run[part][f'{kind} mean']:.1f}" for kind in ("natural", "robust") for part in ("validation", "test")
        ]
        hidden = [f"{run['optimism_points'][f'{kind} mean']:.1f}" for kind in ("natural", "robust")]
        lines.append([names.title(run["recipe"]), run["split"], *cells[:2], hidden[0], *cells[2:], hidden[1]])
    head = [f"{kind}, {part}" for kind in ("natural", "robust") for part in ("validation", "test", "optimism")]
    return tables.markdown(["", "split", *head], lines)


def colour() -> str:
    """Colour networks: both libraries and the kit in each number format, from ``benchmarks/colour.json``."""
    path = PROJECT / "benchmarks" / "colour.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"device": "", "rows": []}
    lines = []
    for row in found["rows"]:
        cells = []
        for label in ("torchattacks", "adv-lib", "kit, float32", "kit, bf16"):
            way = row["ways"].get(label)
            beside = [f"{way[k]['ratio']} ×" for k in ("torchattacks", "adv-lib") if way and k in way]
            text = f"{way['images_per_s']}/s" if way else "measures in float32"
            cells.append(f"{text} ({' and '.join(beside)})" if beside else text)
        dataset = {"cnn3": "gtsrb", "cnn4": "gtsrb17"}.get(row["model"], "cifar10")
        trained = recipes.configure("pgd_at", dataset, 0, model=row["model"]).precision.replace("tf32", "float32")
        title = f"{models.TITLES[row['model']]}, {row['work']}, batch {row['batch']}"
        epoch = f"{row['ways'][f'kit, {trained}']['epoch_s']:,} s, {trained}" if row["work"].startswith("train") else ""
        lines.append([title, *cells, epoch])
    head = [found["device"], "torchattacks", "adv-lib", "kit, float32", "kit, bf16", "an epoch, as trained"]
    return tables.markdown(head, lines)


def colour_formats() -> str:
    """What bf16 in the attack changes in a trained run, beside another attack seed: from ``benchmarks/colour.json``."""
    path = PROJECT / "benchmarks" / "colour.json"
    found = json.loads(path.read_text(encoding="utf-8")).get("formats") if path.exists() else None
    if not found:
        return UNMEASURED
    changed = {**found["largest_class_difference_points"]}
    changed["another attack seed"] = found["largest_class_difference_of_attack_seeds_points"]
    images = f"{found['test_images']:,} images, {found['smallest_class']} in the smallest class"
    head = [f"{found['device']}; {found['run']}, {found['attack']}; {images}", "largest change of a class, points"]
    return tables.markdown(head, [[name, value] for name, value in changed.items()])


def certificates() -> str:
    """Seconds an image and tightness of CROWN's bounds, beside another library's: ``benchmarks/certificates.json``."""
    path = PROJECT / "benchmarks" / "certificates.json"
    if not path.exists():
        return UNMEASURED
    found = json.loads(path.read_text(encoding="utf-8"))
    plain = found["seconds"]["frlkit, CROWN"]
    lines = []
    for name, seconds in found["seconds"].items():
        cells = [f"{seconds[kind]:.2f} ({seconds[kind] / plain[kind]:.1f} ×)" for kind in ("least", "median")]
        lines.append([name, *cells, f"{found['mean_least_margin'][name]:.2f}"])
    head = f"{found['device']}, {found['threads']} thread; {found['images']} images, 8/255"
    return tables.markdown([head, "least s an image", "median s an image", "mean bound of the least margin"], lines)


TABLES: dict[str, Callable[[], str]] = {
    "disparity": disparity,
    "fairness": fairness,
    "speed": speed,
    "paper": paper_scale,
    "cifar10": functools.partial(fairness, tuple(names.METHODS), "cifar10"),
    "signs": signs,
    "colour": colour,
    "split": split,
    "steps": steps,
    "formats": colour_formats,
    "certificates": certificates,
    "coverage": coverage.table,
    "matrix": matrix.table,
    "carried": matrix.carried,
    "notebooks": front.notebooks,
    **{f"claims {number}": claims_of(number) for number in ("01", "02", "03", "04", "05", "07")},
}

"""The commands for the paper's studies: notebooks, runs, sweeps, tables, documents."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from frlkit import PROJECT, KitError
from frlkit.commands.networks import READING, said
from frlkit.commands.options import BATCH_SIZE, DATA, DEVICE, PATH, RUNS, Choice, goes_on_from, names_of, sure_to_end


@click.command()
@DATA
@click.option("--profile", default="", help="Parameters from notebooks/profiles, such as smoke; sets the data set.")
@click.option("--retrain", is_flag=True, help="Train everything anew under OUTPUT/retrained, ignoring shipped runs.")
@click.option("--output", type=PATH, default=PROJECT / "output", help="Default: output/.")
def reproduce(dataset: str, profile: str, retrain: bool, output: Path) -> None:
    """Run the numbered notebooks and print the claims table.

    Executed notebooks, an HTML copy of each and index.html go to OUTPUT. Finished runs are reloaded, missing ones
    trained, unchanged notebooks skipped; after an interruption the same command goes on.
    """
    from frlkit.reproduce import reproduce as run_all

    runs, own = (output / "retrained",) * 2 if retrain else (PROJECT / "checkpoints", output)
    goes_on_from(lambda: [*own.glob("*/done.json"), *runs.rglob("checkpoint.pt")])
    click.echo(run_all(dataset, output.resolve(), retrain=retrain, profile=profile))


@click.command(short_help="Write every table of the documents anew, or check them.")
@click.option("--check", is_flag=True, help="Write nothing: say where documents and records disagree.")
@click.option("--claims", type=PATH, help="Executed notebooks: keep their claims first.")
def report(check: bool, claims: Path | None) -> None:
    """Write the documents' tables and the models' card anew from shipped records, notebooks and benchmark results."""
    from frlkit.report import documents, matrix

    if claims:
        click.echo(f"kept: {', '.join(map(str, matrix.collect(claims)))}")
    if check:
        if found := documents.check():
            raise KitError("; ".join(found))
        click.echo("documents and records agree")
        return
    changed = documents.refresh()
    click.echo(f"written anew: {', '.join(changed)}" if changed else "every table is up to date")


@click.command()
def recipes() -> None:
    """List every recipe: its name, where it comes from, what it is."""
    from frlkit.recipes import RECIPES

    width = max(len(recipe.source) for recipe in RECIPES.values())
    for name, recipe in RECIPES.items():
        click.echo(f"{name:22}  {recipe.source:{width}}  {recipe.title}")


@click.command(short_help="For a fork: another address in badges and notebooks.")
@click.argument("url")
def address(url: str) -> None:
    """For a fork: rewrite the address https://github.com/OWNER/NAME in badges, notebooks and documents."""
    from frlkit import origin

    changed = origin.address(url)
    click.echo(f"{len(changed)} files changed: {', '.join(map(str, changed))}" if changed else "nothing to change")


@click.command(short_help="Train and evaluate a recipe, resuming what is there.")
@click.argument("recipe", type=Choice(names_of("recipes", "RECIPES"), "RECIPE,FIELD=VALUE"), metavar="RECIPE")
@click.option("--start", type=PATH, help="A retraining goes on from this file of weights.")
@click.option("--model", default="", help="With --start, as are --mean to --key: see frlkit audit.")
@READING
@click.option("--seed", "seeds", type=int, multiple=True, default=(0,), show_default=True, help="May be repeated.")
@click.option("--epochs", type=int, help="Default: the recipe's own.")
@BATCH_SIZE
@RUNS
@DEVICE
def train(
    recipe: str, dataset: str, seeds: tuple[int, ...], epochs: int | None, batch_size: int, runs: Path, device: str,
    start: Path | None, **reading: Any,
) -> None:  # fmt: skip
    """Train and evaluate RECIPE, resuming what is there.

    RECIPE is one that `frlkit recipes` lists. A retraining recipe goes on from the finished run that it starts from
    with the same seed (most: pgd_at), trained first where it is missing. Fields may be varied:
    "algorithm1_both,alpha_margin=1". The notebooks read the same folders: RUNS/DATASET/RECIPE/seedN. With --start it
    goes on from anyone's weights instead, in a folder of their own: RECIPE,start=weights-DIGEST.
    On several GPUs: torchrun --nproc_per_node N -m frlkit train ...
    """
    from frlkit import data, distributed
    from frlkit import runs as place_of
    from frlkit.audit import fairer, readings
    from frlkit.recipes import configure, start_of

    values: dict[str, Any] = {"batch_size": batch_size} | ({} if epochs is None else {"epochs": epochs})
    if start is None and any(reading.values()):
        name = next(name for name in reading if reading[name])
        raise KitError(f"--{name} is about the network of --start: give that file too, or leave it out")
    configs = [configure(recipe, dataset, seed, **values) for seed in seeds]
    place = distributed.start(data.pick_device(device))
    try:
        if distributed.shared():
            distributed.from_main(lambda: bool(data.load(dataset)))  # one process downloads
        if start is None:
            tensors = data.load(dataset, device=place)
        else:
            read = readings.read(start, dataset, device=place, **reading)
            said(read)
            for doubt in read.doubts:
                click.echo(f"doubtful: {doubt}", err=True)
            recipe, own = fairer.going_on(recipe, read.model, read.reading["model"], read.data, batch_size)
            tensors, configs = read.data, [configure(recipe, dataset, seed, **own, **values) for seed in seeds]
        each = [(config, place_of.folder(runs, recipe, config)) for config in configs]
        starts = [
            place_of.start_folder(config, folder) / "checkpoint.pt" for config, folder in each if start_of(config)
        ]
        goes_on_from(lambda: [*(folder for _, folder in each), *starts])
        for config, folder in each:
            place_of.run(config, tensors, folder)
            if distributed.is_main():
                click.echo(_result(folder))
    finally:
        distributed.stop()


def _result(folder: Path) -> str:
    """A finished run in one line: average and worst errors, and where it lies."""
    from frlkit import records

    record = records.read(folder / "record.json")
    found = {"natural": record["natural"]}
    found |= {f"PGD-{e['attack']['steps']} {e['attack']['eps_255']:g}/255": e["robust"] for e in record["attacks"]}
    parts = []
    for name, errors in found.items():
        worst, which = max(zip(errors, record["class_names"], strict=True))
        parts.append(f"{name} {sum(errors) / len(errors):.1%}, worst {which} {worst:.1%}")
    return " · ".join([*parts, str(folder)])


@click.command(short_help="Train and evaluate a grid of runs, many at a time.")
@click.argument("file", type=PATH, metavar="SWEEP.yaml")
@RUNS
@click.option("--dry-run", is_flag=True, help="List the runs, what is done and left, and how long that may take.")
@click.option(
    "--jobs", type=click.IntRange(1), help="Processes at a time here. Default: one a core, or one a GPU share."
)
@click.option("--shares", type=click.IntRange(1), default=1, show_default=True, help="Runs at a time on each GPU.")
@DEVICE
@click.option("--backend", type=click.Choice(("local", "ray", "dask")), default="local", show_default=True)
@click.option("--address", default="", help="Of the existing cluster: HOST:PORT, ray://HOST:PORT, tcp://HOST:PORT.")
def sweep(
    file: Path, runs: Path, dry_run: bool, jobs: int | None, shares: int, device: str, backend: str, address: str
) -> None:
    """Train and evaluate every run of SWEEP.yaml (examples in sweeps/) that is not finished yet.

    Each is the run that `train` and the notebooks know, in RUNS/DATASET/RECIPE/seedN, on one thread; interrupted or
    killed, the same command goes on. A run that fails does not stop the others and is named at the end. A Ray or Dask
    cluster needs the kit and the data (FRLKIT_DATA) on its workers, but no shared file system.
    """
    from frlkit import data
    from frlkit.scale import clusters, sweeps

    place = clusters.choose(backend, address, device, jobs, shares)
    planned = sweeps.plan(file, runs)
    goes_on_from(lambda: () if dry_run else (run.folder for run in planned))
    if dry_run:
        with place as (_, workers):
            click.echo(sweeps.preview(planned, runs, workers, data.pick_device(device).type == "cuda"))
        return
    with sure_to_end(), place as (carry_out, _):
        failed = sweeps.sweep(planned, carry_out)
        click.echo(f"{len(planned) - len(failed)} of {len(planned)} runs are finished")
        if failed:
            raise KitError("; ".join(f"{name} failed: {why}" for name, why in failed.items()))


@click.command(short_help="One row a method, over seeds, from the records of finished runs.")
@click.argument("runs", type=PATH, nargs=-1, required=True)
@click.option("--format", "kind", type=Choice(names_of("report.tables", "FORMATS")), default="text", show_default=True)
@click.option("--output", type=PATH, help="Write it there too: .csv, .json, .parquet (numbers), or .md.")
def table(runs: tuple[Path, ...], kind: str, output: Path | None) -> None:
    """Print a table with one row a method, from every finished run in RUNS..., such as checkpoints/digits.

    Errors in %, mean ± sd over seeds, and a bootstrap 95 % interval of the worst class.
    """
    from frlkit import checkpoint
    from frlkit.report import tables

    written = {".csv": "csv", ".json": "json", ".md": "markdown", ".parquet": "parquet"}
    if output and output.suffix not in written:
        raise KitError(f"--output {output} is not allowed: use a name that ends in {', '.join(written)}")
    if output and output.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise KitError(f"--output {output} needs a library that is not there: pip install pyarrow")
    records = tables.collect(runs)
    click.echo(tables.rendered(records, kind), nl=False)
    if output and output.suffix == ".parquet":
        numbers = tables.by_method(records, tables.statistics)
        checkpoint.write_atomically(output, numbers.to_parquet(engine="pyarrow", index=False))
    elif output:
        checkpoint.write_atomically(output, tables.rendered(records, written[output.suffix]).encode())


@click.command(short_help="Attack every finished run again and compare.")
@DATA
@RUNS
@click.option(
    "--recipe", "begins", multiple=True, default=("",), help="Only runs whose RECIPE/seedN begins so; repeat."
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0),
    default=0.5,
    show_default=True,
    help="Percentage points that one class may differ by.",
)
@DEVICE
def verify(dataset: str, runs: Path, begins: tuple[str, ...], tolerance: float, device: str) -> None:
    """Attack the weights of every finished run again and compare with its record; print the largest difference.

    Float rounding may flip single images on another processor, and a GPU's random starts are others than a CPU's, hence
    the tolerance: an image of a class of 60 is 1.67 points.
    """
    from tqdm import tqdm

    from frlkit import data
    from frlkit.report.studies import verify as recompute
    from frlkit.runs import WEIGHTS

    differences = []
    for folder, difference in recompute(runs, data.load(dataset, device=data.pick_device(device)), begins):
        if difference is None:
            tqdm.write(f"left out, a network of one's own (frlkit audit {folder / WEIGHTS} --model ...)")
            continue
        differences.append(100 * difference)
        tqdm.write(f"{differences[-1]:6.2f} points  {folder.parent.name}/{folder.name}")
    if not differences:
        which = f" whose recipe begins with {' or '.join(begins)}" if any(begins) else ""
        raise KitError(
            f"there are no finished runs of {dataset}{which} under {runs}: train them, or name another --runs"
        )
    runs_of = "1 run" if len(differences) == 1 else f"{len(differences)} runs"
    click.echo(f"{runs_of} recomputed; largest class-wise difference {max(differences):.2f} points")
    if not max(differences) <= tolerance:
        raise KitError(
            f"a record differs by {max(differences):.2f} points, more than --tolerance {tolerance:g}: delete that run "
            "to make it anew, or allow more"
        )


COMMANDS = (reproduce, report, recipes, address, train, sweep, table, verify)

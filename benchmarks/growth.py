"""How the cost of an epoch grows: with batch size, attack steps and images, and with runs side by side; one figure.

    python benchmarks/growth.py --figure figures/speed.png --json benchmarks/growth.json

Each point is the median of several timed epochs of PGD-AT on a slice of random images, which cost what real ones do.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import click
from epoch import processor, random_images, seconds  # before torch, see there

# isort: split
import torch
from tqdm import tqdm

from frlkit import kernels, models, recipes, records, training
from frlkit.data import Dataset

SLICE = 3200  # images of a timed epoch, where their number is not what varies


def epoch(images: int = SLICE, batch_size: int = 100, steps: int = 10) -> Callable[[], None]:
    """One epoch of PGD-AT, ready to be timed."""
    model, split = models.build("lenet5", 10, seed=0), random_images(images)
    config = recipes.Config("pgd_at", steps=steps, batch_size=batch_size)
    run = training.begin(config, Dataset("random", tuple("0123456789"), split, split, split), model)

    def work() -> None:
        for _ in training.train_epoch(run):
            pass

    return work


def rate(images: int = SLICE, repeats: int = 5, **settings: int) -> float:
    """Images per second, the median of several epochs after one unmeasured."""
    work = epoch(images, **settings)
    work()
    return images / statistics.median(seconds(work) for _ in range(repeats))


def side_by_side(processes: int, threads: int) -> float:
    """Images per second of several equal runs together."""
    context = multiprocessing.get_context("spawn")
    start, rates = context.Barrier(processes), context.SimpleQueue()
    workers = [context.Process(target=_worker, args=(threads, start, rates)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    total = sum(rates.get() for _ in workers)
    for worker in workers:
        worker.join()
    return total


def _worker(threads: int, start: multiprocessing.Barrier, rates: multiprocessing.SimpleQueue) -> None:
    torch.set_num_threads(threads)
    epoch()()
    start.wait()
    rates.put(rate(2 * SLICE))


def measure() -> dict[str, dict[str, float]]:
    """Every point of the figure: panel -> setting -> images per second."""
    cores = os.cpu_count() or 1
    points: list[tuple[str, str, Callable[[], float]]] = []
    points += [("batch size", str(n), lambda n=n: rate(batch_size=n)) for n in (25, 50, 100, 200, 400, 800)]
    points += [("attack steps", str(n), lambda n=n: rate(steps=n)) for n in (1, 2, 5, 10, 20, 40)]
    points += [("images", str(n), lambda n=n: rate(n)) for n in (400, 800, 1600, 3200, 6400, 12800)]
    shapes = [(1, 1), (1, cores), (cores, 1), (cores, cores)]
    points += [("processes x threads", f"{p} x {t}", lambda p=p, t=t: side_by_side(p, t)) for p, t in shapes]
    table: dict[str, dict[str, float]] = {}
    for panel, setting, work in tqdm(points, unit="point"):
        table.setdefault(panel, {})[setting] = round(work(), 1)
    return table


def draw(record: dict[str, object], path: Path) -> None:
    """Four panels: seconds per epoch of 54,000 images (of so many images, where these vary)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from frlkit.report import figures

    figure, axes = plt.subplots(1, 4, figsize=(14, 3.6), layout="constrained")
    for axis, (panel, points) in zip(axes, record["images_per_s"].items(), strict=True):
        if panel == "processes x threads":
            axis.bar(list(points), list(points.values()), color="#4c72b0")
            axis.set(ylabel="images per second, all runs together")
        else:
            sizes = [int(n) if panel == "images" else 54_000 for n in points]
            times = [size / per_second for size, per_second in zip(sizes, points.values(), strict=True)]
            axis.loglog([int(n) for n in points], times, "o-", color="#4c72b0")
            axis.set(ylabel="seconds per epoch" + ("" if panel == "images" else " of 54,000 images"))
            axis.set_xticks([int(n) for n in points], list(points), minor=False)
            axis.set_xticks([], minor=True)
        axis.set(xlabel=panel, title=f"by {panel}")
        axis.grid(alpha=0.3)
    note = f"LeNet-5, PGD-10 training, batch 100 unless varied, {record['threads']} threads, {record['kernel']} kernel"
    figure.suptitle(f"{note}, {record['processor']}, random images", x=0.01, ha="left", fontsize=11)
    figures.save(figure, path)


@click.command()
@click.option("--threads", default=0, help="Threads of one run; 0 leaves torch's own choice.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the table there.")
@click.option("--figure", type=click.Path(path_type=Path), help="Draw it there.")
def main(threads: int, out: Path | None, figure: Path | None) -> None:
    """Measure how the time of an epoch grows on this machine."""
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    record = {
        "images_per_s": measure(),
        "threads": torch.get_num_threads(),
        "kernel": kernels.describe(models.build("lenet5")),
        "processor": processor(),
        "versions": records.versions(),
    }
    text = json.dumps(record, indent=1)
    click.echo(text)
    if out:
        out.write_text(text + "\n", encoding="utf-8")
    if figure:
        draw(record, figure)


if __name__ == "__main__":
    main()

"""How long an epoch takes: the kit against torchattacks in a DataLoader loop, in turn, in one process.

    python benchmarks/epoch.py --json -        # or: make bench

Every comparison runs both sides alternately on the same images, weights and number of threads, several times; its
ratio is the median of the pairs' ratios. Work is measured on a slice and is proportional to the images. The random
images cost what real ones do; every image is attacked, although the kit leaves out those that are wrong clean when it
evaluates. FRLKIT_KERNEL=off measures the portable path.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

import frlkit  # noqa: F401  before torch: it asks OpenMP's threads not to spin, which is read when torch is loaded

# isort: split
import torch
import torchattacks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from frlkit import evaluation, fairness, kernels, models, recipes, records, training
from frlkit.data import Dataset, Split
from frlkit.evaluation import Attack

BATCH = 128
EPS, STEP = 8 / 255, 2 / 255
# LeNet-5, multiply-adds of one image: two convolutions, then the linear layers.
CONV1, CONV2, REST = 28 * 28 * 6 * 25, 10 * 10 * 16 * 6 * 25, 400 * 120 + 120 * 84 + 84 * 10
FORWARD = CONV1 + CONV2 + REST
FLOP_ATTACK_STEP = 2 * 2 * FORWARD  # forward, and the gradient of the input: as much again
FLOP_TRAINING_STEP = 2 * (2 * FORWARD + FORWARD - CONV1)  # forward, weights' gradients, inner layers' gradients


@dataclass(frozen=True)
class Work:
    """One thing to do: images treated per call, floating-point operations per image, and the two ways to do it."""

    name: str
    images: int
    flop: float
    baseline: Callable[[], None]
    ours: Callable[[], None]


def plain_lenet(source: models.LeNet5) -> nn.Module:
    """The same network from torch's layers, with the same weights: what a user would write."""
    stages = (nn.Tanh(), nn.AvgPool2d(2))
    convolutions = (nn.Conv2d(1, 6, 5), *stages, nn.Conv2d(6, 16, 5), *stages, nn.Conv2d(16, 120, 5), nn.Tanh())
    network = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10))
    values = source.state_dict().values()
    network.load_state_dict(dict(zip(network.state_dict(), values, strict=True)))
    return network


def train_with_torchattacks(network: nn.Module, split: Split, steps: int, share: float) -> None:
    """An epoch as most code does it: DataLoader, torchattacks, a random share of each batch attacked."""
    loader = DataLoader(TensorDataset(split.images.float() / 255, split.labels), batch_size=BATCH, shuffle=True)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    attack = torchattacks.PGD(network, eps=EPS, alpha=STEP, steps=steps)
    for x, y in loader:
        part = round(share * len(x))
        x = torch.cat([attack(x[:part], y[:part]), x[part:]])
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()


def train_one_epoch(
    model: nn.Module, split: Split, config: recipes.Config, balance: fairness.Setting | None = None
) -> None:
    optimizer, images = torch.optim.Adam(model.parameters(), lr=config.lr), Dataset("", (), split, split, split)
    run = training.Progress(config, images, model, optimizer, None)
    for _ in training.train_epoch(run, balance=balance):
        pass


def train_with_kit(model: nn.Module, split: Split, steps: int, share: float) -> None:
    config = recipes.Config("pgd_at", steps=steps, attacked=share, batch_size=BATCH)
    train_one_epoch(model, split, config)


def evaluate_with_torchattacks(network: nn.Module, split: Split, batch: int) -> None:
    attack = torchattacks.PGD(network, eps=EPS, alpha=STEP, steps=20)
    for x, y in DataLoader(TensorDataset(split.images.float() / 255, split.labels), batch_size=batch):
        adversarial = attack(x, y)
        with torch.no_grad():
            network(x), network(adversarial)


def reweight_epoch(model: nn.Module, split: Split, validation: Split) -> None:
    """An epoch of FRL Reweight: one evaluation updates the multipliers, then weighted training under PGD-10."""
    config = recipes.configure("algorithm1_reweight", "fashion_mnist", 0, batch_size=BATCH)
    natural = torch.from_numpy(evaluation.class_errors(model, validation, Attack(0, steps=0)).natural)
    boundary = torch.from_numpy(evaluation.changed(model, validation, Attack(steps=20)))
    state = fairness.update(fairness.initial(len(natural)), natural, boundary, config)
    balance = fairness.Setting(*(values.float() for values in fairness.setting(state, config)))
    train_one_epoch(model, split, config, balance)


def reweight_batch_as_reported(network: nn.Module, split: Split, validation: Split) -> None:
    """One batch as the report's code: the multipliers re-estimated on 2,100 images, then the batch under PGD-20."""
    evaluate_with_torchattacks(network, Split(validation.images[:2100], validation.labels[:2100]), 100)
    train_with_torchattacks(network, Split(split.images[:100], split.labels[:100]), steps=20, share=1.0)


def random_images(images: int) -> Split:
    return Split(torch.randint(0, 256, (images, 1, 32, 32), dtype=torch.uint8), torch.arange(images) % 10)


def seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def compare(work: Work, pairs: int) -> dict[str, float | str]:
    """Run both sides alternately; after one unmeasured round each."""
    work.baseline(), work.ours()
    timed = [(seconds(work.baseline), seconds(work.ours)) for _ in range(pairs)]
    ratios = sorted(baseline / ours for baseline, ours in timed)
    ours = statistics.median(pair[1] for pair in timed)
    return {
        "work": work.name,
        "ratio": round(statistics.median(ratios), 2),
        "lowest": round(ratios[0], 2),
        "highest": round(ratios[-1], 2),
        "images_per_s": round(work.images / ours),
        "baseline_images_per_s": round(work.images / statistics.median(pair[0] for pair in timed)),
        "mflop_per_image": round(work.flop / 1e6, 2),
        "gflop_per_s": round(work.flop * work.images / ours / 1e9, 1),
    }


def gemm_peak() -> float:
    """Floating-point operations per second of a large matrix product, the best of several, on the threads in use."""
    a, b = torch.rand(1024, 1024), torch.rand(1024, 1024)
    a @ b
    return 2 * 1024**3 / min(seconds(lambda: a @ b) for _ in range(20))


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def scale_to_epoch(reported_batch: float, ours: float, images: int) -> dict[str, float]:
    """Seconds of one FRL epoch over 48,000 images, the report's way and ours, from one batch and from `images`."""
    report, kit = 480 * reported_batch, 48_000 / images * ours
    return {"report_s": round(report, 1), "kit_s": round(kit, 1), "ratio": round(report / kit, 1)}


@click.command()
@click.option("--images", default=2560, show_default=True, help="Images of the measured slice.")
@click.option("--pairs", default=5, show_default=True, help="Measured pairs of each comparison.")
@click.option("--threads", default=0, help="Threads of both sides; 0 leaves torch's own choice.")
@click.option("--json", "out", type=click.Path(allow_dash=True), help="Write the table there; - for standard output.")
def main(images: int, pairs: int, threads: int, out: str | None) -> None:
    """Measure the kit against torchattacks in a DataLoader loop on this machine."""
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = models.build("lenet5", 10, seed=0)
    network, alone = plain_lenet(model), plain_lenet(model)
    split = random_images(images)
    few = Split(split.images[:40], split.labels[:40])

    def training_work(name: str, steps: int, share: float) -> Work:
        return Work(
            name,
            images,
            share * steps * FLOP_ATTACK_STEP + FLOP_TRAINING_STEP,
            lambda: train_with_torchattacks(network, split, steps, share),
            lambda: train_with_kit(model, split, steps, share),
        )

    def evaluation_work(name: str, part: Split, batch: int) -> Work:
        return Work(
            name,
            images,
            20 * FLOP_ATTACK_STEP + 4 * FORWARD,
            lambda: evaluate_with_torchattacks(alone, part, batch),
            lambda: evaluation.changed(model, split, Attack(steps=20)) is None,
        )

    rows = [
        compare(training_work("train PGD-20, whole batch", 20, 1.0), pairs),
        compare(training_work("train PGD-20, half batch", 20, 0.5), pairs),
        compare(training_work("train PGD-10, whole batch", 10, 1.0), pairs),
        compare(evaluation_work("evaluate PGD-20", split, 1000), pairs),
    ]
    one_by_one = compare(evaluation_work("evaluate PGD-20, one image at a time", few, 1), pairs)
    for key in ("ratio", "lowest", "highest"):  # the baseline treated 40 images, ours all
        one_by_one[key] = round(one_by_one[key] * images / len(few), 1)
    one_by_one["baseline_images_per_s"] = round(one_by_one["baseline_images_per_s"] * len(few) / images)
    frl = scale_to_epoch(
        statistics.median(seconds(lambda: reweight_batch_as_reported(alone, split, split)) for _ in range(2)),
        statistics.median(seconds(lambda: reweight_epoch(model, split, split)) for _ in range(pairs)),
        images,
    )
    peak = gemm_peak()
    table = {
        "ratio_train_pgd20": rows[0]["ratio"],
        "ratio_eval_pgd20": rows[3]["ratio"],
        "rows": [*rows, one_by_one],
        "frl_epoch": frl,
        "gemm_peak_gflop_per_s": round(peak / 1e9, 1),
        "threads": torch.get_num_threads(),
        "kernel": kernels.describe(model),
        "images": images,
        "pairs": pairs,
        "processor": processor(),
        "versions": {**records.versions(), "torchattacks": torchattacks.__version__},
    }
    if out == "-":
        click.echo(json.dumps(table, indent=1))
        return
    click.echo(f"{table['processor']}, {table['threads']} threads, {table['kernel']} kernel")
    for row in table["rows"]:
        click.echo(
            f"{row['work']:<38} {row['ratio']:>6} x ({row['lowest']} to {row['highest']} in {pairs} pairs), "
            f"{row['images_per_s']} images/s (baseline {row['baseline_images_per_s']}), "
            f"{row['mflop_per_image']} MFLOP an image, {row['gflop_per_s'] * 1e9 / peak:.0%} of the GEMM peak"
        )
    click.echo(f"GEMM peak {peak / 1e9:.0f} GFLOP/s")
    click.echo(f"FRL epoch of 48,000 images: report's way {frl['report_s']} s, ours {frl['kit_s']} s, {frl['ratio']} x")
    if out:
        Path(out).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

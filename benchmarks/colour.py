"""Colour networks here: the kit against torchattacks and adv-lib, in turn, in one process; bf16 beside float32.

    python benchmarks/colour.py --json benchmarks/colour.json                    # or: make bench
    FRLKIT_DATA=... python benchmarks/colour.py --run checkpoints/gtsrb/pgd_at/seed0 --json benchmarks/colour.json

    FRLKIT_DATA=... python benchmarks/colour.py --parts --run checkpoints/gtsrb/pgd_at/seed0 --json FILE

The second times nothing: it measures what bf16 in an attack changes. A processor without bf16 computes it in software,
and takes more than a quarter of an hour. The third times each of the kit's measures alone, in float32, on versus off:
channels last and the folding of batch normalisation in an attack of ten steps, and, of the run, that an evaluation
leaves out images that are wrong clean.

Every round runs all ways once on the same images; a ratio is the median of the rounds' ratios. The baselines' network
is written from torch's layers, or is the kit's own as it is built, without the layout and the folding that are the
kit's doing. Every image is attacked, although the kit leaves out those that are wrong clean when it evaluates. Random
images cost what real ones do; hours are extrapolated.
"""

from __future__ import annotations

import copy
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import click

import frlkit  # noqa: F401  before torch: see epoch.py

# isort: split
import torch
import torchattacks
from epoch import processor
from torch import Tensor, nn

from frlkit import checkpoint, data, evaluation, kernels, losses, models, recipes, records, runs
from frlkit.data import Split
from frlkit.evaluation import Attack

sys.modules.setdefault("visdom", ModuleType("visdom"))  # adv-lib's plots, which nothing here draws; it has no wheel
from adv_lib.attacks import pgd_linf  # noqa: E402

EPS, STEP = 8 / 255, 2 / 255
#: Network -> images of a batch, and of a training epoch of the data set that the paper has it for.
NETWORKS = {
    "cnn3": (128, 35_219),
    "cnn4": (128, 25_800),
    "preact_resnet18_w16": (64, 45_000),
    "preact_resnet18": (16, 45_000),  # training only: minutes a row
}
BASELINES = ("torchattacks", "adv-lib")
Attacker = Callable[[Tensor, Tensor], Tensor]


def plain(model: nn.Module) -> nn.Module:
    """The same network as a user would write it, weights included."""
    if not isinstance(model, models.ConvNet):
        return copy.deepcopy(model)
    layers = [layer for conv in model.convolutions for layer in (copy.deepcopy(conv), nn.ReLU(), nn.MaxPool2d(2))]
    return nn.Sequential(*layers, nn.Flatten(), copy.deepcopy(model.linear))


def baselines(network: nn.Module, steps: int) -> dict[str, Attacker]:
    """PGD on a network by both libraries."""
    attack = torchattacks.PGD(network, eps=EPS, alpha=STEP, steps=steps)

    def by_adv_lib(x: Tensor, y: Tensor) -> Tensor:
        network.eval()
        return pgd_linf(network, x, y, EPS, steps=steps, absolute_step_size=STEP)

    return dict(zip(BASELINES, (attack, by_adv_lib), strict=True))


def training_ways(name: str, batch: int, device: torch.device) -> dict[str, Callable[[], None]]:
    """One PGD-AT step on one batch, PGD-10, SGD: both libraries, and the kit in each number format."""
    x, y = torch.rand(batch, 3, 32, 32, device=device), torch.arange(batch, device=device) % 10
    source = models.build(name, seed=0).to(device)
    ways: dict[str, Callable[[], None]] = {}

    def descend(model: nn.Module, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def libraries(network: nn.Module, attack: Attacker, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        def step() -> None:
            adversarial = attack(x, y)
            descend(network, nn.functional.cross_entropy(network.train()(adversarial), y), optimizer)

        return step

    def kit(model: nn.Module, precision: str, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        config = recipes.Config("pgd_at", "cifar10", name, steps=10, precision=precision)  # type: ignore[arg-type]

        def step() -> None:
            with evaluation.number_format(precision, device):
                loss = losses.loss(model.train(), x, y, config, evaluation.stream(0, device=device))
            descend(model, loss, optimizer)

        return step

    for label in BASELINES:
        network = plain(source)
        ways[label] = libraries(network, baselines(network, 10)[label], sgd(network))
    for precision in ("float32", "bf16") if device.type == "cpu" else ("float32", "tf32", "bf16"):
        model = models.place(copy.deepcopy(source), device)
        ways[f"kit, {precision}"] = kit(model, precision, sgd(model))
    return ways


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)


def evaluation_ways(name: str, batch: int, device: torch.device) -> dict[str, Callable[[], None]]:
    """Predictions of one batch, clean and under PGD-20: both libraries, and the kit, which measures in float32."""
    images = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8, device=device)
    split = Split(images, torch.arange(batch, device=device) % 10)
    x, y = split.batch(slice(None))
    source = models.build(name, seed=0).to(device).eval()
    network, model = plain(source), models.place(copy.deepcopy(source), device)

    def library(attack: Attacker) -> Callable[[], None]:
        def measure() -> None:
            adversarial = attack(x, y)
            with torch.no_grad():
                network(x).argmax(1), network(adversarial).argmax(1)

        return measure

    ways = {label: library(attack) for label, attack in baselines(network, 20).items()}
    return {**ways, "kit, float32": lambda: evaluation.changed(model, split, Attack()) is None}


def seconds(step: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the processor on a CPU, where one thread runs and others may be busy, else of the clock."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    began = clock()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - began


def compare(
    ways: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device, against: Sequence[str] = BASELINES
) -> dict[str, dict[str, Any]]:
    """Every way once a round, after one round that is not counted: seconds, and ratios to each of the baselines."""
    for step in ways.values():
        seconds(step, device)
    timed = [{label: seconds(step, device) for label, step in ways.items()} for _ in range(rounds)]
    found = {}
    for label in ways:
        entry: dict[str, Any] = {"seconds": round(statistics.median(one[label] for one in timed), 4)}
        for baseline in against if label not in against else ():
            ratios = sorted(one[baseline] / one[label] for one in timed)
            low, median, high = ratios[0], statistics.median(ratios), ratios[-1]
            entry[baseline] = {"ratio": round(median, 2), "lowest": round(low, 2), "highest": round(high, 2)}
        found[label] = entry
    return found


def rows(name: str, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Training and evaluation of one network."""
    batch, epoch = NETWORKS[name]
    tables = {"train PGD-10": training_ways, "evaluate PGD-20": evaluation_ways}
    made = []
    for work, ways in list(tables.items())[: 1 if name == "preact_resnet18" else 2]:
        found = compare(ways(name, batch, device), rounds, device)
        for entry in found.values():
            entry["images_per_s"] = round(batch / entry["seconds"], 1)
            entry["epoch_s"] = round(epoch / batch * entry["seconds"])
        made.append({"model": name, "work": work, "batch": batch, "epoch_images": epoch, "ways": found})
    return made


def parts(names: Sequence[str], place: Path | None, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """What each measure of the kit's is worth alone: how many times the seconds without it are those with it."""
    made = []

    def note(model: str, part: str, off: Callable[[], Any], on: Callable[[], Any]) -> None:
        found = compare({"off": off, "on": on}, rounds, device, ("off",))
        made.append({"model": model, "part": part, "seconds": found["on"]["seconds"], **found["on"]["off"]})

    for name in names:
        batch, _ = NETWORKS[name]
        x, y = torch.rand(batch, 3, 32, 32, device=device), torch.arange(batch, device=device) % 10
        rows, last = (models.build(name, seed=0).to(device).eval() for _ in range(2))
        last = models.place(last, device)

        def attack(model: nn.Module, x: Tensor = x, y: Tensor = y) -> Tensor:
            return evaluation.pgd(model, x, y, EPS, STEP, 10, generator=evaluation.stream(0, device=x.device))

        def unfolded(model: nn.Module, attack: Callable[[nn.Module], Tensor] = attack) -> Tensor:
            with mock.patch.object(kernels, "folded", lambda model: model):
                return attack(model)

        note(name, "channels last", functools.partial(unfolded, rows), functools.partial(unfolded, last))
        if name not in ("cnn3", "cnn4"):  # have no batch normalisation
            note(name, "batch norm folded", functools.partial(unfolded, last), functools.partial(attack, last))
    if place:
        model, config = runs.read_weights(place / runs.WEIGHTS)
        test = data.load(config["dataset"], device=device).test.take(torch.arange(evaluation.BATCH))
        model, standard = models.place(model, device), Attack(eps_255=config["eps_255"])
        measure = functools.partial(evaluation.predictions, model, test, standard)
        note(f"{config['model']}, {'/'.join(place.parts[-3:])}", "wrong clean left out", lambda: measure(True), measure)
    return made


def formats(place: Path, device: torch.device) -> dict[str, Any]:
    """Class-wise robust error of a trained run when the attack computes in bf16 or tf32, beside another attack seed."""
    model, config = runs.read_weights(place / runs.WEIGHTS)
    model = models.place(model, device)
    test = data.load(config["dataset"], device=device).test
    attack = Attack(eps_255=config["eps_255"])
    reference = evaluation.class_errors(model, test, attack).robust
    found = {}
    for precision in ("bf16",) if device.type == "cpu" else ("tf32", "bf16"):
        with evaluation.number_format(precision, device):
            fooled = torch.cat([~_stands(model, test, attack, start) for start in range(0, len(test), 1000)])
        robust = torch.stack([fooled[test.labels == label].double().mean() for label in range(len(reference))])
        found[precision] = round(100 * float((robust.cpu().numpy() - reference).__abs__().max()), 2)
    others = [
        evaluation.class_errors(model, test, Attack(attack.eps_255, seed=other)).robust - reference for other in (1, 2)
    ]
    return {
        "run": f"{config['dataset']} {config['method']} seed {config['seed']} ({models.TITLES[config['model']]})",
        "weights_sha256": checkpoint.digest(dict(model.state_dict())),
        "test_images": len(test),
        "smallest_class": int(test.labels.bincount().min()),
        "attack": str(attack),
        "largest_class_difference_points": found,
        "largest_class_difference_of_attack_seeds_points": round(100 * max(float(abs(o).max()) for o in others), 2),
    }


def _stands(model: nn.Module, test: Split, attack: Attack, start: int) -> Tensor:
    """Which images of a batch are right clean and under an attack that computes in the number format around it."""
    x, y = test.batch(slice(start, start + evaluation.BATCH))
    generator = evaluation.stream(attack.seed, start // evaluation.BATCH, device=x.device)
    ball = (attack.eps_255 / 255, attack.step_255 / 255, attack.steps)
    adversarial = evaluation.pgd(model, x, y, *ball, generator=generator)
    with evaluation.number_format("float32", x.device), torch.autocast(x.device.type, enabled=False):
        return (evaluation.predict(model, x) == y) & (evaluation.predict(model, adversarial) == y)


@click.command()
@click.option("--rounds", default=3, show_default=True)
@click.option(
    "--network", "networks", type=click.Choice(list(NETWORKS)), multiple=True, help="Only this; may be repeated."
)
@click.option("--device", default="auto", show_default=True)
@click.option(
    "--run", "place", type=click.Path(path_type=Path), help="Time nothing: compare number formats on this run."
)
@click.option("--parts", "apart", is_flag=True, help="Time each of the kit's measures alone, the last on --run.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the result there.")
def main(rounds: int, networks: Sequence[str], device: str, place: Path | None, apart: bool, out: Path | None) -> None:
    """Time the colour networks with both libraries and with the kit on this machine, or compare number formats."""
    where = data.pick_device(device)
    torch.set_num_threads(1)  # as runs have
    before = json.loads(out.read_text(encoding="utf-8")) if out and out.exists() else {"rows": []}
    machine: dict[str, Any] = {
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else f"{processor()}, one thread",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bf16_in_hardware": torch.cpu._is_avx512_bf16_supported() if where.type == "cpu" else True,
        "versions": {**records.versions(), "torchattacks": torchattacks.__version__, "adv-lib": version("adv-lib")},
    }
    if apart:
        result = before | {"parts": {"rows": parts(networks or list(NETWORKS), place, rounds, where)} | machine}
    elif place:
        if networks:
            raise click.UsageError("--run times nothing: leave out --network")
        result = before | {"formats": formats(place, where) | machine}
    else:
        timed = [row for name in networks or NETWORKS for row in rows(name, rounds, where)]
        kept = [row for row in before["rows"] if networks and row["model"] not in networks]  # the others' rows stay
        result = before | machine | {"rounds": rounds, "rows": kept + timed}
        result["rows"].sort(key=lambda row: list(NETWORKS).index(row["model"]))
    text = json.dumps(result, indent=1)
    click.echo(text)
    if out:
        out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()

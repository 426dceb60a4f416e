"""The commands for anyone's network: `audit`, its short form `evaluate`, `fairer`, and `certify`."""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from frlkit import disk
from frlkit.commands.options import BATCH_SIZE, DATA, DEVICE, PATH, RUNS, Choice, goes_on_from, names_of


class Numbers(click.ParamType):
    """One number, or one a channel: "0.5" or "0.4914,0.4822,0.4465"."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        try:
            return value if isinstance(value, tuple) else tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r}: use numbers, such as 0.5 or 0.4914,0.4822,0.4465", param, ctx)


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


NEAR = 0.02  # a second reading's natural error above the chosen one's, to be named
READING = _options(
    DATA,
    click.option("--mean", type=Numbers(), help="The mean that images are normalised with. Default: found out."),
    click.option("--std", type=Numbers(), help="The standard deviation, likewise."),
    click.option("--size", type=int, help="Side of a folder's images. Default: the network's, or the smallest side."),
    click.option("--channels", type=int, help="1 or 3, of a folder's images. Default: the network's, or the files'."),
    click.option("--upright", is_flag=True, help="Turn photos as their EXIF data say; torchvision does not."),
    click.option("--key", default="", help="Where in the file the weights are, if in several places, such as ema."),
)
ATTACK = _options(
    click.option("--eps", type=float, default=8, show_default=True, help="Radius of the attack, in 1/255."),
    click.option("--step-size", type=float, default=2, show_default=True, help="Step of the attack, in 1/255."),
    click.option("--steps", type=int, default=20, show_default=True, help="Steps of the attack."),
    click.option("--restarts", type=int, default=1, show_default=True, help="Fresh starts; the worst one counts."),
    click.option(
        "--loss", type=Choice(names_of("attacks", "LOSSES")), default="ce", show_default=True, help="What it ascends."
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Seed of the attack's random starts."),
    click.option("--json", "out", type=PATH, help="Write the result there as JSON."),
    DEVICE,
)


MODEL = click.option(
    "--model",
    default="",
    metavar="NAME|FILE.py:FACTORY",
    help="One of the kit's, of torchvision's, or module:factory. Default: what the file's tensors fit.",
)


@click.command(short_help="Any network, any images: errors of each class, and whether to trust them.")
@click.argument("weights", type=PATH)
@MODEL
@READING
@ATTACK
@click.option("--output", type=PATH, help="A folder for the report card and its audit.json.")
@click.option("--images", type=click.IntRange(1), help="Test images at most. Default: all.")
@click.option("--ladder", type=click.IntRange(0), default=0, help="Images that AutoAttack attacks too; needs --output.")
@click.option("--certify", type=click.IntRange(0), default=0, help="Images to certify; needs --output.")
def audit(output: Path | None, images: int | None, ladder: int, certify: int, out: Path | None, **asked: Any) -> None:
    """Print the natural, boundary and robust error of each class that WEIGHTS makes, and every reason to doubt them.

    WEIGHTS is a file of torch.save or safetensors with a state_dict in it, under any key; "-" where the factory of
    --model loads its own. A file's code is never run; that of your own --model file is. How the images are to be
    normalised, and which activation and pooling a LeNet-5 has, is found out on a few clean images.
    """
    from frlkit import checkpoint
    from frlkit.report import card

    kept = ready(output) / "audit.json" if output else out
    if output:
        goes_on_from(lambda: [output / "ladder.json", output / "certificates.json"])
    found = _audited(asked, most=images, ladder=ladder, certify=certify, path=kept)
    if output and out:
        checkpoint.write_json(out, found)
    if output:
        click.echo(f"written: {card.write([found], output)}")


@click.command(short_help="Make any network fairer: before, control, method and moved biases in one report card.")
@click.argument("weights", type=PATH)
@MODEL
@READING
@click.option("--recipe", default="algorithm1_both", show_default=True, help="A retraining recipe; fields may vary.")
@click.option("--eps", type=float, help="Radius of training and of the attack, in 1/255. Default: the recipe's, and 8.")
@click.option("--epochs", type=int, help="Of a retraining. Default: the recipe's own.")
@BATCH_SIZE
@click.option("--seed", type=int, default=0, show_default=True, help="Of the retraining.")
@click.option("--images", type=click.IntRange(1), help="Test images at most. Default: all.")
@click.option("--output", type=PATH, required=True, help="A folder for the report card.")
@RUNS
@DEVICE
def fairer(
    weights: Path, recipe: str, eps: float | None, epochs: int | None, batch_size: int, seed: int, images: int | None,
    output: Path, runs: Path, device: str, **asked: Any,
) -> None:  # fmt: skip
    """Retrain the network in WEIGHTS by Fair Robust Learning, and show in one report card what that changed.

    Beside the network as it was stand the control (the same retraining with equal weights) and the cheap remedy (only
    the output biases moved). Runs are kept in RUNS/DATASET/RECIPE,start=weights-DIGEST/seedN; the same command goes on.
    WEIGHTS and --model are as in frlkit audit.
    """
    from frlkit import data
    from frlkit import runs as place_of
    from frlkit.audit import audit as measure
    from frlkit.audit import fairer as retraining
    from frlkit.audit import readings
    from frlkit.evaluation import Attack
    from frlkit.report import card, names

    ready(output)
    read = readings.read(None if str(weights) == "-" else weights, device=data.pick_device(device), **asked)
    values: dict[str, Any] = {"batch_size": batch_size} | ({} if epochs is None else {"epochs": epochs})
    attack = Attack() if eps is None else Attack(eps, eps / 4)
    radius = {} if eps is None else {"eps_255": eps, "step_255": eps / 4, "measure_255": eps}
    control = f"uniform,start={place_of.own_start(read.model)}"  # what is made first
    goes_on_from(lambda: [runs / data.folder_name(read.data.name) / control / f"seed{seed}"])
    said(read)
    given = {"reading": read.reading, "known": read.doubts, "most": images, "command": _command()}
    asked = {"recipe": recipe, "title": names.title(recipe), "seed": seed, **values, **radius}
    found = retraining.versions(read.model, read.reading["model"], read.data, runs, **asked)
    audits = []
    for title, model in found:
        error = read.said_error if title == retraining.BEFORE else None  # the file's own word, of what is in it
        audits.append({"title": title, **measure(model, read.data, attack, said_error=error, **given)})
    for sentence in card.comparison(audits)["says"]:
        click.echo(sentence)
    click.echo(f"written: {card.write(audits, output)}")


@click.command(short_help="Class-wise errors of any weights: the short form of audit.")
@click.argument("weights", type=PATH)
@click.option("--model", type=Choice(names_of("models", "MODELS")), default="lenet5", show_default=True)
@READING
@ATTACK
def evaluate(out: Path | None, **asked: Any) -> None:
    """Print the class-wise natural, boundary and robust error of WEIGHTS on the whole test set.

    WEIGHTS is any file of plain tensors that fits the model, such as a torch.save of a state_dict or safetensors. The
    JSON holds natural, robust and boundary as lists of fractions by class. More: frlkit audit.
    """
    from frlkit import checkpoint

    if out is not None:
        ready(out.parent)
    found = _audited(asked, curve=False)
    if out is not None:
        renamed = {
            "split": "test",
            "class_counts": found.pop("labels_per_class"),
            "weights_sha256": found["fingerprints"]["weights"],
            "data_sha256": found.pop("fingerprints")["data"],
            "confusion": found["confusion"]["robust"],
        }
        del found["curve"]
        checkpoint.write_json(out, found | renamed)


def _command() -> str:
    return shlex.join(["frlkit", *sys.argv[1:]])


def ready(folder: Path) -> Path:
    """The folder, made where it is missing; raises `WriteError` where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise disk.not_written(folder, error) from None


def said(read: Any) -> None:
    """How a file of weights was understood, where there was a choice, and what comes near."""
    errors = {entry["reading"]: entry["natural"] for entry in read.reading["tried"]}
    own, near = errors.pop(read.title), min(errors, key=errors.__getitem__, default="")
    if near:
        click.echo(f"read as {read.title}")
    if near and errors[near] < own + NEAR:
        click.echo(f"next: {near} ({errors[near]:.1%} of clean images wrong, against {own:.1%})")


def _audited(asked: dict[str, Any], **parts: Any) -> dict[str, Any]:
    """The audit that these options ask for, its table printed."""
    from frlkit import data
    from frlkit.audit import audit as measure
    from frlkit.audit import readings
    from frlkit.evaluation import Attack
    from frlkit.report import tables

    attack = Attack(*(asked.pop(name) for name in ("eps", "step_size", "steps", "restarts", "loss", "seed")))
    file = asked.pop("weights")
    device = data.pick_device(asked.pop("device"))
    read = readings.read(None if str(file) == "-" else file, device=device, **asked)
    said(read)
    about = {"reading": read.reading, "known": read.doubts, "said_error": read.said_error}
    found = measure(read.model, read.data, attack, command=_command(), **about, **parts)
    click.echo(f"{file} on {found['images']} test images of {found['dataset']}, errors in % under {attack}")
    table = {**found, "class_counts": found["labels_per_class"]}
    click.echo(tables.error_table(table, found["robust"]).to_string())
    return found


@click.command(short_help="Which test images no attack can ever fool, class by class.")
@click.argument("target", type=PATH, metavar="FOLDER_OR_WEIGHTS")
@click.option("--eps", type=float, default=8, show_default=True, help="Radius, in 1/255.")
@click.option("--images", type=click.IntRange(1), help="The first so many test images. Default: all.")
@click.option("--balanced", is_flag=True, help="The first of every class instead, equally many of each.")
@click.option("--steps", type=int, default=0, show_default=True, help="Rounds of tightening undecided images' bounds.")
@click.option("--seconds", type=float, default=0, help="For cutting up each image that is undecided then. Default: 0.")
@click.option("--json", "out", type=PATH, help="Keep the result there; the same command goes on.")
@click.option("--model", "model_name", help="For a file of weights, as audit's. Default: lenet5.")
@click.option("--dataset", help="Default: the run's, or fashion_mnist.")
@DEVICE
def certify(
    target: Path, eps: float, images: int | None, balanced: bool, steps: int, seconds: float, out: Path | None,
    model_name: str | None, dataset: str | None, device: str,
) -> None:  # fmt: skip
    """Print, class by class, how many test images are verified, falsified by an attack, or undecided.

    FOLDER_OR_WEIGHTS is a finished run's folder, such as checkpoints/fashion_mnist/pgd_at/seed0, or any file of plain
    tensors that fits the model. No attack, known or not, fools the model on a verified image within --eps: the robust
    error lies between falsified and 100 % less verified. The JSON holds a verdict for each image.
    """
    from frlkit import KitError, data, runs
    from frlkit.audit import certify as certification
    from frlkit.audit import readings

    place = data.pick_device(device)
    if out is not None:
        ready(out.parent)
        goes_on_from(lambda: [out])
    if target.is_dir():
        model, config = runs.read_weights(target / runs.WEIGHTS)
        if model_name not in (None, config["model"]):
            raise KitError(f"--model {model_name} is not allowed here: {target} holds a {config['model']}")
        tensors = data.load(dataset or config["dataset"], device=place)
    else:
        read = readings.read(target, dataset or "fashion_mnist", model_name or "lenet5", device=place)
        model, tensors = read.model, read.data
    split = certification.first(tensors.test, images, balanced)
    record = certification.certify(model.to(split.labels.device), split, eps, steps=steps, seconds=seconds, path=out)
    click.echo(f"{target}: {len(split)} test images of {tensors.name} at {eps:g}/255, in %")
    click.echo(certification.summary(record, tensors.class_names).to_string(na_rep="-"))
    bounded = len(split) - record["verdicts"].count(certification.FALSIFIED)
    if bounded:
        click.echo(f"{record['seconds'] / bounded:.2f} s an image for its bounds")


COMMANDS = (audit, evaluate, fairer, certify)

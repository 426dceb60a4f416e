"""Kinds of files and folders as people have them, built here: what the audit says of each stands in docs/."""

from __future__ import annotations

import argparse
import datetime
import re
import shutil
import zipfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import learnt, tiny_dataset
from PIL import Image
from torch import Tensor, nn

from frlkit import PROJECT, KitError, data, models
from frlkit.audit import choice, readings
from frlkit.audit.doubts import doubts
from frlkit.data import Dataset

TABLE = (PROJECT / "docs" / "audit.md").read_text(encoding="utf-8")


def lenet(activation: type[nn.Module], pool: type[nn.Module], padding: int = 0, last: int = 5, colours: int = 1) -> Any:
    """LeNet-5 as people write it: no code of the kit."""
    torch.manual_seed(0)
    first = [nn.Conv2d(colours, 6, 5, padding=padding), activation(), pool(2)]
    rest = [nn.Conv2d(6, 16, 5), activation(), pool(2), nn.Flatten(), nn.Linear(16 * last**2, 120), activation()]
    return nn.Sequential(*first, *rest, nn.Linear(120, 84), activation(), nn.Linear(84, 10))


def names(network: nn.Module, *layers: str) -> dict[str, Tensor]:
    """The weights under the names that people give their layers."""
    kinds = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    return dict(zip(kinds, network.state_dict().values(), strict=True))


USUAL = ("conv1", "conv2", "fc1", "fc2", "fc3")


@pytest.fixture(scope="module")
def tiny(digits: Dataset) -> Dataset:
    """Enough test images to tell readings apart."""
    return tiny_dataset(digits, 40, 1, 30)


@pytest.fixture(scope="module")
def tiny28() -> Dataset:
    """The same at 28x28."""
    return tiny_dataset(data.load("digits", size=28), 40, 1, 30)


@pytest.fixture(scope="module")
def trained(tiny: Dataset, tiny28: Dataset) -> dict[str, nn.Module]:
    """Networks that have learnt the digits, each with its own preprocessing."""
    (x, y), (x28, _) = (part.train.batch(slice(None)) for part in (tiny, tiny28))
    return {
        "tanh": learnt(lenet(nn.Tanh, nn.AvgPool2d), x, y),
        "relu": learnt(lenet(nn.ReLU, nn.MaxPool2d, padding=2), x28 * 2 - 1, y),
        "small": learnt(lenet(nn.ReLU, nn.MaxPool2d, last=4), x28, y),
        "colour": learnt(lenet(nn.ReLU, nn.MaxPool2d, colours=3), x.repeat(1, 3, 1, 1) * 2 - 1, y),
    }


def resnet_as_public(last_bn: bool, counters: bool = True) -> dict[str, Tensor]:
    """A narrow PreAct-ResNet-18's weights under the names of public CIFAR code; not trained."""
    own, public, starts = models.build("preact_resnet18_w16", seed=0).state_dict(), {}, (0, 2, 4, 6)
    for name, tensor in own.items():
        if match := re.fullmatch(r"blocks\.(\d)\.(.+)", name):
            group = max(g for g in range(4) if starts[g] <= int(match[1]))
            rest = match[2].replace("shortcut.", "shortcut.0.")
            name = f"layer{group + 1}.{int(match[1]) - starts[group]}.{rest}"
        name = name.replace("stem.", "conv1.").replace("last_bn.", "bn.")
        if (last_bn or not name.startswith("bn.")) and (counters or "num_batches" not in name):
            public[name] = tensor
    return public


def put(content: Any, path: Path, name: str = "weights.pt") -> Path:
    torch.save(content, path / name)
    return path / name


def program(path: Path, inside: str) -> Path:
    with zipfile.ZipFile(path / "program.pt", "w") as archive:
        archive.writestr(f"program/{inside}", b"")
    return path / "program.pt"


def folder(place: Path, digits: Dataset, change: Callable[[Path], None] = lambda _: None) -> None:
    for part, split in (("train", digits.train), ("test", digits.test)):
        for number, (image, label) in enumerate(zip(split.images, split.labels.tolist(), strict=True)):
            file = place / part / str(label) / "images" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).convert("RGB").save(file)
    change(place)


def junk(place: Path) -> None:
    (place / "train" / "3" / "Thumbs.db").write_bytes(b"")
    (place / "train" / "3" / "notes.txt").write_text("", encoding="utf-8")


def as_tiny_imagenet(place: Path) -> None:
    """test/ becomes val/, one folder of images and a table of their classes; other images are without labels."""
    rows = []
    (place / "val" / "images").mkdir(parents=True)
    for file in sorted(place.glob("test/*/images/*.png")):
        rows.append(f"{file.name}\t{file.parts[-3]}\t0\t0\t31\t31\n")
        file.rename(place / "val" / "images" / file.name)
    (place / "val" / "val_annotations.txt").write_text("".join(rows), encoding="utf-8")
    shutil.rmtree(place / "test")
    shutil.copytree(place / "train" / "0" / "images", place / "test" / "images")


OWN = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 6, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2),
            nn.Flatten(), nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, num_classes),
        )

    def forward(self, x):
        return self.layers(x)
"""

Built = tuple[Path | None, dict[str, Any]]  # the file, and what else `readings.read` is told
Maker = Callable[[dict[str, nn.Module], Path, Dataset], Path | Built]


def colour(folder: str) -> Maker:
    """A colour LeNet-5's file, for the images of this folder."""
    return lambda n, p, d: (put(names(n["colour"], *USUAL), p), {"dataset": f"folder:{p / folder}"})


KINDS: dict[str, Maker] = {
    "a state_dict, tanh and average pooling, `Linear(400, 120)`": lambda n, p, d: put(names(n["tanh"], *USUAL), p),
    "the same as safetensors, its names sorted": lambda n, p, d: saved(names(n["tanh"], *USUAL), p),
    "the same in half precision": lambda n, p, d: put({k: v.half() for k, v in names(n["tanh"], *USUAL).items()}, p),
    "the same, third layer a convolution": lambda n, p, d: put(
        {k: v.view(120, 16, 5, 5) if v.shape == (120, 400) else v for k, v in names(n["tanh"], *USUAL).items()}, p
    ),
    "`{'net': …, 'acc': 97.0}`, names with `module.`": lambda n, p, d: put(
        {"net": {f"module.{k}": v for k, v in names(n["tanh"], *USUAL).items()}, "acc": 97.0, "epoch": 3}, p
    ),
    "`{'model_state_dict': …, 'optimizer': …}`, compiled (`_orig_mod.`)": lambda n, p, d: put(
        {
            "optimizer_state_dict": {"state": {0: {"exp_avg": torch.ones(3)}}},
            "model_state_dict": {f"_orig_mod.{k}": v for k, v in names(n["tanh"], *USUAL).items()},
        },
        p,
    ),
    "ReLU, max pooling, 28x28 padded, behind `Normalize(0.5, 0.5)`": lambda n, p, d: put(names(n["relu"], *USUAL), p),
    "the same with the `Normalize` in the file": lambda n, p, d: put(
        {"0.mean": torch.tensor([[[0.5]]]), "0.std": torch.tensor([[[0.5]]])}
        | {f"1.{k}": v for k, v in names(n["relu"], *USUAL).items()},
        p,
    ),
    "the same, asked for with `--mean 0.9 --std 0.1`": lambda n, p, d: (
        put(names(n["relu"], *USUAL), p),
        {"mean": (0.9,), "std": (0.1,)},
    ),
    "28x28 not padded, `Linear(256, 120)`": lambda n, p, d: put(names(n["small"], *USUAL), p),
    "colour LeNet-5 behind `Normalize(0.5, 0.5)`; nested folders, `Thumbs.db`, `.txt`": colour("photos"),
    "the same as Tiny ImageNet's archive: `val_annotations.txt`, no labels for test": colour("tiny"),
    "the same, a class of another name in `test/`": colour("spoilt"),
    "the same, two images cut short": colour("cut"),
    "an `.npz` of 16-bit arrays": lambda n, p, d: (
        put(names(n["colour"], *USUAL), p),
        {"dataset": f"folder:{arrays(p, d)}"},
    ),
    "weights and their average (`ema`) in one file": lambda n, p, d: put(
        {"ema": names(n["small"], *USUAL), "model": names(n["tanh"], *USUAL)}, p
    ),
    "your own class: `--model net.py:Net`": lambda n, p, d: own(n, p),
    "PreAct-ResNet-18 without a last batch norm, as the paper's code has it; untrained": lambda n, p, d: (
        put(resnet_as_public(False, counters=False), p),
        {"dataset": f"folder:{p / 'photos'}", "size": 32},
    ),
    "weights that are worse than their own `best_acc`": lambda n, p, d: put(
        {
            "state_dict": {k: v + 0.08 * torch.randn_like(v) for k, v in names(n["tanh"], *USUAL).items()},
            "best_acc": 99.1,
        },
        p,
    ),
    "a network of 7 classes": lambda n, p, d: put(models.build("lenet5", 7).state_dict(), p),
    "a list: the network's state, then the optimiser's": lambda n, p, d: put(
        [names(n["tanh"], *USUAL), {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}], p
    ),
    "of PyTorch Lightning, a loss with weights beside the network": lambda n, p, d: put(
        {
            "state_dict": {f"model.{k}": v for k, v in names(n["tanh"], *USUAL).items()}
            | {"criterion.weight": torch.ones(10), "val_acc.total": torch.tensor(3.0)},
            "hyper_parameters": {"lr": 0.1},
            "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.9)}},
        },
        p,
    ),
    "of the library robustness: the network under two names, its own normalisation": lambda n, p, d: put(
        {
            "model": {
                f"module.{way}{name}": tensor
                for way in ("", "attacker.")
                for name, tensor in (
                    {"normalizer.new_mean": torch.tensor([[[0.5]]]), "normalizer.new_std": torch.tensor([[[0.5]]])}
                    | {f"model.{k}": v for k, v in names(n["relu"], *USUAL).items()}
                ).items()
            },
            "epoch": 3,
        },
        p,
    ),
    "safetensors that are called `.pt`": lambda n, p, d: saved(names(n["tanh"], *USUAL), p).rename(p / "weights.pt"),
    "a `defaultdict` and a date beside the tensors": lambda n, p, d: put(
        {"state_dict": n["tanh"].state_dict(), "log": defaultdict(list), "when": datetime.date(2026, 1, 1)}, p
    ),
    "numpy scalars and a Namespace beside the tensors": lambda n, p, d: put(
        {"state_dict": n["tanh"].state_dict(), "acc": np.float64(97), "args": argparse.Namespace(lr=1)}, p
    ),
    "a whole pickled model": lambda n, p, d: put(n["tanh"], p),
    "a TorchScript file": lambda n, p, d: program(p, "constants.pkl"),
    "a `torch.export` file": lambda n, p, d: program(p, "models/model.json"),
}


def saved(tensors: dict[str, Tensor], path: Path) -> Path:
    safetensors.torch.save_file(tensors, path / "weights.safetensors")
    return path / "weights.safetensors"


def own(networks: dict[str, nn.Module], path: Path) -> Built:
    (path / "net.py").write_text(OWN, encoding="utf-8")
    weights = {f"layers.{name}": tensor for name, tensor in networks["tanh"].state_dict().items()}
    return put(weights, path), {"model": f"{path / 'net.py'}:Net"}


def arrays(path: Path, digits: Dataset) -> Path:
    parts = {"train": digits.train, "test": digits.test}
    x = {f"x_{name}": split.images[:, 0].numpy().astype(np.uint16) * 257 for name, split in parts.items()}
    np.savez(path / "a.npz", **x, **{f"y_{name}": split.labels.numpy() for name, split in parts.items()})
    return path / "a.npz"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, tiny: Dataset) -> Path:
    place = tmp_path_factory.mktemp("folders")
    folder(place / "photos", tiny, junk)
    folder(place / "tiny", tiny, as_tiny_imagenet)
    folder(place / "spoilt", tiny, lambda f: (f / "test" / "3").rename(f / "test" / "drei"))
    folder(place / "cut", tiny, lambda f: [file.write_bytes(b"") for file in sorted(f.rglob("test/3/*/*.png"))[:2]])
    return place


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_said_of_each_stands_in_the_documentation(
    kind: str,
    trained: dict[str, nn.Module],
    tiny: Dataset,
    tiny28: Dataset,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    load = data.load

    def tiny_load(name: str, **rest: Any) -> Dataset:
        return load(name, **rest) if name != "digits" else tiny28 if rest.get("size") == 28 else tiny

    monkeypatch.setattr(data, "load", tiny_load)
    monkeypatch.setattr(choice, "FEW", 100)
    monkeypatch.setenv("XDG_CACHE_HOME", str(photos / "cache"))
    for name in ("photos", "tiny", "spoilt", "cut"):
        (tmp_path / name).symlink_to(photos / name)
    torch.manual_seed(0)
    built = KINDS[kind](trained, tmp_path, tiny)
    path, told = built if isinstance(built, tuple) else (built, {})
    try:
        found = readings.read(path, **{"dataset": "digits", **told})
        says = [found.title, *(f"doubtful: {doubt}" for doubt in found.doubts)]
        says += [f"doubtful: {doubt}" for doubt in doubts(found.model, found.data.test, found.said_error)]
    except KitError as error:
        says = [f"Error: {error}"]
    notes = [line.partition(": ")[2] for line in dict.fromkeys(capsys.readouterr().err.splitlines())]
    said = "; ".join([line.rpartition("folder:")[2] for line in notes if "skipped" in line] + says)
    said = re.sub(rf"{tmp_path}/(\w+)\.(pt|safetensors)", r"\1.\2", said).replace(f"{tmp_path}/", "")
    row = f"| {kind} | {masked(said)} |"
    assert row in TABLE.splitlines(), row


def masked(said: str) -> str:
    """Without what rounding on another machine, or one of 300 images, may change."""
    said = re.sub(
        r"; doubtful: the file could as well be read as .*?: say which, with --[^;]*", "", said.replace("|", "/")
    )
    said = re.sub(r"read as .*? are wrong, and read as .*?%:", "read as A, 9% are wrong, and read as B, 9%:", said)
    return re.sub(r"[\d.]+%", "…%", said)

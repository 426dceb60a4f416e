"""What several test files share: small data, one thread, a fixed order of hypothesis' examples."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from torch import Tensor, nn

from frlkit import data, models
from frlkit.attacks import pgd
from frlkit.data import Dataset, Split

settings.register_profile("kit", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("kit")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and their children, ignore it
torch.set_num_threads(1)  # small tensors: quicker, and the same whatever the machine
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of what tests start, too: workers share the cores


def head_of_each_class(split: Split, count: int) -> Split:
    """The first `count` images of every class, in their old order."""
    index = torch.cat([(split.labels == name).nonzero()[:count, 0] for name in split.labels.unique()]).sort().values
    return split.take(index)


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return data.load("digits")


def tiny_dataset(digits: Dataset, *sizes: int) -> Dataset:
    """So many images of each class to train, to validate and to test."""
    splits = zip((digits.train, digits.validation, digits.test), sizes, strict=True)
    return Dataset("digits", digits.class_names, *(head_of_each_class(split, count) for split, count in splits))


@pytest.fixture(scope="session")
def tiny(digits: Dataset) -> Dataset:
    """200 training images of the digits, 30 to validate and 50 to test, all ten classes alike."""
    return tiny_dataset(digits, 20, 3, 5)


@pytest.fixture(scope="session")
def sound(tiny: Dataset) -> nn.Module:
    """A LeNet-5 that has learnt the tiny digits."""
    return learnt(models.build("lenet5", seed=0), *tiny.train.batch(slice(None)))


def learnt(network: nn.Module, x: Tensor, y: Tensor, epochs: int = 60) -> nn.Module:
    """The network after so many steps on all images at once."""
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(epochs):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    return network.eval()


@pytest.fixture(scope="session")
def tiny28() -> Dataset:
    """The same images at 28x28."""
    return tiny_dataset(data.load("digits", size=28), 20, 3, 5)


@pytest.fixture(scope="session")
def trained(digits: Dataset) -> nn.Module:
    """A LeNet-5 after a little adversarial training: at 8/255 some images are verified, some not, some undecided."""
    model, eps = models.build("lenet5", seed=1), 8 / 255
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(120):
        x, y = digits.train.batch(torch.randint(len(digits.train), (64,), generator=generator))
        x = pgd(model, x, y, eps, eps / 2, 3, generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="session")
def smoke_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where notebooks of the smoke profile keep their runs, whoever executes them: trained once, reloaded after that.

    Workers of pytest-xdist share it; that of two processes one waits for the other's run is the kit's own business.
    """
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "smoke_runs"


@pytest.fixture(scope="session")
def fashion_mnist() -> Dataset:
    raw = data.root() / "FashionMNIST" / "raw"
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    if not all((raw / f"{name}-ubyte").exists() for name in names):
        pytest.skip("needs Fashion-MNIST: put FashionMNIST/raw/ under FRLKIT_DATA or ./data")
    return data.load("fashion_mnist")

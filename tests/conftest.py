"""What several test files share: small data, one thread, a fixed order of hypothesis' examples."""

from __future__ import annotations

import signal

import pytest
import torch
from hypothesis import settings

from frlkit import data
from frlkit.data import Dataset, Split

settings.register_profile("kit", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("kit")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and their children, ignore it
torch.set_num_threads(1)  # small tensors: quicker, and the same whatever the machine


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
def fashion_mnist() -> Dataset:
    raw = data.root() / "FashionMNIST" / "raw"
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    if not all((raw / f"{name}-ubyte").exists() for name in names):
        pytest.skip("needs Fashion-MNIST: put FashionMNIST/raw/ under FRLKIT_DATA or ./data")
    return data.load("fashion_mnist")

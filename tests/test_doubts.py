"""A sound network raises no doubt; every way of being wrong raises its own."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from frlkit.audit.doubts import doubts
from frlkit.data import Dataset


class Wrapped(nn.Module):
    """A network with something done to its images before and its logits after."""

    def __init__(self, network: nn.Module, before: object = None, after: object = None) -> None:
        super().__init__()
        self.network, self.before, self.after = network, before, after

    def forward(self, x: Tensor) -> Tensor:
        logits = self.network(self.before(x) if self.before else x)
        return self.after(logits) if self.after else logits


def test_a_sound_network_raises_none(sound: nn.Module, tiny: Dataset) -> None:
    assert doubts(sound, tiny.test) == []


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (None, lambda z: z.softmax(1), "returns probabilities"),
        (lambda x: (x * 4).round() / 4, None, "no input gradient at all"),
        (lambda x: x.detach() + 0 * x, None, "no input gradient at all"),
        (lambda x: (2 * x).detach() - x, None, "seem to be masked"),  # the gradient points the wrong way
        (lambda x: x + 3 * torch.rand_like(x), None, "not deterministic"),
        (None, lambda z: z * 0 + torch.eye(10)[torch.randint(0, 10, (len(z),))] + z * 1e-9, "not deterministic"),
    ],
)
def test_each_fault_is_named(sound: nn.Module, tiny: Dataset, before: object, after: object, words: str) -> None:
    torch.manual_seed(0)
    assert any(re.search(words, sentence) for sentence in doubts(Wrapped(sound, before, after), tiny.test))


def test_labels_that_do_not_matter(tiny: Dataset) -> None:
    class Oracle(nn.Module):
        """Knows the labels that the check is about to draw."""

        def forward(self, x: Tensor) -> Tensor:
            from frlkit.evaluation import stream

            drawn = torch.randint(0, 10, (len(x),), generator=stream(1))
            return torch.eye(10)[drawn] * 9 + 0 * x.mean((1, 2, 3))[:, None]

    assert any("random labels" in sentence for sentence in doubts(Oracle(), tiny.test))

"""Interval bounds against hand-computed numbers, brute force and CROWN; and what training with them does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from frlkit import KitError, interval, models
from frlkit.attacks import pgd
from frlkit.audit import crown
from frlkit.data import Dataset

EPS = 8 / 255


def test_by_hand() -> None:
    """LeNet-5 whose only path is one weight a layer: tanh(2 x) / 4, times 1, tanh, ..., so every bound is a number."""
    model = models.build("lenet5", seed=0)
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
        model.conv1.weight[0, 0, 0, 0] = 2.0
        for layer in (model.conv2, model.conv3):
            layer.weight[0, 0, 0, 0] = 1.0
        model.fc1.weight[0, 0] = -1.0
        model.fc2.weight[3, 0] = 5.0
        model.fc2.bias[1] = 0.25
    x, y = torch.full((1, 1, 32, 32), 0.5), torch.tensor([3])
    high, low = torch.tensor(1.2).tanh(), torch.tensor(0.8).tanh()  # every pixel is alike, so pooling changes nothing
    for _ in range(2):
        high, low = high.tanh(), low.tanh()
    worst = 5 * high.tanh()  # of -z_3 = -5 * tanh(-t)
    found = interval.worst_logits(model, x, y, 0.1)
    torch.testing.assert_close(found[0, 0], worst)
    torch.testing.assert_close(found[0, 1], worst + 0.25)
    assert found[0, 3] == 0


@pytest.mark.parametrize("name", ["lenet5", "cnn3"])
def test_bounds_hold_attacks_and_are_exact_without_a_radius(name: str) -> None:
    model = models.build(name, 10, seed=1).eval()
    x = torch.rand(3, *model.image_shape, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 4, 9])
    for eps in (0.0, 1 / 255, EPS):
        images = pgd(model, x, y, eps, eps / 4, 10, loss="margin")
        with torch.no_grad():
            logits = model(images)
            worst = interval.worst_logits(model, x, y, eps)
        found = logits - logits.gather(1, y[:, None])
        assert (found <= worst + 1e-5).all()
        if eps == 0:
            torch.testing.assert_close(found, worst, rtol=0, atol=1e-5)


def test_crown_is_tighter(tiny: Dataset) -> None:
    model = models.build("lenet5", seed=1).eval()
    x, y = tiny.test.batch(slice(0, 2))
    bounds = crown.margins(model, x, y, EPS)
    others = ~bounds.isinf()
    assert (bounds > -interval.worst_logits(model, x, y, EPS) - 1e-3)[others].all()


def test_training_with_it_certifies(digits: Dataset) -> None:
    """After 120 batches: intervals then certify a good part at 8/255, and nothing of the network before."""
    model = models.build("lenet5", seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    x, y = digits.test.batch(slice(0, 200))

    def certified(model: nn.Module) -> float:
        with torch.no_grad():
            worst = interval.worst_logits(model, x, y, EPS)
        return float((worst.scatter(1, y[:, None], -torch.inf).amax(1) < 0).float().mean())

    assert certified(model) == 0
    for step in range(120):
        batch = digits.train.batch(torch.randint(len(digits.train), (64,), generator=generator))
        ramp = interval.warm_up(step / 120)
        loss = interval.certified_loss(model, *batch, ramp * EPS, 0.5 * ramp)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert certified(model) > 0.2


def test_loss_is_between_its_terms(tiny: Dataset) -> None:
    model = models.build("lenet5", seed=2)
    x, y = tiny.test.batch(slice(0, 8))
    clean, worst = (interval.certified_loss(model, x, y, EPS, share) for share in (0.0, 1.0))
    torch.testing.assert_close(clean, F.cross_entropy(model(x), y))
    torch.testing.assert_close(interval.certified_loss(model, x, y, EPS, 0.25), 0.75 * clean + 0.25 * worst)
    attacked = pgd(model, x, y, EPS, EPS / 4, 10)
    assert clean < F.cross_entropy(model(attacked), y) < worst


def test_bad_input() -> None:
    with pytest.raises(KitError, match="share = 2"):
        interval.certified_loss(models.build("lenet5"), torch.rand(1, 1, 32, 32), torch.tensor([0]), EPS, 2)
    with pytest.raises(KitError, match="ResNet is not supported"):
        interval.worst_logits(models.build("preact_resnet18"), torch.rand(1, 3, 32, 32), torch.tensor([0]), EPS)


def test_warm_up() -> None:
    assert [interval.warm_up(progress) for progress in (0, 0.1, 0.35, 0.6, 1)] == pytest.approx([0, 0, 0.5, 1, 1])

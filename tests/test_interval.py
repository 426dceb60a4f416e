"""Interval bounds against hand-computed numbers, brute force and CROWN; and what training with them does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from frlkit import KitError, fairness, interval, losses, models
from frlkit.attacks import pgd
from frlkit.audit import crown
from frlkit.data import Dataset, Split
from frlkit.evaluation import stream
from frlkit.recipes import FairConfig

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
    balance, config = even(10), FairConfig("certified", ramp=0.6)
    assert interval.class_errors(model, digits.test, EPS).mean() == 1
    for step in range(120):
        batch = digits.train.batch(torch.randint(len(digits.train), (64,), generator=generator))
        optimizer.zero_grad()
        losses.loss(model, *batch, config, stream(0), balance, step / 120).backward()
        optimizer.step()
    assert interval.class_errors(model, digits.test, EPS).mean() < 0.8


def even(classes: int) -> fairness.Setting:
    weights = torch.full((classes,), 1 / classes)
    return fairness.Setting(weights, weights, torch.ones(classes))


def test_class_errors(tiny: Dataset) -> None:
    """Without a radius the natural error; more with one."""
    model = models.build("lenet5", seed=4).eval()
    x, y = tiny.test.batch(slice(None))
    split = Split(tiny.test.images, model(x).argmax(1), classes=10)  # its own predictions: some class is never one
    with pytest.raises(KitError, match="has no image in this split"):
        interval.class_errors(model, split, 0.0)
    found = interval.class_errors(model, tiny.test, 0.0)
    wrong = model(x).argmax(1) != y
    assert found == pytest.approx([float(wrong[y == label].float().mean()) for label in range(10)])
    assert (interval.class_errors(model, tiny.test, EPS) >= found).all()


class TestLoss:
    def test_is_between_its_terms(self, tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
        model = models.build("lenet5", seed=2)
        x, y = tiny.test.batch(slice(0, 8))

        def loss(kappa: float) -> torch.Tensor:
            monkeypatch.setattr(losses, "KAPPA", kappa)
            return losses.loss(model, x, y, FairConfig("certified"), stream(0), even(10)).detach()

        torch.testing.assert_close(loss(0.0), F.cross_entropy(model(x), y).detach())
        torch.testing.assert_close(loss(0.25), 0.75 * loss(0.0) + 0.25 * loss(1.0))
        attacked = pgd(model, x, y, EPS, EPS / 4, 10)
        assert loss(0.0) < F.cross_entropy(model(attacked), y) < loss(1.0)

    def test_radius_and_kappa_rise_together(self, tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
        model, config = models.build("lenet5", seed=2), FairConfig("certified", ramp=0.5)
        x, y = tiny.test.batch(slice(0, 8))
        found = losses.loss(model, x, y, config, stream(0), even(10), 0.25)
        half = FairConfig("certified", eps_255=4.0)
        monkeypatch.setattr(losses, "KAPPA", 0.25)
        torch.testing.assert_close(found, losses.loss(model, x, y, half, stream(0), even(10)))

    def test_weights_and_radii_by_class(self, tiny: Dataset) -> None:
        """Against a plain loop over images."""
        model = models.build("lenet5", seed=2)
        index = torch.cat([(tiny.test.labels == label).nonzero()[:3, 0] for label in range(3)])
        x, y = tiny.test.batch(index)
        balance = fairness.Setting(*(torch.rand(10, generator=stream(number)) + 0.5 for number in range(3)))
        found = losses.loss(model, x, y, FairConfig("certified"), stream(0), balance)
        clean = worst = 0.0
        for image, label in zip(x, y, strict=True):
            logits = model(image[None])
            bound = interval.worst_logits(model, image[None], label[None], EPS * float(balance.radius_factors[label]))
            clean = clean + balance.weights_nat[label] * F.cross_entropy(logits, label[None])
            worst = worst + balance.weights_bdy[label] * F.cross_entropy(bound, label[None])
        clean, worst = clean / balance.weights_nat[y].sum(), worst / balance.weights_bdy[y].sum()
        torch.testing.assert_close(found, 0.5 * clean + 0.5 * worst)


def test_bad_input() -> None:
    with pytest.raises(KitError, match="ramp = 2"):
        FairConfig("certified", ramp=2.0)
    with pytest.raises(KitError, match="ResNet is not supported"):
        interval.worst_logits(models.build("preact_resnet18"), torch.rand(1, 3, 32, 32), torch.tensor([0]), EPS)


def test_warm_up() -> None:
    assert [interval.warm_up(progress, 0.5) for progress in (0, 0.25, 0.5, 1)] == pytest.approx([0, 0.5, 1, 1])
    assert interval.warm_up(0, 0) == 1

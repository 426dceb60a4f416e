"""PGD against torchattacks, against numbers worked out by hand, and against what it promises of the ball."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchattacks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from frlkit import KitError, attacks, evaluation, kernels, models
from frlkit.attacks import LOSSES, n_fgsm, objective, pgd
from frlkit.models import ConvNet, ResNet

EPS, STEP = 8 / 255, 2 / 255


class Linear(nn.Module):
    """Two logits, w.x and -w.x: the gradient's sign is known everywhere."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)

    def forward(self, x: Tensor) -> Tensor:
        logit = (x * self.weights).sum((1, 2, 3))
        return torch.stack([logit, -logit], 1)


class Moody(nn.Module):
    """Dropout and batch normalisation, modules whose mode matters."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(x)).flatten(1))


@pytest.fixture(scope="module")
def lenet() -> nn.Module:
    """A LeNet-5 with weights large enough that gradients are far from zero."""
    model = models.build("lenet5", seed=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model.eval()


def batch(count: int, seed: int = 0, size: int = 32) -> tuple[Tensor, Tensor]:
    """Images whose pixels are often exactly 0 or 1, where the ball is cut by [0, 1], and labels of ten classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 1, size, size, generator=generator).mul(1.6).sub(0.3).clamp(0, 1)
    return x, torch.randint(0, 10, (count,), generator=generator)


class TestNFgsm:
    """Against the method's own formula, from the same noise, on the fast paths and on plain autograd."""

    @pytest.mark.parametrize("kernel", ["auto", "off"])
    def test_formula(self, lenet: nn.Module, monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
        monkeypatch.setenv("FRLKIT_KERNEL", kernel)
        x, y = batch(20)
        noise = torch.empty_like(x).uniform_(-1, 1, generator=torch.Generator().manual_seed(5))
        start = (x + 2 * EPS * noise).clamp(0, 1).requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(lenet(start), y, reduction="sum"), start)
        expected = (start.detach() + EPS * gradient.sign()).clamp(0, 1)
        ours = n_fgsm(lenet, x, y, EPS, torch.Generator().manual_seed(5))
        clear = gradient.abs() > 1e-4 * gradient.abs().max()
        assert clear.float().mean() > 0.9
        torch.testing.assert_close(ours[clear], expected[clear], rtol=0, atol=1e-6)
        assert (ours - x).abs().max() > 2 * EPS  # it leaves the ball, as published


class TestOnly:
    """Samples left out come back as they are, and the others do not notice."""

    @pytest.mark.parametrize("restarts", [1, 2])
    def test_the_others_do_not_notice(self, lenet: nn.Module, restarts: int) -> None:
        x, y = batch(37)
        only = torch.rand(37, generator=torch.Generator().manual_seed(1)) < 0.6
        attack = (lenet, x, y, EPS, STEP, 4)
        whole, part = (
            pgd(*attack, restarts=restarts, generator=torch.Generator().manual_seed(2), only=rows)
            for rows in (None, only)
        )
        torch.testing.assert_close(part[only], whole[only])
        assert torch.equal(part[~only], x[~only])
        assert not torch.equal(whole[~only], x[~only])

    def test_nobody(self, lenet: nn.Module) -> None:
        x, y = batch(3)
        assert torch.equal(pgd(lenet, x, y, EPS, STEP, 2, only=torch.zeros(3, dtype=torch.bool)), x)


class TestAgainstTorchattacks:
    def oracle(self, model: nn.Module, steps: int, random_start: bool) -> torchattacks.PGD:
        return torchattacks.PGD(model, eps=EPS, alpha=STEP, steps=steps, random_start=random_start)

    @pytest.mark.parametrize("kernel", ["auto", "off"])
    @pytest.mark.parametrize("random_start", [False, True])
    def test_same_start_same_result(
        self, lenet: nn.Module, monkeypatch: pytest.MonkeyPatch, kernel: str, random_start: bool
    ) -> None:
        monkeypatch.setenv("FRLKIT_KERNEL", kernel)
        x, y = batch(32)
        torch.manual_seed(7)
        ours = pgd(lenet, x, y, EPS, STEP, 10, random_start=random_start)
        torch.manual_seed(7)
        theirs = self.oracle(lenet, 10, random_start)(x, y)
        # A gradient within rounding of zero may change sign: at most one pixel in a thousand ends elsewhere.
        assert float(((ours - theirs).abs() > 1e-6).float().mean()) <= 1e-3
        assert float((ours - x).abs().mean()) > 0.3 * EPS  # and both really went somewhere

    def test_one_step_is_the_fast_gradient_sign(self, lenet: nn.Module) -> None:
        x, y = batch(16)
        ours = pgd(lenet, x, y, EPS, EPS, 1, random_start=False)
        theirs = torchattacks.FGSM(lenet, eps=EPS)(x, y)
        assert float(((ours - theirs).abs() > 1e-6).float().mean()) <= 1e-3


class TestByHand:
    weights = torch.tensor([[[[1.0, -2.0], [0.0, 0.5]]]])
    x = torch.tensor([[[[0.5, 0.5], [0.5, 0.98]]], [[[0.1, 0.02], [0.5, 0.5]]]])

    def test_one_step_goes_against_the_label(self) -> None:
        y = torch.tensor([1, 0])  # the first image's loss grows with w.x, the second's falls
        result = pgd(Linear(self.weights), self.x, y, 0.1, 0.04, 1, random_start=False)
        expected = torch.tensor([[[[0.54, 0.46], [0.5, 1.0]]], [[[0.06, 0.06], [0.5, 0.46]]]])
        torch.testing.assert_close(result, expected)

    @pytest.mark.parametrize("loss", ["ce", "margin"])
    def test_many_steps_end_on_the_edge_of_the_ball(self, loss: str) -> None:
        y = torch.tensor([1, 0])
        result = pgd(Linear(self.weights), self.x, y, 0.1, 0.04, 5, random_start=False, loss=loss)
        expected = torch.tensor([[[[0.6, 0.4], [0.5, 1.0]]], [[[0.0, 0.12], [0.5, 0.4]]]])
        torch.testing.assert_close(result, expected)

    def test_step_and_radius_of_each_sample(self) -> None:
        y = torch.tensor([1, 0])
        radius, step = torch.tensor([0.03, 0.2]), torch.tensor([0.04, 0.01])
        result = pgd(Linear(self.weights), self.x, y, radius, step, 2, random_start=False)
        expected = torch.tensor([[[[0.53, 0.47], [0.5, 1.0]]], [[[0.08, 0.04], [0.5, 0.48]]]])
        torch.testing.assert_close(result, expected)

    def test_no_steps_is_the_start(self) -> None:
        y = torch.tensor([1, 0])
        assert torch.equal(pgd(Linear(self.weights), self.x, y, 0.1, 0.04, 0, random_start=False), self.x)

    def test_uniform_start_fills_the_ball(self) -> None:
        x = torch.full((40, 1, 32, 32), 0.5)
        start = pgd(Linear(torch.ones(1)), x, torch.zeros(40, dtype=torch.int64), 0.1, 0.1, 0)
        shift = (start - x).flatten()
        assert float(shift.min()) == pytest.approx(-0.1, abs=1e-3)
        assert float(shift.max()) == pytest.approx(0.1, abs=1e-3)
        assert float(shift.mean()) == pytest.approx(0, abs=0.002)
        assert float(shift.std()) == pytest.approx(0.2 / math.sqrt(12), rel=0.02)

    def test_gaussian_start_is_a_thousandth_wide(self) -> None:
        x = torch.full((40, 1, 32, 32), 0.5)
        y = torch.zeros(40, dtype=torch.int64)
        start = pgd(Linear(torch.ones(1)), x, y, 0.1, 0.1, 0, random_start="gaussian")
        assert float((start - x).std()) == pytest.approx(1e-3, rel=0.05)
        tight = pgd(Linear(torch.ones(1)), x, y, 5e-4, 0.1, 0, random_start="gaussian")
        assert float((tight - x).abs().max()) <= 5e-4 + 1e-7


class TestObjective:
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, -1.0, -4.0], [5.0, 5.0, 5.0]])

    def test_margin_by_hand(self) -> None:
        found = objective(self.logits, torch.tensor([2, 0, 1]), "margin")
        assert found.tolist() == [1.0, -1.0, 0.0]

    def test_cross_entropy_by_hand(self) -> None:
        found = objective(self.logits, torch.tensor([2, 0, 1]), "ce")
        first = math.log(math.e + math.e**3 + math.e**2) - 2
        second = math.log(1 + math.exp(-1) + math.exp(-4))
        assert found.tolist() == pytest.approx([first, second, math.log(3)])

    def test_divergence_is_torchs(self) -> None:
        generator = torch.Generator().manual_seed(0)
        clean, attacked = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
        expected = torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=clean), torch.distributions.Categorical(logits=attacked)
        )
        torch.testing.assert_close(objective(attacked, clean.softmax(1), "kl"), expected)
        assert float(objective(clean, clean.softmax(1), "kl").abs().max()) < 1e-12

    @pytest.mark.parametrize("kernel", ["auto", "off"])
    @pytest.mark.parametrize("loss", attacks.LOSSES)
    def test_the_attack_raises_what_it_attacks(
        self, lenet: nn.Module, monkeypatch: pytest.MonkeyPatch, loss: str, kernel: str
    ) -> None:
        monkeypatch.setenv("FRLKIT_KERNEL", kernel)
        x, y = batch(16)
        targets = lenet(x).softmax(1).detach() if loss == "kl" else y
        values = []
        for steps in (0, 2, 10):
            generator = torch.Generator().manual_seed(0)
            attacked = pgd(lenet, x, y, EPS, STEP, steps, loss=loss, generator=generator)
            values.append(float(objective(lenet(attacked), targets, loss).detach().mean()))
        assert values[0] < values[1] < values[2]

    @pytest.mark.parametrize("kernel", ["auto", "off"])
    def test_divergence_attack_of_trades_as_its_authors_wrote_it(
        self, lenet: nn.Module, monkeypatch: pytest.MonkeyPatch, kernel: str
    ) -> None:
        monkeypatch.setenv("FRLKIT_KERNEL", kernel)
        x, y = batch(16)
        torch.manual_seed(3)
        ours = pgd(lenet, x, y, EPS, STEP, 5, random_start="gaussian", loss="kl")
        torch.manual_seed(3)
        adversarial = x + 0.001 * torch.randn(x.shape)
        clean = lenet(x).softmax(1).detach()
        adversarial = torch.clamp(adversarial, 0, 1)
        for _ in range(5):
            adversarial.requires_grad_()
            divergence = F.kl_div(F.log_softmax(lenet(adversarial), dim=1), clean, reduction="sum")
            (gradient,) = torch.autograd.grad(divergence, adversarial)
            adversarial = adversarial.detach() + STEP * torch.sign(gradient)
            adversarial = torch.min(torch.max(adversarial, x - EPS), x + EPS).clamp(0, 1)
        # The divergence is nearly flat at its start, so more signs than usual hang on the last digit.
        assert float(((ours - adversarial).abs() > 1e-6).float().mean()) <= 1e-2

    def test_labels_do_not_matter_to_the_divergence(self, lenet: nn.Module) -> None:
        x, y = batch(8)
        first, second = (
            pgd(lenet, x, labels, EPS, STEP, 3, loss="kl", generator=torch.Generator().manual_seed(0))
            for labels in (y, (y + 1) % 10)
        )
        assert torch.equal(first, second)


class TestBall:
    @settings(max_examples=40)
    @given(
        eps=st.one_of(st.floats(0, 1), st.lists(st.floats(0, 1), min_size=4, max_size=4)),
        step=st.one_of(st.floats(0, 1), st.lists(st.floats(0, 1), min_size=4, max_size=4)),
        steps=st.integers(0, 3),
        start=st.sampled_from([True, False, "gaussian"]),
        loss=st.sampled_from(attacks.LOSSES),
        restarts=st.integers(1, 2),
        seed=st.integers(0, 100),
    )
    def test_never_outside(
        self,
        lenet: nn.Module,
        eps: float | list[float],
        step: float | list[float],
        steps: int,
        start: bool | str,
        loss: str,
        restarts: int,
        seed: int,
    ) -> None:
        x, y = batch(4, seed)
        radius = torch.tensor(eps) if isinstance(eps, list) else eps
        step_size = torch.tensor(step) if isinstance(step, list) else step
        kept = x.clone()
        result = pgd(lenet, x, y, radius, step_size, steps, random_start=start, restarts=restarts, loss=loss)
        column = torch.as_tensor(radius, dtype=torch.float32).expand(4).view(-1, 1, 1, 1)
        assert bool((result >= torch.maximum(x - column, torch.zeros(()))).all())
        assert bool((result <= torch.minimum(x + column, torch.ones(()))).all())
        assert result.shape == x.shape
        assert result.dtype == x.dtype
        assert torch.equal(x, kept)  # the input is not written to
        assert not result.requires_grad

    @pytest.mark.parametrize("start", [True, False, "gaussian"])
    @pytest.mark.parametrize("loss", attacks.LOSSES)
    @pytest.mark.parametrize("restarts", [1, 2])
    def test_radius_0_returns_the_image_itself(
        self, lenet: nn.Module, start: bool | str, loss: str, restarts: int
    ) -> None:
        x, y = batch(6)
        arguments = {"random_start": start, "loss": loss, "restarts": restarts}
        assert torch.equal(pgd(lenet, x, y, 0, STEP, 3, **arguments), x)
        mixed = pgd(lenet, x, y, torch.tensor([0, EPS, 0, EPS, 0, EPS]), STEP, 3, **arguments)
        assert torch.equal(mixed[::2], x[::2])
        assert not torch.equal(mixed[1::2], x[1::2])

    def test_an_empty_batch_stays_empty(self, lenet: nn.Module) -> None:
        x, y = batch(3)
        assert pgd(lenet, x[:0], y[:0], EPS, STEP, 2).shape == (0, 1, 32, 32)


class TestPerSample:
    @pytest.mark.parametrize("kernel", ["auto", "off"])
    def test_vectors_equal_one_sample_at_a_time(
        self, lenet: nn.Module, monkeypatch: pytest.MonkeyPatch, kernel: str
    ) -> None:
        monkeypatch.setenv("FRLKIT_KERNEL", kernel)
        x, y = batch(9)
        eps, step = torch.linspace(0, 0.2, 9), torch.linspace(0.05, 0.01, 9)
        together = pgd(lenet, x, y, eps, step, 4, random_start=False)
        for index in range(9):
            one = slice(index, index + 1)
            alone = pgd(lenet, x[one], y[one], float(eps[index]), float(step[index]), 4, random_start=False)
            assert float(((together[one] - alone).abs() > 1e-6).float().mean()) <= 2e-3

    def test_a_number_is_the_vector_of_it(self, lenet: nn.Module) -> None:
        x, y = batch(5)
        results = [
            pgd(lenet, x, y, eps, step, 3, generator=torch.Generator().manual_seed(0))
            for eps, step in ((EPS, STEP), (torch.tensor(EPS), STEP), (torch.full((5,), EPS), torch.full((5,), STEP)))
        ]
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


class TestRestarts:
    @pytest.mark.parametrize("loss", attacks.LOSSES)
    def test_more_tries_are_never_weaker(self, lenet: nn.Module, loss: str) -> None:
        x, y = batch(24)
        targets, judged = (lenet(x).softmax(1).detach(), "kl") if loss == "kl" else (y, "margin")
        scores = []
        for restarts in (1, 2, 5):
            generator = torch.Generator().manual_seed(0)
            attacked = pgd(lenet, x, y, EPS, STEP, 1, restarts=restarts, loss=loss, generator=generator)
            scores.append(objective(lenet(attacked), targets, judged).detach())
        assert bool((scores[1] >= scores[0] - 1e-6).all())
        assert bool((scores[2] >= scores[1] - 1e-6).all())
        assert float((scores[2] - scores[0]).max()) > 1e-4  # and some sample gained

    def test_each_sample_keeps_its_best_try(self, lenet: nn.Module) -> None:
        x, y = batch(12)
        generator = torch.Generator().manual_seed(0)
        tries = [pgd(lenet, x, y, EPS, STEP, 2, generator=generator) for _ in range(4)]
        margins = torch.stack([objective(lenet(attempt), y, "margin").detach() for attempt in tries])
        best = pgd(lenet, x, y, EPS, STEP, 2, restarts=4, generator=torch.Generator().manual_seed(0))
        for index, choice in enumerate(margins.argmax(0).tolist()):
            assert torch.equal(best[index], tries[choice][index])
        assert len(set(margins.argmax(0).tolist())) > 1


class TestGenerator:
    def test_the_generator_decides_and_nothing_else_is_drawn(self, lenet: nn.Module) -> None:
        x, y = batch(4)
        torch.manual_seed(0)
        expected = torch.rand(1)
        torch.manual_seed(0)
        first = pgd(lenet, x, y, EPS, STEP, 2, generator=torch.Generator().manual_seed(1))
        assert torch.equal(torch.rand(1), expected)
        assert torch.equal(pgd(lenet, x, y, EPS, STEP, 2, generator=torch.Generator().manual_seed(1)), first)
        assert not torch.equal(pgd(lenet, x, y, EPS, STEP, 2, generator=torch.Generator().manual_seed(2)), first)

    def test_without_one_the_global_generator_decides(self, lenet: nn.Module) -> None:
        x, y = batch(4)
        results = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            results.append(pgd(lenet, x, y, EPS, STEP, 2))
        assert torch.equal(results[0], results[1])
        assert not torch.equal(results[0], results[2])


class TestLeavesTheModelAlone:
    def moody(self) -> tuple[Moody, Tensor, Tensor]:
        """A network whose modules are in different modes, one parameter frozen."""
        torch.manual_seed(0)
        model = Moody().train()
        model.norm.eval()
        model.norm.weight.requires_grad_(False)
        return model, torch.rand(6, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])

    @pytest.mark.parametrize("restarts", [1, 2])
    def test_modes_flags_and_gradients(self, restarts: int) -> None:
        model, x, y = self.moody()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        pgd(model, x, y, 0.1, 0.05, 3, restarts=restarts)
        assert [module.training for module in (model, model.norm, model.drop, model.head)] == [True, False, True, True]
        assert [parameter.requires_grad for parameter in model.parameters()] == [False, True, True, True]
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_gradients_that_were_there_stay(self, lenet: nn.Module) -> None:
        model, x, y = self.moody()
        model.head.weight.grad = torch.full_like(model.head.weight, 3.0)
        pgd(model, x, y, 0.1, 0.05, 2)
        assert torch.equal(model.head.weight.grad, torch.full_like(model.head.weight, 3.0))

    def test_lenet_gets_no_gradient(self) -> None:
        model = models.build("lenet5", seed=0).train()
        x, y = batch(4)
        for loss in attacks.LOSSES:
            pgd(model, x, y, EPS, STEP, 2, loss=loss)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert model.training

    def test_the_attacked_network_is_in_eval_mode(self) -> None:
        model, x, y = self.moody()
        results = [pgd(model, x, y, 0.1, 0.05, 2, random_start=False) for _ in range(2)]
        assert torch.equal(*results)  # with dropout awake the two would differ
        seen = []
        model.head.register_forward_hook(lambda module, *_: seen.append((module.training, model.drop.training)))
        pgd(model, x, y, 0.1, 0.05, 2, restarts=2, loss="kl")
        assert seen
        assert set(seen) == {(False, False)}

    def test_restored_when_the_model_fails(self) -> None:
        model, x, y = self.moody()

        def fail(*_: object) -> None:
            raise RuntimeError("out of memory")

        handle = model.head.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            pgd(model, x, y, 0.1, 0.05, 2)
        handle.remove()
        assert [module.training for module in (model, model.norm, model.drop, model.head)] == [True, False, True, True]
        assert [parameter.requires_grad for parameter in model.parameters()] == [False, True, True, True]

    @pytest.mark.parametrize("kernel", ["auto", "off"])
    def test_works_where_gradients_are_switched_off(
        self, lenet: nn.Module, monkeypatch: pytest.MonkeyPatch, kernel: str
    ) -> None:
        monkeypatch.setenv("FRLKIT_KERNEL", kernel)
        x, y = batch(4)
        expected = pgd(lenet, x, y, EPS, STEP, 3, random_start=False)
        with torch.no_grad():
            assert torch.equal(pgd(lenet, x, y, EPS, STEP, 3, random_start=False), expected)


class TestBadInput:
    GOOD: dict[str, Any] = {"eps": EPS, "step_size": STEP, "steps": 1}

    def message(self, model: nn.Module, x: Tensor, y: Tensor, **arguments: Any) -> str:
        with pytest.raises(KitError) as caught:
            pgd(model, x, y, **{**self.GOOD, **arguments})
        assert len(str(caught.value).splitlines()) == 1
        assert model.training is False  # untouched
        return str(caught.value)

    @pytest.mark.parametrize("name", ["eps", "step_size"])
    @pytest.mark.parametrize(
        "value",
        [-0.1, math.nan, math.inf, "8/255", None, torch.ones(3), torch.ones(4, 1), torch.tensor([0.1, 0.1, -0.1, 0.1])],
        ids=["negative", "nan", "inf", "text", "None", "wrong length", "wrong shape", "one negative"],
    )
    def test_radius_and_step(self, lenet: nn.Module, name: str, value: Any) -> None:
        assert name in self.message(lenet, *batch(4), **{name: value})

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *(("steps", value) for value in (-1, 1.0, True, "3", None)),
            *(("restarts", value) for value in (0, -1, 1.0, True, "3")),
            *(("loss", value) for value in ("CE", "dlr", None, 3)),
            *(("random_start", value) for value in ("uniform", None, 2)),
        ],
    )
    def test_named_with_its_value(self, lenet: nn.Module, name: str, value: Any) -> None:
        assert f"{name} = {value!r}" in self.message(lenet, *batch(4), **{name: value})

    @pytest.mark.parametrize("value", [-0.01, 1.01, math.nan, 255.0])
    def test_images_outside_0_and_1(self, lenet: nn.Module, value: float) -> None:
        x, y = batch(4)
        x[1, 0, 3, 3] = value
        assert self.message(lenet, x, y).startswith("x has values")

    def test_images_of_another_kind(self, lenet: nn.Module) -> None:
        x, y = batch(4)
        assert "torch.uint8" in self.message(lenet, (255 * x).to(torch.uint8), y)
        assert "(4, 32, 32)" in self.message(lenet, x[:, 0], y)
        assert ", 1, 28, 28)" in self.message(lenet, x[..., :28, :28], y)

    def test_labels_of_another_kind(self, lenet: nn.Module) -> None:
        x, y = batch(4)
        assert "(3,)" in self.message(lenet, x, y[:3])
        assert "(4, 1)" in self.message(lenet, x, y[:, None])
        assert "torch.int32" in self.message(lenet, x, y.int())
        assert "torch.float32" in self.message(lenet, x, y.float())

    @pytest.mark.parametrize("kernel", ["auto", "off"])
    @pytest.mark.parametrize("label", [10, -1])
    @pytest.mark.parametrize("loss", ["ce", "margin"])
    def test_labels_the_network_does_not_have(
        self, lenet: nn.Module, monkeypatch: pytest.MonkeyPatch, kernel: str, label: int, loss: str
    ) -> None:
        monkeypatch.setenv("FRLKIT_KERNEL", kernel)
        x, y = batch(4)
        y[2] = label
        assert str(label) in self.message(lenet, x, y, loss=loss)


class TestReplayedSteps:
    """Steps that a GPU replays (`kernels.graphs`), with a graph that is played by hand where there is none."""

    x = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    y = torch.arange(6)

    @pytest.fixture
    def recorded(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """As on a GPU, but for the GPU; fills with the sizes of the batches whose step was recorded."""
        sizes: list[int] = []

        def record(step: Callable, own: list[Tensor]) -> SimpleNamespace:
            sizes.append(len(own[0]))
            return SimpleNamespace(replay=lambda: own[0].copy_(step(*own)))

        monkeypatch.setattr(kernels.graphs, "_record", record)
        monkeypatch.setattr(kernels.graphs, "_recorded", {})
        monkeypatch.setattr(kernels.graphs, "serves", lambda model, images: type(model) in (ConvNet, ResNet))
        return sizes

    def both(self, model: nn.Module, count: int = 6, **settings: Any) -> tuple[Tensor, Tensor]:
        """Attacked as it is set up here, and on the CPU as ever."""
        batch = (model, self.x[:count], self.y[:count], 8 / 255, 2 / 255, 5)
        found = []
        for patch in (contextlib.nullcontext(), pytest.MonkeyPatch.context()):
            with patch as other:
                if other:
                    other.setattr(kernels.graphs, "serves", lambda model, images: False)
                found.append(pgd(*batch, generator=torch.Generator().manual_seed(1), **settings))
        return found[0], found[1]

    @pytest.mark.parametrize("loss", LOSSES)
    def test_one_graph_serves_a_run(self, recorded: list[int], loss: str) -> None:
        """Its weights, statistics, images and radii change from batch to batch, in place."""
        model = models.build("cnn3", 10, seed=0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            replayed, eager = self.both(model, loss=loss)
            assert torch.equal(replayed, eager)
            F.cross_entropy(model(replayed), self.y).backward()
            optimizer.step()
        assert recorded == [6]

    def test_another_batch_loss_or_network_has_its_own(self, recorded: list[int]) -> None:
        model, other = (models.build("cnn3", 10, seed=seed) for seed in (0, 1))
        for asked in range(2):
            for subject, count, loss in ((model, 6, "ce"), (model, 4, "ce"), (model, 6, "kl"), (other, 6, "ce")):
                replayed, eager = self.both(subject, count, loss=loss)
                assert torch.equal(replayed, eager), asked
        assert recorded == [6, 4, 6, 6]

    def test_the_oldest_goes(self, recorded: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernels.graphs, "KEPT", 2)
        model = models.build("cnn3", 10, seed=0)
        for count in (1, 2, 3, 1, 3):
            assert torch.equal(*self.both(model, count))
        assert recorded == [1, 2, 3, 1] and len(kernels.graphs._recorded) == 2

    def test_weights_that_were_replaced_are_read(self, recorded: list[int]) -> None:
        model = models.build("cnn3", 10, seed=0)
        self.both(model)
        model.linear = nn.Linear(model.linear.in_features, 10)
        assert torch.equal(*self.both(model))
        assert recorded == [6, 6]

    def test_a_residual_networks_statistics_are_read_where_they_lie(self, recorded: list[int]) -> None:
        """Folded into its weights, which is a copy for one attack, they would be recorded every time."""
        model = models.build("preact_resnet18_w16", 10, seed=0)
        for _ in range(2):
            model.train()(self.x)  # moves them
            replayed, eager = self.both(model)
            assert (replayed - eager).abs().gt(1e-6).float().mean() < 0.02  # folding rounds otherwise
        assert recorded == [6]

    def test_a_graph_goes_with_its_network(self, recorded: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernels.graphs, "_record", lambda *_: SimpleNamespace(replay=lambda: None))
        model = models.build("cnn3", 10, seed=0)
        pgd(model, self.x, self.y, 8 / 255, 2 / 255, 5)
        assert len(kernels.graphs._recorded) == 1
        del model
        gc.collect()
        assert not kernels.graphs._recorded

    def test_a_part_of_the_images_is_not_replayed(self, recorded: list[int]) -> None:
        model = models.build("cnn3", 10, seed=0)
        assert torch.equal(*self.both(model, only=self.y < 3))
        assert recorded == []

    def test_whom_it_serves(self) -> None:
        model = models.build("cnn3", 10, seed=0)
        assert not kernels.graphs.serves(model, self.x)
        for count, served in ((256, True), (257, False)):
            there = type("Images", (), {"is_cuda": True, "__len__": lambda self, count=count: count})()
            assert kernels.graphs.serves(model, there) is served
        there = type("Images", (), {"is_cuda": True, "__len__": lambda self: 8})()
        assert not kernels.graphs.serves(models.build("lenet5", 10, seed=0), there)
        own = models.build("cnn3", 10, seed=0)
        assert kernels.graphs.serves(own, there)
        own.linear = type("Linear", (nn.Linear,), {})(own.linear.in_features, 10)
        assert not kernels.graphs.serves(own, there)
        model.linear.register_forward_hook(lambda *_: None)
        assert not kernels.graphs.serves(model, there)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    @pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
    @pytest.mark.parametrize("name", ["cnn3", "preact_resnet18_w16"])
    def test_on_a_gpu(self, name: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernels.graphs, "_recorded", {})
        monkeypatch.setattr(kernels, "folded", lambda model: model)  # which rounds otherwise
        model = models.place(models.build(name, 10, seed=0), "cuda")
        x, y = self.x.cuda(), self.y.cuda()
        for _ in range(2):
            found = []
            for most in (kernels.graphs.MOST, 0):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(kernels.graphs, "MOST", most)
                    start = torch.Generator("cuda").manual_seed(1)
                    with evaluation.number_format(precision, x.device):
                        found.append(pgd(model, x, y, 8 / 255, 2 / 255, 5, generator=start))
            assert (found[0] - found[1]).abs().gt(1e-6).float().mean() < 0.02
            with torch.no_grad():
                for weight in model.parameters():
                    weight.mul_(1.1)
        assert len(kernels.graphs._recorded) == 1

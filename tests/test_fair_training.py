"""Retraining runs: losses against plain loops, and runs that were stopped in every way against straight ones."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_training import StoppedError, assert_same_run, weights_of
from torch import Tensor, nn

from frlkit import PROJECT, KitError, checkpoint, evaluation, fairness, losses, models, recipes, records, runs, training
from frlkit.data import Dataset, Split
from frlkit.evaluation import Attack, stream
from frlkit.fairness import Setting
from frlkit.recipes import Config, FairConfig

QUICK = {"epochs": 3, "batch_size": 64, "steps": 2, "start_epochs": 1}
RESUMED = ("algorithm1_reweight", "algorithm1_remargin", "algorithm1_both", "official_both", "report_remargin")
RESUMED += ("certified_reweight,start=pgd_at,ramp=0.5",)
RESUMED += ("baseline_reweight", "dafa", "report_reweight,validation=0.1,update_images=28,smoothing=0.5,updates=2")


def fair(recipe: str, **values: Any) -> FairConfig:
    config = recipes.configure(recipe, "digits", 0, **{**QUICK, **values})
    assert isinstance(config, FairConfig)
    return config


@pytest.fixture(autouse=True)
def quick_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The standard attacks with two steps: their strength is not what is tested here."""
    quick = tuple(replace(attack, steps=2) for attack in evaluation.STANDARD)
    monkeypatch.setattr(records, "standard", lambda dataset, **_: quick)
    monkeypatch.setattr(training, "watched", lambda: False)


@pytest.fixture(scope="module")
def start(tiny: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of pgd_at, one epoch, to start from."""
    place = tmp_path_factory.mktemp("start")
    runs.run(recipes.configure("pgd_at", "digits", 0, epochs=1, batch_size=64), tiny, place)
    return place


def place_of(runs: Path, start: Path, recipe: str) -> Path:
    """The folder of a retraining run in `runs`, with the run it starts from beside it."""
    shutil.copytree(start, runs / "digits" / "pgd_at" / "seed0")
    return runs / "digits" / recipe / "seed0"


def history_of(place: Path) -> dict[str, Any]:
    return json.loads((place / "history.json").read_text(encoding="utf-8"))


class TestFairConfig:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            *(("method", value) for value in ("natural", "trades", "FRL", None)),
            *(("scheme", value) for value in ("cfa", "", None)),
            *((rate, value) for rate in ("alpha_nat", "alpha_bdy") for value in (-0.1, math.nan, math.inf, "1", None)),
            *(("alpha_margin", value) for value in (math.nan, -math.inf, "1", True)),
            *((name, value) for name in ("tau_nat", "tau_bdy") for value in (-0.01, 1.01, math.nan, "5%")),
            *(("target", value) for value in ("natural", None)),
            *(("bound", value) for value in (-0.1, 1.1, math.nan)),
            *(("radius_low", value) for value in (-0.1, 1.1, math.nan)),
            *(("radius_high", value) for value in (0.99, math.inf, math.nan)),
            *(("smoothing", value) for value in (0, 1.1, math.nan)),
            *(("weighting", value) for value in ("Softmax", None)),
            *(
                (name, value)
                for name in ("subtract_average", "accumulate", "clamp_state")
                for value in (1, "True", None)
            ),
            *((name, value) for name in ("predicted_targets", "unshuffled_labels") for value in (0, "False", None)),
            *(("strength", value) for value in (-1.0, math.nan, "1")),
            *(("chosen", value) for value in (-1, 1.0, True)),
            *(("start", value) for value in ("dafa", "pgd", None)),
            *((name, value) for name in ("start_epochs", "updates") for value in (0, 1.0, True)),
            *(("measure_255", value) for value in (-1, 256, math.nan)),
            *(("update_images", value) for value in (-1, 10.0, None)),
            *(("step", value) for value in ("Own", 2.0, None)),
            *(("beta", value) for value in (-1, math.nan)),  # a field of every run
        ],
    )
    def test_refused_by_name_with_the_value(self, field: str, value: Any) -> None:
        with pytest.raises(KitError) as caught:
            FairConfig(**{"method": "frl", field: value})
        assert str(caught.value).startswith(f"{field} = {value!r} is ")

    def test_a_plain_run_takes_no_method_or_field_of_these(self) -> None:
        with pytest.raises(KitError, match="^method = 'frl' is unknown"):
            Config("frl")
        with pytest.raises(KitError, match="'alpha_nat' is no field of a run of trades"):
            recipes.configure("trades,alpha_nat=1", "digits", 0)

    def test_a_variation_sets_its_fields_and_no_others(self) -> None:
        plain = recipes.configure("uniform", "digits", 0)
        varied = recipes.configure("uniform,beta=6,steps=20,accumulate=False,target=robust", "digits", 0, epochs=3)
        assert varied == replace(plain, beta=6.0, steps=20, accumulate=False, target="robust", epochs=3)
        assert (type(varied.beta), type(varied.steps)) == (float, int)
        assert recipes.configure("trades,lr=1e-2", "digits", 4) == Config("trades", "digits", seed=4, lr=0.01)
        assert runs.folder(Path("runs"), "uniform,beta=6", varied) == Path("runs/digits/uniform,beta=6/seed0")

    @pytest.mark.parametrize(
        ("variation", "words"),
        [
            ("betta=6", "'betta' is no field of a run of uniform"),
            ("beta", "beta = '' is not allowed: use a number from 0 to 1,000,000"),
            ("beta=", "beta = '' is not allowed"),
            ("beta=six", "beta = 'six' is not allowed: use a number from 0 to 1,000,000"),
            ("beta=nan", "beta = 'nan' is not allowed"),
            ("steps=2.5", "steps = '2.5' is not allowed: use a whole number from 1 to 100,000"),
            ("accumulate=yes", "accumulate = 'yes' is not allowed: use True or False"),
            ("accumulate=0", "accumulate = '0' is not allowed: use True or False"),
            ("target=boundry", "target = 'boundry' is unknown"),
            ("", "'' is no field"),
            ("METHODS=x", "'METHODS' is no field"),
            ("seed=1", "'seed' is no field"),  # arguments of their own
            ("dataset=fashion_mnist", "'dataset' is no field"),
        ],
    )
    def test_an_unknown_or_mistyped_variation_is_refused(self, variation: str, words: str) -> None:
        with pytest.raises(KitError, match=words):
            recipes.configure(f"uniform,{variation}", "digits", 0)

    def test_a_variation_of_an_unknown_recipe(self) -> None:
        with pytest.raises(KitError, match="^recipe = 'unifrom' is unknown: use uniform or .*frlkit recipes"):
            recipes.configure("unifrom,beta=6", "digits", 0)


CLASSES, SIZE = 4, 11
BALANCE = Setting(
    torch.tensor([0.1, 0.4, 0.3, 0.2]).double(),
    torch.tensor([0.35, 0.05, 0.15, 0.45]).double(),
    torch.tensor([1.0, 2.0, 0.5, 1.3]).double(),
)
EVEN = Setting(*(torch.full((CLASSES,), value).double() for value in (0.25, 0.25, 1.0)))


def small() -> tuple[nn.Module, Tensor, Tensor]:
    """A small smooth network, double precision, and a batch of 4x4 images for it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, CLASSES)).double()
        x, y = torch.rand(SIZE, 1, 4, 4).double(), torch.randint(CLASSES, (SIZE,))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model, x, y


def log_probabilities(model: nn.Module, image: Tensor) -> Tensor:
    """Of one image, (C,)."""
    logits = model(image[None])[0]
    return logits - logits.exp().sum().log()


def attacked_by_loops(
    model: nn.Module, x: Tensor, y: Tensor, config: FairConfig, balance: Setting, noise: Tensor, kl: bool
) -> list[Tensor]:
    """PGD sample by sample, from the given starting noise; each sample with its own class's radius and step."""
    radii = [config.eps_255 / 255 * float(balance.radius_factors[label]) for label in y]
    largest, found = max(float(balance.radius_factors[label]) for label in y), []
    for image, label, radius, start in zip(x, y, radii, noise, strict=True):
        step = config.step_255 / 255
        step *= {"own": float(balance.radius_factors[label]), "largest": largest, "fixed": 1.0}[config.step]
        low, high = (image - radius).clamp(min=0), (image + radius).clamp(max=1)
        clean = log_probabilities(model, image).detach()
        moved = (image + (start if kl else radius * start)).clamp(low, high)
        for _ in range(config.steps):
            moved = moved.detach().requires_grad_()
            probabilities = log_probabilities(model, moved)
            goal = (clean.exp() * (clean - probabilities)).sum() if kl else -probabilities[label]
            (gradient,) = torch.autograd.grad(goal, moved)
            moved = (moved.detach() + step * gradient.sign()).clamp(low, high)
        found.append(moved.detach())
    return found


def weighted_mean(values: list[Tensor], weights: list[float]) -> Tensor:
    return sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)


def loss_by_loops(model: nn.Module, x: Tensor, y: Tensor, config: FairConfig, balance: Setting, seed: int) -> Tensor:
    """The loss of a retraining run from its definition, sample by sample."""
    generator = stream(seed)
    frl = config.method == "frl"
    share = len(x) if frl else math.ceil(config.attacked * len(x))
    noise = torch.empty_like(x[:share])
    noise = noise.normal_(std=0.001, generator=generator) if frl else noise.uniform_(-1, 1, generator=generator)
    attacked = attacked_by_loops(model, x[:share], y[:share], config, balance, noise, kl=frl) + list(x[share:])
    labels, images = y.tolist(), list(x)
    nat, bdy = ([float(weights[label]) for label in labels] for weights in balance[:2])
    p = [log_probabilities(model, image) for image in images]
    natural = weighted_mean([-row[label] for row, label in zip(p, labels, strict=True)], nat)
    if config.method == "report_remargin":
        order = torch.randperm(len(x), generator=generator).tolist()
        total = 0.0
        for position, number in enumerate(order):
            label = labels[position if config.unshuffled_labels else number]
            total = total - log_probabilities(model, attacked[number])[label] / len(x)
        return natural + total
    q = [log_probabilities(model, image) for image in attacked]
    if config.method == "pgd_at":
        return weighted_mean([-row[label] for row, label in zip(q, labels, strict=True)], bdy)
    if config.method == "report_reweight" and config.predicted_targets:
        predicted = [int(row.argmax()) for row in p]
        weights = [float(balance.weights_bdy[label]) for label in predicted]
        return natural + weighted_mean([-row[label] for row, label in zip(q, predicted, strict=True)], weights)
    divergences = [(one.exp() * (one - other)).sum() for one, other in zip(p, q, strict=True)]
    if config.weighting == "printed":  # as Algorithm 1 writes them: nothing is divided by the weights' sum
        sums = [float(weights.sum()) for weights in balance[:2]]
        return sums[0] * natural + config.beta * sums[1] * weighted_mean(divergences, bdy)
    return natural + (config.beta if frl else 1.0) * weighted_mean(divergences, bdy)


METHODS = {
    "frl": {"method": "frl", "beta": 2.5},
    "pgd_at": {"method": "pgd_at"},
    "pgd_at, half": {"method": "pgd_at", "attacked": 0.5},
    "report_reweight": {"method": "report_reweight"},
    "report_reweight, probabilities": {"method": "report_reweight", "predicted_targets": False},
    "report_remargin": {"method": "report_remargin", "attacked": 0.5, "unshuffled_labels": True},
    "report_remargin, labels shuffled too": {"method": "report_remargin", "attacked": 0.5, "unshuffled_labels": False},
}


class TestFairLoss:
    @pytest.mark.parametrize("step", ["own", "largest", "fixed"])
    @pytest.mark.parametrize("method", METHODS)
    def test_value_and_gradient_against_plain_loops(self, method: str, step: str) -> None:
        model, x, y = small()
        config = FairConfig(**METHODS[method], step=step, steps=3, eps_255=30.0, step_255=12.0)
        found = losses.loss(model, x, y, config, stream(7), BALANCE)
        expected = loss_by_loops(model, x, y, config, BALANCE, 7)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
        gradients = (torch.autograd.grad(value, [*model.parameters()]) for value in (found, expected))
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-12)

    @pytest.mark.parametrize("config", [FairConfig("frl", beta=2.5), Config("trades")], ids=["frl", "trades"])
    def test_a_confident_network_has_gradients(self, config: Config) -> None:
        """Anyone's network may be so sure that float32 has no probability left for other classes."""
        model, x, y = small()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1e3)
        model, x = model.float(), x.float()
        assert (model(x).softmax(1) == 0).any()
        even = Setting(*(part.float() for part in EVEN)) if isinstance(config, FairConfig) else None
        losses.loss(model, x, y, config, stream(7), even).backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())

    def test_printed_weights_count_as_they_are(self) -> None:
        model, x, y = small()
        balance = BALANCE._replace(weights_nat=3 * BALANCE.weights_nat, weights_bdy=0.5 * BALANCE.weights_bdy)
        values = {"beta": 2.5, "steps": 3, "eps_255": 30.0, "step_255": 12.0}
        found = losses.loss(model, x, y, FairConfig("frl", weighting="printed", **values), stream(7), balance)
        expected = loss_by_loops(model, x, y, FairConfig("frl", weighting="printed", **values), balance, 7)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
        bounded = losses.loss(model, x, y, FairConfig("frl", **values), stream(7), balance)
        assert float(found.detach()) > 1.5 * float(bounded.detach())  # only there does the sum count

    def test_every_method_has_another_loss(self) -> None:
        model, x, y = small()
        found = set()
        for fields in METHODS.values():
            config = FairConfig(**fields, steps=3, eps_255=30.0, step_255=12.0)
            found.add(round(float(losses.loss(model, x, y, config, stream(7), BALANCE).detach()), 9))
        assert len(found) == len(METHODS)

    @pytest.mark.parametrize(("method", "plain"), [("frl", "trades"), ("pgd_at", "pgd_at")])
    def test_with_all_classes_alike_it_is_the_plain_loss(self, method: str, plain: str) -> None:
        model, x, y = small()
        ours = losses.loss(model, x, y, FairConfig(method, steps=3, beta=4.0), stream(2), EVEN)
        theirs = losses.loss(model, x, y, Config(plain, steps=3, beta=4.0), stream(2))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)

    @pytest.mark.parametrize("method", METHODS)
    def test_a_batch_of_classes_without_any_weight(self, method: str) -> None:
        """With bound 1 one class can have it all, and a small batch no image of it."""
        model, x, y = small()
        y = y.clamp(max=2)
        weights = fairness.class_weights(torch.tensor([0.0, 0.0, 0.0, 1.0]).double())
        assert weights.tolist() == [0, 0, 0, 1]
        config = FairConfig(**METHODS[method], steps=2)
        with torch.no_grad():
            model[3].bias[3] = -100  # nor is it ever predicted
        found = losses.loss(model, x, y, config, stream(7), Setting(weights, weights, torch.ones(4).double()))
        if config.method == "report_remargin":  # its second term has no weights
            assert math.isfinite(found.detach())
            return
        assert float(found.detach()) == 0
        assert not any(bool(gradient.any()) for gradient in torch.autograd.grad(found, [*model.parameters()]))

    @pytest.mark.parametrize("field", Setting._fields)
    def test_every_part_of_the_setting_counts(self, field: str) -> None:
        model, x, y = small()
        config = FairConfig("frl", steps=3, eps_255=30.0, step_255=12.0)
        changed = EVEN._replace(**{field: getattr(BALANCE, field)})
        values = [float(losses.loss(model, x, y, config, stream(7), each).detach()) for each in (EVEN, changed)]
        assert abs(values[0] - values[1]) > 1e-3


class TestRadii:
    @pytest.mark.parametrize("step", ["own", "largest", "fixed"])
    @pytest.mark.parametrize("method", METHODS)
    def test_each_image_gets_its_own_classs_radius(
        self, monkeypatch: pytest.MonkeyPatch, method: str, step: str
    ) -> None:
        calls: list[tuple[Tensor, ...]] = []

        def spy(model: nn.Module, x: Tensor, y: Tensor, eps: Tensor, step: Tensor, steps: int, **names: Any) -> Tensor:
            calls.append((x, y, eps, step))
            assert steps == 9
            kl = names.get("loss") == "kl" and names.get("random_start") == "gaussian"
            assert kl == (method == "frl")
            return x

        monkeypatch.setattr(losses, "pgd", spy)
        model, x, y = small()
        config = FairConfig(**METHODS[method], step=step, steps=9, eps_255=10.0, step_255=3.0)
        losses.loss(model, x, y, config, stream(0), BALANCE)
        ((images, labels, eps, size),) = calls
        count = math.ceil(SIZE / 2) if config.attacked == 0.5 else SIZE
        assert torch.equal(images, x[:count])
        assert torch.equal(labels, y[:count])
        factors = [{0: 1.0, 1: 2.0, 2: 0.5, 3: 1.3}[label] for label in y.tolist()]
        assert eps.tolist() == pytest.approx([10 / 255 * factor for factor in factors[:count]])
        expected = {"own": factors, "largest": [max(factors)] * SIZE, "fixed": [1.0] * SIZE}[step]
        assert size.tolist() == pytest.approx([3 / 255 * factor for factor in expected[:count]])

    def test_the_largest_step_is_the_batchs_not_the_runs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sizes: list[Tensor] = []
        monkeypatch.setattr(losses, "pgd", lambda model, x, y, eps, step, *_, **__: sizes.append(step) or x)
        model, x, y = small()
        y = y.clamp(max=0)  # only class 0: factor 1, although class 1 has 2
        losses.loss(model, x, y, FairConfig("frl", step="largest", step_255=3.0), stream(0), BALANCE)
        assert sizes[0].tolist() == pytest.approx([3 / 255] * SIZE)

    def test_attacked_images_fill_their_own_ball(self) -> None:
        """With the real attack: the farthest pixel moves by the class's radius, no pixel by more."""
        model, x, y = small()
        x, seen = 0.4 + 0.2 * x, []
        with pytest.MonkeyPatch.context() as patch:
            straight = losses.pgd
            patch.setattr(losses, "pgd", lambda *a, **n: seen.append(straight(*a, **n)) or seen[-1])
            losses.loss(model, x, y, FairConfig("frl", eps_255=8.0, step_255=2.0, steps=8), stream(0), BALANCE)
        moved = (seen[0] - x).abs().flatten(1).amax(1)
        torch.testing.assert_close(moved, 8 / 255 * BALANCE.radius_factors[y])


class TellTale(nn.Module):
    """Sure of the class that an image shows: class k is a grey of k / 10."""

    def forward(self, images: Tensor) -> Tensor:
        shown = (images.flatten(1).mean(1) * 10).round().long()
        return 30.0 * F.one_hot(shown, 10).to(images.dtype)


class TestLabelsOfShuffledImages:
    """The report's fault: images are shuffled, their labels are not."""

    def losses(self, monkeypatch: pytest.MonkeyPatch, y: Tensor, unshuffled: bool) -> float:
        monkeypatch.setattr(losses, "pgd", lambda model, x, *_, **__: x)
        x = (y.float() / 10).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
        config = FairConfig("report_remargin", attacked=0.5, unshuffled_labels=unshuffled)
        balance = Setting(torch.full((10,), 0.1), torch.full((10,), 0.1), torch.ones(10))
        return float(losses.loss(TellTale(), x, y, config, stream(3), balance))

    def test_they_travel_with_their_images(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.losses(monkeypatch, torch.arange(10).repeat(4), False) < 1e-6

    def test_with_the_fault_they_stay_behind(self, monkeypatch: pytest.MonkeyPatch) -> None:
        y = torch.arange(10).repeat(4)
        order = torch.randperm(40, generator=stream(3))
        wrong = float((y[order] != y).float().mean())  # all but a tenth, by chance
        assert 0.75 < wrong < 1
        assert self.losses(monkeypatch, y, True) == pytest.approx(30 * wrong, rel=1e-4)

    def test_it_does_no_harm_within_one_class(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.losses(monkeypatch, torch.full((8,), 6), True) < 1e-6


class TestParts:
    def run(self, config: Config, split: Split, epoch: int = 0) -> training.Progress:
        model, data = models.build("lenet5", seed=0), Dataset("digits", tuple("0123456789"), split, split, split)
        return training.Progress(config, data, model, torch.optim.SGD(model.parameters(), lr=0.01), None, epoch)

    def visits(self, monkeypatch: pytest.MonkeyPatch, parts: int, images: int = 200) -> tuple[list[list[int]], list]:
        """The batches of all parts of epoch 3, one after another, and random numbers of each batch's attack."""
        numbered = Split(torch.zeros(images, 1, 32, 32, dtype=torch.uint8), torch.arange(images))
        batches: list[list[int]] = []
        draws: list[Tensor] = []

        def loss(model: nn.Module, x: Tensor, y: Tensor, config: Config, generator: torch.Generator, *_: Any) -> Tensor:
            batches.append(y.tolist())
            draws.append(torch.rand(2, generator=generator))
            return model(x).sum()

        monkeypatch.setattr(training, "loss", loss)
        run = self.run(Config("natural", "digits", batch_size=16), numbered, epoch=3)
        for part in range(parts):
            list(training.train_epoch(run, (part, parts)))
        return batches, draws

    @pytest.mark.parametrize("parts", [2, 3, 5, 13, 20])
    def test_together_they_are_the_epoch(self, monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
        straight, _ = self.visits(monkeypatch, 1)
        found, draws = self.visits(monkeypatch, parts)
        assert sorted(sum(found, [])) == list(range(200))  # every image exactly once
        assert found == straight  # 13 batches, the last of 8; with 20 parts some have none
        assert len({tuple(draw.tolist()) for draw in draws}) == len(draws)  # no part repeats another's random numbers

    def test_they_are_of_like_size(self, monkeypatch: pytest.MonkeyPatch) -> None:
        split = Split(torch.zeros(200, 1, 32, 32, dtype=torch.uint8), torch.zeros(200, dtype=torch.int64))
        run = self.run(Config("natural", "digits", batch_size=10), split)
        sizes = [len(list(training.train_epoch(run, (part, 6)))) for part in range(6)]
        assert sum(sizes) == 20
        assert max(sizes) - min(sizes) <= 1

    def test_the_balance_reaches_the_loss(self, tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = []

        def loss(model: nn.Module, x: Tensor, *rest: Any) -> Tensor:
            seen.append(next(part for part in rest if isinstance(part, Setting)))
            return model(x).sum()

        monkeypatch.setattr(training, "loss", loss)
        list(training.train_epoch(self.run(fair("uniform"), tiny.train), (1, 2), BALANCE))
        assert len(seen) == 2
        assert all(balance is BALANCE for balance in seen)


class TestSimilarity:
    def test_against_a_loop_over_the_images(self, tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(evaluation, "BATCH", 16)  # 30 images: two batches
        model = models.build("lenet5", seed=1)
        attacked: list[Tensor] = []
        straight = evaluation.pgd
        monkeypatch.setattr(evaluation, "pgd", lambda *a, **n: attacked.append(straight(*a, **n)) or attacked[-1])
        found = evaluation.class_similarity(model, tiny.validation, Attack(eps_255=16.0, steps=3))
        images, labels = torch.cat(attacked), tiny.validation.labels.tolist()
        assert len(images) == 30
        for name in range(10):
            own = [image for image, label in zip(images, labels, strict=True) if label == name]
            mean = sum(model(image[None])[0].softmax(0).detach() for image in own) / len(own)
            torch.testing.assert_close(found[name].float(), mean, rtol=1e-4, atol=1e-6)
        clean, _ = tiny.validation.batch(slice(None))
        assert float((images - clean).abs().max()) == pytest.approx(16 / 255, rel=1e-4)


class TestStart:
    def test_it_goes_on_from_the_finished_start(
        self, tiny: Dataset, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begun: list[dict[str, Tensor]] = []
        straight = training.train_epoch

        def train_epoch(run: training.Progress, *rest: Any) -> Iterator[Any]:
            assert isinstance(run.config, FairConfig), "the start was trained again"
            begun.append({name: value.clone() for name, value in run.model.state_dict().items()})
            yield from straight(run, *rest)

        monkeypatch.setattr(training, "train_epoch", train_epoch)
        place = place_of(tmp_path, start, "algorithm1_both")
        model = runs.run(fair("algorithm1_both", epochs=2), tiny, place)
        finished = weights_of(start)
        assert len(begun) == 2
        for name, value in finished.items():
            assert torch.equal(begun[0][name], value), name
        assert not torch.equal(begun[1]["fc2.bias"], finished["fc2.bias"])
        assert not torch.equal(model.state_dict()["fc2.bias"], begun[1]["fc2.bias"])
        assert history_of(place)["start"]["sha256"] == checkpoint.digest(finished)

    def test_a_missing_start_is_trained_first(self, tiny: Dataset, start: Path, tmp_path: Path) -> None:
        config = fair("uniform", epochs=1)
        place = runs.folder(tmp_path, "uniform", config)
        runs.run(config, tiny, place)
        trained = tmp_path / "digits" / "pgd_at" / "seed0"
        assert (trained / runs.WEIGHTS).read_bytes() == (start / runs.WEIGHTS).read_bytes()

    def test_seed_model_and_length_of_the_start(self, tiny: Dataset, tmp_path: Path) -> None:
        config = recipes.configure("uniform,start=natural", "digits", 4, **{**QUICK, "epochs": 1, "start_epochs": 2})
        runs.run(config, tiny, tmp_path / "digits" / "mine" / "seed4")
        assert sorted(path.name for path in (tmp_path / "digits").iterdir()) == ["mine", "natural"]
        assert [path.name for path in (tmp_path / "digits" / "natural").iterdir()] == ["seed4"]
        _, found = runs.read_weights(tmp_path / "digits" / "natural" / "seed4" / runs.WEIGHTS)
        assert Config(**found) == Config("natural", "digits", seed=4, epochs=2, batch_size=64)

    def test_a_start_of_another_length_is_refused(self, tiny: Dataset, start: Path, tmp_path: Path) -> None:
        place = place_of(tmp_path, start, "uniform")
        with pytest.raises(KitError, match="epochs is 1 there and 2 here"):
            runs.run(fair("uniform", start_epochs=2), tiny, place)
        assert not place.exists()

    def test_a_stopped_start_is_finished_first(
        self, tiny: Dataset, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = fair("uniform", epochs=1, start_epochs=2)
        runs.run(config, tiny, tmp_path / "straight" / "digits" / "uniform" / "seed0")
        place = tmp_path / "stopped" / "digits" / "uniform" / "seed0"
        for allowed in (6, 3):  # in the start's second epoch; there again, after its checkpoint
            stop_after(monkeypatch, tiny, config, place, allowed, kind=Config)
        runs.run(config, tiny, place)
        assert_same_run(tmp_path / "straight" / "digits" / "uniform" / "seed0", place)


def stop_after(
    monkeypatch: pytest.MonkeyPatch,
    data: Dataset,
    config: FairConfig,
    place: Path,
    allowed: int,
    kind: type[Config] = FairConfig,
) -> None:
    """Run until `allowed` batches of the retraining run (`kind` Config: of any run) are trained, then fail."""
    straight, trained = training.train_epoch, []

    def train_epoch(run: training.Progress, *rest: Any) -> Iterator[Any]:
        for item in straight(run, *rest):
            if isinstance(run.config, kind):
                if len(trained) == allowed:
                    raise StoppedError
                trained.append(None)
            yield item

    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(training, "train_epoch", train_epoch)
        torch.manual_seed(1000 + allowed)  # whatever the global state is
        runs.run(config, data, place)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[Path, int], str]:
    """Digests of the multipliers of every checkpoint that is written: by folder and finished epochs."""
    found: dict[tuple[Path, int], str] = {}
    straight = checkpoint.save

    def save(path: Path, state: dict[str, Any], **names: Any) -> None:
        if "multipliers" in state:
            found[path.parent, state["epoch"]] = checkpoint.digest(state["multipliers"])
        straight(path, state, **names)

    monkeypatch.setattr(checkpoint, "save", save)
    return found


class TestResume:
    @pytest.mark.parametrize("recipe", RESUMED)
    def test_stopped_and_resumed_equals_straight(
        self,
        tiny: Dataset,
        start: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        kept: dict[tuple[Path, int], str],
        recipe: str,
    ) -> None:
        """Three epochs of four batches, stopped in the first, in the second, and at the beginning of the third."""
        config = fair(recipe)
        straight, stopped = (place_of(tmp_path / name, start, recipe) for name in ("straight", "stopped"))
        model = runs.run(config, tiny, straight)
        for allowed, epochs in ((2, 0), (5, 1), (4, 2), (0, 2)):
            stop_after(monkeypatch, tiny, config, stopped, allowed)
            assert (stopped / "checkpoint.pt").exists() == (epochs > 0)
            if epochs:
                assert checkpoint.read(stopped / "checkpoint.pt")["epoch"] == epochs
        resumed = runs.run(config, tiny, stopped)
        assert_same_run(straight, stopped)
        for ours, theirs in zip(resumed.parameters(), model.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        for epoch in (1, 2, 3):
            assert kept[straight, epoch] == kept[stopped, epoch]
        changing = recipe != "dafa"  # measured once
        assert (len({kept[straight, epoch] for epoch in (1, 2, 3)}) > 1) == changing

    def test_from_the_generation_before_a_damaged_one(
        self, tiny: Dataset, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = fair("algorithm1_both")
        straight, stopped = (place_of(tmp_path / name, start, "algorithm1_both") for name in ("straight", "stopped"))
        runs.run(config, tiny, straight)
        stop_after(monkeypatch, tiny, config, stopped, 9)
        newest = stopped / "checkpoint.pt"
        newest.write_bytes(newest.read_bytes()[:-1000])
        with pytest.warns(UserWarning, match="generation before it"):
            runs.run(config, tiny, stopped)
        assert_same_run(straight, stopped)

    @pytest.mark.parametrize(
        ("recipe", "part"),
        [
            *(("algorithm1_both", part) for part in (None, "phi_nat", "phi_bdy", "log_radius")),
            *(("dafa", part) for part in (None, "phi_nat", "log_radius")),
        ],
    )
    def test_the_multipliers_of_the_checkpoint_count(
        self, tiny: Dataset, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, part: str | None
    ) -> None:
        config = fair(recipe, epochs=2)
        straight, changed = (place_of(tmp_path / name, start, recipe) for name in ("straight", "changed"))
        runs.run(config, tiny, straight)
        stop_after(monkeypatch, tiny, config, changed, 4)
        state = checkpoint.read(changed / "checkpoint.pt")
        if part is not None:
            state["multipliers"][part][3] += 3.0 if part == "log_radius" else 0.3
        checkpoint.save(changed / "checkpoint.pt", state)
        runs.run(config, tiny, changed)
        weights = [weights_of(place)["fc2.bias"] for place in (straight, changed)]
        assert torch.equal(*weights) == (part is None)


class TestMeasuring:
    def spied(
        self, monkeypatch: pytest.MonkeyPatch, tiny: Dataset, config: FairConfig, place: Path
    ) -> tuple[list[tuple[Split, Attack]], list[Split]]:
        """What a run measured, before its final test, and what it trained on."""
        measured: list[tuple[Split, Attack]] = []
        trained: list[Split] = []

        def spy(measure: Callable[..., Any]) -> Callable[..., Any]:
            def spied(model: nn.Module, split: Split, attack: Attack) -> Any:
                measured.append((split, attack))
                return measure(model, split, attack)

            return spied

        monkeypatch.setattr(evaluation, "class_errors", spy(evaluation.class_errors))
        monkeypatch.setattr(evaluation, "changed", spy(evaluation.changed))
        monkeypatch.setattr(evaluation, "class_similarity", spy(evaluation.class_similarity))
        straight = training.train_epoch

        def train_epoch(run: training.Progress, *rest: Any) -> Iterator[Any]:
            trained.append(run.data.train)
            yield from straight(run, *rest)

        monkeypatch.setattr(training, "train_epoch", train_epoch)
        monkeypatch.setattr(records, "evaluate", lambda *_, **__: None)
        runs.run(config, tiny, place)
        return measured, trained

    @pytest.mark.parametrize(
        ("recipe", "measures", "radii"),
        [
            ("algorithm1_both", 4, {8.0}),  # at the start and after every epoch
            ("official_both,updates=5", 4 + 3 * 4, {8.0}),  # and before every part but the first
            # before every part clean errors, and predictions that change at its own radius
            ("report_reweight,start=pgd_at,validation=0.1,update_images=0,updates=4", 4 + 3 * 4 * 2, {0.0, 16.0}),
            ("dafa", 5, {8.0}),
            ("uniform,measure_255=12", 4, {12.0}),  # what the history has is what steers
            ("uniform,measure_255=12,update_images=25", 4 + 3, {8.0, 12.0}),  # which drawn images do here
        ],
    )
    def test_training_and_measuring_share_no_image(
        self,
        tiny: Dataset,
        start: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        recipe: str,
        measures: int,
        radii: set[float],
    ) -> None:
        place = place_of(tmp_path, start, recipe)
        measured, trained = self.spied(monkeypatch, tiny, fair(recipe), place)
        assert all(split is tiny.train for split in trained)
        held = {image.numpy().tobytes() for image in tiny.validation.images}
        assert not held & {image.numpy().tobytes() for image in tiny.train.images}
        for split, _ in measured:
            assert {image.numpy().tobytes() for image in split.images} <= held
        assert len(measured) == measures
        assert {attack.eps_255 for _, attack in measured} == radii
        for _, attack in measured:  # PGD-20, step 2/255, or the clean images
            assert attack == Attack(eps_255=attack.eps_255, steps=20 if attack.eps_255 else 0)

    def test_a_random_sample_of_the_validation_images(
        self, tiny: Dataset, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = fair("official_both", update_images=25, updates=2)
        measured, _ = self.spied(monkeypatch, tiny, config, place_of(tmp_path, start, "official_both"))
        numbers = {image.numpy().tobytes(): number for number, image in enumerate(tiny.validation.images)}
        draws = []
        for split, _ in measured:
            if split is not tiny.validation:
                draw = [numbers[image.numpy().tobytes()] for image in split.images]
                assert torch.equal(split.labels, tiny.validation.labels[torch.tensor(draw)])  # labels travel with them
                assert len(set(draw)) == len(draw) == 25
                draws.append(tuple(draw))
        assert len(draws) == len(set(draws)) == 6  # twice in each of three epochs, every time others

    @pytest.mark.parametrize("missed", [3, 9])
    def test_a_sample_that_misses_a_class_takes_one_of_it(
        self, tiny: Dataset, monkeypatch: pytest.MonkeyPatch, missed: int
    ) -> None:
        others = (tiny.validation.labels != missed).nonzero()[:, 0]
        one = (tiny.validation.labels == missed).nonzero()[:1, 0]
        index = torch.cat([others[:20], one])
        held = Split(tiny.validation.images[index], tiny.validation.labels[index])
        monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n))
        data, model = replace(tiny, validation=held), models.build("lenet5", seed=0)
        drawn = training._drawn(training.begin(fair("official_both", update_images=20), data, model), 0)
        assert len(drawn) == 20 and set(drawn.labels.tolist()) == set(range(10))
        changed = [not torch.equal(*pair) for pair in zip(drawn.images, held.images[:20], strict=True)]
        assert sum(changed) == 1 and drawn.labels[changed.index(True)] == missed
        with pytest.raises(KitError, match=r"^update_images = 9 is not allowed here: use 10 or more, or 0"):
            training._drawn(training.begin(fair("official_both", update_images=9), data, model), 0)

    @pytest.mark.parametrize("recipe", ["algorithm1_both", "algorithm1_remargin", "baseline_reweight", "shrunk_margin"])
    def test_the_history_replays(self, tiny: Dataset, start: Path, tmp_path: Path, recipe: str) -> None:
        """From the validation errors before each epoch to that epoch's weights and radii."""
        config, place = fair(recipe, tau_nat=0.0, tau_bdy=0.0), place_of(tmp_path, start, recipe)
        runs.run(config, tiny, place)
        history = history_of(place)
        state = fairness.initial(10)
        known = [history["start"]["validation"], *(entry["validation"] for entry in history["epochs"])]
        for before, entry in zip(known, history["epochs"], strict=False):
            natural, robust = (torch.tensor(before[kind], dtype=torch.float64) for kind in ("natural", "robust"))
            state = fairness.update(state, natural, robust - natural, config)
            for name, values in fairness.setting(state, config)._asdict().items():
                assert entry[name] == pytest.approx(values.tolist(), rel=1e-12), name
        last = history["epochs"][-1]
        moved = {name for name in Setting._fields if max(last[name]) - min(last[name]) > 1e-6}
        rates = {
            "weights_nat": config.alpha_nat,
            "weights_bdy": config.alpha_bdy,
            "radius_factors": config.alpha_margin,
        }
        assert moved == {name for name, rate in rates.items() if rate}

    def test_training_uses_what_the_history_says(
        self, tiny: Dataset, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        used: list[Setting] = []
        straight = losses.loss

        def loss(*arguments: Any) -> Tensor:
            used.append(next(part for part in arguments if isinstance(part, Setting)))
            return straight(*arguments)

        monkeypatch.setattr(training, "loss", loss)
        place = place_of(tmp_path, start, "official_both")
        runs.run(fair("official_both", updates=2), tiny, place)
        assert len(used) == 12
        for epoch, entry in enumerate(history_of(place)["epochs"]):
            for name in Setting._fields:  # those of the epoch's last part
                values = getattr(used[4 * epoch + 3], name)
                assert values.dtype == torch.float32
                assert entry[name] == pytest.approx(values.tolist(), rel=1e-6)
        assert used[0] is used[1]
        assert not torch.equal(used[1].radius_factors, used[2].radius_factors)  # the second part's own

    def test_what_the_history_holds(self, tiny: Dataset, start: Path, tmp_path: Path) -> None:
        config, place = fair("algorithm1_both", epochs=2), place_of(tmp_path, start, "algorithm1_both")
        model = runs.run(config, tiny, place)
        history = history_of(place)
        assert set(history) == {"config", "data_sha256", "made_by", "kernel", "threads", "versions", "start", "epochs"}
        assert FairConfig(**history["config"]) == config
        assert set(history["start"]) == {"sha256", "validation"}
        assert len(history["epochs"]) == 2
        for entry in history["epochs"]:
            assert set(entry) == {"lr", "loss", "seconds", "validation", *Setting._fields}
            assert sum(entry["weights_nat"]) == pytest.approx(1)
            assert sum(entry["weights_bdy"]) == pytest.approx(1)
            assert all(1 <= factor <= 2.000001 for factor in entry["radius_factors"])
            assert len(entry["radius_factors"]) == 10
        for found, trained in (
            (
                history["start"],
                runs.load(start, recipes.configure("pgd_at", "digits", 0, epochs=1, batch_size=64)),
            ),
            (history["epochs"][-1], model),
        ):
            errors = evaluation.class_errors(trained, tiny.validation, Attack())
            assert found["validation"] == {"natural": errors.natural.tolist(), "robust": errors.robust.tolist()}
        assert sorted(path.name for path in place.iterdir()) == sorted(runs.FILES)

    def test_one_class_alone_gets_the_larger_radius(self, tiny: Dataset, start: Path, tmp_path: Path) -> None:
        place = place_of(tmp_path, start, "one_class,chosen=6")
        runs.run(fair("one_class,chosen=6", epochs=1), tiny, place)
        (entry,) = history_of(place)["epochs"]
        assert entry["radius_factors"] == pytest.approx([2.0 if name == 6 else 1.0 for name in range(10)])
        assert entry["weights_nat"] == entry["weights_bdy"] == pytest.approx([0.1] * 10)


class TestInnerEpochs:
    def test_multipliers_rest_between_updates(self, tiny: Dataset, start: Path, tmp_path: Path) -> None:
        """Of four epochs the first and the third begin with an update; `inner_epochs` are Algorithm 1's BEST."""
        config = fair("algorithm1_both", epochs=4, inner_epochs=2, tau_nat=0.0, tau_bdy=0.0, ema=0.0)
        place = place_of(tmp_path, start, "algorithm1_both")
        runs.run(config, tiny, place)
        history, state = history_of(place), fairness.initial(10)
        known = [history["start"]["validation"], *(entry["validation"] for entry in history["epochs"])]
        for epoch, entry in enumerate(history["epochs"]):
            if epoch in (0, 2):
                natural, robust = (torch.tensor(known[epoch][kind]).double() for kind in ("natural", "robust"))
                state = fairness.update(state, natural, robust - natural, config)
            for name, values in fairness.setting(state, config)._asdict().items():
                assert entry[name] == pytest.approx(values.tolist(), rel=1e-6), (epoch, name)
        assert history["epochs"][1]["weights_nat"] != history["epochs"][2]["weights_nat"]


class TestChanged:
    """The report's boundary error: any prediction that the attack changes, right or wrong."""

    def test_against_counting(self, tiny: Dataset, start: Path) -> None:
        model = runs.load(start, recipes.configure("pgd_at", "digits", 0, epochs=1, batch_size=64))
        attack, split = Attack(eps_255=40.0, step_255=8.0, steps=5), tiny.test
        found = evaluation.changed(model, split, attack)
        x, y = split.batch(slice(None))
        moved = evaluation.pgd(model, x, y, 40 / 255, 8 / 255, 5, generator=stream(0, 0))
        before, after = (model(images).argmax(1).tolist() for images in (x, moved))
        counted = [0.0] * 10
        for label, one, other in zip(y.tolist(), before, after, strict=True):
            counted[label] += (one != other) / 5
        assert found.tolist() == pytest.approx(counted)
        assert found.sum() > evaluation.class_errors(model, split, attack).boundary.sum()  # wrong ones change too

    def test_multipliers_follow_it(self, tiny: Dataset, start: Path, tmp_path: Path) -> None:
        config = fair("algorithm1_reweight", epochs=1, boundary="changed", tau_nat=0.0, tau_bdy=0.0, measure_255=32.0)
        place = place_of(tmp_path, start, "algorithm1_reweight")
        runs.run(config, tiny, place)
        model = runs.load(start, recipes.configure("pgd_at", "digits", 0, epochs=1, batch_size=64))
        natural = evaluation.class_errors(model, tiny.validation, Attack(eps_255=0.0, steps=0)).natural
        changed = evaluation.changed(model, tiny.validation, Attack(eps_255=32.0))
        state = fairness.update(fairness.initial(10), torch.tensor(natural), torch.tensor(changed), config)
        (entry,) = history_of(place)["epochs"]
        assert entry["weights_nat"] == pytest.approx(fairness.class_weights(state.phi_nat).tolist())
        assert entry["weights_bdy"] == pytest.approx(fairness.class_weights(state.phi_bdy).tolist())


@pytest.mark.parametrize("recipe", ["report_reweight,attacked=0.5", "uniform,attacked=0.5", "trades,attacked=0.2"])
def test_losses_that_attack_every_image_say_so(recipe: str) -> None:
    with pytest.raises(KitError, match=r"attacked = 0\.\d is not allowed with \w+: its loss attacks every"):
        recipes.configure(recipe, "digits", 0)


class TestIntercept:
    @pytest.mark.parametrize(("part", "name"), [("biases", "fc2.bias"), ("norms", "fc2.weight")])
    def test_only_biases_or_norms_move_and_as_the_multipliers_do(
        self, tiny: Dataset, start: Path, tmp_path: Path, part: str, name: str
    ) -> None:
        config = fair("intercept,start=pgd_at", epochs=3, tau_nat=0.0, tau_bdy=0.0, moved=part)
        place = place_of(tmp_path, start, "intercept,start=pgd_at")
        model = runs.run(config, tiny, place)
        history, before = history_of(place), weights_of(start)
        state = fairness.initial(10)
        known = [history["start"]["validation"], *(entry["validation"] for entry in history["epochs"])]
        for measured in known[:3]:
            natural, robust = (torch.tensor(measured[kind]).double() for kind in ("natural", "robust"))
            state = fairness.update(state, natural, robust - natural, config)
        total = (state.phi_nat + state.phi_bdy - (state.phi_nat + state.phi_bdy).mean()).float()
        expected = dict(before)
        expected[name] = before[name] + total if part == "biases" else before[name] * total.exp()[:, None]
        for key, value in model.state_dict().items():
            torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6 if key == name else 0)
        assert not torch.equal(model.state_dict()[name], before[name])
        x, y = tiny.validation.batch(slice(None))
        assert history["epochs"][-1]["loss"] == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-5)

    def test_stopped_and_resumed_equals_straight(
        self, tiny: Dataset, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config, places = fair("intercept,start=pgd_at", epochs=3), []
        for name in ("straight", "stopped"):
            places.append(place_of(tmp_path / name, start, "intercept,start=pgd_at"))
        runs.run(config, tiny, places[0])
        save = checkpoint.save
        with monkeypatch.context() as patch, pytest.raises(StoppedError):

            def stop(path: Path, state: dict[str, Any], **names: Any) -> None:
                if state["epoch"] == 3:
                    raise StoppedError
                save(path, state, **names)

            patch.setattr(checkpoint, "save", stop)
            runs.run(config, tiny, places[1])
        runs.run(config, tiny, places[1])
        assert_same_run(*places)


SCRIPT = """
import json, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from frlkit import recipes, runs, training
from frlkit.data import Dataset, Split

folder = Path(sys.argv[1])
tensors = torch.load(folder / "data.pt")
tiny = Dataset("digits", tuple("0123456789"), *(Split(*pair) for pair in tensors))
straight = training.train_epoch

def train_epoch(run, part, *rest):
    for item in straight(run, part, *rest):
        yield item
        if run.epoch == 1 and part[0] == 1:  # the multipliers too have changed since the checkpoint
            print("IN THE MIDDLE", flush=True)
            time.sleep(300)

training.train_epoch = train_epoch
runs.run(recipes.FairConfig(**json.loads(sys.argv[2])), tiny, Path(sys.argv[3]))
"""


def test_killed_in_the_middle_of_an_epoch(
    tiny: Dataset, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = (tiny.train, tiny.validation, tiny.test)
    torch.save([(split.images, split.labels) for split in splits], tmp_path / "data.pt")
    config = fair("official_both", updates=2)
    killed, straight = (place_of(tmp_path / name, start, "official_both") for name in ("killed", "straight"))
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), json.dumps(asdict(config)), str(killed)]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert any("IN THE MIDDLE" in line for line in process.stdout), "it ended by itself"
        finally:
            process.kill()
        assert process.wait() == -signal.SIGKILL
    assert sorted(os.listdir(killed)) == ["checkpoint.pt", "run.lock"]  # a lock that nobody holds
    runs.run(config, tiny, killed)  # as a new process would
    said = capsys.readouterr().out
    assert "epoch 1/3" not in said  # it went on, it did not start again
    assert "epoch 2/3" in said
    runs.run(config, tiny, straight)
    assert_same_run(straight, killed)

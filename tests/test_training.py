"""The epoch loop: losses against independent ones, and runs that were stopped in every way against straight ones."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import tiny_dataset
from torch import Tensor, nn

from frlkit import (
    PROJECT,
    KitError,
    attacks,
    checkpoint,
    evaluation,
    losses,
    models,
    recipes,
    records,
    runs,
    training,
    watched,
)
from frlkit.data import Dataset, Split
from frlkit.evaluation import Attack, stream
from frlkit.recipes import Config
from frlkit.report import studies
from frlkit.values import fields_of

SMALL = {"dataset": "digits", "epochs": 3, "batch_size": 64, "steps": 2}
RUNS = {
    "natural": Config("natural", **SMALL),
    "pgd_at": Config("pgd_at", **SMALL),
    "pgd_at_half": Config("pgd_at", attacked=0.5, **SMALL),
    "trades": Config("trades", **SMALL),
    "augmented": Config("natural", augment="crop_flip", **SMALL),
    "bf16": Config("pgd_at", precision="bf16", model="lenet5", **SMALL),
    "ema": Config("pgd_at", ema=0.9, **SMALL),
    "sgd": Config("natural", optimizer="sgd", lr=0.05, weight_decay=1e-4, **SMALL),
}


@pytest.fixture(autouse=True)
def quick_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The standard attacks with two steps: their strength is not what is tested here."""
    quick = tuple(replace(attack, steps=2) for attack in evaluation.STANDARD)
    monkeypatch.setattr(records, "standard", lambda dataset, **_: quick)


@pytest.fixture
def unwatched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "watched", lambda: False)


def without_seconds(history: dict[str, Any]) -> dict[str, Any]:
    epochs = [{name: value for name, value in epoch.items() if name != "seconds"} for epoch in history["epochs"]]
    return {**history, "epochs": epochs}


def weights_of(folder: Path) -> dict[str, Tensor]:
    """A finished run's tensors by name."""
    return dict(runs.read_weights(folder / runs.WEIGHTS)[0].state_dict())


def assert_same_run(first: Path, second: Path) -> None:
    """Weights bit for bit, histories but for the time they took, records, outcomes."""
    weights = [weights_of(folder) for folder in (first, second)]
    assert list(weights[0]) == list(weights[1])
    for name in weights[0]:
        assert torch.equal(weights[0][name], weights[1][name]), name
    histories = [json.loads((folder / "history.json").read_text(encoding="utf-8")) for folder in (first, second)]
    assert without_seconds(histories[0]) == without_seconds(histories[1])
    found = [json.loads((folder / "record.json").read_text(encoding="utf-8")) for folder in (first, second)]
    assert found[0] == found[1]
    assert (first / records.OUTCOMES).read_bytes() == (second / records.OUTCOMES).read_bytes()


class StoppedError(Exception):
    pass


def stop_at(monkeypatch: pytest.MonkeyPatch, epoch: int, batch: int) -> None:
    """Make training fail at a batch of an epoch, both counted from 0."""
    straight = training.train_epoch

    def train_epoch(run: training.Progress, *rest: Any) -> Iterator[tuple[int, float]]:
        for number, item in enumerate(straight(run, *rest)):
            if (run.epoch, number) == (epoch, batch):
                raise StoppedError
            yield item

    monkeypatch.setattr(training, "train_epoch", train_epoch)


class TestConfig:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            *(("method", value) for value in ("Natural", "pgd", "", None, 1)),
            *(("dataset", value) for value in ("minst", None)),
            *(("model", value) for value in ("resnet", 5)),
            *(("optimizer", value) for value in ("Adam", "rmsprop")),
            *(("seed", value) for value in (-1, 1.0, "0", True, None, 2**31 + 1)),
            *(("epochs", value) for value in (0, -1, 1.5, 2.0, "15", True, None)),
            *(("batch_size", value) for value in (0, 100.0, "100", math.inf)),
            *(("lr", value) for value in (0, -1e-3, math.nan, math.inf, "1e-3", True, None)),
            *(("momentum", value) for value in (-0.1, 1.1, math.nan)),
            *(("weight_decay", value) for value in (-1.0, math.nan, "0")),
            *(("lr_divide", value) for value in (0, 0.5, math.nan)),
            *(("lr_every", value) for value in (0, 2.5)),
            *(("eps_255", value) for value in (-1, 256, math.nan, "8/255", "8")),
            *(("step_255", value) for value in (-2, 300.0, math.inf)),
            *(("steps", value) for value in (0, -1, 2.0, "10")),
            *(("attacked", value) for value in (0, -0.5, 1.01, math.nan)),
            *(("beta", value) for value in (-1, math.nan, math.inf, "6")),
        ],
    )
    def test_refused_by_name_with_the_value(self, field: str, value: Any) -> None:
        with pytest.raises(KitError) as caught:
            Config(**{"method": "natural", field: value})
        assert str(caught.value).startswith(f"{field} = {value!r} is ")

    def test_a_number_too_large_for_a_float(self) -> None:
        with pytest.raises(KitError, match="^lr = 1000"):
            Config("natural", lr=10**400)

    def test_every_field_has_limits(self) -> None:
        """A number has both ends (the share of a decay one of them open), a text its list."""
        for name, field in fields_of(recipes.FairConfig).items():
            if field.annotation in (int, float):
                ends = {key for part in field.metadata for key in ("ge", "gt", "le", "lt") if hasattr(part, key)}
                assert len(ends & {"ge", "gt"}) == len(ends & {"le", "lt"}) == 1, name
            else:
                assert field.annotation is bool or get_args(field.annotation) or name in ("dataset", "model"), name

    def test_unknown_field_of_a_recipe(self) -> None:
        with pytest.raises((KitError, TypeError), match="'epoch'"):
            recipes.configure("natural", "digits", 0, epoch=3)

    def test_unknown_recipe(self) -> None:
        with pytest.raises(KitError, match=r"'fgsm' is unknown: use n_fgsm "):
            recipes.configure("fgsm", "digits", 0)

    def test_recipes(self) -> None:
        half = recipes.configure("pgd_at_half", "digits", 3)
        assert (half.method, half.attacked, half.steps, half.eps_255, half.step_255) == ("pgd_at", 0.5, 20, 8, 2)
        full = recipes.configure("pgd_at", "digits", 3, steps=7)
        assert (full.method, full.attacked, full.steps, full.seed) == ("pgd_at", 1, 7, 3)
        assert recipes.configure("trades", "digits", 0).beta == 6
        assert runs.folder(Path("runs"), "pgd_at", full) == Path("runs/digits/pgd_at/seed3")


class TestLearningRate:
    def test_steps_by_hand(self) -> None:
        config = Config("natural", lr=0.9, lr_divide=3.0, lr_every=4)
        expected = [0.9] * 4 + [0.3] * 4 + [0.1] * 4 + [0.1 / 3] * 3
        assert [training.learning_rate(config, epoch) for epoch in range(15)] == pytest.approx(expected, rel=1e-12)

    def test_the_optimiser_gets_it(
        self, tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unwatched: None
    ) -> None:
        rates: list[float] = []
        straight = training.train_epoch

        def train_epoch(run: training.Progress, *rest: Any) -> Iterator[tuple[int, float]]:
            for batch in straight(run, *rest):
                rates.extend(group["lr"] for group in run.optimizer.param_groups)
                yield batch

        monkeypatch.setattr(training, "train_epoch", train_epoch)
        config = replace(RUNS["natural"], lr=0.01, lr_divide=10.0, lr_every=2)
        runs.run(config, tiny, tmp_path)
        assert list(dict.fromkeys(rates)) == pytest.approx([0.01, 0.001])


class TestLoss:
    @pytest.fixture
    def model(self) -> nn.Module:
        return models.build("lenet5", seed=1)

    def test_natural_is_the_cross_entropy(self, model: nn.Module, tiny: Dataset) -> None:
        x, y = tiny.train.batch(slice(0, 20))
        found = losses.loss(model, x, y, RUNS["natural"], stream(0))
        probabilities = model(x).softmax(1)[torch.arange(20), y]
        torch.testing.assert_close(found, -probabilities.log().mean())

    @pytest.mark.parametrize(("share", "size", "count"), [(0.5, 20, 10), (1.0, 20, 20), (0.5, 7, 4), (0.25, 20, 5)])
    def test_the_share_of_the_batch_that_is_attacked(
        self, model: nn.Module, tiny: Dataset, monkeypatch: pytest.MonkeyPatch, share: float, size: int, count: int
    ) -> None:
        calls: list[tuple[Tensor, tuple[Any, ...]]] = []

        def spy(model: nn.Module, x: Tensor, y: Tensor, *attack: Any, **_: Any) -> Tensor:
            calls.append((x, attack))
            return 1 - x  # recognisable

        monkeypatch.setattr(losses, "pgd", spy)
        x, y = tiny.train.batch(slice(0, size))
        config = Config("pgd_at", attacked=share, eps_255=4, step_255=1.5, steps=3)
        found = losses.loss(model, x, y, config, stream(0))
        assert [len(attacked) for attacked, _ in calls] == [count]
        assert calls[0][1] == (4 / 255, 1.5 / 255, 3)
        attacked = torch.stack([1 - image if number < count else image for number, image in enumerate(x)])
        torch.testing.assert_close(found, F.cross_entropy(model(attacked), y))

    def test_n_fgsm_is_one_step_as_long_as_the_radius(self, model: nn.Module, tiny: Dataset) -> None:
        x, y = tiny.train.batch(slice(0, 20))
        config = recipes.configure("n_fgsm", "digits", 0, eps_255=12, step_255=3)
        assert config.steps == 1
        attacked = attacks.n_fgsm(model, x, y, 12 / 255, stream(4))
        assert not torch.equal(attacked, x)
        torch.testing.assert_close(losses.loss(model, x, y, config, stream(4)), F.cross_entropy(model(attacked), y))

    def test_trades_is_as_its_paper_writes_it(self, model: nn.Module, tiny: Dataset) -> None:
        x, y = tiny.train.batch(slice(0, 30))
        config = Config("trades", beta=4.0, eps_255=16, step_255=4, steps=3)
        found = losses.loss(model, x, y, config, stream(5))
        adversarial = attacks.pgd(
            model, x, y, 16 / 255, 4 / 255, 3, random_start="gaussian", loss="kl", generator=stream(5)
        )
        clean, attacked = (model.double()(images.double()).softmax(1) for images in (x, adversarial))
        model.float()
        expected = 0.0
        for p, q, label in zip(clean.tolist(), attacked.tolist(), y.tolist(), strict=True):
            divergence = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            expected += (-math.log(p[label]) + 4.0 * divergence) / 30
        assert float(found.detach()) == pytest.approx(expected, rel=1e-4)

    def test_trades_gradient_flows_through_both_terms(self, model: nn.Module, tiny: Dataset) -> None:
        x, y = tiny.train.batch(slice(0, 30))
        x, model = x.double(), model.double()
        config = Config("trades", beta=50.0, eps_255=16, step_255=4, steps=3)
        found = torch.autograd.grad(losses.loss(model, x, y, config, stream(5)), [*model.parameters()])
        adversarial = attacks.pgd(
            model, x, y, 16 / 255, 4 / 255, 3, random_start="gaussian", loss="kl", generator=stream(5)
        )
        p, q = model(x).log_softmax(1), model(adversarial).log_softmax(1)
        total = -p[torch.arange(30), y].mean() + 50 * (p.exp() * (p - q)).sum(1).mean()
        for ours, theirs in zip(found, torch.autograd.grad(total, [*model.parameters()]), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-12)


class TestEpoch:
    def run(self, split: Split, epoch: int = 0, **values: Any) -> training.Progress:
        model, data = models.build("lenet5", seed=0), Dataset("digits", tuple("0123456789"), split, split, split)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        return training.Progress(replace(RUNS["natural"], **values), data, model, optimizer, None, epoch)

    def test_every_image_once_the_last_partial_batch_too(self, tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
        numbered = Split(torch.zeros(200, 1, 32, 32, dtype=torch.uint8), torch.arange(200))
        batches: list[list[int]] = []
        modes: list[bool] = []

        def loss(model: nn.Module, x: Tensor, y: Tensor, *_: Any) -> Tensor:
            batches.append(y.tolist())
            modes.append(model.training)
            return model(x).sum()

        monkeypatch.setattr(training, "loss", loss)
        for epoch in (0, 1):
            sizes = [count for count, _ in training.train_epoch(self.run(numbered, epoch))]
            assert sizes == [64, 64, 64, 8]
        orders = [sum(batches[:4], []), sum(batches[4:], [])]
        for order in orders:
            assert sorted(order) == list(range(200))
            assert order != list(range(200))
        assert orders[0] != orders[1]
        assert set(modes) == {True}

    def test_the_order_depends_on_seed_and_epoch_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        numbered = Split(torch.zeros(50, 1, 32, 32, dtype=torch.uint8), torch.arange(50))
        seen: list[int] = []

        def loss(model: nn.Module, x: Tensor, y: Tensor, *_: Any) -> Tensor:
            seen.extend(y.tolist())
            return model(x).sum()

        monkeypatch.setattr(training, "loss", loss)
        orders = []
        for seed, epoch, noise in ((0, 1, 0), (0, 1, 99), (1, 1, 0), (1, 0, 0)):
            torch.manual_seed(noise)
            seen.clear()
            list(training.train_epoch(self.run(numbered, epoch, seed=seed)))
            orders.append(list(seen))
        assert orders[0] == orders[1]
        assert len({tuple(order) for order in orders}) == 3

    def test_the_attacks_starts_depend_on_seed_and_epoch(self, tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
        draws: list[float] = []

        def loss(model: nn.Module, x: Tensor, y: Tensor, config: Config, generator: torch.Generator, *_: Any) -> Tensor:
            draws.append(float(torch.rand((), generator=generator)))
            return model(x).sum()

        monkeypatch.setattr(training, "loss", loss)
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0)):
            list(training.train_epoch(self.run(tiny.train, epoch, seed=seed)))
        assert draws[:4] == draws[12:]
        assert len(set(draws[:12])) == 12

    def test_one_batch_is_one_step_down_the_gradient(self, tiny: Dataset) -> None:
        run = self.run(tiny.train, batch_size=1000, lr=0.01)  # the whole split in one batch
        before = {name: value.clone() for name, value in run.model.state_dict().items()}
        ((count, value),) = training.train_epoch(run)
        assert count == 200
        fresh = models.build("lenet5", seed=0)
        expected = F.cross_entropy(fresh(tiny.train.images.float() / 255), tiny.train.labels)
        assert value == pytest.approx(float(expected.detach()), rel=1e-5)
        expected.backward()
        for name, parameter in fresh.named_parameters():
            moved = before[name] - 0.01 * parameter.grad
            torch.testing.assert_close(run.model.state_dict()[name], moved, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_loss_that_is_not_finite_stops_before_the_weights_change(
        self, tiny: Dataset, monkeypatch: pytest.MonkeyPatch, value: float
    ) -> None:
        run = self.run(tiny.train, epoch=4)
        before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
        monkeypatch.setattr(training, "loss", lambda model, x, *_: model(x).sum() * value)
        with pytest.raises(training.TrainingDivergedError, match="epoch 5, batch 1: the loss is"):
            list(training.train_epoch(run))
        assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())


class TestAverage:
    """`ema`: after every batch, kept <- ema * kept + (1 - ema) * weights."""

    def test_against_the_recursion_by_hand(self, tiny: Dataset) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(1024), nn.Linear(1024, 10))
        average, config = copy.deepcopy(model), replace(RUNS["natural"], ema=0.7)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        kept = [value.detach().double().clone() for value in model.parameters()]
        for epoch in (0, 1):
            for _ in training.train_epoch(training.Progress(config, tiny, model, optimizer, average, epoch)):
                for mine, now in zip(kept, model.parameters(), strict=True):
                    mine.mul_(0.7).add_(0.3 * now.detach().double())
        for mine, found, now in zip(kept, average.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(found.double(), mine, rtol=1e-5, atol=1e-7)
            assert not torch.equal(found, now)
        for found, now in zip(average.buffers(), model.buffers(), strict=True):
            assert torch.equal(found, now)  # batch normalisation's statistics are averages already

    def test_it_changes_nothing_about_the_training(self, tiny: Dataset) -> None:
        found = []
        for ema in (0.0, 0.9):
            config = replace(RUNS["natural"], ema=ema, epochs=1)
            progress = training.begin(config, tiny, training.fresh_model(config, tiny))
            list(training.epochs(progress))
            found.append(progress.model.state_dict())
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])

    @pytest.mark.usefixtures("unwatched")
    def test_it_is_what_is_validated_tested_and_kept(self, tiny: Dataset, tmp_path: Path) -> None:
        config = RUNS["ema"]
        progress = training.begin(config, tiny, training.fresh_model(config, tiny))
        list(training.epochs(progress))
        assert progress.result is progress.average
        model = runs.run(config, tiny, tmp_path)
        for ours, theirs in zip(model.parameters(), progress.average.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        assert not torch.equal(model.fc2.bias, progress.model.fc2.bias)
        attack = Attack(config.eps_255, config.step_255, steps=10)
        errors = evaluation.class_errors(progress.average, tiny.validation, attack)
        last = json.loads((tmp_path / "history.json").read_text(encoding="utf-8"))["epochs"][-1]["validation"]
        assert last == {"natural": errors.natural.tolist(), "robust": errors.robust.tolist()}


def test_only_training_images_enter_the_statistics_of_batch_normalisation(tiny: Dataset) -> None:
    """Not those on which weights are looked at after an epoch, nor those on which errors are measured."""
    colour = {name: replace(part, images=part.images.repeat(1, 3, 1, 1)) for name, part in tiny.splits.items()}
    config = Config("natural", "digits", epochs=2, batch_size=50, model="preact_resnet18_w16")
    run = training.begin(config, replace(tiny, **colour), models.build("preact_resnet18_w16", seed=0))
    for epoch, _ in enumerate(training.epochs(run), 1):
        state = run.model.state_dict()
        assert {state[name].item() for name in state if name.endswith("num_batches_tracked")} == {4 * epoch}
        assert run.model.training


@pytest.mark.usefixtures("unwatched")
class TestRun:
    def test_weights_that_the_last_step_ruins_are_refused(self, digits: Dataset, tmp_path: Path) -> None:
        """The loss is looked at before a step: with one batch an epoch, nobody looks after the last one."""
        few = tiny_dataset(digits, 5, 3, 5)
        values = {"optimizer": "sgd", "lr": 1000.0, "weight_decay": 1000.0, "lr_divide": 1.0, "batch_size": 50}
        for epochs in (7, 60):
            config = Config("natural", "digits", epochs=epochs, **values)
            place = tmp_path / str(epochs)
            for _ in range(2):  # the same command again
                with pytest.raises(training.TrainingDivergedError, match=r"^epoch 7: .* has weights that are NaN"):
                    runs.run(config, few, place)
                state = checkpoint.read(place / "checkpoint.pt")
                assert state["epoch"] == 6
                assert all(bool(value.isfinite().all()) for value in state["model"].values())
            assert not (place / runs.WEIGHTS).exists()

    def test_outputs_that_are_not_finite_are_refused(self, tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
        """Finite weights can be so large that logits are not: no error measured with them means anything."""
        run = training.begin(Config("natural", "digits", epochs=1), tiny, models.build("lenet5", seed=0))

        def ruin(*_: Any, **__: Any) -> training.Batches:
            with torch.no_grad():
                run.model.fc2.weight.fill_(3e38)
            yield 50, 1.0

        monkeypatch.setattr(training, "train_epoch", ruin)
        with pytest.raises(
            training.TrainingDivergedError, match=r"^epoch 1: the network has outputs .* NaN or infinite"
        ):
            next(training.epochs(run))

    @pytest.mark.parametrize("name", RUNS)
    def test_stopped_and_resumed_equals_straight(
        self, tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        torch.manual_seed(1)
        straight = runs.run(RUNS[name], tiny, tmp_path / "straight")
        for epoch, batch in ((0, 2), (1, 1), (2, 3)):  # before any checkpoint, in the middle, at the last batch
            with monkeypatch.context() as patch, pytest.raises(StoppedError):
                stop_at(patch, epoch, batch)
                torch.manual_seed(100 * epoch)  # whatever the global state is
                runs.run(RUNS[name], tiny, tmp_path / "stopped")
            assert (tmp_path / "stopped" / "checkpoint.pt").exists() == (epoch > 0)
            assert not (tmp_path / "stopped" / runs.WEIGHTS).exists()
        resumed = runs.run(RUNS[name], tiny, tmp_path / "stopped")
        assert_same_run(tmp_path / "straight", tmp_path / "stopped")
        for ours, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
            assert torch.equal(ours, theirs)

    def test_resumes_from_the_generation_before_a_damaged_one(
        self, tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runs.run(RUNS["pgd_at"], tiny, tmp_path / "straight")
        with monkeypatch.context() as patch, pytest.raises(StoppedError):
            stop_at(patch, 2, 0)
            runs.run(RUNS["pgd_at"], tiny, tmp_path / "stopped")
        newest = tmp_path / "stopped" / "checkpoint.pt"
        newest.write_bytes(newest.read_bytes()[:-1000])
        with pytest.warns(UserWarning, match="generation before it"):
            runs.run(RUNS["pgd_at"], tiny, tmp_path / "stopped")
        assert_same_run(tmp_path / "straight", tmp_path / "stopped")

    @pytest.mark.parametrize("function", ["write_json", "write_weights", "evaluate"])
    def test_stopped_after_the_last_epoch(
        self, tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
    ) -> None:
        """Between the last checkpoint and the finished files: nothing is trained twice, nothing is lost."""
        runs.run(RUNS["natural"], tiny, tmp_path / "straight")
        module = {"write_json": checkpoint, "write_weights": runs, "evaluate": records}[function]

        def fail(*_: Any, **__: Any) -> Any:
            raise StoppedError

        with monkeypatch.context() as patch, pytest.raises(StoppedError):
            patch.setattr(module, function, fail)
            runs.run(RUNS["natural"], tiny, tmp_path / "stopped")

        def train_epoch(*_: Any, **__: Any) -> Iterator[tuple[int, float]]:
            raise AssertionError("trained again")

        monkeypatch.setattr(training, "train_epoch", train_epoch)
        runs.run(RUNS["natural"], tiny, tmp_path / "stopped")
        assert_same_run(tmp_path / "straight", tmp_path / "stopped")

    def test_a_finished_run_reloads_without_training(
        self, tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = runs.run(RUNS["natural"], tiny, tmp_path)
        files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert sorted(files) == sorted(runs.FILES)

        def never(*_: Any, **__: Any) -> Any:
            raise AssertionError("computed again")

        monkeypatch.setattr(training, "train_epoch", never)
        monkeypatch.setattr(records, "class_errors", never)
        again = runs.run(RUNS["natural"], tiny, tmp_path)
        for ours, theirs in zip(again.parameters(), first.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files

    @pytest.mark.parametrize("name", ["run.lock", "record.json.0123abcd.tmp"])
    def test_what_a_kill_after_the_end_leaves_is_swept_up(self, tiny: Dataset, tmp_path: Path, name: str) -> None:
        runs.run(RUNS["natural"], tiny, tmp_path)
        files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        (tmp_path / name).touch()
        runs.run(RUNS["natural"], tiny, tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files

    def test_a_lost_record_is_made_again_from_the_weights(
        self, tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runs.run(RUNS["natural"], tiny, tmp_path)
        record = (tmp_path / "record.json").read_bytes()
        (tmp_path / "record.json").unlink()
        stop_at(monkeypatch, 0, 0)
        runs.run(RUNS["natural"], tiny, tmp_path)
        assert (tmp_path / "record.json").read_bytes() == record

    @pytest.mark.parametrize("finished", [True, False])
    def test_another_configuration_is_refused_and_nothing_touched(
        self, tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
    ) -> None:
        if finished:
            runs.run(RUNS["natural"], tiny, tmp_path)
        else:
            with monkeypatch.context() as patch, pytest.raises(StoppedError):
                stop_at(patch, 2, 0)
                runs.run(RUNS["natural"], tiny, tmp_path)
        files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(KitError, match=r"lr is 0\.001 there and 0\.002 here"):
            runs.run(replace(RUNS["natural"], lr=0.002), tiny, tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files

    def test_damaged_weights_are_refused(self, tiny: Dataset, tmp_path: Path) -> None:
        runs.run(RUNS["natural"], tiny, tmp_path)
        (tmp_path / runs.WEIGHTS).write_bytes((tmp_path / runs.WEIGHTS).read_bytes()[:-500])
        with pytest.raises(KitError, match=r"weights\.safetensors is no weights file of a finished run"):
            runs.run(RUNS["natural"], tiny, tmp_path)

    def test_another_kind_of_file_in_the_weights_place_is_refused(self, tiny: Dataset, tmp_path: Path) -> None:
        folder = tmp_path / "digits" / "natural" / "seed0"
        runs.run(RUNS["natural"], tiny, folder)
        path = folder / runs.WEIGHTS
        path.write_bytes(safetensors.torch.save(weights_of(folder)))  # the tensors alone
        with pytest.raises(KitError, match=r"weights\.safetensors is no weights file of a finished run"):
            runs.run(RUNS["natural"], tiny, folder)
        with pytest.raises(KitError, match=r"weights\.safetensors is no weights file of a finished run"):
            list(studies.verify(tmp_path, tiny))

    def test_divergence_names_the_place_and_keeps_the_checkpoint(
        self, tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runs.run(RUNS["natural"], tiny, tmp_path / "straight")
        calls = []

        def nan_at_the_seventh(*arguments: Any) -> Tensor:
            calls.append(None)
            return losses.loss(*arguments) * (math.nan if len(calls) == 7 else 1)

        with monkeypatch.context() as patch:
            patch.setattr(training, "loss", nan_at_the_seventh)
            with pytest.raises(training.TrainingDivergedError, match="epoch 2, batch 3: the loss is nan") as caught:
                runs.run(RUNS["natural"], tiny, tmp_path / "stopped")
        assert "lr = 0.001" in str(caught.value)
        assert checkpoint.read(tmp_path / "stopped" / "checkpoint.pt")["epoch"] == 1
        runs.run(RUNS["natural"], tiny, tmp_path / "stopped")
        assert_same_run(tmp_path / "straight", tmp_path / "stopped")

    def test_what_history_and_record_hold(self, tiny: Dataset, tmp_path: Path) -> None:
        config = RUNS["pgd_at"]
        model = runs.run(config, tiny, tmp_path)
        history = json.loads((tmp_path / "history.json").read_text(encoding="utf-8"))
        assert set(history) == {"config", "data_sha256", "made_by", "kernel", "threads", "versions", "epochs"}
        assert history["made_by"] == [{key: history[key] for key in ("kernel", "threads", "versions")}]
        assert history["data_sha256"] == tiny.fingerprint
        assert Config(**history["config"]) == config
        assert history["threads"] == torch.get_num_threads()
        assert history["kernel"] in ("native", "portable")
        assert len(history["epochs"]) == 3
        for epoch in history["epochs"]:
            assert set(epoch) == {"loss", "lr", "validation", "seconds"}
            assert epoch["loss"] > 0
            assert epoch["seconds"] >= 0
            for errors in epoch["validation"].values():
                assert len(errors) == 10
                assert all(0 <= error <= 1 for error in errors)
        expected = evaluation.class_errors(model, tiny.validation, Attack(config.eps_255, config.step_255, steps=10))
        last = history["epochs"][-1]["validation"]
        assert last == {"natural": expected.natural.tolist(), "robust": expected.robust.tolist()}
        record = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
        assert Config(**record["config"]) == config
        assert [entry["attack"]["eps_255"] for entry in record["attacks"]] == [8, 16]
        assert record["images"] == 50
        kept, found = runs.read_weights(tmp_path / runs.WEIGHTS)
        assert found == recipes.described(config)
        assert record["weights_sha256"] == checkpoint.digest(dict(kept.state_dict()))

    def test_training_learns(self, tiny: Dataset, tmp_path: Path) -> None:
        runs.run(replace(RUNS["natural"], epochs=12, lr=0.005), tiny, tmp_path)
        history = json.loads((tmp_path / "history.json").read_text(encoding="utf-8"))["epochs"]
        record = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
        assert history[-1]["loss"] < 0.5 * history[0]["loss"]
        assert sum(record["natural"]) / 10 < 0.45  # guessing is 0.9

    def test_mean_loss_weighs_batches_by_their_images(
        self, tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        values = iter([1.0, 2.0, 3.0, 40.0])
        monkeypatch.setattr(training, "loss", lambda model, x, *_: model(x).sum() * 0 + next(values))
        runs.run(replace(RUNS["natural"], epochs=1), tiny, tmp_path)
        (epoch,) = json.loads((tmp_path / "history.json").read_text(encoding="utf-8"))["epochs"]
        assert epoch["loss"] == pytest.approx((64 * (1 + 2 + 3) + 8 * 40) / 200)

    def test_the_callers_random_state_is_left_alone(self, tiny: Dataset, tmp_path: Path) -> None:
        torch.manual_seed(3)
        expected = torch.rand(2)
        torch.manual_seed(3)
        runs.run(RUNS["trades"], tiny, tmp_path)
        assert torch.equal(torch.rand(2), expected)


class TestProgress:
    def test_one_line_per_epoch_where_nobody_watches(
        self, tiny: Dataset, tmp_path: Path, capfd: pytest.CaptureFixture[str], unwatched: None
    ) -> None:
        runs.run(RUNS["natural"], tiny, tmp_path / "digits" / "natural" / "seed0")
        out, err = capfd.readouterr()
        assert err == ""
        lines = out.splitlines()
        assert len(lines) == 3
        for number, line in enumerate(lines, 1):
            assert line.startswith(f"digits/natural/seed0 epoch {number}/3: loss ")
            assert line.endswith(" images/s")

    def test_a_bar_and_no_lines_where_someone_does(
        self, tiny: Dataset, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(training, "watched", lambda: True)
        runs.run(RUNS["natural"], tiny, tmp_path)
        out, err = capfd.readouterr()
        assert out == ""
        assert "epoch 1/3" in err

    @pytest.mark.parametrize(
        ("terminal", "variable", "expected"), [(True, "", True), (False, "x.ipynb", True), (False, "", False)]
    )
    def test_who_watches(self, monkeypatch: pytest.MonkeyPatch, terminal: bool, variable: str, expected: bool) -> None:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
        monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
        if variable:
            monkeypatch.setenv("JPY_SESSION_NAME", variable)
        assert watched() is expected


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

def train_epoch(run, *rest):
    for number, item in enumerate(straight(run, *rest)):
        yield item
        if run.epoch == 1 and number == 2:  # the weights have changed since the checkpoint
            print("IN THE MIDDLE", flush=True)
            time.sleep(300)

training.train_epoch = train_epoch
runs.run(recipes.Config(**json.loads(sys.argv[2])), tiny, folder / "killed")
"""


@pytest.mark.usefixtures("unwatched")
@pytest.mark.parametrize("name", ["pgd_at", "trades"])
def test_killed_in_the_middle_of_an_epoch(
    tiny: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    torch.save(
        [(split.images, split.labels) for split in (tiny.train, tiny.validation, tiny.test)], tmp_path / "data.pt"
    )
    config = replace(RUNS[name], batch_size=40)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), json.dumps(asdict(config))]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert any("IN THE MIDDLE" in line for line in process.stdout), "it ended by itself"
        finally:
            process.kill()
        assert process.wait() == -signal.SIGKILL
    assert sorted(os.listdir(tmp_path / "killed")) == ["checkpoint.pt", "run.lock"]  # a lock that nobody holds
    runs.run(config, tiny, tmp_path / "killed")  # as a new process would
    said = capsys.readouterr().out
    assert "epoch 1/3" not in said  # it went on, it did not start again
    assert "epoch 2/3" in said
    runs.run(config, tiny, tmp_path / "straight")
    assert_same_run(tmp_path / "straight", tmp_path / "killed")

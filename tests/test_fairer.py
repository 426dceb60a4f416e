"""Retraining from anyone's own network: it starts there and nowhere else, and goes on after a stop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import tiny_dataset
from PIL import Image
from torch import Tensor, nn

from frlkit import KitError, checkpoint, models, recipes, runs, training
from frlkit.__main__ import main
from frlkit.attacks import outputs
from frlkit.audit import fairer
from frlkit.data import Dataset, Split
from frlkit.report import studies


class Net(nn.Module):
    """Of anyone's: batch normalisation, images of 16 x 16, the output layer registered first or without a bias."""

    def __init__(self, seed: int = 0, bias: bool = True, first: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        layers = [nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()]
        head = nn.Linear(4 * 7 * 7, 10, bias=bias)
        self.head, self.body = (head, nn.Sequential(*layers)) if first else (None, nn.Sequential(*layers, head))

    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[1:] == (1, 16, 16)
        return self.body(images) if self.head is None else self.head(self.body(images))


@pytest.fixture(scope="module")
def small(digits: Dataset) -> Dataset:
    """The digits at 16 x 16: 40 images to train, 20 to validate, 20 to test."""
    tensors = tiny_dataset(digits, 4, 2, 2)
    splits = [Split(part.images[:, :, ::2, ::2].contiguous(), part.labels) for part in tensors.splits.values()]
    return Dataset("digits", tensors.class_names, *splits)


LOOP = "uniform,steps=1,beta=0,ema=0"


def test_the_start_is_the_networks_own_weights(small: Dataset, tmp_path: Path) -> None:
    """At a rate of nearly nothing the weights stay; the network that was given is left alone."""
    model = Net()
    before = checkpoint.digest(dict(model.state_dict()))
    after = fairer.retrain(f"{LOOP},lr=1e-9", model, "net.py:net", small, tmp_path, epochs=1, batch_size=20)
    assert checkpoint.digest(dict(model.state_dict())) == before
    for ours, theirs in zip(after.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)
    (place,) = runs.finished(tmp_path)
    assert place.parent.name.endswith(f"start=weights-{before[:16]}")
    history = json.loads((place / "history.json").read_text(encoding="utf-8"))
    assert history["start"]["sha256"] == before
    assert history["config"]["model"] == "own:net.py:net"


def test_other_weights_are_another_run_and_a_stopped_run_goes_on(
    small: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"epochs": 2, "batch_size": 20}
    straight = fairer.retrain(LOOP, Net(), "net", small, tmp_path / "straight", **asked)
    epochs = training.epochs

    def stopped(*given: object) -> object:
        yield next(epochs(*given))
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "epochs", stopped)
    with pytest.raises(KeyboardInterrupt):
        fairer.retrain(LOOP, Net(), "net", small, tmp_path, **asked)
    monkeypatch.setattr(training, "epochs", epochs)
    fairer.retrain(LOOP, Net(1), "net", small, tmp_path, **asked)
    assert len(runs.finished(tmp_path / "digits")) == 1  # another's
    resumed = fairer.retrain(LOOP, Net(), "net", small, tmp_path, **asked)
    digests = {checkpoint.digest(dict(model.state_dict())) for model in (straight, resumed)}
    assert len(digests) == 1


def test_weights_that_are_not_those_of_the_name_are_refused(small: Dataset, tmp_path: Path) -> None:
    recipe = f"{LOOP},start={runs.own_start(Net())}"
    config = recipes.configure(recipe, "digits", 0, model=models.lend("net", Net(1)), epochs=1)
    with pytest.raises(KitError, match=r"starts from weights-\w{16} and the weights of own:net are weights-\w{16}"):
        runs.run(config, small, tmp_path / "seed0")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_verify_leaves_ones_own_out_by_name(small: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fairer.retrain(LOOP, Net(), "net", small, tmp_path, epochs=1, batch_size=20)
    (place,) = runs.finished(tmp_path)
    assert list(studies.verify(tmp_path, small)) == [(place, 0)]
    monkeypatch.setattr(models, "_lent", {})  # another process
    assert list(studies.verify(tmp_path, small)) == [(place, None)]
    with pytest.raises(KitError, match=r"safetensors: model = 'own:net' is unknown: .*lent anew"):
        runs.read_weights(place / runs.WEIGHTS)
    words = ["verify", "--dataset", "digits", "--runs", str(tmp_path)]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1
    assert f"left out, a network of one's own (frlkit audit {place / runs.WEIGHTS}" in result.output
    assert "there are no finished runs of digits" in result.output


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("pgd_at", "recipe = 'pgd_at' goes on from no network: use one of"),
        ("uniform,model=lenet6", "model = 'lenet6' is unknown: use one of lenet5"),
        ("uniform,model=own:absent", "one's own has to be lent anew in every process"),
    ],
)
def test_refused(recipe: str, words: str, small: Dataset, tmp_path: Path) -> None:
    with pytest.raises(KitError, match=words):
        fairer.retrain(recipe, Net(), "net", small, tmp_path)


@pytest.mark.parametrize("recipe", ["nosuch", "pgd_at", "algorithm1_both,colour=red"])
def test_a_recipe_that_cannot_be_is_refused_before_any_training(
    recipe: str, small: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "run", lambda *_: pytest.fail("trained"))
    with pytest.raises(KitError, match="nosuch|pgd_at|colour"):
        next(fairer.versions(Net(), "net", small, tmp_path, recipe))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["weights-", "weights-xyz", "weights-" + "0" * 64, "somewhere"])
def test_a_start_that_names_none_is_refused(value: str) -> None:
    with pytest.raises(KitError, match="start = .* is unknown: use one of natural"):
        recipes.configure(f"uniform,start={value}", "digits", 0)


@pytest.mark.parametrize(
    ("model", "movable"),
    [(Net(), True), (Net(bias=False), False), (Net(first=True), False), (models.build("lenet5", seed=0), True)],
    ids=["last", "no bias", "registered first", "LeNet-5"],
)
def test_whose_output_biases_can_be_moved(model: nn.Module, movable: bool, small: Dataset, digits: Dataset) -> None:
    before = checkpoint.digest(dict(model.state_dict()))
    assert fairer._ends_in_biases(model, small if isinstance(model, Net) else digits) is movable
    assert checkpoint.digest(dict(model.state_dict())) == before
    assert model.training


@pytest.mark.parametrize("model", [Net(), Net(bias=False), Net(first=True)], ids=["last", "none", "first"])
def test_output_biases_alone_move(model: Net, small: Dataset, tmp_path: Path) -> None:
    """However the network is built: no other parameter does, nor a statistic of batch normalisation."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    after = fairer.retrain("intercept", model, "net", small, tmp_path, epochs=2)
    state = {name.removeprefix("network."): value for name, value in after.state_dict().items()}
    moved = {name for name in before if not torch.equal(before[name], state[name])}
    assert moved <= {"body.4.bias"}
    x, _ = small.test.batch(slice(None))
    shift = outputs(after, x) - outputs(model, x)
    torch.testing.assert_close(shift, shift[:1].expand_as(shift), rtol=0, atol=1e-5)
    assert shift.abs().max() > 0


@pytest.mark.parametrize("recipe", ["head_norms", "intercept,moved=norms"])
def test_output_norms_that_cannot_be_told_are_refused(recipe: str, small: Dataset, tmp_path: Path) -> None:
    with pytest.raises(KitError, match="needs a network that ends in a linear layer with biases: use intercept"):
        fairer.retrain(recipe, Net(first=True), "net", small, tmp_path)


def test_the_radius_steers_every_version(small: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(runs, "run", lambda config, *_: made.append(config))
    list(fairer.versions(Net(), "net", small, tmp_path, eps_255=4.0, step_255=1.0, measure_255=4.0))
    assert [config.measure_255 for config in made] == [4.0] * 3


def test_four_versions(small: Dataset, tmp_path: Path) -> None:
    """Moved biases are the network before plus a constant, without any training; the other two differ."""
    model = Net(bias=False).eval()
    asked = {"recipe": "algorithm1_both,steps=1", "epochs": 1, "batch_size": 20}
    found = dict(fairer.versions(model, "net", small, tmp_path, **asked))
    assert list(found) == ["before", "control (equal weights)", "Reweight + Remargin", "output biases moved"]
    x, _ = small.test.batch(slice(None))
    with torch.no_grad():
        shift = found["output biases moved"].eval()(x) - model(x)
        torch.testing.assert_close(shift, shift[:1].expand_as(shift), rtol=0, atol=1e-5)
        assert shift.abs().max() > 0
    histories = [json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.rglob("history.json")]
    assert sorted(history["config"].get("ema", 0) for history in histories) == [0, 0.5, 0.5]  # two batches an epoch


def test_the_commands_share_their_runs(tmp_path: Path) -> None:
    """`train --start` makes the control that `fairer` then reloads: a linear network on dark and on bright images."""
    for part, count in (("train", 10), ("test", 4)):
        for name, grey in (("dark", 40), ("bright", 200)):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for number in range(count):
                Image.new("L", (16, 16), grey + number).save(tmp_path / "images" / part / name / f"{number}.png")
    code = "import torch.nn as nn\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(256, 2))\n"
    (tmp_path / "net.py").write_text(code, encoding="utf-8")
    linear = {"1.weight": torch.full((2, 256), 0.05), "1.bias": torch.tensor([-6.4, 6.4])}
    linear["1.weight"][1] *= -1
    torch.save(linear, tmp_path / "weights.pt")
    asked = [str(tmp_path / "weights.pt"), "--model", f"{tmp_path / 'net.py'}:net", "--epochs", "1"]
    asked += ["--dataset", f"folder:{tmp_path / 'images'}", "--runs", str(tmp_path / "runs")]
    done = CliRunner().invoke(main, ["train", "uniform", "--start", *asked])
    assert done.exit_code == 0, done.output
    (control,) = tmp_path.glob("runs/*/uniform,start=weights-*/seed0/weights.safetensors")
    made = control.stat().st_mtime_ns
    done = CliRunner().invoke(main, ["fairer", *asked, "--output", str(tmp_path / "card")])
    assert done.exit_code == 0, done.output
    assert control.stat().st_mtime_ns == made
    kept = json.loads((tmp_path / "card" / "card.json").read_text(encoding="utf-8"))
    assert [audit["title"] for audit in kept][::3] == ["before", "output biases moved"]
    assert f"written: {tmp_path / 'card' / 'card.html'}" in done.output


def test_a_network_without_its_file_is_refused() -> None:
    done = CliRunner().invoke(main, ["train", "uniform", "--model", "net.py:net", "--dataset", "digits"])
    assert done.exit_code == 1
    assert "--model is about the network of --start: give that file too, or leave it out" in done.output

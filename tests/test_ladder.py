"""The ladder of attacks: errors only grow, each rung sees the survivors alone, progress outlives an interruption."""

from __future__ import annotations

import json
import re
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from frlkit import PROJECT, KitError, evaluation, models
from frlkit.audit import ladder
from frlkit.data import Dataset, Split
from frlkit.evaluation import Attack
from frlkit.report import claims


@pytest.fixture(scope="module")
def model(tiny: Dataset) -> nn.Module:
    """A briefly trained network: some images right, some wrong."""
    network = models.build("lenet5", seed=0)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    x, y = tiny.train.batch(slice(None))
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    return network


def test_subset_takes_the_first_of_every_class(tiny: Dataset) -> None:
    part = ladder.subset(tiny.test, 20, 10)
    assert torch.bincount(part.labels).tolist() == [2] * 10
    for label in range(10):
        assert torch.equal(part.images[part.labels == label], tiny.test.images[tiny.test.labels == label][:2])
    for images in (5, 60):
        with pytest.raises(KitError, match=rf"{images} images is not allowed: use 10 to 50"):
            ladder.subset(tiny.test, images, 10)


def test_errors_by_hand() -> None:
    record = {"labels": [0, 0, 0, 0, 1, 1], "fell": [0, 1, 3, 4, 4, 2], "rungs": ["a", "b", "c", "d"]}
    found = {name: values.tolist() for name, values in ladder.errors(record).items()}
    assert found == {"a": [0.25, 0], "b": [0.5, 0], "c": [0.5, 0.5], "d": [0.75, 0.5]}


def test_climb_agrees_with_each_attack_alone_and_only_grows(model: nn.Module, tiny: Dataset, tmp_path: Path) -> None:
    part = ladder.subset(tiny.test, 20, 10)
    record = ladder.climb(model, part, 8.0, tmp_path / "ladder.json")
    errors = list(ladder.errors(record).values())
    assert len(errors) == 4
    assert all((weaker <= stronger).all() for weaker, stronger in zip(errors, errors[1:], strict=False))
    alone = evaluation.class_errors(model, part, Attack(8.0))
    assert np.array_equal(errors[0], alone.natural)
    assert np.abs(errors[1] - alone.robust).max() <= 0.5  # other random starts
    assert errors[1].mean() > errors[0].mean()
    assert (tmp_path / "ladder.json").exists()
    assert ladder.finished(tmp_path / "ladder.json") == record


def test_an_interrupted_climb_goes_on(
    model: nn.Module, tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder, "CHUNK", 7)
    monkeypatch.setattr(ladder, "rungs", lambda eps: {"clean": None, "pgd": Attack(eps, steps=2)})
    part, path = ladder.subset(tiny.test, 20, 10), tmp_path / "ladder.json"
    straight = ladder.climb(model, part, 8.0, tmp_path / "straight.json")
    climbing, calls = ladder._fell, []

    def stop_at_the_second(*arguments: object) -> torch.Tensor:
        calls.append(arguments[-1])
        if len(calls) == 2:
            raise InterruptedError
        return climbing(*arguments)

    monkeypatch.setattr(ladder, "_fell", stop_at_the_second)
    with pytest.raises(InterruptedError):
        ladder.climb(model, part, 8.0, path)
    with pytest.raises(KitError, match="unfinished"):
        ladder.finished(path)
    assert ladder.climb(model, part, 8.0, path) == straight
    assert calls == [0, 7, 7, 14]


def test_other_weights_or_images_are_refused(model: nn.Module, tiny: Dataset, tmp_path: Path) -> None:
    part, path = ladder.subset(tiny.test, 10, 10), tmp_path / "ladder.json"
    record = ladder.climb(model, part, 8.0, path)
    ladder.checkpoint.write_json(path, {**record, "weights_sha256": "other"})
    with pytest.raises(KitError, match="weights_sha256 is 'other' there"):
        ladder.climb(model, part, 8.0, path)


def test_a_linear_model_falls_where_arithmetic_says(tmp_path: Path) -> None:
    """Two classes split by the mean pixel: an image falls at the first rung if its margin is below the radius."""

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(50.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            value = self.scale * (x.mean((1, 2, 3)) - 0.5)
            never = -value.abs() - 10  # AutoAttack wants four classes
            return torch.stack([-value, value, never, never], 1)

    levels = torch.tensor([100, 124, 126, 140, 120, 131, 134, 200], dtype=torch.uint8)
    images = levels.view(-1, 1, 1, 1).expand(-1, 1, 32, 32).contiguous()
    split = Split(images, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))
    record = ladder.climb(Mean(), split, 8.0, tmp_path / "ladder.json")
    rungs = len(record["rungs"])
    assert record["fell"] == [rungs, 1, 1, 0, 0, 1, 1, rungs]


def test_no_image_left_needs_no_torchattacks(tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    monkeypatch.setattr(ladder, "_fell", lambda _, x, *__: torch.zeros(len(x), dtype=torch.int64))
    split = ladder.subset(tiny.test, 10, 10)
    record = ladder.climb(models.build("lenet5", seed=0), split, 8.0, tmp_path / "ladder.json")
    assert record["fell"] == [0] * 10
    assert "torchattacks" not in record["versions"]


class TestCertified:
    """The certified error beneath the last attack of a finished ladder."""

    @pytest.fixture
    def path(self, model: nn.Module, tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(ladder, "rungs", lambda eps: {"clean": None, "pgd": Attack(eps, steps=5)})
        ladder.climb(model, ladder.subset(tiny.test, 20, 10), 1.0, tmp_path / "ladder.json")
        return tmp_path / "ladder.json"

    def test_beneath_every_rung(self, model: nn.Module, tiny: Dataset, path: Path) -> None:
        part, before = ladder.subset(tiny.test, 20, 10), ladder.finished(path)
        record = ladder.certify(model, part, path)
        x, y = part.batch(slice(None))
        margins = ladder.crown.margins(model, x, y, 1 / 255).amin(1)
        standing = [place == 2 for place in before["fell"]]
        expected = [up and bool(margin > 0) for up, margin in zip(standing, margins, strict=True)]
        assert record["verified"] == expected
        assert any(expected)
        assert ladder.read(path) == record
        *_, last, certified = ladder.errors(record).values()
        assert (certified >= last).all()
        assert ladder.climb(model, part, 1.0, path) == record  # climbing again leaves it there

    def test_goes_on(self, model: nn.Module, tiny: Dataset, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        part, margins, calls = ladder.subset(tiny.test, 20, 10), ladder.crown.margins, []

        def stopping(*rest: object) -> torch.Tensor:
            calls.append(len(rest[1]))
            if len(calls) == 2:
                raise KeyboardInterrupt
            return margins(*rest)

        monkeypatch.setattr(ladder.crown, "margins", stopping)
        with pytest.raises(KeyboardInterrupt):
            ladder.certify(model, part, path)
        unknown = ladder.read(path)["verified"].count(None)
        assert unknown
        record = ladder.certify(model, part, path)
        assert sum(calls) - calls[1] == record["fell"].count(2)
        assert None not in record["verified"]

    def test_not_supported(self, tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ladder, "rungs", lambda eps: {"clean": None})
        other, part = nn.Sequential(nn.Flatten(), nn.Linear(1024, 10), nn.Sigmoid()), ladder.subset(tiny.test, 10, 10)
        ladder.climb(other, part, 8.0, tmp_path / "ladder.json")
        record = ladder.certify(other, part, tmp_path / "ladder.json")
        assert "its Sigmoid is not, where it stands" in record["not_supported"]
        assert ladder.CERTIFIED not in ladder.errors(record)

    def test_refuses(self, model: nn.Module, tiny: Dataset, path: Path) -> None:
        with pytest.raises(KitError, match="belongs to another"):
            ladder.certify(models.build("lenet5", seed=5), ladder.subset(tiny.test, 20, 10), path)
        record = ladder.certify(model, ladder.subset(tiny.test, 20, 10), path)
        record["fell"][0], record["verified"][0] = 0, True
        ladder.checkpoint.write_json(path, record)
        with pytest.raises(KitError, match="true only where no rung fooled"):
            ladder.read(path)


def test_notebook_05_claims_what_autoattack_found_whatever_stands_beneath_it() -> None:
    """By hand, from the ladders' own numbers: of each class the share that fell at some attack, never the certified."""
    fallen = []
    for recipe in ("algorithm1_both", "algorithm1_reweight"):
        paths = sorted((PROJECT / "checkpoints" / "fashion_mnist" / recipe).glob("seed*/ladder.json"))
        found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        fallen.append([np.array(one["fell"]).reshape(10, -1) < len(one["rungs"]) for one in found])
    both = 100.0 * np.array(fallen)  # methods, seeds, classes, images
    change = np.subtract(*both.mean(3).max(2)).mean()
    generator, draws = np.random.default_rng(1), []
    for _ in range(1000):  # other images of each class, the same for all; other seeds
        images = generator.integers(both.shape[3], size=(1, 1, *both.shape[2:]))
        again = np.subtract(*np.take_along_axis(both, images, 3).mean(3).max(2))
        draws.append(generator.choice(again, len(again)).mean())
    cells = json.loads((PROJECT / "notebooks" / "05_frl_combined.ipynb").read_text(encoding="utf-8"))["cells"]
    rows = [row for table in claims.from_notebook(cells) for row in table["claims"] if row["key"] == "autoattack-both"]
    assert len(rows) == 1
    assert f" {change:.1f} points [" in rows[0]["evidence"]
    ends = [float(end) for end in re.search(r"\[(.+?), (.+?)\]", rows[0]["evidence"]).groups()]
    assert ends == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.8)

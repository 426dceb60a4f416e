"""A run's folder: its weights as safetensors, its images, and what carried it out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_training import RUNS, StoppedError, assert_same_run, stop_at, weights_of
from torch import Tensor

from frlkit import KitError, checkpoint, disk, evaluation, models, recipes, records, runs, training
from frlkit.data import Dataset, Split
from frlkit.recipes import Config
from frlkit.report import studies

NATURAL = RUNS["natural"]


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """The standard attacks with two steps, and no bars."""
    attacks = tuple(replace(attack, steps=2) for attack in evaluation.STANDARD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "standard", lambda dataset, **_: attacks)
        patch.setattr(training, "watched", lambda: False)
        yield


@pytest.fixture(scope="module")
def trained(quick: None, tiny: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run's folder; tests copy it."""
    place = tmp_path_factory.mktemp("trained")
    runs.run(NATURAL, tiny, place)
    return place


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "digits" / "natural" / "seed0"))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("trained again")


class TestWeights:
    @pytest.mark.parametrize("name", models.MODELS)
    def test_they_come_back_bit_for_bit(self, tmp_path: Path, name: str) -> None:
        if name.startswith(("resnet34", "wrn")):
            pytest.skip("large, and built from the same blocks")
        model = models.build(name, 7, seed=3)
        runs.write_weights(tmp_path / "w.safetensors", model.state_dict(), {"model": name, "lr": 0.1}, 7)
        found, config = runs.read_weights(tmp_path / "w.safetensors")
        assert config == {"model": name, "lr": 0.1}
        assert checkpoint.digest(dict(found.state_dict())) == checkpoint.digest(dict(model.state_dict()))

    def test_others_can_read_them(self, place: Path) -> None:
        tensors = safetensors.torch.load_file(place / runs.WEIGHTS)
        assert set(tensors) == set(models.build("lenet5").state_dict())

    def test_any_damage_is_noticed(self, place: Path) -> None:
        path = place / runs.WEIGHTS
        whole, right = path.read_bytes(), checkpoint.digest(weights_of(place))

        @settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
        @given(st.integers(0, 8 * len(whole) - 1), st.booleans())
        def check(bit: int, cut: bool) -> None:
            content = bytearray(whole)
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(whole[: bit // 8] if cut else bytes(content))
            try:
                model, _ = runs.read_weights(path)
            except KitError as error:
                assert str(path) in str(error)
                assert len(str(error).splitlines()) == 1
            else:  # a bit of the header that says nothing about the tensors
                assert checkpoint.digest(dict(model.state_dict())) == right

        check()

    def test_a_changed_weight_is_damage(self, place: Path) -> None:
        with safetensors.safe_open(place / runs.WEIGHTS, framework="pt") as file:
            head = file.metadata()
        tensors = weights_of(place)
        tensors["fc2.bias"][0] += 1
        (place / runs.WEIGHTS).write_bytes(safetensors.torch.save(tensors, metadata=head))
        with pytest.raises(KitError, match="is damaged: its weights do not match its own digest"):
            runs.read_weights(place / runs.WEIGHTS)

    def test_equal_runs_are_equal_files(self, tmp_path: Path) -> None:
        model = models.build("lenet5", seed=3)
        files = [tmp_path / f"{number}.safetensors" for number in range(9)]
        for path in files:
            runs.write_weights(path, model.state_dict(), {"model": "lenet5", "dataset": "folder:/tmp/é"}, 10)
        assert len({path.read_bytes() for path in files}) == 1
        assert runs.read_weights(files[0])[1]["dataset"] == "folder:/tmp/é"
        assert safetensors.torch.load_file(files[0])["conv1.weight"].equal(model.conv1.weight)

    @pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 40, b"\x08" + bytes(7) + b'{"a": 1}'])
    def test_another_kind_of_file(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "w.safetensors").write_bytes(content)
        with pytest.raises(KitError, match=r"w\.safetensors is no weights file of a finished run"):
            runs.read_weights(tmp_path / "w.safetensors")
        with pytest.raises(KitError, match="there is no file .*nothing"):
            runs.read_weights(tmp_path / "nothing")


def test_the_first_runs_kept_no_fingerprint_and_no_outcomes(
    place: Path, trained: Path, tiny: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / records.OUTCOMES).unlink()
    for name in ("record.json", "history.json"):
        found = json.loads((place / name).read_text(encoding="utf-8"))
        del found["data_sha256"]
        checkpoint.write_json(place / name, found)
    monkeypatch.setattr(training, "train_epoch", never)
    before = content(place)
    assert list(studies.verify(place.parents[2], tiny)) == [(place, 0)]
    monkeypatch.setattr(records, "class_errors", never)
    model = runs.run(NATURAL, tiny, place)
    assert content(place) == before
    assert checkpoint.digest(dict(model.state_dict())) == checkpoint.digest(weights_of(trained))


def stopped(monkeypatch: pytest.MonkeyPatch, data: Dataset, place: Path, epoch: int, config: Config = NATURAL) -> None:
    """Run, and fail at the second batch of an epoch."""
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        stop_at(patch, epoch, 1)
        runs.run(config, data, place)


class TestImages:
    @pytest.fixture
    def others(self, tiny: Dataset) -> Dataset:
        images = tiny.train.images.clone()
        images[3, 0, 5, 5] ^= 1  # one pixel of one image
        return replace(tiny, train=Split(images, tiny.train.labels))

    def test_a_finished_run_knows_its_own(self, place: Path, others: Dataset) -> None:
        before = content(place)
        with pytest.raises(KitError, match=r"history\.json was made with other images of digits than those"):
            runs.run(NATURAL, others, place)
        assert content(place) == before

    def test_a_stopped_run_too(
        self, tmp_path: Path, tiny: Dataset, others: Dataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stopped(monkeypatch, tiny, tmp_path, 1)
        with pytest.raises(KitError, match=r"checkpoint\.pt was made with other images of digits than those"):
            runs.run(NATURAL, others, tmp_path)


class TestMadeBy:
    """Bit equality with the straight run needs the same threads, kernel and versions: what changes is said and kept."""

    @pytest.fixture(autouse=True)
    def threads(self) -> Iterator[None]:
        before = torch.get_num_threads()
        yield
        torch.set_num_threads(before)

    def test_a_checkpoint_can_be_loaded_again(
        self, tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        stopped(monkeypatch, tiny, tmp_path, 1)
        state = checkpoint.read(tmp_path / "checkpoint.pt")
        assert state["epoch"] == 1
        assert {type(value) for made in state["made_by"] for value in made["versions"].values()} == {str}
        runs.run(NATURAL, tiny, tmp_path)
        said = capsys.readouterr().out
        assert "goes on with" not in said
        assert said.count("epoch 1/3") == 1  # before it was stopped
        assert len(json.loads((tmp_path / "history.json").read_text(encoding="utf-8"))["made_by"]) == 1

    def test_every_change_is_said_and_kept(
        self, tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("FRLKIT_KERNEL", "off")
        stopped(monkeypatch, tiny, tmp_path, 1)
        torch.set_num_threads(2)
        stopped(monkeypatch, tiny, tmp_path, 2)
        assert f"{tmp_path} goes on with threads 1 -> 2: its result may differ" in capsys.readouterr().out
        monkeypatch.setattr(records, "versions", lambda: {"torch": "9.9"})
        monkeypatch.setattr(runs.kernels, "describe", lambda model: "native")
        runs.run(NATURAL, tiny, tmp_path)
        said = capsys.readouterr().out
        assert "kernel portable -> native, versions {" in said
        assert "threads" not in said
        history = json.loads((tmp_path / "history.json").read_text(encoding="utf-8"))
        made = history["made_by"]
        assert [(one["kernel"], one["threads"]) for one in made] == [("portable", 1), ("portable", 2), ("native", 2)]
        assert made[-1] == {key: history[key] for key in ("kernel", "threads", "versions")}
        assert made[-1]["versions"] == {"torch": "9.9"}


class TestValidationShare:
    def test_a_retraining_run_has_its_own_and_its_start_keeps_its_own(
        self, tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        start = recipes.configure("pgd_at_half", "digits", 0, epochs=1, batch_size=64)
        runs.run(start, tiny, runs.folder(tmp_path, "pgd_at_half", start))
        values = {"epochs": 1, "steps": 1, "batch_size": 64, "start_epochs": 1, "updates": 1, "update_images": 0}
        config = recipes.configure("report_reweight", "digits", 0, **values)
        assert (start.validation, config.validation) == (0.1, 0.2)
        trained: list[Split] = []
        straight = training.train_epoch

        def train_epoch(run: training.Progress, *rest: Any) -> Iterator[Any]:
            trained.append(run.data.train)
            yield from straight(run, *rest)

        monkeypatch.setattr(training, "train_epoch", train_epoch)
        place = runs.folder(tmp_path, "report_reweight", config)
        runs.run(config, tiny, place)
        (own,) = trained  # the start, finished on its own split, is reloaded
        images = [{image.numpy().tobytes() for image in part.images} for part in (own, tiny.train, tiny.validation)]
        assert images[0] < images[1] | images[2]
        assert len(own) == 230 - 10 * round(0.2 * 23)
        assert json.loads((place / "history.json").read_text(encoding="utf-8"))["data_sha256"] != tiny.fingerprint
        assert records.read(place / "record.json")["config"]["validation"] == 0.2


class TestRandomStart:
    def test_it_begins_with_the_seeds_own_weights(
        self, tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = recipes.configure("random_start_both", "digits", 3, epochs=2, steps=1, batch_size=64)
        begun: list[dict[str, Tensor]] = []
        straight = training.train_epoch

        def train_epoch(run: training.Progress, *rest: Any) -> Iterator[Any]:
            begun.append({name: value.clone() for name, value in run.model.state_dict().items()})
            yield from straight(run, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(training, "train_epoch", train_epoch)
            place = runs.folder(tmp_path, "random_start_both", config)
            runs.run(config, tiny, place)
        assert [path.name for path in (tmp_path / "digits").iterdir()] == ["random_start_both"]  # no start is trained
        fresh = checkpoint.digest(dict(models.build("lenet5", 10, seed=3).state_dict()))
        assert checkpoint.digest(begun[0]) == fresh
        assert json.loads((place / "history.json").read_text(encoding="utf-8"))["start"]["sha256"] == fresh
        assert recipes.start_of(config) is None

        stopping = runs.folder(tmp_path / "stopped", "random_start_both", config)
        stopped(monkeypatch, tiny, stopping, 1, config)
        runs.run(config, tiny, stopping)
        assert_same_run(place, stopping)


def test_a_start_of_a_start_is_trained_first(tiny: Dataset, tmp_path: Path) -> None:
    """pgd_at, from it uniform, from that intercept_uniform."""
    config = recipes.configure("intercept_uniform", "digits", 0, start_epochs=1, epochs=1, batch_size=64)
    middle = recipes.start_of(config)
    assert middle == recipes.configure("uniform", "digits", 0, epochs=1, batch_size=64)
    assert recipes.start_of(middle) == recipes.configure("pgd_at", "digits", 0, epochs=15, batch_size=64)
    quick = recipes.configure("pgd_at", "digits", 0, epochs=15, batch_size=64)
    place = runs.folder(tmp_path, "intercept_uniform", config)
    assert runs.start_folder(config, place) == runs.folder(tmp_path, "uniform", middle)
    runs.run(config, tiny, place)
    assert sorted(path.name for path in (tmp_path / "digits").iterdir()) == ["intercept_uniform", "pgd_at", "uniform"]
    for after, before in (("intercept_uniform", "uniform"), ("uniform", "pgd_at")):
        history = json.loads((tmp_path / "digits" / after / "seed0" / "history.json").read_text(encoding="utf-8"))
        start = records.read(tmp_path / "digits" / before / "seed0" / "record.json")
        assert history["start"]["sha256"] == start["weights_sha256"]
    assert runs.load(runs.folder(tmp_path, "pgd_at", quick), quick)


class TestOrderOfFields:
    """A recipe's fields in another order are the same run, which is where it was begun."""

    SHIPPED = "report_reweight,alpha_nat=1,alpha_bdy=5,epochs=8"

    @staticmethod
    def folder(top: Path, recipe: str) -> str:
        return runs.folder(top, recipe, recipes.configure(recipe, "digits", 0)).parent.name

    def test_a_folder_that_is_there_is_found(self, tmp_path: Path) -> None:
        other = "report_reweight,epochs=08,alpha_bdy=5.0,alpha_nat=1"
        assert self.folder(tmp_path, other) == "report_reweight,epochs=8,alpha_bdy=5,alpha_nat=1"  # a new one
        for name in (self.SHIPPED, "report_reweight,alpha_nat=1,alpha_bdy=5"):
            (tmp_path / "digits" / name).mkdir(parents=True)
        assert self.folder(tmp_path, other) == self.SHIPPED
        (tmp_path / "digits" / recipes.spelled(other)).mkdir()  # by hand: each is its own
        assert self.folder(tmp_path, other) == recipes.spelled(other)
        assert self.folder(tmp_path, self.SHIPPED) == self.SHIPPED

    def test_other_values_are_another_run(self, tmp_path: Path) -> None:
        (tmp_path / "digits" / self.SHIPPED).mkdir(parents=True)
        swapped = "report_reweight,epochs=8,alpha_nat=5,alpha_bdy=1"
        assert self.folder(tmp_path, swapped) == swapped

    def test_a_disk_that_does_not_say(self, tmp_path: Path) -> None:
        (tmp_path / "digits").write_text("no folder", encoding="utf-8")
        assert self.folder(tmp_path, self.SHIPPED) == self.SHIPPED  # starting the run says what is wrong
        place = tmp_path / ("x" * 300)
        with pytest.raises(disk.ReadError, match="cannot be read"):
            self.folder(place, self.SHIPPED)

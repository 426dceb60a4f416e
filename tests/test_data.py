"""Data sets: pixels against torchvision, splits by counting, and files that are damaged or not there."""

from __future__ import annotations

import os
import shutil
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.transforms import Resize

from frlkit import PROJECT, KitError, data
from frlkit.data import Dataset


@pytest.fixture
def no_fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder and an empty cache."""
    monkeypatch.setenv("FRLKIT_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "data"


def fail_to_download(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def download(self: torchvision.datasets.FashionMNIST) -> None:
        raise error

    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "download", download)


class TestFashionMnist:
    def test_pixels_equal_torchvisions_resize_of_the_original(self, fashion_mnist: Dataset) -> None:
        original = torchvision.datasets.FashionMNIST(str(data.root()), train=False, transform=Resize(32))
        for index in np.random.default_rng(0).choice(10_000, 200, replace=False):
            image, label = original[index]
            assert np.array_equal(fashion_mnist.test.images[index, 0].numpy(), np.asarray(image))
            assert fashion_mnist.test.labels[index] == label

    def test_training_images_are_the_originals_in_order(self, fashion_mnist: Dataset) -> None:
        original = torchvision.datasets.FashionMNIST(str(data.root()), train=True, transform=Resize(32))
        keep, held = data.stratified_split(original.targets, 0.1, 0)
        for place in np.random.default_rng(1).choice(len(held), 50, replace=False):
            for split, index in ((fashion_mnist.train, keep[place]), (fashion_mnist.validation, held[place])):
                image, label = original[int(index)]
                assert np.array_equal(split.images[place, 0].numpy(), np.asarray(image))
                assert split.labels[place] == label

    def test_counts_and_names(self, fashion_mnist: Dataset) -> None:
        for split, count in ((fashion_mnist.train, 5400), (fashion_mnist.validation, 600), (fashion_mnist.test, 1000)):
            assert split.labels.bincount().tolist() == [count] * 10
            assert split.images.shape == (10 * count, 1, 32, 32)
            assert split.images.dtype == torch.uint8
        assert fashion_mnist.class_names == tuple(torchvision.datasets.FashionMNIST.classes)

    @pytest.mark.parametrize("kept", [0, 8, 1000])
    def test_files_cut_short_are_one_clear_error(
        self, fashion_mnist: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
    ) -> None:
        raw = tmp_path / "FashionMNIST" / "raw"
        shutil.copytree(data.root() / "FashionMNIST" / "raw", raw, copy_function=lambda a, b: Path(b).symlink_to(a))
        whole = (raw / "t10k-images-idx3-ubyte").read_bytes()
        (raw / "t10k-images-idx3-ubyte").unlink()
        (raw / "t10k-images-idx3-ubyte").write_bytes(whole[:kept])
        monkeypatch.setenv("FRLKIT_DATA", str(tmp_path))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        fail_to_download(monkeypatch, AssertionError("a damaged file must not be replaced behind the user's back"))
        with pytest.raises(KitError) as caught:
            data.load("fashion_mnist")
        assert str(tmp_path) in str(caught.value)
        assert "FashionMNIST/raw" in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1

    def test_an_altered_label_is_not_taken_for_the_original(
        self, fashion_mnist: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        raw = tmp_path / "FashionMNIST" / "raw"
        shutil.copytree(data.root() / "FashionMNIST" / "raw", raw, copy_function=lambda a, b: Path(b).symlink_to(a))
        labels = bytearray((raw / "t10k-labels-idx1-ubyte").read_bytes())
        labels[8] = (labels[8] + 1) % 10
        (raw / "t10k-labels-idx1-ubyte").unlink()
        (raw / "t10k-labels-idx1-ubyte").write_bytes(labels)
        monkeypatch.setenv("FRLKIT_DATA", str(tmp_path))
        with pytest.raises(KitError, match="not the original"):
            data.load("fashion_mnist")

    @pytest.mark.parametrize(
        "error", [RuntimeError("Error downloading x"), urllib.error.URLError("name not resolved"), TimeoutError()]
    )
    def test_neither_on_disk_nor_downloadable(
        self, no_fashion: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        fail_to_download(monkeypatch, error)
        with pytest.raises(data.DataUnavailableError) as caught:
            data.load("fashion_mnist")
        message = str(caught.value)
        assert str(no_fashion) in message
        assert "FRLKIT_DATA" in message
        assert len(message.splitlines()) == 1


def fake_fashion(folder: Path) -> None:
    """Four small but well-formed IDX files, so that the reading code runs where the real ones are missing."""
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train", "t10k"):
        head = b"".join(number.to_bytes(4, "big") for number in (0x0803, 20, 28, 28))
        (raw / f"{name}-images-idx3-ubyte").write_bytes(head + bytes(20 * 28 * 28))
        head = b"".join(number.to_bytes(4, "big") for number in (0x0801, 20))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(head + bytes(range(10)) * 2)


class TestDamagedFiles:
    def test_small_files_are_not_the_original(self, no_fashion: Path) -> None:
        fake_fashion(no_fashion)
        with pytest.raises(KitError, match="not the original"):
            data.load("fashion_mnist")

    @pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
    @pytest.mark.parametrize("kept", [0, 3, 10, 17])
    def test_cut_short_is_one_clear_error(self, no_fashion: Path, name: str, kept: int) -> None:
        fake_fashion(no_fashion)
        path = no_fashion / "FashionMNIST" / "raw" / name
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(KitError) as caught:
            data.load("fashion_mnist")
        assert not isinstance(caught.value, data.DataUnavailableError)  # it is there, and damaged
        assert str(no_fashion) in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


class TestCache:
    @pytest.fixture
    def pixels(self) -> torch.Tensor:
        return torch.randint(0, 256, (5, 28, 28), generator=torch.Generator().manual_seed(0)).to(torch.uint8)

    @pytest.fixture
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        return tmp_path / "frlkit"

    def test_second_call_reads_what_the_first_kept(
        self, cache: Path, pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = data._cached_resize(pixels)
        expected = [np.asarray(Resize(32)(Image.fromarray(image))) for image in pixels.numpy()]
        assert np.array_equal(first[:, 0].numpy(), np.stack(expected))
        assert [path.suffix for path in cache.iterdir()] == [".npy"]

        def resize(pixels: torch.Tensor) -> torch.Tensor:
            raise AssertionError("resized again")

        monkeypatch.setattr(data, "resize", resize)
        assert torch.equal(data._cached_resize(pixels), first)

    def test_other_pixels_never_get_these(self, cache: Path, pixels: torch.Tensor) -> None:
        first = data._cached_resize(pixels)
        pixels[0, 14, 14] ^= 255
        second = data._cached_resize(pixels)
        assert not torch.equal(first, second)
        assert torch.equal(second, data.resize(pixels))
        assert len(list(cache.iterdir())) == 2

    @pytest.mark.parametrize("damage", ["cut", "empty", "text", "wrong shape", "wrong type", "object"])
    def test_a_damaged_file_is_made_again(self, cache: Path, pixels: torch.Tensor, damage: str) -> None:
        first = data._cached_resize(pixels)
        (path,) = cache.iterdir()
        whole = path.read_bytes()
        if damage in ("cut", "empty", "text"):
            path.write_bytes({"cut": whole[:-100], "empty": b"", "text": b"no array at all"}[damage])
        else:
            arrays = {"wrong shape": first[:3].numpy(), "wrong type": first.float().numpy()}
            np.save(path, arrays.get(damage, np.array([{}], dtype=object)), allow_pickle=True)
        assert torch.equal(data._cached_resize(pixels), first)
        assert path.read_bytes() == whole

    def test_a_folder_that_cannot_be_written_costs_a_warning(
        self, tmp_path: Path, pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("in the way")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        with pytest.warns(UserWarning, match="cannot be kept"):
            images = data._cached_resize(pixels)
        assert torch.equal(images, data.resize(pixels))

    def test_a_write_that_fails_leaves_no_litter(
        self, cache: Path, pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fsync(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.warns(UserWarning, match="cannot be kept"):
            data._cached_resize(pixels)
        assert list(cache.iterdir()) == []


class TestDigits:
    def test_counts_and_types(self, digits: Dataset) -> None:
        splits = (digits.train, digits.validation, digits.test)
        assert sum(map(len, splits)) == 1797
        assert len(digits.test) == 360
        for split in splits:
            assert split.images.dtype == torch.uint8
            assert split.images.shape[1:] == (1, 32, 32)
            assert split.labels.dtype == torch.int64
            assert sorted(split.labels.unique().tolist()) == list(range(10))
        assert digits.class_names == tuple("0123456789")

    def test_pixels_are_the_scans_sixteenths_enlarged(self, digits: Dataset) -> None:
        scans = load_digits()
        mapped = np.array([round(level * 255 / 16) for level in range(17)], dtype=np.uint8)
        assert (mapped[0], mapped[16]) == (0, 255)
        images: dict[tuple[bytes, int], int] = {}
        for scan, label in zip(scans.images, scans.target, strict=True):
            large = np.asarray(Image.fromarray(mapped[scan.astype(int)]).resize((32, 32), Image.Resampling.BILINEAR))
            key = (large.tobytes(), int(label))
            images[key] = images.get(key, 0) + 1
        for split in (digits.train, digits.validation, digits.test):  # together: every scan once, and nothing else
            for image, label in zip(split.images, split.labels, strict=True):
                images[image.numpy().tobytes(), int(label)] -= 1
        assert set(images.values()) == {0}

    def test_a_batch_is_floats_from_0_to_1(self, digits: Dataset) -> None:
        index = torch.tensor([5, 2, 7])
        x, y = digits.train.batch(index)
        assert x.dtype == torch.float32
        assert torch.equal(x, torch.stack([digits.train.images[i].float() / 255 for i in (5, 2, 7)]))
        assert torch.equal(y, digits.train.labels[index])
        assert x.min() == 0
        assert x.max() <= 1
        assert digits.train.images.dtype == torch.uint8  # the resident tensor is not the one that was divided

    def test_the_test_part_does_not_depend_on_the_validation_split(self, digits: Dataset) -> None:
        other = data.load("digits", validation=0.3, split_seed=9)
        assert torch.equal(other.test.images, digits.test.images)
        assert len(other.validation) == pytest.approx(0.3 * 1437, abs=1)


class TestStratifiedSplit:
    labels = torch.arange(10).repeat(50)[torch.randperm(500, generator=torch.Generator().manual_seed(3))]

    def test_equal_share_of_each_class_and_no_overlap(self) -> None:
        keep, held = data.stratified_split(self.labels, 0.1, seed=0)
        assert sorted([*keep.tolist(), *held.tolist()]) == list(range(500))
        assert self.labels[held].bincount().tolist() == [5] * 10
        assert self.labels[keep].bincount().tolist() == [45] * 10

    def test_the_seed_alone_decides(self) -> None:
        first = data.stratified_split(self.labels, 0.1, seed=4)[1]
        torch.manual_seed(123)
        np.random.default_rng(5).random()
        assert torch.equal(data.stratified_split(self.labels, 0.1, seed=4)[1], first)
        assert not torch.equal(data.stratified_split(self.labels, 0.1, seed=5)[1], first)

    def test_the_draw_is_not_the_first_images(self) -> None:
        held = data.stratified_split(self.labels, 0.1, seed=0)[1]
        assert int(held.max()) > 400

    def test_too_few_images_is_one_sentence(self) -> None:
        with pytest.raises(KitError, match="share of 0.1"):
            data.stratified_split(torch.arange(10), 0.1, seed=0)


class TestNames:
    def test_unknown_data_set(self) -> None:
        with pytest.raises(KitError, match=r"'mnist' is unknown: use one of fashion_mnist, digits"):
            data.load("mnist")

    @pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, float("nan")])
    def test_bad_share(self, share: float) -> None:
        with pytest.raises(KitError, match="validation = "):
            data.load("digits", validation=share)

    def test_unknown_or_absent_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert data.pick_device("auto") == torch.device("cpu")
        with pytest.raises(KitError, match="'tpu' is unknown"):
            data.pick_device("tpu")
        with pytest.raises(KitError, match="no usable CUDA"):
            data.pick_device("cuda")


class TestRoot:
    def test_default_is_the_projects(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for value in (None, ""):
            monkeypatch.setenv("FRLKIT_DATA", "") if value == "" else monkeypatch.delenv("FRLKIT_DATA", raising=False)
            assert data.root() == PROJECT / "data"

    def test_relative_to_the_working_directory_else_to_the_project(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("FRLKIT_DATA", "some/where")
        assert data.root() == PROJECT / "some" / "where"
        (tmp_path / "some" / "where").mkdir(parents=True)
        assert data.root().resolve() == (tmp_path / "some" / "where").resolve()

    def test_absolute_and_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FRLKIT_DATA", str(tmp_path))
        assert data.root() == tmp_path
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("FRLKIT_DATA", "~/images")
        assert data.root() == tmp_path / "images"

"""Data sets: pixels against torchvision, splits by counting, and files that are damaged or not there."""

from __future__ import annotations

import shutil
import urllib.error
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision.transforms import Resize

from frlkit import PROJECT, KitError, data
from frlkit.data import Dataset
from frlkit.sources import datasets
from frlkit.sources.folders import Source, of_arrays


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
    @pytest.mark.parametrize(("name", "folder"), [("fashion_mnist", "FashionMNIST"), ("mnist", "MNIST")])
    def test_small_files_are_not_the_original(self, no_fashion: Path, name: str, folder: str) -> None:
        fake_fashion(no_fashion)
        (no_fashion / "FashionMNIST").rename(no_fashion / folder)
        with pytest.raises(KitError, match=f"^{folder} in .* is not the original .60000 images.: delete {folder}/raw"):
            data.load(name)

    def test_mnist(self, no_fashion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two images a digit in place of MNIST's 70,000, which are not at hand."""
        fake_fashion(no_fashion)
        (no_fashion / "FashionMNIST").rename(no_fashion / "MNIST")
        reader = datasets.READERS["mnist"]
        assert [sum(counts) for counts in reader.args[2]] == [60_000, 10_000]
        counts = ([2] * 10, [2] * 10)
        monkeypatch.setitem(datasets.READERS, "mnist", partial(datasets._idx, *reader.args[:2], counts))
        found = data.load("mnist")
        assert found.class_names == tuple("0123456789")
        assert found.class_counts == {"train": [1] * 10, "validation": [1] * 10, "test": [2] * 10}
        assert found.train.images.shape == (10, 1, 32, 32)

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
        other = data.load("digits", validation=0.3)
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
        with pytest.raises(KitError, match="class 1 has one image alone"):
            data.stratified_split(torch.tensor([0, 0, 0, 1]), 0.1, seed=0)

    def test_balanced_labels_are_drawn_as_scikit_learn_draws_them(self) -> None:
        """The shipped runs were made with its split."""
        _, expected = train_test_split(np.arange(500), test_size=0.1, random_state=7, stratify=self.labels.numpy())
        assert data.stratified_split(self.labels, 0.1, seed=7)[1].tolist() == sorted(expected)

    @given(
        st.lists(st.lists(st.integers(1, 5), min_size=2, max_size=8), min_size=1, max_size=6),
        st.floats(0.01, 0.99),
        st.integers(0, 2**32 - 1),
        st.booleans(),
    )
    def test_any_classes(self, tracks: list[list[int]], share: float, seed: int, grouped: bool) -> None:
        """Classes of tracks of so many frames, in any order: every image on one side, every class on both."""
        rows = [(c, 100 * c + t) for c, sizes in enumerate(tracks) for t, size in enumerate(sizes) for _ in range(size)]
        np.random.default_rng(seed).shuffle(rows)
        labels, groups = torch.tensor(rows).T
        keep, held = data.stratified_split(labels, share, seed, groups if grouped else None)
        assert sorted([*keep.tolist(), *held.tolist()]) == list(range(len(rows)))
        assert keep.tolist() == sorted(keep.tolist())
        for label, sizes in enumerate(tracks):
            units = len(sizes) if grouped else sum(sizes)
            chosen = groups[held][labels[held] == label]
            found = len(set(chosen.tolist())) if grouped else len(chosen)
            assert found == min(max(1, round(share * units)), units - 1)
        if grouped:
            assert not set(groups[keep].tolist()) & set(groups[held].tolist())


class TestEveryClass:
    """A class without an image in a split is refused when the data are loaded."""

    @pytest.fixture
    def reader(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int], list[int]], Dataset]:
        def load(train: list[int], test: list[int]) -> Dataset:
            splits = []
            for counts in (train, test):
                labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
                splits.append(of_arrays("x", np.zeros((len(labels), 32, 32), np.uint8), labels))
            names = ("ant", "bee", "cat")[: len(train)]
            source = Source(names, dict(zip(("train", "test"), splits, strict=True)), form=(32, 1), keep=False)
            monkeypatch.setitem(data.READERS, "svhn", lambda: source)
            return data.load("svhn")

        return load

    @pytest.mark.parametrize("counts", [[23, 3], [60, 60, 3], [43, 2, 4], [5, 5, 5]])
    def test_small_classes_are_in_all_three(self, reader: Any, counts: list[int]) -> None:
        found = reader(counts, [1] * len(counts))
        expected = [max(1, round(0.1 * count)) for count in counts]
        assert found.class_counts["validation"] == expected
        assert found.class_counts["train"] == [a - b for a, b in zip(counts, expected, strict=True)]
        assert {split.classes for split in found.splits.values()} == {len(counts)}

    @pytest.mark.parametrize(
        ("train", "test", "message"),
        [
            ([5, 1, 5], [1, 1, 1], "class 'bee' has 1 training image, and needs 2 or more: add images"),
            ([5, 5, 0], [1, 1, 1], "class 'cat' has 0 training images"),
            ([5, 5, 5], [1, 1, 0], "class 'cat' has 0 test images, and needs 1 or more"),
        ],
    )
    def test_none_is_refused(self, reader: Any, train: list[int], test: list[int], message: str) -> None:
        with pytest.raises(KitError, match=message):
            reader(train, test)


class TestFingerprint:
    def test_anything_that_differs(self, tiny: Dataset) -> None:
        def changed(name: str, index: int, **what: Any) -> Dataset:
            split = getattr(tiny, name)
            images, labels = split.images.clone(), split.labels.clone()
            images[index, 0, 3, 4] ^= what.get("image", 0)
            labels[index] = (labels[index] + what.get("label", 0)) % 10
            return replace(tiny, **{name: replace(split, images=images, labels=labels)})

        others = [changed(name, -1, **what) for name in tiny.splits for what in ({"image": 1}, {"label": 1})]
        others += [replace(tiny, class_names=tiny.class_names[::-1])]
        others += [replace(tiny, train=tiny.train.take(torch.arange(len(tiny.train)).flip(0)))]
        prints = [found.fingerprint for found in (tiny, *others)]
        assert len(set(prints)) == len(prints)
        assert changed("test", 0).fingerprint == tiny.fingerprint
        assert replace(tiny, name="other").fingerprint == tiny.fingerprint  # a name differs from machine to machine

    def test_the_shipped_runs_images(self, digits: Dataset) -> None:
        assert digits.fingerprint == "7c4b5e9413d7642256df9d84d6890c4fa9c88db3f5b1a7fa2b0f25192df356d0"

    def test_the_shipped_runs_images_fashion(self, fashion_mnist: Dataset) -> None:
        assert fashion_mnist.fingerprint == "41ea3b853c620ff8f21ff2e451269ca1319785b7973d929108cd76a6d86bd88a"


class TestNames:
    def test_unknown_data_set(self) -> None:
        with pytest.raises(KitError, match=r"'emnist' is unknown: use one of fashion_mnist, mnist, digits"):
            data.load("emnist")

    @pytest.mark.parametrize("name", ["folder:", "folder: ", "photos", "cifar100", "folder:a\nb", "folder:a\u202eb", 3])
    def test_what_is_no_name(self, name: Any) -> None:
        for check in (data.check_name, data.load):
            with pytest.raises(KitError, match="dataset = ") as caught:
                check(name)
            assert len(str(caught.value).splitlines()) == 1

    @pytest.mark.parametrize("name", ["folder:~no such user/x", "folder:" + "x" * 300, "folder:a/" * 2000])
    def test_a_path_that_cannot_be(self, name: str) -> None:
        with pytest.raises(KitError) as caught:
            data.load(name)
        assert len(str(caught.value).splitlines()) == 1

    def test_a_data_folder_that_cannot_be(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FRLKIT_DATA", "~no such user/x")
        with pytest.raises(KitError, match="FRLKIT_DATA = '~no such user/x' cannot be looked for"):
            data.load("fashion_mnist")

    def test_another_size(self) -> None:
        """28x28 scans become 28x28, not 32x32 and back; labels and splits are the same."""
        found, usual = data.load("digits", size=28), data.load("digits")
        assert found.train.images.shape[1:] == (1, 28, 28)
        assert torch.equal(found.train.labels, usual.train.labels)

    @pytest.mark.parametrize("options", [{"channels": 1}, {"upright": True}])
    def test_options_of_a_folder_are_not_for_others(self, options: dict[str, Any]) -> None:
        with pytest.raises(KitError, match="are for folder:PATH: the images of digits are as they are"):
            data.load("digits", **options)

    @pytest.mark.parametrize(
        "options", [{"size": 7}, {"size": 1025}, {"size": 32.0}, {"size": True}, {"channels": 2}, {"channels": "3"}]
    )
    def test_bad_options(self, options: dict[str, Any]) -> None:
        with pytest.raises(KitError, match="use 8 to 1024 pixels and 1 or 3 channels, or None"):
            data.load("folder:x", **options)


class TestFolderName:
    def test_plain_names_stay_readable(self) -> None:
        assert data.folder_name("gtsrb17") == "gtsrb17"
        assert data.folder_name("folder:my-photos_2.1") == "folder-my-photos_2.1"
        assert (
            data.folder_name("folder:\u05ea\u05de\u05d5\u05e0\u05d5\u05ea")
            == "folder-\u05ea\u05de\u05d5\u05e0\u05d5\u05ea"
        )

    @given(st.lists(st.text("ab/-. $\"'<~\u05d0", min_size=1, max_size=8), min_size=2, max_size=6, unique=True))
    @example(["a/b", "a-b", "a b", "a//b", "a$b"])
    @example(["a/b", data.folder_name("folder:a/b").removeprefix("folder-")])
    @example(["x" * 300, "x" * 299])
    def test_different_names_have_different_folders(self, names: list[str]) -> None:
        folders = [data.folder_name(f"folder:{name}") for name in names]
        assert len(set(folders)) == len(names)
        for folder in folders:
            assert folder.startswith("folder-")
            assert not set(folder) & set("/\\:$\"'<> ~")
            assert len(folder.encode()) < 250

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

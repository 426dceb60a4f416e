"""The paper's data sets and folders of images: tiny copies in each real layout, read through torchvision."""

from __future__ import annotations

import csv
import hashlib
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image
from torchvision.transforms import RandomCrop

from frlkit import KitError, data
from frlkit.sources import datasets

GENERATOR = np.random.default_rng(0)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder and cache, without a network."""
    monkeypatch.setenv("FRLKIT_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no network here")

    for name in ("_urlretrieve", "_get_redirect_url"):  # what torchvision asks the network with
        monkeypatch.setattr(f"torchvision.datasets.utils.{name}", offline)
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def pixels(count: int, side: int = 32) -> np.ndarray:
    return GENERATOR.integers(256, size=(count, side, side, 3), dtype=np.uint8)


def md5(file: Path) -> str:
    return hashlib.md5(file.read_bytes()).hexdigest()


class TestCifar10:
    @pytest.fixture
    def images(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
        """Five training batches and a test batch of 20 images each, in the archive alone."""
        kind, images = torchvision.datasets.CIFAR10, {}
        base = root / kind.base_folder
        base.mkdir()
        labels = list(range(10)) * 2
        for name, _ in (*kind.train_list, *kind.test_list):
            images[name] = pixels(20)
            content = {"data": images[name].transpose(0, 3, 1, 2).reshape(20, -1), "labels": labels}
            (base / name).write_bytes(pickle.dumps(content))
        (base / "batches.meta").write_bytes(pickle.dumps({"label_names": list(datasets.CIFAR_CLASSES)}))
        for attribute in ("train_list", "test_list"):
            files = [[name, md5(base / name)] for name, _ in getattr(kind, attribute)]
            monkeypatch.setattr(kind, attribute, files)
        monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(base / "batches.meta")})
        with tarfile.open(root / kind.filename, "w:gz") as archive:
            archive.add(base, kind.base_folder)
        shutil.rmtree(base)
        monkeypatch.setattr(kind, "tgz_md5", md5(root / kind.filename))
        return images

    def test_an_archive_on_disk_is_enough(self, images: dict[str, np.ndarray]) -> None:
        found = data.load("cifar10")
        assert found.class_names[3] == "cat"
        assert (len(found.train), len(found.validation), len(found.test)) == (90, 10, 20)
        assert torch.equal(found.test.images, torch.from_numpy(images["test_batch"]).permute(0, 3, 1, 2))
        keep, _ = data.stratified_split(torch.arange(10).repeat(10), 0.1, 0)
        together = np.concatenate([images[f"data_batch_{number}"] for number in range(1, 6)])
        assert torch.equal(found.train.images, torch.from_numpy(together[keep.numpy()]).permute(0, 3, 1, 2))

    def test_absent_and_no_network(self, root: Path) -> None:
        with pytest.raises(
            data.DataUnavailableError, match="CIFAR10 is not complete in .*no network here.*FRLKIT_DATA"
        ):
            data.load("cifar10")


class TestSvhn:
    def test_unbalanced_and_ten_means_nought(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        kind = torchvision.datasets.SVHN
        counts = {"train": [50, 40, *[20] * 8], "test": [5, 4, *[2] * 8]}
        images, listed = {}, dict(kind.split_list)
        for part, numbers in counts.items():
            images[part] = pixels(sum(numbers))
            labels = np.repeat([10, *range(1, 10)], numbers)  # the file's own numbering
            file = root / f"{part}_32x32.mat"
            scipy.io.savemat(file, {"X": images[part].transpose(1, 2, 3, 0), "y": labels[:, None]})
            listed[part] = [*kind.split_list[part][:2], md5(file)]
        monkeypatch.setattr(kind, "split_list", listed)
        found = data.load("svhn")
        assert found.class_names == tuple("0123456789")
        assert found.test.labels.bincount().tolist() == counts["test"]
        assert torch.equal(found.test.images, torch.from_numpy(images["test"]).permute(0, 3, 1, 2))
        # A tenth of each class is set aside, not a tenth of all.
        assert found.validation.labels.bincount().tolist() == [5, 4, *[2] * 8]
        assert found.train.labels.bincount().tolist() == [45, 36, *[18] * 8]


class TestGtsrb:
    COUNTS = (*range(10, 40), *range(9, -4, -1))  # of training images: 30 classes with 10 to 39, the rest with fewer
    FRAMES = 2  # of a track

    @pytest.fixture
    def signs(self, root: Path) -> Path:
        base = root / "gtsrb"
        counts = [max(count, 3) for count in self.COUNTS]
        for label, count in enumerate(counts):
            folder = base / "GTSRB" / "Training" / f"{label:05}"
            folder.mkdir(parents=True)
            for number in range(count):
                colour = (6 * label % 256, number, 100)
                track, frame = divmod(number, self.FRAMES)
                Image.new("RGB", (20 + number % 3, 25), colour).save(folder / f"{track:05}_{frame:05}.ppm")
        test = base / "GTSRB" / "Final_Test" / "Images"
        test.mkdir(parents=True)
        with (base / "GT-final_test.csv").open("w", newline="") as file:
            rows = csv.writer(file, delimiter=";")
            rows.writerow(["Filename", "Width", "Height", "Roi.X1", "Roi.Y1", "Roi.X2", "Roi.Y2", "ClassId"])
            for label in range(43):
                Image.new("RGB", (30, 40), (6 * label % 256, 0, 50)).save(test / f"{label:05}.ppm")
                rows.writerow([f"{label:05}.ppm", 30, 40, 0, 0, 30, 40, label])
        return base

    def test_all_classes(self, signs: Path) -> None:
        found = data.load("gtsrb", validation=0.3)
        assert len(set(found.class_names)) == 43
        assert [found.class_names[label] for label in (0, 14, 17, 42)] == [
            *("Speed limit 20", "Stop", "No entry", "End of no passing over 3.5 t")
        ]
        assert found.test.images.shape == (43, 3, 32, 32)
        assert found.test.images[:, 0, 0, 0].tolist() == [6 * label % 256 for label in found.test.labels.tolist()]
        assert all(6 * y % 256 == x for x, y in zip(found.train.images[:, 0, 5, 5], found.train.labels, strict=True))

    def test_the_17_classes_with_the_most_training_images(self, signs: Path) -> None:
        found = data.load("gtsrb17")
        assert found.class_names == tuple(datasets.SIGNS[label] for label in range(29, 12, -1))
        assert found.test.labels.tolist() == sorted(range(17), reverse=True)
        for split in (found.train, found.validation, found.test):
            labels = [29 - label for label in split.labels.tolist()]
            assert split.images[:, 0, 9, 9].tolist() == [6 * label % 256 for label in labels]

    @pytest.mark.parametrize("name", ["gtsrb", "gtsrb17"])
    @pytest.mark.parametrize("share", [0.1, 0.5])
    def test_a_track_is_on_one_side_and_every_class_has_one(self, signs: Path, name: str, share: float) -> None:
        found = data.load(name, validation=share)
        tracks = []
        for split in (found.train, found.validation):  # green counts a class's frames, so half of it counts tracks
            pairs = zip(split.labels.tolist(), split.images[:, 1, 0, 0].tolist(), strict=True)
            tracks.append({(label, green // self.FRAMES) for label, green in pairs})
        assert not tracks[0] & tracks[1]
        for label in range(len(found.class_names)):
            kept, held = (sum(1 for track in side if track[0] == label) for side in tracks)
            assert held == min(max(1, round(share * (kept + held))), kept + held - 1)

    def test_a_class_of_one_track_is_refused(self, signs: Path) -> None:
        (signs / "GTSRB" / "Training" / "00042" / "00001_00000.ppm").unlink()
        with pytest.raises(KitError, match="class 42 has one group of images alone"):
            data.load("gtsrb")

    def test_half_unpacked(self, signs: Path) -> None:
        shutil.rmtree(signs / "GTSRB" / "Training" / "00042")
        with pytest.raises(KitError, match="GTSRB in .* is damaged .42 of 43 classes have images"):
            data.load("gtsrb")


class TestAugmented:
    def test_a_crop_is_torchvisions(self) -> None:
        """Every image is one of the 81 windows that RandomCrop(32, padding=4) may cut, or mirrors it; all turn up."""
        image = torch.from_numpy(pixels(1)).permute(0, 3, 1, 2).float().div(255)
        padded = RandomCrop(32, padding=4)
        assert padded.padding == data.PADDING
        around = torch.nn.functional.pad(image, (4,) * 4)
        windows = [around[0, :, i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
        windows += [window.flip(2) for window in windows]
        found = data.augmented(image.expand(3000, -1, -1, -1), torch.Generator().manual_seed(0))
        assert {one.numpy().tobytes() for one in found} == {window.numpy().tobytes() for window in windows}

    def test_half_of_the_images_are_mirrored(self) -> None:
        side = torch.zeros(1000, 3, 32, 32)
        side[..., :16] = 1  # left half white: no crop of four pixels hides which half it is
        found = data.augmented(side, torch.Generator().manual_seed(0))
        mirrored = found[..., 26].amax(1).amax(1) > found[..., 6].amax(1).amax(1)
        assert 440 < int(mirrored.sum()) < 560

    def test_seed_and_epoch_decide(self) -> None:
        images = torch.rand(5, 3, 32, 32)
        first, again, other = (data.augmented(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

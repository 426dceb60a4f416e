"""Anyone's images: folders, arrays and saved data sets as people have them, built here, against Pillow and numpy."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile
from torchvision.datasets import ImageFolder
from torchvision.transforms import Resize

from frlkit import KitError, data, recipes, runs
from frlkit.sources import images
from frlkit.sources.images import Item

GENERATOR = np.random.default_rng(0)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder, and an empty cache beside it."""
    monkeypatch.setenv("FRLKIT_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def pixels(*shape: int) -> np.ndarray:
    return GENERATOR.integers(256, size=shape, dtype=np.uint8)


def put(image: Image.Image | np.ndarray, file: Path, **options: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, **options)


def fill(folder: Path, classes: tuple[str, ...] = ("ant", "bee"), train: int = 4, test: int = 1, side: int = 9) -> Path:
    """A folder of small grey images, so many of each class in train/ and test/."""
    for part, count in (("train", train), ("test", test)):
        for name in classes:
            for number in range(count):
                put(pixels(side, side), folder / part / name / f"{number:02}.png")
    return folder


@pytest.fixture
def photos(root: Path) -> Path:
    """Three classes, unbalanced, of several kinds and sizes, one with transparency and one grey."""
    for part, counts in (("train", (30, 20, 10)), ("test", (4, 3, 2))):
        for name, count in zip(("ant", "bee", "cat"), counts, strict=True):
            for number in range(count):
                kind = ("png", "jpg", "bmp")[number % 3]
                mode = "L" if number == 1 else "RGBA" if number == 3 else "RGB"
                put(
                    Image.fromarray(pixels(40, 40, 3)).convert(mode),
                    root / "photos" / part / name / f"{number:02}.{kind}",
                )
    (root / "photos" / "train" / "ant" / "notes.txt").write_text("no image", encoding="utf-8")
    return root / "photos"


class TestFolder:
    def test_counts_names_and_pixels(self, photos: Path) -> None:
        found = data.load("folder:photos")
        assert found.class_names == ("ant", "bee", "cat")
        assert found.class_counts == {"train": [27, 18, 9], "validation": [3, 2, 1], "test": [4, 3, 2]}
        oracle = ImageFolder(str(photos / "test"), transform=Resize((32, 32)))
        for (image, label), ours, y in zip(oracle, found.test.images, found.test.labels, strict=True):
            assert np.array_equal(ours.permute(1, 2, 0).numpy(), np.asarray(image))
            assert y == label
        whole = ImageFolder(str(photos / "train"), transform=Resize((32, 32)))
        keep, held = data.stratified_split(torch.tensor(whole.targets), 0.1, 0)
        for split, index in ((found.train, keep), (found.validation, held)):
            for number, ours in zip(index.tolist(), split.images, strict=True):
                assert np.array_equal(ours.permute(1, 2, 0).numpy(), np.asarray(whole[number][0]))

    def test_what_was_done_is_said(self, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
        found = data.load("folder:photos")
        assert found.notes == (
            "skipped .txt files: 1 (in 'train/ant')",
            "4 images are transparent, which does not count",
            "images of 40x40 pixels become 32x32",
        )
        assert capsys.readouterr().err.splitlines() == [f"folder:photos: {note}" for note in found.notes]
        assert data.load("folder:photos", size=40).notes == found.notes[:2]
        assert data.load("folder:photos").notes == found.notes  # from the cache

    def test_second_start_decodes_no_image(self, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = data.load("folder:photos")
        monkeypatch.setattr(images, "_open", None)
        assert data.load("folder:photos").fingerprint == first.fingerprint

    def test_each_image_is_decoded_once(self, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        put(Image.fromarray(pixels(40, 40)).convert("P"), photos / "train" / "ant" / "palette.gif")
        decoded, prepare = [], ImageFile.ImageFile.load_prepare
        monkeypatch.setattr(ImageFile.ImageFile, "load_prepare", lambda self: (decoded.append(self), prepare(self))[1])
        data.load("folder:photos")
        assert len(decoded) == 70

    def test_changed_bytes_are_noticed_though_size_and_time_are_the_same(self, root: Path) -> None:
        fill(root / "grey")
        first = data.load("folder:grey", size=None, channels=None)
        file = root / "grey" / "test" / "ant" / "00.png"
        before = file.stat()
        put(Image.fromarray(first.test.images[0, 0].numpy() ^ 255), file)
        content = file.read_bytes()
        file.write_bytes(content + bytes(max(0, before.st_size - len(content))))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert file.stat().st_mtime_ns == before.st_mtime_ns
        second = data.load("folder:grey", size=None, channels=None)
        assert torch.equal(second.test.images[0], first.test.images[0] ^ 255)
        assert second.fingerprint != first.fingerprint

    def test_its_run_has_a_plain_folder_name(self, photos: Path) -> None:
        config = recipes.configure("pgd_at", "folder:photos", 3)
        assert runs.folder(Path("runs"), "pgd_at", config) == Path("runs/folder-photos/pgd_at/seed3")
        assert config.model == "cnn3"

    @pytest.mark.parametrize("part", ["val", "valid", "Validation"])
    def test_its_own_validation_images_are_used(self, root: Path, part: str) -> None:
        fill(root / "own", train=1)
        for name in ("ant", "bee"):
            put(np.full((9, 9), 77, np.uint8), root / "own" / part / name / "x.png")
        found = data.load("folder:own", size=9, channels=1)
        assert found.class_counts == {"train": [1, 1], "validation": [1, 1], "test": [1, 1]}
        assert found.validation.images.unique().tolist() == [77]
        assert found.with_validation(0.5) is found  # whatever share a recipe asks for

    def test_nested_folders_as_in_tiny_imagenet(self, root: Path) -> None:
        for number, name in enumerate(("n01", "n02")):
            for image in range(3):
                put(
                    np.full((8, 8), 10 * number + image, np.uint8),
                    root / "t" / "train" / name / "images" / f"{image}.PNG",
                )
            put(np.full((8, 8), 10 * number + 9, np.uint8), root / "t" / "test" / name / "a" / "b" / "x.png")
            (root / "t" / "train" / name / f"{name}_boxes.txt").write_text("boxes", encoding="utf-8")
        found = data.load("folder:t", size=8, channels=1)
        both = torch.cat([found.train.images, found.validation.images])[:, 0, 0, 0]
        assert sorted(both.tolist()) == [0, 1, 2, 10, 11, 12]
        assert found.test.images[:, 0, 0, 0].tolist() == [9, 19]
        assert found.notes == ("skipped .txt files: 2 (in 'train/n01', 'train/n02')",)

    @pytest.fixture
    def unlabelled(self, root: Path) -> Path:
        """Tiny ImageNet's archive in small: a table says the class of each of val's images, nothing that of test's."""
        rows, place = [], root / "tiny"
        for number in range(6):
            name = ("n02", "n01")[number % 2]
            put(np.full((8, 8), 10 + number, np.uint8), place / "train" / name / "images" / f"{name}_{number}.JPEG")
            put(np.full((8, 8), 20 + number, np.uint8), place / "val" / "images" / f"val_{number}.JPEG")
            put(np.full((8, 8), 30 + number, np.uint8), place / "test" / "images" / f"test_{number}.JPEG")
            rows.append(f"val_{number}.JPEG\t{name}\t0\t3\t7\t7\n")
        (place / "val" / "val_annotations.txt").write_text("".join(rows), encoding="utf-8")
        return place

    def test_tiny_imagenet_is_tested_on_its_validation_images(self, unlabelled: Path) -> None:
        found = data.load("folder:tiny", size=8, channels=1)
        assert found.class_counts == {"train": [2, 2], "validation": [1, 1], "test": [3, 3]}
        assert found.test.images[:, 0, 0, 0].tolist() == [21, 23, 25, 20, 22, 24]
        assert found.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert found.notes == ("skipped test images without labels (so val is the test): 6 (in 'test')",)

    def test_tables_of_classes_and_images_that_do_not_fit(self, unlabelled: Path) -> None:
        (unlabelled / "val" / "images" / "val_0.JPEG").unlink()
        found = data.load("folder:tiny")
        assert found.class_counts["test"] == [3, 2]
        assert "lines of images that are not there: 1 (in 'val')" in found.notes[0]
        put(pixels(8, 8), unlabelled / "val" / "images" / "more.JPEG")
        with pytest.raises(KitError, match="val_annotations.txt says no class of 'more.JPEG': add a line for each"):
            data.load("folder:tiny")

    def test_what_systems_leave_behind_is_no_image(self, root: Path) -> None:
        fill(root / "m")
        for name in ("__MACOSX/train/ant/._00.png", "train/.ipynb_checkpoints/00.png", "train/ant/._00.png"):
            put(pixels(9, 9), root / "m" / name)
        for name in ("train/ant/Thumbs.db", "train/ant/.DS_Store", "test/desktop.ini"):
            (root / "m" / name).write_bytes(b"junk")
        (root / "m" / "README.md").write_text("words", encoding="utf-8")
        (root / "m" / "train" / "labels.csv").write_text("words", encoding="utf-8")
        (root / "m" / "train" / "bee" / "LICENSE").write_text("words", encoding="utf-8")
        (root / "m" / "train" / "bee" / "clip.mpg").write_bytes(b"film")
        put(pixels(9, 9), root / "m" / "extra" / "ant" / "00.png")
        found = data.load("folder:m", size=None)
        assert found.class_counts["train"] == [3, 3]
        (note,) = found.notes
        assert note.startswith("skipped ")
        assert set(note.removeprefix("skipped ").split("; ")) == {
            "folders: 1 (in '.')",
            ".md files: 1 (in '.')",
            ".csv files: 1 (in 'train')",
            "files without extension: 1 (in 'train/bee')",
            ".mpg files: 1 (in 'train/bee')",
            "hidden or system entries: 6 (in '.', 'test', 'train' and 1 more)",
        }

    def test_a_link_that_leads_back_is_no_endless_walk(self, root: Path) -> None:
        fill(root / "loop")
        for number, target in enumerate(("train/ant", "train", ".")):
            (root / "loop" / "train" / "ant" / "deep").mkdir(exist_ok=True)
            (root / "loop" / "train" / "ant" / "deep" / f"{number}").symlink_to(root / "loop" / target)
        found = data.load("folder:loop", size=None)
        assert found.class_counts["train"] == [3, 3]
        assert found.notes == ("skipped links to a folder above: 3 (in 'train/ant/deep')",)

    def test_links_to_images_elsewhere_are_followed(self, root: Path) -> None:
        fill(root / "real")
        (root / "link" / "train" / "ant").mkdir(parents=True)
        (root / "link" / "train" / "ant" / "inner").symlink_to(root / "real" / "train" / "ant")
        (root / "link" / "train" / "bee").symlink_to(root / "real" / "train" / "bee")
        (root / "link" / "test").symlink_to(root / "real" / "test")
        real, link = (data.load(f"folder:{name}", size=9, channels=1) for name in ("real", "link"))
        assert real.fingerprint == link.fingerprint
        assert link.notes == ()

    def test_train_and_val_alone(self, root: Path) -> None:
        (fill(root / "tv") / "test").rename(root / "tv" / "val")
        with pytest.raises(KitError, match="no images to test: use .*rename val to test"):
            data.load("folder:tv")

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (shutil.rmtree, "there is no folder"),
            (lambda f: shutil.rmtree(f / "test" / "bee"), "classes 'bee' only to train: use the same names"),
            (lambda f: shutil.rmtree(f / "train"), "no images to train: use train/<class>/"),
            (
                lambda f: (f / "test" / "cat").rename(f / "test" / "Cat"),
                "'cat' only to train and 'Cat' only to test .*capit",
            ),
            (
                lambda f: [
                    (f / part / "cat").rename(f / part / name)
                    for part, name in (("train", "n\xe9e"), ("test", "ne\u0301e"))
                ],
                "same but for capitals or accents' coding",
            ),
            (lambda f: [file.unlink() for file in (f / "test" / "cat").iterdir()], "no image to test in 'cat': add"),
            (
                lambda f: [file.rename(file.with_suffix(".npy")) for file in [*(f / "test" / "cat").iterdir()]],
                r"no image to test in 'cat', but \.npy files: add",
            ),
            (
                lambda f: [shutil.rmtree(f / part / name) for part in ("train", "test") for name in ("ant", "bee")],
                "1 classes",
            ),
            (lambda f: shutil.copytree(f / "test", f / "testing"), "images to test twice"),
            (
                lambda f: [file.unlink() for file in sorted((f / "train" / "cat").iterdir())[1:]],
                "'cat' has 1 training image,",
            ),
            (
                lambda f: [(f / part / "cat").rename(f / part / "a\nb") for part in ("train", "test")],
                "a class 'a.*nb' that no",
            ),
            (
                lambda f: [(f / part / "cat").rename(f / part / " ") for part in ("train", "test")],
                "a class ' ' that no table",
            ),
        ],
        ids=[
            *("absent", "one class less", "no train", "capitals", "accents", "empty class", "no image", "one class"),
            *("two tests", "one image", "newline", "space"),
        ],
    )
    def test_what_is_wrong_is_said(self, photos: Path, spoil: Any, message: str) -> None:
        spoil(photos)
        with pytest.raises(KitError, match=message) as caught:
            data.load("folder:photos")
        assert len(str(caught.value).splitlines()) == 1

    def test_all_unreadable_files_at_once(self, photos: Path) -> None:
        whole = (photos / "test" / "cat" / "01.jpg").read_bytes()
        (photos / "test" / "cat" / "01.jpg").write_bytes(whole[: len(whole) // 2])
        (photos / "test" / "cat" / "00.png").write_bytes(b"junk")
        (photos / "train" / "ant" / "07.jpg").write_bytes(b"")
        (photos / "train" / "bee" / "08.bmp").unlink()
        (photos / "train" / "bee" / "08.bmp").symlink_to("nowhere")
        with pytest.raises(KitError) as caught:
            data.load("folder:photos")
        message = str(caught.value)
        assert message.startswith("4 images cannot be read: ")
        for name in ("cat/01.jpg (", "cat/00.png (no image)", "ant/07.jpg (it is empty)", "bee/08.bmp ([Errno 2]"):
            assert message.count(name) == 1
        assert len(message.splitlines()) == 1

    @pytest.mark.parametrize(
        "name",
        [
            "$x_1$",
            "a'b\"c",
            "\u05db\u05dc\u05d1",
            "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
            "100%",
            "<b>&amp;",
            "-",
            "a,b|c",
        ],
    )
    def test_odd_class_names_are_kept(self, root: Path, name: str) -> None:
        fill(root / "odd", classes=("ant", name))
        assert set(data.load("folder:odd").class_names) == {"ant", name}

    def test_every_extension_that_pillow_writes_and_reads_without_loss(self, root: Path) -> None:
        image = pixels(9, 9)
        kinds = (
            ".apng",
            ".bmp",
            ".dib",
            ".gif",
            ".j2k",
            ".jp2",
            ".msp",
            ".pcx",
            ".pgm",
            ".pnm",
            ".png",
            ".sgi",
            ".tga",
            ".tif",
        )
        for kind in kinds:
            for name in ("ant", "bee"):
                source = Image.fromarray(image).convert("1") if kind == ".msp" else Image.fromarray(image)
                put(source, root / "kinds" / "train" / name / f"x{kind.upper()}")
                put(source, root / "kinds" / "test" / name / f"x{kind}")
        found = data.load("folder:kinds", size=None)
        assert found.class_counts["test"] == [len(kinds)] * 2
        for index, kind in enumerate(kinds):
            if kind != ".msp":
                assert all(np.array_equal(channel, image) for channel in found.test.images[index].numpy()), kind

    def test_exif_orientation(self, root: Path) -> None:
        fill(root / "phone", side=12)
        image = pixels(12, 12, 3)
        exif = Image.Exif()
        exif[274] = 6  # turn clockwise to see it upright
        put(image, root / "phone" / "test" / "bee" / "x.png", exif=exif)
        as_it_is = data.load("folder:phone", size=12)
        assert np.array_equal(as_it_is.test.images[-1].permute(1, 2, 0).numpy(), image)
        assert as_it_is.notes == ("1 image is turned in their EXIF data (upright=True turns them)",)
        turned = data.load("folder:phone", size=12, upright=True)
        assert np.array_equal(turned.test.images[-1].permute(1, 2, 0).numpy(), np.rot90(image, -1))
        assert turned.notes == ()


class TestSizeAndColour:
    def test_the_smallest_common_side_up_to_224(self, root: Path) -> None:
        fill(root / "sizes", side=30)
        put(pixels(50, 21), root / "sizes" / "train" / "ant" / "small.png")
        put(pixels(300, 500, 3), root / "sizes" / "test" / "ant" / "large.png")
        found = data.load("folder:sizes", size=None, channels=None)
        assert found.test.images.shape == (3, 3, 21, 21)
        assert found.notes == ("images of 21x50 to 500x300 pixels become 21x21",)
        assert data.load("folder:sizes", size=64).test.images.shape[1:] == (3, 64, 64)
        assert data.load("folder:sizes").test.images.shape[1:] == (3, 32, 32)  # as the kit's own networks take them

    def test_large_ones_become_224(self, root: Path) -> None:
        fill(root / "large", side=230, train=2)
        assert data.load("folder:large", size=None, channels=None).train.images.shape == (2, 1, 224, 224)

    def test_grey_stays_grey_and_colour_is_said_to_be_lost(self, root: Path) -> None:
        fill(root / "grey")
        assert data.load("folder:grey", channels=None).train.images.shape[1] == 1
        assert data.load("folder:grey").train.images.shape[1] == 3
        image = pixels(9, 9, 3)
        put(image, root / "grey" / "test" / "bee" / "x.png")
        assert data.load("folder:grey", channels=None).train.images.shape[1] == 3
        found = data.load("folder:grey", size=9, channels=1)
        assert np.array_equal(found.test.images[-1, 0].numpy(), np.asarray(Image.fromarray(image).convert("L")))
        assert found.notes == ("colour images become grey",)


def decoded(arrays: list[np.ndarray]) -> np.ndarray:
    """Arrays through `images.read`, not resized."""
    items = [Item(str(number), array.copy) for number, array in enumerate(arrays)]
    return images.read(items, size=arrays[0].shape[0], channels=1, keep=False)[0].numpy()[:, 0]


class TestDeepImages:
    """16 bits and floats: by the range that their kind can have, never clipped."""

    @pytest.mark.parametrize(
        ("kind", "low", "high", "black", "white"),
        [
            (np.uint16, 0, 65535, 0, 65535),
            (np.uint16, 5, 4000, 0, 4095),
            (np.uint16, 0, 250, 0, 255),
            (np.int64, 0, 1, 0, 1),
            (np.int16, -1000, 3000, -1000, 3000),  # Hounsfield units
            (np.uint32, 0, 2**32 - 1, 0, 2**32 - 1),
            (np.float32, 0.1, 0.9, 0, 1),
            (np.float64, -0.9, 0.8, -1, 1),
            (np.float32, 0.0, 254.0, 0, 255),
            (np.float32, -3.0, 900.0, -3, 900),
            (np.float32, 300.0, 300.0, 300, 301),
        ],
    )
    def test_ranges(self, kind: Any, low: float, high: float, black: float, white: float) -> None:
        arrays = [np.linspace(low, high, 64).reshape(8, 8).astype(kind) for _ in range(2)]
        arrays[1] = arrays[1][::-1]
        expected = (np.stack(arrays).astype(float) - black) / (white - black) * 255
        assert np.abs(decoded(arrays).astype(float) - expected).max() <= 0.5 + 1e-6

    @pytest.mark.parametrize(
        ("suffix", "kind"), [("png", np.uint16), ("tif", np.uint16), ("tif", np.int32), ("tif", np.float32)]
    )
    def test_files(self, root: Path, suffix: str, kind: Any) -> None:
        """One range for all parts: a dark image stays darker than a bright one."""
        top = {np.uint16: 40_000, np.int32: 40_000, np.float32: 1.0}[kind]
        for part, share in (("train", 0.25), ("test", 1.0)):
            for name in ("ant", "bee"):
                for number in range(2):
                    put(np.full((8, 8), top * share, kind), root / "deep" / part / name / f"{number}.{suffix}")
        found = data.load("folder:deep", size=8, channels=None)
        white = 1.0 if kind == np.float32 else 65535
        for split, share in ((found.train, 0.25), (found.test, 1.0)):
            assert split.images.unique().tolist() == [round(255 * top * share / white)]
        count = "8 images are of more than 8 bits, scaled by their range"
        assert found.notes == (count, f"values from 0 to {white:g} become 0 to 255")

    def test_nan_is_unreadable(self) -> None:
        with pytest.raises(KitError, match=r"1 image cannot be read: 1 \(it holds NaN or infinity\)"):
            decoded([np.zeros((8, 8)), np.full((8, 8), np.nan)])

    @given(st.lists(st.lists(st.integers(0, 65535), min_size=4, max_size=4), min_size=1, max_size=4))
    def test_order_is_kept(self, values: list[list[int]]) -> None:
        arrays = [np.array(value, np.uint16).reshape(2, 2) for value in values]
        together, ours = np.stack(arrays).ravel(), decoded(arrays).ravel().astype(int)
        order = together.argsort()
        assert (np.diff(ours[order]) >= 0).all()
        assert ours.max() == 255 or together.max() < 65535
        assert ours.max() >= 127 or together.max() == 0


class TestArrays:
    @pytest.mark.parametrize("keys", [("x_{}", "y_{}"), ("{}_images", "{}_labels"), ("X_{}", "Y_{}")])
    def test_npz(self, root: Path, keys: tuple[str, str]) -> None:
        x, y = pixels(10, 12, 12, 3), np.array([[7], [3]] * 5)
        arrays = {}
        for part, chosen in (("train", slice(6)), ("val", slice(6, 8)), ("test", slice(8, 10))):
            arrays |= {keys[0].format(part): x[chosen], keys[1].format(part): y[chosen]}
        np.savez(root / "a.npz", **arrays, extra=np.zeros(3))
        found = data.load("folder:a.npz", size=None, channels=None)
        assert found.class_names == ("3", "7")
        assert [split.labels.tolist() for split in found.splits.values()] == [[1, 0] * 3, [1, 0], [1, 0]]
        together = torch.cat([split.images for split in found.splits.values()])
        assert np.array_equal(together.permute(0, 2, 3, 1).numpy(), x)
        assert found.notes == ("skipped the arrays 'extra'",)

    @pytest.mark.parametrize("layout", ["first", "last", "none"])
    def test_channels(self, root: Path, layout: str) -> None:
        grey = pixels(6, 9, 9)
        x = {"first": grey[:, None].repeat(3, 1), "last": grey[..., None].repeat(3, 3), "none": grey}[layout]
        np.savez(root / "a.npz", x_train=x, y_train=[0, 1] * 3, x_test=x, y_test=[1, 0] * 3, class_names=["ant", "bee"])
        found = data.load("folder:a.npz", size=9)
        assert found.class_names == ("ant", "bee")
        assert all(np.array_equal(found.test.images[:, channel].numpy(), grey) for channel in range(3))

    @pytest.mark.parametrize("kind", [bool, np.uint8, np.int64, np.float32])
    def test_zeros_and_ones_are_black_and_white(self, root: Path, kind: Any) -> None:
        x = (pixels(6, 9, 9) > 127).astype(kind)
        np.savez(root / "a.npz", x_train=x, y_train=[0, 1] * 3, x_test=x, y_test=[0, 1] * 3)
        found = data.load("folder:a.npz", size=None, channels=None).test.images
        assert np.array_equal(found[:, 0].numpy(), 255 * x.astype(np.uint8))

    @pytest.mark.parametrize("kind", [np.uint8, np.float32])
    @pytest.mark.parametrize("channels", [1, 3, 4])
    def test_channels_first_are_channels_last(self, root: Path, channels: int, kind: Any) -> None:
        x, found = pixels(6, 9, 11, channels).astype(kind), []
        for name, laid in (("last", x), ("first", x.transpose(0, 3, 1, 2))):
            np.savez(root / f"{name}.npz", x_train=laid, y_train=[0, 1] * 3, x_test=laid, y_test=[0, 1] * 3)
            found.append(data.load(f"folder:{name}.npz", size=None, channels=None).test.images)
        assert torch.equal(*found)
        assert found[0].shape == (6, 1 if channels == 1 else 3, 9, 9)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"x_train": pixels(6, 9, 9, 2)}, r"x_train \(6, 9, 9, 2\) .* 1, 3 or 4 channels"),
            ({"y_train": np.eye(2)[[0, 1] * 3]}, r"12 labels do not fit: .* \(not one-hot\)"),
            ({"y_train": [0, 1]}, "x_train .6, 9, 9. and its 2 labels do not fit"),
            ({"y_test": [0, 1, 2] * 2}, "none that training has not"),
            ({"x_train": np.zeros((6, 81))}, "do not fit"),
            ({"class_names": ["ant", "ant"]}, "class 'ant' that no table can show"),
            ({"class_names": ["ant hill", "ant\u00a0 hill"]}, "class 'ant hill' that no table can show"),
            ({"class_names": ["é", "e\u0301"]}, "class 'é' that no table can show"),
            ({"class_names": ["ant", "\u200b"]}, "that no table can show"),
            ({"x_train": np.array([{}] * 6)}, "a.npz cannot be read .Object arrays"),
            ({"x_train": None}, "no images to train among its arrays .*y_train.*: use arrays x_train, y_train"),
            ({"x_test": None}, "no images to test: use arrays x_train, y_train"),
            (
                {"x_val": pixels(2, 9, 9), "y_val": [0, 1], "x_valid": pixels(2, 9, 9), "y_valid": [0, 1]},
                "validation twice",
            ),
            (
                {"x_train": np.zeros((6, 9, 9), complex)},
                r"6 images cannot be read: x_train\[.*its pixels are complex128",
            ),
            ({"y_train": [0] * 6, "y_test": [0] * 6}, "1 classes"),
        ],
    )
    def test_what_is_wrong_is_said(self, root: Path, change: dict[str, Any], message: str) -> None:
        arrays = {"x_train": pixels(6, 9, 9), "y_train": [0, 1] * 3, "x_test": pixels(6, 9, 9), "y_test": [0, 1] * 3}
        np.savez(root / "a.npz", **{key: value for key, value in (arrays | change).items() if value is not None})
        with pytest.raises(KitError, match=message):
            data.load("folder:a.npz")

    def test_a_damaged_file(self, root: Path) -> None:
        (root / "a.npz").write_bytes(b"PK junk")
        with pytest.raises(KitError, match="a.npz cannot be read"):
            data.load("folder:a.npz")


def save_arrow(place: Path, names: list[str], **labels: list[int]) -> np.ndarray:
    """What ``datasets.DatasetDict.save_to_disk`` writes, two files a split; returns the images."""
    place.mkdir(parents=True)
    (place / "dataset_dict.json").write_text(json.dumps({"splits": list(labels)}), encoding="utf-8")
    made = []
    for split, values in labels.items():
        cells = []
        for _ in values:
            made.append(pixels(10, 10))
            put(made[-1], place / "draft.png")
            cells.append({"bytes": (place / "draft.png").read_bytes(), "path": "x.png"})
        (place / split).mkdir()
        files = [f"data-0000{number}-of-00002.arrow" for number in range(2)]
        for file, part in zip(files, (slice(1), slice(1, None)), strict=True):
            table = pa.table({"image": cells[part], "label": pa.array(values[part], pa.int64())})
            with pa.OSFile(str(place / split / file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        (place / split / "dataset_info.json").write_text(json.dumps({"features": features}), encoding="utf-8")
        state = {"_data_files": [{"filename": file} for file in files], "_split": split}
        (place / split / "state.json").write_text(json.dumps(state), encoding="utf-8")
    (place / "draft.png").unlink()
    return np.stack(made)


class TestArrow:
    def test_a_saved_data_set(self, root: Path) -> None:
        made = save_arrow(
            root / "hf", ["zebra", "ant"], train=[0, 1] * 3, validation=[1, 0], test=[1, 1, 0], other=[0, 1]
        )
        found = data.load("folder:hf", size=None, channels=None)
        assert found.class_names == ("zebra", "ant")
        assert [split.labels.tolist() for split in found.splits.values()] == [[0, 1] * 3, [1, 0], [1, 1, 0]]
        together = torch.cat([split.images for split in found.splits.values()])
        assert np.array_equal(together[:, 0].numpy(), made[:11])
        assert found.notes == ("skipped the split 'other'",)

    def test_what_is_wrong_is_said(self, root: Path) -> None:
        save_arrow(root / "unlabelled", ["ant", "bee"], train=[0, 1] * 3, test=[-1, -1])
        with pytest.raises(KitError, match="labels -1 in 'test', of 2 classes"):
            data.load("folder:unlabelled")
        save_arrow(root / "hf", ["ant", "bee"], train=[0, 1] * 3, test=[0, 1])
        info = root / "hf" / "test" / "dataset_info.json"
        whole = info.read_text(encoding="utf-8")
        info.write_text(whole.replace("bee", "Bee"), encoding="utf-8")
        with pytest.raises(KitError, match="'bee' only to train and 'Bee' only to test"):
            data.load("folder:hf")
        info.write_text(whole.replace('"ant", "bee"', '"bee", "ant"'), encoding="utf-8")
        with pytest.raises(KitError, match="numbers its classes differently in 'test'"):
            data.load("folder:hf")
        info.write_text(whole.replace("ClassLabel", "Value"), encoding="utf-8")
        with pytest.raises(KitError, match="needs one column of images and one of class labels"):
            data.load("folder:hf")
        info.write_text(
            whole.replace('"label": {', '"fine": {"names": ["x"], "_type": "ClassLabel"}, "label": {'), "utf-8"
        )
        with pytest.raises(
            KitError, match=r"'fine', 'label' of ClassLabel in 'test': .*remove_columns leaves others out"
        ):
            data.load("folder:hf")
        info.write_text("[]", encoding="utf-8")
        with pytest.raises(KitError, match="hf cannot be read"):
            data.load("folder:hf")
        info.write_text(whole, encoding="utf-8")
        file = next((root / "hf" / "test").glob("*.arrow"))
        file.write_bytes(file.read_bytes()[:100])
        with pytest.raises(KitError, match="hf cannot be read"):
            data.load("folder:hf")

    def test_a_feature_that_is_a_list(self, root: Path) -> None:
        """Such as `datasets` writes a list of images."""
        save_arrow(root / "hf", ["ant", "bee"], train=[0, 1] * 3, test=[0, 1])
        info = root / "hf" / "test" / "dataset_info.json"
        info.write_text(info.read_text("utf-8").replace('{"_type": "Image"}', '[{"_type": "Image"}]'), "utf-8")
        with pytest.raises(KitError, match="has the columns none of Image and 'label' of ClassLabel"):
            data.load("folder:hf")

    @pytest.mark.parametrize("file", ["state.json", "data/train-00000-of-00001.parquet"])
    def test_one_split_or_files_as_the_hub_has_them(self, root: Path, file: str) -> None:
        (root / "hf" / file).parent.mkdir(parents=True)
        (root / "hf" / file).write_text("{}", encoding="utf-8")
        with pytest.raises(KitError, match="what save_to_disk of a DatasetDict with train and test wrote"):
            data.load("folder:hf")

    def test_without_pyarrow(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        save_arrow(root / "hf", ["ant", "bee"], train=[0, 1] * 3, test=[0, 1])
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(KitError, match="pip install pyarrow"):
            data.load("folder:hf")


class TestCache:
    @pytest.fixture
    def cache(self, root: Path) -> Path:
        return root.parent / "cache" / "frlkit"

    @pytest.fixture
    def five(self) -> list[np.ndarray]:
        return list(np.random.default_rng(3).integers(256, size=(5, 28, 28), dtype=np.uint8))

    def read(self, arrays: list[np.ndarray]) -> torch.Tensor:
        return images.read([Item("", array.copy) for array in arrays], size=32, channels=1)[0]

    def expected(self, arrays: list[np.ndarray]) -> np.ndarray:
        return np.stack([np.asarray(Resize(32)(Image.fromarray(array))) for array in arrays])

    def test_second_call_reads_what_the_first_kept(
        self, cache: Path, five: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = self.read(five)
        assert np.array_equal(first[:, 0].numpy(), self.expected(five))
        assert [path.suffix for path in cache.iterdir()] == [".npy"]
        monkeypatch.setattr(images, "_open", None)
        assert torch.equal(self.read(five), first)

    def test_other_pixels_never_get_these(self, cache: Path, five: list[np.ndarray]) -> None:
        first = self.read(five)
        five[0][14, 14] ^= 255
        second = self.read(five)
        assert not torch.equal(first, second)
        assert np.array_equal(second[:, 0].numpy(), self.expected(five))
        assert len(list(cache.iterdir())) == 2

    def test_what_is_changed_in_memory_never_reaches_the_file(self, cache: Path, five: list[np.ndarray]) -> None:
        self.read(five).zero_()
        assert np.array_equal(self.read(five)[:, 0].numpy(), self.expected(five))

    @pytest.mark.parametrize("damage", ["cut", "empty", "text", "one bit", "another array", "object"])
    def test_a_damaged_file_is_made_again(self, cache: Path, five: list[np.ndarray], damage: str) -> None:
        first = self.read(five).clone()
        (path,) = cache.iterdir()
        whole = path.read_bytes()
        if damage in ("another array", "object"):
            path.unlink()
            array = first[:3].numpy() if damage == "another array" else np.array([{}], dtype=object)
            np.save(path, array, allow_pickle=True)
        else:
            flipped = whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:]
            path.write_bytes({"cut": whole[:-500], "empty": b"", "text": b"no array", "one bit": flipped}[damage])
        assert torch.equal(self.read(five), first)
        assert path.read_bytes() == whole

    def test_a_folder_that_cannot_be_written_costs_a_warning(
        self, tmp_path: Path, five: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("in the way", encoding="utf-8")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        with pytest.warns(UserWarning, match="cannot be kept"):
            found = self.read(five)
        assert np.array_equal(found[:, 0].numpy(), self.expected(five))

    def test_a_write_that_fails_leaves_no_litter(
        self, cache: Path, five: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fsync(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.warns(UserWarning, match="cannot be kept"):
            self.read(five)
        assert list(cache.iterdir()) == []

    def test_a_relative_cache_folder_is_ignored(
        self, tmp_path: Path, five: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.chdir(tmp_path)
        self.read(five)
        assert not (tmp_path / "somewhere").exists()
        assert len(list((tmp_path / "home" / ".cache" / "frlkit").iterdir())) == 1


def test_views_of_one_mapped_file(root: Path) -> None:
    """Memory does not grow with the images: they are pages of a file, which the system may drop."""
    fill(root / "big", train=20)
    found = data.load("folder:big")
    (file,) = (root.parent / "cache" / "frlkit").iterdir()
    together = torch.cat([split.images for split in found.splits.values()])
    assert np.array_equal(np.load(file), together.numpy())
    start = found.train.images.untyped_storage().data_ptr()
    assert {split.images.untyped_storage().data_ptr() for split in found.splits.values()} == {start}

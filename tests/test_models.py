"""Networks against plain torch layers, and weights files from anyone."""

from __future__ import annotations

import pickle
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from frlkit import KitError, models
from frlkit.models import LeNet5


@pytest.fixture
def model() -> nn.Module:
    return models.build("lenet5", seed=0)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(7, 1, 32, 32, generator=torch.Generator().manual_seed(1))


def sequential() -> nn.Sequential:
    """LeNet-5 as a textbook writes it, with the third convolution a convolution."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Conv2d(16, 120, 5), nn.Tanh(), nn.Flatten()),
        *(nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10)),
    )


class TestLeNet5:
    def test_parameters_and_output(self, model: nn.Module, images: Tensor) -> None:
        assert sum(p.numel() for p in model.parameters()) == 61_706
        assert model(images).shape == (7, 10)
        assert models.build("lenet5", num_classes=3)(images).shape == (7, 3)

    @pytest.mark.parametrize("kernel", ["auto", "off"])
    def test_equals_plain_layers(
        self, model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch, kernel: str
    ) -> None:
        monkeypatch.setenv("FRLKIT_KERNEL", kernel)
        plain = sequential()
        plain.load_state_dict(dict(zip(plain.state_dict(), model.state_dict().values(), strict=True)))
        labels = torch.arange(7)
        torch.testing.assert_close(model(images), plain(images), rtol=1e-4, atol=1e-5)
        for network in (model, plain):
            nn.functional.cross_entropy(network(images), labels).backward()
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)

    def test_gradient_of_the_images(self, model: nn.Module, images: Tensor) -> None:
        plain = sequential()
        plain.load_state_dict(dict(zip(plain.state_dict(), model.state_dict().values(), strict=True)))
        gradients = []
        for network in (model, plain):
            x = images.clone().requires_grad_()
            gradients.append(torch.autograd.grad(network(x)[:, 3].sum(), x)[0])
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize(
        "bad",
        [
            torch.rand(1, 32, 32),
            torch.rand(2, 1, 28, 28),
            torch.rand(2, 3, 32, 32),
            torch.zeros(2, 1, 32, 32, dtype=torch.uint8),
        ],
        ids=["no batch", "28 pixels", "three channels", "uint8"],
    )
    def test_images_that_do_not_fit(self, model: nn.Module, bad: Tensor) -> None:
        with pytest.raises(KitError) as caught:
            model(bad)
        assert str(tuple(bad.shape)) in str(caught.value)
        assert str(bad.dtype) in str(caught.value)
        assert "(N, 1, 32, 32)" in str(caught.value)

    @pytest.mark.parametrize("classes", [0, 1, -3, True, 2.0, "10", None])
    def test_class_counts_that_make_no_sense(self, classes: Any) -> None:
        with pytest.raises(KitError, match="num_classes = "):
            LeNet5(classes)


class TestBuild:
    def test_the_seed_decides(self) -> None:
        first, again, other = (models.build("lenet5", seed=seed).state_dict() for seed in (5, 5, 6))
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not any(torch.equal(first[name], other[name]) for name in first)

    def test_the_global_random_state_is_left_alone(self) -> None:
        torch.manual_seed(11)
        expected = torch.rand(3)
        torch.manual_seed(11)
        models.build("lenet5", seed=5)
        assert torch.equal(torch.rand(3), expected)

    def test_without_a_seed_the_global_state_decides(self) -> None:
        weights = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            weights.append(models.build("lenet5").state_dict()["fc1.weight"])
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])

    def test_unknown_name(self) -> None:
        with pytest.raises(KitError, match="'resnet18' is unknown: use one of lenet5"):
            models.build("resnet18")


class Malicious:
    """Unpickled without care, this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


class TestLoadWeights:
    def filled(self, content: Any, path: Path) -> dict[str, Tensor]:
        """A fresh network's weights after loading a file of this content."""
        torch.save(content, path)
        model = models.build("lenet5", seed=99)
        models.load_weights(model, path)
        return model.state_dict()

    @pytest.mark.parametrize("wrap", ["bare", "state_dict", "model", "both"])
    @pytest.mark.parametrize("names", ["same", "other"])
    def test_whatever_the_names_and_the_nesting(
        self, model: nn.Module, tmp_path: Path, wrap: str, names: str, images: Tensor
    ) -> None:
        wanted = model.state_dict()
        weights = wanted if names == "same" else dict(zip(sequential().state_dict(), wanted.values(), strict=True))
        contents = {"bare": weights, "state_dict": {"epoch": 3, "state_dict": weights}, "model": {"model": weights}}
        content = contents.get(wrap, {"model": {"state_dict": OrderedDict(weights)}})
        found = self.filled(content, tmp_path / "weights.pt")
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)

    def test_same_names_win_over_order(self, model: nn.Module, tmp_path: Path) -> None:
        wanted = model.state_dict()
        found = self.filled(dict(reversed(list(wanted.items()))), tmp_path / "weights.pt")
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)

    def refuse(self, path: Path) -> str:
        """The one sentence with which a file is refused; the network keeps what it had."""
        model = models.build("lenet5", seed=99)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(KitError) as caught:
            models.load_weights(model, path)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        message = str(caught.value)
        assert str(path) in message
        assert len(message.splitlines()) == 1
        return message

    def test_wrong_count(self, model: nn.Module, tmp_path: Path) -> None:
        weights = dict(list(model.state_dict().items())[:-1])
        torch.save(weights, tmp_path / "nine.pt")
        assert "9 tensors: LeNet5 has 10" in self.refuse(tmp_path / "nine.pt")
        torch.save({**model.state_dict(), "extra": torch.ones(2)}, tmp_path / "eleven.pt")
        assert "11 tensors: LeNet5 has 10" in self.refuse(tmp_path / "eleven.pt")

    @pytest.mark.parametrize("content", [torch.ones(3), [torch.ones(3)], {}, {"a": 1}, 5, None])
    def test_no_dictionary_of_tensors(self, tmp_path: Path, content: Any) -> None:
        torch.save(content, tmp_path / "weights.pt")
        assert "0 tensors" in self.refuse(tmp_path / "weights.pt")

    def test_wrong_shape_is_named(self, model: nn.Module, tmp_path: Path) -> None:
        weights = dict(model.state_dict())
        weights["conv2.weight"] = torch.zeros(16, 3, 5, 5)
        torch.save(weights, tmp_path / "weights.pt")
        message = self.refuse(tmp_path / "weights.pt")
        assert "conv2.weight" in message
        assert "(16, 3, 5, 5)" in message
        assert "(16, 6, 5, 5)" in message

    def test_another_class_count_is_a_wrong_shape(self, tmp_path: Path) -> None:
        torch.save(models.build("lenet5", num_classes=7).state_dict(), tmp_path / "weights.pt")
        assert "fc2.weight" in self.refuse(tmp_path / "weights.pt")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_values_that_are_not_finite(self, model: nn.Module, tmp_path: Path, value: float) -> None:
        weights = {f"layer{number}": tensor.clone() for number, tensor in enumerate(model.state_dict().values())}
        weights["layer6"][3, 4] = value  # fc1.weight
        torch.save(weights, tmp_path / "weights.pt")
        assert "fc1.weight" in self.refuse(tmp_path / "weights.pt")

    @pytest.mark.parametrize("legacy", [False, True])
    def test_a_torch_file_with_code_is_refused_and_not_run(self, tmp_path: Path, legacy: bool) -> None:
        content = {"conv1.weight": Malicious(tmp_path / "ran")}
        torch.save(content, tmp_path / "weights.pt", _use_new_zipfile_serialization=not legacy)
        assert "plain tensors" in self.refuse(tmp_path / "weights.pt")
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_a_pickle_with_code_is_refused_and_not_run(self, tmp_path: Path, protocol: int) -> None:
        (tmp_path / "weights.pkl").write_bytes(pickle.dumps([Malicious(tmp_path / "ran")], protocol))
        assert "plain tensors" in self.refuse(tmp_path / "weights.pkl")
        assert not (tmp_path / "ran").exists()

    def test_the_pickle_above_would_have_run(self, tmp_path: Path) -> None:
        pickle.loads(pickle.dumps(Malicious(tmp_path / "ran")))
        assert (tmp_path / "ran").exists()

    def test_a_whole_pickled_network_is_refused(self, tmp_path: Path) -> None:
        torch.save(sequential(), tmp_path / "network.pt")
        assert "plain tensors" in self.refuse(tmp_path / "network.pt")

    @pytest.mark.parametrize(
        "content",
        [b"", b"\0" * 100, b"PK\x03\x04 cut short", b"not weights\n", b"\x80\x02", b"\x80\x02}q\x00.", b"(lp0\n"],
        ids=["empty", "zeros", "cut zip", "text", "cut pickle", "bare pickle", "old pickle"],
    )
    def test_not_a_torch_file(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "weights.pt").write_bytes(content)
        assert "plain tensors" in self.refuse(tmp_path / "weights.pt")

    @pytest.mark.parametrize("kept", [0.01, 0.5, 0.99])
    def test_cut_short(self, model: nn.Module, tmp_path: Path, kept: float) -> None:
        torch.save(model.state_dict(), tmp_path / "weights.pt")
        whole = (tmp_path / "weights.pt").read_bytes()
        (tmp_path / "weights.pt").write_bytes(whole[: int(kept * len(whole))])
        assert "plain tensors" in self.refuse(tmp_path / "weights.pt")

    @pytest.mark.parametrize("legacy", [False, True])
    def test_damage_anywhere_is_one_sentence_or_harmless(self, tmp_path: Path, legacy: bool) -> None:
        path = tmp_path / "weights.pt"
        weights = {f"layer{number}": torch.ones(2) for number in range(3)}
        torch.save(weights, path, _use_new_zipfile_serialization=not legacy)
        whole, model, chance = path.read_bytes(), models.build("lenet5"), random.Random(0)
        for _ in range(400):
            damaged = bytearray(whole)
            damaged[chance.randrange(min(len(whole), 1000))] = chance.randrange(256)
            path.write_bytes(damaged)
            with pytest.raises(KitError) as caught:  # 3 tensors never fit, whole or damaged
                models.load_weights(model, path)
            assert len(str(caught.value).splitlines()) == 1

    def test_missing_file_and_folder(self, tmp_path: Path) -> None:
        assert "there is no file" in self.refuse(tmp_path / "nowhere.pt")
        self.refuse(tmp_path)

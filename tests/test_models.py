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

from frlkit import KitError, checkpoint, evaluation, kernels, models
from frlkit.attacks import pgd
from frlkit.audit.weights import find, fit


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
            models.build("lenet5", classes)


def convolution(before: int, after: int, side: int = 3, bias: bool = False) -> int:
    return before * after * side**2 + bias * after


def residual(widths: tuple[int, ...], blocks: tuple[int, ...], preactivation: bool, classes: int) -> int:
    """Parameters of a residual network, counted by hand: batch normalisations have two a channel."""
    total, before = convolution(3, widths[0]), widths[0]
    total += 0 if preactivation else 2 * widths[0]
    for group, (after, count) in enumerate(zip(widths[1:], blocks, strict=True)):
        for number in range(count):
            total += convolution(before, after) + convolution(after, after)
            total += 2 * (before + after if preactivation else 2 * after)
            if before != after or (group and not number):
                total += convolution(before, after, 1) + (0 if preactivation else 2 * after)
            before = after
    return total + (2 * before if preactivation else 0) + classes * (before + 1)


RESNET, WIDE = (64, 64, 128, 256, 512), (16, 160, 320, 640)
QUARTER = (16, 16, 32, 64, 128)
COUNTS = {
    "cnn3": sum(convolution(*pair, bias=True) for pair in ((3, 32), (32, 64), (64, 128))) + 10 * (128 * 16 + 1),
    "cnn4": sum(convolution(*p, bias=True) for p in ((3, 32), (32, 64), (64, 128), (128, 256))) + 10 * (256 * 4 + 1),
    "preact_resnet18": residual(RESNET, (2, 2, 2, 2), True, 10),
    "preact_resnet18_w16": residual(QUARTER, (2, 2, 2, 2), True, 10),
    "resnet18": residual(RESNET, (2, 2, 2, 2), False, 10),
    "resnet34": residual(RESNET, (3, 4, 6, 3), False, 10),
    "wrn_28_10": residual(WIDE, (4, 4, 4), True, 10),
}


class TestColourNetworks:
    def test_all_are_counted(self) -> None:
        assert {"lenet5", *COUNTS} == set(models.MODELS) == set(models.TITLES)
        # As published: WRN-28-10 has 36.5 million (Zagoruyko and Komodakis), CIFAR's ResNet-18 11.17 million.
        assert (COUNTS["wrn_28_10"], COUNTS["resnet18"]) == (36_479_194, 11_173_962)

    @pytest.mark.parametrize("name", COUNTS)
    def test_parameters_and_output(self, name: str) -> None:
        model = models.build(name, seed=0).eval()
        assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[name]
        with torch.no_grad():
            assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
        with pytest.raises(KitError, match=r"\(N, 3, 32, 32\)"):
            model(torch.rand(2, 1, 32, 32))

    def test_pre_activation_by_hand(self) -> None:
        """One block as the paper that introduced it writes it: x' = shortcut + conv(relu(bn(conv(relu(bn(x))))))."""
        model = models.build("preact_resnet18", seed=0).eval()
        x = torch.rand(2, 64, 8, 8)
        block = model.blocks[2]  # the first of the second group: 64 -> 128, stride 2
        y = nn.functional.batch_norm(x, torch.zeros(64), torch.ones(64)).relu()
        z = nn.functional.conv2d(y, block.conv1.weight, stride=2, padding=1)
        z = nn.functional.batch_norm(z, torch.zeros(128), torch.ones(128)).relu()
        expected = nn.functional.conv2d(z, block.conv2.weight, padding=1)
        expected = expected + nn.functional.conv2d(y, block.shortcut.weight, stride=2)
        torch.testing.assert_close(block(x), expected)

    def test_basic_block_is_torchvisions(self) -> None:
        from torchvision.models.resnet import BasicBlock

        ours = models.build("resnet18", seed=0).eval().blocks[2]
        shortcut = nn.Sequential(nn.Conv2d(64, 128, 1, 2, bias=False), nn.BatchNorm2d(128))
        theirs = BasicBlock(64, 128, stride=2, downsample=shortcut).eval()
        theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
        x = torch.rand(2, 64, 8, 8)
        torch.testing.assert_close(ours(x), theirs(x))

    def test_attack_and_evaluation_leave_the_batch_statistics_alone(self) -> None:
        model = models.build("resnet18", seed=0).train()
        generator = torch.Generator().manual_seed(0)
        x, y = torch.rand(2, 3, 32, 32, generator=generator), torch.tensor([0, 1])
        before = {name: value.clone() for name, value in model.named_buffers()}
        adversarial = pgd(model, x, y, 8 / 255, 2 / 255, 2, random_start=False)
        evaluation.predict(model, adversarial)
        assert model.training
        assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
        frozen = pgd(model.eval(), x, y, 8 / 255, 2 / 255, 2, random_start=False)
        assert torch.equal(adversarial, frozen)  # the mode that the model was in does not show
        model.train()(x)
        assert not torch.equal(model.stem_bn.running_mean, before["stem_bn.running_mean"])

    def test_relu_after_pooling_is_relu_before_it(self) -> None:
        """Bit for bit, values and gradients, ties and windows that are negative throughout included."""
        model = models.build("cnn3", seed=0)
        before = nn.Sequential(
            *(part for conv in model.convolutions for part in (conv, nn.ReLU(), nn.MaxPool2d(2))), nn.Flatten()
        )
        x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).round(decimals=1)
        found = []
        for network in (model, nn.Sequential(before, model.linear)):
            pixels = x.clone().requires_grad_()
            logits = network(pixels)
            wanted = [pixels, *model.parameters()]
            found.append([logits, *torch.autograd.grad(logits.square().sum(), wanted)])
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))

    @pytest.mark.parametrize("name", ["cnn3", "preact_resnet18_w16", "lenet5"])
    def test_channels_last_changes_no_weight_and_no_file(self, name: str) -> None:
        plain, placed = (models.build(name, seed=3) for _ in range(2))
        assert kernels.layout(models.place(placed, "cpu")) is (
            torch.preserve_format if name == "lenet5" else torch.channels_last
        )
        assert kernels.layout(plain) is torch.preserve_format
        assert checkpoint.digest(dict(plain.state_dict())) == checkpoint.digest(dict(placed.state_dict()))


def trained(name: str) -> nn.Module:
    """A residual network whose batch statistics and affine weights are not those of birth, in eval mode."""
    model = models.build(name, seed=1)
    generator = torch.Generator().manual_seed(0)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.running_mean, part.bias.data):
                tensor.normal_(std=0.3, generator=generator)
            for tensor in (part.running_var, part.weight.data):
                tensor.uniform_(0.5, 2, generator=generator)
    return model.eval()


class TestFolded:
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    @pytest.mark.parametrize(("name", "left"), [("preact_resnet18_w16", 9), ("resnet18", 0)])
    def test_computes_the_same_with_fewer_layers(self, name: str, left: int) -> None:
        model = trained(name)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        folded = kernels.folded(model)
        assert sum(isinstance(part, nn.BatchNorm2d) for part in folded.modules()) == left
        torch.testing.assert_close(folded(self.x), model(self.x), rtol=1e-3, atol=1e-4)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_whatever_is_not_as_built_stays(self) -> None:
        lenet, hooked, pruned, replaced = models.build("lenet5"), *(trained("preact_resnet18_w16") for _ in range(3))
        hooked.blocks[0].register_forward_hook(lambda *_: None)
        nn.utils.parametrizations.weight_norm(pruned.stem)
        replaced.blocks[0] = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Dropout())
        for model in (lenet, hooked, pruned, replaced):
            assert kernels.folded(model) is model

    def test_an_attack_sees_no_difference(self) -> None:
        model, y = trained("preact_resnet18_w16"), torch.tensor([1, 2])
        moved = pgd(model, self.x, y, 8 / 255, 2 / 255, 1, random_start=False)
        pixels = self.x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(pixels), y), pixels)
        expected = (self.x + 2 / 255 * gradient.sign()).clamp(0, 1)
        clear = gradient.abs() > 1e-3 * gradient.abs().max()  # elsewhere rounding may turn the sign
        assert clear.float().mean() > 0.9
        torch.testing.assert_close(moved[clear], expected[clear])


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
        with pytest.raises(KitError, match="'resnet50' is unknown: use one of lenet5, cnn3, "):
            models.build("resnet50")


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
        fit(model, find(path))
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
            fit(model, find(path))
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
                fit(model, find(path))
            assert len(str(caught.value).splitlines()) == 1

    def test_missing_file_and_folder(self, tmp_path: Path) -> None:
        assert "there is no file" in self.refuse(tmp_path / "nowhere.pt")
        self.refuse(tmp_path)

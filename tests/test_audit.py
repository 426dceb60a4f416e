"""An audit: its numbers against plain evaluation, its refusals and doubts, layouts of public networks, the commands."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from click.testing import CliRunner
from conftest import learnt, tiny_dataset
from torch import Tensor, nn

from frlkit import KitError, data, evaluation, models, runs
from frlkit.__main__ import main
from frlkit.attacks import pgd
from frlkit.audit import RADII_255, audit, choice, ladder, networks, readings
from frlkit.audit.doubts import doubts
from frlkit.audit.networks import Network
from frlkit.audit.weights import find
from frlkit.data import Dataset, Split
from frlkit.evaluation import Attack
from frlkit.report import card, card_words


class Detached(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.detach().flatten(1)[:, :10]


class Tupled(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (images.flatten(1)[:, :10],)


class Damaged(nn.Module):
    def forward(self, outputs: Tensor) -> Tensor:
        return outputs / 0


class Settings:
    """What people pickle beside their weights."""


ATTACK = Attack(steps=5)


@pytest.fixture(scope="module")
def found(sound: nn.Module, tiny: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return audit(sound, tiny, ATTACK, path=tmp_path_factory.mktemp("audit") / "audit.json", command="frlkit audit x")


class TestNumbers:
    def test_errors_are_those_of_plain_evaluation(self, found: dict[str, Any], sound: nn.Module, tiny: Dataset) -> None:
        errors = evaluation.class_errors(sound, tiny.test, ATTACK)
        assert found["natural"] == errors.natural.tolist()
        assert found["robust"] == errors.robust.tolist()
        assert np.allclose(np.add(found["natural"], found["boundary"]), found["robust"])
        assert found["confusion"]["robust"] == errors.confusion.tolist()
        assert found["labels_per_class"] == [5] * 10
        assert found["fingerprints"]["data"] == tiny.fingerprint

    def test_confusions_hold_every_image(self, found: dict[str, Any], sound: nn.Module, tiny: Dataset) -> None:
        x, y = tiny.test.batch(slice(None))
        expected = torch.zeros(10, 10, dtype=torch.int64)
        for label, taken in zip(y, evaluation.predict(sound, x), strict=True):
            expected[label, taken] += 1
        assert found["confusion"]["natural"] == expected.tolist()

    def test_the_curve_rises_from_natural_through_robust(self, found: dict[str, Any]) -> None:
        curve = found["curve"]
        assert [point["eps_255"] for point in curve] == [0.0, *RADII_255]
        assert curve[0]["robust"] == found["natural"]
        assert curve[8]["robust"] == found["robust"]
        assert (np.diff([point["robust"] for point in curve], axis=0) >= 0).all()

    def test_the_curve_is_near_one_attack_after_another(
        self, found: dict[str, Any], sound: nn.Module, tiny: Dataset
    ) -> None:
        """Bisection asks few radii of each image; an attack at every radius asks all."""
        x, y = tiny.test.batch(slice(None))
        for point in (found["curve"][3], found["curve"][14]):
            eps = point["eps_255"] / 255
            wrong = evaluation.predict(sound, pgd(sound, x, y, eps, eps / 4, 10)) != y
            wrong |= evaluation.predict(sound, x) != y
            assert np.mean(point["robust"]) == pytest.approx(wrong.double().mean().item(), abs=0.06)

    @pytest.mark.parametrize("eps", [0.0, 2.5, 40.0])
    def test_any_radius_of_the_attack(self, sound: nn.Module, tiny: Dataset, eps: float) -> None:
        found = audit(sound, tiny, Attack(eps, eps / 4, steps=3))
        radii = {0.0, *RADII_255} | ({eps} if eps <= 16 else set())
        assert [point["eps_255"] for point in found["curve"]] == sorted(radii)
        whole = np.array([point["robust"] for point in found["curve"]])
        assert (np.diff(whole, axis=0) >= 0).all()
        assert (whole <= np.array(found["robust"]) + 1e-12).all() or eps < 16

    def test_it_is_plain_data(self, found: dict[str, Any]) -> None:
        assert json.loads(json.dumps(found, allow_nan=False)) == found

    def test_written_before_optional_parts(
        self, sound: nn.Module, tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("frlkit.audit._fell_at", stop)
        with pytest.raises(KeyboardInterrupt):
            audit(sound, tiny, ATTACK, path=tmp_path / "audit.json")
        kept = json.loads((tmp_path / "audit.json").read_text(encoding="utf-8"))
        assert [point["eps_255"] for point in kept["curve"]] == [0.0, 8.0]

    def test_doubts_are_said_before_the_attack(
        self, tiny: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("frlkit.audit.predictions", lambda *_: pytest.fail(capsys.readouterr().err))
        with pytest.raises(pytest.fail.Exception, match="doubtful: the natural error on 50 images, 90%, is no better"):
            audit(models.build("lenet5", seed=4), tiny, ATTACK)

    def test_fewer_images_and_certificates(self, sound: nn.Module, tiny: Dataset, tmp_path: Path) -> None:
        found = audit(sound, tiny, Attack(2, 0.5, 3), most=40, certify=10, curve=False, path=tmp_path / "a.json")
        assert found["images"] == sum(found["labels_per_class"]) == 40
        certified = found["certified"]
        total = np.sum([certified[verdict] for verdict in ("verified", "falsified", "undecided")], axis=0)
        assert total.tolist() == [1.0] * 10
        with pytest.raises(KitError, match="give a path"):
            audit(sound, tiny, certify=10)
        found = audit(nn.Sequential(sound), tiny, ATTACK, certify=10, curve=False, path=tmp_path / "b.json")
        assert "not supported" in found["certified"]["not_supported"]

    def test_a_ladder_ends_in_what_is_proved(self, sound: nn.Module, tiny: Dataset, tmp_path: Path) -> None:
        pytest.importorskip("torchattacks", reason="AutoAttack needs torchattacks")
        about: dict[str, Any] = {"ladder": 10, "curve": False}
        found = audit(sound, tiny, Attack(1, 0.25, 3), path=tmp_path / "audit.json", **about)
        assert [rung["rung"] for rung in found["ladder"]][-2:] == [ladder.AUTOATTACK, ladder.CERTIFIED]
        errors = np.array([rung["robust"] for rung in found["ladder"]])
        assert (np.diff(errors, axis=0) >= 0).all()
        said = card_words.sentences(found, card.summary(found))["ladder"]
        assert f"can bring it above {100 * errors[-1].mean():.1f} %: so much is proved" in said
        found = audit(nn.Sequential(sound), tiny, Attack(1, 0.25, 3), path=tmp_path / "b" / "audit.json", **about)
        assert found["ladder"][-1]["rung"] == ladder.AUTOATTACK
        assert "not supported" in found["certified"]["not_supported"]

    def test_few_images_have_every_class(self, sound: nn.Module, tiny: Dataset) -> None:
        found = audit(sound, tiny, Attack(1, 0.25, 1), most=11, curve=False)
        assert found["images"] == 11 and min(found["labels_per_class"]) == 1
        with pytest.raises(KitError, match="3 images are fewer than the 10 classes"):
            audit(sound, tiny, ATTACK, most=3)
        none = replace(tiny, test=tiny.test.take(tiny.test.labels != 4))
        with pytest.raises(KitError, match=r"class '4' has none of the \d+ test images: .* audit more \(--images\)"):
            audit(sound, none, ATTACK)

    @pytest.mark.parametrize(
        ("network", "words"),
        [
            (nn.Sequential(nn.Flatten(), nn.Linear(1024, 2)), r"returns \(1, 2\) for one image of 1x32x32"),
            (nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), "does not take images of 1x32x32"),
            (nn.Sequential(nn.Flatten(), nn.Linear(1024, 10)).double(), "does not take images of 1x32x32"),
            (Detached(), "returns logits without a gradient: leave no_grad and numpy out"),
            (Tupled(), "returns tuple for one image"),
            (nn.Sequential(nn.Flatten(), nn.Linear(1024, 10), Damaged()), "returns NaN or infinite logits"),
            ("lenet5", "an audit takes a torch.nn.Module and a frlkit.data.Dataset, not str and Dataset"),
        ],
        ids=["outputs", "size", "float64", "no gradient", "tuple", "NaN", "no module"],
    )
    def test_what_cannot_be_audited_is_one_sentence(self, network: Any, words: str, tiny: Dataset) -> None:
        with pytest.raises(KitError, match=words):
            audit(network, tiny, ATTACK)


def image_folder(place: Path, channels: int, side: int) -> str:
    """Two classes, dark and bright, eight images to train and eight to test; its data set's name."""
    grey = np.concatenate([np.arange(20, 28), np.arange(220, 228)]).astype(np.uint8)
    pixels = np.broadcast_to(grey[:, None, None, None], (16, side, side, channels)).copy()
    labels = np.repeat([0, 1], 8)
    np.savez(place / "two.npz", x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    return f"folder:{place / 'two.npz'}"


class TestReadings:
    """What images cannot tell apart is said; what a file says counts."""

    def linear(self, place: Path, weight: float, bias: float) -> tuple[Path, str]:
        """A file and a factory: one output falls with the mean pixel, the other rises."""
        sign = torch.tensor([[-1.0], [1.0]])
        torch.save({"1.weight": (weight * sign).repeat(1, 64) / 64, "1.bias": bias * sign[:, 0]}, place / "w.pt")
        text = "import torch.nn as nn\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))\n"
        (place / "net.py").write_text(text, encoding="utf-8")
        return place / "w.pt", f"{place / 'net.py'}:net"

    def test_two_readings_that_are_both_right(self, tmp_path: Path) -> None:
        """The likelier one is kept, and the other named: errors and losses do not tell, attacks find something else.

        Its boundary lies just above the dark images; behind a normalisation it would lie far from all.
        """
        path, model = self.linear(tmp_path, 400.0, -400 * 0.115)
        read = readings.read(path, image_folder(tmp_path, 1, 8), model, size=8, channels=1)
        assert read.reading["mean"] is None
        assert any(re.search(r"could as well be read as .* 0% of 16 attacked\)", doubt) for doubt in read.doubts)
        path, model = self.linear(tmp_path, 400.0, -400 * 0.4)
        assert readings.read(path, f"folder:{tmp_path / 'two.npz'}", model, size=8, channels=1).doubts == []

    @pytest.mark.parametrize("name", ["resnet18", "preact_resnet18_w16"])
    def test_the_network_stays_as_the_file_has_it(self, name: str, tmp_path: Path) -> None:
        """Trying readings moves no statistic of batch normalisation."""
        before = models.build(name, 2, seed=0).state_dict()
        torch.save(before, tmp_path / "w.pt")
        read = readings.read(tmp_path / "w.pt", image_folder(tmp_path, 3, 32), size=32)
        tensors = list(read.model.state_dict().values())
        assert len(tensors) >= len(before)
        for tensor in before.values():
            assert any(tensor.shape == other.shape and torch.equal(tensor, other) for other in tensors)

    def test_a_retrained_networks_own_normalisation_counts(self, tmp_path: Path) -> None:
        """The weights of a run of one's own network have its mean and deviation in them."""
        _, model = self.linear(tmp_path, 80.0, 0.0)
        inner = networks.candidates(model, find(tmp_path / "w.pt"), 2)[0].module
        prepared = networks.Prepared(inner, (0.5,), (0.25,))
        path = tmp_path / "weights.safetensors"
        runs.write_weights(path, prepared.state_dict(), {"model": f"own:{model}"}, 2)
        read = readings.read(path, image_folder(tmp_path, 1, 8), model, size=8, channels=1)
        assert (read.reading["mean"], read.reading["std"]) == ([0.5], [0.25])
        again = {"mean": (0.5,), "std": (0.25,), "size": 8, "channels": 1}
        assert readings.read(path, f"folder:{tmp_path / 'two.npz'}", model, **again).reading["mean"] == [0.5]
        with pytest.raises(KitError, match="give one number, or one for each of 1 channels"):
            readings.read(path, f"folder:{tmp_path / 'two.npz'}", model, **{**again, "mean": (0.5, 0.5)})

    def test_torchvisions_by_a_name_that_is_the_kits_too(self, tmp_path: Path) -> None:
        """Its counters of batch normalisation may be missing, and it is recognised without a name."""
        torch.manual_seed(0)
        state = torchvision.models.resnet18(num_classes=2).state_dict()
        torch.save({key: v for key, v in state.items() if not key.endswith("num_batches_tracked")}, tmp_path / "r.pt")
        for name in ("resnet18", ""):
            (found,) = networks.candidates(name, find(tmp_path / "r.pt"), 2)
            assert found.title == "torchvision's resnet18"

    def test_an_average_that_pytorch_keeps(self, tmp_path: Path) -> None:
        """`AveragedModel` counts what it has averaged, in a tensor beside its module's."""
        model = models.build("lenet5", seed=0)
        averaged = torch.optim.swa_utils.AveragedModel(model)
        averaged.update_parameters(model)
        torch.save({"ema": averaged.state_dict()}, tmp_path / "ema.pt")
        found = networks.candidates("", find(tmp_path / "ema.pt"), 10)[0].module
        assert all(torch.equal(*pair) for pair in zip(found.parameters(), model.parameters(), strict=True))
        torch.save({"epoch": 3}, tmp_path / "none.pt")
        with pytest.raises(KitError, match=r"none\.pt holds no named tensors: save model.state_dict"):
            networks.candidates("", find(tmp_path / "none.pt"), 10)

    def test_a_factory_beside_its_helpers_and_with_a_parser(self, tmp_path: Path) -> None:
        (tmp_path / "helper_of_it.py").write_text("SIZE = 64\n", encoding="utf-8")
        code = (
            "import argparse\nimport torch.nn as nn\nfrom helper_of_it import SIZE\n"
            "parser = argparse.ArgumentParser()\nparser.add_argument('--lr')\nparser.parse_args()\n"
            "def net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(SIZE, 2))\n"
        )
        (tmp_path / "net.py").write_text(code, encoding="utf-8")
        before = list(sys.path), list(sys.argv)
        (found,) = networks.candidates(f"{tmp_path / 'net.py'}:net", None, 2)
        assert found.module[1].in_features == 64
        (tmp_path / "net.py").write_text("import sys\nsys.exit('no GPU')\n", encoding="utf-8")
        with pytest.raises(KitError, match=r"failed \(SystemExit: no GPU\): repair it"):
            networks.candidates(f"{tmp_path / 'net.py'}:net", None, 2)
        assert (list(sys.path), list(sys.argv)) == before

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("kind", ["script", "export"])
    def test_a_program_that_is_trusted(self, kind: str, tmp_path: Path) -> None:
        """What a file's refusal advises: load TorchScript or torch.export in a factory of one's own."""
        path, model = self.linear(tmp_path, 80.0, -40.0)
        plain = networks.candidates(model, find(path), 2)[0].module.eval()
        name, x = image_folder(tmp_path, 1, 8), torch.rand(2, 1, 8, 8)
        if kind == "script":
            torch.jit.save(torch.jit.trace(plain, x), tmp_path / "program.pt")
            code = f"torch.jit.load({str(tmp_path / 'program.pt')!r})"
        else:
            shapes = ({0: torch.export.Dim("images", min=1, max=4096)},)
            torch.export.save(torch.export.export(plain, (x,), dynamic_shapes=shapes), tmp_path / "program.pt2")
            code = f"torch.export.load({str(tmp_path / 'program.pt2')!r}).module()"
        (tmp_path / "load.py").write_text(f"import torch\ndef net():\n    return {code}\n", encoding="utf-8")
        read = readings.read(None, name, f"{tmp_path / 'load.py'}:net", size=8, channels=1)
        found = audit(read.model, read.data, ATTACK, curve=False)
        assert found["natural"] == [0.0, 0.0]


SHAPES = [((0.0,), (1.0,)), ((0.286,), (0.353,)), ((0.5,), (0.5,))]  # readings, the likeliest first


class TestChoice:
    """Readings whose errors and losses on 10,000 images are made up; of an image a reading is wrong by chance."""

    def choose(
        self,
        monkeypatch: pytest.MonkeyPatch,
        wrong: tuple[float, ...],
        loss: tuple[float, ...],
        fallen: tuple[float, ...] = (0.2, 0.8, 0.8),
        seed: int = 0,
    ) -> tuple[int, list[str], list[int]]:
        """Errors and losses by reading; how many of 200 attacked images fall. Which is chosen, doubts, images seen."""
        numbers, seen = np.random.RandomState(seed), []
        hard, mood = numbers.rand(10_000), numbers.exponential(size=10_000)  # what all readings find hard
        network = Network("net", nn.Linear(1, 1))
        tries = [choice.Reading(network, *pair) for pair in SHAPES[: len(wrong)]]
        right = [(0.9 * hard + 0.1 * numbers.rand(10_000)) >= share for share in wrong]
        losses = [share * mood * numbers.uniform(0.9, 1.1, 10_000) for share in loss]

        def scores(asked: Any, _: Any, most: int) -> list[Any]:
            seen.append(most)
            places = [tries.index(reading) for reading in asked]
            return [choice._Score(right[k][:most], losses[k][:most], torch.full((most, 2), float(k))) for k in places]

        def fell(reading: Any, _: Any) -> np.ndarray:
            return np.arange(200) < 200 * fallen[tries.index(reading)]

        monkeypatch.setattr(choice, "_scores", scores)
        monkeypatch.setattr(choice, "_fallen", fell)
        images = SimpleNamespace(class_names="0123456789")
        chosen, _, said = choice.choose(tries, tries, lambda _: images)  # type: ignore[arg-type, return-value]
        return tries.index(chosen), said, seen

    @pytest.mark.parametrize("seed", range(5))
    def test_a_rival_of_a_lower_error_by_chance(self, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Errors that differ by nothing but chance: the loss tells, whichever of them it is."""
        for truth in (0, 1):
            loss = (0.55, 0.65) if truth == 0 else (0.65, 0.55)
            assert self.choose(monkeypatch, (0.22, 0.22), loss, seed=seed)[:2] == (truth, [])

    def test_neither_errors_nor_losses_tell(self, monkeypatch: pytest.MonkeyPatch) -> None:
        chosen, (said,), seen = self.choose(monkeypatch, (0.22, 0.22), (0.55, 0.55))
        assert chosen == 0 and seen == [200, 2000, 10_000]
        assert re.search(
            r"as net, images less mean 0.286, std 0.353 \(\d\d\.\d% of 10000 clean .* 80% of 200 att", said
        )
        assert said.endswith("20% of 200 attacked): say which, with --mean 0.286 --std 0.353 or --mean 0 --std 1")
        assert self.choose(monkeypatch, (0.22, 0.22), (0.55, 0.55), (0.2, 0.2))[:2] == (0, [])  # it does not matter

    def test_errors_and_losses_contradict_each_other(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The lower error is taken, if surely lower; and the other named."""
        chosen, (said,), _ = self.choose(monkeypatch, (0.25, 0.22), (0.5, 0.6))
        assert chosen == 1 and "as net, images in [0, 1] (2" in said

    def test_more_images_where_few_do_not_tell(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.choose(monkeypatch, (0.24, 0.22), (0.55, 0.55))[::2] == (1, [200, 2000, 10_000])
        assert self.choose(monkeypatch, (0.6, 0.22, 0.7), (0.9, 0.5, 1.0)) == (1, [], [200])


class TestUnbalanced:
    """Where one class has nearly all images, or all of those that are looked at."""

    def split(self, few: int, many: int) -> Split:
        grey = torch.cat([torch.full((many,), 20), torch.full((few,), 220)]).to(torch.uint8)
        labels = (torch.arange(many + few) >= many).long()
        return Split(grey[:, None, None, None].expand(-1, 1, 8, 8), labels, classes=2)

    @pytest.mark.parametrize(("few", "many"), [(3, 300), (10, 990), (3, 97), (1, 40)])
    def test_a_perfect_network_is_not_doubted(self, few: int, many: int) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        with torch.no_grad():
            model[1].weight.copy_(torch.tensor([[-1.0], [1.0]]) / 8)
            model[1].bias.copy_(torch.tensor([4.0, -4.0]))
        assert doubts(model, self.split(few, many)) == []

    def test_one_that_always_says_the_same_is(self) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        with torch.no_grad():
            model[1].weight.mul_(1e-3)
            model[1].bias.copy_(torch.tensor([4.0, -4.0]))
        assert "no better than guessing" in doubts(model, self.split(30, 300))[0]


class TestLayouts:
    """Public layouts, written here anew, give the kit's networks the same function."""

    @pytest.mark.parametrize("last_bn", [True, False])
    def test_preact_resnet(self, last_bn: bool, tmp_path: Path) -> None:
        from test_audit_kinds import resnet_as_public

        own = models.build("preact_resnet18_w16", seed=0).eval()
        public = resnet_as_public(last_bn)
        torch.save(dict(sorted(public.items())), tmp_path / "w.pt")  # order does not matter
        (network,) = networks.candidates("", find(tmp_path / "w.pt"), 10)
        x = torch.rand(2, 3, 32, 32)
        # the paper's code ends its blocks in the mean, without batch norm or ReLU between
        expected = own(x) if last_bn else own.linear(own.blocks(own.stem(x)).mean((2, 3)))
        torch.testing.assert_close(network.module.eval()(x), expected)

    def test_wide_resnet_as_trades_and_the_paper_have_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        wide = models.MODELS["wrn_28_10"]
        monkeypatch.setitem(models.MODELS, "wrn_28_10", lambda classes: wide(classes, widths=(16, 4, 8, 16)))
        monkeypatch.setattr(networks, "image_shape", lambda _: (32, 3))
        own = models.build("wrn_28_10", seed=0).eval()
        public: dict[str, Tensor] = {"sub_block1.layer.0.conv1.weight": torch.ones(4, 16, 3, 3)}
        for name, tensor in own.state_dict().items():
            if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
                number = int(match[1])
                name = f"block{number // 4 + 1}.layer.{number % 4}.{match[2].replace('shortcut', 'convShortcut')}"
            name = name.replace("stem.", "conv1.").replace("last_bn.", "bn1.").replace("linear.", "fc.")
            public[name] = tensor
            public["layer_one.weight" if name == "conv1.weight" else f"other_layers.0.{name}"] = tensor
        torch.save({"state_dict": public}, tmp_path / "w.pt")
        (network,) = networks.candidates("wrn_28_10", find(tmp_path / "w.pt"), 10)
        x = torch.rand(2, 3, 32, 32)
        assert torch.equal(network.module.eval()(x), own(x))

    def test_torchvision_is_recognised_and_unknown_files_are_not(self, tmp_path: Path) -> None:
        import torchvision

        module = torchvision.models.get_model("resnet18", num_classes=7)
        torch.save({"model": {f"module.{k}": v for k, v in module.state_dict().items()}}, tmp_path / "w.pt")
        (network,) = networks.candidates("", find(tmp_path / "w.pt"), 7)
        assert network.title == "torchvision's resnet18"
        x = torch.rand(1, 3, 64, 64)
        assert torch.equal(network.module.eval()(x), module.eval()(x))
        torch.save(nn.Linear(3, 7).state_dict(), tmp_path / "w.pt")
        with pytest.raises(KitError, match="none of lenet5, .*resnet50.*: say with --model which"):
            networks.candidates("", find(tmp_path / "w.pt"), 7)

    @pytest.mark.parametrize(
        ("code", "words"),
        [
            ("def net(): return 5", "returns int: return a torch.nn.Module"),
            ("import math\ndef other(): pass\nclass Other: pass", r"there is no 'net' in .*: use one of other, Other$"),
            ("", r"there is no 'net' in .*: define it there"),
            ("net = 5", "returns int: return a torch.nn.Module"),
            (
                "def net(width, *, depth, num_classes, bias=0, **rest): pass",
                "takes width, depth, which nobody gives: name",
            ),
            ("1 / 0", "ZeroDivisionError: division by zero"),
            ("def net(num_classes): raise ValueError('two\\nlines')", r"failed \(ValueError: two\): repair it"),
            ("import nowhere", "No module named 'nowhere'.: install it, go where it lies"),
        ],
    )
    def test_a_factory_that_fails(self, tmp_path: Path, code: str, words: str) -> None:
        (tmp_path / "own.py").write_text(code, encoding="utf-8")
        with pytest.raises(KitError, match=words) as caught:
            networks.candidates(f"{tmp_path / 'own.py'}:net", None, 10)
        assert len(str(caught.value).splitlines()) == 1

    def test_a_factory_in_a_module_loads_its_own_weights(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "mine_xyz.py").write_text(
            "from torch import nn\ndef net(): return nn.Linear(2, 3)", encoding="utf-8"
        )
        monkeypatch.chdir(tmp_path)
        (network,) = networks.candidates("mine_xyz:net", None, 3)
        assert isinstance(network.module, nn.Linear)
        with pytest.raises(KitError, match="needs a file of weights"):
            networks.candidates("lenet5", None, 3)

    def test_a_network_that_stands_ready(self, tmp_path: Path) -> None:
        (tmp_path / "ready.py").write_text("from torch import nn\nnet = nn.Linear(2, 3)", encoding="utf-8")
        (network,) = networks.candidates(f"{tmp_path / 'ready.py'}:net", None, 3)
        assert isinstance(network.module, nn.Linear)

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("json:loads", "takes s, which nobody gives"),
            ("json:nosuch", "there is no 'nosuch' in json: use one of"),
            ("nosuch_xyz:thing", r"failed \(ModuleNotFoundError: No module named 'nosuch_xyz'\): install it"),
            ("nosuch/net.py:thing", "there is no file nosuch/net.py: give the path of a Python file"),
            (":thing", "Empty module name"),
        ],
    )
    def test_a_factory_that_is_not_there(self, name: str, words: str) -> None:
        with pytest.raises(KitError, match=words) as caught:
            networks.candidates(name, None, 3)
        assert len(str(caught.value).splitlines()) == 1


class TestFind:
    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"", "download or save it again"),
            (b"hello", "download or save it again"),
            (
                b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
                "pointer of Git LFS .*git lfs pull",
            ),
            (b"\n<!DOCTYPE html><html>Not Found</html>", "it is a web page .*download"),
        ],
    )
    def test_what_came_in_place_of_a_file(self, tmp_path: Path, content: bytes, said: str) -> None:
        (tmp_path / "w.pth").write_bytes(content)
        with pytest.raises(KitError, match=said) as caught:
            find(tmp_path / "w.pth")
        assert len(str(caught.value).splitlines()) == 1

    @pytest.mark.parametrize(
        ("content", "error"),
        [
            ({"acc": 91.5}, 0.085),
            ({"best_acc": 0.9, "test_acc1": 88.0}, 0.1),
            ({"train_acc": 99.0, "robust_acc": 50.0}, None),
            ({"accuracy": float("nan")}, None),
            ({"acc": True}, None),
            ({"acc": 97, "mean": torch.ones(3)}, 0.03),
        ],
    )
    def test_what_a_file_says_of_itself(self, content: dict[str, Any], error: float | None, tmp_path: Path) -> None:
        torch.save({"net": {"a": torch.ones(2), "b": torch.ones(2)}, **content}, tmp_path / "w.pt")
        found = find(tmp_path / "w.pt").error
        assert found == (None if error is None else pytest.approx(error))

    @pytest.mark.parametrize(
        ("mean", "std", "expected"),
        [
            (torch.tensor([0.5]), torch.tensor([0.25]), ((0.5,), (0.25,))),
            (torch.full((1, 3, 1, 1), 127.5), torch.full((3,), 51.0), ((0.5,) * 3, (0.2,) * 3)),
            (torch.tensor([0.5]), torch.tensor([0.0]), (None, None)),
            (torch.zeros(7), torch.ones(7), (None, None)),
        ],
    )
    def test_a_normalize_in_front(self, mean: Tensor, std: Tensor, expected: Any, tmp_path: Path) -> None:
        content = {"module.normalize.mean": mean, "module.normalize.std": std, "module.net.fc.weight": torch.ones(2, 2)}
        content["module.net.bn.running_mean"] = torch.ones(3)
        torch.save(content, tmp_path / "w.pt")
        found = find(tmp_path / "w.pt")
        assert found.mean == (None if expected[0] is None else pytest.approx(expected[0]))
        assert found.std == (None if expected[1] is None else pytest.approx(expected[1]))
        if found.mean:
            assert set(found.tensors) == {"fc.weight", "bn.running_mean"}
            assert found.prefix == "module.net."

    @pytest.mark.parametrize("first", ["model", "ema"])
    @pytest.mark.parametrize("average", ["ema.module.", "net_ema.", "ema_model."])
    @pytest.mark.parametrize("key", ["state_dict", ""])
    def test_an_average_among_the_weights(self, key: str, average: str, first: str, tmp_path: Path) -> None:
        """It is another network's: said, and audited where it is asked for."""
        tensors = {name: torch.ones(2, 2) for name in ("conv.weight", "fc.weight")}
        two = [{f"model.{k}": v for k, v in tensors.items()}, {f"{average}{k}": 2 * v for k, v in tensors.items()}]
        both = {**two[0], **two[1]} if first == "model" else {**two[1], **two[0]}
        torch.save({key: both} if key else both, tmp_path / "w.pt")
        place = f"{key}.{average.partition('.')[0]}"
        for asked, factor, others in (("", 1, (place,)), (place, 2, (key,) if key else ())):
            found = find(tmp_path / "w.pt", asked)
            assert set(found.tensors) == set(tensors) and found.others == others
            assert all((tensor == factor).all() for tensor in found.tensors.values())
        torch.save({key: two[1]} if key else two[1], tmp_path / "w.pt")  # alone
        assert find(tmp_path / "w.pt").others == ()

    def test_an_object_of_ones_own_beside_them(self, tmp_path: Path) -> None:
        torch.save({"state_dict": {"a": torch.ones(2)}, "config": Settings()}, tmp_path / "w.pt")
        with pytest.raises(KitError, match=r"holds [\w.]*Settings beside them; if you trust it, load it"):
            find(tmp_path / "w.pt")

    def test_a_key_that_is_not_there(self, tmp_path: Path) -> None:
        torch.save({"net": {"a": torch.ones(2), "b": torch.ones(2)}}, tmp_path / "w.pt")
        with pytest.raises(KitError, match="no weights under 'ema': use one of 'net'"):
            find(tmp_path / "w.pt", "ema")


class TestCommand:
    @pytest.fixture(autouse=True)
    def digits_with_more_to_test(self, digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
        """Enough of them to tell readings apart."""
        found = {size: tiny_dataset(data.load("digits", size=size), 1, 1, 30) for size in (28, 32)}
        monkeypatch.setattr(data, "load", lambda _, **rest: found.get(rest.get("size"), found[32]))

    def call(self, *words: str | Path) -> Any:
        return CliRunner().invoke(main, [*map(str, words)])

    def test_table_json_and_card(self, sound: nn.Module, tmp_path: Path) -> None:
        torch.save({"net": sound.state_dict()}, tmp_path / "w.pth")
        words = ("--dataset", "digits", "--steps", "3", "--json", tmp_path / "copy.json", "--output", tmp_path / "card")
        result = self.call("audit", tmp_path / "w.pth", *words)
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith("read as LeNet-5, tanh, average pooling, 32x32, images in [0, 1]\n")
        assert result.stdout.splitlines()[-1] == f"written: {tmp_path / 'card' / 'card.html'}"
        found, copy = (json.loads((tmp_path / name).read_text("utf-8")) for name in ("card/audit.json", "copy.json"))
        assert found == copy
        assert found["reading"]["key"] == "net"
        assert found["attack"]["steps"] == 3

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (("--mean", "0.5"), "give both"),
            (("--mean", "0.5", "--std", "0"), "deviations above 0"),
            (("--mean", "a", "--std", "1"), "use numbers, such as 0.5"),
            (("--size", "64"), "takes images of"),
            (("--model", "nothing"), "model = 'nothing' is unknown"),
            (("--ladder", "10"), "give a path"),
            (("--key", "ema"), "no weights under 'ema'"),
            (("--mean", "0.9", "--std", "0.05"), "a robust error of the first would mean nothing"),
        ],
    )
    def test_bad_words(self, sound: nn.Module, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
        torch.save(sound.state_dict(), tmp_path / "w.pth")
        result = self.call("audit", tmp_path / "w.pth", "--dataset", "digits", "--steps", "1", *words)
        assert result.exit_code != 0
        assert isinstance(result.exception, SystemExit), result.exception
        assert said in result.stderr
        assert "Traceback" not in result.stderr

    def test_a_network_of_probabilities_that_sees_only_its_own_size(self, tmp_path: Path, tiny: Dataset) -> None:
        (tmp_path / "net.py").write_text(
            "from torch import nn\n"
            "def soft(num_classes): return nn.Sequential(nn.Flatten(), nn.Linear(1024, num_classes), nn.Softmax(1))\n"
            "def other(): return nn.Sequential(nn.Flatten(), nn.Linear(99, 10))\n"
            "def seven(): return nn.Sequential(nn.Flatten(), nn.Linear(1024, 7))\n",
            encoding="utf-8",
        )
        network = nn.Sequential(nn.Flatten(), nn.Linear(1024, 10))
        torch.save(learnt(network, *tiny.train.batch(slice(None)), 20).state_dict(), tmp_path / "w.pt")
        read = readings.read(tmp_path / "w.pt", "digits", f"{tmp_path / 'net.py'}:soft")
        from frlkit.audit.doubts import doubts

        assert any("returns probabilities" in doubt for doubt in doubts(read.model, read.data.test))
        for factory, said in (("other", "does not take images of 1x32x32"), ("seven", "one logit for each")):
            with pytest.raises(KitError, match=said):
                readings.read(None, "digits", f"{tmp_path / 'net.py'}:{factory}")

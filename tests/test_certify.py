"""Certificates against brute force, attacks, chance and other precisions; and the record that goes on."""

from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from frlkit import PROJECT, KitError, data, models, runs
from frlkit.__main__ import main
from frlkit.attacks import pgd
from frlkit.audit import certify, crown, ladder, layers, lines, networks
from frlkit.audit.readings import IMAGENET
from frlkit.data import Dataset, Split
from frlkit.interval import Part

EPS = 8 / 255
Chain = tuple[layers.Layer, ...]


def head(split: Split, count: int) -> Split:
    return Split(split.images[:count], split.labels[:count])


def true_margins(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(x)
    return (logits.gather(1, y[:, None]) - logits).scatter(1, y[:, None], torch.inf)


def tiny_chain(kind: str, seed: int, spread: float = 1.0) -> Chain:
    """1x4x4 images, a 3x3 convolution to 2 channels, pooling, two linear layers; random weights."""
    generator = torch.Generator().manual_seed(seed)
    padding, side = (0, 1) if kind == "tanh" else (1, 2)

    def draw(*shape: int) -> Tensor:
        return spread * torch.randn(*shape, generator=generator)

    pool = "mean" if kind == "tanh" else "max"
    parts = [
        Part(draw(2, 1, 3, 3), draw(2), padding, kind, pool),
        Part(draw(3, 2 * side * side), draw(3), activation=kind),
        Part(draw(3, 3), draw(3)),
    ]
    return layers.chain(parts, (1, 4, 4))


def outputs(chain: Chain, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """The arguments of all activations, and the logits, (N, C), in x's own precision."""
    arguments = []
    for layer in chain:
        x = F.conv2d(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype), padding=layer.padding)
        arguments.append(x)
        x = layers.act(layer, x)
    return arguments[:-1], x.flatten(1)


def bound(chain: Chain, x: Tensor, y: Tensor, eps: float, steps: int = 0) -> tuple[list[lines.Range], Tensor]:
    box = layers.ball(x, eps)
    ranges = crown.pre_activations(chain, box, steps)
    return ranges, crown.tightest(chain, box, ranges, *crown.differences(chain[-1], y), steps)[:, 0]


@pytest.mark.parametrize("kind", ["tanh", "relu"])
@pytest.mark.parametrize("steps", [0, 5])
@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), eps=st.sampled_from([0.01, 0.1, 0.5]), spread=st.sampled_from([0.3, 1.0, 3.0]))
def test_bounds_hold_a_dense_sample_of_a_tiny_network(
    kind: str, steps: int, seed: int, eps: float, spread: float
) -> None:
    """All corners of the ball in half of the pixels, random images, and the steepest corner: float64 and float32."""
    chain = tiny_chain(kind, seed, spread)
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.rand(1, 1, 4, 4, generator=generator), torch.tensor([seed % 3])
    ranges, bounds = bound(chain, x, y, eps, steps)
    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=8)))
    rest = torch.randint(2, corners.shape, generator=generator) * 2.0 - 1
    shifts = torch.cat([torch.cat([corners, rest], 1), torch.rand(2000, 16, generator=generator) * 2 - 1])
    near = x.double() + eps * shifts.view(-1, 1, 4, 4).double()
    for dtype in (torch.float64, torch.float32):
        images = near.clamp(0, 1).to(dtype)
        arguments, logits = outputs(chain, images)
        for reach, z in zip(ranges, arguments, strict=True):
            assert (reach.low[0, 0].transpose(0, 1) <= z).all()
            assert (z <= reach.high[0, 0].transpose(0, 1)).all()
        assert (logits[:, y] - logits >= bounds - 1e-4 * (dtype is torch.float32)).all()


def test_the_bound_of_a_linear_network_is_exact() -> None:
    """Without an activation, the minimum is at the corner that the signs of the weights name."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(3, 16, generator=generator).double(), torch.randn(3, generator=generator).double()
    chain = layers.chain([Part(weight, bias)], (1, 4, 4))
    x, y = torch.rand(5, 1, 4, 4, generator=generator), torch.tensor([0, 1, 2, 0, 1])
    low, high = (x.double().flatten(1) - 0.1).clamp(min=0), (x.double().flatten(1) + 0.1).clamp(max=1)
    rows, constant = weight[y][:, None] - weight, bias[y][:, None] - bias
    expected = torch.where(rows > 0, rows * low[:, None], rows * high[:, None]).sum(2) + constant
    torch.testing.assert_close(bound(chain, x, y, 0.1)[1], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@given(low=st.floats(-12, 12), width=st.one_of(st.floats(0, 1e-6), st.floats(0, 12)), point=st.floats(-15, 15))
def test_lines_stay_on_their_sides(activation: str, low: float, width: float, point: float) -> None:
    """Whatever the point, on a dense grid of the range; and each touches the curve, or is its chord."""
    layer = layers.chain([Part(torch.ones(1, 1), torch.zeros(1), activation=activation)], (1, 1, 1))[0]
    ends = (torch.full((1, 1, 1, 1, 1), low + part, dtype=torch.float64) for part in (0.0, width))
    around = lines.enclose(layer, *ends, torch.zeros(1, 1, 1, 1, 1))
    slope, half_slope, intercept, half, *_ = lines.lines(layer, around, torch.full_like(around.low, point))
    z = torch.linspace(0, 1, 1001, dtype=torch.float64) * width + low
    curve = z.tanh() if activation == "tanh" else z.relu()
    below = ((slope - half_slope) * z + intercept - half).flatten()
    above = ((slope + half_slope) * z + intercept + half).flatten()
    assert (below <= curve + 1e-15).all()
    assert (curve <= above + 1e-15).all()
    touch = 1e-3 * (1 + width)
    assert (curve - below).min() < touch
    assert (above - curve).min() < touch


def test_max_pooling_picks_one_of_each_cell() -> None:
    """Worked out by hand: ranges [-1, 2], [0, 1], [-3, -2], [-1, 0.5]: at most max(z0, 1), so 1 + (z0 + 1) / 3."""
    layer = layers.chain([Part(torch.ones(1, 1, 1, 1), torch.zeros(1), 0, "relu", "max")], (1, 2, 2))[0]
    low, high = (torch.tensor(ends).double().view(1, 1, 2, 1, 2) for ends in ([-1.0, 0, -3, -1], [2.0, 1, -2, 0.5]))
    around = lines.enclose(layer, low, high, torch.zeros(1, 1, 1, 1, 1))
    slope, half_slope, intercept, half, *_ = lines.lines(layer, around, lines.usual_points(layer, around))
    expected_above = torch.tensor([1 / 3, 0, 0, 0]).double()
    expected_below = torch.tensor([1.0, 0, 0, 0]).double()
    torch.testing.assert_close((slope + half_slope).flatten(), expected_above)
    torch.testing.assert_close((slope - half_slope).flatten(), expected_below)
    torch.testing.assert_close((intercept + half).sum(), torch.tensor(4 / 3).double())
    torch.testing.assert_close((intercept - half).sum(), torch.tensor(0.0).double())


@pytest.mark.parametrize("name", ["lenet5", "cnn3"])
def test_without_a_radius_a_bound_is_the_margin(name: str) -> None:
    model = models.build(name, 10, seed=3).eval()
    x = torch.rand(1, *model.image_shape, generator=torch.Generator().manual_seed(1))
    y = torch.tensor([4])
    bounds = crown.margins(model, x, y, 0.0)
    for margins in (true_margins(model, x, y), true_margins(copy.deepcopy(model).double(), x.double(), y)):
        away = (margins - bounds)[~margins.isinf()]
        assert away.min() >= 0
        assert away.max() < 5e-3  # the room for float32


@pytest.mark.parametrize("steps", [0, 3])
def test_neither_attacks_nor_chance_beat_a_bound(steps: int, trained: nn.Module, tiny: Dataset) -> None:
    x, y = tiny.test.batch(slice(0, 2 if steps else 8))
    bounds = crown.margins(trained, x, y, EPS, steps)
    assert bounds.isinf().sum() == len(x)
    exact = copy.deepcopy(trained).double()
    generator = torch.Generator().manual_seed(0)
    images = [
        pgd(trained, x, y, EPS, EPS / 4, 20, restarts=2, loss=loss, generator=generator) for loss in ("ce", "margin")
    ]
    for _ in range(20):  # corners of the ball, where a network that is almost linear has its minimum
        images.append((x + EPS * (2 * torch.randint(2, x.shape, generator=generator) - 1)).clamp(0, 1))
    for near in images:
        assert (true_margins(trained, near, y) >= bounds).all()
        assert (true_margins(exact, near.double(), y) >= bounds).all()


def test_convolutions_with_max_pooling(tiny: Dataset) -> None:
    """A plain CNN whose attacked margins stay above the bounds, which are not trivial either."""
    model = models.build("cnn3", 10, seed=2).eval()
    x, y = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([3])
    bounds = crown.margins(model, x, y, 1 / 255)
    attacked = pgd(model, x, y, 1 / 255, 0.25 / 255, 20, restarts=2, loss="margin")
    found = true_margins(model, attacked, y)
    assert (found >= bounds).all()
    assert (found - bounds)[~bounds.isinf()].max() < 1.0


def sequence(*between: nn.Module, classes: int = 10) -> nn.Sequential:
    """28x28 images, one convolution padded by 1, what stands between, and two linear layers."""
    torch.manual_seed(4)
    first = [nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *between)]
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(4 * 196, 20, bias=False), nn.Tanh(), nn.Linear(20, classes))


def lenet(activation: str, pool: str, border: int = 0) -> networks.LeNet:
    torch.manual_seed(3)
    return networks.LeNet(10, 1, 28 + 2 * border, 0, activation, pool)


OTHERS = {
    "ReLU, max": (lenet("ReLU", "max"), 28),
    "ReLU, average": (lenet("ReLU", "average"), 28),
    "in a border": (networks.Prepared(lenet("ReLU", "max", 2), (0.1307,), (0.3081,), 2), 28),
    "from -1 to 1": (networks.Prepared(lenet("tanh", "average"), (0.5,), (0.5,)), 28),
    "of bytes": (networks.Prepared(lenet("tanh", "average"), (0.0,), (1 / 255,)), 28),
    "maximum first": (sequence(nn.MaxPool2d(2), nn.ReLU()), 28),
    "in colour": (
        networks.Prepared(nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10)), *IMAGENET),
        8,
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_peoples_networks_behind_their_preprocessing(name: str) -> None:
    """Without a radius the bound is the margin; with one, neither attacks nor corners of the ball beat it."""
    model, side = OTHERS[name]
    channels = 3 if name == "in colour" else 1
    x = torch.rand(2, channels, side, side, generator=torch.Generator().manual_seed(1)).round(decimals=1)  # 0, 1 too
    y = model(x).argmax(1)
    for precise, images in ((model, x), (copy.deepcopy(model).double(), x.double())):
        margins = true_margins(precise, images, y)
        away = (margins - crown.margins(model, x, y, 0.0))[~margins.isinf()]
        assert away.min() >= 0
        assert away.max() < 1e-3 * (1 + margins[~margins.isinf()].abs().max())
    eps = 2 / 255
    bounds = crown.margins(model, x, y, eps)
    attacked = [pgd(model, x, y, eps, eps / 4, 20, restarts=2, loss="margin")]
    signs = torch.randint(2, (20, *x.shape), generator=torch.Generator().manual_seed(2))
    for near in (*attacked, *(x + eps * (2 * signs - 1)).clamp(0, 1)):
        assert (true_margins(model, near, y) >= bounds).all()


def test_a_normalisation_changes_nothing_that_weights_undo(trained: nn.Module, tiny: Dataset) -> None:
    """Behind (x - mean) / std, a network whose first layer multiplies by std and adds the mean has the same bounds."""
    x, y = tiny.test.batch(slice(0, 3))
    mean, std, inner = 0.286, 0.353, copy.deepcopy(trained)
    with torch.no_grad():
        inner.conv1.bias += mean * inner.conv1.weight.sum((1, 2, 3))
        inner.conv1.weight *= std
    model = networks.Prepared(inner, (mean,), (std,))
    ours, plain = crown.margins(model, x, y, EPS), crown.margins(trained, x, y, EPS)
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=5e-3)
    before = layers.front(model)
    assert before is not None
    torch.testing.assert_close(before._replace(border=2).undo(before._replace(border=2)(x.double())), x.double())


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lenet("tanh", "max"), "tanh without maxima"),
        (lenet("sigmoid", "average"), "must stand ReLU"),
        (sequence(nn.ReLU(), nn.MaxPool2d(2), nn.ReLU()), "its ReLU is not, where it stands"),
        (sequence(nn.AvgPool2d(2), nn.ReLU()), "its ReLU is not, where it stands"),
        (sequence(nn.ReLU(), nn.MaxPool2d(3, 2, 1)), "its MaxPool2d is not"),
        (sequence(nn.MaxPool2d(2)), "behind each layer"),
        (sequence(nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)), "its BatchNorm2d is not"),
        (sequence(nn.ReLU()), "layer 2 does not fit a map of 4 channels of 28x28"),
        (nn.Sequential(nn.Conv2d(1, 2, 4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(288, 3)), "odd number"),
        (nn.Sequential(nn.Conv2d(1, 2, 4, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(338, 3)), "of stride 1"),
        (nn.Sequential(nn.Flatten()), "it has no layer"),
        (nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.ReLU()), "and only there"),
    ],
)
def test_what_cannot_be_bounded_is_refused(model: nn.Module, words: str) -> None:
    with pytest.raises(KitError, match=f"is not supported: .*{words}"):
        crown.margins(model, torch.rand(1, 1, 28, 28), torch.tensor([0]), EPS)


def test_shipped_certificates_and_ladders_do_not_contradict_each_other() -> None:
    """Of the same images: what is verified stands to the last rung; what falls there is falsified or undecided."""
    shared = 0
    for place in sorted((PROJECT / "checkpoints").glob("*/*/seed*")):
        if not (place / "ladder.json").exists():
            continue
        rungs = ladder.read(place / "ladder.json")
        for path in place.glob("certified_*.json"):
            found = certify.read(path)
            if found["attack"]["eps_255"] != rungs["eps_255"] or found["weights_sha256"] != rungs["weights_sha256"]:
                continue
            each = [len(record["labels"]) // 10 for record in (found, rungs)]  # both are balanced, class by class
            for number, verdict in enumerate(found["verdicts"]):
                label, place_in_class = divmod(number, each[0])
                assert found["labels"][number] == label
                stands = rungs["fell"][label * each[1] + place_in_class] == len(rungs["rungs"])
                assert stands or verdict != "verified", path
                shared += 1
    assert shared >= 10_000


def test_a_radius_out_of_range_is_refused(trained: nn.Module, tiny: Dataset) -> None:
    x, y = tiny.test.batch(slice(0, 1))
    for eps in (-0.1, 1.5, math.nan):
        with pytest.raises(KitError, match="use a radius from 0 to 1"):
            crown.margins(trained, x, y, eps)


def test_bounds_fall_with_the_radius_and_rise_with_effort(trained: nn.Module, tiny: Dataset) -> None:
    x, y = tiny.test.batch(slice(0, 1))
    radii = [crown.margins(trained, x, y, radius / 255) for radius in (0, 1, 2, 4, 8, 16)]
    assert all((wider <= narrower + 1e-9).all() for narrower, wider in itertools.pairwise(radii))
    tilted = crown.margins(trained, x, y, EPS, 2)
    assert (tilted >= radii[4]).all()
    assert (tilted > radii[4]).any()


def test_images_are_bounded_each_on_its_own(trained: nn.Module, tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch, single images, and pieces of another size give the same but for rounding."""
    x, y = tiny.test.batch(slice(0, 3))
    together = crown.margins(trained, x, y, EPS)
    alone = torch.cat([crown.margins(trained, x[i : i + 1], y[i : i + 1], EPS) for i in range(3)])
    torch.testing.assert_close(alone, together, rtol=1e-9, atol=1e-9)
    monkeypatch.setattr(crown, "WORK", 1)
    torch.testing.assert_close(crown.margins(trained, x[:1], y[:1], EPS), together[:1], rtol=1e-9, atol=1e-9)


def test_float32_stays_within_the_room_that_is_left_for_it(trained: nn.Module, tiny: Dataset) -> None:
    """The room at each activation, against what PyTorch's float32 is really off, given the same float32 input."""
    x, _ = tiny.test.batch(slice(0, 4))
    chain = layers.network(trained, x)
    ranges = crown.pre_activations(chain, layers.ball(x, EPS))
    flow = x
    for layer, reach in zip(chain, ranges, strict=False):
        z = F.conv2d(flow, layer.weight.float(), layer.bias.float(), padding=layer.padding)
        exact = F.conv2d(flow.double(), layer.weight, layer.bias, padding=layer.padding)
        off = (z - exact).abs().transpose(1, 2)[:, None]
        assert (off <= reach.rounding).all()
        assert off.max() > 1e-4 * reach.rounding.max()  # the room is no fantasy
        flow = layers.act(layer, z)


@pytest.fixture(scope="module")
def record(trained: nn.Module, tiny: Dataset) -> dict[str, Any]:
    return certify.certify(trained, tiny.test, 8)


def test_verdicts_and_their_summary(record: dict[str, Any], trained: nn.Module, tiny: Dataset) -> None:
    x, y = tiny.test.batch(slice(None))
    wrong = trained(x).argmax(1) != y
    verdicts = record["verdicts"]
    assert set(verdicts) == set(certify.VERDICTS)  # the fixture gives all three
    assert all(verdicts[i] == "falsified" for i in wrong.nonzero()[:, 0])
    for verdict, margin in zip(verdicts, record["margins"], strict=True):
        assert (margin is None) == (verdict == "falsified")
        assert margin is None or (margin > 0) == (verdict == "verified")
    table = certify.summary(record, tiny.class_names)
    assert table.loc["all", "images"] == len(tiny.test)
    assert table.loc["all", "verified"] == 100 * verdicts.count("verified") / len(verdicts)
    assert ((table[list(certify.VERDICTS)].sum(axis=1) - 100).abs() < 0.2).all()


def test_an_interrupted_certification_goes_on(
    trained: nn.Module, tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split, path = head(tiny.test, 12), tmp_path / "certificates.json"
    whole = certify.certify(trained, split, 8)
    margins, calls = crown.margins, []

    def stopping(*rest: Any) -> Tensor:
        calls.append(len(rest[1]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return margins(*rest)

    monkeypatch.setattr(crown, "margins", stopping)
    with pytest.raises(KeyboardInterrupt):
        certify.certify(trained, split, 8, path=path)
    with pytest.raises(KitError, match="unfinished"):
        certify.summary(json.loads(path.read_text(encoding="utf-8")), tiny.class_names)
    resumed = certify.certify(trained, split, 8, path=path)
    assert sum(calls) - calls[1] == sum(verdict != "falsified" for verdict in whole["verdicts"])  # none done twice
    assert (resumed["verdicts"], resumed["margins"]) == (whole["verdicts"], whole["margins"])
    before = len(calls)
    assert certify.certify(trained, split, 8, path=path) == resumed
    assert len(calls) == before


def test_more_effort_takes_up_only_what_is_undecided(
    record: dict[str, Any], trained: nn.Module, tiny: Dataset, tmp_path: Path
) -> None:
    chosen = torch.tensor([record["verdicts"].index(verdict) for verdict in certify.VERDICTS])
    split, path = Split(tiny.test.images[chosen], tiny.test.labels[chosen]), tmp_path / "certificates.json"
    first = certify.certify(trained, split, 8, path=path)
    second = certify.certify(trained, split, 8, steps=2, path=path)
    for before, after, steps in zip(first["verdicts"], second["verdicts"], second["steps"], strict=True):
        assert after == before or (before, after) == ("undecided", "verified")
        assert steps == {"verified": 0, "falsified": None, "undecided": 2}[before]
    undecided = first["verdicts"].index("undecided")
    assert second["margins"][undecided] > first["margins"][undecided]


def test_another_runs_file_is_refused(trained: nn.Module, tiny: Dataset, tmp_path: Path) -> None:
    split, path = head(tiny.test, 2), tmp_path / "certificates.json"
    certify.certify(trained, split, 8, path=path)
    content = path.read_bytes()
    other = models.build("lenet5", 10, seed=7)
    for model, part, eps in ((other, split, 8), (trained, head(tiny.validation, 2), 8), (trained, split, 4)):
        with pytest.raises(KitError, match="belongs to another"):
            certify.certify(model, part, eps, path=path)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(KitError, match="cannot be read"):
        certify.certify(trained, split, 8, path=path)
    path.write_bytes(content)
    certify.certify(trained, split, 8, path=path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"eps_255": -1}, "eps_255 = -1"),
        ({"eps_255": float("nan")}, "eps_255 = nan"),
        ({"steps": -1}, "steps = -1"),
        ({"steps": 1.5}, "steps = 1.5"),
        ({"steps": True}, "steps = True"),
        ({"model": models.build("preact_resnet18", 10)}, "ResNet is not supported: use lenet5"),
        ({"images": 0}, "no images"),
    ],
)
def test_bad_input(change: dict[str, Any], words: str, trained: nn.Module, tiny: Dataset) -> None:
    values = {"model": trained, "images": 2, "eps_255": 8, "steps": 0} | change
    with pytest.raises(KitError, match=words):
        certify.certify(values["model"], head(tiny.test, values["images"]), values["eps_255"], steps=values["steps"])


def test_a_network_that_computes_something_else_is_refused(trained: nn.Module, tiny: Dataset) -> None:
    x, y = tiny.test.batch(slice(0, 1))
    model = copy.deepcopy(trained)
    model.fc1.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(KitError, match="something else than its layers"):
        crown.margins(model, x, y, EPS)


@pytest.mark.filterwarnings("ignore")
def test_against_auto_lirpa(trained: nn.Module, tiny: Dataset) -> None:
    """Another library's CROWN: close to ours from below and above, since both choose the lines much alike."""
    pytest.importorskip("auto_LiRPA", reason="auto_LiRPA is not installed (from its source)")
    x, y = tiny.test.batch(slice(0, 2))
    net = trained

    class Plain(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            flow = F.avg_pool2d(net.conv1(images).tanh(), 2)
            flow = F.avg_pool2d(net.conv2(flow).tanh(), 2).flatten(1)
            return net.fc2(net.fc1((flow @ net.conv3.weight.flatten(1).T + net.conv3.bias).tanh()).tanh())

        def __init__(self) -> None:
            super().__init__()
            self.net = net

    low, high = (x - EPS).clamp(min=0), (x + EPS).clamp(max=1)
    import auto_LiRPA as library

    ball = library.BoundedTensor(x, library.PerturbationLpNorm(norm=float("inf"), x_L=low, x_U=high))
    rows = F.one_hot(y, 10)[:, None] - torch.eye(10)
    bounded = library.BoundedModule(Plain().eval(), x)
    theirs, _ = bounded.compute_bounds(x=(ball,), C=rows, method="CROWN")
    ours = crown.margins(trained, x, y, EPS)
    others = ~ours.isinf()
    torch.testing.assert_close(ours[others].float(), theirs[others], rtol=0.05, atol=0.1)


def test_command(trained: nn.Module, tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any file of weights, a line a class, one verdict an image in the JSON; and its one sentence for bad input."""
    monkeypatch.setattr(data, "load", lambda name, **rest: tiny)
    weights, out = tmp_path / "mine.safetensors", tmp_path / "certificates.json"
    runs.write_weights(weights, trained.state_dict(), {"model": "lenet5"}, 10)

    def call(*words: str | Path) -> Result:
        return CliRunner().invoke(
            main, ["certify", *map(str, words), "--model", "lenet5", "--dataset", "digits", "--eps", "2"]
        )

    result = call(weights, "--images", "3", "--json", out)
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.stdout.splitlines()[2:12]] == list(tiny.class_names)
    verdicts = json.loads(out.read_text(encoding="utf-8"))["verdicts"]
    assert len(verdicts) == 3
    assert set(verdicts) <= set(certify.VERDICTS)
    balanced = tmp_path / "balanced.json"
    result = call(weights, "--images", "10", "--balanced", "--seconds", "0.1", "--json", balanced)
    assert result.exit_code == 0, result.output
    assert json.loads(balanced.read_text(encoding="utf-8"))["labels"] == list(range(10))
    for words in (
        (weights, "--images", "1000"),
        (weights, "--images", "1000", "--balanced"),
        (weights, "--images", "1", "--seconds", "-1"),
        (tmp_path, "--images", "1"),
        (weights, "--images", "2", "--json", out),
    ):
        refused = call(*words)
        assert refused.exit_code == 1
        assert refused.stderr.startswith("Error: ")
        assert len(refused.stderr.splitlines()) == 1


def test_no_rung_of_the_ladder_beats_a_certificate(fashion_mnist: Dataset) -> None:
    """Of every shipped model that was attacked up to AutoAttack, the images that fell last: none has a certificate."""
    paths = sorted((PROJECT / "checkpoints" / "fashion_mnist").glob("*/seed*/ladder.json"))
    assert paths
    for path in paths:
        record = ladder.finished(path)
        split = ladder.subset(fashion_mnist.test, len(record["fell"]), len(fashion_mnist.class_names))
        fell = torch.tensor(record["fell"])
        standing = len(record["rungs"])
        last = torch.where(fell < standing, fell, -1).argsort(descending=True)[:3]
        assert (fell[last] > 0).all()  # right clean, and fooled
        model, _ = runs.read_weights(path.with_name(runs.WEIGHTS))
        x, y = split.batch(last)
        assert (crown.margins(model, x, y, record["eps_255"] / 255).amin(1) <= 0).all()

"""Cutting the ball at neurons: each piece's bound against dense samples, pieces against the whole, the verdicts."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_certify import Chain, head, outputs, tiny_chain, true_margins
from torch import Tensor, nn

from frlkit import KitError, models
from frlkit.audit import branch, certify, crown, layers
from frlkit.data import Dataset, Split

EPS = 8 / 255


def whole(chain: Chain, x: Tensor, y: Tensor, eps: float, other: int) -> branch.Root:
    box = layers.ball(x, eps)
    ranges = crown.pre_activations(chain, box, 1)
    none = torch.zeros(1, len(chain[-1].bias), dtype=torch.float64)
    return branch.root(crown.Bounded(chain, box, ranges, none, none), y, other)


def near(x: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """All corners of the ball in half of the pixels, and random images: (N, 1, 4, 4) float64."""
    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=8)))
    rest = torch.randint(2, corners.shape, generator=generator) * 2.0 - 1
    shifts = torch.cat([torch.cat([corners, rest], 1), torch.rand(2000, 16, generator=generator) * 2 - 1])
    return (x.double() + eps * shifts.view(-1, 1, 4, 4).double()).clamp(0, 1)


def inside(piece: branch.Piece, chain: Chain, reach: list[Any], arguments: list[Tensor]) -> Tensor:
    """Which samples lie in a piece, (N,), from the arguments (N, C, H, W) of each layer's activations."""
    kept = torch.ones(len(arguments[0]), dtype=torch.bool)
    for layer, place, at, side in piece.cuts:
        maps = arguments[layer].transpose(1, 2)  # (N, H, C, W), as ranges lie; windows may reach over the edge
        edge = (reach[layer].low.shape[3] - maps.shape[1]) // 2
        z = torch.nn.functional.pad(maps, (edge, edge, 0, 0, edge, edge)).flatten(1)[:, place]
        kept &= side * (z - at) <= 0
    return kept


@pytest.mark.parametrize("kind", ["tanh", "relu"])
@settings(max_examples=8)
@given(seed=st.integers(0, 10**6), eps=st.sampled_from([0.1, 0.5]), spread=st.sampled_from([0.3, 1.0, 3.0]))
def test_pieces_hold_a_dense_sample_and_are_together_the_whole(kind: str, seed: int, eps: float, spread: float) -> None:
    """Whatever the betas; and a cut never loosens a bound."""
    chain, generator = tiny_chain(kind, seed, spread), torch.Generator().manual_seed(seed)
    x, y = torch.rand(1, 1, 4, 4, generator=generator), torch.tensor([seed % 3])
    other = (seed + 1) % 3
    ball = whole(chain, x, y, eps, other)
    arguments, logits = outputs(chain, near(x, eps, generator))
    margins = logits[:, y[0]] - logits[:, other]
    pieces, places, _ = branch.bounded(ball, [branch.Piece(-torch.inf)])
    assert (margins >= pieces[0].bound).all()
    for _ in range(3):
        parents = [piece for piece in pieces for _ in (0, 1)]
        cut = [half for piece, place in zip(pieces, places, strict=True) for half in branch.halves(ball, piece, place)]
        wild = [
            half._replace(betas=tuple((5 * torch.rand(len(half.betas), generator=generator)).tolist())) for half in cut
        ]
        for tried in (wild, cut):
            made, places, images = branch.bounded(ball, tried)
            assert images.shape[0] == len(cut)
            covered = torch.zeros(len(margins), dtype=torch.bool)
            for piece, parent in zip(made, parents, strict=True):
                assert piece.bound >= parent.bound
                kept = inside(piece, chain, ball.reach, arguments)
                assert (margins[kept] >= piece.bound).all()
                covered |= kept
            assert covered.all()
        pieces = made


def test_cuts_close_the_gap() -> None:
    """Of one hidden layer with three ReLUs, cut at all of them: the bound is close to the minimum on a grid."""
    closed = []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        first, last = (torch.randn(3, n, generator=generator) for n in (4, 3))
        parts = [layers.interval.Part(first, torch.zeros(3) - first.sum(1) / 2, activation="relu")]
        chain = layers.chain([*parts, layers.interval.Part(last, torch.zeros(3))], (1, 2, 2))
        x, y = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
        ball = whole(chain, x, y, 0.4, 1)
        grid = torch.cartesian_prod(*[torch.linspace(0.1, 0.9, 17, dtype=torch.float64)] * 4).view(-1, 1, 2, 2)
        logits = outputs(chain, grid)[1]
        least = float((logits[:, 0] - logits[:, 1]).min())
        pieces, places, _ = branch.bounded(ball, [branch.Piece(-torch.inf)])
        before = least - pieces[0].bound
        for _ in range(3):
            halves = [h for piece, place in zip(pieces, places, strict=True) for h in branch.halves(ball, piece, place)]
            pieces, places, _ = branch.bounded(ball, halves)
        after = least - min(piece.bound for piece in pieces)
        assert after >= -1e-5  # the grid has the corners, where a piecewise linear minimum may lie
        closed.append(1 - after / before)
    assert sum(closed) / len(closed) > 0.7


def test_cutting_verifies_and_no_attack_beats_it(trained: nn.Module, tiny: Dataset) -> None:
    """The label's output bias lowered until fitted lines just miss: cut up, the ball is verified."""
    x, y = tiny.test.batch(slice(0, 1))
    model = copy.deepcopy(trained)
    with torch.no_grad():
        model.fc2.bias[y] -= float(crown.margins(model, x, y, EPS, branch.FIT).min()) + 0.02
    margin, is_fooled = branch.decide(model, x, y, EPS, 60)
    assert margin > 0
    assert not is_fooled
    generator = torch.Generator().manual_seed(0)
    shifts = EPS * (2 * torch.randint(2, (200, *x.shape[1:]), generator=generator) - 1)
    assert (true_margins(model, (x + shifts).clamp(0, 1), y.expand(200)) >= margin).all()


def test_without_time_the_bound_is_that_of_the_whole(trained: nn.Module, tiny: Dataset) -> None:
    x, y = tiny.test.batch(slice(0, 1))
    expected = float(crown.margins(trained, x, y, 32 / 255, branch.FIT).min())
    margin, is_fooled = branch.decide(trained, x, y, 32 / 255, 0)
    assert margin >= expected
    assert margin < 0
    assert not is_fooled


def test_a_misclassified_image_lies_in_the_ball(trained: nn.Module, tiny: Dataset) -> None:
    """Minima are moved into the ball as an attack's images are; only a misclassified one is handed out."""
    x, y = tiny.test.batch(slice(0, 1))
    y = trained(x).argmax(1)
    x = (x * 255).round() / 255
    far = torch.cat([x, 1 - x, torch.zeros_like(x)]).double().transpose(1, 2)
    assert branch.misclassified(trained, x, y, 0.0, far) is None
    found = branch.misclassified(trained, x, y, 1.0, far)
    assert found is not None
    assert trained(found).argmax(1) != y
    small = branch.misclassified(trained, x, (y + 1) % 10, EPS, far)
    assert small is not None
    assert (small - x).abs().max() <= EPS + 1e-7
    assert small.min() >= 0
    assert small.max() <= 1


class TestRecord:
    """What certify keeps of it, with made-up outcomes of attack, bounds and cutting."""

    @pytest.fixture
    def split(self, tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> Split:
        """Four images, of which the last is verified at once."""
        monkeypatch.setattr(certify, "_falsify", lambda *_: None)
        monkeypatch.setattr(crown, "margins", lambda *_: torch.tensor([[-1.0], [-1.0], [-1.0], [1.0]]))
        return head(tiny.test, 4)

    def test_verdicts_limits_and_going_on(self, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = models.build("lenet5", seed=1)
        path, calls, outcomes = tmp_path / "certificates.json", [], [(0.5, False), (-0.1, True), (-100.0, False)]

        def decide(model: nn.Module, x: Tensor, y: Tensor, eps: float, seconds: float) -> tuple[float, bool]:
            calls.append(seconds)
            assert eps == 8 / 255
            if len(calls) == 3:
                raise KeyboardInterrupt
            return outcomes[min(len(calls) - 1, 2)]

        monkeypatch.setattr(branch, "decide", decide)
        with pytest.raises(KeyboardInterrupt):
            certify.certify(model, split, 8, seconds=2.0, path=path)
        record = certify.certify(model, split, 8, seconds=2.0, path=path)
        assert len(calls) == 4  # the two that were done are not done again
        assert record["verdicts"] == ["verified", "falsified", "undecided", "verified"]
        assert record["margins"] == [0.5, None, -1.0, 1.0]
        assert record["limits"] == [2.0, 2.0, 2.0, 0.0]
        assert certify.certify(model, split, 8, seconds=1.0, path=path) == record
        assert len(calls) == 4
        certify.certify(model, split, 8, seconds=3.0, path=path)
        assert calls[4:] == [3.0]

    def test_a_record_without_it_is_left_as_it_was(self, split: Split, tmp_path: Path) -> None:
        path, model = tmp_path / "certificates.json", models.build("lenet5", seed=1)
        certify.certify(model, split, 8, path=path)
        before = path.read_bytes()
        certify.certify(model, split, 8, path=path)
        assert path.read_bytes() == before
        assert b"limits" not in before

    @pytest.mark.parametrize("seconds", [-1, float("nan"), True, "1", 10**6])
    def test_bad_limits(self, seconds: Any, trained: nn.Module, tiny: Dataset) -> None:
        with pytest.raises(KitError, match="seconds = "):
            certify.certify(trained, head(tiny.test, 1), 8, seconds=seconds)


class TestBracket:
    def test_shares_by_class(self, trained: nn.Module, tiny: Dataset) -> None:
        split = certify.first(tiny.test, 20, balanced=True)
        found = certify.bracket(trained, split, 4)
        table = certify.summary(certify.certify(trained, split, 4), tiny.class_names)
        assert found["eps_255"] == 4
        assert found["images"] == 20
        for verdict in certify.VERDICTS:
            assert [100 * share for share in found[verdict]] == table[verdict].tolist()[:-1]

    def test_not_supported(self, trained: nn.Module, tiny: Dataset) -> None:
        resnet = models.build("preact_resnet18", 10)
        assert "ResNet is not supported" in certify.bracket(resnet, tiny.test, 8)["not_supported"]
        with pytest.raises(KitError, match="class [01] has no image"):
            only = tiny.test.take(tiny.test.labels != 1)
            certify.bracket(trained, Split(only.images[:1], only.labels[:1], classes=10), 8)

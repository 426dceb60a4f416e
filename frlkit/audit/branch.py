"""Branch and bound: the ball of an undecided image cut into pieces at single neurons, until each piece is verified.

A cut says that the argument z of one activation, as float32 has it, is at most c in one piece and at least c in the
other: together they are the whole. In a piece the neuron's lines lie closer; and since z - c <= 0 there, a form plus
beta (z - c), beta >= 0, is a lower bound of the form in the piece (Wang et al., 2021). Whatever the betas, the bound is
sound. ReLUs are cut at 0, tanh's arguments, and maxima's, in the middle of their range; the neuron whose two lines cost
the bound most comes first, and of all pieces the worst.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from frlkit import evaluation
from frlkit.audit import crown
from frlkit.audit.layers import FLOAT64, Layer, front
from frlkit.audit.lines import Range, best_points, enclose, lines, usual_points

FIT = 2  # rounds of fitting lines before the first cut
ROUNDS = 4  # of fitting betas and lines in a piece
BATCH = 16  # pieces cut at a time


class Cut(NamedTuple):
    """z <= at (side 1) or z >= at (side -1) at one place, counted in the map as it lies in memory, of one layer."""

    layer: int
    place: int
    at: float
    side: int


class Piece(NamedTuple):
    """A part of the ball: a form's lower bound there, the cuts that made it, and their betas."""

    bound: float
    cuts: tuple[Cut, ...] = ()
    betas: tuple[float, ...] = ()


class Root(NamedTuple):
    """One form over one image's whole ball: maps (1, 1, 1, H, C, W)."""

    layers: tuple[Layer, ...]  # without the last
    image: tuple[Tensor, Tensor]
    reach: list[Range]
    points: list[Tensor]
    slopes: list[Tensor]  # of the activations' lines, their mean
    form: Tensor
    constant: float  # the form's, less the room for rounding


@torch.no_grad()
def decide(model: nn.Module, x: Tensor, y: Tensor, eps: float, seconds: float) -> tuple[float, bool]:
    """A lower bound of the image's smallest margin after at most about so many seconds; and whether it is falsified.

    x is (1, channels, height, width) in [0, 1], y (1,) its label, eps a radius in [0, 1]. The time starts when the
    bounds over the whole ball stand. A positive bound verifies; falsified means that an image of the ball was met which
    the model takes for another class.
    """
    found = crown.bounded(model, x, y, eps, FIT)
    bounds, until = found.margins[0], time.monotonic() + seconds
    for other in bounds.argsort().tolist():  # the worst class first: where it stays open, the others do not matter
        if bounds[other] > 0:
            break
        bounds[other], images = _search(model, x, y, eps, root(found, y, other), float(bounds[other]), until)
        if images is not None:
            return float(bounds.min()), True
        if bounds[other] <= 0:
            break
    return float(bounds.min()), False


def root(found: crown.Bounded, y: Tensor, other: int) -> Root:
    """The margin over class `other`, ready to be cut; its lines are fitted to it once."""
    image, reach = crown.windowed(found.layers, found.box, found.ranges)
    forms, constants = crown.differences(found.layers[-1], y)
    form, below = forms[:, :, other : other + 1], found.layers[:-1]
    points = [usual_points(layer, part) for layer, part in zip(below, reach, strict=True)]
    for step in range(FIT):
        around = [lines(*rest) for rest in zip(below, reach, points, strict=True)]
        arguments = crown.minimiser(below, image, around, crown.lower(below, image, around, form)[1])
        aims = map(best_points, below, arguments)
        points = [old + (aim - old) / (step + 1) for old, aim in zip(points, aims, strict=True)]
    slopes = [lines(*rest).slope for rest in zip(below, reach, points, strict=True)]
    return Root(below, image, reach, points, slopes, form, float(constants[0, 0, other] - found.error[0, other]))


def _search(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, whole: Root, bound: float, until: float
) -> tuple[float, Tensor | None]:
    """The form's bound over the ball when all pieces are positive or the time is over; and a misclassified image."""
    number = itertools.count()  # of two pieces alike, the older
    places, images = bounded(whole, pieces := [Piece(bound)])[1:]
    if (wrong := misclassified(model, x, y, eps, images)) is not None:
        return bound, wrong
    heap = [(pieces[0].bound, next(number), pieces[0], places[0])]
    closed = torch.inf
    while heap and time.monotonic() < until:
        batch = [heapq.heappop(heap) for _ in range(min(BATCH, len(heap)))]
        cut = [half for _, _, piece, place in batch for half in halves(whole, piece, place)]
        pieces, places, images = bounded(whole, cut)
        if (wrong := misclassified(model, x, y, eps, images)) is not None:
            return min(piece.bound for piece in pieces), wrong
        for piece, place in zip(pieces, places, strict=True):
            if piece.bound > 0:
                closed = min(closed, piece.bound)
            else:
                heapq.heappush(heap, (piece.bound, next(number), piece, place))
    return min(closed, heap[0][0]) if heap else closed, None


def halves(whole: Root, piece: Piece, place: tuple[int, int]) -> list[Piece]:
    """A piece cut in two at a neuron, (layer, place); until they are bounded anew, its bound holds for both."""
    layer, index = place
    low, high = (float(part.flatten()[index]) for part in (whole.reach[layer].low, whole.reach[layer].high))
    for cut in piece.cuts:
        if cut[:2] == place:
            low, high = (low, min(high, cut.at)) if cut.side > 0 else (max(low, cut.at), high)
    at = 0.0 if whole.layers[layer].activation == "relu" and low < 0 < high else (low + high) / 2
    return [Piece(piece.bound, (*piece.cuts, Cut(layer, index, at, side)), (*piece.betas, 0.0)) for side in (1, -1)]


def bounded(whole: Root, pieces: Sequence[Piece]) -> tuple[list[Piece], list[tuple[int, int]], Tensor]:
    """Pieces with their bounds, never below those they came with; where to cut each next; the images of the minima.

    The images are (N, H, C, W) float64, N the number of pieces. In each round the betas go up where the minimum breaks
    their constraint and down where it keeps it, by half as much as in the round before, and the lines of layers that
    are cut move towards those that are tightest at the minimum.
    """
    cuts = [_Cuts(whole, pieces, number) for number in range(len(whole.layers))]
    reach = [part.ranges() for part in cuts]
    points = whole.points
    best = torch.tensor([piece.bound for piece in pieces], dtype=torch.float64, device=whole.form.device)
    for step in range(ROUNDS):
        around = [lines(*rest) for rest in zip(whole.layers, reach, points, strict=True)]
        around = [line._replace(tilt=part.tilt()) for line, part in zip(around, cuts, strict=True)]
        bound, passed = crown.lower(whole.layers, whole.image, around, whole.form)
        arguments = crown.minimiser(whole.layers, whole.image, around, passed)
        total = bound[:, 0, 0].expand(len(pieces)) + whole.constant + sum(part.constant() for part in cuts)
        better, best = total > best, torch.maximum(best, total)
        for part, slope, form, z in zip(cuts, whole.slopes, passed[1:], arguments, strict=True):
            part.move(better, slope * form, z, 0.5**step)
        points = [
            old + (best_points(part.layer, z) - old) / (step + 2) if len(part.rows) else old
            for part, old, z in zip(cuts, points, arguments, strict=True)
        ]
    cost = [
        form.abs() * (line.half_slope * (z - part.layer.bias[:, None]) + line.half_intercept)
        for part, line, form, z in zip(cuts, around, passed[1:], arguments, strict=True)
    ]
    chosen = _largest([part.expand(len(pieces), *part.shape[1:]).flatten(1) for part in cost])
    betas: list[dict[int, float]] = [{} for _ in pieces]
    for part in cuts:
        for row, order, beta in zip(part.rows.tolist(), part.order, part.kept.tolist(), strict=True):
            betas[row][order] = beta
    made = [
        Piece(value, piece.cuts, tuple(beta[order] for order in range(len(piece.cuts))))
        for value, piece, beta in zip(best.tolist(), pieces, betas, strict=True)
    ]
    images = whole.image[0] - passed[0].sign() * whole.image[1]
    return made, chosen, images.expand(len(pieces), *images.shape[1:])[:, 0, 0]


def _largest(costs: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Layer and place of the largest entry of each row, over all layers' (N, places)."""
    values, places = zip(*(cost.max(1) for cost in costs), strict=True)
    layers = torch.stack(values).argmax(0).tolist()
    return [(layer, int(places[layer][row])) for row, layer in enumerate(layers)]


def misclassified(model: nn.Module, x: Tensor, y: Tensor, eps: float, images: Tensor) -> Tensor | None:
    """The first of some inputs (N, H, C, W), moved into the ball as an attack does, that is taken for another class."""
    before, images = front(model), images.transpose(1, 2)
    images = before.undo(images) if before else images
    near = (images.to(x.dtype) - x).clamp(-eps, eps)
    near = (x + near).clamp(0, 1)
    wrong = (evaluation.predict(model, near) != y).nonzero()[:, 0]
    return near[wrong[:1]] if len(wrong) else None


class _Cuts:
    """All cuts of some pieces at one layer: rows (which piece), places, positions, sides, and betas, (K,) each."""

    def __init__(self, whole: Root, pieces: Sequence[Piece], number: int) -> None:
        self.layer, self.reach, self.count = whole.layers[number], whole.reach[number], len(pieces)
        found = [
            (row, order, cut, beta)
            for row, piece in enumerate(pieces)
            for order, (cut, beta) in enumerate(zip(piece.cuts, piece.betas, strict=True))
            if cut.layer == number
        ]
        self.order = [order for _, order, _, _ in found]
        like = {"dtype": torch.float64, "device": self.reach.low.device}
        self.rows = torch.tensor([row for row, *_ in found], dtype=torch.int64, device=like["device"])
        self.places = torch.tensor([cut.place for _, _, cut, _ in found], dtype=torch.int64, device=like["device"])
        self.at = torch.tensor([cut.at for _, _, cut, _ in found], **like)
        self.side = torch.tensor([cut.side for _, _, cut, _ in found], **like)
        self.beta = self.kept = torch.tensor([beta for *_, beta in found], **like)
        self.scale: Tensor | None = None
        # of beta (z - at): z's own bias, and what float32's rounding and float64's may do to it
        at_places = [part.expand_as(self.reach.low).flatten()[self.places] for part in self._about()]
        self.bias, rounding, slack = at_places
        self.room = rounding + slack + 8 * FLOAT64 * (self.bias.abs() + self.at.abs() + rounding)

    def _about(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.layer.bias[:, None], self.reach.rounding, self.layer.slack.max()

    def ranges(self) -> Range:
        """The layer's ranges in each piece, (N, 1, 1, H, C, W); as they were, with N = 1, where nothing is cut."""
        if not len(self.rows):
            return self.reach
        shape = (self.count, *self.reach.low.shape[1:])
        low, high = (part.expand(shape).reshape(self.count, -1).clone() for part in self.reach[:2])
        index, upper = self.rows * low.shape[1] + self.places, self.side > 0
        high.view(-1).scatter_reduce_(0, index[upper], self.at[upper], "amin")
        low.view(-1).scatter_reduce_(0, index[~upper], self.at[~upper], "amax")
        found = enclose(self.layer, low.view(shape), high.view(shape), self.reach.rounding)
        return found._replace(inside=self.reach.inside)

    def tilt(self) -> Tensor | float:
        """What the multipliers add to a form in each piece, (N, 1, 1, H, C, W)."""
        if not len(self.rows):
            return 0.0
        tilt = torch.zeros(self.count, self.reach.low.numel(), dtype=torch.float64, device=self.at.device)
        tilt.index_put_((self.rows, self.places), self.side * self.beta, accumulate=True)
        return tilt.view(self.count, *self.reach.low.shape[1:])

    def constant(self) -> Tensor:
        """What the multipliers add to a bound in each piece, (N,)."""
        each = self.beta * (self.side * (self.bias - self.at) - self.room)
        return torch.zeros(self.count, dtype=torch.float64, device=self.at.device).index_add(0, self.rows, each)

    def move(self, better: Tensor, size: Tensor, z: Tensor, share: float) -> None:
        """Keep betas that made a better bound; then a step, a share of the form's own size at the neuron."""
        if not len(self.rows):
            return
        self.kept = torch.where(better[self.rows], self.beta, self.kept)
        z, size = (part.expand(self.count, *part.shape[1:]).flatten(1)[self.rows, self.places] for part in (z, size))
        self.scale = size.abs() if self.scale is None else self.scale
        broken = self.side * (z - self.at)
        self.beta = (self.beta + share * self.scale * broken.sign()).clamp(min=0)

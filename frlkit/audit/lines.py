"""Two lines around an activation, over the range that its argument can have: the relaxation that CROWN propagates.

For tanh they are a chord or a tangent, for ReLU the chord above and any slope from 0 to 1 below (Zhang et al., 2018);
where a tangent touches, or ReLU's slope, is free: `points` (Xu et al., 2021).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from frlkit.audit.layers import Layer, pooled

PAD = 1e-14  # more than the roundings of a line over arguments of size 1, in float64
TINY = 1e-300  # keeps 0 / 0 away


class Range(NamedTuple):
    """Where an activation's argument lies, maps (N, 1, H, C, W), and for tanh how far its tangents may reach.

    Or windows of such maps, (N, P, 1, h, C, w).
    """

    low: Tensor
    high: Tensor
    last: Tensor  # a tangent from `low` to here stays below tanh; less than `low` where none does
    first: Tensor  # a tangent from here to `high` stays above
    rounding: Tensor  # how far float32's argument may be from the exact one, given the layer's input
    inside: Tensor  # 1, and 0 where a window reaches over the map's edge


class Lines(NamedTuple):
    """The two lines around an activation, as their mean and half of upper less lower.

    They are functions of what the convolution puts out, before its bias, in exact arithmetic; and they leave room for
    float32's rounding of that.
    """

    slope: Tensor
    half_slope: Tensor
    intercept: Tensor
    half_intercept: Tensor
    tilt: Tensor | float = 0.0  # added to a form behind the lines: multipliers of constraints on the argument


def activations(layer: Layer, around: Range) -> Tensor:
    """Bounds of the absolute values that a layer puts out, map (N, 1, H, C, W), pooled."""
    size = torch.maximum(-around.low, around.high) if layer.activation == "tanh" else around.high.clamp(min=0)
    size = size.tanh() if layer.activation == "tanh" else size
    return pooled(size[:, 0].transpose(1, 2), layer.pool).transpose(1, 2)[:, None]


def enclose(layer: Layer, low: Tensor, high: Tensor, error: Tensor) -> Range:
    """The range of an activation's argument, with the outermost tangents of tanh, found by bisection."""
    last, first = low, high
    if layer.activation == "tanh":
        last, first = _last_tangent(low, high), -_last_tangent(-high, -low)
    return Range(low, high, last, first, error, torch.ones_like(low))


def _last_tangent(low: Tensor, high: Tensor) -> Tensor:
    """The largest d whose tangent stays below tanh on [low, high], from beneath; below `low` where there is none.

    Where tanh is convex, all do. Else the tangent at a d < 0 must pass below the right end, and those further left do.
    """
    end = high.tanh()

    def above(d: Tensor) -> Tensor:
        return d.tanh() + (1 - d.tanh().square()) * (high - d) > end

    left, right = low, high.clamp(max=0)
    none = above(low) | (low >= 0)
    for _ in range(20):
        middle = (left + right) / 2
        left, right = torch.where(above(middle), left, middle), torch.where(above(middle), middle, right)
    return torch.where(high <= 0, high, torch.where(none, low - 1, left))


def usual_points(layer: Layer, around: Range) -> Tensor:
    """The points of plain CROWN: tanh's tangents touch in the middle, or as near to it as they may.

    ReLU's lower line is whichever of 0 and z is nearer.
    """
    if layer.activation == "relu":
        return (around.high > -around.low).double()
    return (around.low + around.high) / 2


def best_points(layer: Layer, z: Tensor) -> Tensor:
    """The points whose lines are the tightest where the argument is z."""
    return (z > 0).double() if layer.activation == "relu" else z


def lines(layer: Layer, around: Range, points: Tensor) -> Lines:
    """The lines below and above an activation over a range; mean pooling's factor and max pooling's choice included.

    `points`, of the range's shape or with more forms, say where tanh's tangents touch if they may, and ReLU's slope
    below. Any values give lines on the right side.
    """
    if layer.activation == "tanh":
        low = _below_tanh(around.low, around.high, around.last, points)
        above = _below_tanh(-around.high, -around.low, -around.first, -points)  # tanh is odd
        high = above[0], -above[1]
    else:
        low, high = _around_relu(layer, around.low, around.high, points.clamp(0, 1))
    share = around.inside * (0.125 if layer.pool == "mean" else 0.5)
    slope, half_slope = share * (low[0] + high[0]), share * (high[0] - low[0])
    intercept, half_intercept = share * (low[1] + high[1]), share * (high[1] - low[1])
    bias = layer.bias[:, None]
    pad = share * PAD * (1 + around.low.abs() + around.high.abs()) + (slope.abs() + half_slope.abs()) * around.rounding
    return Lines(slope, half_slope, intercept + slope * bias, half_intercept + half_slope * bias + pad)


def _below_tanh(low: Tensor, high: Tensor, last: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and intercept of a line below tanh: a tangent between `low` and `last`, or the chord where none is."""
    points = torch.maximum(torch.minimum(points, last), low)
    value = points.tanh()
    tangent = 1 - value * value
    chord = (high.tanh() - low.tanh()) / (high - low).clamp(min=1e-12)  # if narrower, a flatter line from `low`
    curved = last >= low
    slope = torch.where(curved, tangent, chord)
    return slope, torch.where(curved, value - tangent * points, low.tanh() - chord * low)


def _around_relu(layer: Layer, low: Tensor, high: Tensor, slopes: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    """Slopes and intercepts below and above relu(z), or, under max pooling, of one z of each cell, 0 for the others.

    The maximum of a cell is at least any relu(z), here that with the highest middle; and at most max(z, rival), where
    z is the one that may be largest, and `rival` what the others, and 0, may be at most: a ReLU with its bend there.
    """
    rival, lowest, highest = torch.zeros_like(low), 1.0, 1.0
    if layer.pool == "max":
        cells = _cells(high)
        top, place = cells.topk(2, -1)
        rival = _uncells(top[..., 1:].clamp(min=0).expand_as(cells))
        highest = _uncells(F.one_hot(place[..., 0], 4).double())
        lowest = _uncells(F.one_hot(_cells(low + high).argmax(-1), 4).double())
    slope = torch.where(low >= 0, 1.0, torch.where(high <= 0, 0.0, slopes)) * lowest
    chord = torch.where(low >= rival, 1.0, (high - rival).clamp(min=0) / (high - low).clamp(min=TINY))
    intercept = torch.where(low >= rival, 0.0, rival - chord * low)
    return (slope, torch.zeros_like(slope)), (chord * highest, intercept * highest)


def _cells(maps: Tensor) -> Tensor:
    """(..., H, C, W) -> (..., H / 2, C, W / 2, 4)."""
    return maps.unflatten(-1, (-1, 2)).unflatten(-4, (-1, 2)).movedim(-4, -2).flatten(-2)


def _uncells(cells: Tensor) -> Tensor:
    return cells.unflatten(-1, (2, 2)).movedim(-2, -4).flatten(-2).flatten(-4, -3)

"""Sound lower bounds of a network's margins in the l-infinity ball: CROWN, linear bounds propagated backwards.

A linear form in a layer's output is carried back through the chain (`layers`), each activation replaced by the line
(`lines`) that makes the form smaller, down to the image, where its minimum over a box is known (Zhang et al., 2018).
The ranges of the activations' arguments are bounded in the same way, layer after layer.

Which lines of all sound ones are used is free, and may differ from form to form (Xu et al., 2021, choose by gradient
ascent). Here each line is moved to where it is tightest at the image that minimises the form, and the form minimised
anew: a game in which each side answers the mean of the other's moves. One or two rounds come close to its value.

With maps as (..., height, channels, width), a convolution's transpose is one matrix product and k shifted sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frlkit import KitError
from frlkit.audit.layers import Layer, ball, front, network, rounding
from frlkit.audit.lines import Lines, Range, activations, best_points, enclose, lines, usual_points

WORK = 2**19  # numbers in the largest array of a propagation: what a processor's cache likes


class Grid(NamedTuple):
    """Where windows of a map lie: `count` of them along each side, `stride` apart, the first at `start`."""

    start: int
    stride: int
    count: int
    side: int  # of a window


def margins(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int = 0) -> Tensor:
    """Lower bounds of z_y - z_j over the l-infinity ball within [0, 1], (N, C) float64; infinity at j = y.

    Where a row is positive, no image of the ball is classified as anything but y, when run in float32.

    Parameters
    ----------
    model : a network that `network` takes
    x, y : (N, channels, height, width) floats in [0, 1], and (N,) int64 labels
    eps : radius in [0, 1]
    steps : rounds in which the lines are fitted to each bound; 0 is plain CROWN

    Raises `KitError` for a radius out of range and a network that is not supported.
    """
    return bounded(model, x, y, eps, steps).margins


class Bounded(NamedTuple):
    """What `margins` finds on its way to them."""

    layers: tuple[Layer, ...]
    box: tuple[Tensor, Tensor]
    ranges: list[Range]
    error: Tensor  # (N, C): what is taken off each form's bound for rounding
    margins: Tensor


@torch.no_grad()
def bounded(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int = 0) -> Bounded:
    """As `margins`, with all that they follow from."""
    if not 0 <= eps <= 1:
        raise KitError(f"eps = {eps} is not allowed: use a radius from 0 to 1, such as 8 / 255")
    layers = network(model, x)
    box = ball(x, eps, front(model))
    ranges = pre_activations(layers, box, steps)
    bounds = tightest(layers, box, ranges, *differences(layers[-1], y), steps)[:, 0]
    error = layers[-1].slack.flatten() + rounding(layers[-1], _into(layers, box, ranges)).flatten(1)
    error = error + error.gather(1, y[:, None])
    return Bounded(layers, box, ranges, error, (bounds - error).scatter(1, y[:, None], torch.inf))


def _into(layers: Sequence[Layer], box: tuple[Tensor, Tensor], ranges: Sequence[Range]) -> Tensor:
    """Bounds of the absolute values that go into the layer above the ranges, map (N, 1, H, C, W)."""
    return activations(layers[len(ranges) - 1], ranges[-1]) if ranges else box[0].abs() + box[1]


def differences(last: Layer, y: Tensor) -> tuple[Tensor, Tensor]:
    """The forms z_y - z_j in the last layer's input, (N, 1, C, k, in, k), and their constants, (N, 1, C)."""
    weight = last.weight.transpose(1, 2)
    return (weight[y][:, None] - weight)[:, None], (last.bias[y][:, None] - last.bias)[:, None]


def pre_activations(layers: Sequence[Layer], box: tuple[Tensor, Tensor], steps: int = 0) -> list[Range]:
    """The ranges of the arguments of all activations over a box, layer after layer."""
    ranges: list[Range] = []
    for number, layer in enumerate(layers[:-1], 1):
        both = torch.cat([layer.weight, -layer.weight]).transpose(1, 2)[None, None]  # the forms z and -z
        found = tightest(layers[:number], box, ranges, both, torch.cat([layer.bias, -layer.bias]), steps)
        found = found.view(-1, layer.side, layer.side, 2, len(layer.bias)).permute(0, 3, 1, 4, 2)
        error = rounding(layer, _into(layers, box, ranges))
        low, high = found[:, :1] - layer.slack - error, layer.slack + error - found[:, 1:]
        ranges.append(enclose(layer, low, high, error))
    return ranges


def tightest(
    layers: Sequence[Layer],
    box: tuple[Tensor, Tensor],
    ranges: Sequence[Range],
    forms: Tensor,
    constants: Tensor,
    steps: int = 0,
) -> Tensor:
    """Lower bounds, (N, P, S), of linear forms in the windows of the last layer, over the box.

    `forms` is (N or 1, 1, S, k, in, k). In each step the lines move, for each form on its own, to the mean of those
    that were tightest where the form had its minimum. The best bound counts, so more steps never loosen it.
    """
    below = layers[:-1]
    *_, at_image = _grids(layers)
    image, reach = windowed(layers, box, ranges)
    usual = [usual_points(layer, part) for layer, part in zip(below, reach, strict=True)]
    plain = [lines(*rest) for rest in zip(below, reach, usual, strict=True)]
    largest = max([at_image.side**2 * forms.shape[-2], *(part.low[0, 0].numel() for part in reach)])
    best = []
    for part in forms.split(max(1, WORK // (len(box[0]) * at_image.count**2 * largest)), 2):
        points, around = usual, plain
        bound, signs = lower(below, image, around, part)
        for step in range(steps if below else 0):
            arguments = minimiser(below, image, around, signs)
            aims = map(best_points, below, arguments)
            points = [old + (aim - old) / (step + 1) for old, aim in zip(points, aims, strict=True)]  # their mean
            around = [lines(*rest) for rest in zip(below, reach, points, strict=True)]
            found, signs = lower(below, image, around, part)
            bound = torch.maximum(bound, found)
        best.append(bound)
    return torch.cat(best, 2) + constants


def windowed(
    layers: Sequence[Layer], box: tuple[Tensor, Tensor], ranges: Sequence[Range]
) -> tuple[tuple[Tensor, Tensor], list[Range]]:
    """Box and ranges cut to the windows that the last layer's positions see."""
    *grids, at_image = _grids(layers)
    middle, half = (_windows(part, at_image) for part in box)
    reach = [Range(*(_windows(part, grid) for part in parts)) for parts, grid in zip(ranges, grids, strict=True)]
    return (middle, half), reach


def _grids(layers: Sequence[Layer]) -> list[Grid]:
    """The windows of each layer's convolution output, and last of the image, that the last layer's positions see."""
    last = layers[-1]
    grid, grids = Grid(-last.padding, 1, last.side, last.weight.shape[-1]), []
    for layer in reversed(layers[:-1]):
        if layer.pool:
            grid = Grid(2 * grid.start, 2 * grid.stride, grid.count, 2 * grid.side)
        grids.append(grid)
        grid = grid._replace(start=grid.start - layer.padding, side=grid.side + layer.weight.shape[-1] - 1)
    return [*reversed(grids), grid]


def lower(
    layers: Sequence[Layer], image: tuple[Tensor, Tensor], around: Sequence[Lines], forms: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Lower bounds over a box, (N, P, S), of linear forms in windows of the last layer's pooled activations.

    `forms` is (N or 1, P or 1, S, h, C, w): images, windows, forms, and a window's rows, channels, columns. Also what
    the form has become at the image and at each activation from there on: its signs say where the minimum is.
    """
    total: Tensor | float = 0.0
    passed = []
    for layer, line in zip(reversed(layers), reversed(around), strict=True):
        if layer.pool:
            forms = forms.repeat_interleave(2, 3).repeat_interleave(2, 5)
        passed.append(forms)
        size = forms.abs()
        total = total + _dot(forms, line.intercept) - _dot(size, line.half_intercept)
        forms = torch.addcmul(forms * line.slope, size, line.half_slope, value=-1) + line.tilt
        forms = _transposed(forms, layer.weight)
    return total + _dot(forms, image[0]) - _dot(forms.abs(), image[1]), [forms, *reversed(passed)]


def minimiser(
    layers: Sequence[Layer], image: tuple[Tensor, Tensor], around: Sequence[Lines], passed: Sequence[Tensor]
) -> list[Tensor]:
    """The arguments of the activations, (N, P, S, h, C, w) each, where forms take the minimum that `lower` finds."""
    flow = image[0] - passed[0].sign() * image[1]
    arguments = []
    for layer, line, forms in zip(layers, around, passed[1:], strict=True):
        z = _convolved(flow, layer.weight)
        arguments.append(z + layer.bias[:, None])
        sign = forms.sign()
        flow = (line.slope - sign * line.half_slope) * z + line.intercept - sign * line.half_intercept
        if layer.pool:
            flow = flow.unflatten(5, (-1, 2)).unflatten(3, (-1, 2)).sum((4, 7))
    return arguments


def _windows(maps: Tensor, grid: Grid) -> Tensor:
    """(N, 1, H, C, W) -> (N, P, 1, side, C, side), zero outside the map."""
    before = -grid.start
    after = grid.start + grid.stride * (grid.count - 1) + grid.side - maps.shape[2]
    padded = F.pad(maps, (before, after, 0, 0, before, after))
    cut = padded.unfold(2, grid.side, grid.stride).unfold(4, grid.side, grid.stride)
    return cut.permute(0, 2, 4, 1, 5, 3, 6).flatten(1, 2)  # from (N, 1, rows, C, columns, side, side)


def _dot(forms: Tensor, maps: Tensor) -> Tensor:
    """Sums over windows: forms (N or 1, P or 1, S, window), maps (N, P, S or 1, window) -> (N, P, S)."""
    forms, maps = forms.flatten(3), maps.flatten(3)
    if maps.shape[2] > 1:
        return (forms * maps).sum(3)
    if forms.shape[:2] == (1, 1):
        return maps[:, :, 0] @ forms[0, 0].T
    return (forms @ maps.mT)[..., 0]


def _rows(weight: Tensor, width: int) -> Tensor:
    """A convolution of rows of `width` columns as a matrix, (out, columns - k + 1, k, in, columns)."""
    out, channels, side, _ = weight.shape
    rows = weight.new_zeros(out, width - side + 1, side, channels, width)
    for column in range(width - side + 1):
        rows[:, column, :, :, column : column + side] = weight.transpose(1, 2)
    return rows


def _transposed(forms: Tensor, weight: Tensor) -> Tensor:
    """The transpose of a convolution: (N, P, S, h, out, w) -> (N, P, S, h + k - 1, in, w + k - 1)."""
    (*lead, height, out, width), side = forms.shape, weight.shape[-1]
    rows = _rows(weight, width + side - 1)
    spread = (forms.reshape(-1, out * width) @ rows.flatten(0, 1).flatten(1)).view(-1, height, *rows.shape[2:])
    result = spread.new_zeros(len(spread), height + side - 1, *rows.shape[3:])
    for row in range(side):
        result[:, row : row + height] += spread[:, :, row]
    return result.view(*lead, *result.shape[1:])


def _convolved(maps: Tensor, weight: Tensor) -> Tensor:
    """A convolution: (N, P, S, h, in, w) -> (N, P, S, h - k + 1, out, w - k + 1)."""
    (*lead, height, channels, width), side = maps.shape, weight.shape[-1]
    rows = _rows(weight, width).permute(2, 0, 1, 3, 4)  # (k, out, columns - k + 1, in, columns)
    spread = maps.reshape(-1, channels * width) @ rows.flatten(0, 2).flatten(1).T
    spread = spread.view(-1, height, *rows.shape[:3])
    result = spread[:, : height - side + 1, 0].clone()
    for row in range(1, side):
        result += spread[:, row : row + height - side + 1, row]
    return result.view(*lead, *result.shape[1:])

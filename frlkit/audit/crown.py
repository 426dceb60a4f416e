"""Sound lower bounds of a network's margins in the l-infinity ball: CROWN, linear bounds propagated backwards.

A linear form in a layer's output is carried back through the chain (`layers`), each activation replaced by the line
(`lines`) that makes the form smaller, down to the image, where its minimum over a box is known (Zhang et al., 2018).
The ranges of the activations' arguments are bounded in the same way, layer after layer. The lines may be tilted: steps
of Adam look for those that give the highest bound (Xu et al., 2021), sound whatever they find.

With maps as (..., height, channels, width), a convolution's transpose is one matrix product and k shifted sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frlkit.audit.layers import Layer, ball, check_forward, network, rounding
from frlkit.audit.lines import Lines, Range, activations, enclose, lines, upright

WORK = 2**19  # numbers in the largest array of a propagation: what a processor's cache likes


class Grid(NamedTuple):
    """Where windows of a map begin: `count` of them along each side, `stride` apart, the first at `start`."""

    start: int
    stride: int
    count: int


@torch.no_grad()
def margins(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int = 0) -> Tensor:
    """Lower bounds of z_y - z_j over the l-infinity ball within [0, 1], (N, C) float64; infinity at j = y.

    Where a row is positive, no image of the ball is classified as anything but y, when run in float32.

    Parameters
    ----------
    model : a network that `network` takes
    x, y : (N, channels, height, width) floats in [0, 1], and (N,) int64 labels
    eps : radius in [0, 1]
    steps : of Adam for tilting the lines below each fully connected layer; 0 is plain CROWN
    """
    layers = network(model)
    check_forward(layers, model, x)
    box = ball(x, eps)
    ranges = pre_activations(layers, box, steps)
    bounds = tightest(layers, box, ranges, *differences(layers[-1], y), steps)[:, 0]
    error = layers[-1].slack.flatten() + rounding(layers[-1], _into(layers, box, ranges)).flatten(1)
    return (bounds - error.gather(1, y[:, None]) - error).scatter(1, y[:, None], torch.inf)


def _into(layers: Sequence[Layer], box: tuple[Tensor, Tensor], ranges: Sequence[Range]) -> Tensor:
    """Bounds of the absolute values that go into the layer above the ranges, map (N, 1, H, C, W)."""
    return activations(layers[len(ranges) - 1], ranges[-1]) if ranges else box[0] + box[1]


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
    """Lower bounds, (N, positions, S), of linear forms in the windows of the last layer, over the box.

    `forms` is (N or 1, 1, S, k, in, k). Lines are tilted, for each form on its own, where there is but one position.
    """
    below, grid = layers[:-1], Grid(-layers[-1].padding, 1, layers[-1].side)
    tilts = [upright(layer, part) for layer, part in zip(below, ranges, strict=True)]
    around = [lines(layer, *rest) for layer, *rest in zip(below, ranges, tilts, strict=True)]
    rows = max(1, WORK // (len(box[0]) * grid.count**2 * _widest(below, forms)))
    parts = []
    for part in forms.split(rows, 2):
        parts.append(lower(below, box, around, part, grid))
        if steps and below and grid.count == 1:
            parts[-1] = torch.maximum(parts[-1], _tilted(below, box, ranges, tilts, part, steps))
    return torch.cat(parts, 2) + constants


def _widest(layers: Sequence[Layer], forms: Tensor) -> int:
    """Numbers in a form's largest window on the way back to the image."""
    side, most = forms.shape[-1], forms[0, 0, 0].numel()
    for layer in reversed(layers):
        side = 2 * side if layer.pool else side
        most = max(most, side**2 * len(layer.bias))
        side += layer.weight.shape[-1] - 1
    return most


def _tilted(
    layers: Sequence[Layer],
    box: tuple[Tensor, Tensor],
    ranges: Sequence[Range],
    tilts: Sequence[Tensor],
    forms: Tensor,
    steps: int,
) -> Tensor:
    """The best bounds (N, 1, S) that so many steps of Adam from the given tilts find."""
    tilts = [tilt.expand(-1, -1, forms.shape[2], -1, -1, -1).clone().requires_grad_() for tilt in tilts]
    optimizer = torch.optim.Adam(tilts, lr=0.1)
    best = torch.tensor(-torch.inf)
    for _ in range(steps):
        with torch.enable_grad():
            around = [lines(layer, *rest) for layer, *rest in zip(layers, ranges, tilts, strict=True)]
            bounds = lower(layers, box, around, forms, Grid(0, 1, 1))
            optimizer.zero_grad()
            (-bounds.sum()).backward()
        best = torch.maximum(best, bounds.detach())
        optimizer.step()
        for tilt in tilts:
            tilt.data.clamp_(0, 1)
    return best


def lower(
    layers: Sequence[Layer], box: tuple[Tensor, Tensor], around: Sequence[Lines], forms: Tensor, grid: Grid
) -> Tensor:
    """Lower bounds over a box, (N, P, S), of linear forms in windows of the last layer's pooled activations.

    `forms` is (N or 1, P or 1, S, h, C, w): images, windows (`grid`), forms, and a window's rows, channels, columns.
    """
    total: Tensor | float = 0.0
    for layer, enclosure in zip(reversed(layers), reversed(around), strict=True):
        if layer.pool:
            forms = forms.repeat_interleave(2, 3).repeat_interleave(2, 5)
            grid = Grid(2 * grid.start, 2 * grid.stride, grid.count)
        slope, half_slope, intercept, half_intercept = (_windows(part, grid, forms.shape[-1]) for part in enclosure)
        size = forms.abs()
        total = total + _dot(forms, intercept) - _dot(size, half_intercept)
        forms = torch.addcmul(forms * slope, size, half_slope, value=-1)
        forms = _transposed(forms, layer.weight)
        grid = grid._replace(start=grid.start - layer.padding)
    middle, half = (_windows(part, grid, forms.shape[-1]) for part in box)
    return total + _dot(forms, middle) - _dot(forms.abs(), half)


def _windows(maps: Tensor, grid: Grid, side: int) -> Tensor:
    """(N, S, H, C, W) -> (N, P, S, side, C, side), zero outside the map."""
    before = -grid.start
    after = grid.start + grid.stride * (grid.count - 1) + side - maps.shape[2]
    padded = F.pad(maps, (before, after, 0, 0, before, after))
    cut = padded.unfold(2, side, grid.stride).unfold(4, side, grid.stride)  # (N, S, rows, C, columns, side, side)
    return cut.permute(0, 2, 4, 1, 5, 3, 6).flatten(1, 2)


def _dot(forms: Tensor, maps: Tensor) -> Tensor:
    """Sums over windows: forms (N or 1, P or 1, S, window), maps (N, P, S or 1, window) -> (N, P, S)."""
    forms, maps = forms.flatten(3), maps.flatten(3)
    if maps.shape[2] > 1:
        return (forms * maps).sum(3)
    if forms.shape[:2] == (1, 1):
        return maps[:, :, 0] @ forms[0, 0].T
    return (forms @ maps.mT)[..., 0]


def _transposed(forms: Tensor, weight: Tensor) -> Tensor:
    """The transpose of a convolution: (N, P, S, h, out, w) -> (N, P, S, h + k - 1, in, w + k - 1)."""
    (*lead, height, _, width), (out, channels, side, _) = forms.shape, weight.shape
    rows = weight.new_zeros(out, width, side, channels, width + side - 1)  # one row of a map -> k rows
    for column in range(width):
        rows[:, column, :, :, column : column + side] = weight.transpose(1, 2)
    spread = forms.reshape(-1, out * width) @ rows.view(out * width, -1)
    spread = spread.view(-1, height, side, channels, width + side - 1)
    result = spread.new_zeros(len(spread), height + side - 1, channels, width + side - 1)
    for row in range(side):
        result[:, row : row + height] += spread[:, :, row]
    return result.view(*lead, *result.shape[1:])

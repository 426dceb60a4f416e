"""Projected gradient descent (PGD), the attack that trains, evaluates and, one radius per sample, remargins.

Radii and step sizes are in the images' own unit, [0, 1]: write ``8 / 255``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frlkit import KitError, kernels
from frlkit.distributed import share_out

LOSSES = ("ce", "kl", "margin")


def logits(model: nn.Module, x: Tensor) -> Tensor:
    """``model(x)``, (N, C), through a fast path where one serves this model: the same numbers but for rounding."""
    path = kernels.fast(model, image_gradient=x.requires_grad)
    return path.forward(model, x) if path else model(x)


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    step_size: float | Tensor,
    steps: int,
    *,
    random_start: bool | float | str = True,
    restarts: int = 1,
    loss: str = "ce",
    generator: torch.Generator | None = None,
    only: Tensor | None = None,
) -> Tensor:
    """Maximise a loss within the l-infinity ball around each image, by signed gradient steps (Madry et al., 2018).

    Each step is ``x' <- clip(x' + step_size * sign(d loss / d x'))`` onto [max(0, x - eps), min(1, x + eps)]. The model
    runs in eval mode; afterwards its mode and its parameters' ``requires_grad`` are as before; none gets a gradient.

    Parameters
    ----------
    model : network from images to logits (N, C)
    x : (N, channels, height, width), floats in [0, 1]
    y : (N,), int64 labels; with ``loss="kl"`` they are only checked
    eps, step_size : radius and step in [0, 1], a number or one value per sample, (N,)
    steps : number of steps, 0 or more
    random_start : True starts uniformly in the ball, a number such as 2/3 within that share of the radius, False at x,
        "gaussian" at x + 0.001 * normal noise (TRADES)
    restarts : tries with fresh starts; each sample keeps the try with the largest margin (``kl``: largest divergence)
    loss : "ce" cross-entropy; "kl" KL(p(x) || p(x')), the TRADES attack; "margin" max of the other logits - logit of y
    generator : where the starts come from; None is torch's global generator
    only : (N,) bool, the samples to attack, each from the start that it would have anyway; the others come back as x

    Returns the adversarial batch, shaped as x; where eps is 0 it is x itself. Raises `KitError` for a value out of
    range, by name.
    """
    x = x.detach()
    _check(x, y, steps, random_start, restarts, loss)
    eps, step_size = _per_sample("eps", eps, x), _per_sample("step_size", step_size, x)
    low, high = (x - eps).clamp_(min=0), (x + eps).clamp_(max=1)
    with evaluating(model):
        _check_labels(model, x, y)
        if not (replay := only is None and kernels.graphs.serves(model, x)):
            model = kernels.folded(model)
        targets = outputs(model, x).softmax(1) if loss == "kl" else y
        best, best_score = x, x.new_full(y.shape, -math.inf)
        for _ in range(restarts):
            adversarial = _start(x, eps, random_start, generator).clamp(low, high)
            parts = (x, adversarial, targets, eps, step_size, low, high)
            if only is not None:
                parts = tuple(part[only] for part in parts)
            adversarial = share_out(partial(_ascend, model, parts, steps, loss, replay), parts[0])
            if only is not None:
                adversarial = x.clone().index_put_((only,), adversarial)
            if restarts == 1:
                return adversarial
            score = objective(outputs(model, adversarial), targets, "margin" if loss == "ce" else loss)
            better = (score > best_score).view(-1, 1, 1, 1)
            best, best_score = torch.where(better, adversarial, best), torch.maximum(score, best_score)
    return best


def n_fgsm(model: nn.Module, x: Tensor, y: Tensor, eps: float, generator: torch.Generator | None = None) -> Tensor:
    """One signed step of length eps from x + uniform noise within twice eps (de Jorge et al., 2022), for training.

    Nothing is clipped to the ball of radius eps, as published, only to [0, 1]; the noise is what keeps single-step
    training from collapsing. Unlike the published code the model runs in eval mode, as in `pgd`. `eps` in [0, 1/3].
    """
    return pgd(model, x, y, 3 * eps, eps, 1, random_start=2 / 3, generator=generator)  # no further than 3 eps: no clip


def objective(logits: Tensor, targets: Tensor, loss: str) -> Tensor:
    """The attacked loss of each sample, (N,): see `pgd`. `targets` are labels, or p(x), (N, C), for "kl"."""
    if loss == "ce":
        return F.cross_entropy(logits, targets, reduction="none")
    if loss == "kl":
        return F.kl_div(logits.log_softmax(1), targets, reduction="none").sum(1)
    own = logits.gather(1, targets[:, None])
    others = logits.scatter(1, targets[:, None], -math.inf)
    return others.amax(1) - own.squeeze(1)


def _ascend(model: nn.Module, parts: tuple[Tensor, ...], steps: int, loss: str, replay: bool, rows: slice) -> Tensor:
    """The steps for some rows of a batch, through a fast path where one serves this model. `parts`: x, the start,
    targets, eps, step_size, and the bounds of the ball within [0, 1]."""
    x, adversarial, targets, eps, step_size, low, high = (part[rows] for part in parts)
    if path := kernels.fast(model):
        return path.pgd(model, x, adversarial, targets, eps.flatten(), step_size.flatten(), steps, loss)
    adversarial, low, high = (part.to(memory_format=kernels.layout(model)) for part in (adversarial, low, high))
    step, others = partial(_step, model, loss), (targets, step_size, low, high)
    if replay:
        return kernels.graphs.repeat(step, model, [adversarial, *others], steps, loss)
    for _ in range(steps):
        adversarial = step(adversarial, *others)
    return adversarial


def _step(
    model: nn.Module, loss: str, adversarial: Tensor, targets: Tensor, step_size: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    adversarial = adversarial.detach().requires_grad_()
    with torch.enable_grad():
        total = objective(logits(model, adversarial), targets, loss).sum()
    (gradient,) = torch.autograd.grad(total, adversarial)
    return torch.addcmul(adversarial.detach(), step_size, gradient.sign()).clamp_(low, high)


def _start(x: Tensor, eps: Tensor, random_start: bool | float | str, generator: torch.Generator | None) -> Tensor:
    if random_start is False:
        return x.clone()
    noise = torch.empty_like(x)
    if random_start == "gaussian":
        return x + noise.normal_(std=0.001, generator=generator)
    return x + random_start * eps * noise.uniform_(-1, 1, generator=generator)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and frozen parameters inside; every module's mode and every flag restored outside, come what may."""
    modes = {module: module.training for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with contextlib.suppress(NotImplementedError):  # of torch.export's programs, which have no modes
            model.eval()
        for parameter in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, requires_grad in flags.items():
            parameter.requires_grad_(requires_grad)


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """Logits (N, C) of images (N, channels, side, side), without a graph, in eval mode, which is then undone: in train
    mode the images would enter the statistics of batch normalisation."""
    with evaluating(model):
        return logits(model, x)


def _check(x: Tensor, y: Tensor, steps: int, random_start: bool | float | str, restarts: int, loss: str) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise KitError(f"x of shape {tuple(x.shape)}, {x.dtype}: an attack takes floats (N, channels, height, width)")
    if x.numel() and not bool(((x >= 0) & (x <= 1)).all()):
        raise KitError(
            f"x has values from {x.min():g} to {x.max():g}: images must lie in [0, 1], without normalisation"
        )
    if y.shape != x.shape[:1] or y.dtype != torch.int64:
        raise KitError(f"y of shape {tuple(y.shape)}, {y.dtype}: give one int64 label for each of the {len(x)} images")
    if loss not in LOSSES:
        raise KitError(f"loss = {loss!r} is unknown: use one of {', '.join(LOSSES)}")
    share = isinstance(random_start, (bool, float)) and 0 <= random_start <= 1
    if not share and random_start != "gaussian":
        raise KitError(f"random_start = {random_start!r}: use True, False, a share of the radius or 'gaussian'")
    for name, value, least in (("steps", steps, 0), ("restarts", restarts, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise KitError(f"{name} = {value!r}: use a whole number, {least} or more")


def _check_labels(model: nn.Module, x: Tensor, y: Tensor) -> None:
    classes = outputs(model, x[:1]).shape[1]
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise KitError(f"y has labels {y.min()} to {y.max()}: this network knows {classes} classes, 0 to {classes - 1}")


def _per_sample(name: str, value: float | Tensor, x: Tensor) -> Tensor:
    """A radius or step of each image, (N, 1, 1, 1); refused by name where it is none."""
    try:
        column = torch.as_tensor(value, dtype=x.dtype, device=x.device)
    except (TypeError, ValueError, RuntimeError):
        column = x.new_tensor(math.nan)
    if column.shape not in ((), x.shape[:1]):
        raise KitError(
            f"{name} has shape {tuple(column.shape)}: use a number or one value for each of the {len(x)} images"
        )
    most = math.inf if column.ndim else 1  # one radius per class may grow beyond 1, a single 8 is a wrong unit
    if not bool((column.isfinite() & (column >= 0) & (column <= most)).all()):
        raise KitError(
            f"{name} = {value!r}: use a number in [0, 1], such as 8 / 255, or one per image, finite and 0 or more"
        )
    return column.expand(len(x)).view(-1, 1, 1, 1)

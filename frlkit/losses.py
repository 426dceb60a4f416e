"""The training loss of a batch, by a run's method: natural, PGD-AT, TRADES, certified, and those of FRL's variants."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frlkit import fairness, interval
from frlkit.attacks import logits, n_fgsm, pgd
from frlkit.recipes import Config, FairConfig

KAPPA = 0.5  # weight of the interval bound's cross-entropy in the certified loss
TINY = torch.finfo(torch.float32).tiny


def loss(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    config: Config,
    generator: torch.Generator,
    balance: fairness.Setting | None = None,
    progress: float = 1.0,
) -> Tensor:
    """The loss of one batch: cross-entropy, clean (natural), attacked (PGD-AT, N-FGSM), or with TRADES' KL term.

    With a `balance`, the loss of a retraining run: every term is a mean weighted by class, and the attack has each
    class's radius. `progress`, in [0, 1], is how much of the training is over.
    """
    if balance is not None and config.method == "certified":
        return _certified_loss(model, x, y, config, balance, progress)
    if balance is not None:
        return _fair_loss(model, x, y, config, generator, balance)
    attack = (config.eps_255 / 255, config.step_255 / 255, config.steps)
    if config.method == "natural":
        return F.cross_entropy(logits(model, x), y)
    if config.method == "pgd_at":
        share = math.ceil(config.attacked * len(x))  # the batch is in random order, so its head is a random share
        adversarial = pgd(model, x[:share], y[:share], *attack, generator=generator)
        return F.cross_entropy(logits(model, torch.cat([adversarial, x[share:]])), y)
    if config.method == "n_fgsm":
        return F.cross_entropy(logits(model, n_fgsm(model, x, y, attack[0], generator)), y)
    adversarial = pgd(model, x, y, *attack, loss="kl", random_start="gaussian", generator=generator)
    clean = logits(model, x)
    return F.cross_entropy(clean, y) + config.beta * (_divergence(logits(model, adversarial), clean).sum() / len(x))


def _fair_loss(
    model: nn.Module, x: Tensor, y: Tensor, config: FairConfig, generator: torch.Generator, balance: fairness.Setting
) -> Tensor:
    """The loss of a retraining run, by its method.

    frl: weighted cross-entropy of the clean images + beta * weighted KL(p(x) || p(x')), the surrogates of R_nat and
    R_bdy (section 4.2 of the paper; the authors' code). pgd_at: weighted cross-entropy of the attacked images.
    report_reweight and report_remargin: what the report's code computes.
    """
    own = balance.radius_factors[y]  # (N,)
    eps, step = config.eps_255 / 255 * own, torch.full_like(own, config.step_255 / 255)
    if config.step != "fixed":
        step = step * (own if config.step == "own" else own.max())
    if config.method == "frl":
        adversarial = pgd(model, x, y, eps, step, config.steps, loss="kl", random_start="gaussian", generator=generator)
        clean, attacked = logits(model, torch.cat([x, adversarial])).chunk(2)
        natural = _weighted_cross_entropy(clean, y, balance.weights_nat)
        boundary = _weighted_divergence(attacked, clean, balance.weights_bdy[y])
        if config.weighting == "printed":  # weights that do not sum to 1 count as they are
            natural, boundary = natural * balance.weights_nat.sum(), boundary * balance.weights_bdy.sum()
        return natural + config.beta * boundary
    share = math.ceil(config.attacked * len(x))
    adversarial = pgd(model, x[:share], y[:share], eps[:share], step[:share], config.steps, generator=generator)
    adversarial = torch.cat([adversarial, x[share:]])
    if config.method == "pgd_at":
        return _weighted_cross_entropy(logits(model, adversarial), y, balance.weights_bdy)
    if config.method == "report_remargin":
        order = torch.randperm(len(x), generator=generator, device=x.device)
        labels = y if config.unshuffled_labels else y[order]
        clean, mixed = logits(model, torch.cat([x, adversarial[order]])).chunk(2)
        return _weighted_cross_entropy(clean, y, balance.weights_nat) + F.cross_entropy(mixed, labels)
    clean, attacked = logits(model, torch.cat([x, adversarial])).chunk(2)
    natural = _weighted_cross_entropy(clean, y, balance.weights_nat)
    if config.predicted_targets:
        return natural + _weighted_cross_entropy(attacked, clean.argmax(1), balance.weights_bdy)
    return natural + _weighted_divergence(attacked, clean, balance.weights_bdy[y])


def _certified_loss(
    model: nn.Module, x: Tensor, y: Tensor, config: FairConfig, balance: fairness.Setting, progress: float
) -> Tensor:
    """(1 - kappa) * weighted cross-entropy of the clean images + kappa * that of the worst logits in the ball, which
    bounds it under any attack (Gowal et al., 2018). Radius and kappa rise over the first `config.ramp` of training."""
    done = interval.warm_up(progress, config.ramp)
    eps, kappa = done * config.eps_255 / 255 * balance.radius_factors[y], done * KAPPA
    natural = _weighted_cross_entropy(logits(model, x), y, balance.weights_nat)
    worst = _weighted_cross_entropy(interval.worst_logits(model, x, y, eps), y, balance.weights_bdy)
    return (1 - kappa) * natural + kappa * worst


def _weighted_cross_entropy(logits: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy, mean over the batch with weights by class (C,); 0 where no class of the batch has any weight."""
    return F.cross_entropy(logits, y, weights) if bool(weights[y].any()) else 0 * logits.sum()


def _weighted_divergence(attacked: Tensor, clean: Tensor, weights: Tensor) -> Tensor:
    """KL(p(x) || p(x')), mean over the batch with the given weights (N,); 0 where all are 0."""
    return (weights * _divergence(attacked, clean).sum(1)).sum() / weights.sum().clamp(min=TINY)


def _divergence(attacked: Tensor, clean: Tensor) -> Tensor:
    """KL(p(x) || p(x')) by class, (N, C). Where a probability is too small for float32, as of anyone's confident
    network, its logarithm has no gradient: it would be NaN."""
    return F.kl_div(attacked.log_softmax(1), clean.softmax(1).clamp(min=TINY), reduction="none")

"""Adversarial training through the solver: the images that a step trains on, its loss, and its weights' perturbation.

Each step of a training asks for three things. `perturb` moves the images inside the ball, by gradients through the
solver on paths that no other part of a training uses. `training_loss` is the loss on them. `perturbed_weights` is the
adversarial weight perturbation, for the time of one gradient.

BatchNorm: images are perturbed with the network in eval mode, as TRADES does it, so that its running statistics see no
attack in progress. The loss is in train mode: BatchNorm normalises by, and learns from, the perturbed batch alone
(``n-fgsm``, ``pgd``), or the clean batch and then the perturbed one, each by its own statistics (``trades``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..attacks.norms import BALLS
from ..attacks.objectives import mean_loss
from ..attacks.targets import EnsembleTarget, Target
from ..models.ensemble import ItoEnsemble
from ..models.recast import ItoResNet
from ..noise.keys import PathRange
from .config import Adversary, Fit

_ENTROPY = 0.5  # weight of the entropy in `consistency_loss`, the paper's for CIFAR-10


def as_training_target(model: ItoResNet, precision: str) -> Target:
    """A network in training as attacks see it: its quick copy as the weights are now, in eval mode.

    Args:
        model: the network; it does not change.
        precision: of the gradients; where a network has none in bfloat16, they are in float32.
    """
    target = EnsembleTarget(ItoEnsemble([model], inferences=1))
    return target.in_bfloat16() if precision == "bfloat16" else target


def divergence(logits: Tensor, clean: Tensor) -> Tensor:
    """KL divergence of the answers from the clean ones, averaged over paths; an objective as those of `OBJECTIVES`.

    Args:
        logits: ``(P, N, classes)``.
        clean: log-probabilities of the clean images, ``(N, classes)``.

    Returns:
        ``(N,)``.
    """
    each = F.kl_div(logits.log_softmax(-1), clean.expand_as(logits), reduction="none", log_target=True)
    return each.sum(-1).mean(0)


def perturb(target: Target, x: Tensor, y: Tensor, adversary: Adversary, paths: PathRange) -> Tensor:
    """The images that a step of the training sees.

    - ``pgd`` (Madry et al. 2018, https://arxiv.org/abs/1706.06083): steps along the gradient of the cross-entropy.
    - ``n-fgsm`` (de Jorge et al. 2022, https://arxiv.org/abs/2202.01181): one step from a start outside of the ball. It
      is not projected, so that the change may be larger than eps.
    - ``trades`` (Zhang et al. 2019, https://arxiv.org/abs/1901.08573): steps along the gradient of the divergence from
      the answer to the clean image on the same path.

    Args:
        target: of `as_training_target`, or any other.
        x, y: images ``(N, C, H, W)`` in [0, 1] and labels ``(N,)``.
        adversary: the settings; not of the method ``none``.
        paths: the first is the start's, then each gradient has a path of its own.

    Returns:
        Images ``(N, C, H, W)`` in [0, 1].
    """
    ball, eps = BALLS[adversary.norm], adversary.radius
    (_, _, start), *_ = paths.by_member(1)
    moved = ball.start(x, adversary.start_share * eps, start[0]).clamp(0, 1)
    for step in range(adversary.iterations):
        path = replace(paths, first=paths.first + 1 + step)
        if adversary.method == "trades":
            clean = target.path_logits(x, path)[0].log_softmax(-1)
            gradient = target.ascend(divergence, moved, clean, path).gradient
        else:
            gradient = target.ascend(mean_loss, moved, y, path).gradient
        moved = moved + adversary.length * ball.steepest(gradient, moved)
        if adversary.method != "n-fgsm":
            moved = ball.project(moved, x, eps)
        moved = moved.clamp(0, 1)
    return moved


def training_loss(
    model: nn.Module, x: Tensor, perturbed: Tensor | None, y: Tensor, keys: Tensor, settings: Fit
) -> tuple[Tensor, Tensor]:
    """The loss of a batch, with its gradient, and logits ``(N, classes)`` by which accuracy is counted.

    Without an adversary it is the cross-entropy on ``x``, with consistency the loss of `consistency_loss`. With
    ``n-fgsm`` and ``pgd`` it is the cross-entropy on the perturbed images, with ``trades`` the cross-entropy on the
    clean ones and ``beta`` times the divergence of the perturbed ones' answers. Clean and perturbed images then ride
    the same path of noise, so that the divergence is that of the perturbation. The logits are those of the perturbed
    images where there are any.

    Args:
        model: the network in train mode; an `ItoResNet` gets the keys.
        x, perturbed, y: images ``(N, C, H, W)``, the same as `perturb` gives them (None without an adversary), labels.
        keys: int64 ``(N,)``, or ``(2, N)`` with consistency: of paths.
        settings: of the training.
    """

    def logits_of(images: Tensor, paths: Tensor) -> Tensor:
        logits = model(images, paths) if isinstance(model, ItoResNet) else model(images)
        return logits.float()

    if settings.consistency:
        logits = torch.stack([logits_of(x, path) for path in keys])
        return mean_loss(logits, y).mean() + consistency_loss(logits, settings.consistency), logits[0]
    if perturbed is None:
        logits = logits_of(x, keys)
        return F.cross_entropy(logits, y), logits
    if settings.adversary.method != "trades":
        logits = logits_of(perturbed, keys)
        return F.cross_entropy(logits, y), logits
    clean = logits_of(x, keys)
    logits = logits_of(perturbed, keys)
    robust = divergence(logits[None], clean.log_softmax(-1)).mean()
    return F.cross_entropy(clean, y) + settings.adversary.beta * robust, logits


def consistency_loss(logits: Tensor, weight: float) -> Tensor:
    """How much the answers on several paths differ (Jeong & Shin 2020, https://arxiv.org/abs/2006.04062, eq. 8).

    It is ``weight`` times the mean divergence of each path's answer from the mean answer, plus half of the entropy of
    the mean answer.

    Args:
        logits: ``(P, N, classes)``.
        weight: of the divergence, the paper's lambda.
    """
    each = logits.log_softmax(-1)
    mean = each.exp().mean(0)
    log_mean = mean.clamp_min(1e-20).log()
    differ = (mean * (log_mean - each)).sum(-1).mean()
    return weight * differ - _ENTROPY * (mean * log_mean).sum(-1).mean()


@contextmanager
def perturbed_weights(model: nn.Module, gamma: float) -> Iterator[None]:
    """Inside, the weights are moved against the training: adversarial weight perturbation.

    Each weight of more than one dimension moves by ``gamma`` times its norm along its gradient (Wu et al. 2020,
    https://arxiv.org/abs/2004.05884, eqs. 7 to 9). The caller has the gradients of the loss in ``.grad``; gradients
    that are taken inside are those at the moved weights. Afterwards the weights are what they were, bit for bit.

    Args:
        model: the network; its gradients are removed.
        gamma: the relative length of the move.
    """
    moved = [p for p in model.parameters() if p.dim() > 1]
    before = [p.detach().clone() for p in moved]
    with torch.no_grad():
        for weight in moved:
            if weight.grad is not None:
                weight.add_(weight.grad * (gamma * weight.norm() / weight.grad.norm().clamp_min(1e-20)))
    model.zero_grad(set_to_none=True)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(moved, before, strict=True):
                weight.copy_(value)


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Inside, the network may change its buffers, such as BatchNorm's statistics; they are put back afterwards."""
    before = [buffer.clone() for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)

"""Objectives: what an attack raises, one number for each image from its logits along several paths."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def zero_invalid(logits: Tensor) -> Tensor:
    """Logits ``(..., classes)``, all 0 along a path where one of them is not finite: such a path prefers no class.

    Otherwise one path that overflows would turn the loss over all paths, and every comparison with it, into NaN.
    """
    return torch.where(logits.isfinite().all(-1, keepdim=True), logits, 0)


def nan_lowest(loss: Tensor) -> Tensor:
    """A loss ``(N,)`` in which NaN, which compares with nothing, becomes the lowest value."""
    return loss.nan_to_num(nan=torch.finfo(loss.dtype).min)


def mean_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy averaged over paths: logits ``(P, N, classes)``, labels ``(N,)`` -> ``(N,)``."""
    p, n, _ = logits.shape
    return F.cross_entropy(zero_invalid(logits).flatten(0, 1), y.repeat(p), reduction="none").view(p, n).mean(0)


def loss_of_mean(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of the mean probability over paths (Athalye et al. 2018, section 4.2)."""
    log_mean = zero_invalid(logits).log_softmax(-1).logsumexp(0) - math.log(len(logits))
    return F.nll_loss(log_mean, y, reduction="none")


def mean_logits(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of the mean logits over paths: the gradient of a single confident path does not vanish."""
    return F.cross_entropy(zero_invalid(logits).mean(0), y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Lead of the best wrong class over the right one, ``(..., N, classes), (N,) -> (..., N)``; above 0 where fooled.

    It is infinite where the logits are not finite: such an inference is never right.
    """
    right = F.one_hot(y, logits.shape[-1]).bool()
    valid, logits = logits.isfinite().all(-1), zero_invalid(logits)
    lead = logits.masked_fill(right, -torch.inf).amax(-1) - logits.masked_fill(~right, 0).sum(-1)
    return torch.where(valid, lead, torch.inf)


def mean_margin(logits: Tensor, y: Tensor) -> Tensor:
    """The margin averaged over paths (Carlini & Wagner 2017, https://arxiv.org/abs/1608.04644)."""
    return margin(zero_invalid(logits), y).mean(0)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio (Croce & Hein 2020, eq. 6), averaged over paths; it is free of the logits' scale."""
    logits = zero_invalid(logits)
    ranked = logits.sort(-1, descending=True).values
    # With two classes there is no third logit: the second one is used instead.
    width = ranked[..., 0] - ranked[..., min(2, logits.shape[-1] - 1)]
    return (margin(logits, y) / (width + 1e-12)).mean(0)


def denial(logits: Tensor, y: Tensor) -> Tensor:
    """A smooth share of the paths on which the right class loses: at a half, the vote abstains."""
    return margin(logits, y).sigmoid().mean(0)


def targeted_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Minus the cross-entropy of the class aimed at, averaged over paths; labels as in `targeted_dlr`."""
    return -mean_loss(logits, labels[:, 1])


def targeted_dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """DLR towards a class (Croce & Hein 2020, eq. 7): labels ``(N, 2)`` are the right class and the class aimed at."""
    logits = zero_invalid(logits)
    right, aim = (column.expand(logits.shape[:-1])[..., None] for column in labels.unbind(1))
    ranked = logits.sort(-1, descending=True).values
    third, fourth = (ranked[..., min(i, logits.shape[-1] - 1)] for i in (2, 3))
    lead = (logits.gather(-1, aim) - logits.gather(-1, right))[..., 0]
    return (lead / (ranked[..., 0] - 0.5 * (third + fourth) + 1e-12)).mean(0)


def targeted_vote(logits: Tensor, labels: Tensor) -> Tensor:
    """A smooth share of the paths on which the class aimed at wins; labels as in `targeted_dlr`."""
    return (-margin(logits, labels[:, 1])).sigmoid().mean(0)


Objective = Callable[[Tensor, Tensor], Tensor]  # logits (P, N, classes), labels (N,) or (N, 2) -> (N,), to be raised
OBJECTIVES: dict[str, Objective] = {
    "mean-loss": mean_loss,
    "loss-of-mean": loss_of_mean,
    "mean-logits": mean_logits,
    "margin": mean_margin,
    "dlr": dlr,
    "denial": denial,
    "targeted-loss": targeted_loss,
    "targeted-dlr": targeted_dlr,
    "targeted-vote": targeted_vote,
}
TARGETED = ("targeted-loss", "targeted-dlr", "targeted-vote")  # these need a class to aim at

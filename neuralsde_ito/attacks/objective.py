"""What an attack climbs, and through which model: losses over paths, and one face for every kind of model."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ensemble import ItoEnsemble
from ..recast import ItoResNet
from ..solvers import find_solver


def mean_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy averaged over paths: logits ``(P, N, classes)``, labels ``(N,)`` -> ``(N,)``."""
    p, n, _ = logits.shape
    return F.cross_entropy(logits.flatten(0, 1), y.repeat(p), reduction="none").view(p, n).mean(0)


def loss_of_mean(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of the mean probability over paths (Athalye et al. 2018, section 4.2)."""
    log_mean = logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))
    return F.nll_loss(log_mean, y, reduction="none")


def mean_logits(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of the mean logits over paths: no path is so confident that its gradient vanishes alone."""
    return F.cross_entropy(logits.mean(0), y, reduction="none")


OBJECTIVES = {"mean-loss": mean_loss, "loss-of-mean": loss_of_mean, "mean-logits": mean_logits}


class Target(Protocol):
    """A model as attacks see it.

    Attributes:
        random: whether two paths differ; if not, one path is all there is.
    """

    random: bool

    def paths(self, x: Tensor, first: int, count: int, seed: int, purpose: str, index: Tensor) -> Tensor:
        """Logits ``(count, N, classes)`` along numbered paths of a panel."""
        ...


class _Module:
    """Any network of images in [0, 1] to logits. If it is randomised, its noise is its own and always fresh."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model = model
        with torch.no_grad():
            # Noise may show seldom: like AutoAttack's check, five forwards of the whole batch.
            first = model(x)
            self.random = any(not torch.equal(model(x), first) for _ in range(4))

    def paths(self, x: Tensor, first: int, count: int, seed: int, purpose: str, index: Tensor) -> Tensor:
        return torch.stack([self.model(x) for _ in range(count)])


class _Ensemble:
    def __init__(self, ensemble: ItoEnsemble) -> None:
        self.paths = ensemble.paths
        noisy = any(member.schedule.omega > 0 for member in ensemble.members)  # type: ignore[union-attr, operator]
        self.random = noisy or len(ensemble.members) > 1
        for member in ensemble.members:
            if find_solver(str(member.solver)).adaptive:
                raise ValueError(
                    f"Solver {member.solver!r} chooses its steps for the whole batch, so that one image's gradient "
                    "depends on the others; attack with a solver of fixed steps."
                )


def as_target(model: nn.Module, x: Tensor) -> Target:
    """The face of a model: an `ItoEnsemble`, an `ItoResNet` (an ensemble of one), or any other module."""
    if isinstance(model, ItoResNet):
        model = ItoEnsemble([model])
    return _Ensemble(model) if isinstance(model, ItoEnsemble) else _Module(model, x)

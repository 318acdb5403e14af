"""What an attack climbs, and through which model: losses over paths, and one face for every kind of model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..engine import in_pieces, out_of_memory, piece_of
from ..ensemble import ItoEnsemble
from ..recast import ItoResNet
from ..sde import well_known
from ..solvers import find_solver
from ..validation import ItoError


def answered(logits: Tensor) -> Tensor:
    """Logits ``(..., classes)``, all 0 along a path where one of them is not finite: such a path prefers no class.

    So one path that overflows does not turn the loss over all paths, and every comparison with it, into NaN.
    """
    return torch.where(logits.isfinite().all(-1, keepdim=True), logits, 0)


def mean_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy averaged over paths: logits ``(P, N, classes)``, labels ``(N,)`` -> ``(N,)``."""
    p, n, _ = logits.shape
    return F.cross_entropy(answered(logits).flatten(0, 1), y.repeat(p), reduction="none").view(p, n).mean(0)


def loss_of_mean(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of the mean probability over paths (Athalye et al. 2018, section 4.2)."""
    log_mean = answered(logits).log_softmax(-1).logsumexp(0) - math.log(len(logits))
    return F.nll_loss(log_mean, y, reduction="none")


def mean_logits(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of the mean logits over paths: no path is so confident that its gradient vanishes alone."""
    return F.cross_entropy(answered(logits).mean(0), y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Lead of the best wrong class over the right one, ``(..., classes), (N,) -> (..., N)``; above 0 it is fooled.

    Infinite where the logits are not finite: such an inference is never right.
    """
    right = F.one_hot(y, logits.shape[-1]).bool()
    valid, logits = logits.isfinite().all(-1), answered(logits)
    lead = logits.masked_fill(right, -torch.inf).amax(-1) - logits.masked_fill(~right, 0).sum(-1)
    return torch.where(valid, lead, torch.inf)


def mean_margin(logits: Tensor, y: Tensor) -> Tensor:
    """The margin averaged over paths (Carlini & Wagner 2017, https://arxiv.org/abs/1608.04644)."""
    return margin(answered(logits), y).mean(0)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio, averaged over paths: no scale of the logits hides it (Croce & Hein 2020, eq. 6)."""
    logits = answered(logits)
    ranked = logits.sort(-1, descending=True).values
    # Two classes have no third logit: the second stands in for it.
    width = ranked[..., 0] - ranked[..., min(2, logits.shape[-1] - 1)]
    return (margin(logits, y) / (width + 1e-12)).mean(0)


def denial(logits: Tensor, y: Tensor) -> Tensor:
    """A smooth count of the paths that the right class loses: what brings a vote down to an abstention."""
    return margin(logits, y).sigmoid().mean(0)


def targeted_dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """DLR towards a class: labels ``(N, 2)``, the right one and the one aimed at (Croce & Hein 2020, eq. 7)."""
    logits = answered(logits)
    right, aim = (column.expand(logits.shape[:-1])[..., None] for column in labels.unbind(1))
    ranked = logits.sort(-1, descending=True).values
    third, fourth = (ranked[..., min(i, logits.shape[-1] - 1)] for i in (2, 3))
    lead = (logits.gather(-1, aim) - logits.gather(-1, right))[..., 0]
    return (lead / (ranked[..., 0] - 0.5 * (third + fourth) + 1e-12)).mean(0)


def targeted_vote(logits: Tensor, labels: Tensor) -> Tensor:
    """A smooth count of the paths that a class wins: labels ``(N, 2)``, the right one and the one aimed at."""
    return (-margin(logits, labels[:, 1])).sigmoid().mean(0)


Objective = Callable[[Tensor, Tensor], Tensor]  # logits (P, N, classes), labels (N,) or (N, 2) -> (N,), to be raised
OBJECTIVES: dict[str, Objective] = {
    "mean-loss": mean_loss,
    "loss-of-mean": loss_of_mean,
    "mean-logits": mean_logits,
    "margin": mean_margin,
    "dlr": dlr,
    "denial": denial,
    "targeted-dlr": targeted_dlr,
    "targeted-vote": targeted_vote,
}
AIMED = ("targeted-dlr", "targeted-vote")  # those that need a class to aim at


class Ascent(NamedTuple):
    """What a model says along some paths, and where an objective rises.

    Attributes:
        loss: ``(N,)``.
        logits: ``(P, N, classes)``.
        gradient: of the summed loss, ``(N, C, H, W)``.
    """

    loss: Tensor
    logits: Tensor
    gradient: Tensor


class Target(Protocol):
    """A model as attacks see it.

    Attributes:
        distinct: how many paths there are at all, one a member where there is no noise; None: without end.
    """

    distinct: int | None

    def paths(self, x: Tensor, first: int, count: int, seed: int, purpose: str, index: Tensor) -> Tensor:
        """Logits ``(count, N, classes)`` along numbered paths of a panel, without a gradient."""
        ...

    def ascend(
        self, objective: Objective, x: Tensor, y: Tensor, first: int, count: int, seed: int, index: Tensor
    ) -> Ascent:
        """An objective and its gradient along numbered paths of the gradient panel."""
        ...


def _ascend(objective: Objective, x: Tensor, y: Tensor, paths: Callable[[Tensor], Tensor]) -> Ascent:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = paths(x)
        if len(odd := y[(y < 0) | (y >= logits.shape[-1])]):
            raise ItoError(f"Labels must be from 0 to {logits.shape[-1] - 1}, got {int(odd[0])}.")
        loss = objective(logits, y)
        (gradient,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
    return Ascent(loss.detach(), logits.detach(), gradient)


class _Module:
    """Any network of images in [0, 1] to logits. If it is randomised, its noise is its own and always fresh."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model = model
        with torch.no_grad():
            # Noise may show seldom: like AutoAttack's check, five forwards of the whole batch.
            first = model(x)
            random = any(not torch.equal(model(x), first) for _ in range(4))
        self.distinct = None if random else 1

    @torch.no_grad()
    def paths(self, x: Tensor, first: int, count: int, seed: int, purpose: str, index: Tensor) -> Tensor:
        return torch.stack([self.model(x) for _ in range(count)])

    def ascend(
        self, objective: Objective, x: Tensor, y: Tensor, first: int, count: int, seed: int, index: Tensor
    ) -> Ascent:
        return _ascend(objective, x, y, lambda x: torch.stack([self.model(x) for _ in range(count)]))


class EnsembleTarget:
    """An ensemble's quick copy. Few images with all their paths at a time, so that any objective can be climbed."""

    def __init__(self, ensemble: ItoEnsemble) -> None:
        for member in ensemble.members:
            if find_solver(str(member.solver)).adaptive:
                raise ItoError(
                    f"Solver {member.solver!r} chooses its steps for the whole batch, so that one image's gradient "
                    "depends on the others; attack with a solver of fixed steps."
                )
        self.distinct = None if ensemble.noisy else len(ensemble.members)
        self.ensemble = ensemble
        self._quick: ItoEnsemble | None = None

    def quick(self, x: Tensor) -> ItoEnsemble:
        """The quick copy, made when the first images are at hand."""
        if self._quick is None:
            self._quick = self.ensemble.quick(x)
        return self._quick

    @torch.no_grad()
    def paths(self, x: Tensor, first: int, count: int, seed: int, purpose: str, index: Tensor) -> Tensor:
        """See `Target`."""
        return self.quick(x).paths(x, first, count, seed, purpose, index)

    def ascend(
        self,
        objective: Objective,
        x: Tensor,
        y: Tensor,
        first: int,
        count: int,
        seed: int,
        index: Tensor,
        purpose: str = "gradient",
    ) -> Ascent:
        """See `Target`; ``purpose`` is for an attacker who knows the defender's paths."""

        quick = self.quick(x)
        members: list[ItoResNet] = list(quick.members)  # type: ignore[arg-type]
        size = quick.chunk or min(piece_of(member, x, gradient=True) for member in members)

        def piece(part: slice) -> Ascent:
            names = index[part]
            return _ascend(objective, x[part], y[part], lambda x: quick.paths(x, first, count, seed, purpose, names))

        try:
            side_by_side = all(well_known(member) for member in members)
            pieces = in_pieces(piece, len(x), max(1, size // count), x.device, side_by_side)
        except (RuntimeError, MemoryError) as error:
            # With a single image: what is left is to store less.
            if not out_of_memory(error) or all(member.checkpoint for member in members):
                raise
            for member in members:
                member.checkpoint = True
            return self.ascend(objective, x, y, first, count, seed, index, purpose)
        losses, logits, gradients = zip(*pieces, strict=True)
        return Ascent(torch.cat(losses), torch.cat(logits, 1), torch.cat(gradients))


def as_target(model: nn.Module, x: Tensor) -> Target:
    """The face of a model: an `ItoEnsemble`, an `ItoResNet` (an ensemble of one), or any other module."""
    if isinstance(model, ItoResNet):
        model = ItoEnsemble([model])
    return EnsembleTarget(model) if isinstance(model, ItoEnsemble) else _Module(model, x)

"""Auto-PGD, correct under noise (Croce and Hein 2020, https://arxiv.org/abs/2003.01690, algorithm 1).

The published loop decides by the loss of the iterate's own gradient pass. On a randomised model that loss is another
draw at every step, and its highest value the luckiest draw. Here every decision (best iterate, halving, success) is
made on paths of the selection, the same for all iterates of an attempt; gradients have their own at every step.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from .active import ActiveSet, choose
from .base import Attack
from .norms import BALLS


@dataclass(frozen=True)
class APGD(Attack):
    """Momentum steps that begin at ``2 eps`` and halve where the loss no longer rises; see `Attack`."""

    steps: int = 100
    objective: str = "dlr"

    def checkpoints(self) -> list[int]:
        """Steps after which the step length may halve: 22 % of all steps, then ever closer, down to every 6 %."""
        ends, share, length = [0], 22, 22  # in per cent: rounding must not add a step
        while share < 100:
            ends.append(-(-share * self.steps // 100))
            length = max(length - 3, 6)
            share += length
        return sorted({*ends, self.steps})

    def attempt(self, active: ActiveSet) -> None:
        """See `Attack.attempt`."""
        ball = BALLS[self.norm]
        spans = {end: end - begin for begin, end in itertools.pairwise(self.checkpoints())}
        loss, gradient, fooled = self._evaluate(active, 0)
        loss, gradient = active.drop(fooled, loss, gradient)
        active.keep_best(loss)
        before, best_gradient = active.iterate, gradient
        length = _StepLength(2 * self.eps, loss)
        for step in active.steps(range(1, self.steps + 1)):
            ahead = self.project(active.iterate + length.now * ball.steepest(gradient, active.iterate), active.origin)
            share = 0.75 if step > 1 else 1.0
            moved = active.iterate + share * (ahead - active.iterate) + (1 - share) * (active.iterate - before)
            before, active.iterate = active.iterate, self.project(moved, active.origin)
            last = loss
            loss, gradient, fooled = self._evaluate(active, step)
            last, loss, gradient, best_gradient, before = active.drop(
                fooled, last, loss, gradient, best_gradient, before
            )
            length.drop(fooled)
            better = active.keep_best(loss)
            best_gradient = choose(better, gradient, best_gradient)
            length.count(loss > last)
            if step in spans:  # where the length halves, the search goes on from the best iterate
                halved = length.halve(spans[step], active.best_loss)
                active.iterate = choose(halved, active.best, active.iterate)
                gradient = choose(halved, best_gradient, gradient)
                loss = torch.where(halved, active.best_loss, loss)

    @staticmethod
    def _evaluate(active: ActiveSet, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """At the iterate: the loss that decides, the gradient, and which images are settled."""
        loss, logits, gradient = active.ascend(step)
        if active.panels.noisy:
            logits = active.judge(0)
            loss = active.loss(logits)
        return loss, gradient, active.settle(logits, 1 + step)


class _StepLength:
    """The length of each image's steps, and conditions 1 and 2 of the paper, by which it halves.

    Attributes:
        now: ``(K, 1, 1, 1)``, in pixel units.
    """

    def __init__(self, first: float, loss: Tensor) -> None:
        """``loss``: at the start, ``(K,)``."""
        self.now = torch.full_like(loss, first)[:, None, None, None]
        self._rises = torch.zeros(len(loss), device=loss.device)  # steps since the last checkpoint that raised the loss
        self._halved = torch.ones_like(loss, dtype=torch.bool)  # at the last checkpoint
        self._best_loss = loss.clone()  # at the last checkpoint

    def drop(self, settled: Tensor) -> None:
        """Forget images that left, as `ActiveSet.drop`."""
        if bool(settled.any()):
            stay = ~settled
            self.now, self._rises, self._halved = self.now[stay], self._rises[stay], self._halved[stay]
            self._best_loss = self._best_loss[stay]

    def count(self, rose: Tensor) -> None:
        """A step was made; ``rose``: where it raised the loss, bool ``(K,)``."""
        self._rises = self._rises + rose

    def halve(self, span: int, best_loss: Tensor) -> Tensor:
        """Halve the length where the search makes no progress; returns where, bool ``(K,)``.

        Either fewer than 75 % of the ``span`` steps since the last checkpoint raised the loss, or neither the length
        nor the highest loss has changed since.
        """
        slow = self._rises < 0.75 * span
        stuck = ~self._halved & (best_loss <= self._best_loss)
        self._halved = slow | stuck
        self.now = choose(self._halved, self.now / 2, self.now)
        self._best_loss, self._rises = best_loss.clone(), torch.zeros_like(self._rises)
        return self._halved

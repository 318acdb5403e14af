"""The paths of one attack: gradients average one panel, iterates are judged on another, and both are counted.

A third panel, the report's, is for whoever judges the attack; nothing here ever sees it.
"""

from __future__ import annotations

from torch import Tensor

from ..votes import winners
from .objective import Ascent, Objective, Target

# Of 20 paths at most 3: were the right class still ahead of one other, at a half, that would happen once in 780 times.
_BEYOND_LUCK = 0.15


def right_share(logits: Tensor, y: Tensor) -> Tensor:
    """The share of paths on which the right class wins: ``(P, N, classes)``, ``(N,)`` or ``(N, 2)`` -> ``(N,)``."""
    return (winners(logits) == (y if y.dim() == 1 else y[:, 0])).float().mean(0)


class Panels:
    """The panels of one attack on some images.

    Attributes:
        labels: ``(N,)`` the right classes, or ``(N, 2)`` with the classes aimed at beside.
        forwards, backwards: inferences made so far without and with a gradient.
    """

    def __init__(self, target: Target, y: Tensor, seed: int, index: Tensor, eot: int, selection: int) -> None:
        self.target, self.labels, self.seed, self.index = target, y, seed, index
        # Without noise all paths that there are, and the same for both panels.
        self.eot, self.selection = target.distinct or eot, target.distinct or selection
        self.forwards = self.backwards = 0

    @property
    def noisy(self) -> bool:
        """Whether one answer of the model says little about the next."""
        return self.target.distinct is None

    def ascend(self, objective: Objective, x: Tensor, rows: Tensor, draw: int) -> Ascent:
        """An objective and its gradient at images ``x`` of numbers ``rows``, on the ``draw``-th set of gradient paths.

        What of the gradient is not finite counts as 0.
        """
        self.backwards += self.eot * len(rows)
        y, index = self.labels[rows], self.index[rows]
        found = self.target.ascend(objective, x, y, draw * self.eot, self.eot, self.seed, index)
        return found._replace(gradient=found.gradient.nan_to_num(0, 0, 0))

    def judge(self, x: Tensor, rows: Tensor, draw: int, purpose: str = "selection") -> Tensor:
        """Logits ``(P, N, classes)`` on the ``draw``-th set of a panel's paths, without a gradient."""
        count = self.eot if purpose == "gradient" else self.selection
        self.forwards += count * len(rows)
        return self.target.paths(x, draw * count, count, self.seed, purpose, self.index[rows])

    def beaten(self, x: Tensor, rows: Tensor, logits: Tensor, draw: int) -> Tensor:
        """Which images have fallen for good: bool ``(N,)``.

        Those that lost on the ``logits`` at hand, and under noise on the ``draw``-th set of the selection, too: it is
        asked of those that at hand are nearly as far beyond luck, as each question costs as much as a gradient.
        """
        done = right_share(logits, self.labels[rows]) <= (2 * _BEYOND_LUCK if self.noisy else 0.5)
        if self.noisy and bool(done.any()):
            suspects = done.nonzero()[:, 0]
            judged = self.judge(x[suspects], rows[suspects], draw)
            done[suspects] = right_share(judged, self.labels[rows[suspects]]) <= _BEYOND_LUCK
        return done

"""The paths of one attack: gradients average one panel, iterates are judged on another, and both are counted.

A third panel, the report's, is for whoever judges the attack; nothing here ever sees it.

Paths of a panel are asked for by numbered draws of ``eot`` or of ``selection`` paths, and no two uses share a draw.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.votes import winners
from ..noise.keys import PathRange
from ..validation import check_labels
from .objectives import Objective, answered
from .targets import Ascent, Target

GOALS = ("denial", "evasion")
_COMPARE, _RANK, _FIRST = 0, 1, 2  # draws of the selection: of all candidates, of the classes to aim at, of attempts

# Of 20 paths at most 3: were the right class still ahead of one other, at a half, that would happen once in 780 times.
_BEYOND_LUCK = 0.15


def right_share(logits: Tensor, y: Tensor) -> Tensor:
    """The share of paths on which the right class wins: ``(P, N, classes)``, ``(N,)`` or ``(N, 2)`` -> ``(N,)``.

    A path whose logits are not finite is won by no class.
    """
    return (winners(logits) == (y if y.dim() == 1 else y[:, 0])).float().mean(0)


def wrong_share(logits: Tensor, y: Tensor) -> Tensor:
    """The share of paths on which the best wrong class wins, as `right_share`."""
    won = winners(logits).T + 1  # (N, P), 0 where no class won
    counts = torch.zeros(len(won), logits.shape[-1] + 1, device=won.device)
    counts.scatter_add_(1, won, torch.ones_like(won, dtype=counts.dtype))
    return counts[:, 1:].scatter(1, (y if y.dim() == 1 else y[:, 0])[:, None], 0).amax(1) / len(logits)


class Panels:
    """The panels of one attack on some images.

    Attributes:
        labels: ``(N,)`` the right classes, or ``(N, 2)`` with the classes aimed at beside.
        attempt: the number of the attempt under way.
        queries, gradients: inferences made so far without and with a gradient.
        blind: bool ``(N,)``, images at which some gradient was not finite.
    """

    def __init__(
        self, target: Target, y: Tensor, seed: int, index: Tensor, eot: int, selection: int, goal: str, draws: int
    ) -> None:
        """``draws``: how many draws of each panel an attempt uses at most."""
        self.target, self.labels, self.seed, self.index = target, y, seed, index
        self.goal, self.draws, self.attempt = goal, draws, 0
        self.blind = torch.zeros(len(y), dtype=torch.bool, device=y.device)
        # Without noise all paths that there are, and the same for both panels.
        self.eot, self.selection = target.distinct or eot, target.distinct or selection
        self.queries = self.gradients = 0

    @property
    def noisy(self) -> bool:
        """Whether one answer of the model says little about the next."""
        return self.target.distinct is None

    def ascend(self, objective: Objective, x: Tensor, rows: Tensor, draw: int) -> Ascent:
        """An objective and its gradient at images ``x`` of numbers ``rows``, on a draw of the attempt's gradient paths.

        Entries of the gradient that are not finite are 0, and the image counts as `blind`.
        """
        self.gradients += self.eot * len(rows)
        first = (self.attempt * self.draws + draw) * self.eot
        paths = PathRange(self.seed, "gradient", self.index[rows], first, self.eot)
        found = self.target.ascend(objective, x, self.labels[rows], paths)
        self.blind[rows] |= ~found.gradient.isfinite().flatten(1).all(1)
        return Ascent(comparable(found.loss), found.logits, found.gradient.nan_to_num(0, 0, 0))

    def loss(self, objective: Objective, logits: Tensor, rows: Tensor) -> Tensor:
        """An objective ``(N,)`` on the ``logits`` at hand, `comparable`."""
        return comparable(objective(logits, self.labels[rows]))

    def judge(self, x: Tensor, rows: Tensor, draw: int, purpose: str = "selection") -> Tensor:
        """Logits ``(P, N, classes)`` on a draw of the attempt's paths of a panel, without a gradient."""
        return self._ask(x, rows, self.attempt * self.draws + draw + _FIRST * (purpose == "selection"), purpose)

    def compare(self, x: Tensor, rows: Tensor) -> Tensor:
        """Logits ``(P, N, classes)`` on the paths which the candidates of all attempts meet."""
        return self._ask(x, rows, _COMPARE, "selection")

    def rank(self, x: Tensor, rows: Tensor) -> Tensor:
        """Mean probabilities ``(N, classes)``, by which classes to aim at are chosen."""
        return answered(self._ask(x, rows, _RANK, "selection")).softmax(-1).mean(0)

    def _ask(self, x: Tensor, rows: Tensor, number: int, purpose: str) -> Tensor:
        count = self.eot if purpose == "gradient" else self.selection
        self.queries += count * len(rows)
        logits = self.target.path_logits(x, PathRange(self.seed, purpose, self.index[rows], number * count, count))
        check_labels(self.labels[rows].flatten(), self.labels[rows].numel(), logits.shape[-1])
        return logits

    def lost(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Where the goal is reached on the ``logits`` at hand: bool ``(N,)``.

        Denial: the right class has no majority of the paths. Evasion: a wrong class has one.
        """
        missing = self._missing(logits, rows)
        return missing < 0.5 if self.goal == "evasion" else missing <= 0.5

    def _missing(self, logits: Tensor, rows: Tensor) -> Tensor:
        """The share of paths ``(N,)`` that the attack has not won."""
        labels = self.labels[rows]
        return 1 - wrong_share(logits, labels) if self.goal == "evasion" else right_share(logits, labels)

    def beaten(self, x: Tensor, rows: Tensor, logits: Tensor, draw: int) -> Tensor:
        """Which images have fallen for good: bool ``(N,)``.

        Those that lost on the ``logits`` at hand, and under noise on a draw of the selection, too: it is
        asked of those that at hand are nearly as far beyond luck, as each question costs as much as a gradient.
        """
        if not self.noisy:
            return self.lost(logits, rows)
        done = self._missing(logits, rows) <= 2 * _BEYOND_LUCK
        if bool(done.any()):
            suspects = done.nonzero()[:, 0]
            judged = self.judge(x[suspects], rows[suspects], draw)
            done[suspects] = self._missing(judged, rows[suspects]) <= _BEYOND_LUCK
        return done


def comparable(loss: Tensor) -> Tensor:
    """A loss ``(N,)`` in which NaN, which compares with nothing, is below all other values."""
    return loss.nan_to_num(nan=torch.finfo(loss.dtype).min)

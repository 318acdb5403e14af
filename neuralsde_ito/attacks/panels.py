"""The paths of one attack: gradients average one panel of noise, iterates are judged on another, and both are counted.

A third panel, the report's, judges the attack when it has ended: nothing here ever sees it.

An attack takes the paths of a panel in numbered draws, of ``eot`` paths for gradients and of ``selection`` paths for
judging. No two uses share a draw. An attempt has ``draws`` numbers of its own on each panel. On the selection panel two
draws come before those of the attempts: one compares the results of all attempts, one ranks the classes to aim at.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..models.votes import winners
from ..noise.keys import PathRange
from ..validation import check_labels
from .objectives import Objective, nan_lowest, zero_invalid
from .targets import Ascent, Target, in_precision

GOALS = ("denial", "evasion")
AIMED = "aimed"  # the goal of an attack that is given the class to aim at: the model answers with it
_COMPARE, _RANK, _FIRST = 0, 1, 2  # draws of the selection: the two that all attempts share, the first of the others


def right_share(logits: Tensor, y: Tensor) -> Tensor:
    """The share of paths on which the right class wins: ``(P, N, classes)``, ``(N,)`` or ``(N, 2)`` -> ``(N,)``.

    A path whose logits are not finite is won by no class.
    """
    return (winners(logits) == (y if y.dim() == 1 else y[:, 0])).float().mean(0)


def wrong_share(logits: Tensor, y: Tensor) -> Tensor:
    """The share of paths on which the best wrong class wins; shapes as in `right_share`."""
    won = winners(logits).T + 1  # (N, P), 0 where no class won
    counts = torch.zeros(len(won), logits.shape[-1] + 1, device=won.device)
    counts.scatter_add_(1, won, torch.ones_like(won, dtype=counts.dtype))
    return counts[:, 1:].scatter(1, (y if y.dim() == 1 else y[:, 0])[:, None], 0).amax(1) / len(logits)


def share_not_won(logits: Tensor, y: Tensor, goal: str) -> Tensor:
    """The share of paths that the attack has not won yet; shapes as in `right_share`.

    Denial: the right class wins on them. Evasion: the best wrong class does not. Aimed: the class aimed at does not.
    """
    if goal == AIMED:
        return 1 - right_share(logits, y[:, 1])
    return 1 - wrong_share(logits, y) if goal == "evasion" else right_share(logits, y)


def goal_reached(logits: Tensor, y: Tensor, goal: str) -> Tensor:
    """Whether the goal is reached on these paths, bool ``(N,)``; shapes as in `right_share`.

    Denial: the right class has no majority of the paths. Evasion: a wrong class has one. Aimed: that class has one.
    """
    share = share_not_won(logits, y, goal)
    return share <= 0.5 if goal == "denial" else share < 0.5


class Panels:
    """The panels of one attack on ``N`` images. ``rows`` ``(K,)`` are the numbers of images ``x`` among all ``N``.

    Attributes:
        precision: of gradients, and of the loss and logits that come with them; a name in `PRECISIONS`.
        labels: ``(N,)`` the right classes, or ``(N, 2)`` the right class and the class aimed at.
        attempt: the number of the attempt under way.
        queries, gradients: inferences made so far, without and with a gradient.
        blind: bool ``(N,)``, images at which some gradient was not finite.
    """

    def __init__(
        self,
        target: Target,
        y: Tensor,
        seed: int,
        index: Tensor,
        eot: int,
        selection: int,
        draws: int,
        precision: str = "float32",
    ) -> None:
        """``draws``: how many draws of each panel an attempt uses at most."""
        self.target, self.precision = in_precision(target, precision), precision
        self.labels, self.seed, self.index, self.draws = y, seed, index, draws
        self.attempt = 0
        self.blind = torch.zeros(len(y), dtype=torch.bool, device=y.device)
        # Without noise a draw is all paths that there are, and the same on both panels.
        self.eot, self.selection = target.distinct or eot, target.distinct or selection
        self.queries = self.gradients = 0
        self._checked: Tensor | None = None  # the labels that `_check` has seen

    @property
    def noisy(self) -> bool:
        """Whether two answers of the model to one image can differ."""
        return self.target.distinct is None

    def ascend(self, objective: Objective, x: Tensor, rows: Tensor, draw: int) -> Ascent:
        """An objective and its gradient at images ``x``, on one of the attempt's draws of the gradient panel.

        Entries of the gradient that are not finite become 0, and the image counts as `blind`.
        """
        self.gradients += self.eot * len(rows)
        first = (self.attempt * self.draws + draw) * self.eot
        paths = PathRange(self.seed, "gradient", self.index[rows], first, self.eot)

        def checked(logits: Tensor, labels: Tensor) -> Tensor:
            self._check(logits)
            return objective(logits, labels)

        loss, logits, gradient = self.target.ascend(checked, x, self.labels[rows], paths)
        self.blind[rows] |= ~gradient.isfinite().flatten(1).all(1)
        return Ascent(nan_lowest(loss), logits, gradient.nan_to_num(0, 0, 0))

    def query(self, x: Tensor, rows: Tensor) -> Tensor:
        """Logits ``(P, K, classes)`` on the attempt's first draw of the gradient panel, without a gradient."""
        return self._logits(x, rows, "gradient", self.attempt * self.draws)

    def judge(self, x: Tensor, rows: Tensor, draw: int) -> Tensor:
        """Logits ``(P, K, classes)`` on one of the attempt's draws of the selection panel."""
        return self._logits(x, rows, "selection", self._number(draw))

    def wins(self, x: Tensor, rows: Tensor, draw: int, goal: str, share: float) -> Tensor:
        """Whether the attack wins this ``share`` of the paths of a draw of the selection, bool ``(K,)``.

        An image that has lost too many of the first half of the paths is not asked on the others.
        """
        standing, asked = torch.arange(len(rows), device=rows.device), 0
        seen: list[Tensor] = []
        while len(standing) and asked < self.selection:
            half = -(-self.selection // 2)
            part = (asked, half if not asked else self.selection - half)
            more = self._logits(x[standing], rows[standing], "selection", self._number(draw), part)
            logits = torch.cat([*seen, more])
            # A target that knows the paths gives all of them at once, whatever it is asked for.
            whole = self.selection if len(more) == part[1] else len(logits)
            asked = len(logits) if len(more) == part[1] else self.selection
            lost = (share_not_won(logits, self.labels[rows[standing]], goal) * len(logits)).round()
            stay = lost <= math.floor((1 - share) * whole + 1e-6)
            standing, seen = standing[stay], [logits[:, stay]]
        won = torch.zeros_like(rows, dtype=torch.bool)
        won[standing] = True
        return won

    def compare(self, x: Tensor, rows: Tensor) -> Tensor:
        """Logits ``(P, K, classes)`` on the draw of the selection panel on which all attempts are compared."""
        return self._logits(x, rows, "selection", _COMPARE)

    def rank(self, x: Tensor, rows: Tensor) -> Tensor:
        """Mean probabilities ``(K, classes)``, by which the classes to aim at are chosen."""
        return zero_invalid(self._logits(x, rows, "selection", _RANK)).softmax(-1).mean(0)

    def _number(self, draw: int) -> int:
        """The number of one of the attempt's draws among all of the selection."""
        return _FIRST + self.attempt * self.draws + draw

    def _logits(self, x: Tensor, rows: Tensor, panel: str, draw: int, part: tuple[int, int] | None = None) -> Tensor:
        """Logits along a draw, or along a ``part`` of it: the number of its first path in the draw, and how many."""
        whole = self.eot if panel == "gradient" else self.selection
        first, count = part or (0, whole)
        paths = PathRange(self.seed, panel, self.index[rows], draw * whole + first, count)
        logits = self.target.path_logits(x, paths)
        self.queries += len(logits) * len(rows)
        self._check(logits)
        return logits

    def _check(self, logits: Tensor) -> None:
        """Refuse labels of no class of these logits; once, because reading them waits for a GPU."""
        if self._checked is not self.labels:
            check_labels(self.labels.flatten(), self.labels.numel(), logits.shape[-1])
            self._checked = self.labels

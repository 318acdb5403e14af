"""The images that an attempt still works on, and the best iterate of each: the bookkeeping that all attacks share."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..noise.keys import make_keys
from .objectives import Objective, nan_lowest
from .panels import Panels, goal_reached, share_not_won
from .targets import Ascent

START = -1  # the use of random numbers that every attack has: a random start, see `ActiveSet.keys`

# At most 3 of 20 paths. If the right class won half of the paths, 3 or fewer of 20 would happen once in 780 times.
_BEYOND_LUCK = 0.15


def choose(condition: Tensor, images: Tensor, others: Tensor) -> Tensor:
    """The first images where ``condition`` ``(K,)`` holds, elsewhere the others, ``(K, C, H, W)``."""
    return torch.where(condition[:, None, None, None], images, others)


class ActiveSet:
    """The ``K`` images of one attempt that are still attacked. An image leaves when it is fooled beyond luck.

    A *draw* is the number of some paths of noise in this attempt, see `Panels`.

    Attributes:
        rows: ``(K,)``, their numbers among all images of the attack.
        origin: the clean images ``(K, C, H, W)``.
        iterate: the current adversarial images ``(K, C, H, W)``. The attack sets it.
        given: whether the first iterate is a start that the caller has given.
        best, best_loss: the best iterate so far ``(K, C, H, W)`` and its loss ``(K,)``, see `keep_best`.
    """

    def __init__(
        self, panels: Panels, objective: Objective, x: Tensor, rows: Tensor, goal: str = "denial", stop: bool = True
    ) -> None:
        """``x``: all images of the attempt; ``rows``: their numbers; otherwise as in `Attack`."""
        self.panels, self.objective, self.goal, self.stop = panels, objective, goal, stop
        self.rows, self.origin, self.iterate, self.best = rows, x, x, x
        self.given = False
        self.best_loss = torch.full_like(x[:, 0, 0, 0], -torch.inf)
        self._best_fools = torch.zeros_like(rows, dtype=torch.bool)
        self._result = x.clone()  # of all images of the attempt
        self._positions = torch.arange(len(x), device=x.device)  # of the active images among these

    def __len__(self) -> int:
        return len(self.rows)

    def steps(self, numbers: Iterable[int]) -> Iterator[int]:
        """The numbers one after the other, as long as any image is active."""
        return itertools.takewhile(lambda _: len(self) > 0, numbers)

    def keys(self, use: int) -> Tensor:
        """Keys ``(K,)`` of random numbers for this attempt. ``use`` is negative: members of an ensemble are not."""
        panels = self.panels
        return make_keys(panels.seed, "gradient", use, panels.attempt, panels.index[self.rows])

    def ascend(self, draw: int) -> Ascent:
        """Loss, logits and gradient at the iterate; see `Panels.ascend`."""
        return self.panels.ascend(self.objective, self.iterate, self.rows, draw)

    def query(self) -> Tensor:
        """Logits at the iterate without a gradient, in one attempt always on the same paths; see `Panels.query`."""
        return self.panels.query(self.iterate, self.rows)

    def judge(self, draw: int) -> Tensor:
        """Logits at the iterate on paths of the selection; see `Panels.judge`."""
        return self.panels.judge(self.iterate, self.rows, draw)

    def loss(self, logits: Tensor) -> Tensor:
        """The objective ``(K,)`` by the iterate's ``logits``; NaN counts as the lowest value."""
        return self._loss(logits, self.rows)

    def _loss(self, logits: Tensor, rows: Tensor) -> Tensor:
        return nan_lowest(self.objective(logits, self.panels.labels[rows]))

    def keep_best(self, loss: Tensor, logits: Tensor | None = None) -> Tensor:
        """Keep the iterate where it is better than the best one so far; returns where, bool ``(K,)``.

        The higher ``loss`` is better. With ``logits`` and without noise, an iterate that fools is better than one that
        does not, whatever its loss. With noise the success may have been a lucky draw, so the loss decides.
        """
        better = loss > self.best_loss
        if logits is not None and not self.panels.noisy:
            fools = goal_reached(logits, self.panels.labels[self.rows], self.goal)
            better = torch.where(fools == self._best_fools, better, fools)
            self._best_fools = self._best_fools | fools
        self.best = choose(better, self.iterate, self.best)
        self.best_loss = torch.where(better, loss, self.best_loss)
        return better

    def keep_last(self, draw: int) -> None:
        """Let the last iterate compete with the best one, under noise on paths that neither has seen."""
        if not len(self):
            return
        if not self.panels.noisy:
            logits = self.judge(draw)
            self.keep_best(self.loss(logits), logits)
            return
        rows = self.rows.repeat(2)
        logits = self.panels.judge(torch.cat([self.iterate, self.best]), rows, draw)
        last, best = self._loss(logits, rows).chunk(2)
        self.best = choose(last > best, self.iterate, self.best)

    def settle(self, logits: Tensor, draw: int, among: Tensor | None = None) -> Tensor:
        """Make the iterate the result of every image that is fooled beyond luck; returns which, bool ``(K,)``.

        They stay in the set until `drop`. Where the attack does not ``stop``, no image is settled.

        Args:
            logits: the iterate's, ``(P, K, classes)``.
            draw: of the selection. Success on ``logits`` may be luck under noise, and rounding in bfloat16: images that
                are near enough to the goal are judged on this draw, too. Others are not, as that costs as much as a
                gradient.
            among: bool ``(K,)``, images that may be settled; default all.
        """
        if not self.stop:
            return torch.zeros_like(self.rows, dtype=torch.bool)
        labels, noisy = self.panels.labels[self.rows], self.panels.noisy
        if noisy:
            fooled = share_not_won(logits, labels, self.goal) <= 2 * _BEYOND_LUCK
        else:
            fooled = goal_reached(logits, labels, self.goal)
        if among is not None:
            fooled &= among
        if (noisy or self.panels.precision != "float32") and bool(fooled.any()):
            near = fooled.nonzero()[:, 0]
            iterate, rows = self.iterate[near], self.rows[near]
            if noisy:
                fooled[near] = self.panels.wins(iterate, rows, draw, self.goal, 1 - _BEYOND_LUCK)
            else:
                fooled[near] = goal_reached(self.panels.judge(iterate, rows, draw), labels[near], self.goal)
        self._result[self._positions[fooled]] = self.iterate[fooled]
        return fooled

    def drop(self, settled: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Take the settled images, bool ``(K,)``, out of the set and out of ``tensors`` ``(K, ...)``."""
        if not bool(settled.any()):
            return tensors
        stay = ~settled
        self.rows, self._positions, self._best_fools = self.rows[stay], self._positions[stay], self._best_fools[stay]
        self.origin, self.iterate = self.origin[stay], self.iterate[stay]
        self.best, self.best_loss = self.best[stay], self.best_loss[stay]
        return tuple(tensor[stay] for tensor in tensors)

    def give_up(self, hopeless: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Take images, bool ``(K,)``, out of the set as `drop`; their results are the best iterates."""
        self._result[self._positions[hopeless]] = self.best[hopeless]
        return self.drop(hopeless, *tensors)

    def result(self) -> Tensor:
        """The result for all images of the attempt ``(N, C, H, W)``: settled iterates, else the best iterate."""
        self._result[self._positions] = self.best
        return self._result

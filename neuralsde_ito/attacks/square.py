"""Square attack: random search by queries alone (Andriushchenko et al. 2020, https://arxiv.org/abs/1912.00049).

It needs no gradient, so a masked one does not mislead it. On a randomised model a query is the mean margin over ``eot``
paths, always the same ones, so that two queries differ by the image and not by the draw.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..noise.normals import normals
from ..validation import ItoError, whole_number
from .active import ActiveSet
from .base import Attack
from .norms import BALLS

# In units of the last place of the largest logit: what a margin changes by where only the batch shrinks, and
# other kernels run. A square that changes nothing (its pixels lie on the surface, a quantiser follows) is no progress.
_ROUNDING = 64

_SQUARES = -2  # the use of this attack's random numbers, see `ActiveSet.keys`


@dataclass(frozen=True)
class Square(Attack):
    """Squares of ever smaller side are moved to the ball's surface, and kept where the margin falls; see `Attack`.

    Attributes:
        steps: queries.
        objective: ``margin``, the only one that it climbs.
        share: of the pixels that the first squares cover.
        patience: an image is given up after so many queries in a row that have not raised its margin; None: never.
            Where gradients do not mislead, few squares improve on the result of an attack with gradients.

    An attempt that is given a start begins there or where it would begin without one, whichever has the higher margin.
    """

    steps: int = 5000
    objective: str = "margin"
    share: float = 0.8
    patience: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patience is not None:
            object.__setattr__(self, "patience", whole_number("patience", self.patience))
        if self.objective != "margin":
            raise ItoError(f"Square climbs the margin and no other objective, got {self.objective!r}; leave it out.")
        if not 0 < self.share <= 1:
            raise ItoError(f"share must be above 0 and at most 1, got {self.share}.")

    def side(self, query: int, height: int, width: int) -> int:
        """The side of a square in pixels: the share of pixels halves on the published schedule of 10,000 queries."""
        progress = query / self.steps * 10_000
        halvings = sum(progress > end for end in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
        side = round((self.share / 2**halvings * height * width) ** 0.5)
        return max(1, min(side, height, width))

    def attempt(self, active: ActiveSet) -> None:
        """See `Attack.attempt`."""
        active.iterate = self.project(active.iterate.clamp(0, 1), active.origin)
        waited = torch.zeros_like(active.rows)  # queries since the margin rose
        for query in active.steps(range(self.steps + 1)):
            if query > 0:
                start = query == 1 and active.given
                trial = self.first_iterate(active) if start else self._with_square(active, query)
                active.iterate = self.project(trial.clamp(0, 1), active.origin)
            logits, before = active.query(), active.best_loss
            better = active.keep_best(active.loss(logits))
            # All queries are on the same paths: an image on which the best one was luck is judged again when it rose.
            fooled = active.settle(logits, query, better)
            rose = active.best_loss - before > _ROUNDING * torch.finfo(logits.dtype).eps * logits.abs().amax((0, 2))
            waited = torch.where(rose, 0, waited + 1)
            (waited,) = active.drop(fooled, waited)
            if self.patience is not None:
                (waited,) = active.give_up(waited >= self.patience, waited)

    def first_iterate(self, active: ActiveSet) -> Tensor:
        """L-inf: vertical stripes. L2 and L1: a grid of bumps of either sign."""
        x = active.origin
        n, c, h, w = x.shape
        numbers = _uniform(active, 0, 4 * x[0].numel())
        if self.norm == "linf":
            stripes = (numbers[:, : c * w].view(n, c, 1, w) < 0.5).to(x.dtype)
            return x + self.eps * (2 * stripes - 1)
        side = max(1, h // 5)
        rows, columns = -(-h // side), -(-w // side)
        signs = 2 * (numbers[:, : c * rows * columns].view(n, c, rows, columns) < 0.5).to(x.dtype) - 1
        signs = signs.repeat_interleave(side, 2).repeat_interleave(side, 3)[:, :, :h, :w]
        delta = signs * _bump(side, x).repeat(rows, columns)[:h, :w]
        return x + self.eps * delta / BALLS[self.norm].length(delta).view(n, 1, 1, 1)

    def _with_square(self, active: ActiveSet, query: int) -> Tensor:
        """The best iterates with one more random square moved to the ball's surface, ``(K, C, H, W)``."""
        x, best = active.origin, active.best
        k, c, h, w = x.shape
        side = self.side(query, h, w)
        numbers = _uniform(active, query, 4 + 2 * c + side * side)
        images = torch.arange(k, device=x.device)[:, None, None]
        signs = 2 * (numbers[:, 4 : 4 + c] < 0.5).to(x.dtype) - 1  # (K, C)
        row, column = _window(numbers[:, :2], side, h, w)
        if self.norm == "linf":
            trial = best.clone()
            trial[images, :, row, column] = x[images, :, row, column] + self.eps * signs[:, None, None, :]
            return trial
        # Else the length that a second square gives up goes into the first one, along a bump and its present content.
        other_row, other_column = _window(numbers[:, 2:4], side, h, w)
        delta = (best - x).clone()
        content = delta[images, :, row, column]  # (K, side, side, C)
        covered = torch.zeros(k, h, w, dtype=torch.bool, device=x.device)
        covered[images, row, column] = True
        covered[images, other_row, other_column] = True
        power = 2 if self.norm == "l2" else 1
        lengths = delta.square() if self.norm == "l2" else delta.abs()
        total = lengths.flatten(1).sum(1)
        inside = (lengths * covered[:, None]).flatten(1).sum(1)
        available = (self.eps**power - (total - inside)).clamp_min(0) ** (1 / power)
        new = _bump(side, x)[None, :, :, None] * signs[:, None, None, :]
        new = new + content / content.flatten(1).norm(dim=1).clamp_min(1e-12).view(k, 1, 1, 1)
        new = new / new.flatten(1).norm(p=power, dim=1).clamp_min(1e-12).view(k, 1, 1, 1)
        delta[images, :, other_row, other_column] = 0
        delta[images, :, row, column] = available.view(k, 1, 1, 1) * new
        return x + delta


def _uniform(active: ActiveSet, query: int, count: int) -> Tensor:
    """Uniform numbers ``(K, count)``: every image and every query has its own."""
    return torch.special.ndtr(normals(active.keys(_SQUARES), count, query, dtype=active.origin.dtype))


def _window(numbers: Tensor, side: int, h: int, w: int) -> tuple[Tensor, Tensor]:
    """Row and column numbers ``(K, side, side)`` of the pixels of a random square, from uniform numbers ``(K, 2)``."""
    top = (numbers[:, 0] * (h - side + 1)).long().clamp(max=h - side)
    left = (numbers[:, 1] * (w - side + 1)).long().clamp(max=w - side)
    offsets = torch.arange(side, device=numbers.device)
    shape = (len(numbers), side, side)
    return (top[:, None] + offsets)[:, :, None].expand(shape), (left[:, None] + offsets)[:, None, :].expand(shape)


def _bump(side: int, like: Tensor) -> Tensor:
    """A square hill ``(side, side)`` of length 1, of rings that rise towards the middle as sums of 1 / k^2."""
    pixel = torch.arange(side, device=like.device)
    ring = torch.minimum(pixel, side - 1 - pixel)  # distance from the edge
    ring = torch.minimum(ring[:, None], ring[None, :])
    count = int(ring.max()) + 1
    heights = torch.tensor([1 / (count - k) ** 2 for k in range(count)], dtype=like.dtype, device=like.device).cumsum(0)
    hill = heights[ring]
    return hill / hill.norm()

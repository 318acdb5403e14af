"""Square attack: random search by queries alone (Andriushchenko et al. 2020, https://arxiv.org/abs/1912.00049).

It needs no gradient, so a masked one does not mislead it. On a randomised model a query is the mean margin over ``eot``
paths, always the same ones, so that two queries differ by the image and not by the draw.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..noise.keys import make_keys
from ..noise.normals import normals
from ..validation import ItoError
from .base import Attack
from .norms import BALLS
from .objectives import Objective
from .panels import Panels


@dataclass(frozen=True)
class Square(Attack):
    """Squares of ever smaller side are changed to the ball's surface, and kept where the margin falls; see `Attack`.

    Attributes:
        steps: queries.
        objective: ``margin``, the only one that it climbs.
        share: of the pixels that the first squares cover.
    """

    steps: int = 5000
    objective: str = "margin"
    share: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective != "margin":
            raise ItoError(f"Square climbs the margin and no other objective, got {self.objective!r}; leave it out.")
        if not 0 < self.share <= 1:
            raise ItoError(f"share must be above 0 and at most 1, got {self.share}.")

    def side(self, step: int, height: int, width: int) -> int:
        """The side of a square at a query: the share of pixels is halved on the published schedule of 10,000."""
        place = step / self.steps * 10_000
        halvings = sum(place > end for end in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
        side = round((self.share / 2**halvings * height * width) ** 0.5)
        return max(1, min(side, height, width))

    def _climb(self, panels: Panels, objective: Objective, x: Tensor, start: Tensor | None, rows: Tensor) -> Tensor:
        ball = BALLS[self.norm]

        def draw(step: int, names: Tensor, size: int) -> Tensor:
            """Uniform numbers ``(N, size)``, of each image's own."""
            keys = make_keys(panels.seed, "gradient", -2, panels.attempt, panels.index[names])
            return torch.special.ndtr(normals(keys, size, step, dtype=x.dtype))

        def ask(adv: Tensor, names: Tensor, query: int) -> tuple[Tensor, Tensor]:
            """The margin, and who has fallen."""
            logits = panels.judge(adv, names, 0, "gradient")
            done = panels.beaten(adv, names, logits, query) if self.stop else torch.zeros_like(names, dtype=torch.bool)
            return panels.loss(objective, logits, names), done

        here = torch.arange(len(x), device=x.device)
        adv = self._begin(x, draw(0, rows, 4 * x[0].numel())) if start is None else start
        adv = ball.project(adv.clamp(0, 1), x, self.eps).clamp(0, 1)
        kept = adv.clone()
        lead, done = ask(adv, rows, 0)
        for query in range(1, self.steps + 1):
            if bool(done.any()):
                kept[here[done]] = adv[done]
                here, adv, lead = here[~done], adv[~done], lead[~done]
            if not len(here):
                return kept
            side = self.side(query, x.shape[-2], x.shape[-1])
            numbers = draw(query, rows[here], 4 + 2 * x.shape[1] + side * side)
            trial = self._change(adv, x[here], numbers, side)
            trial = ball.project(trial.clamp(0, 1), x[here], self.eps).clamp(0, 1)
            found, fallen = ask(trial, rows[here], query)
            better = (found > lead) | fallen
            adv, lead = torch.where(better[:, None, None, None], trial, adv), torch.where(better, found, lead)
            done = fallen
        kept[here] = adv
        return kept

    def _begin(self, x: Tensor, numbers: Tensor) -> Tensor:
        """L-inf: vertical stripes. L2: a grid of bumps of either sign."""
        n, c, h, w = x.shape
        if self.norm == "linf":
            stripes = (numbers[:, : c * w].view(n, c, 1, w) < 0.5).to(x.dtype)
            return x + self.eps * (2 * stripes - 1)
        side = max(1, h // 5)
        rows, columns = -(-h // side), -(-w // side)
        signs = 2 * (numbers[:, : c * rows * columns].view(n, c, rows, columns) < 0.5).to(x.dtype) - 1
        signs = signs.repeat_interleave(side, 2).repeat_interleave(side, 3)[:, :, :h, :w]
        bumps = _bump(side, x).repeat(rows, columns)[:h, :w]
        delta = signs * bumps
        return x + self.eps * delta / delta.flatten(1).norm(dim=1).view(n, 1, 1, 1)

    def _change(self, adv: Tensor, x: Tensor, numbers: Tensor, side: int) -> Tensor:
        """A trial: another square of every image is pushed to the surface."""
        n, c, h, w = x.shape

        def corner(which: int) -> Tensor:
            """Pixels of a square at a random place: row and column numbers ``(N, side, side)``."""
            top = (numbers[:, which] * (h - side + 1)).long().clamp(max=h - side)
            left = (numbers[:, which + 1] * (w - side + 1)).long().clamp(max=w - side)
            steps = torch.arange(side, device=x.device)
            shape = (n, side, side)
            return torch.stack([
                (top[:, None] + steps)[:, :, None].expand(shape), (left[:, None] + steps)[:, None, :].expand(shape)
            ])  # fmt: skip

        images = torch.arange(n, device=x.device)[:, None, None]
        signs = 2 * (numbers[:, 4 : 4 + c] < 0.5).to(x.dtype) - 1  # (N, C)
        row, column = corner(0)
        trial = adv.clone()
        if self.norm == "linf":
            trial[images, :, row, column] = x[images, :, row, column] + self.eps * signs[:, None, None, :]
            return trial
        # L2: the length that a second square gives up goes into the first, along a bump and what is there already.
        delta = (adv - x).clone()
        other_row, other_column = corner(2)
        here = delta[images, :, row, column]  # (N, side, side, C)
        held = torch.zeros(n, h, w, dtype=torch.bool, device=x.device)
        held[images, row, column] = True
        held[images, other_row, other_column] = True
        total = delta.flatten(1).square().sum(1)
        inside = (delta.square() * held[:, None]).flatten(1).sum(1)
        available = (self.eps**2 - (total - inside)).clamp_min(0).sqrt()
        new = _bump(side, x)[None, :, :, None] * signs[:, None, None, :]
        norm = here.flatten(1).norm(dim=1).clamp_min(1e-12).view(n, 1, 1, 1)
        new = new + here / norm
        new = new / new.flatten(1).norm(dim=1).clamp_min(1e-12).view(n, 1, 1, 1)
        delta[images, :, other_row, other_column] = 0
        delta[images, :, row, column] = available.view(n, 1, 1, 1) * new
        return x + delta


def _bump(side: int, like: Tensor) -> Tensor:
    """A square hill ``(side, side)`` of length 1, of rings that rise towards the middle as sums of 1 / k^2."""
    place = torch.arange(side, device=like.device)
    ring = torch.minimum(place, side - 1 - place)  # how far from the edge
    ring = torch.minimum(ring[:, None], ring[None, :])
    most = int(ring.max()) + 1
    weights = torch.tensor([1 / (most - k) ** 2 for k in range(most)], dtype=like.dtype, device=like.device).cumsum(0)
    hill = weights[ring]
    return hill / hill.norm()

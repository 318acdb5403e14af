"""An attack whose gradients are differences of answers (NES, Wierstra et al. 2014; Ilyas et al. 2018,
https://arxiv.org/abs/1804.08598): a masked gradient does not mislead it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..attacks.active import ActiveSet
from ..attacks.base import Attack
from ..attacks.norms import BALLS
from ..attacks.objectives import nan_lowest
from ..noise.normals import normals

_AT_ONCE = 8  # pairs that go through the model together
_DIRECTIONS = -4  # the use of this attack's random numbers, see `ActiveSet.keys`


@dataclass(frozen=True)
class NES(Attack):
    """Steps along a gradient that is estimated from answers at pairs of opposite points; see `Attack`.

    Attributes:
        pairs: of points for one gradient.
        reach: the standard deviation of a pixel's change, in units of eps; under L2, of the whole change.
        momentum: as in `PGD`; it averages the estimates of many steps.
    """

    steps: int = 30
    objective: str = "margin"
    pairs: int = 16
    reach: float = 0.5
    momentum: float = 0.9

    def attempt(self, active: ActiveSet) -> None:
        """See `Attack.attempt`."""
        ball, velocity = BALLS[self.norm], torch.zeros_like(active.origin)
        for step in active.steps(range(self.steps)):
            logits = active.query()
            active.keep_best(active.loss(logits), logits)
            fooled = active.settle(logits, step)
            gradient = self._gradient(active, step)
            mean = gradient.abs().mean((1, 2, 3), keepdim=True)
            velocity = self.momentum * velocity + gradient / mean.where(mean > 0, torch.ones_like(mean))
            length = 2.5 * self.eps / self.steps
            active.iterate = self.project(
                active.iterate + length * ball.steepest(velocity, active.iterate), active.origin
            )
            (velocity,) = active.drop(fooled, velocity)

    def _gradient(self, active: ActiveSet, step: int) -> Tensor:
        """The gradient of the objective at the iterate, smoothed over normals, ``(K, C, H, W)``."""
        x, size, labels = active.iterate, active.iterate[0].numel(), active.panels.labels[active.rows]
        sigma = self.reach * self.eps / BALLS[self.norm].diameter(size)
        keys, total = active.keys(_DIRECTIONS), torch.zeros_like(x)
        for first in range(0, self.pairs, _AT_ONCE):
            numbers = range(first, min(first + _AT_ONCE, self.pairs))
            directions = torch.stack([normals(keys, size, step * self.pairs + n, dtype=x.dtype) for n in numbers])
            directions = directions.view(len(numbers), *x.shape)
            points = torch.cat([x + sigma * directions, x - sigma * directions]).clamp(0, 1)  # (2 p, K, C, H, W)
            logits = active.panels.query(points.flatten(0, 1), active.rows.repeat(len(points)))
            loss = nan_lowest(active.objective(logits, labels.repeat(len(points)))).view(2, len(numbers), len(x))
            change = (loss[0] - loss[1]).nan_to_num(0, 0, 0)
            total += torch.einsum("pk,pkchw->kchw", change, directions)
        return total

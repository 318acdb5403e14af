"""Projected gradient descent on a randomised model (Madry et al. 2018, https://arxiv.org/abs/1706.06083).

Three panels of noise keep the attack honest. Gradients average ``eot`` paths of the first, and their loss chooses
the best iterate. Paths of the second decide when an image is fooled, and which attempt is best. The report uses a third
one, which the attack never sees.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..validation import ItoError, one_of
from .active import ActiveSet
from .base import Attack
from .norms import BALLS


@dataclass(frozen=True)
class PGD(Attack):
    """Steps of one length along the steepest direction, projected onto the ball; see `Attack` for the other settings.

    Attributes:
        step_size: length of a step, in pixel units, on average where the steps decay; by default ``2.5 eps / steps``,
            and ``5 eps / steps`` where they decay.
        random_start: whether the first attempt begins at a random point of the ball (all later ones do).
        momentum: share of the last direction that is kept; each gradient is divided by its mean absolute value
            first (Dong et al. 2018, https://arxiv.org/abs/1710.06081).
        decay: whether the steps shrink linearly, from twice their length to nothing; their sum stays the same. The end
            of the search is then a polish.
        keep: ``"best"`` iterate by the loss on the gradient's paths, or the ``"last"`` one.
    """

    step_size: float | None = None
    random_start: bool = True
    momentum: float = 0.0
    decay: bool = False
    keep: str = "best"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("iterate to keep", self.keep, ("best", "last"))
        if self.step_size is not None and not 0 < self.step_size < float("inf"):
            raise ItoError(f"step_size must be a positive number in pixel units, got {self.step_size}.")
        if not 0 <= self.momentum < float("inf"):
            raise ItoError(f"momentum must be at least 0, got {self.momentum}.")

    @property
    def step(self) -> float:
        """The step size in pixel units."""
        return (5 if self.decay else 2.5) * self.eps / self.steps if self.step_size is None else self.step_size

    def length(self, step: int) -> float:
        """The length of a step, in pixel units; steps count from 0."""
        return self.step * (2 - (2 * step + 1) / self.steps if self.decay else 1)

    def first_iterate(self, active: ActiveSet) -> Tensor:
        """See `Attack.first_iterate`."""
        return super().first_iterate(active) if self.random_start or active.panels.attempt > 0 else active.origin

    def attempt(self, active: ActiveSet) -> None:
        """See `Attack.attempt`."""
        ball, velocity = BALLS[self.norm], torch.zeros_like(active.origin)
        for step in active.steps(range(self.steps)):
            loss, logits, gradient = active.ascend(step)
            active.keep_best(loss, logits)
            fooled = active.settle(logits, step)
            if self.momentum:
                mean = gradient.abs().mean((1, 2, 3), keepdim=True)
                velocity = self.momentum * velocity + gradient / mean.where(mean > 0, torch.ones_like(mean))
                gradient = velocity
            ahead = active.iterate + self.length(step) * ball.steepest(gradient, active.iterate)
            active.iterate = self.project(ahead, active.origin)
            (velocity,) = active.drop(fooled, velocity)
        if self.keep == "last":
            active.best = active.iterate
        else:
            active.keep_last(draw=self.steps)


# `madry20`: the 20-step column of the Madry toolbox's README, which the paper's Table 1 quotes.
PRESETS: dict[str, PGD] = {
    "default": PGD(decay=True),
    "madry20": PGD(steps=20, random_start=False, eot=1),
    "fgsm": PGD(steps=1, random_start=False, keep="last"),
}


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    seed: int = 0,
    index: Tensor | None = None,
    target: Tensor | None = None,
    **settings,
) -> Tensor:
    """Adversarial images ``(N, C, H, W)`` by PGD; ``settings`` are the attributes of `PGD`.

    The other arguments and errors are those of `Attack.run`.

    Example:
        ``pgd(ensemble, x, y, norm="linf", eps=8/255, steps=20, eot=20)``
    """
    return PGD(**settings).run(model, x, y, seed, index, target=target).images


def fgsm(model: nn.Module, x: Tensor, y: Tensor, *, seed: int = 0, index: Tensor | None = None, **settings) -> Tensor:
    """Adversarial images ``(N, C, H, W)`` by the fast gradient (sign) method (Goodfellow et al. 2015).

    It is PGD with one step of length eps. Arguments as in `pgd`.

    Raises:
        ItoError: ``steps``, ``step_size``, ``restarts`` or ``random_start`` among the settings.
    """
    if extra := settings.keys() & {"steps", "step_size", "restarts", "random_start"}:
        raise ItoError(f"FGSM is one step of length eps: it takes no {', '.join(sorted(extra))}.")
    one = replace(PRESETS["fgsm"], **settings)
    # At eps 0 the step size must be None: it has to be positive.
    return replace(one, step_size=one.eps or None).run(model, x, y, seed, index).images

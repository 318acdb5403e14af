"""Projected gradient descent on a randomised model (Madry et al. 2018, https://arxiv.org/abs/1706.06083).

Three panels of noise keep the attack honest: gradients average ``eot`` paths of the first, the choice
between iterates is made on the second, and whoever reports uses a third that the attack never sees.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..noise.keys import make_keys
from ..validation import ItoError, nearest
from .base import Attack
from .norms import BALLS
from .objectives import Objective
from .panels import Panels


@dataclass(frozen=True)
class PGD(Attack):
    """Steps of one length along the steepest direction, projected onto the ball; see `Attack` for what all have.

    Attributes:
        step_size: how far each goes (pixel units; default ``2.5 eps / steps``).
        random_start: begin at a random point of the ball (a second and later attempt always does).
        momentum: share of the last direction that is kept; gradients then count by their L1 length (Dong et al. 2018,
            https://arxiv.org/abs/1710.06081).
        keep: ``"best"`` iterate by the loss on the gradient's paths, or the ``"last"``.
    """

    step_size: float | None = None
    random_start: bool = True
    momentum: float = 0.0
    keep: str = "best"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep not in ("best", "last"):
            raise ItoError(nearest("iterate to keep", self.keep, ("best", "last")))
        if self.step_size is not None and not 0 < self.step_size < float("inf"):
            raise ItoError(f"step_size must be a positive number in pixel units, got {self.step_size}.")
        if not 0 <= self.momentum < float("inf"):
            raise ItoError(f"momentum must be at least 0, got {self.momentum}.")

    @property
    def step(self) -> float:
        """The step size in pixel units."""
        return 2.5 * self.eps / self.steps if self.step_size is None else self.step_size

    def _climb(self, panels: Panels, objective: Objective, x: Tensor, start: Tensor | None, rows: Tensor) -> Tensor:
        ball, adv = BALLS[self.norm], x if start is None else start
        if start is None and (self.random_start or panels.attempt):
            keys = make_keys(panels.seed, "gradient", member=-1, inference=panels.attempt, index=panels.index[rows])
            adv = ball.start(x, self.eps, keys).clamp(0, 1)
        # Of the iterate that is kept: its loss, and whether it fools.
        kept, highest = adv.clone(), torch.full_like(x[:, 0, 0, 0], -torch.inf)
        leads = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        here = torch.arange(len(x), device=x.device)  # the images still in the batch
        velocity = torch.zeros_like(x)
        for step in range(self.steps + 1):
            if step == self.steps and self.keep == "last":
                kept[here] = adv
                break
            names = rows[here]
            if step < self.steps:
                loss, logits, gradient = panels.ascend(objective, adv, names, step)
            elif panels.noisy:  # the last iterate meets the best one on paths that neither has seen
                pair = torch.cat([adv, kept[here]])
                logits = panels.judge(pair, names.repeat(2), step)
                last, best = panels.loss(objective, logits, names.repeat(2)).chunk(2)
                kept[here[last > best]] = adv[last > best]
                break
            else:  # the last iterate is only judged
                logits = panels.judge(adv, names, step)
                loss = panels.loss(objective, logits, names)
            # Without noise, an iterate that fools comes before one that does not, however high the loss of that.
            # With noise it may have been a lucky draw, and the loss is the better judge.
            lost = panels.lost(logits, names) & (not panels.noisy)
            better = torch.where(lost == leads[here], loss > highest[here], lost)
            kept[here[better]], highest[here[better]], leads[here[better]] = adv[better], loss[better], lost[better]
            done = panels.beaten(adv, names, logits, step) if self.stop else torch.zeros_like(lost)
            kept[here[done]] = adv[done]
            if step == self.steps or bool(done.all()):
                break
            if self.momentum:
                mean = gradient.abs().mean((1, 2, 3), keepdim=True)
                velocity = self.momentum * velocity + gradient / mean.where(mean > 0, torch.ones_like(mean))
                gradient = velocity
            adv = adv + self.step * ball.steepest(gradient)
            adv = ball.project(adv, x[here], self.eps).clamp(0, 1)
            if bool(done.any()):
                adv, here, velocity = adv[~done], here[~done], velocity[~done]
        return kept


# `madry20`: the 20-step column of the Madry toolbox's README, which the paper's Table 1 quotes.
PRESETS: dict[str, PGD] = {
    "default": PGD(),
    "madry20": PGD(steps=20, random_start=False, eot=1),
    "fgsm": PGD(steps=1, random_start=False, keep="last"),
}


def pgd(model: nn.Module, x: Tensor, y: Tensor, *, seed: int = 0, index: Tensor | None = None, **settings) -> Tensor:
    """Adversarial images ``(N, C, H, W)`` by PGD; ``settings`` are the attributes of `PGD`.

    Example:
        ``pgd(ensemble, x, y, norm="linf", eps=8/255, steps=20, eot=20)``
    """
    return PGD(**settings).run(model, x, y, seed, index).images


def fgsm(model: nn.Module, x: Tensor, y: Tensor, *, seed: int = 0, index: Tensor | None = None, **settings) -> Tensor:
    """Adversarial images by the fast gradient (sign) method: one step of length eps (Goodfellow et al. 2015)."""
    if extra := settings.keys() & {"steps", "step_size", "restarts", "random_start"}:
        raise ItoError(f"FGSM is one step of length eps: it takes no {', '.join(sorted(extra))}.")
    one = replace(PRESETS["fgsm"], **settings)
    return replace(one, step_size=one.eps or None).run(model, x, y, seed, index).images

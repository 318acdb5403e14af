"""Auto-PGD, correct under noise (Croce and Hein 2020, https://arxiv.org/abs/2003.01690, algorithm 1).

The published loop decides by the loss of the iterate's own gradient pass. On a randomised model that loss is another
draw at every step, and its highest value the luckiest draw. Here every decision (best iterate, halving, success) is
made on paths of the selection, the same for all iterates of an attempt; gradients have their own at every step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..noise.keys import make_keys
from .base import Attack
from .norms import BALLS
from .objectives import Objective
from .panels import Panels


@dataclass(frozen=True)
class APGD(Attack):
    """Momentum steps that begin at ``2 eps`` and halve where the loss no longer rises; see `Attack`."""

    steps: int = 100
    objective: str = "dlr"

    def checkpoints(self) -> list[int]:
        """Steps at which the step length is looked at again: 22 % of all, then ever closer, down to 6 %."""
        ends, share, length = [0], 22, 22  # in per cent: rounding must not add a step
        while share < 100:
            ends.append(-(-share * self.steps // 100))
            length = max(length - 3, 6)
            share += length
        return sorted({*ends, self.steps})

    def _climb(self, panels: Panels, objective: Objective, x: Tensor, start: Tensor | None, rows: Tensor) -> Tensor:
        ball = BALLS[self.norm]
        if start is None:
            keys = make_keys(panels.seed, "gradient", member=-1, inference=panels.attempt, index=panels.index[rows])
            start = ball.start(x, self.eps, keys).clamp(0, 1)
        adv = start
        here = torch.arange(len(x), device=x.device)  # the images still in the batch

        def look(adv: Tensor, here: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
            """The loss that decides, the gradient, and who has fallen."""
            names = rows[here]
            loss, logits, gradient = panels.ascend(objective, adv, names, step)
            if panels.noisy:
                logits = panels.judge(adv, names, 0)
                loss = panels.loss(objective, logits, names)
            done = (
                panels.beaten(adv, names, logits, 1 + step) if self.stop else torch.zeros_like(names, dtype=torch.bool)
            )
            return loss, gradient, done

        loss, gradient, done = look(adv, here, 0)
        kept = adv.clone()
        # Of the images still in the batch; compacted together when some leave.
        best, best_loss, best_gradient, before = adv, loss, gradient, adv
        length = torch.full((len(x), 1, 1, 1), 2 * self.eps, dtype=x.dtype, device=x.device)
        rises = torch.zeros(len(x), device=x.device)
        halved, best_then = torch.ones(len(x), dtype=torch.bool, device=x.device), loss.clone()
        ends = self.checkpoints()
        for step in range(1, self.steps + 1):
            if bool(done.any()):
                kept[here[done]] = adv[done]
                stay = ~done
                adv, before, gradient, best, best_loss, best_gradient, length, rises, halved, best_then, here, loss = (
                    part[stay]
                    for part in (
                        adv, before, gradient, best, best_loss, best_gradient, length, rises, halved, best_then, here,
                        loss,
                    )
                )  # fmt: skip
            if not len(here):
                return kept
            origin = x[here]
            ahead = ball.project(adv + length * ball.steepest(gradient), origin, self.eps).clamp(0, 1)
            share = 0.75 if step > 1 else 1.0
            moved = adv + share * (ahead - adv) + (1 - share) * (adv - before)
            before, adv = adv, ball.project(moved, origin, self.eps).clamp(0, 1)
            last = loss
            loss, gradient, done = look(adv, here, step)
            rises = rises + (loss > last)
            better = loss > best_loss
            picture = better[:, None, None, None]
            best, best_gradient = torch.where(picture, adv, best), torch.where(picture, gradient, best_gradient)
            best_loss = torch.where(better, loss, best_loss)
            if step in ends[1:]:
                span = step - ends[ends.index(step) - 1]
                slow = rises < 0.75 * span
                stuck = ~halved & (best_loss <= best_then)
                halved = (slow | stuck) & ~done  # an image that has fallen keeps what it fell to
                back = halved[:, None, None, None]
                length = torch.where(back, length / 2, length)
                adv, gradient = torch.where(back, best, adv), torch.where(back, best_gradient, gradient)
                loss = torch.where(halved, best_loss, loss)
                best_then, rises = best_loss.clone(), torch.zeros_like(rises)
        kept[here] = torch.where(done[:, None, None, None], adv, best)
        return kept

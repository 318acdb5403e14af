"""What a model of the zoo truly withstands: attacks along gradients that mislead nobody, long and of several kinds."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from zoo import honest

from neuralsde_ito.attacks import APGD, PGD, Attack, Square
from neuralsde_ito.attacks.objectives import Objective
from neuralsde_ito.attacks.panels import right_share
from neuralsde_ito.attacks.targets import Ascent, Target, as_target
from neuralsde_ito.models.vote import as_voter
from neuralsde_ito.noise.keys import PathRange


@dataclass
class Informed:
    """A model whose gradients are those of its honest copy, averaged over normal noise of size ``smooth`` on the input.

    Losses, and so the choice of the best iterate, are the model's own.
    """

    target: Target
    guide: Target
    smooth: float = 0.0
    copies: int = 1

    @property
    def distinct(self) -> int | None:
        return self.target.distinct

    def path_logits(self, x: Tensor, paths: PathRange) -> Tensor:
        return self.target.path_logits(x, paths)

    def ascend(self, objective: Objective, x: Tensor, y: Tensor, paths: PathRange) -> Ascent:
        gradients = [
            self.guide.ascend(objective, x + self.smooth * torch.randn_like(x), y, paths).gradient.nan_to_num(0, 0, 0)
            for _ in range(self.copies)
        ]
        logits = self.path_logits(x, paths)
        return Ascent(objective(logits, y), logits, torch.stack(gradients).mean(0))


class Judge:
    """Votes on a model's images: a selection that chooses the worst image, and a report that has seen none of them."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        self.voter, self.x, self.y = as_voter(model), x, y
        self.target, self.guide = as_target(self.voter, x), as_target(honest(model), x)
        self.index = torch.arange(len(x))

    def share(self, x: Tensor, rows: Tensor, purpose: str = "selection", count: int = 60) -> Tensor:
        """The share of paths on which the images ``x`` at ``rows`` are decided rightly."""
        paths = PathRange(1, purpose, self.index[rows], 0, self.target.distinct or count)
        return right_share(self.target.path_logits(x, paths), self.y[rows])

    def right(self, x: Tensor) -> Tensor:
        """Whether the vote decides rightly, on fresh noise, bool ``(N,)``."""
        return self.voter.predict(x, seed=1).labels == self.y

    def claim(self, norm: str, eps: float) -> Tensor:
        """Which images survive the default attack, bool ``(N,)``."""
        return self.right(_run(PGD(norm=norm, eps=eps), self.target, self.x, self.y, self.index))

    def cheap(self, norm: str, eps: float) -> float:
        """The share of images that survive a short attack along honest gradients."""
        attack = PGD(norm=norm, eps=eps, steps=20, eot=6, momentum=0.9, objective="mean-logits")
        images = _run(attack, Informed(self.target, self.guide), self.x, self.y, self.index)
        return float(self.right(images).double().mean())

    def truth(self, norm: str, eps: float) -> Tensor:
        """Which images survive all attacks along honest gradients and without gradients, bool ``(N,)``."""
        images, share = self.x.clone(), self.share(self.x, self.index)
        informed = Informed(self.target, self.guide)
        smooth = Informed(self.target, self.guide, 0.3 * eps if norm == "linf" else 0.05 * eps, 3)
        settings: dict[str, Any] = {"norm": norm, "eps": eps, "eot": 8}
        attacks: list[tuple[Attack, Target]] = [
            (PGD(steps=60, momentum=0.9, objective="mean-logits", **settings), informed),
            (PGD(steps=40, objective="dlr", **settings), informed),
            (APGD(steps=40, **settings), informed),
            (PGD(steps=20, momentum=0.9, objective="mean-logits", **settings), smooth),
            (PGD(steps=20, momentum=0.9, objective="targeted-dlr", targets=3, **settings), informed),
            (Square(steps=300, **settings), informed),
        ]
        for attack, target in attacks:
            rows = (share > 0.3).nonzero()[:, 0]
            if not len(rows):
                break
            found = _run(attack, target, self.x[rows], self.y[rows], self.index[rows])
            shares = self.share(found, rows)
            better = shares < share[rows]
            images[rows[better]], share[rows[better]] = found[better], shares[better]
        return self.right(images)


def _run(attack: Attack, target: Target, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return attack.run(target, x, y, 0, index).images

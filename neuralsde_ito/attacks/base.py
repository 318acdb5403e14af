"""What all attacks share: settings, restarts and targets, and what comes back."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models.ensemble import ItoEnsemble
from ..models.recast import ItoResNet
from ..validation import ItoError, check_images, check_labels, image_names, nearest, recordable, whole_number
from .norms import BALLS, check_eps
from .objectives import AIMED, OBJECTIVES, Objective, answered
from .panels import GOALS, Panels, comparable
from .targets import Target, as_called, as_target


@dataclass(frozen=True)
class AttackResult:
    """What an attack found.

    Attributes:
        images: ``(N, C, H, W)``, inside the ball and [0, 1].
        fooled: bool ``(N,)``, the goal was reached on the selection panel. A claim to be checked on a report panel.
        queries, gradients: inferences made without and with a gradient, over all images and paths.
        blind: bool ``(N,)``, some gradient was not finite: that such an image survives is no sign of robustness.
    """

    images: Tensor
    fooled: Tensor
    queries: int
    gradients: int
    blind: Tensor


@dataclass(frozen=True)
class Attack:
    """Settings of one attack; ``run`` is the attack.

    Attributes:
        norm: a name in `BALLS`.
        eps: radius in pixel units.
        steps: iterations.
        restarts: each begins anew on the images that still stand; the best of all counts.
        eot: paths a gradient (or a query) averages, spread over members (expectation over transformation, Athalye
            et al. 2018).
        selection: paths that judge an iterate.
        objective: a name in `OBJECTIVES`.
        targets: for an objective that aims at a class: how many wrong classes are tried, the likeliest first.
        stop: whether an image leaves the batch as soon as it is fooled beyond luck: wrong on the gradient's
            paths and with at most 15 % of the selection's paths for the right class (under evasion: not for one
            wrong class).
        goal: ``denial``, the right class loses its majority, so that the answer is wrong or there is none; or
            ``evasion``, a wrong class gets the majority. They differ where there are several paths.
    """

    norm: str = "linf"
    eps: float = 8 / 255
    steps: int = 20
    restarts: int = 1
    eot: int = 20
    selection: int = 20
    objective: str = "mean-loss"
    targets: int = 9
    stop: bool = True
    goal: str = "denial"

    def __post_init__(self) -> None:
        if self.norm not in BALLS:
            raise ItoError(nearest("norm", self.norm, BALLS))
        if self.objective not in OBJECTIVES:
            raise ItoError(nearest("objective", self.objective, OBJECTIVES))
        if self.goal not in GOALS:
            raise ItoError(nearest("goal", self.goal, GOALS))
        object.__setattr__(self, "eps", check_eps(self.norm, self.eps))
        for name in ("steps", "restarts", "eot", "selection", "targets"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))

    def run(
        self,
        model: nn.Module | Target,
        x: Tensor,
        y: Tensor,
        seed: int = 0,
        index: Tensor | None = None,
        start: Tensor | None = None,
    ) -> AttackResult:
        """Attack images.

        Args:
            model: `ItoEnsemble`, `ItoResNet`, attacked in eval mode; any module from images in [0, 1] to logits, in
                the modes that it has (see `as_called`); or a `Target` that stands for one.
            x, y: images ``(N, C, H, W)`` in [0, 1] and their true labels ``(N,)``.
            seed: of the panels and of random starts.
            index: int64 ``(N,)``, the images' names in the noise's address; default their position in ``x``.
            start: where the first attempt begins, ``(N, C, H, W)``: what another attack found. It is projected onto
                the ball.

        Warns where a gradient is not finite: its entries that are not become 0, and the attack goes on.

        Raises:
            ItoError: images, labels or a model that cannot be.
        """
        if isinstance(model, ItoResNet):
            model = ItoEnsemble([model])
        check_images(x, model.channels if isinstance(model, ItoEnsemble) else None)
        x, y, index = x.detach(), check_labels(y, len(x)), image_names(index, x)
        if start is not None and start.shape != x.shape:
            raise ItoError(f"start must be images of shape {tuple(x.shape)}, got {tuple(start.shape)}.")
        with torch.inference_mode(False):  # which would record no gradient
            x, y, index = recordable(x), recordable(y), recordable(index)
            if start is not None:
                start = BALLS[self.norm].project(recordable(start.detach()), x, self.eps).clamp(0, 1)
            if isinstance(model, nn.Module):
                with as_called(model):
                    return self._attempts(as_target(model, x), x, y, seed, index, start)
            return self._attempts(model, x, y, seed, index, start)

    def _attempts(
        self, target: Target, x: Tensor, y: Tensor, seed: int, index: Tensor, start: Tensor | None
    ) -> AttackResult:
        """Restart after restart, class after class, on the images that still stand."""
        panels = Panels(target, y, seed, index, self.eot, self.selection, self.goal, self.steps + 2)
        if panels.noisy and self.eot == 1:
            warnings.warn(
                "A randomised model is attacked with one path a gradient (eot=1): the attack is weak, "
                "and its figure no measure of robustness.",
                stacklevel=3,
            )
        objective = OBJECTIVES[self.objective]
        everyone = torch.arange(len(x), device=x.device)
        ranking = None
        if self.objective in AIMED and len(x):
            shares = panels.rank(x, everyone)
            ranking = shares.scatter(1, y[:, None].clamp(0, shares.shape[1] - 1), -1).argsort(1, descending=True)
        best, lead = x.clone(), torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
        fooled = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        classes = 1 if ranking is None else min(self.targets, ranking.shape[1] - 1)
        for panels.attempt in range(self.restarts * classes):
            rows = (~fooled).nonzero()[:, 0]
            if not len(rows):
                break
            if ranking is not None:
                panels.labels = torch.stack([y, ranking[:, panels.attempt % classes]], 1)
            begin = None if start is None or panels.attempt >= classes else start[rows]
            found = self._climb(panels, objective, x[rows], begin, rows)
            logits = panels.compare(found, rows)
            lost, loss = panels.lost(logits, rows), self._measure(logits, y[rows])
            ahead = lost | (loss > lead[rows])
            won = rows[ahead]
            best[won], lead[won], fooled[won] = found[ahead], loss[ahead], lost[ahead]
        if bool(panels.blind.any()):
            blind, survive = int(panels.blind.sum()), int((panels.blind & ~fooled).sum())
            warnings.warn(
                f"The gradient is not finite at {blind} of {len(x)} images: the model overflows or divides by zero "
                f"there, and that {survive} of them survive is no sign of robustness.",
                stacklevel=3,
            )
        return AttackResult(best, fooled, panels.queries, panels.gradients, panels.blind)

    def _measure(self, logits: Tensor, y: Tensor) -> Tensor:
        """By what the candidates of several attempts are compared, ``(N,)``: a class aimed at is no measure of them."""
        if self.goal == "evasion":  # the mean probability of the best wrong class
            return answered(logits).softmax(-1).mean(0).scatter(1, y[:, None], 0).amax(1)
        return comparable(OBJECTIVES["mean-loss" if self.objective in AIMED else self.objective](logits, y))

    def _climb(self, panels: Panels, objective: Objective, x: Tensor, start: Tensor | None, rows: Tensor) -> Tensor:
        """One attempt on images ``x`` of numbers ``rows``: from ``start`` (None: the attack's own) to what is kept."""
        raise NotImplementedError

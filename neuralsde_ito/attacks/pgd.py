"""Projected gradient descent on a randomised model (Madry et al. 2018, https://arxiv.org/abs/1706.06083).

Three panels of noise keep the attack honest: gradients average ``eot`` paths of the first, the choice
between iterates is made on the second, and whoever reports uses a third that the attack never sees.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..data import check_images
from ..ensemble import ItoEnsemble, evaluating
from ..names import nearest
from ..noise import make_keys
from ..recast import ItoResNet
from .ball import BALLS, check_eps
from .objective import OBJECTIVES, Target, as_target


@dataclass(frozen=True)
class Attacked:
    """What an attack found.

    Attributes:
        images: ``(N, C, H, W)``, inside the ball and [0, 1].
        fooled: bool ``(N,)``, the right class lost on the selection panel. A claim to be checked on a report panel.
        forwards, backwards: inferences made without and with a gradient, over all images and paths.
    """

    images: Tensor
    fooled: Tensor
    forwards: int
    backwards: int


@dataclass
class _Cost:
    forwards: int = 0
    backwards: int = 0


@dataclass(frozen=True)
class PGD:
    """Settings of one attack; ``run`` is the attack.

    Attributes:
        norm: a name in `BALLS`.
        eps: radius in pixel units.
        steps, step_size: iterations, and how far each goes (pixel units; default ``2.5 eps / steps``).
        random_start: begin at a random point of the ball (a second and later restart always does).
        restarts: each begins anew on the images that still stand; the best of all counts.
        eot: paths a gradient averages (expectation over transformation, Athalye et al. 2018), spread over members.
        selection: paths that judge an iterate.
        objective: a name in `OBJECTIVES`.
        keep: ``"best"`` iterate by the loss on the gradient's paths, or the ``"last"``.
        stop: whether an image leaves the batch as soon as it is fooled beyond luck: wrong on the gradient's
            paths and with at most 15 % of the selection's paths for the right class.
    """

    norm: str = "linf"
    eps: float = 8 / 255
    steps: int = 20
    step_size: float | None = None
    random_start: bool = True
    restarts: int = 1
    eot: int = 20
    selection: int = 20
    objective: str = "mean-loss"
    keep: str = "best"
    stop: bool = True

    def __post_init__(self) -> None:
        if self.norm not in BALLS:
            raise ValueError(nearest("norm", self.norm, BALLS))
        if self.objective not in OBJECTIVES:
            raise ValueError(nearest("objective", self.objective, OBJECTIVES))
        if self.keep not in ("best", "last"):
            raise ValueError(nearest("iterate to keep", self.keep, ("best", "last")))
        object.__setattr__(self, "eps", check_eps(self.norm, self.eps))
        for name in ("steps", "restarts", "eot", "selection"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
        if self.step_size is not None and not 0 < self.step_size < float("inf"):
            raise ValueError(f"step_size must be a positive number in pixel units, got {self.step_size}.")

    @property
    def step(self) -> float:
        """The step size in pixel units."""
        return 2.5 * self.eps / self.steps if self.step_size is None else self.step_size

    def run(self, model: nn.Module, x: Tensor, y: Tensor, seed: int = 0, index: Tensor | None = None) -> Attacked:
        """Attack images.

        Args:
            model: `ItoEnsemble`, `ItoResNet`, or any module from images in [0, 1] to logits; attacked in eval mode.
            x, y: images ``(N, C, H, W)`` in [0, 1] and their true labels ``(N,)``.
            seed: of the panels and of random starts.
            index: int64 ``(N,)``, the images' names in the noise's address; default their position in ``x``.

        Raises:
            ValueError: images or labels that cannot be.
        """
        if isinstance(model, ItoResNet):
            model = ItoEnsemble([model])
        check_images(x, model.channels if isinstance(model, ItoEnsemble) else None)
        if y.shape != (len(x),) or y.dtype.is_floating_point:
            raise ValueError(f"Labels must be whole numbers of shape ({len(x)},), got {y.dtype}, {tuple(y.shape)}.")
        x, y = x.detach(), y.long()
        index = torch.arange(len(x), device=x.device) if index is None else index.to(x.device)
        if index.shape != (len(x),):
            raise ValueError(f"index names the images: {tuple(index.shape)} for {len(x)} images.")
        cost = _Cost()
        with evaluating(model):
            target = as_target(model, x)
            if target.distinct is None and self.eot == 1:
                warnings.warn(
                    "A randomised model is attacked with one path a gradient (eot=1): the attack is weak, "
                    "and its figure no measure of robustness.",
                    stacklevel=2,
                )
            best, lead = x.clone(), torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
            fooled = torch.zeros(len(x), dtype=torch.bool, device=x.device)
            for restart in range(self.restarts):
                left = (~fooled).nonzero()[:, 0]
                if not len(left):
                    break
                found = self._climb(target, x[left], y[left], seed, index[left], restart, cost)
                # The candidates of all restarts meet the same selection paths.
                logits = self._panel(target, found, "selection", 0, seed, index[left], cost)
                loss, lost = OBJECTIVES[self.objective](logits, y[left]), _share(logits, y[left]) <= 0.5
                ahead = lost | (loss > lead[left])
                rows = left[ahead]
                best[rows], lead[rows], fooled[rows] = found[ahead], loss[ahead], lost[ahead]
        return Attacked(best, fooled, cost.forwards, cost.backwards)

    def _climb(
        self, target: Target, x: Tensor, y: Tensor, seed: int, index: Tensor, restart: int, cost: _Cost
    ) -> Tensor:
        """One restart: the iterates, from the start to the one that is kept."""
        ball, objective = BALLS[self.norm], OBJECTIVES[self.objective]
        adv = x
        if self.random_start or restart:
            keys = make_keys(seed, "gradient", member=-1, inference=restart, index=index)
            adv = ball.start(x, self.eps, keys).clamp(0, 1)
        # Of the iterate that is kept: its loss, and whether it fools.
        kept, highest = adv.clone(), torch.full_like(x[:, 0, 0, 0], -torch.inf)
        leads = torch.zeros_like(y, dtype=torch.bool)
        rows = torch.arange(len(x), device=x.device)  # the images still in the batch
        for step in range(self.steps + 1):
            if step == self.steps and self.keep == "last":
                kept[rows] = adv
                break
            draw = restart * (self.steps + 1) + step
            if step < self.steps:
                count = self._count(target, "gradient")
                cost.backwards += count * len(rows)
                found = target.ascend(objective, adv, y[rows], draw * count, count, seed, index[rows])
                loss, logits, gradient = found
                if not bool(gradient.isfinite().all()):
                    raise ValueError(
                        f"The gradient is not finite at step {step + 1}: the model overflows or divides by zero at "
                        "some images, and an attack through it would measure nothing."
                    )
            elif target.distinct is None:  # the last iterate meets the best one on paths of which neither was made
                pair = torch.stack([adv, kept[rows]]).flatten(0, 1)
                logits = self._panel(target, pair, "selection", 1 + draw, seed, index[rows].repeat(2), cost)
                last, best = objective(logits, y[rows].repeat(2)).chunk(2)
                kept[rows[last > best]] = adv[last > best]
                break
            else:  # the last iterate is only judged
                logits = self._panel(target, adv, "gradient", draw, seed, index[rows], cost)
                loss = objective(logits, y[rows])
            # Without noise, an iterate that fools comes before one that does not, however high the loss of that.
            # With noise it may have been a lucky draw, and the loss is the better judge.
            lost = (_share(logits, y[rows]) <= 0.5) & (target.distinct is not None)
            better = torch.where(lost == leads[rows], loss > highest[rows], lost)
            kept[rows[better]], highest[rows[better]], leads[rows[better]] = adv[better], loss[better], lost[better]
            done = self._fooled(target, adv, y[rows], logits, draw, seed, index[rows], cost)
            kept[rows[done]] = adv[done]
            if step == self.steps or bool(done.all()):
                break
            adv = adv + self.step * ball.steepest(gradient)
            adv = ball.project(adv, x[rows], self.eps).clamp(0, 1)
            if bool(done.any()):
                adv, rows = adv[~done], rows[~done]
        return kept

    def _panel(
        self, target: Target, x: Tensor, purpose: str, draw: int, seed: int, index: Tensor, cost: _Cost
    ) -> Tensor:
        """Logits ``(P, N, classes)`` on the ``draw``-th set of paths of a panel, without a gradient."""
        count = self._count(target, purpose)
        cost.forwards += count * len(x)
        return target.paths(x, draw * count, count, seed, purpose, index)

    def _count(self, target: Target, purpose: str) -> int:
        """Paths of a panel; without noise all that there are."""
        return target.distinct or (self.eot if purpose == "gradient" else self.selection)

    def _fooled(
        self,
        target: Target,
        x: Tensor,
        y: Tensor,
        logits: Tensor,
        draw: int,
        seed: int,
        index: Tensor,
        cost: _Cost,
    ) -> Tensor:
        """Which images may leave the batch: bool ``(N,)``. Suspects must lose on paths of the selection, too."""
        done = _share(logits, y) <= 0.5 if self.stop else torch.zeros_like(y, dtype=torch.bool)
        if target.distinct is None and bool(done.any()):
            suspects = done.nonzero()[:, 0]
            judged = self._panel(target, x[suspects], "selection", 1 + draw, seed, index[suspects], cost)
            done[suspects] = _share(judged, y[suspects]) <= _BEYOND_LUCK
        return done


# Of 20 paths at most 3: were the right class still ahead of one other, at a half, that would happen once in 780 times.
_BEYOND_LUCK = 0.15


def _share(logits: Tensor, y: Tensor) -> Tensor:
    """The share of paths on which the right class wins: ``(P, N, classes), (N,) -> (N,)``."""
    return (logits.argmax(-1) == y).float().mean(0)


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
        raise ValueError(f"FGSM is one step of length eps: it takes no {', '.join(sorted(extra))}.")
    one = replace(PRESETS["fgsm"], **settings)
    return replace(one, step_size=one.eps or None).run(model, x, y, seed, index).images

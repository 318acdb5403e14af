"""Check 17, the binarisation test (Zimmermann et al. 2022, https://arxiv.org/abs/2206.13991).

An adversarial image that is known to exist is planted in every ball: does the attack find it?
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from scipy.stats import binom
from torch import Tensor, nn

from ..attacks.norms import BALLS
from ..attacks.targets import ModuleTarget
from ..noise.keys import PathRange
from .battery import suspicion
from .case import AuditCase
from .check import LEVEL, NotApplicable, check, percent, require_correct, untargeted_objective

_POINTS = 100  # of each kind around an image


@check(
    17,
    "binarisation test",
    "planted adversarials found < 95 %, beyond chance",
    "Zimmermann et al. 2022",
    "Where an adversarial image is known to exist, the attack finds it.",
    "The attack misses adversarial images that are known to exist: its figure says little of the others.",
)
def binarisation(case: AuditCase) -> tuple[str, bool]:
    """Plant one adversarial image on each ball's surface, see `_plant`, and look for it by the attack.

    At most 20 images take part. The noise of an ensemble is fixed.
    """
    model = case.fixed
    if model is None:
        raise NotApplicable("A readout needs features that are the same at every call, image by image.")
    rows = require_correct(case)[:20]
    with torch.no_grad():
        readouts, apart, by_chance = _plant(case, model, rows)
    if by_chance > 0.5:
        raise NotApplicable(f"Random points find {percent(by_chance)} of what is planted: a test that chance passes.")
    rows = rows[apart]
    target = _ReadoutTarget(model, case.x[rows], case.index[rows], readouts, case.batch_size)
    # Every image goes on to the last step: it is judged here, not by the attack.
    attack = replace(case.attack, stop=False, restarts=1, eot=1, objective=untargeted_objective(case.attack))
    images = case.run(attack, target, rows, torch.zeros_like(rows)).images
    with torch.no_grad():
        scores = target.path_logits(images, PathRange(case.seed, "report", case.index[rows]))[0, :, 1]
        found = int((scores > 0).sum())
    figure = f"{percent(found / len(rows))} of {len(rows)} (random {percent(by_chance)})"
    # Of 20 images one or two may be missed by chance: by the exact binomial test.
    if binom.cdf(found, len(rows), 0.95) >= LEVEL:
        return figure, False
    note = "The attack misses what is planted, yet others find no more of the model's own: take more steps."
    return suspicion(case, figure, found < len(rows) / 2, note)


@dataclass(frozen=True)
class _Readouts:
    """A linear readout of the logits for each of ``N`` images; it is adversarial where its score exceeds the level.

    Attributes:
        weight, centre: ``(N, classes)``; the score of logits ``z`` is ``(z - centre) . weight``.
        level: ``(N,)``.
    """

    weight: Tensor
    centre: Tensor
    level: Tensor


def _plant(case: AuditCase, model: nn.Module, rows: Tensor) -> tuple[_Readouts, Tensor, float]:
    """Choose for every image a readout that one point of the ball's surface exceeds, and no point within eps / 2 does.

    The readout is Fisher's linear discriminant between that point and 100 points within eps / 2. Of 100 points on the
    surface the one that is farthest from the inner points is planted: random points would find the others too. The
    level leaves 0.1 % of the gap between the inner points and the planted one.

    Returns:
        The readouts of the images that can be read apart; which these are, bool ``(N,)``; and the share of these
        images for which 100 random points of the ball exceed the level at least once.

    Raises:
        NotApplicable: fewer than 5 images can be read apart.
    """
    eps = case.attack.eps
    cloud = _features(case, model, rows, eps / 2, first=0)
    surface = _features(case, model, rows, eps, first=_POINTS, surface=True)
    random = _features(case, model, rows, eps, first=2 * _POINTS)
    centre = cloud.mean(0)
    cloud, surface, random = cloud - centre, surface - centre, random - centre
    scatter = torch.einsum("knc,knd->ncd", cloud, cloud) / _POINTS
    spread = scatter.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    ridge = 1e-4 * spread[:, None, None] * torch.eye(scatter.shape[1], device="cpu").to(scatter)
    # Fisher's direction for every surface point, and the point's score along it: (K, N, classes) and (K, N).
    directions = torch.linalg.solve(scatter + ridge, surface.permute(1, 2, 0)).permute(2, 0, 1)
    score, farthest = (surface * directions).sum(-1).max(0)
    weight = directions[farthest, torch.arange(len(rows), device=case.x.device)]
    inside = (cloud * weight).sum(-1).amax(0).clamp_min(0)
    apart = (score > 1.01 * inside) & (score > 0)
    if int(apart.sum()) < 5:
        raise NotApplicable("A linear readout of the logits tells too few surface points from inner ones.")
    level = inside + 0.999 * (score - inside)
    by_chance = float(((random * weight).sum(-1) > level).any(0)[apart].cpu().double().mean())
    return _Readouts(weight[apart], centre[apart], level[apart]), apart, by_chance


def _features(
    case: AuditCase, model: nn.Module, rows: Tensor, radius: float, first: int, surface: bool = False
) -> Tensor:
    """Logits ``(points, N, classes)`` of random points around every image, within the radius or at it.

    Args:
        case, model: the audit's case, and its model with the noise fixed.
        rows: positions of the images ``(N,)``.
        radius: in pixel units.
        first: the number of the first point, see `AuditCase.random_points`.
        surface: take points at the radius: corners of the ball under L-inf, points of the sphere under L2.
    """
    precise = torch.float32 if case.x.device.type == "mps" else torch.float64  # mps has no float64
    ball, at_once = BALLS[case.attack.norm], max(1, 500 // len(rows))
    features = []
    for draws in torch.arange(first, first + _POINTS, device=case.x.device).split(at_once):
        batch = rows.repeat(len(draws))
        points = case.random_points(case.x[batch], batch, radius, draws.repeat_interleave(len(rows)))
        if surface:
            points = case.x[batch] + radius * ball.steepest(points - case.x[batch])
        features.append(case.logits(model, points.clamp(0, 1)))
    return torch.cat(features).view(_POINTS, len(rows), -1).to(precise)


class _ReadoutTarget(ModuleTarget):
    """Two logits: 0, and how far the score of the image's own readout exceeds its level, relative to the level."""

    def __init__(self, model: nn.Module, x: Tensor, index: Tensor, readouts: _Readouts, batch_size: int | None) -> None:
        super().__init__(model, x, batch_size)
        self.readouts = readouts
        self._sorted_index, self._order = index.sort()

    def readout(self, logits: Tensor, index: Tensor) -> Tensor:
        """``(P, N, classes) -> (P, N, 2)``; ``index`` ``(N,)`` names the images."""
        own, readouts = self._order[torch.searchsorted(self._sorted_index, index)], self.readouts
        features = logits.to(readouts.weight) - readouts.centre[own]
        score = (features * readouts.weight[own]).sum(-1) / readouts.level[own] - 1
        return torch.stack([torch.zeros_like(score), score], -1).to(logits.dtype)

"""The binarisation test (Zimmermann et al. 2022): is an adversarial image found that is known to exist?"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..attacks.norms import BALLS
from ..attacks.targets import ModuleTarget
from ..noise.keys import PathRange
from .case import Reseeded, Subject
from .check import Beside, check, percent, plain


@check(
    17,
    "binarisation test",
    "planted adversarials found < 95 %",
    "Zimmermann et al. 2022",
    "Where an adversarial image is known to exist, the attack finds it.",
    "The attack misses adversarial images that are known to exist: its figure says little of the others.",
)
def binarisation(s: Subject) -> tuple[str, bool]:
    """Plant one adversarial image on each ball's surface, by a linear readout of the logits, and look for it.

    The readout is Fisher's: it tells the planted point from 100 points within eps / 2. Of 100 points on the surface
    the farthest from these is planted, as chance would find the others too; the readout's threshold leaves 0.1 % of
    the gap to it. The noise of an ensemble is fixed.
    """
    model = s.fixed
    if model is None or isinstance(model, Reseeded):
        raise Beside("A readout needs features that are the same at every call, image by image.")
    rows = s.right[:20]
    eps, count = s.attack.eps, 100
    if not len(rows):
        raise Beside("The model is right on no clean image.")
    exact = torch.float32 if s.x.device.type == "mps" else torch.float64  # that device has no other
    ball, size = BALLS[s.attack.norm], max(1, 500 // len(rows))

    def features(radius: float, first: int, surface: bool = False) -> Tensor:
        """Of ``count`` points around every image, within the radius or on it: ``(count, N, classes)``."""
        found = []
        for draws in torch.arange(first, first + count, device=s.x.device).split(size):
            batch = rows.repeat(len(draws))
            points = s.noise(s.x[batch], batch, radius, draws.repeat_interleave(len(rows)))
            if surface:  # a corner under L-inf, a point of the sphere under L2
                points = s.x[batch] + radius * ball.steepest(points - s.x[batch])
            found.append(s.answers(model, points.clamp(0, 1)))
        return torch.cat(found).view(count, len(rows), -1).to(exact)

    with torch.no_grad():
        cloud, surface, tries = features(eps / 2, 0), features(eps, count, surface=True), features(eps, 2 * count)
        centre = cloud.mean(0)
        cloud, surface, tries = cloud - centre, surface - centre, tries - centre
        scatter = torch.einsum("knc,knd->ncd", cloud, cloud) / count
        spread = scatter.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
        ridge = 1e-4 * spread[:, None, None] * torch.eye(scatter.shape[1]).to(scatter)
        # Fisher's direction for every surface point, and its distance from the cloud along it, both (K, N, ...).
        directions = torch.linalg.solve(scatter + ridge, surface.permute(1, 2, 0)).permute(2, 0, 1)
        score, farthest = (surface * directions).sum(-1).max(0)
        weight = directions[farthest, torch.arange(len(rows), device=s.x.device)]
        inside = (cloud * weight).sum(-1).amax(0).clamp_min(0)
        apart = (score > 1.01 * inside) & (score > 0)
        if int(apart.sum()) < 5:
            raise Beside("A linear readout of the logits tells too few surface points from inner ones.")
        level = inside + 0.999 * (score - inside)
        by_chance = float(((tries * weight).sum(-1) > level).any(0)[apart].double().mean())
    if by_chance > 0.5:
        raise Beside(f"Random points find {percent(by_chance)} of what is planted: a test that chance passes.")
    rows = rows[apart]
    readout = _Readout(model, s.x[rows], s.index[rows], weight[apart], centre[apart], level[apart], s.batch_size)
    # All rows to the end: the images are judged here, not by the attack.
    attack = replace(s.attack, stop=False, restarts=1, eot=1, objective=plain(s.attack))
    images = s.run(attack, readout, rows, torch.zeros_like(rows)).images
    with torch.no_grad():
        scores = readout.path_logits(images, PathRange(s.seed, "report", s.index[rows]))[0, :, 1]
        found = float((scores > 0).double().mean())
    return f"{percent(found)} of {len(rows)} (random {percent(by_chance)})", found < 0.95


class _Readout(ModuleTarget):
    """Two logits, 0 and the readout's score above its level; every image of an ``index`` has a readout of its own."""

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        index: Tensor,
        weight: Tensor,
        centre: Tensor,
        level: Tensor,
        batch_size: int | None,
    ) -> None:
        super().__init__(model, x, batch_size)
        self.weight, self.centre, self.level = weight, centre, level
        self._names, self._order = index.sort()

    def logits(self, x: Tensor, index: Tensor) -> Tensor:
        """``(N, C, H, W) -> (N, 2)``."""
        own = self._order[torch.searchsorted(self._names, index)]
        features = super().logits(x, index).to(self.weight) - self.centre[own]
        score = (features * self.weight[own]).sum(1) / self.level[own] - 1
        return torch.stack([torch.zeros_like(score), score], 1).to(x.dtype)

"""How little has to change: the smallest perturbation of each image, by gradients, or by decisions alone (HopSkipJump).

An attack that keeps the smallest perturbation which it has ever seen succeed keeps the luckiest draw of a randomised
model. Here a search judges all its iterates on the same numbered paths. Then each perturbation grows until three votes
on other paths agree that it succeeds.

Own code, because foolbox's is not right here. On a noisy ensemble (docs/results.md) a fresh vote denies 4 of 50 images
of its DDN, and 44 of ours. On fixed paths, its FMN depends on a step size in pixel units (digits under L2: median
radius 0.85 with its default, 0.51 with a tenth of it, 0.40 here) and under L1 found nothing for 8 of 20 images. Its
HopSkipJump divides the directions of a batch by their common length, and fails where two decisions differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..models.inspection import as_called
from ..models.vote import as_voter
from ..models.voting import Voter
from ..noise.keys import make_keys
from ..noise.normals import normals
from ..outcomes import ABSTAIN
from ..validation import check_images, check_labels, image_names, one_of, recordable, whole_number
from .active import choose
from .images import Images
from .norms import BALLS
from .objectives import mean_logits
from .panels import GOALS, Panels, goal_reached
from .report import Report
from .selection import selection_votes
from .targets import as_target

_GROWTH, _ROUNDS = 1.03, 80  # a perturbation grows by 3 % at a time, at most tenfold
_DIRECTIONS = -4  # the use of HopSkipJump's random numbers: members of an ensemble are not negative
_AT_ONCE = 1000  # perturbed images in one vote


@dataclass(frozen=True)
class SmallestPerturbations:
    """The smallest perturbations that an attack has found for ``N`` images: upper bounds on the true ones.

    Attributes:
        radii: ``(N,)``, their norms in pixel units; 0 where the vote denies the clean image, infinite where none was
            found.
        images: ``(N, C, H, W)`` in [0, 1]; the clean image where none was found.
        queries, gradients: inferences made without and with a gradient, over all images and paths.
    """

    radii: Tensor
    images: Tensor
    queries: int
    gradients: int


def minimal_norm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    norm: str = "l2",
    *,
    steps: int = 100,
    eot: int = 8,
    goal: str = "denial",
    seed: int = 0,
    index: Tensor | None = None,
) -> SmallestPerturbations:
    """The smallest perturbations by gradients, with the radius decoupled from the direction.

    A step of DDN (Rony et al. 2019, https://arxiv.org/abs/1811.09600): the radius of an image shrinks where its iterate
    succeeds, and grows where it does not; the iterate moves along the steepest direction and is projected onto the
    ball. As in FMN (Pintor et al. 2021, https://arxiv.org/abs/2102.12827) both lengths fall along a cosine. They are
    relative to the radius, so that no step size has to be chosen.

    Args:
        model: as in `Attack.run`.
        x, y: images ``(N, C, H, W)`` in [0, 1] and their true labels ``(N,)``.
        norm: a name in `BALLS`.
        steps: iterations.
        eot: fresh paths that a gradient averages. An iterate is judged on 20 paths, in all steps the same ones.
        goal: ``denial`` or ``evasion``, see `Attack`.
        seed: of the paths.
        index: int64 ``(N,)``, the images' names in the noise's address; default their position in ``x``.

    Raises:
        ItoError: an argument that cannot be used.

    Example:
        ``radii = ito.attacks.minimal_norm(ensemble, x, y, "linf").radii``
    """
    one_of("norm", norm, BALLS)
    steps, eot = whole_number("steps", steps), whole_number("eot", eot)

    def search(task: _Task) -> tuple[Tensor, int, int]:
        images = task.images
        panels = Panels(as_target(task.voter, images.x), images.y, seed, images.index, eot, 20, steps)
        return _decoupled(panels, images.x, norm, goal, steps), panels.queries, panels.gradients

    return _smallest(model, x, y, norm, goal, seed, index, search)


def _decoupled(panels: Panels, x: Tensor, norm: str, goal: str, steps: int) -> Tensor:
    """The search of `minimal_norm`: the nearest iterates found ``(N, C, H, W)``; the original where none succeeded."""
    ball, every = BALLS[norm], torch.arange(len(x), device=x.device)
    radius = ball.length(torch.maximum(x, 1 - x))[:, None, None, None]  # that of the farthest image
    best, least, iterate = x.clone(), radius, x
    for step in range(steps):
        fall = (1 + math.cos(math.pi * step / steps)) / 2
        gamma, length = 0.005 + 0.495 * fall, 0.02 + 0.98 * fall
        gradient = panels.ascend(mean_logits, iterate, every, step).gradient
        moved = iterate + length * radius * ball.steepest(gradient, iterate)
        iterate = ball.project(moved, x, radius).clamp(0, 1)
        won = goal_reached(panels.judge(iterate, every, 0), panels.labels, goal)
        size = ball.length(iterate - x)
        better = won & (size < least.flatten())
        best, least = choose(better, iterate, best), choose(better, size[:, None, None, None], least)
        found = (best != x).flatten(1).any(1)
        grown = torch.where(
            found[:, None, None, None], torch.minimum(radius * (1 + gamma), least), radius * (1 + gamma)
        )
        radius = choose(won, torch.minimum(radius, least) * (1 - gamma), grown)
    return best


def decision_based(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    norm: str = "l2",
    *,
    steps: int = 20,
    directions: int = 100,
    goal: str = "denial",
    seed: int = 0,
    index: Tensor | None = None,
) -> SmallestPerturbations:
    """Small perturbations from decisions alone, by HopSkipJump (Chen et al. 2020, https://arxiv.org/abs/1904.02144).

    A decision is a vote, with an abstention as one of the answers. No gradient and no logits are used, so nothing that
    masks them misleads the attack.

    Args:
        model, x, y, goal, seed, index: as in `minimal_norm`. The search begins at another image of ``x`` on which the
            goal is reached, or else at a noisy one.
        norm: ``linf`` or ``l2``.
        steps: iterations.
        directions: random directions, on either side of the boundary, of the first iteration; later ones take the root
            of their number times as many.

    Raises:
        ItoError: an argument that cannot be used.
    """
    one_of("norm", norm, ("linf", "l2"))
    steps, directions = whole_number("steps", steps), whole_number("directions", directions)

    def search(task: _Task) -> tuple[Tensor, int, int]:
        hop = _HopSkipJump(task, norm, goal, seed)
        return hop.run(steps, directions), hop.queries, 0

    return _smallest(model, x, y, norm, goal, seed, index, search)


@dataclass(frozen=True)
class _Task:
    """A search: the voter, the images that it gets right, and all images, from which it may begin."""

    voter: Voter
    images: Images
    every: Images


def _smallest(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    norm: str,
    goal: str,
    seed: int,
    index: Tensor | None,
    search: Callable[[_Task], tuple[Tensor, int, int]],
) -> SmallestPerturbations:
    """Search where the clean image is not won yet, and let what was found grow until votes of the selection agree."""
    one_of("goal", goal, GOALS)
    voter = as_voter(model)
    check_images(x, voter.channels)
    with torch.inference_mode(False), as_called(voter):
        voter.observe(x)
        every = Images(recordable(x.detach()), recordable(check_labels(y, len(x))), recordable(image_names(index, x)))
        radii, images = torch.full((len(x),), torch.inf, device=x.device), every.x.clone()
        won = _won(voter, every, goal, seed)
        radii[won] = 0
        rows, queries, gradients = (~won).nonzero()[:, 0], 0, 0
        if len(rows):
            found, queries, gradients = search(_Task(voter, every[rows], every))
            images[rows], radii[rows] = _grown(voter, every[rows], found, norm, goal, seed)
    return SmallestPerturbations(radii, images, queries, gradients)


def _won(voter: Voter, candidates: Images, goal: str, seed: int) -> Tensor:
    """Whether all votes of the selection say that the goal is reached, bool ``(N,)``."""
    return getattr(selection_votes(voter, candidates, Report(seed)), goal)


def _grown(voter: Voter, images: Images, found: Tensor, norm: str, goal: str, seed: int) -> tuple[Tensor, Tensor]:
    """Perturbations as large as votes of the selection want them: images ``(N, C, H, W)`` and radii ``(N,)``."""
    result, radii = images.x.clone(), torch.full((len(found),), torch.inf, device=found.device)
    delta = found - images.x
    rows = delta.flatten(1).any(1).nonzero()[:, 0]  # a search that found nothing leaves the image as it is
    for turn in range(_ROUNDS):
        if not len(rows):
            break
        some = images[rows]
        candidates = (some.x + _GROWTH**turn * delta[rows]).clamp(0, 1)
        won = _won(voter, replace(some, x=candidates), goal, seed)
        result[rows[won]] = candidates[won]
        radii[rows[won]] = BALLS[norm].length(candidates - some.x)[won].to(radii.dtype)
        rows = rows[~won]
    return result, radii


class _HopSkipJump:
    """The search of `decision_based`. All its random numbers belong to an image, and to nothing else in its batch."""

    def __init__(self, task: _Task, norm: str, goal: str, seed: int) -> None:
        self.task, self.norm, self.goal, self.seed = task, norm, goal, seed
        self.queries = 0

    def wins(self, images: Tensor, rows: Tensor) -> Tensor:
        """The decisions on images ``(K, C, H, W)`` that are perturbed ones of ``rows`` ``(K,)``: bool ``(K,)``."""
        some, won = self.task.images[rows], []
        for part, y, index in zip(
            images.split(_AT_ONCE), some.y.split(_AT_ONCE), some.index.split(_AT_ONCE), strict=True
        ):
            prediction = self.task.voter.predict(part, self.seed, index, "gradient")
            self.queries += int(prediction.drawn.sum())
            wrong = prediction.labels != y
            won.append(wrong if self.goal == "denial" else wrong & (prediction.labels != ABSTAIN))
        return torch.cat(won)

    def run(self, steps: int, directions: int) -> Tensor:
        """The nearest images found ``(N, C, H, W)``; the original where no start was found."""
        x = self.task.images.x
        found, rows = self._start()
        if not len(rows):
            return found
        size = x[0].numel()
        found[rows] = self._nearer(found[rows], rows)
        for step in range(1, steps + 1):
            distance = self._distance(found, rows)
            reach = (0.1 if step == 1 else distance / size) * torch.ones_like(distance)  # the paper's, for gamma = 1
            count = round(directions * step**0.5)
            direction = self._direction(found[rows], rows, reach, step, count)
            found[rows] = self._nearer(self._jump(found[rows], rows, direction, distance / step**0.5), rows)
        return found

    def _distance(self, found: Tensor, rows: Tensor) -> Tensor:
        return BALLS[self.norm].length(found[rows] - self.task.images.x[rows])[:, None, None, None]

    def _start(self) -> tuple[Tensor, Tensor]:
        """Images on which the goal is reached, and the rows for which there is one."""
        x, every = self.task.images.x, self.task.every.x
        found, left = x.clone(), torch.arange(len(x), device=x.device)
        near = torch.cdist(x.flatten(1), every.flatten(1)).argsort(1)[:, 1:]  # the nearest one is the image itself
        uniform = torch.special.ndtr(normals(self._keys(left), x[0].numel(), dtype=x.dtype)).view(x.shape)
        others = [every[near[:, k]] for k in range(min(near.shape[1], 20))]
        for candidate in (*others, *(x.lerp(uniform, share) for share in (0.25, 0.5, 0.75, 1.0))):
            if not len(left):
                break
            won = self.wins(candidate[left], left)
            found[left[won]] = candidate[left[won]]
            left = left[~won]
        failed = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        failed[left] = True
        return found, (~failed).nonzero()[:, 0]

    def _keys(self, rows: Tensor) -> Tensor:
        return make_keys(self.seed, "gradient", _DIRECTIONS, index=self.task.images.index[rows])

    def _direction(self, at: Tensor, rows: Tensor, reach: Tensor, step: int, count: int) -> Tensor:
        """The direction away from the right answer, estimated at images on the boundary, ``(K, C, H, W)``."""
        draws = normals(self._keys(rows), count * at[0].numel(), step, dtype=at.dtype).view(len(at), count, -1)
        draws = draws / draws.norm(dim=2, keepdim=True)
        points = (at[:, None] + reach[:, None] * draws.view(len(at), count, *at.shape[1:])).clamp(0, 1)
        won = self.wins(points.flatten(0, 1), rows.repeat_interleave(count)).view(len(at), count)
        moved = ((points - at[:, None]) / reach[:, None]).flatten(2)  # the box may have shortened a direction
        sign = torch.where(won, 1.0, -1.0).to(at.dtype)
        mean = sign.mean(1, keepdim=True)
        weight = torch.where(mean.abs() == 1, sign, sign - mean)
        direction = (weight[..., None] * moved).mean(1).view(at.shape)
        return BALLS[self.norm].steepest(direction)

    def _jump(self, at: Tensor, rows: Tensor, direction: Tensor, length: Tensor) -> Tensor:
        """Step along the direction, half as far until the goal is reached; else stay."""
        result, left = at.clone(), torch.arange(len(at), device=at.device)
        for _ in range(12):
            if not len(left):
                break
            points = (at[left] + length[left] * direction[left]).clamp(0, 1)
            won = self.wins(points, rows[left])
            result[left[won]] = points[won]
            left, length = left[~won], length / 2
        return result

    def _nearer(self, found: Tensor, rows: Tensor) -> Tensor:
        """The point next to the boundary between the original and ``found`` ``(K, C, H, W)``, by bisection."""
        x = self.task.images.x[rows]
        far = BALLS[self.norm].length(found - x)[:, None, None, None]
        low, high = torch.zeros_like(far), torch.ones_like(far)
        for _ in range(14):
            middle = (low + high) / 2
            won = self.wins(self._shorter(x, found, far, middle), rows)[:, None, None, None]
            low, high = torch.where(won, low, middle), torch.where(won, middle, high)
        return self._shorter(x, found, far, high)

    def _shorter(self, x: Tensor, found: Tensor, far: Tensor, share: Tensor) -> Tensor:
        """The nearest point to ``found`` whose distance from ``x`` is a share ``(K, 1, 1, 1)`` of ``found``'s."""
        if self.norm == "linf":
            return x + (found - x).clamp(-share * far, share * far)
        return torch.where(share == 1, found, x + share * (found - x))

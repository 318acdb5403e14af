"""A model under audit: its decisions, its gradients, and the attacks that several checks share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..attacks.base import Attack, AttackResult
from ..attacks.inspection import alike, answers, as_called, check_weights, replay
from ..attacks.norms import BALLS
from ..attacks.objectives import Objective
from ..attacks.panels import right_share
from ..attacks.pgd import PGD
from ..attacks.targets import NO_GRADIENT, Ascent, Target, as_target
from ..models.ensemble import ItoEnsemble, NoiseFree
from ..models.recast import ItoResNet
from ..models.votes import decide, winners
from ..noise.keys import PathRange, make_keys
from ..outcomes import ABSTAIN, Outcomes, Rate
from ..sde.solvers import find_solver
from ..validation import ItoError, check_images, check_labels, image_names, shown, whole_number

_VOTES = 20  # forwards that decide for a randomised module that is not an ensemble of ours


class Traced:
    """A target that remembers what an attack showed it, image by image.

    Attributes:
        losses: one tensor ``(N,)`` for every gradient, NaN where an image was not in the batch.
        last: ``(N, C, H, W)``, the last iterate of which a gradient was taken.
        closest, share: the iterate ``(N, C, H, W)`` at which the right class had its smallest share of paths ``(N,)``.
    """

    def __init__(self, target: Target, x: Tensor, index: Tensor) -> None:
        self.target, self.distinct = target, target.distinct
        self.losses: list[Tensor] = []
        self.last, self.closest = x.clone(), x.clone()
        self.share = torch.full((len(x),), torch.inf, device=x.device)
        self._names, self._order = index.sort()

    def path_logits(self, x: Tensor, paths: PathRange) -> Tensor:
        """As the target has them."""
        return self.target.path_logits(x, paths)

    def ascend(self, objective: Objective, x: Tensor, y: Tensor, paths: PathRange) -> Ascent:
        """As the target does, and remembered."""
        found = self.target.ascend(objective, x, y, paths)
        rows = self._order[torch.searchsorted(self._names, paths.index)]
        self.losses.append(torch.full_like(self.share, torch.nan))
        self.losses[-1][rows] = found.loss.to(self.share)
        share = right_share(found.logits, y)
        closer = share < self.share[rows]
        self.last[rows] = x
        self.closest[rows[closer]], self.share[rows[closer]] = x[closer], share[closer]
        return found


@dataclass(frozen=True)
class Attempt:
    """An attack on some of the images, judged by noise that it never saw.

    Attributes:
        images: ``(N, C, H, W)``; the clean image where none was attacked.
        labels: ``(N,)``, the model's decisions.
        standing: bool ``(N,)``, decided rightly.
        claimed: bool ``(N,)``, what the attack took for a success.
        trace: what the attack showed the model; None where gradients were another network's.
    """

    images: Tensor
    labels: Tensor
    standing: Tensor
    claimed: Tensor
    trace: Traced | None


class FixedPaths(nn.Module):
    """An ensemble that always uses the same few paths, whatever the image: a deterministic network.

    Its logits are the log mean probability over ``count`` paths, which are the report's of image 0 and ``seed``.
    """

    def __init__(self, ensemble: ItoEnsemble, count: int, seed: int) -> None:
        super().__init__()
        self.ensemble, self.count, self.seed = ensemble.quick(), count, seed

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W) -> (N, classes)``."""
        same = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        logits = self.ensemble.path_logits(x, PathRange(self.seed, "report", same, 0, self.count))
        return logits.log_softmax(-1).logsumexp(0) - math.log(self.count)


class Reseeded(nn.Module):
    """A randomised module that draws from torch's global generator, with the same draws at every call.

    The generator outside is left as it was. Draws follow the place in the batch: cut batches at the same places always.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        super().__init__()
        self.model, self.seed = model, seed

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W) -> (N, classes)``."""
        return replay(self.model, x, self.seed)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model as it is called, see `as_called`, and no gradient of parameters; afterwards all is as it was."""
    check_weights(model)
    wanted = [p for p in model.parameters() if p.requires_grad]
    with as_called(model):
        try:
            for p in wanted:
                p.requires_grad_(False)
            yield
        finally:
            for p in wanted:
                p.requires_grad_(True)


class Subject:
    """A model, images, and the attack whose figure is in doubt. Use it with all networks `frozen`.

    Args:
        model: `ItoEnsemble`, `ItoResNet` (an ensemble of one), or any module from images in [0, 1] to logits.
        x, y: images ``(N, C, H, W)`` in [0, 1] and true labels ``(N,)``.
        attack: the white-box attack.
        seed: of all noise.
        index: int64 ``(N,)``, the images' names in the noise's address, no two alike; default their position.
        surrogates: networks to transfer attacks from, by name; for Itô models the noise-free network is added.
        queries: of the black-box attack, an image.
        draws: random points an image; for a randomised model, points in all.
        batch_size: images that go through a module at a time, see `ModuleTarget`; an ensemble has its own ``chunk``.

    Raises:
        ItoError: images, labels, names or a radius that cannot be.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        attack: PGD | None = None,
        seed: int = 0,
        index: Tensor | None = None,
        surrogates: Mapping[str, nn.Module] | None = None,
        queries: int = 500,
        draws: int = 10_000,
        batch_size: int | None = None,
    ) -> None:
        for network in (model, *(surrogates or {}).values()):
            if not isinstance(network, nn.Module):
                raise ItoError(f"A model must be an nn.Module, got {shown(network)}; wrap a function in one.")
        self.model = ItoEnsemble([model]) if isinstance(model, ItoResNet) else model
        check_images(x, self.model.channels if isinstance(self.model, ItoEnsemble) else None)
        if x.dtype not in (torch.float32, torch.float64):
            raise ItoError(
                f"An attack's steps are lost in {x.dtype}: give the images in float32, and let the model convert them."
            )
        self.x, self.y, self.attack, self.seed = x.detach(), check_labels(y, len(x)).to(x.device), attack or PGD(), seed
        self.index = image_names(index, x)
        if len(self.index.unique()) < len(x):
            raise ItoError(f"index names the images: one whole number for each of {len(x)}, no two alike.")
        if self.attack.eps == 0:
            raise ItoError("An audit needs a ball to attack in: eps must be above 0.")
        self.queries, self.draws = whole_number("queries", queries), whole_number("draws", draws)
        self.batch_size = None if batch_size is None else whole_number("batch_size", batch_size)
        own = {"noise-free": NoiseFree(self.model)} if isinstance(self.model, ItoEnsemble) else {}
        self.surrogates: dict[str, nn.Module] = {**own, **(surrogates or {})}
        for net in self.surrogates.values():
            network = ItoEnsemble([net]) if isinstance(net, ItoResNet) else net
            check_images(x, network.channels if isinstance(network, ItoEnsemble) else None)

    @property
    def adaptive(self) -> bool:
        """Whether some solver chooses its own steps, and no attack can run."""
        return any(isinstance(m, ItoResNet) and find_solver(m.solver).adaptive for m in self.model.modules())

    @cached_property
    def target(self) -> Target:
        """The model as attacks see it."""
        return as_target(self.model, self.x, self.batch_size)

    @cached_property
    def others(self) -> dict[str, Target]:
        """The surrogates as attacks see them."""
        return {name: as_target(net, self.x, self.batch_size) for name, net in self.surrogates.items()}

    def answers(self, model: nn.Module, x: Tensor) -> Tensor:
        """Logits ``(K, classes)`` of the model or of another network, a batch at a time."""
        return answers(model, x, self.batch_size or 256)

    @property
    def random(self) -> bool:
        """Whether there is noise."""
        return self.target.distinct is None

    @cached_property
    def classes(self) -> int:
        """How many the model tells apart.

        Raises:
            ItoError: the output is not ``(N, classes)``, no gradient comes back from it, or a label has no class.
        """
        with torch.enable_grad():
            for count in (1, 2):  # an attack comes down to a single image in the end
                out = self.answers(self.model, self.x[:count].clone().requires_grad_())
        if not out.requires_grad:
            raise ItoError(NO_GRADIENT)
        if len(odd := self.y[(self.y < 0) | (self.y >= out.shape[1])]):
            raise ItoError(f"Labels must be from 0 to {out.shape[1] - 1}, got {int(odd[0])}.")
        return out.shape[1]

    @torch.no_grad()
    def decide(self, x: Tensor, rows: Tensor | None = None, vote: int = 0) -> Tensor:
        """Decisions ``(K,)`` by noise that no attack has seen; for another ``vote``, by other noise.

        Args:
            x: ``(K, C, H, W)``.
            rows: ``(K,)``, which images these are variants of; default all in order.
            vote: the number of the vote.
        """
        if isinstance(self.model, ItoEnsemble):
            return self.model.predict(x, self.seed + vote, self.index if rows is None else self.index[rows]).labels
        labels = torch.stack([winners(self.answers(self.model, x)) for _ in range(self._votes)])
        votes = F.one_hot(labels.clamp_min(0), self.classes) * (labels != ABSTAIN)[..., None]
        return decide(votes.sum(0)[None], inferences=self._votes)

    @property
    def _votes(self) -> int:
        return _VOTES if self.random else 1

    @torch.no_grad()
    def path_logits(self, x: Tensor, rows: Tensor, count: int, first: int = 0, purpose: str = "selection") -> Tensor:
        """Logits ``(count, K, classes)`` along some paths, all that there are where there is no noise."""
        paths = PathRange(self.seed, purpose, self.index[rows], first, self.target.distinct or count)
        return self.target.path_logits(x, paths)

    @cached_property
    def fixed(self) -> nn.Module | None:
        """The model with its noise fixed, a deterministic network; None where it cannot be fixed."""
        if not self.random:
            return self.model
        if isinstance(self.model, ItoEnsemble):
            members = len(self.model.members)
            return FixedPaths(self.model, members * math.ceil(4 / members), self.seed + 1)
        fixed = Reseeded(self.model, self.seed)
        with torch.no_grad():
            first, second = (self.answers(fixed, self.x) for _ in range(2))
        return fixed if alike(first, second) else None

    @cached_property
    def clean(self) -> Tensor:
        """Decisions without attack, ``(N,)``."""
        return self.decide(self.x)

    @cached_property
    def right(self) -> Tensor:
        """Positions of the images that are decided rightly without attack."""
        return (self.clean == self.y).nonzero()[:, 0]

    def at(self, eps: float) -> PGD:
        """The white-box attack at another radius, its steps in proportion."""
        length = self.attack.step_size
        return replace(self.attack, eps=eps, step_size=length and length * eps / self.attack.eps)

    def run(self, attack: Attack, target: Target, rows: Tensor, y: Tensor | None = None) -> AttackResult:
        """The attack itself, through any target, on the images at ``rows``; ``y``: labels if they are not the true."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of one path a gradient, of gradients that are not finite: checks say it
            return attack.run(target, self.x[rows], self.y[rows] if y is None else y, self.seed, self.index[rows])

    def attempt(self, attack: Attack, rows: Tensor | None = None, through: Target | None = None) -> Attempt:
        """Run an attack on the images at ``rows`` (default: `right`), with gradients of the model or ``through``."""
        rows = self.right if rows is None else rows
        images, labels, claimed = self.x.clone(), self.clean.clone(), self.clean != self.y
        trace = Traced(self.target, self.x, self.index) if through is None else None
        target = trace or through or self.target
        if len(rows):
            found = self.run(attack, target, rows)
            images[rows], claimed[rows] = found.images, found.fooled
            labels[rows] = self.decide(found.images, rows)
        return Attempt(images, labels, labels == self.y, claimed, trace)

    @cached_property
    def main(self) -> Attempt:
        """The white-box attack."""
        return self.attempt(self.attack)

    @cached_property
    def longer(self) -> Attempt:
        """The white-box attack with twice the steps."""
        return self.attempt(replace(self.attack, steps=2 * self.attack.steps))

    @cached_property
    def survivors(self) -> Tensor:
        """Positions of the images that stand after the white-box attack."""
        return self.main.standing.nonzero()[:, 0]

    @cached_property
    def sweep(self) -> dict[float, Attempt]:
        """The white-box attack at a quarter, a half, once and twice the radius, each on its own."""
        eps = self.attack.eps
        most = 1.0 if self.attack.norm == "linf" else math.inf
        radii = [eps / 4, eps / 2, eps, min(2 * eps, most)]
        return {radius: self.main if radius == eps else self.attempt(self.at(radius)) for radius in radii}

    @property
    def curve(self) -> list[tuple[float, Rate]]:
        """Radius and accuracy, from the clean images on; successes are carried upward, so it never rises."""
        standing, curve = self.clean == self.y, [(0.0, Outcomes.of(self.clean, self.y).rate("correct"))]
        for eps, attempt in self.sweep.items():
            standing = standing & attempt.standing
            curve.append((eps, Rate.of(int(standing.sum()), len(standing))))
        return curve

    def noise(self, x: Tensor, rows: Tensor, eps: float, draw: int | Tensor) -> Tensor:
        """Uniform in the ball around ``x``, not clipped: the ``draw``-th point around each image."""
        keys = make_keys(self.seed, "gradient", member=-3, inference=draw, index=self.index[rows])
        return BALLS[self.attack.norm].start(x, eps, keys)

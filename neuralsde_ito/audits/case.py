"""One model under audit: its decisions, its gradients, and the attacks that several checks share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks.base import Attack, AttackResult
from ..attacks.norms import BALLS
from ..attacks.objectives import Objective
from ..attacks.panels import right_share
from ..attacks.pgd import PGD
from ..attacks.targets import NO_GRADIENT, Ascent, Target, as_target, in_precision
from ..models.ensemble import ItoEnsemble, NoiseFree
from ..models.inspection import MIXING, answers, as_called, check_weights, mixing
from ..models.recast import ItoResNet
from ..models.vote import Vote, as_voter
from ..models.voting import Voter
from ..noise.keys import PathRange, make_keys
from ..outcomes import Outcomes, Rate
from ..sde.solvers import find_solver
from ..validation import ItoError, check_images, check_labels, image_names, shown, whole_number


class RecordingTarget:
    """A target that records what an attack showed to the model, image by image.

    Attributes:
        losses: one tensor ``(N,)`` for each gradient; NaN where an image was not in the batch.
        last: ``(N, C, H, W)``, the last iterate of which a gradient was taken.
        closest: ``(N, C, H, W)``, the iterate at which the right class had its smallest share of the paths.
        share: ``(N,)``, this smallest share.
    """

    def __init__(self, target: Target, x: Tensor, index: Tensor) -> None:
        self.target, self.distinct = target, target.distinct
        self.losses: list[Tensor] = []
        self.last, self.closest = x.clone(), x.clone()
        self.share = torch.full((len(x),), torch.inf, device=x.device)
        self._sorted_index, self._order = index.sort()

    def in_bfloat16(self) -> RecordingTarget:
        """The same record, of gradients in bfloat16."""
        self.target = in_precision(self.target, "bfloat16")
        return self

    def path_logits(self, x: Tensor, paths: PathRange) -> Tensor:
        """The target's logits; they are not recorded."""
        return self.target.path_logits(x, paths)

    def ascend(self, objective: Objective, x: Tensor, y: Tensor, paths: PathRange) -> Ascent:
        """The target's gradient, recorded."""
        ascent = self.target.ascend(objective, x, y, paths)
        rows = self._order[torch.searchsorted(self._sorted_index, paths.index)]
        self.losses.append(torch.full_like(self.share, torch.nan))
        self.losses[-1][rows] = ascent.loss.to(self.share)
        share = right_share(ascent.logits, y)
        closer = share < self.share[rows]
        self.last[rows] = x
        self.closest[rows[closer]], self.share[rows[closer]] = x[closer], share[closer]
        return ascent


@dataclass(frozen=True)
class JudgedAttack:
    """The outcome of an attack on some of the images, judged on noise that the attack never saw.

    Attributes:
        images: ``(N, C, H, W)``, adversarial where an image was attacked, clean elsewhere.
        labels: ``(N,)``, the model's decisions on them.
        correct: bool ``(N,)``, the decision is right: the image survives.
        claimed: bool ``(N,)``, the attack itself claims that the image fools the model, or the clean image does.
        record: what the attack showed to the model; None where it took gradients of another network.
    """

    images: Tensor
    labels: Tensor
    correct: Tensor
    claimed: Tensor
    record: RecordingTarget | None


class FixedPaths(nn.Module):
    """A voter that always uses the same few paths, for every image: a deterministic network.

    Its logits are the log mean probability over ``count`` paths, those of the report panel of ``seed`` and image 0.
    """

    def __init__(self, voter: Voter, count: int, seed: int) -> None:
        super().__init__()
        self.voter = voter.quick() if isinstance(voter, ItoEnsemble) else voter
        self.count, self.seed = count, seed

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W) -> (N, classes)``."""
        same = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        logits = self.voter.path_logits(x, PathRange(self.seed, "report", same, 0, self.count))
        return logits.log_softmax(-1).logsumexp(0) - math.log(self.count)


@contextmanager
def input_gradients_only(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter takes a gradient, and the model is in the modes of `as_called`; afterwards all is restored.

    Raises:
        ItoError: weights from inference mode, or a normalisation by the statistics of the batch.
    """
    check_weights(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    with as_called(model):
        try:
            for p in trainable:
                p.requires_grad_(False)
            yield
        finally:
            for p in trainable:
                p.requires_grad_(True)


def check_precision(x: Tensor) -> None:
    """Refuse images in half precision.

    Raises:
        ItoError: they are not in float32 or float64.
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise ItoError(
            f"An attack's steps are lost in {x.dtype}: give the images in float32, and let the model convert them."
        )


def gives_gradient(model: nn.Module, x: Tensor) -> bool:
    """Whether any gradient comes back from a module's output to images ``(N, C, H, W)``."""
    with torch.enable_grad(), as_called(model):
        return bool(answers(model, x[:1].clone().requires_grad_()).requires_grad)


class WithoutGradient(nn.Module):
    """A module that hands back no gradient (``no_grad``, numpy), with gradients of 0: attacks run, and stand still."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.training = model, model.training

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W) -> (N, classes)``."""
        logits = answers(self.model, x)
        return logits + (0 * x).flatten(1).sum(1, keepdim=True) if torch.is_grad_enabled() else logits


class AuditCase:
    """A model, images, and the attack whose figure is in doubt. Use it with all networks in `input_gradients_only`.

    Decisions, gradients and shared attacks are computed when a check first asks for them, and kept.

    Args:
        model: `ItoEnsemble`, `ItoResNet` (an ensemble of one), or any module from images in [0, 1] to logits.
        x, y: images ``(N, C, H, W)`` in [0, 1] and true labels ``(N,)``.
        attack: the white-box attack.
        seed: of all noise.
        index: int64 ``(N,)``, the images' names in the noise's address, no two alike; default their position.
        surrogates: networks to transfer attacks from, by name; for Itô models the noise-free network is added.
        queries: of the black-box attack, an image.
        draws: random points an image; for a randomised model, points in all. Default: 10,000, and fewer where these
            would be more than 2**27 pixels, as 1,680 for 26 images of 3x32x32.
        batch_size: images that go through a module at a time, see `ModuleTarget`; an ensemble has its own ``chunk``.

    Raises:
        ItoError: images, labels, names or a radius that cannot be used.
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
        draws: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        for network in (model, *(surrogates or {}).values()):
            if not isinstance(network, nn.Module):
                raise ItoError(f"A model must be an nn.Module, got {shown(network)}; wrap a function in one.")
        self.model = as_voter(model)
        _check_channels(self.model, x)
        check_precision(x)
        self.x, self.y, self.attack, self.seed = x.detach(), check_labels(y, len(x)).to(x.device), attack or PGD(), seed
        self.index = image_names(index, x)
        if len(self.index.unique()) < len(x):
            raise ItoError(f"index names the images: one whole number for each of {len(x)}, no two alike.")
        if self.attack.eps == 0:
            raise ItoError("An audit needs a ball to attack in: eps must be above 0.")
        self.queries = whole_number("queries", queries)
        self.draws = None if draws is None else whole_number("draws", draws)
        self.batch_size = None if batch_size is None else whole_number("batch_size", batch_size)
        if isinstance(self.model, Vote):
            self.model.chunk = self.batch_size or self.model.chunk
        own = {"noise-free": NoiseFree(self.model)} if isinstance(self.model, ItoEnsemble) else {}
        self.surrogates: dict[str, nn.Module] = {**own, **(surrogates or {})}
        for network in self.surrogates.values():
            _check_channels(network, x)
        self.shared: dict[str, Any] = {}  # what one check has computed and others read

    # --- the model ------------------------------------------------------------------------------------------

    @property
    def network(self) -> nn.Module:
        """What computes the logits: a stranger's own module, or the ensemble."""
        return self.model.module if isinstance(self.model, Vote) else self.model

    @property
    def adaptive(self) -> bool:
        """Whether some solver chooses its own steps, so that no attack can run."""
        return any(isinstance(m, ItoResNet) and find_solver(m.solver).adaptive for m in self.model.modules())

    @cached_property
    def barred(self) -> str | None:
        """Why no attack runs; None where attacks run."""
        if self.adaptive:
            return "The solver chooses its steps for the whole batch: no attack runs through it."
        if self.mixing > MIXING:
            return "The answer to an image depends on the others in its batch: no figure of an image holds."
        return None

    @cached_property
    def mixing(self) -> float:
        """How far answers move with the other images of their batch: the largest distance of normalised logits."""
        return 0.0 if isinstance(self.model, ItoEnsemble) else mixing(self.network, self.x, self.batch_size)

    @property
    def randomised(self) -> bool:
        """Whether the model has noise."""
        self.model.observe(self.x)
        return self.model.noisy

    @cached_property
    def classes(self) -> int:
        """How many classes the model tells apart.

        Raises:
            ItoError: the output is not ``(N, classes)``, no gradient comes back from it, or a label has no class.
        """
        with torch.enable_grad():
            for count in (1, 2):  # an attack may end with a single image in its batch
                out = self.logits(self.network, self.x[:count].clone().requires_grad_())
        if not out.requires_grad:
            raise ItoError(NO_GRADIENT)
        check_labels(self.y, len(self.y), out.shape[1])
        return out.shape[1]

    @cached_property
    def target(self) -> Target:
        """The model as attacks see it, with gradients in the precision of the attack in doubt."""
        return in_precision(as_target(self.model, self.x, self.batch_size), self.attack.precision)

    @cached_property
    def surrogate_targets(self) -> dict[str, Target]:
        """The surrogates as attacks see them."""
        return {name: as_target(network, self.x, self.batch_size) for name, network in self.surrogates.items()}

    @cached_property
    def fixed(self) -> nn.Module | None:
        """The model with its noise fixed, a deterministic network; None where the noise cannot be fixed."""
        if not self.randomised:
            return self.network
        if isinstance(self.model, Vote) and not self.model.replayable:
            return None
        members = len(self.model.members)
        return FixedPaths(self.model, members * math.ceil(4 / members), self.seed + 1)

    def logits(self, network: nn.Module, x: Tensor) -> Tensor:
        """Logits ``(K, classes)`` of the model or of another network, computed batch by batch."""
        return answers(network, x, self.batch_size or 256)

    @torch.no_grad()
    def path_logits(self, x: Tensor, rows: Tensor, count: int, first: int = 0, purpose: str = "selection") -> Tensor:
        """Logits ``(count, K, classes)`` along ``count`` paths; without noise, along the few that there are.

        Args:
            x: ``(K, C, H, W)``, variants of the images at ``rows`` ``(K,)``.
            rows: their positions.
            count, first: how many paths, and the number of the first.
            purpose: the panel, see `PathRange`.
        """
        paths = PathRange(self.seed, purpose, self.index[rows], first, self.target.distinct or count)
        return self.target.path_logits(x, paths)

    # --- decisions ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decide(self, x: Tensor, rows: Tensor | None = None, vote: int = 0) -> Tensor:
        """Decisions ``(K,)`` on noise that no attack has seen.

        Args:
            x: ``(K, C, H, W)``, variants of the images at ``rows``.
            rows: their positions ``(K,)``; default all in order.
            vote: the number of the vote; every vote has its own noise.
        """
        return self.model.predict(x, self.seed + vote, self.index if rows is None else self.index[rows]).labels

    @cached_property
    def clean(self) -> Tensor:
        """Decisions without attack, ``(N,)``."""
        return self.decide(self.x)

    @cached_property
    def correct_rows(self) -> Tensor:
        """Positions of the images that are decided rightly without attack."""
        return (self.clean == self.y).nonzero()[:, 0]

    @cached_property
    def survivors(self) -> Tensor:
        """Positions of the images that are still decided rightly under the white-box attack."""
        return self.white_box.correct.nonzero()[:, 0]

    # --- attacks --------------------------------------------------------------------------------------------

    def run(self, attack: Attack, target: Target, rows: Tensor, y: Tensor | None = None) -> AttackResult:
        """Run an attack on the images at ``rows``; ``y``: their labels where these are not the true ones."""
        with warnings.catch_warnings():
            # Warnings about one path a gradient and about gradients that are not finite: checks 1 and 3 report both.
            warnings.simplefilter("ignore")
            return attack.run(target, self.x[rows], self.y[rows] if y is None else y, self.seed, self.index[rows])

    def judge(self, attack: Attack, rows: Tensor | None = None, through: Target | None = None) -> JudgedAttack:
        """Run an attack and decide on its images.

        Args:
            attack: the attack.
            rows: positions of the images to attack; default `correct_rows`.
            through: the target whose gradients the attack takes; default the model's, which are then recorded.
        """
        rows = self.correct_rows if rows is None else rows
        images, labels, claimed = self.x.clone(), self.clean.clone(), self.clean != self.y
        record = RecordingTarget(self.target, self.x, self.index) if through is None else None
        target = record or through or self.target
        if len(rows):
            result = self.run(attack, target, rows)
            images[rows], claimed[rows] = result.images, result.fooled
            labels[rows] = self.decide(result.images, rows)
        return JudgedAttack(images, labels, labels == self.y, claimed, record)

    def attack_at(self, eps: float) -> PGD:
        """The white-box attack at another radius, with its step size in proportion."""
        length = self.attack.step_size
        return replace(self.attack, eps=eps, step_size=length and length * eps / self.attack.eps)

    @cached_property
    def white_box(self) -> JudgedAttack:
        """The white-box attack on all `correct_rows`."""
        return self.judge(self.attack)

    @cached_property
    def sweep(self) -> dict[float, JudgedAttack]:
        """The white-box attack at a quarter of the radius, half, once and twice the radius, each independently."""
        eps = self.attack.eps
        largest = 1.0 if self.attack.norm == "linf" else math.inf
        radii = [eps / 4, eps / 2, eps, min(2 * eps, largest)]
        return {radius: self.white_box if radius == eps else self.judge(self.attack_at(radius)) for radius in radii}

    @property
    def curve(self) -> list[tuple[float, Rate]]:
        """Radius and accuracy, beginning with the clean images.

        An image that falls at one radius counts as fallen at all larger ones, so that the curve never rises.
        """
        correct, curve = self.clean == self.y, [(0.0, Outcomes.of(self.clean, self.y).rate("correct"))]
        for eps, judged in self.sweep.items():
            correct = correct & judged.correct
            curve.append((eps, Rate.of(int(correct.sum()), len(correct))))
        return curve

    def random_points(self, x: Tensor, rows: Tensor, eps: float, draw: int | Tensor) -> Tensor:
        """Points ``(K, C, H, W)``, uniform in the ball around ``x`` and not clipped to [0, 1].

        Args:
            x: ``(K, C, H, W)``, variants of the images at ``rows`` ``(K,)``.
            rows: their positions.
            eps: radius in pixel units.
            draw: the number of the point, one for all or one for each ``(K,)``; another number, another point.
        """
        keys = make_keys(self.seed, "gradient", member=-3, inference=draw, index=self.index[rows])
        return BALLS[self.attack.norm].start(x, eps, keys)


def _check_channels(network: nn.Module, x: Tensor) -> None:
    """Refuse what is no batch of images, or has not the channels that an ensemble takes."""
    check_images(x, as_voter(network).channels)

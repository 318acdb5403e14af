"""The audit's own attacks, which ask whether the attack in doubt was fooled, and the test of what they find.

They are a `Suite`: votes of the selection choose each image's best candidate, and images and costs can become evidence. The
first step is the attack in doubt itself. Then follow its *kin*, longer attacks along the gradients that the model claims; and *others*,
which do not trust these gradients: straight-through gradients, gradients averaged over a neighbourhood, a substitute
network, differences of answers, random search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from scipy.stats import binom
from torch import Tensor, nn

from ..attacks.apgd import APGD
from ..attacks.images import Images
from ..attacks.norms import BALLS
from ..attacks.objectives import Objective
from ..attacks.square import Square
from ..attacks.suite import Step, Suite, SuiteResult
from ..attacks.pgd import PGD
from ..attacks.targets import Ascent, ModuleTarget, Target, as_target
from ..models.ensemble import ItoEnsemble
from ..models.vote import Vote
from ..models.votes import decide
from ..noise.keys import PathRange, make_keys
from ..outcomes import ABSTAIN
from .case import AuditCase
from .gradient_free import NES
from .straight_through import StraightThrough
from .substitute import fit_substitute

IN_DOUBT = "the attack in doubt"
LEVEL = 0.01  # of each test
# A sound model loses at most these shares of its images to a longer attack along its gradients, and beyond these to
# any other attack; see docs/audit.md for the null.
KIN_SHARE, OTHER_SHARE = 0.05, 0.01
_VOTES = 5  # votes of the model that decide together on an image


class SmoothedTarget(ModuleTarget):
    """A module whose gradients are averaged over a neighbourhood: each path has a point of its own.

    Args:
        model: the module, or a `Vote` over it.
        x: images ``(N, C, H, W)``, by which noise is detected.
        norm, radius: the ball of which the points are uniform.
    """

    def __init__(self, model: nn.Module, x: Tensor, norm: str, radius: float, batch_size: int | None = None) -> None:
        super().__init__(model, x, batch_size)
        self.norm, self.radius = norm, radius
        self.distinct = None

    def _along(self, paths: PathRange, x: Tensor) -> Tensor:
        logits = []
        for number in range(paths.first, paths.first + paths.count):
            keys = make_keys(paths.seed, paths.purpose, -6, number, paths.index)
            offset = BALLS[self.norm].start(torch.zeros_like(x), self.radius, keys)
            one = PathRange(paths.seed, paths.purpose, paths.index, number, 1)
            logits.append(super()._along(one, x + offset))
        return torch.cat(logits)


def battery(case: AuditCase) -> tuple[Suite, list[str]]:
    """The audit's attacks, and the names of those that follow the model's own gradients."""
    norm, eps, noisy = case.attack.norm, case.attack.eps, case.randomised
    network = case.network
    surrogates: dict[str, nn.Module | Target] = dict(case.surrogates)
    pgd = partial(PGD, norm, eps, momentum=0.9, eot=8)
    kin = [Step(IN_DOUBT, case.attack)]
    if noisy:
        kin += [
            Step("PGD, mean logits", pgd(60, objective="mean-logits")),
            Step("PGD, DLR", pgd(40, objective="dlr")),
        ]
    else:
        kin += [
            Step("APGD, mean logits", APGD(norm, eps, 60, objective="mean-logits")),
            Step("APGD, targeted DLR", APGD(norm, eps, 40, objective="targeted-dlr", targets=min(9, case.classes - 1))),
        ]
    others = []
    through: nn.Module = network
    if not isinstance(case.model, ItoEnsemble):
        straight = StraightThrough(network)
        if straight.relaxes(case.x[:4]):
            through = straight
            surrogates["straight-through"] = straight
            others += [
                Step("straight-through", pgd(40, objective="mean-logits"), "straight-through"),
                Step("straight-through, DLR", pgd(40, objective="dlr"), "straight-through"),
            ]
        surrogates["neighbourhood"] = SmoothedTarget(through, case.x, norm, eps / 2, case.batch_size)
        others += [Step("mean gradient of a neighbourhood", pgd(30, objective="dlr"), "neighbourhood")]
    for name in case.surrogates:
        others += [Step(f"transfer from {name}", pgd(20, stop=False), name)]
    surrogates["substitute"] = fit_substitute(partial(_answers, case), case.x, norm, eps, case.seed)
    others += [
        Step("transfer from a substitute", pgd(40, stop=False), "substitute"),
        Step("targeted transfer from a substitute", pgd(30, objective="targeted-dlr", targets=4, stop=False), "substitute"),
        Step("NES", NES(norm, eps, eot=4)),
        Step("Square", Square(norm, eps, case.queries, eot=5), warm=True),
    ]
    steps = kin + others
    return Suite(lambda eps: steps, surrogates, seed=case.seed), [step.name for step in kin]


@torch.no_grad()
def _answers(case: AuditCase, x: Tensor) -> Tensor:
    """The model's mean probabilities ``(K, classes)`` of any images ``(K, C, H, W)``."""
    count = case.target.distinct or 8
    index = torch.arange(len(x), device=x.device)
    parts = []
    for images, names in zip(x.split(256), index.split(256), strict=True):
        logits = case.target.path_logits(images, PathRange(case.seed, "fresh", names, 0, count))
        parts.append(logits.nan_to_num(0, 0, 0).softmax(-1).mean(0))
    return torch.cat(parts)


@dataclass(frozen=True)
class Finding:
    """What some of the audit's attacks found that other ones did not.

    Attributes:
        before, after: bool ``(N,)``, the decision is right at the images of the attacks before, and of those after.
        n: images that are right without attack.
        share: of these, that a sound model loses at most.
    """

    before: Tensor
    after: Tensor
    n: int
    share: float

    @property
    def gained(self) -> int:
        """Images that only the later attacks fool."""
        return int((self.before & ~self.after).sum())

    @property
    def lost(self) -> int:
        """Images that only the earlier attacks fool; under noise votes near one half fall both ways."""
        return int((~self.before & self.after).sum())

    @property
    def needed(self) -> int:
        """The least difference that is beyond what a sound model loses."""
        return int(binom.isf(LEVEL, self.n, self.share)) + 1

    @property
    def beyond(self) -> bool:
        """Whether the difference is beyond chance (a one-sided exact sign test), and beyond a sound model's."""
        luck = float(binom.sf(self.gained - 1, self.gained + self.lost, 0.5)) if self.gained else 1.0
        return luck < LEVEL and self.gained - self.lost >= self.needed


@dataclass(frozen=True)
class BatteryResult:
    """What the battery found.

    Attributes:
        result: of the suite.
        names: of the attacks, by number; ``kin`` of these follow the model's own gradients.
        images: ``(N, C, H, W)``, the best candidates.
        source: ``(N,)``, the number of the attack that made each.
        by_kin, by_others: the two findings.
        right: bool ``(N,)``, the decision at ``images`` is right.
    """

    result: SuiteResult
    names: list[str]
    kin: list[str]
    images: Tensor
    source: Tensor
    by_kin: Finding
    by_others: Finding


def run_battery(case: AuditCase) -> BatteryResult:
    suite, kin = battery(case)
    steps = suite.steps(case.attack.eps)
    images = Images(case.x, case.y, case.index)
    stages: dict[int, Tensor] = {}
    result = None
    for number, (_, result) in enumerate(suite.run(case.model, images, [case.attack.eps])):
        stages[number] = result.denial.images
        if number == len(steps) - 1:
            break
    assert result is not None
    doubted, by_kin, best = case.white_box.images, stages[len(kin) - 1], result.denial.images
    right = _right(case, doubted, by_kin, best)
    n = len(case.correct_rows)
    return BatteryResult(
        result, [s.name for s in steps], kin, best, result.denial.source,
        Finding(right[0], right[1], n, KIN_SHARE), Finding(right[1], right[2], n, OTHER_SHARE),
    )


def _right(case: AuditCase, *stages: Tensor) -> list[Tensor]:
    """For each stage bool ``(N,)``: several votes together, on noise that nothing has seen, are right."""
    votes = range(_VOTES if case.randomised else 1)
    model = case.model
    right: list[Tensor] = []
    known: list[Tensor] = []
    for images in stages:
        ask = torch.ones_like(case.y, dtype=torch.bool)
        now = torch.zeros_like(ask)
        for before, was in zip(known, right, strict=True):
            same = ask & (images == before).flatten(1).all(1)
            now = torch.where(same, was, now)
            ask &= ~same
        rows = ask.nonzero()[:, 0]
        if len(rows):
            cast = sum(model.predict(images[rows], case.seed + 101 + v, case.index[rows], full=True).votes for v in votes)
            now[rows] = decide(cast, model.rule, len(votes) * model.inferences) == case.y[rows]
        known.append(images)
        right.append(now)
    return right

"""The audit's own attacks, which ask whether the attack in doubt was fooled, and the test of what they find.

They are a `Suite`: votes of the selection choose each image's best candidate, and images and costs can become evidence. The
first step is the attack in doubt itself. Then follow its *kin*, longer attacks along the gradients that the model claims; and *others*,
which do not trust these gradients: straight-through gradients, gradients averaged over a neighbourhood, a substitute
network, differences of answers, random search.
"""

from __future__ import annotations

import itertools
import warnings
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
from .check import check, from_to, require_correct
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


def battery(case: AuditCase) -> tuple[Suite, int]:
    """The audit's attacks, and how many of them follow the model's own gradients; these come first."""
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
    return Suite(lambda eps: steps, surrogates, seed=case.seed), len(kin)


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
    """What the audit's own attacks found.

    Attributes:
        names: of the attacks, by number. The first is the attack in doubt; ``kin`` in all follow the model's gradients.
        images: ``(N, C, H, W)``, each image's best candidate.
        labels: ``(N,)``, the model's decisions on them, by several votes together.
        source: ``(N,)``, the number of the attack that made each; -1: the clean image.
        attacked, fooled: of each attack, the images that it was run on, and those on which it reached its goal.
        by_kin: what the kin found beyond the attack in doubt.
        by_others: what the others found beyond the kin.
    """

    names: list[str]
    kin: int
    images: Tensor
    labels: Tensor
    source: Tensor
    attacked: tuple[int, ...]
    fooled: tuple[int, ...]
    by_kin: Finding
    by_others: Finding

    @property
    def masked(self) -> bool:
        """Whether they found more than they find on sound models."""
        return self.by_kin.beyond or self.by_others.beyond

    @property
    def strongest(self) -> str:
        """The name of the attack that made most of the images that only the audit's own attacks fool."""
        finding = self.by_others if self.by_others.beyond else self.by_kin
        made = self.source[finding.before & ~finding.after]
        made = made[made > 0]
        return self.names[int(made.mode().values)] if len(made) else IN_DOUBT


def own_attacks(case: AuditCase) -> BatteryResult:
    """Run the audit's own attacks; what they found is computed once a case."""
    if "own attacks" not in case.shared:
        case.shared["own attacks"] = _run(case)
    found: BatteryResult = case.shared["own attacks"]
    return found


def _run(case: AuditCase) -> BatteryResult:
    suite, kin = battery(case)
    eps, images = case.attack.eps, Images(case.x, case.y, case.index)
    names = [step.name for step in suite.steps(eps)]
    stages = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about gradients that are not finite: check 3 reports them
        # Only denial: the steps for evasion, which come after it, tell nothing more of gradients.
        for _, result in itertools.islice(suite.run(case.model, images, [eps]), len(names)):
            stages.append(result.denial.images)
    best = result.denial
    labels = _labels(case, case.white_box.images, stages[kin - 1], best.images)
    doubted, by_kin, by_all = (own == case.y for own in labels)
    n = len(case.correct_rows)
    return BatteryResult(
        names,
        kin,
        best.images,
        labels[-1],
        best.source,
        result.attacked[: len(names)],
        result.fooled[: len(names)],
        Finding(doubted, by_kin, n, KIN_SHARE),
        Finding(by_kin, by_all, n, OTHER_SHARE),
    )


@check(
    21,
    "own attacks",
    "others find more, beyond chance and a sound model's",
    "this project",
    "Attacks that trust no gradient find no more than the attack in doubt.",
    "An attack of the audit found more than the attack in doubt, whose figure is wrong: take the audit's.",
)
def own_attacks_find_no_more(case: AuditCase) -> tuple[str, bool]:
    """What the audit's own attacks find beyond the attack in doubt, see `battery`."""
    require_correct(case)
    found = own_attacks(case)
    kin, others = found.by_kin, found.by_others
    figure = (
        f"{from_to(kin.before, others.after)}; own gradients {kin.gained - kin.lost:+d} of {kin.needed}, "
        f"others {others.gained - others.lost:+d} of {others.needed}"
    )
    return (f"{figure} ({found.strongest})" if found.masked else figure), found.masked


def _labels(case: AuditCase, *stages: Tensor) -> list[Tensor]:
    """Decisions ``(N,)`` on the images of each stage, by several votes together on noise that nothing has seen."""
    votes, model = range(_VOTES if case.randomised else 1), case.model
    done: list[tuple[Tensor, Tensor]] = []
    for images in stages:
        ask, labels = torch.ones_like(case.y, dtype=torch.bool), torch.full_like(case.y, ABSTAIN)
        for before, known in done:  # no image is voted on twice
            same = ask & (images == before).flatten(1).all(1)
            labels[same], ask = known[same], ask & ~same
        rows = ask.nonzero()[:, 0]
        if len(rows):
            cast = torch.stack(
                [model.predict(images[rows], case.seed + 101 + v, case.index[rows], full=True).votes for v in votes]
            )
            labels[rows] = decide(cast.sum(0), model.rule, len(votes) * model.inferences)
        done.append((images, labels))
    return [labels for _, labels in done]

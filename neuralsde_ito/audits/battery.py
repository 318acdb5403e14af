"""The audit's own attacks, which ask whether the attack in doubt was fooled, and the test of what they find.

They are a `Suite`: votes of the selection choose each image's best candidate, and images and costs can become evidence.
The first step is the attack in doubt itself. Then follow its *kin*, longer attacks along the gradients that the model
claims; and *others*, which do not trust these gradients: straight-through gradients, gradients averaged over a
neighbourhood, a substitute network, differences of answers, random search.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks.apgd import APGD
from ..attacks.images import Images
from ..attacks.norms import BALLS
from ..attacks.pgd import PGD
from ..attacks.square import Square
from ..attacks.suite import Step, Suite, SuiteResult, join_results
from ..attacks.suite_run import SuiteRun
from ..attacks.targets import ModuleTarget, Target
from ..models.ensemble import ItoEnsemble
from ..models.votes import decide
from ..models.voting import Voter
from ..noise.keys import PathRange, make_keys
from ..outcomes import ABSTAIN
from ..validation import ItoError
from .case import AuditCase, input_gradients_only
from .check import KIN_SHARE, OTHER_SHARE, Finding, NotApplicable, Undecided, check, from_to, require_correct
from .gradient_free import NES
from .straight_through import StraightThrough
from .substitute import fit_substitute

IN_DOUBT, SQUARE = "the attack in doubt", "Square"
_VOTES = 5  # votes of the model that decide together on an image
PROGRESS = 20  # the sum of what all its attacks report to ``tick``


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
            Step("denial of the vote", pgd(30, objective="denial"), warm=True),
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
        if _relaxes(straight, case.x[: min(4, case.batch_size or 4)]):
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
    surrogates["substitute"] = substitute_of(case)
    others += [
        Step("transfer from a substitute", pgd(40, stop=False), "substitute"),
        Step(
            "targeted transfer",
            pgd(30, objective="targeted-dlr", targets=4, stop=False),
            "substitute",
        ),
        Step("NES", NES(norm, eps, eot=4)),
        Step(SQUARE, Square(norm, eps, case.queries, eot=3), warm=True),
    ]
    steps = kin + others
    return Suite(lambda eps: steps, surrogates, seed=case.seed), len(kin)


def _relaxes(straight: StraightThrough, x: Tensor) -> bool:
    """Whether straight-through gradients are others than the module's own, and can be taken at all."""
    try:
        return straight.relaxes(x)
    except Exception:  # code that does not bear another value's type or graph; the other attacks remain
        return False


def substitute_of(case: AuditCase) -> nn.Module:
    """The network that the audit fits to the model's answers, once a case."""
    if "substitute" not in case.shared:
        case.shared["substitute"] = fit_substitute(
            partial(_answers, case), case.x, case.attack.norm, case.attack.eps, case.seed
        )
    network: nn.Module = case.shared["substitute"]
    return network


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
class BatteryResult:
    """What the audit's own attacks found.

    Attributes:
        names: of the attacks, by number. The first is the attack in doubt; ``kin`` in all follow the model's gradients.
        images: ``(N, C, H, W)``, each image's best candidate.
        kin_images: ``(N, C, H, W)``, the best candidates of the kin alone.
        labels: ``(N,)``, the model's decisions on them, by one vote: that of the figure of the attack in doubt.
        source: ``(N,)``, the number of the attack that made each; -1: the clean image.
        attacked, fooled: of each attack, the images that it was run on, and those on which it reached its goal.
        run: the whole suite's run, if evidence was asked for.
        by_kin: what the kin found beyond the attack in doubt.
        by_others: what the others found beyond the kin.
    """

    names: list[str]
    kin: int
    images: Tensor
    kin_images: Tensor
    labels: Tensor
    source: Tensor
    attacked: tuple[int, ...]
    fooled: tuple[int, ...]
    by_kin: Finding
    by_others: Finding
    run: SuiteRun | None = None

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


def own_attacks(
    case: AuditCase, tick: Callable[[int], object] = lambda n: None, evidence: bool = False
) -> BatteryResult:
    """Run the audit's own attacks, once a case.

    Args:
        case: the audit's case.
        tick: called with numbers that add up to `PROGRESS`.
        evidence: also run them for evasion, and let the report vote: what a bundle of evidence holds.
    """
    if "own attacks" not in case.shared:
        case.shared["own attacks"] = _run(case, tick, evidence)
    found: BatteryResult = case.shared["own attacks"]
    return found


def _run(case: AuditCase, tick: Callable[[int], object], evidence: bool) -> BatteryResult:
    suite, kin = battery(case)
    eps, images = case.attack.eps, Images(case.x, case.y, case.index)
    names = [step.name for step in suite.steps(eps)]
    stages = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about gradients that are not finite: check 3 reports them
        # The steps for evasion come after those for denial, and tell nothing more of gradients.
        wanted = 2 * len(names) if evidence else len(names)
        for number, (_, result) in enumerate(itertools.islice(suite.run(case.model, images, [eps]), wanted)):
            stages.append(result.denial.images)
            tick(PROGRESS * (number + 1) // wanted - PROGRESS * number // wanted)
    best = result.denial
    doubted, by_kin, by_all = right_by_several_votes(case, case.white_box.images, stages[kin - 1], best.images)
    n = len(case.correct_rows)
    return BatteryResult(
        [*names, *(f"{name}, evasion" for name in names)],
        kin,
        best.images,
        stages[kin - 1],
        case.decide(best.images),
        best.source,
        result.attacked[: len(names)],
        result.fooled[: len(names)],
        Finding(doubted, by_kin, n, KIN_SHARE, case.randomised),
        Finding(by_kin, by_all, n, OTHER_SHARE, case.randomised),
        _suite_run(case, suite, images, result) if evidence else None,
    )


def _suite_run(case: AuditCase, suite: Suite, images: Images, result: SuiteResult) -> SuiteRun:
    """The run as evidence has it; its description is what `suite_of_audit` needs to make the suite again."""
    votes = suite.report.votes(case.model, images.x, images.index).cpu()
    settings = {"attack": asdict(case.attack), "queries": case.queries, "surrogates": sorted(case.surrogates)}
    description = {"name": "audit", "effort": 1.0, "batch_size": len(images), **settings}
    return SuiteRun(case.model, suite, images.to("cpu"), votes, (join_results([result]),), description)


def suite_of_audit(
    settings: Mapping[str, Any], model: Voter, images: Images, seed: int, surrogates: Mapping[str, nn.Module]
) -> Suite:
    """The suite of an audit's attacks, made again from what evidence says of it.

    Args:
        settings: the description of the run, see `_suite_run`.
        model: the model that was audited.
        images: all images that were audited: the substitute is fitted on them.
        seed: of all noise.
        surrogates: networks by name; those that the audit had are taken.

    Raises:
        ItoError: settings that no audit has, or a surrogate that is not there.
    """
    try:
        names, attack, queries = settings["surrogates"], PGD(**settings["attack"]), settings["queries"]
        own = {name: surrogates[name] for name in names if name != "noise-free"}
    except (KeyError, TypeError) as error:
        raise ItoError(f"the bundle's audit cannot be made again ({error})") from None
    model.observe(images.x)
    case = AuditCase(model, images.x, images.y, attack, seed, images.index, own, queries)
    with input_gradients_only(model):
        return battery(case)[0]


def kin_survivors(case: AuditCase) -> Tensor:
    """Positions of the images that stand under all attacks along the model's gradients.

    Raises:
        NotApplicable: there is none.
    """
    rows = own_attacks(case).by_kin.after.nonzero()[:, 0]
    if not len(rows):
        raise NotApplicable("The attacks along the model's gradients left no image standing.")
    return rows


def found_beyond_kin(case: AuditCase, images: Tensor, rows: Tensor, what: str = "") -> tuple[str, bool]:
    """What another attack found on the images that stand under all attacks along the model's gradients.

    Args:
        case: the audit's case.
        images: ``(K, C, H, W)``, what the attack made of the images at ``rows``.
        rows: their positions, `kin_survivors`.
        what: further words for the figure.

    Raises:
        Undecided: so few images stand that the number could not be beyond a sound model's.
    """
    found = own_attacks(case)
    others = found.kin_images.clone()
    others[rows] = images
    kin, other = right_by_several_votes(case, found.kin_images, others)
    finding = Finding(kin, other, len(case.correct_rows), OTHER_SHARE, case.randomised)
    figure = f"{finding.net} of {len(rows)} survivors{what}; {finding.needed} are too many"
    if len(rows) < finding.needed:
        raise Undecided(figure, f"With {len(rows)} survivors it could not fail: audit more images, or a smaller eps.")
    return figure, finding.beyond


def suspicion(case: AuditCase, figure: str, certain: bool, note: str) -> tuple[str, bool]:
    """A sign of masked gradients: it fails if it is certain by itself, or if the audit's own attacks prove it.

    Raises:
        Undecided: they found no more, so that the sign may be one that sound models show too.
    """
    attacked = case.barred is None and len(case.correct_rows) > 0
    if certain or (attacked and own_attacks(case).masked):
        return figure, True
    raise Undecided(figure, note, suspicious=True)


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
        f"{from_to(kin.before, others.after)}: {kin.net} along its gradients ({kin.needed} are too many), "
        f"{others.net} by others ({others.needed} are too many)"
    )
    if found.masked:
        return f"{figure}; {found.strongest}", True
    if others.needed > len(case.correct_rows) / 8:
        raise Undecided(figure, "With so few images it could hardly fail: audit 50 or more.", suspicious=True)
    return figure, False


def right_by_several_votes(case: AuditCase, *stages: Tensor) -> list[Tensor]:
    """Whether the images of each stage are decided rightly, bool ``(N,)``: by several votes on fresh noise, as one.

    Two attacks are compared by these: one vote on an image near one half is luck. The model's figures are one vote's.
    """
    votes, model = range(_VOTES if case.randomised else 1), case.model
    done: list[tuple[Tensor, Tensor]] = case.shared.setdefault("several votes", [])
    found = []
    for images in stages:
        ask, labels = torch.ones_like(case.y, dtype=torch.bool), torch.full_like(case.y, ABSTAIN)
        for before, known in done:  # no image is voted on twice in an audit
            same = ask & (images == before).flatten(1).all(1)
            labels[same], ask = known[same], ask & ~same
        rows = ask.nonzero()[:, 0]
        if len(rows):
            cast = torch.stack(
                [model.predict(images[rows], case.seed + 101 + v, case.index[rows], full=True).votes for v in votes]
            )
            labels[rows] = decide(cast.sum(0), model.rule, len(votes) * model.inferences)
            done.append((images, labels))
        found.append(labels == case.y)
    return found

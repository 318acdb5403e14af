"""An audit: is the accuracy that an attack leaves the model's strength, or the attack's weakness?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..attacks.norms import BALLS
from ..attacks.pgd import PGD
from ..attacks.suite_run import SuiteRun
from ..models.inspection import check_weights
from ..models.vote import Vote, as_voter
from ..models.voting import Voter
from ..outcomes import Outcomes, Rate
from ..validation import ItoError, check_eps, check_images, recordable, shown
from . import battery, binarisation, gradients, optimisation, other_attacks, reporting
from .case import AuditCase, WithoutGradient, check_precision, gives_gradient, input_gradients_only
from .check import FAIL, NOT_APPLICABLE, PASS, UNDECIDED, Check, RunCheck

CHECKS: tuple[RunCheck, ...] = (  # in the order of their numbers
    gradients.randomness,
    gradients.logits,
    gradients.zero_gradients,
    gradients.eot_adequacy,
    optimisation.more_iterations,
    optimisation.convergence,
    optimisation.silent_success,
    optimisation.rough_landscape,
    optimisation.unbounded_attack,
    optimisation.monotone,
    optimisation.one_step,
    other_attacks.black_box,
    other_attacks.random_noise,
    other_attacks.transfer,
    other_attacks.known_noise,
    reporting.selection_bias,
    binarisation.binarisation,
    gradients.solver_gradient,
    reporting.the_ball,
    reporting.extraordinary_claim,
    battery.own_attacks_find_no_more,
    gradients.image_by_image,
    gradients.test_time_optimisation,
    optimisation.common_attack,
)

PROGRESS = battery.PROGRESS + len(CHECKS)
MASKED, SOUND = "masked", "sound as far as seen"
_PRECISE = (
    "The attack in doubt and the checks on its gradients take them in {}; the audit's own attacks take them in float32."
)

__all__ = ["Audit", "Check", "Landscape", "audit"]


@dataclass(frozen=True)
class Landscape:
    """The loss around one image on fixed paths, along the gradient's direction and along a random one.

    Attributes:
        row: the image's position among the audited images.
        reach: ``(K,)``, the distances along either direction, in units of eps.
        loss: ``(K, K)``, the cross-entropy; the first axis is the gradient's direction.
    """

    row: int
    reach: Tensor
    loss: Tensor


@dataclass(frozen=True)
class BestAttack:
    """What all attacks together left: the attack in doubt and the audit's own.

    Attributes:
        masked: whether the audit's own attacks found more than the attack in doubt, or than the attack that is commonly
            reported (check 24), see `Finding.beyond`.
        beaten, left: the name of the attack than which they found more, and how many images it left right.
        attack: the name of the attack of the audit that found most; the attack in doubt, if none found more.
        outcomes: of the decisions ``labels``.
        images: ``(N, C, H, W)``, on the CPU.
        labels: ``(N,)``, the decisions on them, by one vote on noise that no attack has seen.
        made_by: of each image, the name of the attack that made it; empty: it is the clean one.
    """

    masked: bool
    beaten: str
    left: int
    attack: str
    outcomes: Outcomes
    images: Tensor
    labels: Tensor
    made_by: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Everything but images and labels, ready for JSON."""
        about = {"attack": self.attack, "masked": self.masked, "beaten": self.beaten, "left": self.left}
        return about | self.outcomes.as_dict()


@dataclass(frozen=True)
class Audit:
    """The outcomes of all checks, with the attack's figures and images.

    Attributes:
        checks: all, by number.
        attack: the attack whose figure was in doubt.
        clean: outcomes without attack.
        attacked: outcomes under the attack; None where no attack runs, see `AuditCase.barred`.
        best: the worst case of all attacks, the audit's own among them: the bottom line. None where no attack runs.
        curve: pairs of radius (pixel units) and accuracy with its interval. It begins at radius 0 and never rises: an
            image that falls at one radius counts as fallen at all larger ones. Empty where no attack runs.
        landscape: None where no attack runs, where the noise cannot be fixed, or where the model is right on no image.
        x, images: clean and adversarial images ``(N, C, H, W)``, on the CPU.
        remarks: how a vote was laid over a stranger's randomised module, and what does not hold, see `Vote.remarks`.
        run: of the audit's attacks as a suite, if evidence was asked for; a bundle is made of it by `evidence_of`.
        truth, before, after: labels ``(N,)``, on the CPU: the true ones, and the decisions on ``x`` and on ``images``.
    """

    checks: list[Check]
    attack: PGD
    clean: Outcomes
    attacked: Outcomes | None
    best: BestAttack | None
    curve: list[tuple[float, Rate]]
    landscape: Landscape | None
    x: Tensor
    images: Tensor
    truth: Tensor
    before: Tensor
    after: Tensor
    remarks: tuple[str, ...] = ()
    run: SuiteRun | None = None

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.failed

    @property
    def failed(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.verdict == FAIL]

    @property
    def undecided(self) -> list[Check]:
        """The checks from which nothing follows."""
        return [check for check in self.checks if check.verdict == UNDECIDED]

    @property
    def verdict(self) -> str:
        """``"masked"``, ``"undecided"`` or ``"sound as far as seen"``.

        Masked: an attack of the audit's own found more than the attack in doubt, or than the attack that is commonly
        reported, beyond chance and beyond what it finds on sound models. Undecided: without such a proof, a check
        failed or is suspicious.
        """
        if self.best is not None and self.best.masked:
            return MASKED
        return UNDECIDED if self.failed or any(check.suspicious for check in self.undecided) else SOUND

    @property
    def sound(self) -> bool:
        """Whether the verdict is ``"sound as far as seen"``."""
        return self.verdict == SOUND

    @property
    def summary(self) -> str:
        """The verdict in a sentence."""
        count = {v: sum(c.verdict == v for c in self.checks) for v in (PASS, FAIL, UNDECIDED, NOT_APPLICABLE)}
        tally = ", ".join(f"{number} {verdict}" for verdict, number in count.items() if number)
        if self.verdict == MASKED:
            assert self.best is not None
            left, claimed = (100 * count / self.clean.n for count in (self.best.outcomes.correct, self.best.left))
            return (
                f"Masked: with {self.best.attack!r} {left:.1f} % are left correct, where {self.best.beaten} left "
                f"{claimed:.1f} % (checks: {tally})."
            )
        if self.verdict == SOUND:
            return f"Sound as far as seen: no attack found more, and no check failed (checks: {tally})."
        doubts = [*self.failed, *(check for check in self.undecided if check.suspicious)]
        open_ = ", ".join(f"{check.number} {check.name}" for check in doubts)
        return f"Undecided: no attack proves that the figure is wrong, but see {open_} (checks: {tally})."

    def as_dict(self) -> dict[str, Any]:
        """Everything but images, labels and landscape, ready for JSON."""
        return {
            "passed": self.passed,
            "verdict": self.verdict,
            "summary": self.summary,
            "attack": asdict(self.attack) | {"step_size": self.attack.step},
            "clean": self.clean.as_dict(),
            "attacked": self.attacked and self.attacked.as_dict(),
            "best": self.best and self.best.as_dict(),
            "curve": [{"eps": eps, **asdict(rate)} for eps, rate in self.curve],
            "remarks": list(self.remarks),
            "checks": [asdict(check) for check in self.checks],
        }


def default_attack(norm: str, eps: float, noisy: bool, **settings: Any) -> PGD:
    """The attack in doubt: what ``settings`` make of `PGD`; without steps, a strong one.

    A weak attack leaves images on a sound model, too, and the audit would say so. Long steps with momentum come nearest
    to what the longest attacks find on sound models (docs/audit.md).

    Args:
        norm, eps: the ball.
        noisy: whether the model is randomised.
        settings: of `PGD`. Without ``steps``, ``step_size``, ``momentum`` or ``restarts`` among them it makes 40 steps
            of eps / 4 with a momentum of 0.75; without noise twice, with noise on the mean logits of 8 paths.
    """
    if not settings.keys() & {"steps", "step_size", "momentum", "restarts"}:
        length = check_eps(norm, eps) / 4
        more = {"eot": 8, "objective": "mean-logits"} if noisy else {"restarts": 2}
        settings = {"steps": 40, "step_size": length or None, "momentum": 0.75, **more} | settings
    return PGD(norm=norm, eps=eps, **settings)


def audit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    norm: str = "linf",
    eps: float = 8 / 255,
    *,
    seed: int = 0,
    index: Tensor | None = None,
    surrogates: Mapping[str, nn.Module] | None = None,
    queries: int = 500,
    draws: int | None = None,
    batch_size: int | None = None,
    evidence: bool = False,
    tick: Callable[[int], object] = lambda n: None,
    **settings: Any,
) -> Audit:
    """Run all checks for a false sense of security on a model under PGD.

    Args:
        model: `ItoEnsemble` or `ItoResNet`, in eval mode; or any module from images in [0, 1] to logits, in the modes
            that it has: if its dropout is on, it is audited as a randomised model.
        x, y: images ``(N, C, H, W)`` in [0, 1] and their true labels ``(N,)``.
        norm, eps: of the attack, in pixel units.
        seed: of all noise.
        index: int64 ``(N,)``, the images' names in the noise's address, no two alike; default their position.
        surrogates: networks to transfer attacks from, by name; for Itô models the noise-free network is added.
        queries: of the black-box attack, an image.
        draws: of random points, see `AuditCase`.
        batch_size: images that go through a module at a time, each on all paths of a gradient; see `ModuleTarget`. It
            does not change the figures of a module without noise. An ensemble has its own ``chunk``.
        evidence: also run the audit's attacks for evasion, so that `Audit.run` becomes a bundle by `evidence_of`.
        tick: called with numbers that add up to `PROGRESS`.
        settings: of the attack in doubt, see `default_attack`.

    Raises:
        ItoError: images, labels or settings that cannot be used; a model that gives no gradient, or in which the
            answer to an image depends on the others in its batch (BatchNorm in train mode).

    Example:
        ``audit(net, x, y, norm="linf", eps=8/255).passed``
    """
    PGD(norm=norm, eps=eps, **settings)  # refuses what is wrong
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # inference mode records no gradient
        x, y = recordable(x), recordable(y)
        index = None if index is None else recordable(index)
        voter = _voter(model, x, batch_size)
        attack = default_attack(norm, eps, voter.noisy, **settings)
        case = AuditCase(voter, x, y, attack, seed, index, surrogates, queries, draws, batch_size)
        for network in (case.model, *case.surrogates.values()):
            stack.enter_context(input_gradients_only(network))
        # These raise where something cannot be audited: before anything is attacked.
        _ = case.classes, None if case.barred else case.surrogate_targets
        if case.barred is None and len(case.correct_rows):
            battery.own_attacks(case, tick, evidence)
        else:
            tick(battery.PROGRESS)
        checks = []
        for run_check in CHECKS:
            checks.append(run_check(case))
            tick(1)
        return _audit_of(case, checks, evidence)


def _voter(model: nn.Module, x: Tensor, batch_size: int | None) -> Voter:
    """The model as one that votes, which has seen the images, at most ``batch_size`` at a time."""
    if not isinstance(model, nn.Module):
        raise ItoError(f"A model must be an nn.Module, got {shown(model)}; wrap a function in one.")
    voter = as_voter(model)
    check_images(x, voter.channels)
    check_precision(x)
    check_weights(voter)
    if isinstance(voter, Vote) and not gives_gradient(voter.module, x):
        voter = Vote(WithoutGradient(voter.module), voter.inferences, voter.rule)
    if isinstance(voter, Vote):
        voter.chunk = batch_size or voter.chunk
    voter.observe(x)
    return voter


def _audit_of(case: AuditCase, checks: list[Check], evidence: bool) -> Audit:
    """The outcomes of the checks, with what the report shows of their case."""
    attacked = None if case.barred else case.white_box
    images, after = (case.x, case.clean) if attacked is None else (attacked.images, attacked.labels)
    return Audit(
        checks=checks,
        attack=case.attack,
        clean=Outcomes.of(case.clean, case.y),
        attacked=None if attacked is None else Outcomes.of(after, case.y),
        best=None if case.barred or not len(case.correct_rows) else _best(case),
        curve=[] if case.barred else case.curve,
        landscape=None if case.barred else _landscape(case),
        x=case.x.cpu(),
        images=images.cpu(),
        truth=case.y.cpu(),
        before=case.clean.cpu(),
        after=after.cpu(),
        remarks=_remarks(case),
        run=battery.own_attacks(case).run if evidence and attacked and len(case.correct_rows) else None,
    )


def _remarks(case: AuditCase) -> tuple[str, ...]:
    """What is to be known of the precision, and of the vote over a stranger's module that has noise."""
    model = case.model
    precise: tuple[str, ...] = ()
    if case.attack.precision != "float32":
        precise = (_PRECISE.format(case.attack.precision),)
    if not isinstance(model, Vote) or not model.noisy:
        return precise
    laid = f"The module is random: {model.inferences} inferences vote on an image, and more than half decide."
    return (*precise, laid, *model.remarks)


def _best(case: AuditCase) -> BestAttack:
    """What all attacks together left."""
    found = battery.own_attacks(case)
    made_by = tuple("" if source < 0 else found.names[source] for source in found.source.tolist())
    outcomes = Outcomes.of(found.labels, case.y)
    common = optimisation.beyond_the_common_attack(case)
    beaten, left = battery.IN_DOUBT, case.white_box.correct
    if not found.masked and common.beyond:
        beaten, left = "the attack that is commonly reported", optimisation.common_attack_of(case).correct
    return BestAttack(
        found.masked or common.beyond,
        beaten,
        int(left.sum()),
        found.strongest,
        outcomes,
        found.images.cpu(),
        found.labels.cpu(),
        made_by,
    )


def _landscape(case: AuditCase, size: int = 21) -> Landscape | None:
    """The loss within twice the radius of a survivor, or else of any image that is decided rightly without attack."""
    rows = case.survivors if len(case.survivors) else case.correct_rows
    model = case.fixed
    if model is None or not len(rows):
        return None
    row, ball, reach = int(rows[0]), BALLS[case.attack.norm], torch.linspace(-2, 2, size, device="cpu")
    x, y = case.x[row : row + 1], case.y[row : row + 1]
    with torch.enable_grad():
        start = x.clone().requires_grad_()
        loss = F.cross_entropy(case.logits(model, start), y)
        gradient = torch.autograd.grad(loss, start)[0] if loss.requires_grad else torch.zeros_like(x)
    along = ball.steepest(gradient.nan_to_num(0, 0, 0))
    aside = ball.steepest(case.random_points(x, rows[:1], 1.0, 1 << 22) - x)
    grid = (reach * case.attack.eps).to(x)
    points = x + grid[:, None, None, None, None] * along + grid[None, :, None, None, None] * aside
    with torch.no_grad():
        parts = points.flatten(0, 1).split(128)
        losses = [F.cross_entropy(case.logits(model, part), y.expand(len(part)), reduction="none") for part in parts]
    return Landscape(row, reach, torch.cat(losses).view(size, size).cpu())

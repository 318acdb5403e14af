"""What a check is: a measurement on an `AuditCase`, a threshold, and one sentence for each verdict.

"Beyond chance" is McNemar's exact test on the same images at 1 %: two Wilson intervals overlap at n = 50 nearly always,
so that a comparison of intervals could never fail. Chance is not all: on a sound model, too, another attack finds a few
images more. A `Finding` is beyond that as well, by thresholds that docs/audit.md has from sound models.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from scipy.stats import binom
from torch import Tensor

from ..attacks.objectives import TARGETED
from ..attacks.pgd import PGD
from ..outcomes import Paired
from .case import AuditCase

PASS, FAIL, UNDECIDED, NOT_APPLICABLE = "pass", "fail", "undecided", "not applicable"
LEVEL = 0.01  # the significance level of the tests
# A sound model loses at most these shares of its images to a longer attack along its gradients, and beyond these to any
# other attack (docs/audit.md).
KIN_SHARE, OTHER_SHARE = 0.05, 0.01
COMMON_SHARE = 0.10  # and this one to all attacks together, beyond 20 plain steps
LUCK = 0.05  # the level of the sign test, to which the least difference is added


@dataclass(frozen=True)
class Check:
    """The outcome of one check: what was measured, its threshold, and what the verdict means.

    Attributes:
        number, name: of the check.
        figure: what was measured, in words; ``"-"`` where the check does not apply.
        threshold: when the check fails.
        source: the publication or code that the check comes from.
        verdict: ``"pass"``, ``"fail"``, ``"undecided"`` or ``"not applicable"``.
        note: one sentence: what the verdict means, and what to do; what would decide; or why the check does not apply.
        suspicious: whether a check that is undecided speaks against the attack; otherwise it had no power.
    """

    number: int
    name: str
    figure: str
    threshold: str
    source: str
    verdict: str
    note: str
    suspicious: bool = False


class NotApplicable(Exception):
    """The check does not apply; the message says why."""


class Undecided(Exception):
    """The check can neither pass nor fail here.

    Args:
        figure: what was measured, in words.
        note: one sentence: why nothing follows, and what would decide.
        suspicious: see `Check`.
    """

    def __init__(self, figure: str, note: str, suspicious: bool = False) -> None:
        super().__init__(note)
        self.figure, self.note, self.suspicious = figure, note, suspicious


@dataclass(frozen=True)
class Finding:
    """What some attacks found that others had not found.

    Attributes:
        before, after: bool ``(N,)``, the decision is right at the images of the earlier attacks, and of all.
        n: images that are right without attack.
        share: of these, that a sound model loses at most.
        noisy: whether decisions have noise, so that images near one half fall by luck.
    """

    before: Tensor
    after: Tensor
    n: int
    share: float
    noisy: bool

    @property
    def gained(self) -> int:
        """Images that fall only to the later attacks."""
        return int((self.before & ~self.after).sum())

    @property
    def net(self) -> int:
        """`gained`, less the images that fall only to the earlier attacks: luck makes as many of both."""
        return self.gained - int((~self.before & self.after).sum())

    @property
    def needed(self) -> int:
        """The least net number that a sound model, by the exact binomial test, loses with a probability below 1 %."""
        return int(binom.isf(LEVEL, self.n, self.share)) + 1

    @property
    def beyond(self) -> bool:
        """Whether the net number is beyond a sound model's and, under noise, beyond chance (a one-sided sign test)."""
        if self.net < self.needed:
            return False
        return not self.noisy or float(binom.sf(self.gained - 1, 2 * self.gained - self.net, 0.5)) < LUCK


Measurement = Callable[[AuditCase], tuple[str, bool]]
RunCheck = Callable[[AuditCase], Check]


def check(
    number: int, name: str, threshold: str, source: str, good: str, bad: str, *, attacks: bool = True
) -> Callable[[Measurement], RunCheck]:
    """Make a check of a measurement, a function from an `AuditCase` to its figure and whether the check fails.

    A measurement raises `NotApplicable` where it makes no sense, and `Undecided` where nothing follows from it. A new
    check is a function in one of the files of checks, and its name in ``CHECKS`` of ``audits/audit.py``.

    Args:
        number, name, threshold, source: see `Check`.
        good, bad: the note of a check that passes, and of one that fails.
        attacks: whether the measurement attacks the model; then it does not apply where none can, see
            `AuditCase.barred`.

    Example::

        @check(
            25, "mirror images", "mirroring lowers accuracy beyond chance", "this project",
            "The model decides mirror images as well as the originals.",
            "The model decides mirror images worse: train it with flips, or leave this check out.", attacks=False,
        )
        def mirror_images(case: AuditCase) -> tuple[str, bool]:
            \"\"\"Decisions on the clean images, flipped left to right.\"\"\"
            original, mirrored = case.clean == case.y, case.decide(case.x.flip(3)) == case.y
            return from_to(original, mirrored), beyond_chance(original, mirrored)
    """

    def decorate(measure: Measurement) -> RunCheck:
        @functools.wraps(measure)
        def run(case: AuditCase) -> Check:
            try:
                if attacks and case.barred is not None:
                    raise NotApplicable(case.barred)
                figure, failed = measure(case)
            except Undecided as open_:
                return Check(number, name, open_.figure, threshold, source, UNDECIDED, open_.note, open_.suspicious)
            except NotApplicable as why:
                return Check(number, name, "-", threshold, source, NOT_APPLICABLE, str(why))
            return Check(number, name, figure, threshold, source, FAIL if failed else PASS, bad if failed else good)

        return run

    return decorate


# --- what measurements share ----------------------------------------------------------------------------


def require_correct(case: AuditCase) -> Tensor:
    """Positions of the images that are decided rightly without attack; without any, the check does not apply."""
    if not len(case.correct_rows):
        raise NotApplicable("The model is right on no clean image.")
    return case.correct_rows


def require_survivors(case: AuditCase) -> Tensor:
    """Positions of the survivors of the white-box attack; without any, the check does not apply."""
    if not len(case.survivors):
        raise NotApplicable("The white-box attack left no image standing.")
    return case.survivors


def require_noise(case: AuditCase, why: str) -> None:
    """Without noise the check does not apply, for the reason ``why``."""
    if not case.randomised:
        raise NotApplicable(f"The model has no noise: {why}.")


def beyond_chance(first: Tensor, second: Tensor) -> bool:
    """Whether ``first`` is right on more images than ``second``, beyond chance; both bool, on the same images."""
    paired = Paired.of(first, second)
    return paired.only_first > paired.only_second and paired.p < LEVEL


def untargeted_objective(attack: PGD) -> str:
    """The name of the attack's objective; ``"mean-loss"`` where it aims at a class, as no class is chosen here."""
    return "mean-loss" if attack.objective in TARGETED else attack.objective


# --- how figures are written ----------------------------------------------------------------------------


def percent(share: float) -> str:
    """``98.3 %``, with three digits."""
    return f"{100 * share:.3g} %"


def from_to(before: Tensor, after: Tensor) -> str:
    """``98.3 % to 60 % right``, the accuracies of two bool tensors."""
    return f"{percent(float(before.cpu().double().mean()))} to {percent(float(after.cpu().double().mean()))} right"

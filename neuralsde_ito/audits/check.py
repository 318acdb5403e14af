"""What a check is: a measurement on a `Subject`, a threshold, and a sentence for either verdict.

"Beyond chance" is McNemar's exact test on the same images at 1 %: an overlap of intervals could never fail at n = 50.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..attacks.objectives import OBJECTIVES, TARGETED
from ..attacks.pgd import PGD
from ..outcomes import Paired
from .case import Subject

PASS, FAIL, BESIDE = "pass", "fail", "not applicable"
LEVEL = 0.01  # of McNemar's test


@dataclass(frozen=True)
class Check:
    """One check: what was measured, what it is held against, and what it means.

    Attributes:
        number, name: its place among the twenty, and what it is called.
        figure: what was measured, with its meaning.
        threshold: when it fails.
        source: where the check comes from.
        verdict: ``"pass"``, ``"fail"`` or ``"not applicable"``.
        note: one sentence: what it means, and what to do.
    """

    number: int
    name: str
    figure: str
    threshold: str
    source: str
    verdict: str
    note: str


class Beside(Exception):
    """The check does not apply; the message says why."""


Measure = Callable[[Subject], tuple[str, bool]]


def check(
    number: int, name: str, threshold: str, source: str, good: str, bad: str
) -> Callable[[Measure], Callable[[Subject], Check]]:
    """Turn a measurement (figure, failed) into a check, with a sentence for either verdict."""

    def decorate(measure: Measure) -> Callable[[Subject], Check]:
        @functools.wraps(measure)
        def run(subject: Subject) -> Check:
            try:
                if subject.adaptive and number not in (1, 2, 18):
                    raise Beside("The solver chooses its steps for the whole batch: no attack runs through it.")
                figure, failed = measure(subject)
            except Beside as why:
                return Check(number, name, "-", threshold, source, BESIDE, str(why))
            return Check(number, name, figure, threshold, source, FAIL if failed else PASS, bad if failed else good)

        return run

    return decorate


def beyond_chance(more: Tensor, less: Tensor) -> bool:
    """Whether the first of two "is right" on the same images is right on more of them, beyond chance."""
    paired = Paired.of(more, less)
    return paired.only_first > paired.only_second and paired.p < LEVEL


def percent(share: float) -> str:
    """``98.3 %``, with three digits."""
    return f"{100 * share:.3g} %"


def from_to(before: Tensor, after: Tensor) -> str:
    """Two accuracies, for a figure."""
    return f"{percent(float(before.double().mean()))} to {percent(float(after.double().mean()))} right"


def plain(attack: PGD) -> str:
    """The objective, unless it aims at a class and there is none to aim at."""
    return "mean-loss" if attack.objective in TARGETED else attack.objective


def _survivors(s: Subject) -> Tensor:
    if not len(s.survivors):
        raise Beside("The white-box attack left no image standing.")
    return s.survivors


def _known(s: Subject) -> Tensor:
    if not len(s.right):
        raise Beside("The model is right on no clean image.")
    return s.right


def _noisy(s: Subject, why: str) -> None:
    if not s.random:
        raise Beside(f"The model has no noise: {why}.")


def _second_vote(s: Subject, images: Tensor) -> tuple[Tensor, Tensor]:
    """Survivors of the white box that stand by a second vote, and those that stand on other images, same noise."""
    rows = _survivors(s)
    again = s.decide(s.main.images[rows], rows, vote=1) == s.y[rows]
    return again, s.decide(images[rows], rows, vote=1) == s.y[rows]


def _any_beyond_luck(s: Subject, again: Tensor, stand: Tensor) -> bool:
    """Without noise one image is proof; with noise a vote near the edge falls now and then by itself."""
    return beyond_chance(again, stand) if s.random else bool((again & ~stand).any())


def _objective(s: Subject) -> Callable[[Tensor, Tensor], Tensor]:
    return OBJECTIVES[plain(s.attack)]

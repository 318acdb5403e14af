"""Checks 16, 19 and 20: was the figure read rightly from the attack's images?"""

from __future__ import annotations

from ..attacks.norms import BALLS
from ..models.votes import winners
from ..outcomes import ABSTAIN, Paired, Rate
from .case import AuditCase
from .check import (
    LEVEL,
    NotApplicable,
    Undecided,
    beyond_chance,
    check,
    from_to,
    percent,
    require_correct,
    require_noise,
)

# RobustBench, March 2025: eps, clean accuracy and robust accuracy (AutoAttack) of the best CIFAR-10 entries.
_BEST = {"linf": (8 / 255, 0.9368, 0.7371), "l2": (0.5, 0.9554, 0.8497)}


@check(
    16,
    "selection bias",
    "selection and report differ beyond chance",
    "AutoAttack, pull request 105",
    "What the attack claims stands on other noise.",
    "The attack's own count is luck of its noise: report votes on paths that it never saw.",
)
def selection_bias(case: AuditCase) -> tuple[str, bool]:
    """What the attack claims on its selection panel, against as many fresh paths, read by the same rule."""
    require_noise(case, "selection and report are the same")
    rows = require_correct(case)
    logits = case.path_logits(case.white_box.images[rows], rows, case.attack.selection, purpose="report")
    correct = (winners(logits) == case.y[rows]).float().mean(0) > 0.5
    claimed = ~case.white_box.claimed[rows]
    paired = Paired.of(claimed, correct)
    # A figure that fresh paths correct downward harms nobody.
    return f"{from_to(claimed, correct)} on fresh paths", paired.only_second > paired.only_first and paired.p < LEVEL


@check(
    19,
    "the ball",
    "norm > eps + 1e-6, outside [0, 1], or most successes lost in 8 bits",
    "AutoAttack's checks",
    "The adversarial images are images, inside the ball.",
    "The attack leaves the ball, or lives on fractions of a grey level: its images could not be sent.",
)
def the_ball(case: AuditCase) -> tuple[str, bool]:
    """Norm and range of the adversarial images, and the successes that are lost when they are rounded to 8 bits."""
    images, eps = case.white_box.images, case.attack.eps
    over = float(BALLS[case.attack.norm].length(images - case.x).max()) - eps
    beyond = max(float(-images.min()), float(images.max()) - 1)
    # Written so that NaN fails: a comparison with NaN is false.
    if not (over <= 1e-6 and beyond <= 1e-6):
        return f"norm {over + eps:.4g}, {beyond:.4g} beyond [0, 1]", True
    rows = ((case.clean == case.y) & ~case.white_box.correct).nonzero()[:, 0]
    lost, lost_beyond_chance = 0, False
    if len(rows):
        exact, rounded = (
            case.decide(x, rows, vote=1) == case.y[rows] for x in (images[rows], (images[rows] * 255).round() / 255)
        )
        # An attack that stops at its first success ends near the border, from which rounding takes some images back.
        lost = int((rounded & ~exact).sum())
        lost_beyond_chance = beyond_chance(rounded, exact) and 2 * lost > len(rows)
    figure = f"norm {over + eps:.4g}, {lost} of {len(rows)} lost in 8 bits"
    if lost_beyond_chance and case.attack.norm == "linf" and eps < 0.5 / 255:  # no attack could keep them
        raise Undecided(
            figure, "The radius is below half a grey level: in 8 bits the ball holds the clean image alone."
        )
    return figure, lost_beyond_chance


@check(
    20,
    "extraordinary claim",
    "1 - evasion beats RobustBench's best at eps / 2",
    "Tramèr 2022; RobustBench, March 2025",
    "The claim is not beyond what the field has reached.",
    "The claim beats the best published classifier at half the radius, to which a detector at eps amounts: doubt it.",
)
def extraordinary_claim(case: AuditCase) -> tuple[str, bool]:
    """The share that is not led to a wrong answer (the lower end of its interval), against the best entry at eps / 2.

    A detector of adversarial images at eps gives a classifier at eps / 2 (Tramèr 2022,
    https://arxiv.org/abs/2107.11630). The entry is interpolated between its clean and its robust accuracy; beyond its
    radius, its robust accuracy stands.
    """
    if case.x.shape[1:] != (3, 32, 32) or case.classes != 10:
        raise NotApplicable("There are no entries to compare with: images are not CIFAR-10's in size and classes.")
    if case.attack.norm not in _BEST:
        raise NotApplicable(f"There are no entries under {case.attack.norm}.")
    held = (case.white_box.labels == case.y) | (case.white_box.labels == ABSTAIN)
    rate = Rate.of(int(held.sum()), len(held))
    radius, clean, robust = _BEST[case.attack.norm]
    best = clean + min(case.attack.eps / 2 / radius, 1.0) * (robust - clean)
    figure = f"at least {percent(rate.low)}, the best entry {percent(best)} at eps {case.attack.eps / 2:.3g}"
    return figure, rate.low > best

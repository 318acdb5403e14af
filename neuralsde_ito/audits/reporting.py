"""Checks of how the figure was read."""

from __future__ import annotations

from ..attacks.norms import BALLS
from ..models.votes import winners
from ..outcomes import ABSTAIN, Paired, Rate
from .case import Subject
from .check import LEVEL, Beside, _known, _noisy, beyond_chance, check, from_to, percent

# RobustBench, March 2025: eps, clean accuracy and robust accuracy (AutoAttack) of the best CIFAR-10 entries.
_BEST = {"linf": (8 / 255, 0.9368, 0.7371), "l2": (0.5, 0.9554, 0.8497)}


# --- how the figure was read ----------------------------------------------------------------------------


@check(
    16,
    "selection bias",
    "selection and report differ beyond chance",
    "AutoAttack, pull request 105",
    "What the attack claims stands on other noise.",
    "The attack's own count is luck of its noise: report votes on paths that it never saw.",
)
def selection_bias(s: Subject) -> tuple[str, bool]:
    """What the attack claims on its selection's paths, beside as many paths that it never saw, by the same rule."""
    _noisy(s, "selection and report are the same")
    rows = _known(s)
    found = s.path_logits(s.main.images[rows], rows, s.attack.selection, purpose="report")
    stand = (winners(found) == s.y[rows]).double().mean(0) > 0.5
    claimed = ~s.main.claimed[rows]
    paired = Paired.of(claimed, stand)
    return f"{from_to(claimed, stand)} on fresh paths", paired.p < LEVEL


@check(
    19,
    "the ball",
    "norm > eps + 1e-6, outside [0, 1], or success lost in 8 bits",
    "AutoAttack's checks",
    "The adversarial images are images, inside the ball.",
    "The attack leaves the ball, or lives on fractions of a grey level: its images could not be sent.",
)
def the_ball(s: Subject) -> tuple[str, bool]:
    """Norm and range of the adversarial images, and what is left of the successes when they are rounded to 8 bits."""
    images, eps = s.main.images, s.attack.eps
    over = float(BALLS[s.attack.norm].length(images - s.x).max()) - eps
    beyond = max(float(-images.min()), float(images.max()) - 1)
    fooled = (s.clean == s.y) & ~s.main.standing
    rows, lost, kept = fooled.nonzero()[:, 0], 0, False
    if len(rows):
        found, rounded = (
            s.decide(images_, rows, vote=1) == s.y[rows]
            for images_ in (images[rows], (images[rows] * 255).round() / 255)
        )
        lost, kept = int((rounded & ~found).sum()), beyond_chance(rounded, found)
    figure = f"norm {over + eps:.4g}, {lost} of {len(rows)} lost in 8 bits"
    return figure, not (over <= 1e-6 and beyond <= 1e-6) or kept


@check(
    20,
    "extraordinary claim",
    "1 - evasion beats RobustBench's best at eps / 2",
    "Tramèr 2022; RobustBench, March 2025",
    "The claim is not beyond what the field has reached.",
    "The claim beats the best published classifier at half the radius, to which a detector at eps amounts: doubt it.",
)
def extraordinary_claim(s: Subject) -> tuple[str, bool]:
    """The share that is not led to a wrong answer (its interval's lower end), beside the best entry at half the radius.

    The entry is interpolated between its clean and its robust accuracy; beyond its radius, its robust accuracy stands.
    """
    if s.x.shape[1:] != (3, 32, 32) or s.classes != 10:
        raise Beside("There are no entries to compare with: images are not CIFAR-10's in size and classes.")
    held = (s.main.labels == s.y) | (s.main.labels == ABSTAIN)
    rate = Rate.of(int(held.sum()), len(held))
    radius, clean, robust = _BEST[s.attack.norm]
    best = clean + min(s.attack.eps / 2 / radius, 1.0) * (robust - clean)
    figure = f"at least {percent(rate.low)}, the best entry {percent(best)} at eps {s.attack.eps / 2:.3g}"
    return figure, rate.low > best

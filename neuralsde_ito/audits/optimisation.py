"""Checks 5 to 11: did the attack's own optimisation reach what it could?"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from scipy.stats import binom
from torch import Tensor
from torch.nn import functional as F

from ..attacks.norms import BALLS
from ..attacks.pgd import PGD
from .battery import found_beyond_kin, kin_survivors, own_attacks, right_by_several_votes, suspicion
from .case import AuditCase, JudgedAttack
from .check import (
    COMMON_SHARE,
    KIN_SHARE,
    LEVEL,
    Finding,
    NotApplicable,
    beyond_chance,
    check,
    from_to,
    percent,
    require_correct,
    require_survivors,
)


@check(
    5,
    "more iterations",
    "2 x steps find more, beyond a sound model's",
    "Carlini et al. 2019",
    "Twice the steps find no more.",
    "The attack stops too early: raise steps until the figure stands still.",
)
def more_iterations(case: AuditCase) -> tuple[str, bool]:
    """The attack with twice the steps."""
    require_correct(case)
    once, twice = case.white_box.correct, _twice_the_steps(case).correct
    return from_to(once, twice), _more_steps(case).beyond


def _twice_the_steps(case: AuditCase) -> JudgedAttack:
    """The attack with twice the steps, once a case."""
    if "twice the steps" not in case.shared:
        case.shared["twice the steps"] = case.judge(replace(case.attack, steps=2 * case.attack.steps))
    judged: JudgedAttack = case.shared["twice the steps"]
    return judged


def _more_steps(case: AuditCase) -> Finding:
    once, twice = case.white_box.correct, _twice_the_steps(case).correct
    return Finding(once, twice, len(case.correct_rows), KIN_SHARE, case.randomised)


@check(
    6,
    "convergence",
    "median change > 0.05 in the last tenth of the steps, and longer attacks find more",
    "Pintor et al. 2022",
    "On the images that stand the loss has come to rest, or longer attacks find no more there.",
    "The loss was still rising where the attack gave up: take longer steps, or more of them.",
)
def convergence(case: AuditCase) -> tuple[str, bool]:
    """How much the best loss so far, rescaled to [0, 1], still rises at the end, on the survivors.

    The end is the last tenth of the steps. The paper takes the last 10 of long runs; 10 of 20 would be half of the run.
    On sound models, too, the loss may rise to the end; so it fails only where a longer attack finds more.
    """
    rows, record = require_survivors(case), case.white_box.record
    assert record is not None
    loss = torch.stack(record.losses[-case.attack.steps :])[:, rows]
    loss = loss[:, loss.isfinite().all(0)]
    if not loss.shape[1]:
        raise NotApplicable("No image that stands went through all steps, with a finite loss at each.")
    best = loss.cummax(0).values
    rise = best[-1] - best[0]
    late = (best[-1] - best[-1 - min(math.ceil(case.attack.steps / 10), len(best) - 1)]) / rise.clamp_min(1e-12)
    change = float(late.median())
    figure = f"median change {change:.2g} on {len(late)} images"
    if change <= 0.05:
        return figure, False
    more = own_attacks(case).by_kin.beyond or _more_steps(case).beyond
    return f"{figure}, longer attacks find {'' if more else 'no '}more", more


@check(
    7,
    "silent success",
    "iterates were adversarial, the returned images are not",
    "Pintor et al. 2022",
    "The attack returns what it finds.",
    "The attack passed adversarial images and returned others: keep the best iterate.",
)
def silent_success(case: AuditCase) -> tuple[str, bool]:
    """The survivors for which some iterate of the attack is adversarial: one for certain, or more beyond chance."""
    rows, record = require_survivors(case), case.white_box.record
    assert record is not None
    images = torch.where((record.share <= 0.5)[:, None, None, None], record.closest, case.white_box.images)[rows]
    before, after = (case.decide(x, rows, vote=1) == case.y[rows] for x in (case.white_box.images[rows], images))
    passed = int((before & ~after).sum())
    failed = beyond_chance(before, after) if case.randomised else passed > 0
    return f"{passed} of {len(after)} survivors", failed


@check(
    8,
    "rough landscape",
    "mean relative change of the loss > 0.1",
    "Pintor et al. 2022; own threshold",
    "Around the last iterates the loss is smooth.",
    "The loss jumps around the points where the attack ended, so that gradients lead nowhere: use a black-box attack.",
)
def rough_landscape(case: AuditCase) -> tuple[str, bool]:
    """The relative change of the loss over 100 draws within eps / 50 of the survivors' last iterates, on fixed paths.

    A loss that is not finite counts as a change of 1.
    """
    rows, model, record = require_survivors(case), case.fixed, case.white_box.record
    if model is None:
        raise NotApplicable("The model's noise cannot be fixed, and would be taken for roughness.")
    assert record is not None
    y, last = case.y[rows], record.last[rows]

    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(case.logits(model, x), y, reduction="none")

    with torch.no_grad():
        here = loss(last)
        near = torch.stack([loss(case.random_points(last, rows, case.attack.eps / 50, draw)) for draw in range(100)])
    change = ((near - here).abs() / here.clamp_min(1e-12)).clamp_max(1).nan_to_num(1.0).mean(0)
    mean = float(change.mean())
    figure = f"{mean:.2g} within eps / 50 of {len(rows)} survivors"
    if mean <= 0.1:
        return figure, False
    return suspicion(
        case, figure, False, "The loss jumps, yet attacks without gradients find no more: try more queries."
    )


@check(
    9,
    "unbounded attack",
    "accuracy > 1 / classes",
    "Athalye et al. 2018",
    "Without a bound the attack fools all it should.",
    "Not even an attack without a bound succeeds: its gradients do not lead to other classes.",
)
def unbounded_attack(case: AuditCase) -> tuple[str, bool]:
    """The attack in a ball that holds every possible image."""
    require_correct(case)
    eps = BALLS[case.attack.norm].diameter(case.x[0].numel())
    judged = case.judge(case.attack_at(eps)).correct
    accuracy = float(judged.cpu().double().mean())
    figure = f"{percent(accuracy)} right at eps {eps:.3g}"
    # Chance alone makes some images right: by the exact binomial test.
    if accuracy <= 1 / case.classes or binom.sf(int(judged.sum()) - 1, len(judged), 1 / case.classes) > LEVEL:
        return figure, False
    note = "The attack fails without a bound, yet others find no more within eps: take more steps or another objective."
    return suspicion(case, figure, accuracy > 0.5, note)


@check(
    10,
    "monotone in eps",
    "accuracy rises with eps beyond chance",
    "Carlini et al. 2019",
    "A larger ball is never safer.",
    "A larger ball left more images standing: the attack fails there, and its other figures are in doubt.",
)
def monotone(case: AuditCase) -> tuple[str, bool]:
    """Attacks at eps / 4, eps / 2, eps and 2 eps, each independently."""
    require_correct(case)
    correct = [judged.correct for judged in case.sweep.values()]
    rises = any(beyond_chance(larger, smaller) for i, smaller in enumerate(correct) for larger in correct[i + 1 :])
    shares = ", ".join(f"{100 * float(right.cpu().double().mean()):.3g}" for right in correct)
    return f"{shares} % at eps/4, eps/2, eps, 2 eps", rises


@check(
    11,
    "iterative beats one step",
    "FGSM fools images that many steps do not, beyond a sound model's",
    "Athalye et al. 2018",
    "One step finds no more than many do.",
    "One long step succeeds where many fail: add restarts or steps; if that is no help, the loss is rough or flat.",
)
def one_step(case: AuditCase) -> tuple[str, bool]:
    """FGSM on the images that stand under all attacks along the model's gradients."""
    rows = kin_survivors(case)
    fgsm = replace(
        case.attack, steps=1, step_size=case.attack.eps, random_start=False, keep="last", restarts=1, stop=False
    )
    return found_beyond_kin(case, case.judge(fgsm, rows).images[rows], rows)


@check(
    24,
    "common attack",
    "20 plain steps leave more than all attacks together, beyond a sound model's",
    "this project",
    "The attack that is commonly reported tells about as much as all attacks together.",
    "The attack that is commonly reported is far from the bottom line: part of the gradients is masked, and figures by "
    "such an attack say little.",
)
def common_attack(case: AuditCase) -> tuple[str, bool]:
    """PGD of 20 steps without momentum on the cross-entropy, against the best of all attacks."""
    require_correct(case)
    finding = beyond_the_common_attack(case)
    figure = f"{from_to(finding.before, finding.after)}: {finding.net}; {finding.needed} are too many"
    return figure, finding.beyond


def beyond_the_common_attack(case: AuditCase) -> Finding:
    """What all attacks together found beyond 20 plain steps, once a case."""
    if "beyond the common attack" not in case.shared:
        left = right_by_several_votes(case, common_attack_of(case).images)[0]
        best, n = own_attacks(case).by_others.after, len(case.correct_rows)
        case.shared["beyond the common attack"] = Finding(left, best, n, COMMON_SHARE, case.randomised)
    finding: Finding = case.shared["beyond the common attack"]
    return finding


def common_attack_of(case: AuditCase) -> JudgedAttack:
    """The attack that is commonly reported, once a case."""
    if "common attack" not in case.shared:
        case.shared["common attack"] = case.judge(PGD(case.attack.norm, case.attack.eps, steps=20, eot=8))
    judged: JudgedAttack = case.shared["common attack"]
    return judged

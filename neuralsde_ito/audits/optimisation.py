"""Checks of the attack's own run: did the optimisation do what it could?"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .case import Subject
from .check import Beside, _any_beyond_luck, _known, _second_vote, _survivors, beyond_chance, check, from_to, percent

# --- the attack's own run -------------------------------------------------------------------------------


@check(
    5,
    "more iterations",
    "2 x steps lower accuracy beyond chance",
    "Carlini et al. 2019",
    "Twice the steps find no more.",
    "The attack stops too early: raise steps until the figure stands still.",
)
def more_iterations(s: Subject) -> tuple[str, bool]:
    """The attack with twice the steps."""
    _known(s)
    return from_to(s.main.standing, s.longer.standing), beyond_chance(s.main.standing, s.longer.standing)


@check(
    6,
    "convergence",
    "median change > 0.05 in the last tenth of the steps",
    "Pintor et al. 2022",
    "On the images that stand the loss has come to rest.",
    "The loss was still rising where the attack gave up: take longer steps, or more of them.",
)
def convergence(s: Subject) -> tuple[str, bool]:
    """How far the best loss so far, rescaled to [0, 1], still rises at the end, on the survivors.

    In the last tenth of the steps: the paper looks at the last 10 of long runs; 10 of 20 would be half the way.
    """
    rows, trace = _survivors(s), s.main.trace
    assert trace is not None
    loss = torch.stack(trace.losses[-s.attack.steps :])[:, rows]
    loss = loss[:, loss.isfinite().all(0)]
    if not loss.shape[1]:
        raise Beside("No image that stands went through all steps, with a finite loss at each.")
    best = loss.cummax(0).values
    rise = best[-1] - best[0]
    late = (best[-1] - best[-1 - min(math.ceil(s.attack.steps / 10), len(best) - 1)]) / rise.clamp_min(1e-12)
    change = float(late.median())
    return f"median change {change:.2g} on {len(late)} images", not change <= 0.05


@check(
    7,
    "silent success",
    "an iterate was adversarial, the returned image is not",
    "Pintor et al. 2022",
    "The attack returns what it finds.",
    "The attack passed adversarial images and returned others: keep the best iterate.",
)
def silent_success(s: Subject) -> tuple[str, bool]:
    """Images that stand although the attack met an iterate that does not."""
    trace = s.main.trace
    assert trace is not None
    images = torch.where((trace.share <= 0.5)[:, None, None, None], trace.closest, s.main.images)
    again, stand = _second_vote(s, images)
    return f"{int((again & ~stand).sum())} of {len(stand)} survivors", _any_beyond_luck(s, again, stand)


@check(
    8,
    "rough landscape",
    "mean relative change of the loss > 0.1",
    "Pintor et al. 2022; own threshold",
    "Around the last iterates the loss is smooth.",
    "The loss jumps around the points where the attack ended, so that gradients lead nowhere: use a black-box attack.",
)
def rough_landscape(s: Subject) -> tuple[str, bool]:
    """Relative change of the loss over 100 draws within eps / 50 of the survivors' last iterates, on fixed paths."""
    rows, model, trace = _survivors(s), s.fixed, s.main.trace
    if model is None:
        raise Beside("The model's noise cannot be fixed, and would be taken for roughness.")
    assert trace is not None
    y, last = s.y[rows], trace.last[rows]
    with torch.no_grad():

        def loss(x: Tensor) -> Tensor:
            return F.cross_entropy(s.answers(model, x), y, reduction="none")

        here = loss(last)
        near = torch.stack([loss(s.noise(last, rows, s.attack.eps / 50, draw)) for draw in range(100)])
    change = ((near - here).abs() / here.clamp_min(1e-12)).clamp_max(1).nan_to_num(1.0).mean(0)
    figure = float(change.mean())
    return f"{figure:.2g} within eps / 50 of {len(rows)} survivors", figure > 0.1


@check(
    9,
    "unbounded attack",
    "accuracy > 1 / classes",
    "Athalye et al. 2018",
    "Without a bound the attack fools all it should.",
    "Not even an attack without a bound succeeds: its gradients do not lead to other classes.",
)
def unbounded_attack(s: Subject) -> tuple[str, bool]:
    """The attack in a ball that holds every image there is."""
    _known(s)
    eps = 1.0 if s.attack.norm == "linf" else math.sqrt(s.x[0].numel())
    right = float(s.attempt(s.at(eps)).standing.double().mean())
    return f"{percent(right)} right at eps {eps:.3g}", right > 1 / s.classes


@check(
    10,
    "monotone in eps",
    "accuracy rises with eps beyond chance",
    "Carlini et al. 2019",
    "A larger ball is never safer.",
    "A larger ball left more images standing: the attack fails there, and its other figures are in doubt.",
)
def monotone(s: Subject) -> tuple[str, bool]:
    """Attacks at eps / 4, eps / 2, eps and 2 eps, each on its own."""
    _known(s)
    standing = [attempt.standing for attempt in s.sweep.values()]
    rises = any(beyond_chance(far, near) for i, near in enumerate(standing) for far in standing[i + 1 :])
    shares = ", ".join(f"{100 * float(found.double().mean()):.3g}" for found in standing)
    return f"{shares} % at eps/4, eps/2, eps, 2 eps", rises


# --- other attacks that should not do better ------------------------------------------------------------


@check(
    11,
    "iterative beats one step",
    "FGSM fools images that iterations do not",
    "Athalye et al. 2018",
    "One step finds nothing that many do not.",
    "One long step succeeds where many fail: add restarts or steps; if that is no help, the loss is rough or flat.",
)
def one_step(s: Subject) -> tuple[str, bool]:
    """FGSM on the survivors of the white box."""
    rows = _survivors(s)
    fgsm = replace(s.attack, steps=1, step_size=s.attack.eps, random_start=False, keep="last", restarts=1, stop=False)
    again, stand = _second_vote(s, s.attempt(fgsm, rows).images)
    return f"{int((again & ~stand).sum())} of {len(rows)} survivors", _any_beyond_luck(s, again, stand)

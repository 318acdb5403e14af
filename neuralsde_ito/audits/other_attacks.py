"""Checks 12 to 15: other attacks, which should not do better than the white-box attack."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..attacks.objectives import margin
from ..attacks.square import Square
from ..attacks.targets import ModuleTarget, as_target
from ..models.votes import winners
from .battery import SQUARE, found_beyond_kin, kin_survivors, own_attacks, substitute_of
from .case import AuditCase
from .check import NotApplicable, beyond_chance, check, from_to, require_noise


@check(
    12,
    "black box against white box",
    "Square fools survivors beyond chance and a sound model's",
    "AutoAttack's checks",
    "Without gradients no more is found.",
    "An attack that sees only answers does better: gradients are masked, and the white-box figure is worthless.",
)
def black_box(case: AuditCase) -> tuple[str, bool]:
    """The Square attack on the images that stand under all attacks along the model's gradients."""
    rows, attack = kin_survivors(case), case.attack
    asked = own_attacks(case)
    number = asked.names.index(SQUARE)
    # Queries of a randomised model are dear. They are not made again where hardly any image had fallen before them, or
    # where the verdict no longer hangs on them.
    if asked.attacked[number] >= 0.8 * len(rows) or (case.randomised and asked.masked):
        made = (asked.source == number)[:, None, None, None]
        images = torch.where(made, asked.images, asked.kin_images)[rows]
        return found_beyond_kin(case, images, rows, f", {case.queries} queries")
    # All queries of an image run on the same paths, so fewer paths suffice than for a gradient. The second vote decides
    # on other paths.
    eot = math.ceil(attack.eot / 4)
    square = Square(norm=attack.norm, eps=attack.eps, steps=case.queries, eot=eot, selection=attack.selection)
    return found_beyond_kin(case, case.judge(square, rows).images[rows], rows, f", {case.queries} queries")


_DRAWS, _PIXELS = 10_000, 1 << 27  # of random noise: points an image, and pixels in all (minutes on a CPU)


@check(
    13,
    "random noise",
    "random draws fool survivors beyond a sound model's",
    "Carlini et al. 2019",
    "Chance finds nothing that the attack did not.",
    "Random points in the ball are adversarial where the attack found none: it is weaker than no attack at all.",
)
def random_noise(case: AuditCase) -> tuple[str, bool]:
    """Uniform draws around the clean survivors; the draw with the smallest margin of each image is voted on."""
    rows = kin_survivors(case)
    draws = case.draws or _DRAWS
    if case.randomised:
        draws = math.ceil(draws / len(rows))
    elif case.draws is None:
        draws = min(draws, max(1, _PIXELS // (case.x[0].numel() * len(rows))))
    return found_beyond_kin(case, _worst_draws(case, rows, draws)[rows], rows, f", {draws:,} draws each")


def _worst_draws(case: AuditCase, rows: Tensor, draws: int) -> Tensor:
    """All images ``(N, C, H, W)``; those at ``rows`` are replaced by the draw at which the wrong classes lead most.

    A draw at which some logit is not finite counts as fooled. Without noise an image that is fooled is not drawn again.
    """
    worst, lead = case.x.clone(), torch.full((len(case.x),), -torch.inf, dtype=case.x.dtype, device=case.x.device)
    done = 0
    budget = min(1024, (1 << 24) // case.x[0].numel())  # images in one batch
    while done < draws and len(rows):
        at_once = min(max(1, budget // len(rows)), draws - done)
        batch = rows.repeat_interleave(at_once)
        numbers = torch.arange(done, done + at_once, device=case.x.device).repeat(len(rows))
        x = case.random_points(case.x[batch], batch, case.attack.eps, numbers).clamp(0, 1)
        logits = case.path_logits(x, batch, 1, first=done).mean(0)
        wrong_lead = torch.where(logits.isfinite().all(-1), margin(logits, case.y[batch]), torch.inf)
        best, position = wrong_lead.view(len(rows), at_once).max(1)
        closer = best > lead[rows]
        worst[rows[closer]] = x.view(len(rows), at_once, *x.shape[1:])[closer, position[closer]]
        lead[rows[closer]] = best[closer]
        done += at_once
        if not case.randomised:
            rows = rows[lead[rows] <= 0]
    return worst


@check(
    14,
    "transfer",
    "transfer does better beyond chance and a sound model's",
    "SODEF's evaluation on RobustBench",
    "What was made on other networks does no better.",
    "Images made on another network do better than the attack on the model itself: its gradients mislead.",
)
def transfer(case: AuditCase) -> tuple[str, bool]:
    """The attack with the gradients of every surrogate, and of a substitute that the audit fits to the model.

    The model decides on its images, of those that stand under all attacks along its own gradients.
    """
    rows = kin_survivors(case)
    # An image that fools the surrogate need not fool the model, so the attack goes on to its last step.
    whole = replace(case.attack, stop=False)
    targets = case.surrogate_targets | {"substitute": as_target(substitute_of(case), case.x, case.batch_size)}
    found = {
        name: found_beyond_kin(case, case.judge(whole, rows, target).images[rows], rows, f" ({name})")
        for name, target in targets.items()
    }
    failed = [figure for figure, beyond in found.values() if beyond]
    return (failed or [max((figure for figure, _ in found.values()), key=_net)])[0], bool(failed)


def _net(figure: str) -> int:
    """The number with which a figure begins."""
    return int(figure.split()[0])


@check(
    15,
    "known noise",
    "knowing the paths is worse beyond chance",
    "adaptive attacks on randomised defences (arXiv 2505.22839)",
    "Against fixed paths, knowing them helps or does no harm.",
    "An attack that knows the noise does worse than one that guesses it: gradients of single paths mislead.",
)
def known_noise(case: AuditCase) -> tuple[str, bool]:
    """Against a defender whose paths are fixed: the attack that knows them, and the attack on fresh noise."""
    require_noise(case, "there is nothing to know")
    fixed = case.fixed
    if fixed is None:
        raise NotApplicable("The model's noise is not torch's: it cannot be fixed from outside.")
    whole, target = replace(case.attack, stop=False, restarts=1, eot=1), ModuleTarget(fixed, case.x, case.batch_size)
    known = case.run(whole, target, torch.arange(len(case.x), device=case.x.device)).images
    with torch.no_grad():
        clean, fresh, knowing = (
            winners(case.logits(fixed, images)) == case.y for images in (case.x, case.white_box.images, known)
        )
    if not bool(clean.any()):
        raise NotApplicable("With its noise fixed the model is right on no clean image.")
    fresh, knowing = fresh & clean, knowing & clean
    return f"{from_to(fresh, knowing)} once known", beyond_chance(knowing, fresh)

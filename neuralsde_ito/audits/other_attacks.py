"""Checks by other attacks, which should not do better than the white-box attack."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ..attacks.objectives import margin
from ..attacks.square import Square
from ..attacks.targets import ModuleTarget
from ..models.votes import winners
from .case import Subject
from .check import Beside, _any_beyond_luck, _known, _noisy, _second_vote, _survivors, beyond_chance, check, from_to


@check(
    12,
    "black box against white box",
    "Square fools survivors beyond chance",
    "AutoAttack's checks",
    "Without gradients no more is found.",
    "An attack that sees only answers does better: gradients are masked, and the white-box figure is worthless.",
)
def black_box(s: Subject) -> tuple[str, bool]:
    """The Square attack on the survivors of the white box."""
    rows = _survivors(s)
    # A query always meets the same paths, so fewer than a gradient averages will do; votes on others decide.
    eot = math.ceil(s.attack.eot / 4)
    square = Square(norm=s.attack.norm, eps=s.attack.eps, steps=s.queries, eot=eot, selection=s.attack.selection)
    again, stand = _second_vote(s, s.attempt(square, rows).images)
    found = int((again & ~stand).sum())
    return f"{found} of {len(rows)} survivors, {s.queries} queries", beyond_chance(again, stand)


@check(
    13,
    "random noise",
    "random draws fool survivors",
    "Carlini et al. 2019",
    "Chance finds nothing that the attack did not.",
    "Random points in the ball are adversarial where the attack found none: it is weaker than no attack at all.",
)
def random_noise(s: Subject) -> tuple[str, bool]:
    """Uniform draws around the clean survivors; of each image the draw with the smallest margin is voted on."""
    rows = _survivors(s)
    each = s.draws if not s.random else math.ceil(s.draws / len(rows))
    worst, lead = s.x.clone(), torch.full((len(s.x),), -torch.inf, dtype=s.x.dtype, device=s.x.device)
    left, done = rows, 0
    budget = min(1024, (1 << 24) // s.x[0].numel())  # images at a time
    while done < each and len(left):
        at_once = min(max(1, budget // len(left)), each - done)
        batch = left.repeat_interleave(at_once)
        draws = torch.arange(done, done + at_once, device=s.x.device).repeat(len(left))
        x = s.noise(s.x[batch], batch, s.attack.eps, draws).clamp(0, 1)
        logits = s.path_logits(x, batch, 1, first=done).mean(0)
        # Where logits are not finite there is no right answer.
        lost = torch.where(logits.isfinite().all(-1), margin(logits, s.y[batch]), torch.inf)
        ahead = lost.view(len(left), at_once)
        best, place = ahead.max(1)
        closer = best > lead[left]
        worst[left[closer]] = x.view(len(left), at_once, *x.shape[1:])[closer, place[closer]]
        lead[left[closer]] = best[closer]
        done += at_once
        if not s.random:
            left = left[lead[left] <= 0]
    again, stand = _second_vote(s, worst)
    figure = f"{int((again & ~stand).sum())} of {len(rows)} survivors, {each:,} draws each"
    return figure, _any_beyond_luck(s, again, stand)


@check(
    14,
    "transfer",
    "transfer does better beyond chance",
    "SODEF's evaluation on RobustBench",
    "What was made on other networks does no better.",
    "Images made on another network do better than the attack on the model itself: its gradients mislead.",
)
def transfer(s: Subject) -> tuple[str, bool]:
    """The attack through every surrogate, its images given to the model."""
    if not s.surrogates:
        raise Beside("No surrogate was given.")
    _known(s)
    # An image that fools the surrogate need not fool the model: go on to the end.
    whole = replace(s.attack, stop=False)
    found = {name: s.attempt(whole, through=target).standing for name, target in s.others.items()}
    name, least = min(found.items(), key=lambda item: int(item[1].sum()))
    figure = f"{from_to(s.main.standing, least)} ({name})"
    return figure, any(beyond_chance(s.main.standing, standing) for standing in found.values())


@check(
    15,
    "known noise",
    "knowing the paths is worse beyond chance",
    "adaptive attacks on randomised defences (arXiv 2505.22839)",
    "Against fixed paths, knowing them helps or does no harm.",
    "An attack that knows the noise does worse than one that guesses it: gradients of single paths mislead.",
)
def known_noise(s: Subject) -> tuple[str, bool]:
    """Against a defender whose paths are fixed: the attack that knows them beside the one on fresh noise."""
    _noisy(s, "there is nothing to know")
    fixed = s.fixed
    if fixed is None:
        raise Beside("The model's noise is not torch's: it cannot be fixed from outside.")
    # A module draws by place in the batch: the same images go together to the end, so that each keeps its path.
    whole, target = replace(s.attack, stop=False, restarts=1, eot=1), ModuleTarget(fixed, s.x, s.batch_size)
    target.batch_size = size = target.at_once(1)
    parts = torch.arange(len(s.x), device=s.x.device).split(size)
    known = torch.cat([s.run(whole, target, part).images for part in parts])
    with torch.no_grad():
        clean, fresh, knowing = (
            torch.cat([winners(fixed(part)) for part in images.split(size)]) == s.y
            for images in (s.x, s.main.images, known)
        )
    if not bool(clean.any()):
        raise Beside("With its noise fixed the model is right on no clean image.")
    fresh, knowing = fresh & clean, knowing & clean
    return f"{from_to(fresh, knowing)} once known", beyond_chance(knowing, fresh)

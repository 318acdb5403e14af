"""Twenty checks for a false sense of security, each a function of a `Subject`; `audit` runs them all."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .attacks import BALLS, OBJECTIVES, Square
from .attacks.objective import ModuleTarget, margin
from .binarisation import binarisation
from .checking import LEVEL, Beside, Check, beyond_chance, check, from_to, percent, plain
from .gradcheck import solver_gradient
from .outcomes import ABSTAIN, Paired, Rate
from .subject import Subject
from .votes import winners

# RobustBench, March 2025: eps, clean accuracy and robust accuracy (AutoAttack) of the best CIFAR-10 entries.
_BEST = {"linf": (8 / 255, 0.9368, 0.7371), "l2": (0.5, 0.9554, 0.8497)}


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


def _gradient(s: Subject, panel: int) -> Tensor:
    """Gradients at the clean images ``(N, D)``, on a set of paths of its own for every ``panel``."""
    count = s.target.distinct or s.attack.eot
    found = s.target.ascend(_objective(s), s.x, s.y, panel * count, count, s.seed, s.index)
    return found.gradient.flatten(1)


# --- the model ------------------------------------------------------------------------------------------


@check(
    1,
    "randomness",
    "gap > 1e-4 and no averaging",
    "AutoAttack's checks",
    "Forwards agree, or the attack averages its gradients over paths.",
    "The model is randomised and the attack does not average: give it more paths a gradient (eot, at least 20).",
)
def randomness(s: Subject) -> tuple[str, bool]:
    """Five forwards of one batch: the largest distance of two, each normalised to length 1."""
    with torch.no_grad():
        forwards = torch.stack([s.answers(s.model, s.x) for _ in range(5)])
    out = F.normalize(forwards.nan_to_num(0, 0, 0), dim=-1)
    gap = float((out[:, None] - out[None]).norm(dim=-1).max())
    averaged = not s.adaptive and s.random and s.attack.eot > 1
    way = f", {s.attack.eot} paths a gradient" if averaged else ""
    return f"gap {gap:.2g} in 5 forwards{way}", gap > 1e-4 and not averaged


@check(
    2,
    "logits",
    "all in [0, 1], rows sum to 1; or not finite",
    "AutoAttack's checks",
    "The output is finite, and not probabilities.",
    "The output is probabilities or votes, on which a softmax saturates, or not finite: let the model return finite "
    "logits.",
)
def logits(s: Subject) -> tuple[str, bool]:
    """Whether the output is already probabilities, or votes; and whether it is finite."""
    with torch.no_grad():
        given = torch.cat([s.model(part) for part in s.x.split(s.batch_size or 256)])
    finite, out = given.isfinite().all(1), given.double()
    if not bool(finite.all()):
        return f"not finite at {int((~finite).sum())} of {len(out)} images", True
    off = float((out.sum(1) - 1).abs().max())
    low, high = float(out.min()), float(out.max())
    rounding = max(1e-5, torch.finfo(given.dtype).eps)  # half precision adds up to 1 less exactly
    return f"from {low:.3g} to {high:.3g}, sums off 1 by {off:.2g}", low >= 0 and high <= 1 and off <= rounding


@check(
    3,
    "zero gradients",
    "any image's gradient is 0, or not finite",
    "AutoAttack's checks; Pintor et al. 2022",
    "Every image has a gradient to follow.",
    "Some gradients vanish or are not finite, and the attack does not move: look for saturated logits (objective dlr), "
    "rounding, detached parts, or a root or a logarithm of 0.",
)
def zero_gradients(s: Subject) -> tuple[str, bool]:
    """The share of images whose input gradient is zero in every pixel, and how many have one that is not finite."""
    gradient = _gradient(s, 0)
    zero, odd = (gradient == 0).all(1), ~gradient.isfinite().all(1)
    beside = f", not finite at {int(odd.sum())} of {len(odd)}" if bool(odd.any()) else ""
    return f"{percent(float(zero.double().mean()))} of images{beside}", bool((zero | odd).any())


@check(
    4,
    "EOT adequacy",
    "cosine < 0.9, or 2 x EOT lowers accuracy beyond chance",
    "Athalye et al. 2018; own threshold",
    "Two gradients on paths of their own agree, and twice the paths find no more.",
    "Gradients are mostly noise at this number of paths: raise eot until two of them agree.",
)
def eot_adequacy(s: Subject) -> tuple[str, bool]:
    """Median cosine of two independent gradients, and the attack with twice the paths."""
    _noisy(s, "one path is all there is")
    rows = s.right if len(s.right) else slice(None)
    # A gradient that is not finite agrees with none.
    cosine = float(F.cosine_similarity(_gradient(s, 0)[rows], _gradient(s, 1)[rows]).nan_to_num(-1.0).median())
    twice = s.attempt(replace(s.attack, eot=2 * s.attack.eot)).standing
    figure = f"cosine {cosine:.3f}; {from_to(s.main.standing, twice)}"
    return figure, not cosine >= 0.9 or beyond_chance(s.main.standing, twice)


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
        logits = s.paths(x, batch, 1, first=done).mean(0)
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
    found = s.paths(s.main.images[rows], rows, s.attack.selection, purpose="report")
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


CHECKS: tuple[Callable[[Subject], Check], ...] = (
    randomness, logits, zero_gradients, eot_adequacy, more_iterations, convergence, silent_success, rough_landscape,
    unbounded_attack, monotone, one_step, black_box, random_noise, transfer, known_noise, selection_bias, binarisation,
    solver_gradient, the_ball, extraordinary_claim,
)  # fmt: skip

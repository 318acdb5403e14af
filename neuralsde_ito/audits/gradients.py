"""Autograd against finite differences: is the gradient that attacks follow the slope of what is computed?"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..noise.keys import PathRange
from .case import Subject
from .check import Beside, _noisy, _objective, beyond_chance, check, from_to, percent


@check(
    18,
    "solver gradient",
    "median relative error > 1e-3, or adaptive steps",
    "this project",
    "Gradients are those of the computation, step by step.",
    "Autograd's gradient is not the slope of what is computed: look for detached parts, an adjoint, or adaptive steps.",
)
def solver_gradient(s: Subject) -> tuple[str, bool]:
    """Autograd against central differences in float64 on a fixed path, in 16 random directions at up to 8 images."""
    if s.adaptive:
        return "the solver chooses its steps", True
    if s.fixed is None:
        raise Beside("The model's noise is not torch's: it cannot be fixed from outside.")
    gen = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64, device="cpu").to(s.x.device)

    # Off the kinks that real images sit on: black borders tie in every max-pooling, and meet every clamp.
    try:
        x = s.x[: s.batch_size or 8][:8].double()
        x = (x + 0.01 * draw(*x.shape)).clamp(0.01, 0.99).requires_grad_()
        model = copy.deepcopy(s.fixed).double()
        with torch.enable_grad():
            out = model(x)
        exact = out.dtype == torch.float64
    except Exception:  # the module is not ours: whatever it raises, it does not compute in float64
        exact = False
    if not exact:
        raise Beside("The model does not compute in float64, where alone differences are exact enough.")
    mix = draw(*out.shape)  # a random combination of logits: a loss would saturate
    if not out.requires_grad:
        gradient = torch.zeros_like(x)
    else:
        gradient = torch.autograd.grad(out, x, mix, allow_unused=True, materialize_grads=True)[0]
    errors, h = [], 1e-5
    with torch.no_grad():
        for _ in range(16):
            v = draw(*x.shape)
            v = v / v.flatten(1).norm(dim=1)[:, None, None, None]
            slope = ((model(x + h * v) - model(x - h * v)) * mix).sum(1) / (2 * h)
            guess = (gradient * v).flatten(1).sum(1)
            size = torch.maximum(slope.abs(), guess.abs())
            # NaN is the slope of nothing.
            errors.append(((slope - guess).abs() / size.where(size > 0, torch.ones_like(size))).nan_to_num(1.0))
    error = float(torch.cat(errors).median())
    return f"median relative error {error:.1e}", error > 1e-3


def _gradient(s: Subject, panel: int) -> Tensor:
    """Gradients at the clean images ``(N, D)``, on a set of paths of its own for every ``panel``."""
    count = s.target.distinct or s.attack.eot
    paths = PathRange(s.seed, "gradient", s.index, panel * count, count)
    found = s.target.ascend(_objective(s), s.x, s.y, paths)
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

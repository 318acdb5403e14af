"""Checks 1 to 4 and 18: the model's output, and the gradients that the attack follows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..attacks.objectives import OBJECTIVES
from ..models.inspection import MIXING
from ..noise.keys import PathRange
from .battery import own_attacks, suspicion
from .case import AuditCase
from .check import KIN_SHARE, Finding, NotApplicable, check, from_to, percent, require_noise, untargeted_objective

# --- the output -----------------------------------------------------------------------------------------


@check(
    1,
    "randomness",
    "gap > 1e-4 and no averaging",
    "AutoAttack's checks",
    "Forwards agree, or the attack averages its gradients over paths.",
    "The model is randomised and the attack does not average: give it more paths a gradient (eot, at least 20).",
    attacks=False,
)
def randomness(case: AuditCase) -> tuple[str, bool]:
    """Five forwards of one batch: the largest distance between two, each normalised to length 1."""
    with torch.no_grad():
        forwards = torch.stack([case.logits(case.network, case.x) for _ in range(5)])
    out = F.normalize(forwards.nan_to_num(0, 0, 0), dim=-1)
    gap = float((out[:, None] - out[None]).norm(dim=-1).max())
    averaged = case.barred is None and case.randomised and case.attack.eot > 1
    paths = f", {case.attack.eot} paths a gradient" if averaged else ""
    return f"gap {gap:.2g} in 5 forwards{paths}", gap > 1e-4 and not averaged


@check(
    2,
    "logits",
    "all in [0, 1], rows sum to 1; or not finite",
    "AutoAttack's checks",
    "The output is finite, and not probabilities.",
    "The output is probabilities or votes, on which a softmax saturates, or not finite: let the model return finite "
    "logits.",
    attacks=False,
)
def logits(case: AuditCase) -> tuple[str, bool]:
    """Whether the output is already probabilities or votes, and whether it is finite."""
    with torch.no_grad():
        # Not `case.logits`, which converts half precision: the tolerance below depends on the model's own dtype.
        output = torch.cat([case.network(part) for part in case.x.split(case.batch_size or 256)])
    finite, exact = output.isfinite().all(1), output.cpu().double()
    if not bool(finite.all()):
        return f"not finite at {int((~finite).sum())} of {len(exact)} images", True
    off = float((exact.sum(1) - 1).abs().max())
    low, high = float(exact.min()), float(exact.max())
    rounding = max(1e-5, torch.finfo(output.dtype).eps)  # half precision adds up to 1 less exactly
    figure = f"from {low:.3g} to {high:.3g}, sums off 1 by {off:.2g}"
    if case.barred is not None or not (low >= 0 and high <= 1 and off <= rounding):
        return figure, False
    note = "A softmax of probabilities is nearly flat, yet other objectives find no more: let the model return logits."
    return suspicion(case, figure, False, note)


# --- gradients of the objective -------------------------------------------------------------------------


@check(
    3,
    "zero gradients",
    "any image's gradient is 0, or not finite",
    "AutoAttack's checks; Pintor et al. 2022",
    "Every image has a gradient to follow.",
    "Some gradients vanish or are not finite, and the attack does not move: look for saturated logits (objective dlr), "
    "rounding, detached parts, or a root or a logarithm of 0.",
)
def zero_gradients(case: AuditCase) -> tuple[str, bool]:
    """The share of images whose gradient is zero in every pixel, and the number with one that is not finite."""
    gradient = _clean_gradients(case, panel=0)
    zero, odd = (gradient == 0).all(1), ~gradient.isfinite().all(1)
    not_finite = f", not finite at {int(odd.sum())} of {len(odd)}" if bool(odd.any()) else ""
    figure, bad = f"{percent(float(zero.cpu().double().mean()))} of images{not_finite}", zero | odd
    if not bool(bad.any()):
        return figure, False
    note = "Some gradients vanish, yet attacks that follow none find no more: compare with the objective dlr."
    return suspicion(case, figure, bool(odd.any()) or float(bad.cpu().double().mean()) > 0.5, note)


@check(
    4,
    "EOT adequacy",
    "cosine < 0.9 and 2 x EOT finds more, beyond a sound model's",
    "Athalye et al. 2018; own threshold",
    "Two gradients on paths of their own agree, or twice the paths find no more.",
    "Gradients are mostly noise at this number of paths: raise eot until two of them agree.",
)
def eot_adequacy(case: AuditCase) -> tuple[str, bool]:
    """The median cosine of two independent gradients, and the attack with twice the paths."""
    require_noise(case, "one path is all there is")
    rows = case.correct_rows if len(case.correct_rows) else slice(None)
    first, second = _clean_gradients(case, panel=0)[rows], _clean_gradients(case, panel=1)[rows]
    # The cosine with a gradient that is not finite is NaN: such a pair counts as opposed.
    cosine = float(F.cosine_similarity(first, second).nan_to_num(-1.0).median())
    if cosine >= 0.9:
        return f"cosine {cosine:.3f}", False
    if not bool(first.isfinite().all(1).any()):
        return f"cosine {cosine:.3f}: no gradient is finite", True
    twice = case.judge(replace(case.attack, eot=2 * case.attack.eot)).correct
    finding = Finding(case.white_box.correct, twice, len(case.correct_rows), KIN_SHARE, True)
    return f"cosine {cosine:.3f}; {from_to(case.white_box.correct, twice)}", finding.beyond or own_attacks(case).masked


def _clean_gradients(case: AuditCase, panel: int) -> Tensor:
    """Gradients at the clean images ``(N, D)``; every ``panel`` is a set of paths of its own."""
    count = case.target.distinct or case.attack.eot
    paths = PathRange(case.seed, "gradient", case.index, panel * count, count)
    objective = OBJECTIVES[untargeted_objective(case.attack)]
    return case.target.ascend(objective, case.x, case.y, paths).gradient.flatten(1)


# --- autograd against finite differences ----------------------------------------------------------------


@check(
    18,
    "solver gradient",
    "median relative error > 1e-3, or adaptive steps",
    "this project",
    "Gradients are those of the computation, step by step.",
    "Autograd's gradient is not the slope of what is computed: look for detached parts, an adjoint, or adaptive steps.",
    attacks=False,
)
def solver_gradient(case: AuditCase) -> tuple[str, bool]:
    """Autograd against central differences in float64 on fixed paths, in 16 random directions at up to 8 images."""
    if case.adaptive:
        return "the solver chooses its steps", True
    if case.fixed is None:
        raise NotApplicable("The model's noise is not torch's: it cannot be fixed from outside.")
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu").to(case.x.device)

    model, x, out = _in_double_precision(case, case.fixed, draw)
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
            predicted = (gradient * v).flatten(1).sum(1)
            size = torch.maximum(slope.abs(), predicted.abs())
            # Where a logit is NaN, so is the error: it counts as wholly wrong.
            errors.append(((slope - predicted).abs() / size.where(size > 0, torch.ones_like(size))).nan_to_num(1.0))
    error = float(torch.cat(errors).median())
    figure = f"median relative error {error:.1e}"
    if error <= 1e-3:
        return figure, False
    note = "The backward pass is a surrogate, yet attacks that do not trust it find no more: say which one it is."
    return suspicion(case, figure, False, note)


def _in_double_precision(
    case: AuditCase, fixed: nn.Module, draw: Callable[..., Tensor]
) -> tuple[nn.Module, Tensor, Tensor]:
    """A copy of a network in float64, up to eight images that require a gradient, and the copy's logits for them."""
    # Real images sit on kinks: black borders tie in every max-pooling and lie at the edge of every clamp. So the
    # images are moved a little.
    try:
        x = case.x[: case.batch_size or 8][:8].double()
        x = (
            0.98 * x + 0.02 * draw(*x.shape).sigmoid()
        ).requires_grad_()  # inside [0, 1], without clamping: no new ties
        model = copy.deepcopy(fixed).double()
        with torch.enable_grad():
            out = model(x)
        exact = out.dtype == torch.float64
    except Exception:  # whatever another author's module raises here: it does not compute in float64
        exact = False
    if not exact:
        raise NotApplicable("The model does not compute in float64, where alone differences are exact enough.")
    return model, x, out


# --- what a gradient cannot follow ----------------------------------------------------------------------


@check(
    22,
    "image by image",
    f"an answer moves by more than {MIXING:g} with the other images of its batch",
    "this project",
    "The answer to an image is its own.",
    "The answer to an image depends on the others in its batch, so that no figure of an image holds: let the model "
    "answer image by image.",
    attacks=False,
)
def image_by_image(case: AuditCase) -> tuple[str, bool]:
    """The distance of normalised logits for the same images in two batches that differ in the others."""
    return f"moves by {case.mixing:.2g}", case.mixing > MIXING


class _Optimisations(TorchFunctionMode):
    """Notices gradients that a forward pass takes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.autograd.grad, torch.autograd.backward, Tensor.backward):
            self.taken += 1
        return func(*args, **(kwargs or {}))


@check(
    23,
    "test-time optimisation",
    "the forward pass takes gradients, and own attacks find more",
    "Croce et al. 2022",
    "The forward pass takes no gradients.",
    "The model optimises while it answers, and the attack does not follow it there: differentiate through the "
    "optimisation, or attack with queries.",
    attacks=False,
)
def test_time_optimisation(case: AuditCase) -> tuple[str, bool]:
    """How many gradients one forward pass takes (https://arxiv.org/abs/2202.13711)."""
    with torch.no_grad(), _Optimisations() as seen:
        case.network(case.x[:2])
    figure = f"{seen.taken} gradients in a forward pass"
    if not seen.taken or case.barred is not None:
        return figure, False
    note = "The model optimises while it answers: more queries, or a gradient through the optimisation, would decide."
    return suspicion(case, figure, False, note)

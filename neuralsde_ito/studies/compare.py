"""Which solver, at how many steps: a network or an SDE against a fine reference on the same Brownian paths.

A strong error is the root mean square, over paths, of the distance to the reference on the same path. A weak error is
a distance of means (Kloeden and Platen 1992, chapter 9).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..memory import Live
from ..models.recast import ItoResNet
from ..modules import evaluating
from ..noise.keys import make_keys
from ..validation import ItoError, check_labels, image_names, recordable
from .orders import slope
from .subjects import Equation, Network, NotFinite, Subject, timed


@dataclass(frozen=True)
class SolverRow:
    """One solver at one number of steps, against the reference on the same paths.

    Attributes:
        solver: its name in `SOLVERS`.
        steps: steps a block; for an SDE, in the whole interval.
        evaluations: drift evaluations of one path (for a network: of all its blocks).
        state_error: strong error of the last state, relative to the norm of the reference's.
        mean_error: weak error: the largest distance of a class's mean probability for a network, of a component's
            mean for an SDE.
        logit_error: strong error of the logits, relative; None for an SDE.
        agreement: share of images with the reference's label; None for an SDE.
        accuracy: share of images with the true label; None without labels.
        gradient_cosine: mean over paths of the cosine between the input's gradient and the reference's (of the
            labels' cross entropy; for an SDE, of the sum of the last state); None if not asked for.
        seconds: time of one inference of all paths.
        cost: ``seconds`` in forward passes of the plain network; for an SDE, in evaluations of drift and diffusion.
        memory: bytes, the most that tensors held at a time beyond the model and its input: in the gradient's pass
            (checkpointed above one step) if gradients were asked for, else in an inference.
        diverged: where states ceased to be finite, as ``block 3 (t = 4)``; the errors are NaN then.
    """

    solver: str
    steps: int
    evaluations: int
    state_error: float = math.nan
    mean_error: float = math.nan
    logit_error: float | None = None
    agreement: float | None = None
    accuracy: float | None = None
    gradient_cosine: float | None = None
    seconds: float = math.nan
    cost: float = math.nan
    memory: int = 0
    diverged: str | None = None


@dataclass(frozen=True)
class Slope:
    """How fast a solver's strong error falls: the slope of its logarithm against that of the step.

    Attributes:
        theory: the solver's strong order, with its source in `neuralsde_ito.sde.solvers`.
        fit: the measured slope; None with fewer than three numbers of steps that have an error.
        standard_error: of ``fit``, over at most 16 groups of paths; None with fewer than two paths.
    """

    theory: float
    fit: float | None
    standard_error: float | None


@dataclass(frozen=True)
class SolverComparison:
    """Solvers on one network or SDE, all on the same paths.

    Attributes:
        subject: ``network``, or the SDE's class.
        noise: its kind, in words.
        additive: whether the noise is known not to depend on the state.
        reference: the solver and the steps that all are compared with.
        rows: one for each solver and number of steps.
        orders: by solver, the slope of its state error.
    """

    subject: str
    noise: str
    additive: bool
    reference: tuple[str, int]
    rows: list[SolverRow]
    orders: dict[str, Slope] = field(default_factory=dict)

    def remarks(self) -> list[str]:
        """What the figures mean, in sentences."""
        unit = "steps a block" if self.subject == "network" else "steps"
        finite = {(row.solver, row.steps): row for row in self.rows if row.diverged is None}
        sentences = []
        if self.additive and any(solver == "milstein" for solver, _ in finite):
            sentences.append("Milstein is Euler here: the noise is additive, and its correction is zero.")
        for row in self.rows:
            if row.diverged:
                sentences.append(f"{row.solver} at {row.steps} {unit}: states are not finite after {row.diverged}.")
        eulers = sorted((n for solver, n in finite if solver == "euler"), reverse=True)
        if eulers and (finest := finite["euler", eulers[0]]).steps > 1:
            better = [row for row in finite.values() if row.solver != "euler" and row.state_error <= finest.state_error]
            better = [row for row in better if row.evaluations < finest.evaluations]
            if better:
                best = min(better, key=lambda row: row.evaluations)
                sentences.append(
                    f"{best.solver} reaches Euler's error at {finest.steps} steps with {best.steps}, "
                    f"for {best.evaluations} drift evaluations instead of {finest.evaluations}."
                )
        if self.subject == "network" and (one := finite.get(("euler", 1))):
            sentences.append(
                "More steps change the model: at 1 step a block it is the ResNet (with noise), whose last state is "
                f"{100 * one.state_error:.0f} % away from that of the SDE's fine solution."
            )
        return sentences


def compare_solvers(
    model: ItoResNet | Any,
    x: Tensor,
    y: Tensor | None = None,
    solvers: Sequence[str] | None = None,
    steps: Sequence[int] = (1, 2, 4, 8),
    seed: int = 0,
    index: Tensor | None = None,
    reference: tuple[str, int] | None = None,
    gradients: bool = True,
    interval: tuple[float, float] = (0.0, 1.0),
) -> SolverComparison:
    """Compare solvers with a fine reference; each image, or state, has one path for all solvers.

    Args:
        model: a recast network, whose own solver and steps are not used; or any SDE in torchsde's protocol, with
            ``f``, ``g``, ``noise_type`` and ``sde_type``.
        x: images ``(N, C, H, W)`` in [0, 1]; for an SDE the first states ``(N, D)``.
        y: the images' labels ``(N,)``, for accuracies.
        solvers: names in `SOLVERS`; default: all that solve this SDE.
        steps: steps a block (for an SDE: in the interval), powers of two.
        seed, index: name the paths, as in `make_keys`; ``index`` is int64 ``(N,)``, default: positions in ``x``.
        reference: solver and steps. Default: SRK (without noise ``ode:rk4``) at four times the finest steps; where
            SRK does not fit, the first solver that does, at sixteen times.
        gradients: also compare the gradient with respect to ``x``.
        interval: start and end of time for an SDE; a network has its own.

    Raises:
        ItoError: the SDE lacks something, a solver does not fit (the message names those that do), or the reference
            does not stay finite (the message names block, time and solver).
    """
    with torch.inference_mode(False):  # inference mode records no gradient
        x = recordable(x)
        keys = make_keys(seed, "report", index=image_names(index, x))
        if not isinstance(model, ItoResNet):
            if y is not None:
                raise ItoError("Labels y go with a network; an SDE has none.")
            return _compare(Equation(model, x, keys, interval), solvers, steps, reference, gradients)
        with evaluating(model):
            labels = None if y is None else check_labels(recordable(y), len(x))
            return _compare(Network(model, x, labels, keys), solvers, steps, reference, gradients)


def _compare(
    subject: Subject,
    solvers: Sequence[str] | None,
    steps: Sequence[int],
    reference: tuple[str, int] | None,
    gradients: bool,
) -> SolverComparison:
    solvers = subject.solvers() if solvers is None else solvers
    reference = subject.reference(max(steps)) if reference is None else reference
    for name in (*solvers, reference[0]):
        for n in (*steps, reference[1]):
            subject.check(name, n)
    try:
        fine = _solve(subject, *reference, gradients)
    except NotFinite as where:
        raise ItoError(
            f"The reference, {reference[0]} at {reference[1]} {subject.grid}, is not finite after {where}; "
            "choose another, or less noise."
        ) from None
    rows, orders = [], {}
    for solver in solvers:
        fitted, squares = [], []  # numbers of steps with an error on every path, and the squared errors (N,)
        for n in steps:
            try:
                solution = _solve(subject, solver, n, gradients)
            except NotFinite as where:
                rows.append(SolverRow(solver, n, subject.evaluations(solver, n), diverged=str(where)))
                continue
            squared = (solution.state - fine.state).flatten(1).square().sum(1).cpu().double()
            if bool((squared > 0).all()):
                fitted.append(n)
                squares.append(squared)
            rows.append(_row(subject, solver, n, solution, fine, squared))
        orders[solver] = Slope(subject.order(solver), *_fit(fitted, squares))
    return SolverComparison(subject.name, subject.noise, subject.additive, reference, rows, orders)


@dataclass(frozen=True)
class _Solution:
    """What one solver computes at one number of steps, and what that costs.

    Attributes:
        state: the last state ``(N, ...)``.
        output: what is read from it, ``(N, K)``.
        gradient: of the loss with respect to the input; None if not asked for.
        seconds: of one inference.
        memory: bytes, the most that tensors held at a time.
    """

    state: Tensor
    output: Tensor
    gradient: Tensor | None
    seconds: float
    memory: int


def _solve(subject: Subject, solver: str, steps: int, gradients: bool) -> _Solution:
    with torch.no_grad():
        (state, output), seconds = timed(lambda: subject.solve(subject.x, solver, steps, False), subject.x.device)
    gradient = None
    live = Live()
    if gradients:
        x = subject.x.detach().requires_grad_()
        with live:
            loss = subject.loss(subject.solve(x, solver, steps, steps > 1)[1])  # a fine grid's graph may not fit
            (gradient,) = torch.autograd.grad(loss, x)
    else:
        with live, torch.no_grad():
            subject.solve(subject.x, solver, steps, False)
    return _Solution(state, output, gradient, seconds, live.peak)


def _row(subject: Subject, solver: str, steps: int, solution: _Solution, fine: _Solution, squared: Tensor) -> SolverRow:
    """The row of a solution; ``squared`` are the squared distances of its states to the reference's, ``(N,)``."""
    return SolverRow(
        solver,
        steps,
        subject.evaluations(solver, steps),
        float(squared.sum().sqrt() / fine.state.norm()),
        gradient_cosine=_cosine(solution.gradient, fine.gradient),
        seconds=solution.seconds,
        cost=solution.seconds / subject.unit_seconds,
        memory=solution.memory,
        **subject.errors(solution.output, fine.output),
    )


def _fit(steps: list[int], squares: list[Tensor]) -> tuple[float | None, float | None]:
    """The slope of the root mean square error and its standard error; for each number of steps, squares ``(N,)``."""
    if len(steps) < 3:
        return None, None
    fit = float(slope(steps, torch.stack([s.mean().sqrt() for s in squares])))
    count = min(16, len(squares[0]))
    if count < 2:
        return fit, None
    groups = [torch.stack([group.mean().sqrt() for group in s.tensor_split(count)]) for s in squares]
    return fit, float(slope(steps, torch.stack(groups, -1)).std()) / math.sqrt(count)


def _cosine(gradient: Tensor | None, fine: Tensor | None) -> float | None:
    """The mean over paths."""
    if gradient is None or fine is None:
        return None
    return float(F.cosine_similarity(gradient.flatten(1), fine.flatten(1)).mean())

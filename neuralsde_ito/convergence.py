"""Which solver, at how many steps: errors against a fine reference on the same Brownian path, and measured orders.

Strong error: root mean square over paths of the distance to the reference on the same path. Weak error: distance of
means. Orders are slopes of errors against the step, both on a log scale (Kloeden and Platen 1992, chapter 9).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from .ensemble import evaluating
from .noise import make_keys
from .problems import Problem
from .recast import ItoResNet
from .solvers import SOLVERS, check_solver, find_solver, integrate

_GROUPS = 16  # of paths, for standard errors


@dataclass(frozen=True)
class Order:
    """What one solver does on one problem.

    Attributes:
        solver: its name; ``theory`` its strong order there.
        steps: the numbers of steps that were tried.
        errors: strong errors, one a number of steps; NaN or huge where it was unstable.
        fit, standard_error: the slope of the stable errors, and its standard error over groups of paths; None with
            fewer than three stable ones.
        unstable: numbers of steps at which it left all bounds.
        weak: slope of the bias of the mean and its standard error; None where the bias does not exceed four of its
            standard errors at every step size, so that a slope would fit noise.
        evaluations: of the drift, a step.
    """

    solver: str
    theory: float
    steps: tuple[int, ...]
    errors: tuple[float, ...]
    fit: float | None
    standard_error: float | None
    unstable: tuple[int, ...]
    weak: tuple[float, float] | None
    evaluations: int


def slope(steps: Sequence[int], errors: Tensor) -> Tensor:
    """Least-squares slope of ``log error`` against ``log step``: errors ``(..., S)`` -> ``(...)``."""
    x = -torch.tensor(steps, dtype=torch.float64).log()
    x = x - x.mean()
    return (errors.double().log() * x).sum(-1) / x.square().sum()


@torch.no_grad()
def measure_order(problem: Problem, solver: str, steps: Sequence[int], exact: Tensor | None = None) -> Order:
    """Measure a solver's strong and weak order on a problem.

    Args:
        problem: see `neuralsde_ito.problems`.
        solver: a name in `SOLVERS`.
        steps: powers of two.
        exact: the solution, if it is at hand already.
    """
    method = find_solver(solver)
    exact = problem.exact() if exact is None else exact
    multiplicative = problem.sde.schedule.multiplicative
    errors, group_errors, biases, noises, stable = [], [], [], [], []
    for n in steps:
        difference = problem.solve(solver, n) - exact
        error = float(difference.square().mean().sqrt())
        groups = difference.view(_GROUPS, -1)
        errors.append(error)
        # Ten spreads away from the solution is no approximation any more.
        stable.append(math.isfinite(error) and error < 10 * float(exact.std()))
        group_errors.append(groups.square().mean(1).sqrt())
        biases.append(float(difference.mean().abs()))
        noises.append(float(groups.mean(1).std()) / math.sqrt(_GROUPS))
    good = [i for i, fine in enumerate(stable) if fine]
    fit = standard_error = None
    weak = None
    if len(good) >= 3:
        kept = [steps[i] for i in good]
        fit = float(slope(kept, torch.tensor([errors[i] for i in good])))
        spread = slope(kept, torch.stack([group_errors[i] for i in good], -1)).std()
        standard_error = float(spread) / math.sqrt(_GROUPS)
        if all(biases[i] > 4 * noises[i] for i in good):
            bias = torch.tensor([biases[i] for i in good])
            relative = torch.tensor([noises[i] / biases[i] for i in good])
            x = torch.tensor(kept, dtype=torch.float64).log()
            error_of_slope = float(relative.square().mean().sqrt() / (x - x.mean()).square().sum().sqrt())
            weak = (float(slope(kept, bias)), error_of_slope)
    return Order(
        solver,
        method.order[multiplicative],
        tuple(steps),
        tuple(errors),
        fit,
        standard_error,
        tuple(n for n, fine in zip(steps, stable, strict=True) if not fine),
        weak,
        method.evaluations[multiplicative],
    )


@dataclass(frozen=True)
class SolverRow:
    """One solver at one number of steps, against the reference on the same paths.

    Attributes:
        solver, steps: steps a block.
        evaluations: of all blocks' drifts, for one inference.
        state_error, logit_error: strong errors of the last state and of the logits, relative to the reference's size.
        probability_error: weak: the largest distance of a class's mean probability.
        agreement: share of images with the reference's label.
        accuracy: share of right labels; None without labels.
        gradient_cosine: mean over images of the cosine to the reference's input gradient; None if not asked for.
        seconds: of one inference of all images, and ``cost``, relative to the network's own forward pass.
        diverged: where states ceased to be finite, as ``block 3 (t = 4)``; the errors are NaN then.
    """

    solver: str
    steps: int
    evaluations: int
    state_error: float
    logit_error: float
    probability_error: float
    agreement: float
    accuracy: float | None
    gradient_cosine: float | None
    seconds: float
    cost: float
    diverged: str | None = None


@dataclass(frozen=True)
class SolverComparison:
    """Solvers on one network, images and paths.

    Attributes:
        reference: the solver and steps that all are held against, and ``omega`` and ``schedule`` of the noise.
        rows: one a solver and number of steps.
        orders: for each solver the slope of its state error, over the steps that were tried; None below three.
    """

    reference: tuple[str, int]
    omega: float
    schedule: str
    rows: list[SolverRow]
    orders: dict[str, float | None] = field(default_factory=dict)

    def remarks(self) -> list[str]:
        """What the figures mean, in words."""
        by = {(row.solver, row.steps): row for row in self.rows if row.diverged is None}
        said = []
        additive = "multiplicative" not in self.schedule
        if additive and any(solver == "milstein" for solver, _ in by):
            said.append("Milstein is Euler here: the noise is additive, and its correction is zero.")
        for row in self.rows:
            if row.diverged:
                said.append(f"{row.solver} at {row.steps} steps a block: states are not finite after {row.diverged}.")
        eulers = sorted((n for solver, n in by if solver == "euler"), reverse=True)
        if eulers and (finest := by["euler", eulers[0]]).steps > 1:
            better = [row for row in by.values() if row.solver != "euler" and row.state_error <= finest.state_error]
            better = [row for row in better if row.evaluations < finest.evaluations]
            if better:
                best = min(better, key=lambda row: row.evaluations)
                said.append(
                    f"{best.solver} reaches Euler's error at {finest.steps} steps with {best.steps}, "
                    f"for {best.evaluations} drift evaluations instead of {finest.evaluations}."
                )
        if one := by.get(("euler", 1)):
            said.append(
                "More steps change the model: at 1 step a block it is the ResNet (with noise), whose last state is "
                f"{100 * one.state_error:.0f} % away from that of the SDE's fine solution."
            )
        return said


class _NotFinite(Exception):
    """Says where."""


def _solve(model: ItoResNet, x: Tensor, keys: Tensor, solver: str, steps: int) -> tuple[Tensor, Tensor]:
    """The last state and the logits."""
    state = model.stem(x)
    for sde in model.sdes:
        state = integrate(sde, state, keys, solver, steps, model.checkpoint)  # type: ignore[arg-type]
        if not bool(state.isfinite().all()):
            raise _NotFinite(f"block {sde.index} (t = {sde.t1:g})")
    return state, model.head(state)


def compare_solvers(
    model: ItoResNet,
    x: Tensor,
    y: Tensor | None = None,
    solvers: Sequence[str] | None = None,
    steps: Sequence[int] = (1, 2, 4, 8),
    seed: int = 0,
    index: Tensor | None = None,
    reference: tuple[str, int] | None = None,
    gradients: bool = True,
) -> SolverComparison:
    """Hold solvers against a fine reference, all on one Brownian path an image.

    Args:
        model: a recast network; its own solver and steps play no part.
        x: images ``(N, C, H, W)`` in [0, 1].
        y: their labels ``(N,)``, for accuracies.
        solvers: names in `SOLVERS`; default all that solve this SDE.
        steps: steps a block, powers of two.
        seed, index: name the paths.
        reference: solver and steps; default SRK (without noise ``ode:rk4``) at four times the finest steps.
        gradients: also compare the gradient of the loss with respect to the images.

    Raises:
        ValueError: a solver that does not fit, or a reference that does not stay finite (block, time, solver named).
    """
    omega = model.schedule.omega
    if solvers is None:
        solvers = [
            name for name, s in SOLVERS.items() if (s.library == "torchdiffeq") == (omega == 0) and not s.adaptive
        ]
    if reference is None:
        reference = ("srk" if omega else "ode:rk4", 4 * max(steps))
    for name in (*solvers, reference[0]):
        for n in (*steps, reference[1]):
            check_solver(name, omega, n)
    index = torch.arange(len(x), device=x.device) if index is None else index.to(x.device)
    keys = make_keys(seed, "report", index=index)
    with evaluating(model):
        with torch.no_grad():
            model.base(x)  # the first call is slower
            start = time.perf_counter()
            found = model.base(x).argmax(1)
            if x.device.type == "cuda":
                torch.cuda.synchronize()
            plain = time.perf_counter() - start
            labels = found if y is None else y
        try:
            fine_state, fine, fine_gradient = _measured(model, x, labels, keys, *reference, gradients)[:3]
        except _NotFinite as place:
            raise ValueError(
                f"The reference, {reference[0]} at {reference[1]} steps a block, is not finite after {place}; "
                "choose another, or less noise."
            ) from None
        rows = []
        for solver in solvers:
            for n in steps:
                evaluations = _evaluations(model, solver, n)
                try:
                    state, logits, gradient, seconds = _measured(model, x, labels, keys, solver, n, gradients)
                except _NotFinite as place:
                    nan = math.nan
                    rows.append(SolverRow(solver, n, evaluations, nan, nan, nan, 0, None, None, nan, nan, str(place)))
                    continue
                shares = logits.softmax(1).mean(0) - fine.softmax(1).mean(0)
                cosine = None
                if gradient is not None and fine_gradient is not None:
                    cosine = float(F.cosine_similarity(gradient.flatten(1), fine_gradient.flatten(1)).mean())
                rows.append(
                    SolverRow(
                        solver,
                        n,
                        evaluations,
                        float((state - fine_state).norm() / fine_state.norm()),
                        float((logits - fine).norm() / fine.norm()),
                        float(shares.abs().max()),
                        float((logits.argmax(1) == fine.argmax(1)).double().mean()),
                        None if y is None else float((logits.argmax(1) == y).double().mean()),
                        cosine,
                        seconds,
                        seconds / plain,
                    )
                )
    orders: dict[str, float | None] = {}
    for solver in solvers:
        mine = [row for row in rows if row.solver == solver and row.diverged is None and row.state_error > 0]
        enough = len(mine) >= 3
        found = torch.tensor([row.state_error for row in mine])
        orders[solver] = float(slope([row.steps for row in mine], found)) if enough else None
    return SolverComparison(reference, omega, model.schedule.name, rows, orders)


def _measured(
    model: ItoResNet, x: Tensor, labels: Tensor, keys: Tensor, solver: str, steps: int, gradients: bool
) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """Last state, logits, input gradient and the seconds of an inference."""
    with torch.no_grad():
        start = time.perf_counter()
        state, logits = _solve(model, x, keys, solver, steps)
        if x.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    gradient = None
    if gradients:
        before, model.checkpoint = model.checkpoint, steps > 1  # the reference's graph may not fit
        try:
            at = x.detach().requires_grad_()
            loss = F.cross_entropy(_solve(model, at, keys, solver, steps)[1], labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, at)
        finally:
            model.checkpoint = before
    return state, logits, gradient, seconds


def _evaluations(model: ItoResNet, solver: str, steps: int) -> int:
    """Drift evaluations of one inference: blocks with a drift, times steps, times stages; jumps count once."""
    method = find_solver(solver)
    drifts = sum(not sde.jump for sde in model.sdes)
    a_block = steps * method.evaluations[model.schedule.multiplicative] + method.starts
    return drifts * a_block + len(model.sdes) - drifts

"""Measured orders of solvers on problems with known solutions.

A strong error is the root mean square, over paths, of the distance to the solution on the same path. A weak error is
the distance of means. An order is the slope of the error against the step, both on a log scale (Kloeden and Platen
1992, chapter 9).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torchsde
from torch import Tensor

from ..sde.solvers import find_solver
from .problems import Problem

_GROUPS = 16  # of paths, for standard errors
_FINEST = 4  # an order is about small steps: coarser steps are reported, but are not part of the slope


@dataclass(frozen=True)
class Order:
    """The measured orders of one solver on one problem.

    Attributes:
        solver: its name in `SOLVERS`.
        theory: its strong order for this kind of noise.
        steps: the numbers of steps that were tried.
        errors: the strong error at each number of steps, in units of the state; NaN or huge where it was unstable.
        fit: the strong order: the slope of the errors at the four finest stable numbers of steps; None with fewer than
            three.
        standard_error: of ``fit``, over 16 groups of paths; None where ``fit`` is.
        unstable: the numbers of steps at which the error is not finite, or above ten standard deviations of the
            solution.
        weak: the weak order, the slope of the mean's bias, and its standard error; None where the bias is below four
            of its standard errors at any of those numbers of steps, as the slope would then fit noise.
        evaluations: drift evaluations of one step.
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

    def agrees(self, other: Order) -> bool:
        """Whether two measurements of the strong order differ by no more than three standard errors, or 0.02."""
        if self.fit is None or other.fit is None or self.standard_error is None or other.standard_error is None:
            return self.fit is None and other.fit is None
        return abs(self.fit - other.fit) <= max(0.02, 3 * math.hypot(self.standard_error, other.standard_error))


def slope(steps: Sequence[int], errors: Tensor) -> Tensor:
    """Least-squares slope of ``log error`` against ``log step``: errors ``(..., S)`` -> ``(...)``."""
    x = -torch.tensor(steps, dtype=torch.float64, device="cpu").log()
    x = x - x.mean()
    return (errors.double().log() * x).sum(-1) / x.square().sum()


@torch.no_grad()
def measure_order(
    problem: Problem,
    solver: str,
    steps: Sequence[int],
    exact: Tensor | None = None,
    path: torchsde.BaseBrownian | None = None,
) -> Order:
    """Measure a solver's strong and weak order on a problem.

    Args:
        problem: one of `neuralsde_ito.studies.problems`, or another.
        solver: a name in `SOLVERS`.
        steps: numbers of steps on ``[0, 1]``, powers of two.
        exact: the solution at 1 on the path, ``(N, D)``; default: it is computed.
        path: another path than our own; torchsde's solver reads it.

    Raises:
        ItoError: the solver is unknown, or does not fit the problem.
    """
    method = find_solver(solver)
    exact = problem.exact(path) if exact is None else exact
    multiplicative = problem.sde.schedule.multiplicative
    differences = [problem.solve(solver, n, path) - exact for n in steps]
    theory = method.order.given(multiplicative=multiplicative)
    evaluations = method.evaluations.given(multiplicative=multiplicative)
    return fit_order(solver, theory, evaluations, steps, differences, float(exact.std()))


def fit_order(
    solver: str, theory: float, evaluations: int, steps: Sequence[int], differences: Sequence[Tensor], spread: float
) -> Order:
    """Fit the orders to a solver's errors.

    Args:
        solver, theory, evaluations, steps: as in `Order`.
        differences: for each number of steps, the computed states minus the solution, ``(N, D)``.
        spread: the standard deviation of the solution.
    """
    errors = [float(difference.square().mean().sqrt()) for difference in differences]
    # Ten spreads away from the solution is no approximation any more.
    stable = [math.isfinite(error) and error < 10 * spread for error in errors]
    unstable = tuple(n for n, is_stable in zip(steps, stable, strict=True) if not is_stable)
    fitted = [i for i, is_stable in enumerate(stable) if is_stable][-_FINEST:]
    fit = standard_error = weak = None
    if len(fitted) >= 3:
        fine = [steps[i] for i in fitted]
        fit = float(slope(fine, torch.tensor([errors[i] for i in fitted], device="cpu")))
        groups = [differences[i].reshape(_GROUPS, -1) for i in fitted]
        slopes = slope(fine, torch.stack([group.square().mean(1).sqrt() for group in groups], -1))
        standard_error = float(slopes.std()) / math.sqrt(_GROUPS)
        weak = _weak_order(fine, [differences[i] for i in fitted])
    return Order(solver, theory, tuple(steps), tuple(errors), fit, standard_error, unstable, weak, evaluations)


def _weak_order(steps: Sequence[int], differences: Sequence[Tensor]) -> tuple[float, float] | None:
    """The slope of the mean's bias and its standard error; None where the bias is not above its noise."""
    biases = [float(difference.mean().abs()) for difference in differences]
    group_means = [difference.reshape(_GROUPS, -1).mean(1) for difference in differences]
    noises = [float(means.std()) / math.sqrt(_GROUPS) for means in group_means]
    if not all(bias > 4 * noise for bias, noise in zip(biases, noises, strict=True)):
        return None
    relative = torch.tensor([noise / bias for bias, noise in zip(biases, noises, strict=True)], device="cpu")
    x = torch.tensor(steps, dtype=torch.float64, device="cpu").log()
    error_of_slope = float(relative.square().mean().sqrt() / (x - x.mean()).square().sum().sqrt())
    return float(slope(steps, torch.tensor(biases, device="cpu"))), error_of_slope

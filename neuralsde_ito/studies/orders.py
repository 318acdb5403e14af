"""Measured orders of solvers on problems with known solutions.

Strong error: root mean square over paths of the distance to the reference on the same path. Weak error: distance of
means. Orders are slopes of errors against the step, both on a log scale (Kloeden and Platen 1992, chapter 9).
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
_FINEST = 4  # an order is a statement about small steps: coarser ones are reported, and enter no slope


@dataclass(frozen=True)
class Order:
    """What one solver does on one problem.

    Attributes:
        solver: its name; ``theory`` its strong order there.
        steps: the numbers of steps that were tried.
        errors: strong errors, one a number of steps; NaN or huge where it was unstable.
        fit, standard_error: the slope of the errors at the four finest numbers of steps that were stable, and its
            standard error over groups of paths; None with fewer than three.
        unstable: numbers of steps at which it left all bounds.
        weak: slope of the bias of the mean and its standard error; None where the bias does not exceed four of its
            standard errors at every one of these, so that a slope would fit noise.
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

    def agrees(self, other: Order) -> bool:
        """Whether two measurements of the strong order differ by no more than three standard errors, or 0.02."""
        if self.fit is None or other.fit is None or self.standard_error is None or other.standard_error is None:
            return self.fit is None and other.fit is None
        return abs(self.fit - other.fit) <= max(0.02, 3 * math.hypot(self.standard_error, other.standard_error))


def slope(steps: Sequence[int], errors: Tensor) -> Tensor:
    """Least-squares slope of ``log error`` against ``log step``: errors ``(..., S)`` -> ``(...)``."""
    x = -torch.tensor(steps, dtype=torch.float64).log()
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
        problem: see `neuralsde_ito.problems`.
        solver: a name in `SOLVERS`.
        steps: powers of two.
        exact: the solution, if it is at hand already.
        path: read instead of our own, by torchsde's solver.
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
    """From what a solver misses the solution by, ``(N, D)`` a number of steps, and the solution's spread."""
    errors, group_errors, biases, noises, stable = [], [], [], [], []
    for difference in differences:
        error = float(difference.square().mean().sqrt())
        groups = difference.reshape(_GROUPS, -1)
        errors.append(error)
        # Ten spreads away from the solution is no approximation any more.
        stable.append(math.isfinite(error) and error < 10 * spread)
        group_errors.append(groups.square().mean(1).sqrt())
        biases.append(float(difference.mean().abs()))
        noises.append(float(groups.mean(1).std()) / math.sqrt(_GROUPS))
    good = [i for i, fine in enumerate(stable) if fine][-_FINEST:]
    fit = standard_error = None
    weak = None
    if len(good) >= 3:
        kept = [steps[i] for i in good]
        fit = float(slope(kept, torch.tensor([errors[i] for i in good])))
        slopes = slope(kept, torch.stack([group_errors[i] for i in good], -1))
        standard_error = float(slopes.std()) / math.sqrt(_GROUPS)
        if all(biases[i] > 4 * noises[i] for i in good):
            bias = torch.tensor([biases[i] for i in good])
            relative = torch.tensor([noises[i] / biases[i] for i in good])
            x = torch.tensor(kept, dtype=torch.float64).log()
            error_of_slope = float(relative.square().mean().sqrt() / (x - x.mean()).square().sum().sqrt())
            weak = (float(slope(kept, bias)), error_of_slope)
    unstable = tuple(n for n, fine in zip(steps, stable, strict=True) if not fine)
    return Order(solver, theory, tuple(steps), tuple(errors), fit, standard_error, unstable, weak, evaluations)

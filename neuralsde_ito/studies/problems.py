"""SDEs on ``[0, 1]`` with a solution that is known on the path itself: what solvers are measured against."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchsde
from torch import Tensor, nn

from ..noise.brownian import BrownianPath
from ..noise.keys import make_keys
from ..sde.block import BlockSDE
from ..sde.integrate import integrate, solve_torchsde
from ..sde.schedules import Schedule
from ..sde.solvers import find_solver

FINEST = 1 << 11  # steps of a reference where no solution is known


class Pointwise(nn.Module):
    """``B(y)`` given as a function of every element."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, y: Tensor) -> Tensor:
        """``(N, D) -> (N, D)``."""
        return self.function(y)


@dataclass(frozen=True)
class Problem:
    """A block on ``[0, 1]``, initial states ``(N, D)``, and the solution at 1 on any path.

    Attributes:
        sde: the block; every element of the state is a path of its own.
        y0, keys: ``(N, D)`` float64 and ``(N,)``.
        solution: from a path, as torchsde queries one, to the states at 1, ``(N, D)``.
    """

    sde: BlockSDE
    y0: Tensor
    keys: Tensor
    solution: Callable[[torchsde.BaseBrownian], Tensor]

    def path(self) -> BrownianPath:
        """Our path, to be read at any step."""
        return BrownianPath(self.keys, self.y0.shape[1], 0, 0.0, 1.0, dtype=self.y0.dtype)

    def torchsde_path(self, seed: int = 0) -> torchsde.BrownianInterval:
        """torchsde's own, with other noise of the same law."""
        size, dtype = tuple(self.y0.shape), self.y0.dtype
        return torchsde.BrownianInterval(
            0.0, 1.0, size, dtype, entropy=seed, levy_area_approximation="space-time", cache_size=None
        )

    def exact(self, path: torchsde.BaseBrownian | None = None) -> Tensor:
        """The states at 1, on our path or another."""
        return self.solution(self.path() if path is None else path)

    def solve(self, solver: str, steps: int, path: torchsde.BaseBrownian | None = None) -> Tensor:
        """The states at 1 as a solver finds them; on a path that is not ours always torchsde's solver."""
        if path is None:
            return integrate(self.sde, self.y0, self.keys, solver, steps)
        return solve_torchsde(self.sde, path, find_solver(solver), steps, self.y0, 0, steps)


def _states(paths: int, y0: float, seed: int) -> tuple[Tensor, Tensor]:
    keys = make_keys(seed, "report", index=torch.arange(paths // 64))
    return torch.full((paths // 64, 64), y0, dtype=torch.float64), keys


def _block(step: Callable[[Tensor], Tensor], schedule: Schedule) -> BlockSDE:
    return BlockSDE(Pointwise(step), schedule, shape=(64,))


def ornstein_uhlenbeck(theta: float = 1.0, omega: float = 1.0, paths: int = 4096, seed: int = 1) -> Problem:
    """``dy = -theta y dt + omega / (1 + t) dW``: linear, with additive noise that depends on time."""
    y0, keys = _states(paths, 1.0, seed)

    def solution(path: torchsde.BaseBrownian, level: int = 9) -> Tensor:
        # y(1) = e^-theta y0 + the integral of phi dW, phi(s) = e^(-theta (1 - s)) sigma(s). On a cell with
        # middle m the integral of phi(m) + phi'(m) (s - m) is phi(m) W - phi'(m) (U - h W / 2): the error is O(h^2).
        h = 2.0**-level
        total = math.exp(-theta) * y0
        for k in range(1 << level):
            w, u = path(k * h, (k + 1) * h, return_U=True)
            m = (k + 0.5) * h
            phi = math.exp(-theta * (1 - m)) * omega / (1 + m)
            total = total + phi * w - phi * (theta - 1 / (1 + m)) * (u - 0.5 * h * w)
        return total

    return Problem(_block(lambda y: y - theta * y, Schedule(omega)), y0, keys, solution)


def geometric_brownian_motion(mu: float = 0.25, omega: float = 0.5, paths: int = 4096, seed: int = 2) -> Problem:
    """``dy = mu y dt + omega y dW``: ``y(1) = y0 exp(mu - omega^2 / 2 + omega W)``."""
    y0, keys = _states(paths, 1.0, seed)

    def solution(path: torchsde.BaseBrownian) -> Tensor:
        return y0 * torch.exp(mu - omega**2 / 2 + omega * path(0.0, 1.0))

    sde = _block(lambda y: (1 + mu) * y, Schedule(omega, "constant-multiplicative"))
    return Problem(sde, y0, keys, solution)


def double_well(omega: float = 0.75, paths: int = 4096, seed: int = 3) -> Problem:
    """``dy = (y - y^3) dt + omega dW``: not linear, additive noise. The reference is SRK with fine steps.

    Strong enough noise to throw a path where reversible Heun with 8 steps leaves all bounds.
    """
    y0, keys = _states(paths, 0.5, seed)
    sde = _block(lambda y: y + y - y**3, Schedule(omega, "constant"))
    return Problem(sde, y0, keys, lambda path: solve_torchsde(sde, path, find_solver("srk"), FINEST, y0, 0, FINEST))


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "ornstein-uhlenbeck": ornstein_uhlenbeck,
    "geometric-brownian": geometric_brownian_motion,
    "double-well": double_well,
}

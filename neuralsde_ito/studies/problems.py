"""SDEs on ``[0, 1]`` whose solution is known on every Brownian path: solvers are measured against it."""

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

FINEST = 1 << 11  # steps of the reference where no closed form is known


class Pointwise(nn.Module):
    """The block ``B(y)`` as a function that is applied to every element."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, y: Tensor) -> Tensor:
        """``(N, D) -> (N, D)``."""
        return self.function(y)


@dataclass(frozen=True)
class Problem:
    """An SDE on ``[0, 1]`` with its solution.

    Attributes:
        sde: the SDE as a block; every element of the state is solved by itself, along its own path.
        y0: initial states ``(N, D)``, float64.
        keys: name the paths, int64 ``(N,)``.
        solution: takes a path in torchsde's protocol, and returns the states at 1, ``(N, D)``.
    """

    sde: BlockSDE
    y0: Tensor
    keys: Tensor
    solution: Callable[[torchsde.BaseBrownian], Tensor]

    def path(self) -> BrownianPath:
        """Our path, the same at every number of steps."""
        return BrownianPath(self.keys, self.y0.shape[1], 0, 0.0, 1.0, dtype=self.y0.dtype)

    def torchsde_path(self, seed: int = 0) -> torchsde.BrownianInterval:
        """torchsde's own path: other noise with the same law."""
        size, dtype = tuple(self.y0.shape), self.y0.dtype
        return torchsde.BrownianInterval(
            0.0, 1.0, size, dtype, entropy=seed, levy_area_approximation="space-time", cache_size=None
        )

    def exact(self, path: torchsde.BaseBrownian | None = None) -> Tensor:
        """The solution at 1, ``(N, D)``, on our path or another."""
        return self.solution(self.path() if path is None else path)

    def solve(self, solver: str, steps: int, path: torchsde.BaseBrownian | None = None) -> Tensor:
        """A solver's states at 1, ``(N, D)``; torchsde's solver takes every ``path`` that is not ours."""
        if path is None:
            return integrate(self.sde, self.y0, self.keys, solver, steps)
        return solve_torchsde(self.sde, path, find_solver(solver), steps, self.y0, 0, steps)


def _start(paths: int, y0: float, seed: int) -> tuple[Tensor, Tensor]:
    """Initial states ``(paths // 64, 64)`` and their keys."""
    keys = make_keys(seed, "report", index=torch.arange(paths // 64, device="cpu"))
    return torch.full((paths // 64, 64), y0, dtype=torch.float64, device="cpu"), keys


def _block(function: Callable[[Tensor], Tensor], schedule: Schedule) -> BlockSDE:
    """The SDE whose drift is ``function(y) - y``."""
    return BlockSDE(Pointwise(function), schedule, shape=(64,))


def ornstein_uhlenbeck(theta: float = 1.0, omega: float = 1.0, paths: int = 4096, seed: int = 1) -> Problem:
    """``dy = -theta y dt + sigma(t) dW`` with ``sigma(t) = omega / (1 + t)`` and ``y(0) = 1``.

    The solution is ``y(1) = exp(-theta) y(0) + int_0^1 exp(-theta (1 - s)) sigma(s) dW(s)``: linear, with additive
    noise that depends on time (Kloeden and Platen 1992, section 4.2).

    Args:
        theta, omega: the parameters, per unit of time.
        paths: their number, a multiple of 64.
        seed: names the paths.
    """
    y0, keys = _start(paths, 1.0, seed)

    def solution(path: torchsde.BaseBrownian, level: int = 9) -> Tensor:
        # With phi(s) = exp(-theta (1 - s)) sigma(s), the integral of phi dW is taken cell by cell. On a cell of length
        # h and middle m, that of the line phi(m) + phi'(m) (s - m) is phi(m) W - phi'(m) (U - h W / 2): error O(h^2).
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
    """``dy = mu y dt + omega y dW`` with ``y(0) = 1``: multiplicative noise.

    The solution is ``y(1) = y(0) exp(mu - omega^2 / 2 + omega W(1))`` (Kloeden and Platen 1992, section 4.4).

    Args:
        mu, omega: the parameters, per unit of time.
        paths: their number, a multiple of 64.
        seed: names the paths.
    """
    y0, keys = _start(paths, 1.0, seed)

    def solution(path: torchsde.BaseBrownian) -> Tensor:
        return y0 * torch.exp(mu - omega**2 / 2 + omega * path(0.0, 1.0))

    sde = _block(lambda y: (1 + mu) * y, Schedule(omega, "constant-multiplicative"))
    return Problem(sde, y0, keys, solution)


def double_well(omega: float = 0.75, paths: int = 4096, seed: int = 3) -> Problem:
    """``dy = (y - y^3) dt + omega dW`` with ``y(0) = 1 / 2``: a drift that is not linear, and additive noise.

    There is no closed form: the solution is SRK's with 2,048 steps. At the default ``omega`` the noise moves some paths
    so far that reversible Heun with 8 steps becomes unstable.

    Args:
        omega: the noise, per square root of time.
        paths: their number, a multiple of 64.
        seed: names the paths.
    """
    y0, keys = _start(paths, 0.5, seed)
    sde = _block(lambda y: y + y - y**3, Schedule(omega, "constant"))
    return Problem(sde, y0, keys, lambda path: solve_torchsde(sde, path, find_solver("srk"), FINEST, y0, 0, FINEST))


# By the name that the command line uses.
PROBLEMS: dict[str, Callable[[], Problem]] = {
    "ornstein-uhlenbeck": ornstein_uhlenbeck,
    "geometric-brownian": geometric_brownian_motion,
    "double-well": double_well,
}

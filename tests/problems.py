"""What solvers are measured against: SDEs with a known solution on the path itself, and small networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neuralsde_ito.noise import BrownianPath, make_keys
from neuralsde_ito.recast import Chain
from neuralsde_ito.resnets import load_resnet
from neuralsde_ito.schedules import Schedule
from neuralsde_ito.sde import BlockSDE
from neuralsde_ito.solvers import integrate


class Pointwise(nn.Module):
    """``B(y)`` given as a function of every element."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, y: Tensor) -> Tensor:
        return self.function(y)


@dataclass(frozen=True)
class Problem:
    """A block on ``[0, 1]``, initial states ``(N, D)``, and the solution at 1 on the path the keys name."""

    sde: BlockSDE
    y0: Tensor
    keys: Tensor
    solution: Callable[[BrownianPath], Tensor]

    def path(self) -> BrownianPath:
        return BrownianPath(self.keys, self.y0.shape[1], 0, 0.0, 1.0, dtype=self.y0.dtype)

    def exact(self) -> Tensor:
        return self.solution(self.path())

    def solve(self, solver: str, steps: int) -> Tensor:
        return integrate(self.sde, self.y0, self.keys, solver, steps)


def _states(paths: int, y0: float, seed: int) -> tuple[Tensor, Tensor]:
    keys = make_keys(seed, "report", index=torch.arange(paths // 64))
    return torch.full((paths // 64, 64), y0, dtype=torch.float64), keys


def ornstein_uhlenbeck(theta: float = 1.0, omega: float = 1.0, paths: int = 4096, seed: int = 1) -> Problem:
    """``dy = -theta y dt + omega / (1 + t) dW``: linear, with additive noise that depends on time."""
    y0, keys = _states(paths, 1.0, seed)

    def solution(path: BrownianPath, level: int = 9) -> Tensor:
        # y(1) = e^-theta y0 + the integral of phi dW, phi(s) = e^(-theta (1 - s)) sigma(s). On a cell with
        # middle m the integral of phi(m) + phi'(m) (s - m) is phi(m) W - phi'(m) h H: the error is O(h^2).
        h = 2.0**-level
        total = math.exp(-theta) * y0
        for k in range(1 << level):
            w, area = path.cell(level, k)
            m = (k + 0.5) * h
            phi = math.exp(-theta * (1 - m)) * omega / (1 + m)
            total = total + phi * w - phi * (theta - 1 / (1 + m)) * h * area
        return total

    return Problem(BlockSDE(Pointwise(lambda y: y - theta * y), Schedule(omega)), y0, keys, solution)


def geometric_brownian_motion(mu: float = 0.25, omega: float = 0.5, paths: int = 4096, seed: int = 2) -> Problem:
    """``dy = mu y dt + omega y dW``: ``y(1) = y0 exp(mu - omega^2 / 2 + omega W)``."""
    y0, keys = _states(paths, 1.0, seed)

    def solution(path: BrownianPath) -> Tensor:
        return y0 * torch.exp(mu - omega**2 / 2 + omega * path.increment(0, 0))

    schedule = Schedule(omega, "constant-multiplicative")
    return Problem(BlockSDE(Pointwise(lambda y: (1 + mu) * y), schedule), y0, keys, solution)


def double_well(omega: float = 0.5, paths: int = 4096, seed: int = 3) -> Problem:
    """``dy = (y - y^3) dt + omega dW``: not linear, additive noise. The reference is SRK with fine steps."""
    y0, keys = _states(paths, 0.5, seed)
    sde = BlockSDE(Pointwise(lambda y: y + y - y**3), Schedule(omega, "constant"))
    return Problem(sde, y0, keys, lambda _: integrate(sde, y0, keys, "srk", 1 << 10))


def slope(steps: Sequence[int], errors: Sequence[float]) -> float:
    """The order that errors show: their slope against the step, both on a log scale, by least squares."""
    x, y = -np.log2(steps), np.log2(errors)
    return float(np.polyfit(x, y, 1)[0])


@torch.no_grad()
def strong_order(problem: Problem, exact: Tensor, solver: str, steps: Sequence[int]) -> float:
    """The measured strong order at time 1: of the root mean square over paths of the pathwise error."""
    return slope(steps, [float((problem.solve(solver, n) - exact).square().mean().sqrt()) for n in steps])


class Smooth(nn.Module):
    """A residual block without kinks, for finite differences; it halves the image where it widens."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        stride = 1 if channels == out else 2
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(channels, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(self.shortcut(x) + self.conv2(F.softplus(self.conv1(x))))


def smooth_chain(seed: int = 0) -> Chain:
    """Images ``(N, 2, 6, 6)`` -> three logits; drift, jump, drift; float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stem = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Softplus())
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        return Chain(stem, [Smooth(3, 3), Smooth(3, 4), Smooth(4, 4)], head).double()


def trained(net: nn.Module) -> nn.Module:
    """The network in eval mode, its BatchNorm as far from the identity as training would have brought it."""
    gen = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.2, generator=gen)
            nn.init.uniform_(module.running_var, 0.5, 1.5, generator=gen)
            nn.init.uniform_(module.weight, 0.5, 1.0, generator=gen)
            nn.init.normal_(module.bias, 0, 0.1, generator=gen)
    return net.eval()


def random_resnet(arch: str, **options) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return trained(load_resnet(arch, **options))


def random_images(n: int, size: int = 32, channels: int = 3, seed: int = 0, dtype=torch.float32) -> Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)

"""What solvers are measured with, small networks, and what several tests do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neuralsde_ito import kernels
from neuralsde_ito.data import load_data
from neuralsde_ito.models.recast import Chain
from neuralsde_ito.models.resnets import load_resnet
from neuralsde_ito.runs.config import Fit
from neuralsde_ito.runs.training import Trainer
from neuralsde_ito.studies.problems import (  # noqa: F401  (tests take them from here)
    Pointwise,
    Problem,
    double_well,
    geometric_brownian_motion,
    ornstein_uhlenbeck,
)


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


def digits_resnet(folder: Path, epochs: int) -> nn.Module:
    """A ResNet-8 trained on the digits for a few epochs; its training state goes into ``folder``."""
    torch.manual_seed(0)
    net = load_resnet("resnet8", in_channels=1)
    fit = Fit(epochs=epochs, lr=0.01, decay="one-cycle", batch_size=64)
    Trainer(folder / "state.pt").fit(net, load_data("digits", augment="none").train, fit, 0, "net")
    return net


def random_resnet(arch: str, **options) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return trained(load_resnet(arch, **options))


def random_images(n: int, size: int = 32, channels: int = 3, seed: int = 0, dtype=torch.float32) -> Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rectify(x: Tensor, skip: Tensor | None, remember: bool = True) -> Tensor | None:
    """``x = relu(x + skip)``, and which numbers went through."""
    relu = kernels.rectifier(x, skip, remember)
    kernels.rectify_(x, relu)
    return relu.passed

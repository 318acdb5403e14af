"""Neural SDE (Liu et al. 2019, https://arxiv.org/abs/1906.02355): residual blocks as drift, noise times the state.

Claimed: multiplicative noise, Euler-Maruyama steps; under PGD with 20 steps of one draw.
"""

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

CLAIMED = {"steps": 20, "eot": 1}


class SDEBlock(nn.Module):
    """``dx = (block(x) - x) dt + sigma x dB`` over one unit of time (eq. 6, multiplicative noise)."""

    def __init__(self, block: nn.Module, sigma: float, steps: int) -> None:
        super().__init__()
        self.block, self.sigma, self.steps = block, sigma, steps

    def forward(self, x: Tensor) -> Tensor:
        h = 1 / self.steps
        for _ in range(self.steps):
            x = x + h * (self.block(x) - x) + self.sigma * h**0.5 * x * torch.randn_like(x)
        return x


def defend(net: nn.Module, sigma: float = 0.3, steps: int = 2) -> nn.Module:
    """The network, in which every block that keeps the shape of its input is an SDE."""
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, BasicBlock) and child.downsample is None:
                module.register_module(name, SDEBlock(child, sigma, steps))
    return net

"""Randomised smoothing (Cohen et al. 2019, https://arxiv.org/abs/1902.02918) with few votes.

Claimed: a certified L2 radius that 100,000 draws prove. With 20 draws nothing is proven; the attack here is PGD of one
draw a gradient.
"""

import torch
from torch import Tensor, nn

CLAIMED = {"steps": 20, "eot": 1}


class Smoothed(nn.Module):
    """The network of the image plus normal noise of standard deviation ``sigma``."""

    def __init__(self, net: nn.Module, sigma: float) -> None:
        super().__init__()
        self.net, self.sigma = net, sigma

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + self.sigma * torch.randn_like(x))


def defend(net: nn.Module, sigma: float = 0.12) -> nn.Module:
    """The network under noise (paper: sigma 0.12 to 1)."""
    return Smoothed(net, sigma)

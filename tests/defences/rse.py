"""Random self-ensemble (Liu et al. 2018, https://arxiv.org/abs/1712.00673): noise before every convolution.

Claimed: trained with the noise, answered by the mean of several passes; under C&W and PGD with one draw a gradient.
"""

import torch
from torch import Tensor, nn

CLAIMED = {"steps": 40, "eot": 1}


class NoiseBefore(nn.Module):
    """A convolution of its input plus normal noise of standard deviation ``sigma``."""

    def __init__(self, conv: nn.Conv2d, sigma: float) -> None:
        super().__init__()
        self.conv, self.sigma = conv, sigma

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x + self.sigma * torch.randn_like(x))


def defend(net: nn.Module, first: float = 0.2, inner: float = 0.1) -> nn.Module:
    """The network with noise before its ``first`` convolution and before all ``inner`` ones (paper: 0.2 and 0.1)."""
    sigma = first
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d):
                module.register_module(name, NoiseBefore(child, sigma))
                sigma = inner
    return net

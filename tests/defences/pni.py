"""Parametric noise injection (He et al. 2019, https://arxiv.org/abs/1811.09310): noise of learned size on weights.

Claimed: with adversarial training; under PGD with 7 steps of one draw (eps 8/255, step 0.01).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLAIMED = {"steps": 7, "eot": 1}
ADVERSARIAL = True


class NoisyWeights(nn.Module):
    """A convolution with weights ``w + alpha std(w) normals``, drawn at every call; ``alpha`` is learned (eq. 4)."""

    def __init__(self, conv: nn.Conv2d, alpha: float) -> None:
        super().__init__()
        self.conv, self.alpha = conv, nn.Parameter(torch.tensor(alpha))

    def forward(self, x: Tensor) -> Tensor:
        conv, weight = self.conv, self.conv.weight
        noise = self.alpha * weight.detach().std() * torch.randn_like(weight)
        return F.conv2d(x, weight + noise, conv.bias, conv.stride, conv.padding)


def defend(net: nn.Module, alpha: float = 0.25) -> nn.Module:
    """The network with noise on the weights of all convolutions; ``alpha`` is where learning begins (paper: 0.25)."""
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d):
                module.register_module(name, NoisyWeights(child, alpha))
    return net

"""Stochastic activation pruning (Dhillon et al. 2018, https://arxiv.org/abs/1803.01442): nothing is trained for it.

Claimed: under iterated FGSM of one draw a gradient. Broken by Athalye et al. 2018 (https://arxiv.org/abs/1802.00420).
"""

import torch
from torch import Tensor, nn

CLAIMED = {"steps": 20, "eot": 1, "random_start": False}
TRAINED = False  # the defence is put into a trained network


class Pruned(nn.Module):
    """Activations survive by their share of the sum, and survivors are scaled so that the mean is the activation.

    The paper draws ``r`` times with replacement. Here each survives by itself, with the same probability (eq. 3).
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1).detach().abs()
        chance = flat / flat.sum(1, keepdim=True).clamp_min(1e-12)
        survival = (1 - (1 - chance) ** (self.share * flat.shape[1])).clamp_min(1e-8).view_as(x)
        return x * (torch.rand_like(x) < survival) / survival


class PrunedReLU(nn.Sequential):
    """ReLU, then pruning."""


def defend(net: nn.Module, share: float = 1.0) -> nn.Module:
    """The network with pruning after every ReLU; as many draws as ``share`` of the activations (paper: 100 %)."""
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ReLU):
                module.register_module(name, PrunedReLU(nn.ReLU(), Pruned(share)))
    return net

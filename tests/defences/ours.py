"""The Itô ensemble of this project: a residual network recast as an SDE, noise omega / (1 + t)."""

from torch import nn

import neuralsde_ito as ito

CLAIMED = {"steps": 20, "eot": 1, "random_start": False}


def defend(net: nn.Module, omega: float = 1.0) -> nn.Module:
    """The network with noise in every block."""
    return ito.recast(net, omega)

"""No defence."""

from torch import nn

CLAIMED = {"steps": 20}


def defend(net: nn.Module) -> nn.Module:
    """The network as it is."""
    return net

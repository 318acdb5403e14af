"""Random resizing and padding (Xie et al. 2018, https://arxiv.org/abs/1711.01991).

Claimed: under attacks on the network without the random layers.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLAIMED = {"steps": 20, "eot": 1}
UNDEFENDED = True  # the claimed attack takes its gradients from the network alone


class ResizePad(nn.Module):
    """An image is resized by chance to at most ``large`` times its side, and padded by chance to this side."""

    def __init__(self, large: float) -> None:
        super().__init__()
        self.large = large

    def forward(self, x: Tensor) -> Tensor:
        least = x.shape[-1]
        most = round(self.large * least)
        side = int(torch.randint(least, most + 1, ()))
        left, top = torch.randint(most - side + 1, (2,)).tolist()
        x = F.interpolate(x, (side, side), mode="nearest")
        return F.pad(x, (left, most - side - left, top, most - side - top))


def defend(net: nn.Module, large: float = 1.25) -> nn.Module:
    """The network behind random resizing and padding (paper: 299 to 331 pixels; here images are small)."""
    return nn.Sequential(ResizePad(large), net)

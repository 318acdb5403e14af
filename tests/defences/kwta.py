"""k winners take all (Xiao et al. 2020, https://arxiv.org/abs/1905.10510): no noise, activations that jump.

Claimed: under PGD with 40 steps. Broken by Tramer et al. 2020 (https://arxiv.org/abs/2002.08347, section 5).
"""

from torch import Tensor, nn

CLAIMED = {"steps": 40}


class Winners(nn.Module):
    """The largest ``share`` of all activations of an image pass, the others become 0."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        least = flat.topk(max(1, round(self.share * flat.shape[1])), 1).values[:, -1:]
        return (flat * (flat >= least)).view_as(x)


def defend(net: nn.Module, share: float = 0.1) -> nn.Module:
    """The network with winners instead of ReLUs (paper: sparsity 0.1 to 0.2)."""
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ReLU):
                module.register_module(name, Winners(share))
    return net

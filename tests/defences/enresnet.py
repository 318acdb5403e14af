"""EnResNet (Wang et al. 2019, https://arxiv.org/abs/1811.10745): an ensemble of ResNets with noise after every block.

Claimed: with adversarial training; under IFGSM with 20 steps of one draw.
"""

import copy

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

CLAIMED = {"steps": 20, "eot": 1, "random_start": False}
ADVERSARIAL = True


class NoiseAfter(nn.Module):
    """A block's output plus noise: ``a`` times the output's standard deviation (of each image) times normals."""

    def __init__(self, block: nn.Module, a: float) -> None:
        super().__init__()
        self.block, self.a = block, a

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        return x + self.a * x.detach().std((1, 2, 3), keepdim=True) * torch.randn_like(x)


class Ensemble(nn.Module):
    """The mean logits of all networks."""

    def __init__(self, nets: list[nn.Module]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([net(x) for net in self.nets]).mean(0)


def defend(net: nn.Module, a: float = 0.1, count: int = 2) -> nn.Module:
    """``count`` copies of the network with noise after every block (paper: a = 0.1)."""
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, BasicBlock):
                module.register_module(name, NoiseAfter(child, a))
    return Ensemble([copy.deepcopy(net) for _ in range(count)])

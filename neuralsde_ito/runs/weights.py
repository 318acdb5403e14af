"""A network's weights and the files that hold them.

A file holds a plain ResNet's weights under torchvision's names. Any tool can read it, and ``--weights`` takes it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from ..files import write_atomically
from ..models.recast import ItoResNet, as_chain
from ..models.resnets import load_weights, read_weights
from ..validation import ItoError, shown
from .build import untrained_resnet
from .config import Config


def save_weights(path: Path, net: nn.Module) -> None:
    """Write a network's tensors as safetensors."""
    state = {key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()}
    write_atomically(path, safetensors_bytes(state))


def read_resnet(path: Path, config: Config) -> nn.Sequential:
    """The configuration's ResNet on the CPU, with the weights of a file.

    Raises:
        ItoError: the file cannot be read, or holds the weights of another network.
    """
    state: dict[str, Tensor] = read_weights(path, config.network.arch)
    if "fc.bias" not in state or "conv1.weight" not in state:
        raise ItoError(f"The weights {shown(str(path))} are not those of a run: they lack fc.bias or conv1.weight.")
    net = untrained_resnet(config, len(state["fc.bias"]), state["conv1.weight"].shape[1])
    load_weights(net[-1], path, config.network.arch)
    return net


def to_resnet(model: ItoResNet, template: nn.Sequential) -> nn.Sequential:
    """``template`` (made by `load_resnet`), which now holds the weights of the recast network.

    Raises:
        ItoError: the two are not of one architecture.
    """
    source, target = model.base.state_dict(), as_chain(template).state_dict()
    if [(k, v.shape) for k, v in source.items()] != [(k, v.shape) for k, v in target.items()]:
        raise ItoError("The recast network and the ResNet are not of one architecture.")
    with torch.no_grad():
        for key, value in target.items():
            value.copy_(source[key])
    return template

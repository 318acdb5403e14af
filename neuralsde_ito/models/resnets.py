"""Residual networks on images in [0, 1], and their published weights.

CIFAR ResNets of He et al. 2016 (https://arxiv.org/abs/1512.03385, section 4.2; option-A shortcuts), ResNets
with a CIFAR stem, and torchvision's, all built from torchvision's blocks under torchvision's parameter names.
"""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.error import URLError

import torch
import torchvision
from safetensors.torch import load as tensors_from_bytes
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck

from ..validation import ItoError, one_of, shown

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, also of the published CIFAR ResNets


class Normalize(nn.Module):
    """``(x - mean) / std`` a channel, as the first layer, so that an attack's eps is in pixel units."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or any(s <= 0 for s in std):
            raise ItoError(f"mean and std need one number a channel, std positive; got {mean}, {std}.")
        # Settings, not weights: published files do not contain them.
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W) -> (N, C, H, W)``."""
        return (x - self.mean) / self.std


class PadShortcut(nn.Module):
    """He et al.'s option A: every second pixel; the new channels are zero, half of them on each side."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W) -> (N, channels, H / 2, W / 2)``."""
        extra = self.channels - x.shape[1]
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, extra // 2, extra - extra // 2))


class CifarResNet(nn.Module):
    """A ResNet for small images: 3x3 stem without pooling; torchvision's names for its parts.

    Args:
        block: torchvision's ``BasicBlock`` or ``Bottleneck``.
        layers: blocks a stage.
        widths: channels a stage (before a bottleneck's expansion).
        num_classes, in_channels: of logits and images.
        option_a: shortcuts without parameters (`PadShortcut`) instead of 1x1 projections.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        widths: Sequence[int],
        num_classes: int,
        in_channels: int,
        option_a: bool,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        channels = widths[0]
        self.stages = [f"layer{i + 1}" for i in range(len(layers))]
        for i, (name, depth, width) in enumerate(zip(self.stages, layers, widths, strict=True)):
            stage = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                out = width * block.expansion
                shortcut: nn.Module | None = None
                if stride != 1 or channels != out:
                    project = nn.Conv2d(channels, out, 1, stride, bias=False)
                    shortcut = PadShortcut(out) if option_a else nn.Sequential(project, nn.BatchNorm2d(out))
                stage.append(block(channels, width, stride, shortcut))
                channels = out
            self.add_module(name, nn.Sequential(*stage))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W) -> (N, classes)``."""
        x = self.relu(self.bn1(self.conv1(x)))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


_CIFAR_DEPTHS = (8, 14, 20, 32, 44, 56, 110)  # 6 n + 2; 8 and 14 for images smaller than CIFAR's
_DEEP = {
    "18": (BasicBlock, (2, 2, 2, 2)),
    "34": (BasicBlock, (3, 4, 6, 3)),
    "50": (Bottleneck, (3, 4, 6, 3)),
}
_TORCHVISION = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
ARCHITECTURES: tuple[str, ...] = (
    *(f"resnet{depth}" for depth in _CIFAR_DEPTHS),
    *(f"cifar-resnet{depth}" for depth in _DEEP),
    *_TORCHVISION,
)


def load_resnet(
    arch: str,
    weights: str | Path | None = None,
    num_classes: int = 10,
    in_channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Sequential:
    """A ResNet on images in [0, 1], normalisation first.

    Args:
        arch: a name in `ARCHITECTURES`: ``resnet20`` .. ``resnet110`` are He et al.'s for CIFAR,
            ``cifar-resnet18/34/50`` have torchvision's widths and a 3x3 stem, ``resnet18`` .. ``resnet152``
            are torchvision's for ImageNet.
        weights: a file (``.pth``, ``.th``, ``.pt``, ``.safetensors``) with torchvision's, ``pytorch-cifar``'s or
            option-A key layouts, or the name of torchvision weights such as ``IMAGENET1K_V2``; none: at random.
            Files are read as tensors only; code inside them is never run.
        num_classes, in_channels: of logits and images.
        mean, std: normalisation, one number a channel; default ImageNet's (0.5 for other than 3 channels).

    Returns:
        ``nn.Sequential(normalize, resnet)`` in eval mode, ``(N, C, H, W) -> (N, num_classes)``.

    Raises:
        ItoError: unknown architecture, or weights that cannot be read or do not fit: the first keys
            and shapes are named.
    """
    one_of("architecture", arch, ARCHITECTURES)
    if num_classes < 2 or in_channels < 1:
        raise ItoError(f"A network needs 2 classes and 1 channel at least, got {num_classes} and {in_channels}.")
    resnet: nn.Module
    if arch in _TORCHVISION:
        resnet = torchvision.models.get_model(arch, weights=None, num_classes=num_classes)
        if in_channels != 3:
            resnet.conv1 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
    elif arch.startswith("cifar-"):
        block, layers = _DEEP[arch.removeprefix("cifar-resnet")]
        resnet = CifarResNet(block, layers, (64, 128, 256, 512), num_classes, in_channels, option_a=False)
    else:
        depth = (int(arch.removeprefix("resnet")) - 2) // 6
        resnet = CifarResNet(BasicBlock, (depth,) * 3, (16, 32, 64), num_classes, in_channels, option_a=True)
    if weights is not None:
        load_weights(resnet, weights, arch)
    default = default_normalization(in_channels)
    normalize = Normalize(mean or default[0], std or default[1])
    if len(normalize.mean) != in_channels:
        raise ItoError(f"mean and std need one number a channel ({in_channels}), got {len(normalize.mean)}.")
    return nn.Sequential(OrderedDict(normalize=normalize, resnet=resnet)).eval()


def default_normalization(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel: ImageNet's for colour images, otherwise 0.5."""
    return (MEAN, STD) if channels == 3 else ((0.5,) * channels, (0.5,) * channels)


def load_weights(resnet: nn.Module, weights: str | Path, arch: str) -> None:
    """Load published weights into a network with torchvision's parameter names; see `load_resnet`.

    Raises:
        ItoError: with the first keys and shapes that do not fit.
    """
    state = canonical_keys(read_weights(weights, arch))
    own = resnet.state_dict()
    optional = "num_batches_tracked"
    wrong = [
        f"{key}: {tuple(state[key].shape)} in the file, {tuple(value.shape)} in the network"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    wrong += [f"{key}: not in the file" for key in own if key not in state and not key.endswith(optional)]
    wrong += [f"{key}: not in the network" for key in state if key not in own]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ItoError(f"The weights {str(weights)!r} do not fit {arch!r}: {'; '.join(wrong[:3])}{more}.")
    resnet.load_state_dict(state, strict=False)


def read_weights(weights: str | Path, arch: str) -> dict[str, Tensor]:
    """The tensors of a file, or of torchvision weights by name, under their published keys."""
    path = Path(weights)
    if not os.path.exists(path) and path.suffix not in (".pth", ".th", ".pt", ".safetensors", ".tar"):
        return _torchvision_weights(str(weights), arch)
    if not os.path.isfile(path):
        raise ItoError(f"There is no weights file {shown(str(path))}.")
    try:
        if path.suffix == ".safetensors":
            return tensors_from_bytes(path.read_bytes())  # safetensors' file reader needs a path in UTF-8
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "truncated" in str(error):
            raise ItoError(f"The weights file {str(path)!r} is truncated.") from error
        raise ItoError(
            f"The weights file {str(path)!r} holds more than tensors; code in it is not run. "
            "Save it again as torch.save(net.state_dict(), path)."
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ItoError(f"The weights file {str(path)!r} is truncated or no weights file ({reason}).") from error
    for name in ("state_dict", "model", "net", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not any(isinstance(v, Tensor) for v in content.values()):
        raise ItoError(f"The weights file {str(path)!r} holds no tensors by name.")
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}


def _torchvision_weights(name: str, arch: str) -> dict[str, Tensor]:
    if arch not in _TORCHVISION:
        raise ItoError(f"There is no weights file {shown(name)}, and torchvision has no weights for {arch!r}.")
    known = torchvision.models.get_model_weights(arch)
    one_of("weights", name, known.__members__)
    try:
        return dict(known[name].get_state_dict(progress=True, check_hash=True))
    except (URLError, OSError) as error:
        raise ItoError(
            f"The weights {name} could not be downloaded ({error}); fetch {known[name].url} elsewhere "
            "and give the file's path."
        ) from error


def canonical_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys in torchvision's layout: without ``module.``, ``shortcut`` -> ``downsample``, ``linear`` -> ``fc``."""
    out = {}
    for key, value in state.items():
        key = key.removeprefix("module.").removeprefix("resnet.")
        key = key.replace(".shortcut.", ".downsample.")
        out["fc." + key.removeprefix("linear.") if key.startswith("linear.") else key] = value
    return out

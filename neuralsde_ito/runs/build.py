"""From a configuration to the device, the data and the networks that it names."""

from __future__ import annotations

import torch
from torch import nn

from ..data import IMAGE_SIZES, Dataset, load_data
from ..distributed import launched, local_rank
from ..models.recast import ItoResNet, recast
from ..models.resnets import load_resnet
from ..validation import ItoError, shown
from .config import Config


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name: ``auto`` (CUDA, else MPS, else CPU), ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    If this is one of several processes (`neuralsde_ito.distributed`), ``auto`` and ``cuda`` deal the GPUs out to them.

    Raises:
        ItoError: this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and launched() > 1 and torch.cuda.is_available():
        name = f"cuda:{local_rank() % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ItoError(f"Unknown device {shown(name)}. Known: auto, cpu, cuda, cuda:N, mps.") from None
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= count.get(device.type, 0):
        here = [kind if n == 1 else f"{kind}:0..{n - 1}" for kind, n in count.items() if n]
        raise ItoError(f"There is no device {shown(name)} here. There is: {', '.join(here)}.")
    return device


def load_dataset(config: Config, train_limit: int | None = None, test_limit: int | None = None) -> Dataset:
    """The data of a configuration. A limit given here replaces the configuration's."""
    data = config.data
    return load_data(
        data.name,
        data.path,
        data.size,
        data.augment,
        train_limit or data.train_limit,
        test_limit or data.test_limit,
    )


def with_image_size(config: Config, data: Dataset) -> Config:
    """The configuration, with the size of a folder's images where it names none.

    The first image of the folder gives the size. A run keeps it, even if the folder changes afterwards.
    """
    if config.data.name != "imagefolder":
        return config
    sized = config.data.model_copy(update={"size": data.image_shape[1]})
    return config.model_copy(update={"data": sized})


def build_resnet(config: Config, data: Dataset) -> nn.Sequential:
    """The ResNet from which a run starts: with the weights of ``network.weights``, or random ones from the seed."""
    network = config.network
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # the same random weights on all devices
        torch.manual_seed(config.seed)
        return load_resnet(
            network.arch, network.weights, len(data.classes), data.image_shape[0], network.mean, network.std
        )


def untrained_resnet(config: Config, classes: int, channels: int) -> nn.Sequential:
    """The ResNet of a configuration on the CPU, with weights that the caller replaces.

    The global random state does not change.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        return load_resnet(config.network.arch, None, classes, channels, config.network.mean, config.network.std)


def trained_as(config: Config, net: nn.Module) -> nn.Module:
    """The network in the form in which it is trained before its members are.

    That is the network itself. Under attack, and where the image will have noise, it is recast without inner noise: the
    adversary and the noise of the image are those of the members, and the weights are the network's.
    """
    sde = config.sde
    if config.resnet.adversary.method == "none" and not sde.input_sigma:
        return net
    plain = {"omega": 0.0, "solver": "euler", "steps": 1}
    return recast_as(config.model_copy(update={"sde": sde.model_copy(update=plain)}), net)


def recast_as(config: Config, net: nn.Module) -> ItoResNet:
    """`recast` with the settings of ``config.sde``, and with the image shape of ``config.data`` if that is known."""
    size = config.data.size or IMAGE_SIZES.get(config.data.name)
    conv = next((m for m in net.modules() if isinstance(m, nn.Conv2d)), None)
    shape = (conv.in_channels, size, size) if size and conv else None
    return recast(net, **config.sde.model_dump(), image_shape=shape)

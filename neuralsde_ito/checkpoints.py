"""Files of a run, each written as a whole or not at all.

A member's file holds a plain ResNet's weights under torchvision's names: any tool can read it, and
``--weights`` takes it.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
import yaml
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from .config import Config, parse_config
from .ensemble import ItoEnsemble
from .recast import ItoResNet, as_chain, recast
from .resnets import load_resnet, read_weights
from .validation import ItoError


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a kill at any moment leaves the old content or the new, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def save_weights(path: Path, net: nn.Module) -> None:
    """A network's tensors as safetensors."""
    state = {key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()}
    write_atomically(path, safetensors_bytes(state))


def to_resnet(model: ItoResNet, template: nn.Sequential) -> nn.Sequential:
    """``template`` (made by `load_resnet`) with the weights of a recast network's noise-free base.

    Raises:
        ItoError: they are not of one architecture.
    """
    source, target = model.base.state_dict(), as_chain(template).state_dict()
    if [(k, v.shape) for k, v in source.items()] != [(k, v.shape) for k, v in target.items()]:
        raise ItoError("The recast network and the ResNet are not of one architecture.")
    with torch.no_grad():
        for key, value in target.items():
            value.copy_(source[key])
    return template


def member_path(folder: Path, member: int) -> Path:
    """Where a member's weights are: ``members/00.safetensors``."""
    return folder / "members" / f"{member:02d}.safetensors"


def save_ensemble(
    path: str | Path, ensemble: ItoEnsemble, config: Config, classes: int = 10, channels: int = 3
) -> None:
    """Write an ensemble's folder: ``config.yaml`` and ``members/NN.safetensors``.

    Args:
        path: the folder.
        ensemble, config: ``config.network``, ``config.sde`` and ``config.ensemble`` must describe the ensemble.
        classes, channels: of the network's logits and images.

    Raises:
        ItoError: the configuration is not that of the ensemble.
    """
    folder = Path(path)
    if len(ensemble.members) != config.ensemble.members:
        raise ItoError(
            f"config.ensemble.members is {config.ensemble.members}, the ensemble has {len(ensemble.members)}."
        )
    for m, member in enumerate(ensemble.members):
        template = load_resnet(config.network.arch, None, classes, channels)
        save_weights(member_path(folder, m), to_resnet(member, template)[-1])  # type: ignore[arg-type]
    write_atomically(folder / "config.yaml", config.to_yaml().encode())


def load_ensemble(path: str | Path, device: torch.device | str = "cpu") -> tuple[ItoEnsemble, Config]:
    """Read a run's folder back, in eval mode.

    Raises:
        ItoError: no such folder, or a run that has not finished.
    """
    folder = Path(path)
    config = read_config(folder)
    missing = [m for m in range(config.ensemble.members) if not member_path(folder, m).is_file()]
    if missing:
        raise ItoError(
            f"The run {str(folder)!r} has not finished: {len(missing)} of {config.ensemble.members} members "
            f"are missing; go on with 'ito-sde train --run {folder} --resume'."
        )
    members = [load_member(member_path(folder, m), config).to(device) for m in range(config.ensemble.members)]
    return ItoEnsemble(members, config.ensemble.inferences, config.ensemble.rule).eval(), config


def load_base(path: str | Path, config: Config, device: torch.device | str = "cpu") -> nn.Sequential:
    """The ResNet that a run began with."""
    return _network(Path(path) / "resnet.safetensors", config).to(device)


def load_member(path: Path, config: Config) -> ItoResNet:
    """One member, recast as the configuration says."""
    return recast_as(config, _network(path, config)).eval()


def recast_as(config: Config, net: nn.Module) -> ItoResNet:
    """`recast` with the settings of ``config.sde``."""
    return recast(net, **config.sde.model_dump())


def read_config(folder: Path) -> Config:
    """The resolved configuration of a run.

    Raises:
        ItoError: no run is there.
    """
    if not (folder / "config.yaml").is_file():
        raise ItoError(f"There is no run in {str(folder)!r}: it has no config.yaml.")
    return parse_config(yaml.safe_load((folder / "config.yaml").read_text()))


def _network(path: Path, config: Config) -> nn.Sequential:
    state: dict[str, Tensor] = read_weights(path, config.network.arch)
    classes, channels = len(state["fc.bias"]), state["conv1.weight"].shape[1]
    network = config.network
    return load_resnet(network.arch, path, classes, channels, network.mean, network.std)

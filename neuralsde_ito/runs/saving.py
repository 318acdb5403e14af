"""Files of a run, each written as a whole or not at all.

A member's file holds a plain ResNet's weights under torchvision's names: any tool can read it, and
``--weights`` takes it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from ..data import IMAGE_SIZES
from ..files import write_atomically
from ..models.ensemble import ItoEnsemble
from ..models.recast import ItoResNet, as_chain, recast
from ..models.resnets import Normalize, default_normalization, load_resnet, load_weights, read_weights
from ..modules import changes_of, evaluating
from ..noise.keys import make_keys
from ..sde.block import BlockSDE
from ..validation import ItoError, shown
from .config import Config, load_config, parse_config

RESNET = "resnet.safetensors"  # of a run: the ResNet that its members began as


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


def save_ensemble(path: str | Path, ensemble: ItoEnsemble, config: Config, resnet: nn.Module | None = None) -> None:
    """Write an ensemble as a finished run: ``config.yaml``, ``resnet.safetensors`` and ``members/NN.safetensors``.

    `load_ensemble` reads it back in eval mode. Its logits for the same keys are then equal bit for bit (on the same
    device, in the same memory format). Every verb of the command line opens it.

    Args:
        path: the folder. A run that is there is written over.
        ensemble: its members must be recast from networks of `load_resnet`, in float32, and share all settings.
        config: gives name, seed, data, architecture, training and attack. How blocks are solved (``sde``), the
            normalisation, inferences, rule and paths a call are stored as the ensemble has them, whatever stands here.
        resnet: the network of `load_resnet` from which the members were recast. Every verb reports it beside the
            ensemble. Without it, the first member's noise-free network stands there.

    Raises:
        ItoError: another number of members than ``config.ensemble.members``, or something that the files cannot
            tell: members of different settings, another architecture, another stem or head, a subclass, a hook.
    """
    folder = Path(path)
    if len(ensemble.members) != config.ensemble.members:
        raise ItoError(
            f"config.ensemble.members is {config.ensemble.members}, the ensemble has {len(ensemble.members)}."
        )
    if type(ensemble) is not ItoEnsemble:
        raise ItoError(f"The ensemble is a {type(ensemble).__name__}; only an ItoEnsemble itself can be stored.")
    _refuse_changed_calls(ensemble)
    members: list[ItoResNet] = list(ensemble.members)  # type: ignore[arg-type]
    config = _as_it_is(ensemble, members, config)
    linear = [m for m in members[0].get_submodule("head").modules() if isinstance(m, nn.Linear)]
    template = _untrained(config, linear[-1].out_features if linear else 10, ensemble.channels or 3)
    models = {f"Member {m}": member for m, member in enumerate(members)}
    if resnet is not None:
        _refuse_changed_calls(resnet)
        models["The ResNet"] = recast_as(config, resnet)
    for name, model in models.items():
        _check_storable(name, model, config, template)
    (folder / "config.yaml").unlink(missing_ok=True)  # it comes last: a run that is cut off here is no run
    for m, member in enumerate(members):
        save_weights(member_path(folder, m), to_resnet(member, template)[-1])
    save_weights(folder / RESNET, to_resnet(models.get("The ResNet", members[0]), template)[-1])
    write_atomically(folder / "config.yaml", config.to_yaml().encode())


def _refuse_changed_calls(net: nn.Module) -> None:
    """Refuse hooks, and functions that were put over a module's own, as ``forward``: no file of weights holds them."""
    for name, module in net.named_modules():
        if found := changes_of(module):
            where = f"{name}, a {type(module).__name__}," if name else f"The {type(module).__name__}"
            raise ItoError(
                f"{where} has a {found[0]} of its own, which cannot be stored; remove it, and add it after loading."
            )


def _as_it_is(ensemble: ItoEnsemble, members: list[ItoResNet], config: Config) -> Config:
    """The configuration with the settings that the ensemble really has."""
    first, *others = (_settings(member, config) for member in members)
    for m, settings in enumerate(others, 1):
        for key, value in first.items():
            if settings[key] != value:
                raise ItoError(
                    f"Members 0 and {m} differ in {key} ({value} and {settings[key]}); a run has one setting for all "
                    "members: save them as two ensembles."
                )
    tree = config.model_dump(mode="json")
    tree["network"] |= {"mean": first.pop("mean"), "std": first.pop("std")}
    tree["sde"] = first
    tree["ensemble"] |= {name: getattr(ensemble, name) for name in ("inferences", "rule", "paths_per_call")}
    return parse_config(tree)


def _settings(model: ItoResNet, config: Config) -> dict[str, Any]:
    """A member's settings under the names of ``config.sde`` and ``config.network``.

    ``horizon``, ``mean`` and ``std`` stay as they were typed in the configuration, where that comes to the same.
    """
    settings: dict[str, Any] = {"omega": model.schedule.omega, "schedule": model.schedule.name}
    settings |= {name: getattr(model, name) for name in ("solver", "steps", "checkpoint")}
    settings["horizon"] = _horizon(model, config.sde.horizon)
    return settings | _normalization(model, config)


def _normalization(model: ItoResNet, config: Config) -> dict[str, tuple[float, ...] | None]:
    """``mean`` and ``std`` of a network; as the configuration has them, where that comes to the same numbers."""
    typed = {"mean": config.network.mean, "std": config.network.std}
    norm = next((m for m in model.get_submodule("stem").modules() if isinstance(m, Normalize)), None)
    if norm is None:
        return typed
    for name, default in zip(typed, default_normalization(len(norm.mean)), strict=True):
        held = tuple(getattr(norm, name).flatten().tolist())
        if tuple(torch.tensor(typed[name] or default, device="cpu").tolist()) != held:
            typed[name] = held
    return typed


def _horizon(model: ItoResNet, typed: float | None) -> float | None:
    """The horizon that gives a network its times: the typed one, None for the default, or the shortest number."""
    sdes: list[BlockSDE] = list(model.sdes)  # type: ignore[arg-type]
    # Times are rounded to multiples of 2**-20: every one of them leaves an interval for the horizon.
    n, unit = len(sdes), 2.0**-20
    low = max((sde.t1 - unit / 2) * n / i for i, sde in enumerate(sdes, 1))
    high = min((sde.t1 + unit / 2) * n / i for i, sde in enumerate(sdes, 1))
    if low > high or low <= (n if typed is None else typed) <= high:
        return typed  # also where no horizon gives these times: the comparison of the blocks finds that
    if low <= n <= high:
        return None
    middle = (low + high) / 2
    return next((h for digits in range(17) if low < (h := round(middle, digits)) < high), middle)


def _check_storable(name: str, model: ItoResNet, config: Config, template: nn.Sequential) -> None:
    """Refuse a network that would come back as another one; ``template`` gets its weights."""
    if odd := sorted({str(v.dtype) for v in model.state_dict().values() if v.is_floating_point()} - {"torch.float32"}):
        raise ItoError(
            f"{name} has weights in {odd[0].removeprefix('torch.')}; a run holds float32: call .float() first."
        )
    device = next(model.parameters()).device
    again = recast_as(config, template).to(device)
    found, wanted = _described(model), _described(again)
    for place in {**wanted, **found}:
        if found.get(place) != wanted.get(place):
            saw, know = (_worded(parts.get(place)) for parts in (found, wanted))
            raise ItoError(
                f"{name} cannot be stored: {place or 'it'} is {saw}, but {know} in a recast "
                f"load_resnet({config.network.arch!r}); name its architecture in config.network.arch, if there is one."
            )
    if _normalization(model, config) != {"mean": config.network.mean, "std": config.network.std}:
        raise ItoError(f"{name} normalises by another mean or std than the members; make it with theirs.")
    if odd := sorted(model.state_dict().keys() ^ again.state_dict().keys()):
        raise ItoError(f"{name} holds other tensors than a recast {config.network.arch!r}: {shown(', '.join(odd))}.")
    to_resnet(model, template)
    again.load_state_dict(model.state_dict())
    # What no description shows, as a function that was replaced, shows in the logits.
    channels = next(template.parameters()).shape[1]  # of the first convolution
    x = torch.rand(2, channels, 32, 32, generator=torch.Generator().manual_seed(0), device="cpu").to(device)
    keys = make_keys(0, "report", index=torch.arange(2, device=device))
    with torch.no_grad(), evaluating(model):
        if not torch.allclose(model(x, keys), again.eval()(x, keys), 1e-4, 1e-4, equal_nan=True):
            raise ItoError(f"{name} computes something else than its modules, weights and settings tell.")


def _described(model: ItoResNet) -> dict[str, tuple[object, ...]]:
    """By the name of each module: its class, and what it says of itself; of a block its times and its noise."""
    return {
        name: (type(m), m.index, m.t0, m.t1, m.jump, m.schedule)
        if isinstance(m, BlockSDE)
        else (type(m), m.extra_repr())
        for name, m in model.named_modules()
    }


def _worded(description: tuple[Any, ...] | None) -> str:
    if description is None:
        return "nothing"
    kind, *details = description
    text = f"{kind.__name__}({', '.join(map(str, details))})"
    return text if len(text) <= 90 else text[:86] + "...)"


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
    voting = config.ensemble
    return ItoEnsemble(members, voting.inferences, voting.rule, voting.paths_per_call).eval(), config


def load_base(path: str | Path, config: Config, device: torch.device | str = "cpu") -> nn.Sequential:
    """The ResNet that a run began with.

    Raises:
        ItoError: the run has none.
    """
    file = Path(path) / RESNET
    if not file.is_file():
        raise ItoError(
            f"The run {str(path)!r} has no {RESNET}, the ResNet to compare with; finish its training, or store it "
            "again: save_ensemble(path, ensemble, config, resnet)."
        )
    return _network(file, config).to(device)


def load_member(path: Path, config: Config) -> ItoResNet:
    """One member, recast as the configuration says."""
    return recast_as(config, _network(path, config)).eval()


def recast_as(config: Config, net: nn.Module) -> ItoResNet:
    """`recast` with the settings of ``config.sde``, and the image shape of ``config.data`` where that is known."""
    size = config.data.size or IMAGE_SIZES.get(config.data.name)
    conv = next((m for m in net.modules() if isinstance(m, nn.Conv2d)), None)
    shape = (conv.in_channels, size, size) if size and conv else None
    return recast(net, **config.sde.model_dump(), image_shape=shape)


def read_config(folder: Path) -> Config:
    """The resolved configuration of a run.

    Raises:
        ItoError: no run is there, or its file is damaged.
    """
    if not os.path.isfile(folder / "config.yaml"):
        raise ItoError(f"There is no run in {shown(str(folder))}: it has no config.yaml.")
    return load_config(folder / "config.yaml")


def _network(path: Path, config: Config) -> nn.Sequential:
    state: dict[str, Tensor] = read_weights(path, config.network.arch)
    if "fc.bias" not in state or "conv1.weight" not in state:
        raise ItoError(f"The weights {shown(str(path))} are not those of a run: they lack fc.bias or conv1.weight.")
    net = _untrained(config, len(state["fc.bias"]), state["conv1.weight"].shape[1])
    load_weights(net[-1], path, config.network.arch)
    return net


def _untrained(config: Config, classes: int, channels: int) -> nn.Sequential:
    """The configuration's network, with weights that do not matter: the global random state stays as it is."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        return load_resnet(config.network.arch, None, classes, channels, config.network.mean, config.network.std)

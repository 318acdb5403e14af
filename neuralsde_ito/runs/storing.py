"""Storing an ensemble as a run, and refusing what the files of a run cannot hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models.ensemble import ItoEnsemble
from ..models.recast import ItoResNet
from ..models.resnets import Normalize, default_normalization
from ..modules import changes_of, evaluating
from ..noise.keys import make_keys
from ..sde.block import BlockSDE
from ..validation import ItoError, shown
from .build import recast_as, untrained_resnet
from .config import Config, parse_config
from .run import Run
from .weights import save_weights, to_resnet


def save_ensemble(path: str | Path, ensemble: ItoEnsemble, config: Config, resnet: nn.Module | None = None) -> None:
    """Write an ensemble as a finished run: ``config.yaml``, ``resnet.safetensors`` and ``members/NN.safetensors``.

    `load_ensemble` reads it back in eval mode. Its logits for the same keys are then equal bit for bit (on the same
    device, in the same memory format). Every verb of the command line opens it.

    Args:
        path: the folder. A run in it is replaced.
        ensemble: its members must be recast from networks of `load_resnet`, in float32, and share all settings.
        config: gives name, seed, data, architecture, training and attack. The settings of ``sde``, the normalisation,
            inferences, rule and paths a call are stored as the ensemble has them; those of ``config`` do not count.
        resnet: the network of `load_resnet` from which the members were recast. Every verb reports it beside the
            ensemble. Without it, the first member's noise-free network is stored as the ResNet.

    Raises:
        ItoError: the ensemble has another number of members than ``config.ensemble.members``, or something that the
            files cannot hold: members of different settings, another architecture, stem or head, a subclass, a hook.
    """
    if len(ensemble.members) != config.ensemble.members:
        raise ItoError(
            f"config.ensemble.members is {config.ensemble.members}, the ensemble has {len(ensemble.members)}."
        )
    if type(ensemble) is not ItoEnsemble:
        raise ItoError(f"The ensemble is a {type(ensemble).__name__}; only an ItoEnsemble itself can be stored.")
    _refuse_changed_modules(ensemble)
    members = list(ensemble.members)
    config = _with_settings_of(ensemble, members, config)
    linear = [m for m in members[0].get_submodule("head").modules() if isinstance(m, nn.Linear)]
    template = untrained_resnet(config, linear[-1].out_features if linear else 10, ensemble.channels or 3)
    models = {f"Member {m}": member for m, member in enumerate(members)}
    if resnet is not None:
        _refuse_changed_modules(resnet)
        models["The ResNet"] = recast_as(config, resnet)
    for name, model in models.items():
        _check_storable(name, model, config, template)
    run = Run(Path(path), config)
    run.config_file.unlink(missing_ok=True)  # written last: a folder that is half written is no run
    run.images_file.unlink(missing_ok=True)  # perhaps of other data
    for file, member in zip(run.member_files, members, strict=True):
        save_weights(file, to_resnet(member, template)[-1])
    save_weights(run.resnet_file, to_resnet(models.get("The ResNet", members[0]), template)[-1])
    run.write_config()


def _refuse_changed_modules(net: nn.Module) -> None:
    """Refuse hooks, and methods that were replaced on an object, such as ``forward``: no file of weights holds them."""
    for name, module in net.named_modules():
        if changes := changes_of(module):
            owner = f"{name}, a {type(module).__name__}," if name else f"The {type(module).__name__}"
            raise ItoError(
                f"{owner} has a {changes[0]} of its own, which cannot be stored; remove it, and add it after loading."
            )


def _with_settings_of(ensemble: ItoEnsemble, members: list[ItoResNet], config: Config) -> Config:
    """The configuration, with the settings that the ensemble really has."""
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

    ``horizon``, ``mean`` and ``std`` stay as the configuration has them if that gives the same numbers.
    """
    settings: dict[str, Any] = {"omega": model.schedule.omega, "schedule": model.schedule.name}
    settings |= {name: getattr(model, name) for name in ("solver", "steps", "checkpoint", "input_sigma")}
    settings["horizon"] = _horizon(model, config.sde.horizon)
    return settings | _normalization(model, config)


def _normalization(model: ItoResNet, config: Config) -> dict[str, tuple[float, ...] | None]:
    """``mean`` and ``std`` of a network; as the configuration has them if that gives the same numbers."""
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
    """A horizon that gives a network its times.

    It is ``typed`` (that of the configuration) if this gives the times, else None if the default does, else the
    number with the fewest digits.
    """
    sdes = list(model.sdes)
    # Times are rounded to multiples of 2**-20, so each of them bounds the horizon from below and above.
    n, unit = len(sdes), 2.0**-20
    low = max((sde.t1 - unit / 2) * n / i for i, sde in enumerate(sdes, 1))
    high = min((sde.t1 + unit / 2) * n / i for i, sde in enumerate(sdes, 1))
    if low > high or low <= (n if typed is None else typed) <= high:
        return typed  # also if no horizon gives these times: `_check_storable` compares the blocks and refuses
    if low <= n <= high:
        return None
    middle = (low + high) / 2
    return next((h for digits in range(17) if low < (h := round(middle, digits)) < high), middle)


def _check_storable(name: str, model: ItoResNet, config: Config, template: nn.Sequential) -> None:
    """Refuse a network that would be another one after loading. ``template`` is overwritten with its weights."""
    if odd := sorted({str(v.dtype) for v in model.state_dict().values() if v.is_floating_point()} - {"torch.float32"}):
        raise ItoError(
            f"{name} has weights in {odd[0].removeprefix('torch.')}; a run holds float32: call .float() first."
        )
    device = next(model.parameters()).device
    again = recast_as(config, template).to(device)
    given, stored = _described(model), _described(again)
    for module in {**stored, **given}:
        if given.get(module) != stored.get(module):
            is_now, would_be = (_worded(parts.get(module)) for parts in (given, stored))
            raise ItoError(
                f"{name} cannot be stored: {module or 'it'} is {is_now}, but {would_be} in a recast "
                f"load_resnet({config.network.arch!r}); name its architecture in config.network.arch, if there is one."
            )
    if _normalization(model, config) != {"mean": config.network.mean, "std": config.network.std}:
        raise ItoError(f"{name} normalises by another mean or std than the members; make it with theirs.")
    if odd := sorted(model.state_dict().keys() ^ again.state_dict().keys()):
        raise ItoError(f"{name} holds other tensors than a recast {config.network.arch!r}: {shown(', '.join(odd))}.")
    to_resnet(model, template)
    again.load_state_dict(model.state_dict())
    # A change that no description shows, such as a replaced function, shows in the logits.
    channels = next(template.parameters()).shape[1]  # of the first convolution
    x = torch.rand(2, channels, 32, 32, generator=torch.Generator().manual_seed(0), device="cpu").to(device)
    keys = make_keys(0, "report", index=torch.arange(2, device=device))
    with torch.no_grad(), evaluating(model):
        if not torch.allclose(model(x, keys), again.eval()(x, keys), 1e-4, 1e-4, equal_nan=True):
            raise ItoError(f"{name} does not compute what its modules, weights and settings describe.")


def _described(model: ItoResNet) -> dict[str, tuple[object, ...]]:
    """For each module's name its class and ``extra_repr``; for a block its times and its noise."""
    return {
        name: (type(m), m.index, m.t0, m.t1, m.jump, m.schedule)
        if isinstance(m, BlockSDE)
        else (type(m), m.extra_repr())
        for name, m in model.named_modules()
    }


def _worded(description: tuple[Any, ...] | None) -> str:
    """A module's description for a message, at most 90 characters long."""
    if description is None:
        return "nothing"
    kind, *details = description
    text = f"{kind.__name__}({', '.join(map(str, details))})"
    return text if len(text) <= 90 else text[:86] + "...)"

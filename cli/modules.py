"""``--model package.module:factory``: a user's own network, made by a call of a function of the user's."""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from neuralsde_ito.validation import ItoError, nearest, shown

if TYPE_CHECKING:
    import torch
    from torch import nn

    from neuralsde_ito.data import Dataset
    from neuralsde_ito.models.voting import Voter

_OBSERVED = 100  # images that tell whether a module is random


def load_module(spec: str) -> nn.Module:
    """The network that ``package.module:factory`` makes; modules of the current directory are found, too.

    Raises:
        ItoError: there is no such module or function, it fails, or what it returns is no `nn.Module`.
    """
    from torch import nn

    place, _, name = spec.partition(":")
    if not all(part.isidentifier() for part in place.split(".")) or not name.isidentifier():
        raise ItoError(f"--model is written package.module:factory, such as mymodels:make_net, got {shown(spec)}.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(place)
    except Exception as error:  # a user's file may fail in any way
        missing = isinstance(error, ModuleNotFoundError) and (place == error.name or place.startswith(f"{error.name}."))
        if missing:
            raise ItoError(f"There is no module {place!r} in {os.getcwd()!r} or among installed packages.") from None
        raise ItoError(f"Importing {place!r} failed: {_said(error)}.") from error
    factory = getattr(module, name, None)
    if factory is None:
        known = [other for other, value in vars(module).items() if callable(value) and not other.startswith("_")]
        raise ItoError(nearest(f"function of {place}", name, known) if known else f"{place} has no function {name!r}.")
    if isinstance(factory, nn.Module):
        raise ItoError(f"{spec} is a network, not a function that makes one: write 'def make(): return {name}'.")
    if not callable(factory):
        raise ItoError(f"{spec} must be a function that returns an nn.Module, it is {_kind(factory)}.")
    try:
        network = factory()
    except Exception as error:
        raise ItoError(f"{spec}() failed: {_said(error)}.") from error
    if not isinstance(network, nn.Module):
        raise ItoError(f"{spec}() must return an nn.Module, it returned {_kind(network)}.")
    return network


def voter_of(
    network: nn.Module, spec: str, images: Dataset, device: torch.device, inferences: int | None, rule: str | None
) -> Voter:
    """The network as a model that votes, which has seen some images of the data.

    Raises:
        ItoError: the network fails on the images, or has fewer classes than they.
    """
    from neuralsde_ito.models.ensemble import ItoEnsemble
    from neuralsde_ito.models.recast import ItoResNet
    from neuralsde_ito.models.vote import Vote

    network = network.to(device)
    voter: Voter
    if isinstance(network, ItoEnsemble | ItoResNet):
        members = network.members if isinstance(network, ItoEnsemble) else [network]
        own = network if isinstance(network, ItoEnsemble) else None
        voter = ItoEnsemble(
            members, inferences or (own.inferences if own else 20), rule or (own.rule if own else "hierarchical")
        )
    else:
        voter = Vote(network, inferences or 20, rule or "hierarchical")
    index, x, _ = next(images.test.batches(min(_OBSERVED, len(images.test)), device))
    try:
        voter.observe(x)
        classes = voter.predict(x[:2], 0, index[:2]).votes.shape[-1]
    except ItoError:
        raise
    except Exception as error:
        shape = " x ".join(map(str, x.shape[1:]))
        raise ItoError(f"{spec} fails on images of {images.name} ({shape}): {_said(error)}.") from error
    if classes < len(images.classes):
        raise ItoError(
            f"{spec} knows {classes} classes, but the images of {images.name} have {len(images.classes)}: "
            "give the data that it was trained for."
        )
    return voter


def _said(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {shown_line(lines[0])}" if lines else type(error).__name__


def shown_line(line: str, width: int = 200) -> str:
    """A line without its full stop, shortened to ``width`` characters."""
    return (line if len(line) <= width else f"{line[: width - 3]}...").rstrip(".")


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {shown(value, 60)}"

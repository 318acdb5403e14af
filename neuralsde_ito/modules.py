"""Questions about an ``nn.Module``: its modes, its hooks, and whether it mixes the images of a batch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)
Part = TypeVar("Part", covariant=True)


class ModuleListOf(Protocol[Part]):
    """An ``nn.ModuleList`` whose entries are of one class, for type checkers; at run time it is the list itself."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Part]: ...
    def __getitem__(self, index: int) -> Part: ...


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def changes_of(module: nn.Module) -> list[str]:
    """What makes an object compute something else than its class: ``"hook"``, and methods set on the object."""
    changes = ["hook" for hooks in _HOOKS if getattr(module, hooks)]
    return changes + [name for name, own in vars(module).items() if callable(own) and hasattr(type(module), name)]


def untouched(module: nn.Module) -> bool:
    """Whether a module computes what its class says: no hooks, and no method set on the object."""
    return not changes_of(module)


def well_known(module: nn.Module) -> bool:
    """Whether all of a module's code is torch's, torchvision's or ours, without hooks: it keeps nothing between calls.

    Only then may two threads call it at the same time, and may its output be overwritten.
    """
    known = ("torch.", "torchvision.", "neuralsde_ito.")
    return all(type(m).__module__.startswith(known) and untouched(m) for m in module.modules())


def mixes_images(module: nn.Module) -> bool:
    """Whether one image's output depends on the others: BatchNorm with the statistics of the batch."""
    return any(map(mixes_images_itself, module.modules()))


def mixes_images_itself(module: nn.Module) -> bool:
    """`mixes_images` of a module without its children."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, and every module's own mode again afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def copied(module: Module) -> Module:
    """A copy that shares the hooks of the original, so that a hook records in the same object as before.

    Tensors that the last forward pass left in a module (the old ``spectral_norm`` does so) are copied detached.
    """
    memo: dict[int, object] = {}

    def detach(value: object) -> None:
        if isinstance(value, Tensor) and not value.is_leaf:
            memo[id(value)] = value.detach().clone()
        elif isinstance(value, (tuple, list, dict)):
            for part in value.values() if isinstance(value, dict) else value:
                detach(part)

    for part in module.modules():
        for name, value in vars(part).items():
            if name.endswith("_hooks"):
                memo.update((id(hook), hook) for hook in value.values())
            elif name != "_modules":
                detach(value)
    with torch.inference_mode(False):
        return copy.deepcopy(module, memo)

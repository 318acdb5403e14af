"""The quick copy that belongs to an ensemble, kept from call to call as long as the ensemble is what it was.

Copying and folding takes as long as an inference of a few images. What a copy was made of is compared whole: every
weight, buffer, mode, setting and module. A model of which that cannot be told (hooks, code of somebody else, settings
of a kind that is not known) gets a new copy every time.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..modules import well_known
from ..sde.schedules import Schedule
from .voting import Voter

Made = TypeVar("Made")

_PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, Schedule)
_TORCHS_OWN = vars(nn.Module()).keys()  # parameters, buffers, modules, hooks, the mode: seen otherwise

# By ensemble. An assignment is one step, so that threads see a state with the copy made of it.
_KEPT: WeakKeyDictionary[Voter, tuple[Any, Any]] = WeakKeyDictionary()


class _Unknown(Exception):
    """A setting of which it cannot be told whether it changes."""


def kept(ensemble: Voter, x: Tensor, make: Callable[[Tensor], Made]) -> Made:
    """What ``make(x)`` gives, or what it gave when the ensemble and the kind of images were the same.

    Args:
        ensemble: on its state the result depends, and of the images on their shape, dtype and device alone.
        x: images ``(N, C, H, W)``.
        make: nobody may change what it returns. An ensemble has one ``make``.
    """
    state = _state(ensemble, x)
    if state is None:
        return make(x)
    known = _KEPT.get(ensemble)
    if known is None or known[0] != state:
        with torch.inference_mode(False):  # a later call may come from outside of it
            known = (state, make(x.clone() if x.is_inference() else x))
        _KEPT[ensemble] = known
    made: Made = known[1]
    return made


def _state(ensemble: Voter, x: Tensor) -> tuple[Any, ...] | None:
    """All on which a quick copy depends; None if that cannot be told."""
    kind = (x.shape[1:], x.dtype, x.device, torch.is_autocast_enabled(x.device.type), torch.get_default_dtype())
    if not all(map(well_known, ensemble.members)):
        return None
    try:
        parts = [_module_state(name, module) for name, module in ensemble.named_modules(remove_duplicate=False)]
    except _Unknown:
        return None
    return (*kind, *parts)


def _module_state(name: str, module: nn.Module) -> tuple[Any, ...]:
    own = vars(module)
    settings = tuple((key, _plain(value)) for key, value in own.items() if key not in _TORCHS_OWN)
    tensors = tuple(
        (key, None if tensor is None else _tensor_state(tensor))
        for key, tensor in (*module._parameters.items(), *module._buffers.items())
    )
    return name, type(module), module.training, settings, tensors


def _plain(value: object) -> object:
    """A setting by its value."""
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(_plain, value))
    if type(value) not in _PLAIN:
        raise _Unknown
    return type(value), value


def _tensor_state(tensor: Tensor) -> tuple[Any, ...]:
    """A tensor by its content: whatever has changed it, even without autograd's knowledge."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        raise _Unknown
    plain = tensor.detach().cpu().contiguous()
    content = zlib.crc32(plain.view(-1).view(torch.uint8).numpy().data)
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr(), content

"""Compiled passes: what would take several tensor operations is done in one pass over the memory.

On a CPU they are those of `kernels.c`, if the package was built with a C compiler (not on Windows, whose libraries need
more); on a GPU those of `triton_kernels`, if Triton is installed. Otherwise, and for states that they cannot take,
`noise.normals` and autograd do the same with tensor operations.
"""

from __future__ import annotations

import ctypes
import math
import warnings
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad


def _load() -> ctypes.CDLL | None:
    spec = find_spec(f"{__package__}._kernels")  # it is found like a module, but is a plain library without one
    if spec is None or spec.origin is None:
        return None
    pointer, number, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    try:
        library = ctypes.CDLL(spec.origin)
        library.ito_add_normals_5.argtypes = [
            *(pointer, pointer, pointer, pointer),
            *(pointer, pointer, number, pointer, number, number),
            *(ctypes.c_float, flag, flag),
        ]
        library.ito_rectify_2.argtypes = [pointer, pointer, pointer, number, flag]
        library.ito_gate_2.argtypes = [pointer, pointer, pointer, number, flag]
        for function in (library.ito_add_normals_5, library.ito_rectify_2, library.ito_gate_2):
            function.restype = None
    except (OSError, AttributeError):  # built for another system, or from another version of kernels.c
        return None
    return library


library = _load()


@cache
def on_gpu(device: torch.device) -> ModuleType | None:
    """`triton_kernels`, imported at the first call, if this is a GPU on which Triton runs them; otherwise None."""
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    try:
        from . import triton_kernels

        x = torch.zeros(1, 2, device=device)
        triton_kernels.add_normals(x, torch.zeros(1, dtype=torch.int64, device=device), None, 1.0, 1, x)
    except Exception as error:  # what compilers and drivers raise has no common class
        warnings.warn(f"Triton does not work on {device}; tensor operations take its place. ({error})", stacklevel=2)
        return None
    return triton_kernels


def ordinary(x: Tensor) -> bool:
    """Whether a tensor is plain memory: not batched, dual, traced or fake.

    Only then may a pass over its memory replace an operation.
    """
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and forward_ad._current_level < 0
        and not torch.jit.is_tracing()
    )


def takes(x: Tensor) -> bool:
    """Whether a compiled pass takes such a tensor: float32 or bfloat16 on a CPU or a GPU."""
    if type(x) is not Tensor or not ordinary(x) or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    return on_gpu(x.device) is not None or (library is not None and x.device.type == "cpu")


def layout(x: Tensor, out: Tensor) -> int:
    """How `add_normals` goes through ``(N, ...)``: 1 if contiguous, the channels if channels_last, 0 not at all."""
    if not (takes(x) and takes(out)) or x.dtype != out.dtype or x.stride() != out.stride() or x.is_neg():
        return 0
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    if on_gpu(x.device):
        return 1 if x.is_contiguous() else x.shape[1] if last else 0
    if x.is_contiguous():
        return 1 - math.prod(x.shape[1:]) % 2
    even = last and x.shape[1] % 2 == 0 and x.shape[2] * x.shape[3] % 2 == 0
    return x.shape[1] if even and 0 < x.shape[1] <= 256 else 0


class Rectifier(NamedTuple):
    """A ReLU in place, ``relu(x + skip)``, by itself (`rectify_`) or on the way of `add_normals`; see `rectifier`.

    Attributes:
        skip: None, or of the shape and memory format of ``x``.
        passed: None, or bool in the shape and memory format of ``x``: it receives which numbers went through.
    """

    skip: Tensor | None
    passed: Tensor | None

    def of(self, rows: slice) -> Rectifier:
        """The same for some of the states."""
        return Rectifier(*(None if part is None else part[rows] for part in self))


def rectifier(x: Tensor, skip: Tensor | None = None, remember: bool = True) -> Rectifier:
    """What a ReLU of ``x + skip`` needs. A skip in another memory format is added to ``x`` at once.

    Args:
        x: dense in memory, in any memory format; `takes` it. No one else uses it.
        skip: of the same shape.
        remember: whether to keep which numbers go through, for `gate_`.
    """
    return Rectifier(_alike(x, skip), torch.empty_like(x, dtype=torch.bool) if remember else None)


def add_normals(
    x: Tensor,
    keys: Tensor,
    address: int | None,
    elements: Tensor,
    scale: float,
    channels: int,
    out: Tensor,
    relu: Rectifier | None = None,
) -> None:
    """``out = x + scale * normals`` for keys ``(N,)`` and mixed elements ``(1, C)``; it releases the GIL.

    In bfloat16 the sum is made in float32 and rounded once.

    Args:
        x, out: states ``(N, ...)`` of one `layout`; they may be the same tensor.
        keys: into which ``address`` is mixed, `noise.keys.mixed_integer` of one; without it they are addressed already.
        elements: `noise.normals.mixed_elements`.
        scale: not negative.
        channels: the `layout`.
        relu: takes ``x + skip`` before the noise is added.
    """
    assert library is not None
    skip, passed = relu or (None, None)
    library.ito_add_normals_5(
        out.data_ptr(),
        x.data_ptr(),
        _pointer(skip),
        _pointer(passed),
        keys.data_ptr(),
        None if address is None else ctypes.byref(ctypes.c_int64(address)),
        len(keys),
        elements.data_ptr(),
        elements.numel(),
        channels,
        scale,
        relu is not None,
        _brief(x),
    )
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)  # a graph that saved the old content must notice


def rectify_(x: Tensor, relu: Rectifier) -> Tensor:
    """``x = relu(x + skip)`` in place, for a state for which the `rectifier` was made."""
    if gpu := on_gpu(x.device):
        gpu.rectify(x, *relu)
    else:
        assert library is not None
        library.ito_rectify_2(x.data_ptr(), *map(_pointer, relu), x.numel(), _brief(x))
    return x


def gate_(gradient: Tensor, passed: Tensor, skip: Tensor | None = None) -> Tensor:
    """The derivative of `rectify_`: ``gradient + skip`` where numbers went through, otherwise 0.

    In place where ``gradient`` has the memory format of ``passed``.
    """
    if gradient.stride() != passed.stride():
        gradient = torch.empty_like(passed, dtype=gradient.dtype).copy_(gradient)
    skip = _alike(gradient, skip)
    if gpu := on_gpu(gradient.device):
        gpu.gate(gradient, skip, passed)
    else:
        assert library is not None
        library.ito_gate_2(gradient.data_ptr(), _pointer(skip), _pointer(passed), gradient.numel(), _brief(gradient))
    return gradient


def _brief(x: Tensor) -> bool:
    """Whether the numbers of a state are bfloat16."""
    return x.dtype == torch.bfloat16


def _alike(x: Tensor, skip: Tensor | None) -> Tensor | None:
    """A skip in the memory format of ``x``; one in another format is added to ``x`` here."""
    if skip is not None and skip.stride() != x.stride():
        x += skip
        return None
    return skip


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()

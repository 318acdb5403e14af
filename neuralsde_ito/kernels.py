"""The compiled passes of `kernels.c`: what would take several tensor operations is done in one pass over the memory.

They are there if the package was built with a C compiler (not on Windows, whose libraries need more). Otherwise, and
for states that they cannot take, `noise.normals` and autograd do the same with tensor operations.
"""

from __future__ import annotations

import ctypes
import math
from importlib.util import find_spec

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
        library.ito_add_normals_3.argtypes = [
            pointer,
            pointer,
            pointer,
            number,
            pointer,
            number,
            number,
            ctypes.c_float,
            flag,
        ]
        library.ito_rectify_2.argtypes = [pointer, pointer, pointer, number, flag]
        library.ito_gate_2.argtypes = [pointer, pointer, pointer, number, flag]
        for function in (library.ito_add_normals_3, library.ito_rectify_2, library.ito_gate_2):
            function.restype = None
    except (OSError, AttributeError):  # built for another system, or from another version of kernels.c
        return None
    return library


library = _load()


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
    """Whether `kernels.c` was compiled and takes such a tensor: float32 or bfloat16 on a CPU."""
    return (
        library is not None
        and type(x) is Tensor
        and ordinary(x)
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
    )


def layout(x: Tensor, out: Tensor) -> int:
    """How `add_normals` goes through ``(N, ...)``: 1 if contiguous, the channels if channels_last, 0 not at all."""
    if not (takes(x) and takes(out)) or x.dtype != out.dtype or x.stride() != out.stride() or x.is_neg():
        return 0
    if x.is_contiguous():
        return 1 - math.prod(x.shape[1:]) % 2
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    even = last and x.shape[1] % 2 == 0 and x.shape[2] * x.shape[3] % 2 == 0
    return x.shape[1] if even and 0 < x.shape[1] <= 256 else 0


def add_normals(x: Tensor, addressed: Tensor, elements: Tensor, scale: float, channels: int, out: Tensor) -> None:
    """``out = x + scale * normals`` for addressed keys ``(N,)`` and mixed elements ``(1, C)``; it releases the GIL.

    In bfloat16 the sum is made in float32 and rounded once.

    Args:
        x, out: states ``(N, ...)`` of one `layout`; they may be the same tensor.
        addressed: see `noise.normals`.
        elements: `noise.normals.mixed_elements`.
        scale: not negative.
        channels: the `layout`.
    """
    assert library is not None
    library.ito_add_normals_3(
        out.data_ptr(),
        x.data_ptr(),
        addressed.data_ptr(),
        len(addressed),
        elements.data_ptr(),
        elements.numel(),
        channels,
        scale,
        _brief(x),
    )
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)  # a graph that saved the old content must notice


def rectify_(x: Tensor, skip: Tensor | None = None, remember: bool = True) -> Tensor | None:
    """``x = relu(x + skip)`` in place.

    Args:
        x: dense in memory, in any memory format; `takes` it. No one else uses it.
        skip: of the same shape.
        remember: whether to return which numbers went through.

    Returns:
        With ``remember``, bool in the shape and memory format of ``x``: which numbers went through.
    """
    assert library is not None
    passed = torch.empty_like(x, dtype=torch.bool) if remember else None
    mask = None if passed is None else passed.data_ptr()
    library.ito_rectify_2(x.data_ptr(), _skip_pointer(x, skip), mask, x.numel(), _brief(x))
    return passed


def gate_(gradient: Tensor, passed: Tensor, skip: Tensor | None = None) -> Tensor:
    """The derivative of `rectify_`: ``gradient + skip`` where numbers went through, otherwise 0.

    In place where ``gradient`` has the memory format of ``passed``.
    """
    assert library is not None
    if gradient.stride() != passed.stride():
        gradient = torch.empty_like(passed, dtype=gradient.dtype).copy_(gradient)
    skip_pointer = _skip_pointer(gradient, skip)
    library.ito_gate_2(gradient.data_ptr(), skip_pointer, passed.data_ptr(), gradient.numel(), _brief(gradient))
    return gradient


def _brief(x: Tensor) -> bool:
    """Whether the numbers of a state are bfloat16."""
    return x.dtype == torch.bfloat16


def _skip_pointer(x: Tensor, skip: Tensor | None) -> int | None:
    """The address of a skip in the memory format of ``x``; one in another format is added to ``x`` here."""
    if skip is not None and skip.stride() != x.stride():
        x += skip
        return None
    return None if skip is None else skip.data_ptr()

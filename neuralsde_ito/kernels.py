"""Passes over a state that tensors would make several times: `kernels.c`, where there was a C compiler.

Where there was none (and on Windows, whose libraries need more), and for states that it cannot take, noise.py and
autograd do the same with tensors.
"""

from __future__ import annotations

import ctypes
import math
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.autograd import forward_ad


def _load() -> ctypes.CDLL | None:
    spec = find_spec(f"{__package__}._kernels")  # found as a module is, but a plain library: nothing to import
    if spec is None or spec.origin is None:
        return None
    at, number = ctypes.c_void_p, ctypes.c_int64
    try:
        library = ctypes.CDLL(spec.origin)
        library.ito_add_normals_2.argtypes = [at, at, at, number, at, number, number, ctypes.c_float]
        library.ito_rectify_1.argtypes = [at, at, at, number]
        library.ito_gate_1.argtypes = [at, at, at, number]
        for function in (library.ito_add_normals_2, library.ito_rectify_1, library.ito_gate_1):
            function.restype = None
    except (OSError, AttributeError):  # built for another system, or from another version of kernels.c
        return None
    return library


library = _load()


def ordinary(x: Tensor) -> bool:
    """Whether a tensor is memory and nothing else: not batched, dual, traced or fake.

    Only then may a pass over its memory stand for an operation.
    """
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and forward_ad._current_level < 0
        and not torch.jit.is_tracing()
    )


def takes(x: Tensor) -> bool:
    """Whether `kernels.c` is there, and for such a tensor."""
    return (
        library is not None
        and type(x) is Tensor
        and ordinary(x)
        and x.device.type == "cpu"
        and x.dtype == torch.float32
    )


def layout(x: Tensor, out: Tensor) -> int:
    """How `add_normals` goes through ``(N, ...)``: 1 contiguous, its channels if channels_last, 0 not at all."""
    if not (takes(x) and takes(out)) or x.stride() != out.stride() or x.is_neg():
        return 0
    if x.is_contiguous():
        return 1 - math.prod(x.shape[1:]) % 2
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    even = last and x.shape[1] % 2 == 0 and x.shape[2] * x.shape[3] % 2 == 0
    return x.shape[1] if even and 0 < x.shape[1] <= 256 else 0


def add_normals(x: Tensor, base: Tensor, elements: Tensor, scale: float, channels: int, out: Tensor) -> None:
    """``out = x + scale * normals`` of keys ``(N,)`` and elements ``(1, C)``, both mixed; Python's lock is let go."""
    assert library is not None
    library.ito_add_normals_2(
        out.data_ptr(),
        x.data_ptr(),
        base.data_ptr(),
        len(base),
        elements.data_ptr(),
        elements.numel(),
        channels,
        scale,
    )
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)  # a graph that holds what was there before must not use this


def rectify_(x: Tensor, skip: Tensor | None = None, remember: bool = True) -> Tensor | None:
    """``x = relu(x + skip)`` in place; returns which numbers went through, in the order in which ``x`` is held.

    Args:
        x: dense in memory, in any order; `takes` it, and nobody else knows it.
        skip: of the same shape.
        remember: whether to return anything.
    """
    assert library is not None
    passed = torch.empty_like(x, dtype=torch.bool) if remember else None
    library.ito_rectify_1(x.data_ptr(), _beside(x, skip), None if passed is None else passed.data_ptr(), x.numel())
    return passed


def gate_(gradient: Tensor, passed: Tensor, skip: Tensor | None = None) -> Tensor:
    """The way back through `rectify_`: ``gradient + skip`` of what went through, in place where its order allows."""
    assert library is not None
    if gradient.stride() != passed.stride():
        gradient = torch.empty_like(passed, dtype=gradient.dtype).copy_(gradient)
    library.ito_gate_1(gradient.data_ptr(), _beside(gradient, skip), passed.data_ptr(), gradient.numel())
    return gradient


def _beside(x: Tensor, skip: Tensor | None) -> int | None:
    """Where a skip is held, in the order of ``x``; one in another order is added at once."""
    if skip is not None and skip.stride() != x.stride():
        x += skip
        return None
    return None if skip is None else skip.data_ptr()

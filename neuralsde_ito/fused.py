"""Normals in one pass over a state: `normals.c`, where a C compiler was at hand when the package was built.

Where there was none (and on Windows, whose libraries need more), and for states that `layout` refuses, noise.py does
the same with tensors.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor


def _load() -> Callable[..., None] | None:
    spec = find_spec(f"{__package__}._normals")  # found as a module is, but a plain library: nothing to import
    if spec is None or spec.origin is None:
        return None
    try:
        library = ctypes.CDLL(spec.origin)
        add_normals = library.ito_add_normals_2
    except (OSError, AttributeError):  # built for another system, or from another version of normals.c
        return None
    at, number = ctypes.c_void_p, ctypes.c_int64
    add_normals.argtypes = [at, at, at, number, at, number, number, ctypes.c_float]
    add_normals.restype = None
    return add_normals


kernel = _load()


def layout(x: Tensor, out: Tensor) -> int:
    """How `add` goes through two states ``(N, ...)``: 1 contiguous, their channels if channels_last, 0 not at all."""
    plain = type(x) is type(out) is Tensor and x.device.type == "cpu" and x.dtype == torch.float32
    if kernel is None or not plain or x.stride() != out.stride() or x.is_neg():
        return 0
    if x.is_contiguous():
        return 1 - math.prod(x.shape[1:]) % 2
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    even = last and x.shape[1] % 2 == 0 and x.shape[2] * x.shape[3] % 2 == 0
    return x.shape[1] if even and 0 < x.shape[1] <= 256 else 0


def add(x: Tensor, base: Tensor, elements: Tensor, scale: float, channels: int, out: Tensor) -> None:
    """``out = x + scale * normals`` of keys ``(N,)`` and elements ``(1, C)``, both mixed; Python's lock is let go."""
    assert kernel is not None
    kernel(
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

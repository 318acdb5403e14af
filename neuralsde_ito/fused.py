"""Normals in one pass over a state: `normals.c`, where a C compiler was at hand when the package was built.

Where there was none, and on other devices and in float64, noise.py does the same with tensors.
"""

from __future__ import annotations

import ctypes
import math
from importlib.util import find_spec

import torch
from torch import Tensor


def _load() -> ctypes.CDLL | None:
    spec = find_spec(f"{__package__}._normals")  # found as a module is, but a plain library: nothing to import
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(spec.origin)
    at, number = ctypes.c_void_p, ctypes.c_int64
    library.add_normals.argtypes = [at, at, at, number, at, number, number, ctypes.c_float]
    library.add_normals.restype = None
    return library


library = _load()


def layout(x: Tensor, out: Tensor) -> int:
    """How `add` goes through two states ``(N, ...)``: 1 contiguous, their channels if channels_last, 0 not at all."""
    if library is None or x.device.type != "cpu" or x.dtype != torch.float32 or x.stride() != out.stride():
        return 0
    if x.is_contiguous():
        return 1 - math.prod(x.shape[1:]) % 2
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x.shape[1] if last and x.shape[1] % 2 == 0 and x.shape[1] <= 4096 else 0


def add(x: Tensor, base: Tensor, elements: Tensor, scale: float, channels: int, out: Tensor) -> None:
    """``out = x + scale * normals`` of keys ``(N,)`` and elements ``(1, C)``, both mixed; Python's lock is let go."""
    assert library is not None
    library.add_normals(
        out.data_ptr(),
        x.data_ptr(),
        base.data_ptr(),
        len(base),
        elements.data_ptr(),
        elements.numel(),
        channels,
        scale,
    )

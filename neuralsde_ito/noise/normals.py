"""Noise with an address: counter-based normals, and the Brownian path that is built from them.

Every normal is a pure function of ``(key, block, level, index, component, element)``. A key names one
inference of one image, so its noise depends neither on the batch, nor on the number of processes,
nor on the global random state, and whoever knows the key can replay it.

Keys and elements are mixed as SplitMix64 mixes its counter (Steele, Lea, Flood 2014,
https://doi.org/10.1145/2714064.2660195); each pair of them gives a 64-bit word, and each word two normals by
Box-Muller.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from .. import kernels
from ..parallel import spread
from ..validation import ItoError
from .keys import _GOLDEN, _M1, _M2, _absorb, _fold, _mix_, _outside_of_graphs

_WORDS = 1 << 17  # worked on at a time: a MiB; smaller pieces cost more calls, larger ones leave the cache


def _elements(words: int, device: torch.device, channels: int = 1) -> Tensor:
    """The mixed elements ``(1, C)``, where a state is channels_last in the order in which `kernels.c` meets them."""
    held = _ELEMENTS.get((words, device, channels))
    if held is None:
        held = _mix_(torch.arange(1, words + 1, device=device) * _GOLDEN)[None]
        if channels > 1:  # sizes and angles, each of `channels / 2` channels
            held = rearrange(held, "1 (a c s) -> 1 (a s c)", a=2, c=channels // 2)
        if kernels.ordinary(held):  # what a transform or a fake mode has made is of no use outside of it
            if len(_ELEMENTS) >= 64:
                _ELEMENTS.clear()
            _ELEMENTS[words, device, channels] = held
    return held


_ELEMENTS: dict[tuple[int, torch.device, int], Tensor] = {}


def normals(keys: Tensor, size: int, *address: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normals ``(N, size)``, a pure function of each key, of the address and of the element.

    Args:
        keys: int64 ``(N,)``.
        size: how many normals a key.
        address: further fields, each mixed in: block, level, index in the level, component.
        dtype: float32 or float64. Both come from the same words and agree to float32's rounding.
    """
    _check(keys)
    return _draw(_absorb(keys, _fold(address)), size, dtype)


@_outside_of_graphs
def _draw(base: Tensor, size: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Normals ``(N, size)``, times ``scale`` (not negative), of keys ``(N,)`` that hold their address already."""
    if not kernels.ordinary(base):
        return _transformable(base, size, dtype) * scale
    half = (size + 1) // 2
    work = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.empty(base.shape[0], 2 * half, dtype=work, device=base.device)
    if channels := kernels.layout(out, out):
        _fused(out.zero_(), base, scale, channels, out)
    else:
        _generate(base, half, work, lambda rows, scratch: scratch.fill(out[rows], scale))
    return out[:, :size].to(dtype).contiguous()


@_outside_of_graphs
def add_normals(x: Tensor, keys: Tensor, scale: float, *address: int, in_place: bool = False) -> Tensor:
    """``x + scale * normals``, for states ``(N, ...)`` and keys ``(N,)``, without ever holding all the normals.

    With ``in_place``, and where nothing is recorded for a gradient, ``x`` itself is changed. Under the transforms of
    ``torch.func``, forward-mode derivatives, tracing and export the sum is written with operations that they know.
    """
    if not (kernels.ordinary(x) and kernels.ordinary(keys)):
        _check(keys)
        draws = _transformable(_absorb(keys, _fold(address)), math.prod(x.shape[1:]), x.dtype)
        return x + scale * draws.reshape(x.shape)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Shift.apply(x, keys, scale, address)
    return _add(x, keys, scale, address, x if in_place else torch.empty_like(x))


def _transformable(base: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Normals ``(N, size)`` of keys ``(N,)`` that hold their address, as `_Scratch.fill` computes them.

    Nothing is written into memory that is there already, so that batched, dual, traced and fake tensors pass.
    """
    half, work = (size + 1) // 2, torch.float64 if dtype == torch.float64 else torch.float32
    words = (base[:, None] ^ _mix_(torch.arange(1, half + 1, device=base.device) * _GOLDEN)) * _M1
    words = (words ^ words >> 32) * _M2
    numbers = torch.stack([words << 32 >> 32, words >> 32], -1).flatten(-2).to(work)  # two signed integers a word
    radius, angle = numbers.split(half, -1)
    radius = (-2 * (0.5 / (2**31 + 1) + radius.abs() / (2**31 + 1)).log()).sqrt()
    angle = angle * (math.pi * 2.0**-31)
    return torch.cat([angle.cos() * radius, angle.sin() * radius], -1)[:, :size].to(dtype)


def _check(keys: Tensor) -> None:
    if keys.dtype != torch.int64 or keys.dim() != 1:
        raise ItoError(f"keys must be int64 of shape (N,), got {keys.dtype} of shape {tuple(keys.shape)}.")


class _Shift(torch.autograd.Function):
    """A shift by a constant: the gradient passes unchanged."""

    @staticmethod
    def forward(ctx, x: Tensor, keys: Tensor, scale: float, address: tuple[int, ...]) -> Tensor:
        return _add(x, keys, scale, address, torch.empty_like(x))

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None, None, None


def _add(x: Tensor, keys: Tensor, scale: float, address: tuple[int, ...], out: Tensor) -> Tensor:
    _check(keys)
    if len(keys) != len(x) or keys.device != x.device:
        raise ItoError(
            f"Every state needs a key beside it: {len(x)} states on {x.device}, {len(keys)} keys on {keys.device}."
        )
    base = _absorb(keys, _fold(address))
    if channels := kernels.layout(x, out):
        _fused(x, base, scale, channels, out)
    else:
        size = math.prod(x.shape[1:])

        def add(rows: slice, scratch: _Scratch) -> None:
            draws = scratch.fill(scratch.draws, 1.0)
            torch.add(x[rows], draws[:, :size].reshape(x[rows].shape).to(x.dtype), alpha=scale, out=out[rows])

        _generate(base, (size + 1) // 2, torch.float64 if x.dtype == torch.float64 else torch.float32, add)
    return out


def _fused(x: Tensor, base: Tensor, scale: float, channels: int, out: Tensor) -> None:
    """``out = x + scale * normals`` in one pass, for states with `fused.layout`'s ``channels``."""
    half = math.prod(x.shape[1:]) // 2
    elements = _elements(half, base.device, channels)

    def some(rows: slice) -> None:
        kernels.add_normals(x[rows], base[rows], elements, scale, channels, out[rows])

    _by_rows(some, len(x), half, x.device)


def _generate(base: Tensor, half: int, dtype: torch.dtype, work: Callable[[slice, _Scratch], object]) -> None:
    """``work`` on some rows after the other, with buffers that hold their words."""
    cpu = base.device.type == "cpu"
    elements = _elements(half, base.device)

    def some(rows: slice) -> None:
        with torch.inference_mode():  # a quarter less time in each call, of which there are many
            count = len(base[rows])
            scratch = _scratch(count, half, dtype) if cpu else _Scratch(count, half, dtype, base.device)
            torch.bitwise_xor(base[rows, None], elements, out=scratch.words)
            work(rows, scratch)

    _by_rows(some, len(base), half, base.device)


def _by_rows(some: Callable[[slice], None], rows: int, width: int, device: torch.device) -> None:
    """``some`` rows after the others: on a CPU as many as its caches hold, and side by side."""
    cpu = device.type == "cpu"
    step = max(1, (_WORDS if cpu else 1 << 24) // max(1, width))
    pieces = [slice(start, start + step) for start in range(0, rows, step)]
    if cpu:
        spread(some, pieces)
    else:
        for piece in pieces:
            some(piece)


class _Scratch:
    """Buffers for ``R`` rows of ``C`` words, so that the passes over them allocate nothing."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.words, self.shifted = (torch.empty(rows, columns, dtype=torch.int64, device=device) for _ in range(2))
        self.halves = self.words.view(torch.int32)  # two signed integers a word
        self.floats, self.draws = (torch.empty(rows, 2 * columns, dtype=dtype, device=device) for _ in range(2))
        self.radius, self.angle = self.floats.split(columns, 1)
        self.least = torch.full((), 0.5 / (2**31 + 1), dtype=dtype, device=device)

    def fill(self, out: Tensor, scale: float) -> Tensor:
        """Write normals ``(R, 2 C)``, times ``scale`` (not negative); ``words`` holds the mixed keys and elements."""
        words, radius, angle = self.words, self.radius, self.angle
        # The middle of SplitMix64's finaliser: what comes in is mixed already, and what goes out is read from the
        # top of each half. The shift is arithmetic: it loses the sign's bit, no more, and needs no mask.
        words.mul_(_M1)
        words.bitwise_xor_(torch.bitwise_right_shift(words, 32, out=self.shifted))
        words.mul_(_M2)
        self.floats.copy_(self.halves)
        # Of the first half the size makes u in (0, 1], exact near 0 where the tail is made (to 6.6 sigma);
        # the second half is the angle.
        torch.add(self.least, radius.abs_(), alpha=1 / (2**31 + 1), out=radius)
        angle.mul_(math.pi * 2.0**-31)
        radius.log_().mul_(-2 * scale * scale).sqrt_()
        first, second = out.split(words.shape[1], 1)
        torch.cos(angle, out=first).mul_(radius)
        torch.sin(angle, out=second).mul_(radius)
        return out


_local = threading.local()


def _scratch(rows: int, columns: int, dtype: torch.dtype) -> _Scratch:
    """This thread's buffers on the CPU; of a few shapes, as a network has few."""
    held: dict[object, _Scratch] = _local.__dict__  # type: ignore[assignment]
    if (rows, columns, dtype) not in held:
        if len(held) > 5:
            held.clear()
        held[rows, columns, dtype] = _Scratch(rows, columns, dtype, "cpu")
    return held[rows, columns, dtype]

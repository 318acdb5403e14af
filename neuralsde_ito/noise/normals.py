"""Normals with an address: a counter-based generator.

Every normal is a pure function of ``(key, block, level, index, component, element)``. A key names one
inference of one image, so its noise depends neither on the batch, nor on the number of processes,
nor on the global random state, and anyone who has the key can draw it again.

Keys and elements are mixed as SplitMix64 mixes its counter (Steele, Lea, Flood 2014,
https://doi.org/10.1145/2714064.2660195). A mixed key and a mixed element together give a 64-bit word, and a word gives
two normals by Box-Muller.

The same normals are computed in three ways: in one pass, where `kernels` takes the state (`kernels.c` on a CPU, Triton
on a GPU); by tensor operations on buffers; and by operations that ``torch.func`` and tracing know
(`transformable_normals`).
Here *addressed* keys ``(N,)`` are keys into which `absorb` has mixed the address of a component of a cell.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from .. import kernels
from ..parallel import spread
from ..validation import ItoError
from .keys import GOLDEN, M1, M2, absorb, fold_address, mix_, mixed_integer, outside_of_graphs

_WORDS = 1 << 17  # words in a piece: a MiB. Smaller pieces cost more calls, larger ones leave the cache


def mixed_elements(words: int, device: torch.device, channels: int = 1) -> Tensor:
    """The mixed elements ``(1, words)``; for a channels_last state in the order of `kernels.c`."""
    elements = _MIXED_ELEMENTS.get((words, device, channels))
    if elements is None:
        elements = mix_(torch.arange(1, words + 1, device=device) * GOLDEN)[None]
        if channels > 1:  # words of radii, then words of angles, each for `channels / 2` channels
            elements = rearrange(elements, "1 (a c s) -> 1 (a s c)", a=2, c=channels // 2)
        if kernels.ordinary(elements):  # a tensor made under a transform or a fake mode must not be used outside of it
            if len(_MIXED_ELEMENTS) >= 64:
                _MIXED_ELEMENTS.clear()
            _MIXED_ELEMENTS[words, device, channels] = elements
    return elements


_MIXED_ELEMENTS: dict[tuple[int, torch.device, int], Tensor] = {}


def normals(keys: Tensor, size: int, *address: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normals ``(N, size)``, a pure function of each key, of the address and of the element.

    Args:
        keys: int64 ``(N,)``.
        size: how many normals a key.
        address: further fields, each mixed in: block, level, index in the level, component.
        dtype: float32 or float64. Both come from the same words and agree to float32's rounding.
    """
    _check(keys)
    return scaled_normals(absorb(keys, fold_address(address)), size, dtype)


@outside_of_graphs
def scaled_normals(addressed: Tensor, size: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Normals ``(N, size)`` of addressed keys ``(N,)``, times ``scale``, which is not negative."""
    if not kernels.ordinary(addressed):
        return transformable_normals(addressed, size, dtype) * scale
    half = (size + 1) // 2
    work = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.empty(addressed.shape[0], 2 * half, dtype=work, device=addressed.device)
    if channels := kernels.layout(out, out):
        _add_in_one_pass(out.zero_(), addressed, None, scale, channels, out)
    else:
        _with_buffers(addressed, half, work, lambda rows, buffers: buffers.write_normals(out[rows], scale))
    return out[:, :size].to(dtype).contiguous()


@outside_of_graphs
def add_normals(
    x: Tensor,
    keys: Tensor,
    scale: float,
    *address: int,
    in_place: bool = False,
    relu: kernels.Rectifier | None = None,
) -> Tensor:
    """``x + scale * normals``, for states ``(N, ...)`` and keys ``(N,)``; it never holds all the normals.

    With ``in_place``, and where nothing is recorded for a gradient, the sum is written into ``x``. Under the
    transforms of ``torch.func``, forward-mode derivatives, tracing and export it is made of operations that they know.

    With ``relu``, ``x`` is rectified before the noise is added: in the same pass, where `kernels` has one. It goes with
    ``in_place`` only, and where nothing is recorded.

    Raises:
        ItoError: not one int64 key for each state, on the state's device.
    """
    recorded = torch.is_grad_enabled() and x.requires_grad
    ordinary = kernels.ordinary(x) and kernels.ordinary(keys)
    assert relu is None or (in_place and ordinary and not recorded)
    if not ordinary:
        _check(keys)
        work = torch.promote_types(x.dtype, torch.float32)
        draws = transformable_normals(absorb(keys, fold_address(address)), math.prod(x.shape[1:]), work)
        return (x + scale * draws.reshape(x.shape)).to(x.dtype)
    if recorded:
        return _AddNormals.apply(x, keys, scale, address)
    return _add(x, keys, scale, address, x if in_place else torch.empty_like(x), relu)


def transformable_normals(addressed: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Normals ``(N, size)`` of addressed keys ``(N,)``, as `_Buffers.write_normals` computes them.

    No operation writes into an existing tensor, so batched, dual, traced and fake tensors are taken.
    """
    half, work = (size + 1) // 2, torch.float64 if dtype == torch.float64 else torch.float32
    words = (addressed[:, None] ^ mix_(torch.arange(1, half + 1, device=addressed.device) * GOLDEN)) * M1
    words = (words ^ words >> 32) * M2
    numbers = torch.stack([words << 32 >> 32, words >> 32], -1).flatten(-2).to(work)  # two signed integers a word
    radius, angle = numbers.split(half, -1)
    radius = (-2 * (0.5 / (2**31 + 1) + radius.abs() / (2**31 + 1)).log()).sqrt()
    angle = angle * (math.pi * 2.0**-31)
    return torch.cat([angle.cos() * radius, angle.sin() * radius], -1)[:, :size].to(dtype)


def _check(keys: Tensor) -> None:
    if keys.dtype != torch.int64 or keys.dim() != 1:
        raise ItoError(f"keys must be int64 of shape (N,), got {keys.dtype} of shape {tuple(keys.shape)}.")


class _AddNormals(torch.autograd.Function):
    """To the gradient the normals are a constant: it passes unchanged."""

    @staticmethod
    def forward(ctx, x: Tensor, keys: Tensor, scale: float, address: tuple[int, ...]) -> Tensor:
        return _add(x, keys, scale, address, torch.empty_like(x))

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None, None, None


def _add(
    x: Tensor,
    keys: Tensor,
    scale: float,
    address: tuple[int, ...],
    out: Tensor,
    relu: kernels.Rectifier | None = None,
) -> Tensor:
    """``out = x + scale * normals`` for ordinary tensors; ``out`` may be ``x``, and is ``x`` with ``relu``."""
    _check(keys)
    if len(keys) != len(x) or keys.device != x.device:
        raise ItoError(
            f"Every state needs a key beside it: {len(x)} states on {x.device}, {len(keys)} keys on {keys.device}."
        )
    folded = fold_address(address)
    if channels := kernels.layout(x, out):
        _add_in_one_pass(x, keys, mixed_integer(folded), scale, channels, out, relu)
    else:
        if relu is not None:
            kernels.rectify_(x, relu)
        size = math.prod(x.shape[1:])

        def add(rows: slice, buffers: _Buffers) -> None:
            draws = buffers.write_normals(buffers.draws, 1.0)
            # Sums of a narrower state are made in float32 and rounded once.
            torch.add(x[rows], draws[:, :size].reshape(x[rows].shape), alpha=scale, out=out[rows])

        addressed = absorb(keys, folded)
        _with_buffers(addressed, (size + 1) // 2, torch.float64 if x.dtype == torch.float64 else torch.float32, add)
    return out


def _add_in_one_pass(
    x: Tensor,
    keys: Tensor,
    address: int | None,
    scale: float,
    channels: int,
    out: Tensor,
    relu: kernels.Rectifier | None = None,
) -> None:
    """``out = x + scale * normals`` by `kernels`, for states with ``channels`` from `kernels.layout`."""
    keys = keys.contiguous()
    if gpu := kernels.on_gpu(x.device):
        gpu.add_normals(x, keys, address, scale, channels, out, relu)
        return
    half = math.prod(x.shape[1:]) // 2
    elements = mixed_elements(half, keys.device, channels)

    def add(rows: slice) -> None:
        part = None if relu is None else relu.of(rows)
        kernels.add_normals(x[rows], keys[rows], address, elements, scale, channels, out[rows], part)

    by_rows(add, len(x), half, x.device)


def _with_buffers(addressed: Tensor, half: int, dtype: torch.dtype, work: Callable[[slice, _Buffers], object]) -> None:
    """``work(rows, buffers)`` for all rows, piece by piece; the buffers hold the words of the piece's rows."""
    cpu = addressed.device.type == "cpu"
    elements = mixed_elements(half, addressed.device)

    def work_on_piece(rows: slice) -> None:
        with torch.inference_mode():  # a quarter less time in each call, and there are many
            count = len(addressed[rows])
            buffers = _buffers_of_thread(count, half, dtype) if cpu else _Buffers(count, half, dtype, addressed.device)
            torch.bitwise_xor(addressed[rows, None], elements, out=buffers.words)
            work(rows, buffers)

    by_rows(work_on_piece, len(addressed), half, addressed.device)


def by_rows(work: Callable[[slice], None], rows: int, width: int, device: torch.device) -> None:
    """``work`` on all rows of ``width`` words, piece by piece.

    On a CPU a piece has as many rows as the caches hold, and pieces run side by side.
    """
    cpu = device.type == "cpu"
    step = max(1, (_WORDS if cpu else 1 << 24) // max(1, width))
    pieces = [slice(start, start + step) for start in range(0, rows, step)]
    if cpu and len(pieces) > 1:
        spread(work, pieces)
    else:
        for piece in pieces:
            work(piece)


class _Buffers:
    """Memory for ``R`` rows of ``C`` words, so that the passes over them allocate nothing."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.words, self.shifted = (torch.empty(rows, columns, dtype=torch.int64, device=device) for _ in range(2))
        self.halves = self.words.view(torch.int32)  # two signed integers a word
        self.floats, self.draws = (torch.empty(rows, 2 * columns, dtype=dtype, device=device) for _ in range(2))
        self.radius, self.angle = self.floats.split(columns, 1)
        self.least = torch.full((), 0.5 / (2**31 + 1), dtype=dtype, device=device)

    def write_normals(self, out: Tensor, scale: float) -> Tensor:
        """Write normals ``(R, 2 C)``, times ``scale``, into ``out``; ``words`` holds mixed keys xor mixed elements."""
        words, radius, angle = self.words, self.radius, self.angle
        # The middle of SplitMix64's finaliser: its input is mixed already, and of its output only the top bits of each
        # half matter. The shift is arithmetic: it loses no more than the sign bit, and saves the mask.
        words.mul_(M1)
        words.bitwise_xor_(torch.bitwise_right_shift(words, 32, out=self.shifted))
        words.mul_(M2)
        self.floats.copy_(self.halves)
        # The first half of the numbers gives u in (0, 1], exact near 0, where the tail comes from (up to 6.6 sigma);
        # the second half gives the angle.
        torch.add(self.least, radius.abs_(), alpha=1 / (2**31 + 1), out=radius)
        angle.mul_(math.pi * 2.0**-31)
        radius.log_().mul_(-2 * scale * scale).sqrt_()
        first, second = out.split(words.shape[1], 1)
        torch.cos(angle, out=first).mul_(radius)
        torch.sin(angle, out=second).mul_(radius)
        return out


_of_thread = threading.local()


def _buffers_of_thread(rows: int, columns: int, dtype: torch.dtype) -> _Buffers:
    """This thread's buffers on the CPU, kept for a few shapes: a network has few."""
    kept: Any = _of_thread.__dict__
    if (rows, columns, dtype) not in kept:
        if len(kept) > 5:
            kept.clear()
        kept[rows, columns, dtype] = _Buffers(rows, columns, dtype, "cpu")
    return kept[rows, columns, dtype]

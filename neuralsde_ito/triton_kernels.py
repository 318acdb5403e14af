"""The passes of `kernels.c` on a GPU, as Triton kernels. `kernels` imports this file when it first sees such a state.

The words are those of `noise.normals`; logarithm, sine and cosine are the polynomials of `kernels.c`. So the normals
are those of a CPU within float32's rounding. bfloat16 states are added to in float32 and rounded once.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_PAIRS, _ROWS = 256, 4  # of normals in a program: the mixed elements of its pairs serve several rows
_NUMBERS = 1024  # of a state in a program that rectifies

_GOLDEN = tl.constexpr(-0x61C8864680B583EB)  # as in noise/keys.py
_M1, _M2 = tl.constexpr(-0x40A7B892E31B1A47), tl.constexpr(-0x6B2FB644ECCEEE15)


@triton.jit
def _mix(z):
    """As `keys.mix_` mixes."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * _M1  # shifts of int64 are arithmetic
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * _M2
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


@triton.jit
def _mixed_element(number):
    """Where in a row's words a number comes from: the element of its word, mixed."""
    return _mix((number // 2 + 1).to(tl.int64) * _GOLDEN)


@triton.jit
def _half_word(key, element, number):
    """The signed half of a word that is this number of the row."""
    word = (key ^ element) * _M1
    word = (word ^ (word >> 32)) * _M2
    return (word >> (number % 2 * 32).to(tl.int64)).to(tl.int32)


@triton.jit
def _logarithm(u):
    bits = u.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    m = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    r = 0.0873661637 * m - 0.143076017
    r = r * m + 0.149173543
    r = r * m - 0.165704697
    r = r * m + 0.199621335
    r = r * m - 0.250017583
    r = r * m + 0.333339483
    r = r * m - 0.499999911
    return e.to(tl.float32) * 0.693147181 + (m + m * m * r)


@triton.jit
def _box_muller(radius, angle):
    """Two normals from two signed integers of 32 bits."""
    u = tl.abs(radius.to(tl.float32)) * (1.0 / 2147483648.0) + 0.5 / 2147483648.0  # the factor, as float32 rounds it
    radius = tl.sqrt_rn(-2.0 * _logarithm(u))
    quadrant = (angle + 0x20000000) >> 30
    v = ((angle << 2) >> 2).to(tl.float32) * (1.0 / 1073741824.0)
    z = v * v
    s = v * (1.57079637 + z * (-0.64596349 + z * (0.0796802267 + z * -0.00460217707)))
    c = 1.0 + z * (-1.23370051 + z * (0.253669202 + z * (-0.0208600722 + z * 0.000903631677)))
    odd = (quadrant & 1) != 0
    sine, cosine = tl.where(odd, c, s), tl.where(odd, s, c)
    sine, cosine = tl.where((quadrant & 2) != 0, -sine, sine), tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine)
    return radius * cosine, radius * sine


@triton.jit
def _offset(number, pixels, CHANNELS: tl.constexpr):
    """Where a number of a row lies in memory."""
    if CHANNELS == 1:
        return number
    return number % pixels * CHANNELS + number // pixels


@triton.jit
def _relu(x, skip, passed, offset, mask, SKIP: tl.constexpr, REMEMBER: tl.constexpr):
    sum = tl.load(x + offset, mask).to(tl.float32)
    if SKIP:
        sum += tl.load(skip + offset, mask).to(tl.float32)
    stopped = sum <= 0.0  # NaN goes through
    if REMEMBER:
        tl.store(passed + offset, tl.where(stopped, 0, 1).to(tl.uint8), mask)
    return tl.where(stopped, 0.0, sum)


@triton.jit
def _add(out, x, skip, passed, offset, mask, noise, RECTIFY: tl.constexpr, SKIP: tl.constexpr, REMEMBER: tl.constexpr):
    if RECTIFY:
        state = _relu(x, skip, passed, offset, mask, SKIP, REMEMBER)
    else:
        state = tl.load(x + offset, mask).to(tl.float32)
    tl.store(out + offset, (state + noise).to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["address"])  # or Triton would compile once more for multiples of 16
def _add_normals(
    out, x, skip, passed, keys, address, rows, size, pixels, blocks, scale,
    CHANNELS: tl.constexpr, ABSORB: tl.constexpr, RECTIFY: tl.constexpr, SKIP: tl.constexpr, REMEMBER: tl.constexpr,
    PAIRS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    half = (size + 1) // 2
    pair = tl.program_id(0) % blocks * PAIRS + tl.arange(0, PAIRS)
    inside = pair < half
    if CHANNELS % 2 == 0:  # in the order of the memory: both numbers of a pair belong to one pixel
        pair = pair % (CHANNELS // 2) * pixels + pair // (CHANNELS // 2)
    other = half + pair
    element, other_element = _mixed_element(pair), _mixed_element(other)
    offset, other_offset = _offset(pair, pixels, CHANNELS), _offset(other, pixels, CHANNELS)
    for i in range(ROWS):
        row = (tl.program_id(0) // blocks * ROWS + i).to(tl.int64)
        mask = inside & (row < rows)
        key = tl.load(keys + row, row < rows)
        if ABSORB:
            key = _mix(key * _M1 + address)
        radius, angle = _half_word(key, element, pair), _half_word(key, other_element, other)
        first, second = _box_muller(radius, angle)
        start = row * size
        _add(out, x, skip, passed, start + offset, mask, scale * first, RECTIFY, SKIP, REMEMBER)
        mask = mask & (other < size)
        _add(out, x, skip, passed, start + other_offset, mask, scale * second, RECTIFY, SKIP, REMEMBER)


@triton.jit
def _rectify(x, skip, passed, n, SKIP: tl.constexpr, REMEMBER: tl.constexpr, NUMBERS: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    tl.store(x + i, _relu(x, skip, passed, i, i < n, SKIP, REMEMBER).to(x.dtype.element_ty), i < n)


@triton.jit
def _gate(x, skip, passed, n, SKIP: tl.constexpr, NUMBERS: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    sum = tl.load(x + i, i < n).to(tl.float32)
    if SKIP:
        sum += tl.load(skip + i, i < n).to(tl.float32)
    tl.store(x + i, tl.where(tl.load(passed + i, i < n) != 0, sum, 0.0).to(x.dtype.element_ty), i < n)


def add_normals(
    x: Tensor,
    keys: Tensor,
    address: int | None,
    scale: float,
    channels: int,
    out: Tensor,
    relu: tuple[Tensor | None, Tensor | None] | None = None,
) -> None:
    """``out = x + scale * normals`` for keys ``(N,)``.

    Args:
        x, out: not empty, ``(N, ...)`` of one dtype and layout; they may be the same tensor.
        keys, address: see `kernels.add_normals`.
        scale: not negative.
        channels: 1 if the states are contiguous, the channels if they are channels_last.
        relu: `kernels.Rectifier`; it takes ``x + skip`` before the noise is added.
    """
    skip, passed = relu or (None, None)
    rows, size = len(x), math.prod(x.shape[1:])
    blocks = triton.cdiv((size + 1) // 2, _PAIRS)
    grid = (blocks * triton.cdiv(rows, _ROWS),)
    with torch.cuda.device_of(x):
        _add_normals[grid](
            out, x, x if skip is None else skip, _bytes(x, passed), keys, address or 0, rows, size, size // channels,
            blocks, scale, CHANNELS=channels, ABSORB=address is not None, RECTIFY=relu is not None,
            SKIP=skip is not None, REMEMBER=passed is not None, PAIRS=_PAIRS, ROWS=_ROWS,
        )  # fmt: skip
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)  # as in `kernels.add_normals`


def _bytes(x: Tensor, passed: Tensor | None) -> Tensor:
    """Booleans as the bytes that a kernel writes; without them any tensor, which it does not touch."""
    return x if passed is None else passed.view(torch.uint8)


def rectify(x: Tensor, skip: Tensor | None, passed: Tensor | None) -> None:
    """``x = relu(x + skip)`` in place; ``passed``, bool, receives which numbers went through. One memory format."""
    n = x.numel()
    with torch.cuda.device_of(x):
        _rectify[(triton.cdiv(n, _NUMBERS),)](
            x, x if skip is None else skip, _bytes(x, passed), n, SKIP=skip is not None, REMEMBER=passed is not None,
            NUMBERS=_NUMBERS,
        )  # fmt: skip


def gate(x: Tensor, skip: Tensor | None, passed: Tensor) -> None:
    """``x = x + skip`` in place where numbers went through, otherwise 0. One memory format."""
    n = x.numel()
    with torch.cuda.device_of(x):
        _gate[(triton.cdiv(n, _NUMBERS),)](
            x, x if skip is None else skip, passed.view(torch.uint8), n, SKIP=skip is not None, NUMBERS=_NUMBERS
        )

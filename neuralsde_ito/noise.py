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
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torchsde
from einops import rearrange
from torch import Tensor

from . import fused
from .threads import spread
from .validation import ItoError

# torch.compile breaks its graph here: it would take every field of an address for a symbol, and work for minutes on
# expressions as long as the hash.
_outside_of_graphs = torch.compiler.disable

# The multipliers of SplitMix64's finaliser and its increment, as signed 64-bit integers.
_M1, _M2, _GOLDEN = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15, -0x61C8864680B583EB

# What a path is used for. Different purposes never share a path: an attack that saw the report's paths
# would be judged by what it has fitted.
PURPOSES = ("fresh", "train", "gradient", "selection", "report")

_LEVELS = 20  # a block is never cut finer than 2**20 steps
_WORDS = 1 << 17  # worked on at a time: a MiB; smaller pieces cost more calls, larger ones leave the cache


def _mix_(z: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place. Shifts of int64 are arithmetic in torch: the mask makes them logical."""
    for shift, factor in ((30, _M1), (27, _M2)):
        z ^= (z >> shift) & ((1 << (64 - shift)) - 1)
        z *= factor
    z ^= (z >> 31) & ((1 << 33) - 1)
    return z


def _absorb(state: Tensor, field: Tensor | int) -> Tensor:
    """Mix one more field into the state. Never a plain addition: offsets of two fields could meet."""
    if isinstance(field, Tensor):
        if field.is_floating_point() or field.is_complex():
            raise ItoError(f"Noise is named by whole numbers, got {field.dtype}.")
        return _mix_(state * _M1 + _mix_(field.to(state.device, torch.int64) + _GOLDEN))
    return _mix_(state * _M1 + _mixed(field))


def _mixed(field: int) -> int:
    """`_mix_` of ``field`` plus the increment, in Python's integers: any 64 bits, signed or not."""
    z = (int(field) + _GOLDEN) % 2**64
    for shift, factor in ((30, _M1), (27, _M2)):
        z = (z ^ z >> shift) * factor % 2**64
    z ^= z >> 31
    return z - 2**64 if z >= 2**63 else z


@lru_cache(maxsize=4096)
def _fold(address: tuple[int, ...]) -> int:
    """One number for an address: the fields mixed in one after the other, as in a key."""
    state = len(address)
    for field in address:
        state = _mixed(state * _M1 + _mixed(field) - _GOLDEN)
    return state


@_outside_of_graphs
def make_keys(
    seed: int | Tensor,
    purpose: str,
    member: int | Tensor = 0,
    inference: int | Tensor = 0,
    index: int | Tensor = 0,
) -> Tensor:
    """Keys that name inferences: a mixed hash of all the fields.

    Args:
        seed: any integer of 64 bits, Python's or numpy's.
        purpose: one of `PURPOSES`; separates training, gradient, selection and report.
        member, inference, index: integers or tensors of whole numbers that broadcast together; ``index`` names the
            image.

    Returns:
        int64 keys of the broadcast shape (at least one dimension is the caller's to give).
    """
    if purpose not in PURPOSES:
        raise ItoError(f"Unknown purpose {purpose!r}. Known: {', '.join(PURPOSES)}.")
    device = next((f.device for f in (index, inference, member, seed) if isinstance(f, Tensor)), None)
    state = torch.full((), PURPOSES.index(purpose) + 1, dtype=torch.int64, device=device)
    for field in (seed, member, inference, index):
        state = _absorb(state, field)
    return state


@_outside_of_graphs
def fresh_keys(n: int, device: torch.device | str | None = None) -> Tensor:
    """Keys ``(n,)`` that nobody can foretell: from the operating system, not from a generator one can reseed.

    Raises:
        ItoError: under ``torch.jit.trace``, which would keep them for ever.
    """
    if torch.jit.is_tracing():
        raise ItoError("Fresh noise cannot be traced: the traced model would repeat it for ever; trace model(x, keys).")
    seed = secrets.randbits(63)
    return make_keys(seed, "fresh", index=torch.arange(n, device=device))


def _elements(words: int, device: torch.device, channels: int = 1) -> Tensor:
    """The mixed elements ``(1, C)``, where a state is channels_last in the order in which `fused.c` meets them."""
    held = _ELEMENTS.get((words, device, channels))
    if held is None:
        held = _mix_(torch.arange(1, words + 1, device=device) * _GOLDEN)[None]
        if channels > 1:  # sizes and angles, each of `channels / 2` channels
            held = rearrange(held, "1 (a c s) -> 1 (a s c)", a=2, c=channels // 2)
        if fused.ordinary(held):  # what a transform or a fake mode has made is of no use outside of it
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
    if not fused.ordinary(base):
        return _transformable(base, size, dtype) * scale
    half = (size + 1) // 2
    work = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.empty(base.shape[0], 2 * half, dtype=work, device=base.device)
    if channels := fused.layout(out, out):
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
    if not (fused.ordinary(x) and fused.ordinary(keys)):
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
    def forward(ctx, x: Tensor, keys: Tensor, scale: float, address: tuple[int, ...]) -> Tensor:  # type: ignore[override]
        return _add(x, keys, scale, address, torch.empty_like(x))

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        return gradient, None, None, None


def _add(x: Tensor, keys: Tensor, scale: float, address: tuple[int, ...], out: Tensor) -> Tensor:
    _check(keys)
    if len(keys) != len(x) or keys.device != x.device:
        raise ItoError(
            f"Every state needs a key beside it: {len(x)} states on {x.device}, {len(keys)} keys on {keys.device}."
        )
    base = _absorb(keys, _fold(address))
    if channels := fused.layout(x, out):
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
        fused.add_normals(x[rows], base[rows], elements, scale, channels, out[rows])

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


@dataclass(frozen=True, slots=True)
class _Cell:
    """``W`` and, where it is needed, ``H`` over cell ``index`` of ``2**level``."""

    level: int
    index: int
    w: Tensor
    area: Tensor | None


def _check_transforms(keys: Tensor) -> None:
    if torch.jit.is_tracing() or torch._C._functorch.is_batchedtensor(keys):
        raise ItoError(
            "Only Euler with one step a block can be traced, or mapped over keys by torch.func; recast with "
            "solver='euler', steps=1."
        )


class BrownianPath(torchsde.BaseBrownian):
    """One Brownian path a key over one block ``[t0, t1]``, the same at every step size.

    The path lives on a dyadic tree. Level 0 holds ``W`` over the whole block (and, where it is asked for,
    the space-time Lévy area ``H``); each level below is a Brownian bridge, with ``W`` and ``H`` bridged
    jointly (Foster, Lyons, Oberhauser 2020, https://doi.org/10.1137/19M1261912; diffrax's virtual Brownian
    tree does the same). So increments of a coarse step are exactly the sums of the fine ones, one step a
    block costs one normal an element, and one path serves every solver and every step size.

    It answers torchsde's queries: ``bm(ta, tb)`` is ``W``, ``bm(ta, tb, return_U=True)`` is ``(W, U)`` with
    ``U`` the integral of ``W(s) - W(ta)`` over the interval, ``U = h (W / 2 + H)``; shapes ``(N, size)``.

    Args:
        keys: int64 ``(N,)``.
        size: elements of the state, flattened.
        block: the number of the block, counted through the whole network.
        t0, t1: its interval.
    """

    def __init__(
        self, keys: Tensor, size: int, block: int, t0: float, t1: float, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.keys, self.block, self.t0, self.t1 = keys, block, float(t0), float(t1)
        self._shape, self._dtype = torch.Size((keys.shape[0], size)), dtype
        self._waiting: list[_Cell] = []  # cells to the right of the last one read, the next one last

    def __repr__(self) -> str:
        return f"BrownianPath(block={self.block}, t0={self.t0}, t1={self.t1}, shape={tuple(self._shape)})"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of ``W``."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where the path lives: where its keys do."""
        return self.keys.device

    @property
    def shape(self) -> torch.Size:
        """``(N, size)``."""
        return self._shape

    @property
    def levy_area_approximation(self) -> str:
        """What torchsde asks for: this path knows the space-time area."""
        return "space-time"

    def __call__(self, ta, tb=None, return_U=False, return_A=False):
        """``W`` (or ``(W, U)``) over ``[ta, tb]``, whose ends must lie on the dyadic grid of the block.

        Raises:
            ItoError: an end that is not on the grid, or ``return_A`` (a diagonal SDE needs no Lévy area).
        """
        _check_transforms(self.keys)
        if return_A:
            raise ItoError("BrownianPath has no space-space Lévy area; diagonal noise does not need it.")
        ta, tb = (self.t0, float(ta)) if tb is None else (float(ta), float(tb))
        first, last = self._grid(ta), self._grid(tb)
        if first > last:
            raise ItoError(f"An interval must not end before it begins, got [{ta}, {tb}].")
        if first == last:  # rounding: torchsde's last step may be one of no length
            nothing = torch.zeros(self._shape, dtype=self._dtype, device=self.device)
            return (nothing, nothing.clone()) if return_U else nothing
        total: tuple[Tensor, Tensor] | None = None
        while first < last:  # the fewest dyadic cells that make up the interval
            width = first & -first or 1 << _LEVELS
            while first + width > last:
                width //= 2
            level = _LEVELS - width.bit_length() + 1
            if not return_U and first + width == last and total is None:
                return self.increment(level, first // width)
            h = width * (self.t1 - self.t0) / (1 << _LEVELS)
            w, area = self.cell(level, first // width)
            u = area.add_(w, alpha=0.5).mul_(h)  # nobody else holds the area
            total = (w, u) if total is None else (total[0] + w, total[1] + u + h * total[0])
            first += width
        assert total is not None
        return total if return_U else total[0]

    def _grid(self, t: float) -> int:
        place = (t - self.t0) / (self.t1 - self.t0) * (1 << _LEVELS)
        if abs(place - round(place)) > 1e-3 or not 0 <= round(place) <= 1 << _LEVELS:
            raise ItoError(
                f"Time {t} is not on the dyadic grid of the block [{self.t0}, {self.t1}]: "
                "use a step that is the block's length divided by a power of two."
            )
        return round(place)

    def add_to(self, x: Tensor, sigma: float, in_place: bool = False) -> Tensor:
        """``x + sigma W`` over the whole block, for states ``(N, ...)``, as `add_normals` adds."""
        scale = sigma * math.sqrt(self.t1 - self.t0)
        return add_normals(x, self.keys, scale, self.block, 0, 0, 0, in_place=in_place)

    def increment(self, level: int, index: int) -> Tensor:
        """``W`` over cell ``index`` of ``2**level``: ``(N, size)``. Skips the normals that only ``H`` needs."""
        _check_transforms(self.keys)
        return self._descend(level, index, with_area=False).w

    def cell(self, level: int, index: int) -> tuple[Tensor, Tensor]:
        """``(W, H)`` over cell ``index`` of ``2**level``: two tensors ``(N, size)``."""
        cell = self._descend(level, index, with_area=True)
        assert cell.area is not None
        return cell.w, cell.area

    def _descend(self, level: int, index: int, with_area: bool) -> _Cell:
        """From the nearest waiting cell, or from the root, down to the cell that is asked for.

        Cells that will be read next wait; what was read is let go. So reading the leaves from left to right costs
        three normals for two steps, and memory for one cell a level at the most.
        """
        at = None
        while self._waiting and at is None:
            waiting = self._waiting.pop()
            depth = level - waiting.level
            usable = waiting.area is not None or not (depth or with_area)
            if depth >= 0 and index >> depth == waiting.index and usable:
                at = waiting
            elif depth >= 0 and index >> depth < waiting.index:
                self._waiting.clear()  # the path is read again from further left
        if at is None:
            at = self._root(with_area or level > 0)
        while at.level < level:
            depth = level - at.level - 1
            right = index >> depth & 1
            pair = self._children(at, with_area or depth > 0)
            if not right:
                self._waiting.append(pair[1])
            at = pair[right]
        return at

    def _root(self, with_area: bool) -> _Cell:
        h = self.t1 - self.t0
        area = self._normal(self._base(0, 0, 1), h / 12) if with_area else None
        return _Cell(0, 0, self._normal(self._base(0, 0, 0), h), area)

    def _children(self, parent: _Cell, with_area: bool) -> tuple[_Cell, _Cell]:
        """The two halves of a cell, whose memory becomes the right one's: nobody else holds it."""
        w, area = parent.w, parent.area
        assert area is not None
        level, index = parent.level + 1, 2 * parent.index
        h = (self.t1 - self.t0) / (1 << level)
        left_w, left_area = torch.empty_like(w) if with_area else area, torch.empty_like(w) if with_area else None
        bases = [self._base(level, parent.index, component) for component in range(1 + with_area)]

        def some(rows: slice) -> None:
            # The path's deviation at the middle: 1.5 H + z / 2, z ~ N(0, h / 2).
            z = self._normal(bases[0][rows], h / 2)
            left = torch.add(w[rows], area[rows], alpha=3, out=left_w[rows]).lerp_(z, 0.5)
            torch.sub(w[rows], left, out=w[rows])
            if left_area is not None:
                # H_left = (H - z) / 4 + n and H_right = (H - z) / 4 - n, n ~ N(0, h / 24).
                n = self._normal(bases[1][rows], h / 24)
                left = torch.add(n, torch.sub(area[rows], z, out=z), alpha=0.25, out=left_area[rows])
                torch.sub(left, n, alpha=2, out=area[rows])

        _by_rows(some, len(w), (w.shape[1] + 1) // 2, w.device)
        return _Cell(level, index, left_w, left_area), _Cell(level, index + 1, w, area if with_area else None)

    def forget(self) -> None:
        """Give back the memory of the cells that wait; they are computed anew when they are asked for."""
        self._waiting.clear()

    def _base(self, level: int, index: int, component: int) -> Tensor:
        """The path's keys, with the address of one component of a cell mixed in."""
        return _absorb(self.keys, _fold((self.block, level, index, component)))

    def _normal(self, base: Tensor, variance: float) -> Tensor:
        return _draw(base, self._shape[1], self._dtype, math.sqrt(variance))

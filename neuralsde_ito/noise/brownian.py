"""The Brownian path of one block: a binary tree of increments and areas, made of addressed normals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torchsde
from torch import Tensor

from ..kernels import Rectifier
from ..validation import ItoError
from .keys import absorb, fold_address, fold_addresses
from .normals import add_normals, by_rows, scaled_normals

_LEVELS = 20  # a block is never cut finer than 2**20 steps
_RUN = 16  # neighbouring bridges of a level whose addresses are mixed into the keys by one call


@dataclass(frozen=True, slots=True)
class _Cell:
    """The path over cell ``index`` of ``2**level``: ``W (N, size)`` and, where it is needed, ``H (N, size)``."""

    level: int
    index: int
    W: Tensor
    H: Tensor | None


def _refuse_transforms(keys: Tensor) -> None:
    if torch.jit.is_tracing() or torch._C._functorch.is_batchedtensor(keys):
        raise ItoError(
            "Only Euler with one step a block can be traced, or mapped over keys by torch.func; recast with "
            "solver='euler', steps=1."
        )


class BrownianPath(torchsde.BaseBrownian):
    """One Brownian path a key over one block ``[t0, t1]``, the same at every step size.

    Over an interval ``[a, b]`` of length ``h`` three numbers describe the path ``B``:

    - the increment ``W = B(b) - B(a)``, of variance ``h``;
    - the space-time Lévy area ``H``: the mean over ``[a, b]`` of ``B(s) - B(a) - (s - a) / h * W``, the path's
      distance from its chord. Its variance is ``h / 12``, and it is independent of ``W``;
    - ``U``, the integral of ``B(s) - B(a)`` over ``[a, b]``: ``U = h (W / 2 + H)``.

    The path is a binary tree of cells. Level 0 is the whole block. Level ``l`` has ``2**l`` cells of equal length;
    the halves of a cell are the next level, and a Brownian bridge gives their ``W`` and ``H`` from the cell's::

        W_left  = W / 2 + 3 H / 2 + z / 2      W_right = W - W_left        z ~ N(0, h / 4)
        H_left  = (H - z) / 4 + n              H_right = (H - z) / 4 - n   n ~ N(0, h / 48)

    with ``z`` and ``n`` independent of everything before (Foster, Lyons, Oberhauser 2020,
    https://doi.org/10.1137/19M1261912; diffrax's virtual Brownian tree uses the same bridge). The increments of a
    coarse step are therefore the sums of the fine ones, and one path serves every solver and every step size. One
    step a block costs one normal per element, because ``H`` is only drawn where it is needed.

    It answers torchsde's queries: ``bm(ta, tb)`` is ``W``, ``bm(ta, tb, return_U=True)`` is ``(W, U)``; shapes
    ``(N, size)``.

    Args:
        keys: int64 ``(N,)``.
        size: elements of the state, flattened.
        block: the number of the block, counted through the whole network.
        t0, t1: its interval.
        dtype: of ``W``, ``H`` and ``U``.
    """

    def __init__(
        self, keys: Tensor, size: int, block: int, t0: float, t1: float, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.keys, self.block, self.t0, self.t1 = keys, block, float(t0), float(t1)
        self._shape, self._dtype = torch.Size((keys.shape[0], size)), dtype
        self._waiting: list[_Cell] = []  # cells to the right of the last one read; the next one is at the end
        self._runs: dict[int, tuple[int, Tensor]] = {}  # by level: the run of bridges last read, and its addressed keys

    def __repr__(self) -> str:
        return f"BrownianPath(block={self.block}, t0={self.t0}, t1={self.t1}, shape={tuple(self._shape)})"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of ``W``."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """The device of the keys, and so of the path."""
        return self.keys.device

    @property
    def shape(self) -> torch.Size:
        """``(N, size)``."""
        return self._shape

    @property
    def levy_area_approximation(self) -> str:
        """The area that this path offers to torchsde: ``H``."""
        return "space-time"

    def __call__(self, ta, tb=None, return_U=False, return_A=False):
        """``W`` (or ``(W, U)``) over ``[ta, tb]``, whose ends must lie on the dyadic grid of the block.

        Raises:
            ItoError: an end that is not on the grid, or ``return_A`` (a diagonal SDE needs no Lévy area).
        """
        _refuse_transforms(self.keys)
        if return_A:
            raise ItoError("BrownianPath has no space-space Lévy area; diagonal noise does not need it.")
        ta, tb = (self.t0, float(ta)) if tb is None else (float(ta), float(tb))
        first, last = self._grid(ta), self._grid(tb)
        if first > last:
            raise ItoError(f"An interval must not end before it begins, got [{ta}, {tb}].")
        if first == last:  # by rounding, torchsde's last step may have no length
            zeros = torch.zeros(self._shape, dtype=self._dtype, device=self.device)
            return (zeros, zeros.clone()) if return_U else zeros
        total: tuple[Tensor, Tensor] | None = None
        while first < last:  # the interval is the union of the fewest cells
            width = first & -first or 1 << _LEVELS
            while first + width > last:
                width //= 2
            level = _LEVELS - width.bit_length() + 1
            if not return_U and first + width == last and total is None:
                return self.increment(level, first // width)
            h = width * (self.t1 - self.t0) / (1 << _LEVELS)
            W, H = self.cell(level, first // width)
            U = H.add_(W, alpha=0.5).mul_(h)  # U = h (W / 2 + H); H is ours to overwrite
            total = (W, U) if total is None else (total[0] + W, total[1] + U + h * total[0])
            first += width
        assert total is not None
        return total if return_U else total[0]

    def _grid(self, t: float) -> int:
        """The time as a whole number of the finest cells' lengths."""
        position = (t - self.t0) / (self.t1 - self.t0) * (1 << _LEVELS)
        if abs(position - round(position)) > 1e-3 or not 0 <= round(position) <= 1 << _LEVELS:
            raise ItoError(
                f"Time {t} is not on the dyadic grid of the block [{self.t0}, {self.t1}]: "
                "use a step that is the block's length divided by a power of two."
            )
        return round(position)

    def add_to(self, x: Tensor, sigma: float, in_place: bool = False, relu: Rectifier | None = None) -> Tensor:
        """``x + sigma W`` over the whole block, for states ``(N, ...)``, as `add_normals` adds and rectifies."""
        scale = sigma * math.sqrt(self.t1 - self.t0)
        return add_normals(x, self.keys, scale, self.block, 0, 0, 0, in_place=in_place, relu=relu)

    def increment(self, level: int, index: int) -> Tensor:
        """``W`` over cell ``index`` of ``2**level``: ``(N, size)``. Skips the normals that only ``H`` needs."""
        _refuse_transforms(self.keys)
        return self._read(level, index, with_area=False).W

    def cell(self, level: int, index: int) -> tuple[Tensor, Tensor]:
        """``(W, H)`` over cell ``index`` of ``2**level``: two tensors ``(N, size)``."""
        cell = self._read(level, index, with_area=True)
        assert cell.H is not None
        return cell.W, cell.H

    def _read(self, level: int, index: int, with_area: bool) -> _Cell:
        """Cell ``index`` of ``2**level``: by bridges from a waiting cell that contains it, or from the root.

        The right halves of the cells on the way wait, because they are probably read next; a cell that was read is
        not kept. Reading the finest cells from left to right therefore costs three normals for two steps, and memory
        for one cell a level at most.
        """
        cell = None
        while self._waiting and cell is None:
            waiting = self._waiting.pop()
            depth = level - waiting.level
            usable = waiting.H is not None or not (depth or with_area)
            if depth >= 0 and index >> depth == waiting.index and usable:
                cell = waiting
            elif depth >= 0 and index >> depth < waiting.index:
                self._waiting.clear()  # the path is read again from further left
        if cell is None:
            cell = self._root(with_area or level > 0)
        while cell.level < level:
            depth = level - cell.level - 1
            left, right = self._halves(cell, with_area or depth > 0)
            if index >> depth & 1:
                cell = right
            else:
                self._waiting.append(right)
                cell = left
        return cell

    def _root(self, with_area: bool) -> _Cell:
        h = self.t1 - self.t0
        H = self._normals(self._address(0, 0, 1), h / 12) if with_area else None
        return _Cell(0, 0, self._normals(self._address(0, 0, 0), h), H)

    def _halves(self, cell: _Cell, with_area: bool) -> tuple[_Cell, _Cell]:
        """Both halves of a cell by the bridge; the right half takes over the cell's memory."""
        W, H = cell.W, cell.H
        assert H is not None
        level, index = cell.level + 1, 2 * cell.index
        h = (self.t1 - self.t0) / (1 << cell.level)
        W_left, H_left = torch.empty_like(W) if with_area else H, torch.empty_like(W) if with_area else None
        addresses = self._bridge_addresses(level, cell.index, with_area)

        def bridge(rows: slice) -> None:
            z = self._normals(addresses[0][rows], h / 4)
            left = torch.add(W[rows], H[rows], alpha=3, out=W_left[rows]).lerp_(z, 0.5)  # (W + 3 H) / 2 + z / 2
            torch.sub(W[rows], left, out=W[rows])
            if H_left is not None:
                n = self._normals(addresses[1][rows], h / 48)
                left = torch.add(n, torch.sub(H[rows], z, out=z), alpha=0.25, out=H_left[rows])  # n + (H - z) / 4
                torch.sub(left, n, alpha=2, out=H[rows])

        by_rows(bridge, len(W), (W.shape[1] + 1) // 2, W.device)
        return _Cell(level, index, W_left, H_left), _Cell(level, index + 1, W, H if with_area else None)

    def forget(self) -> None:
        """Free the memory of the cells that wait; they are computed again when they are read."""
        self._waiting.clear()
        self._runs.clear()

    def _address(self, level: int, index: int, component: int) -> Tensor:
        """The path's keys, with the address of normals mixed in.

        Component 0 is ``W`` of the whole block, or ``z`` of a bridge; component 1 is ``H``, or ``n``. A bridge has the
        level of the two halves and the index of the cell that it splits.
        """
        return absorb(self.keys, fold_address((self.block, level, index, component)))

    def _bridge_addresses(self, level: int, index: int, with_area: bool) -> Sequence[Tensor]:
        """The addressed keys of a bridge, by component; component 1 may be left out without ``with_area``.

        A level of many bridges is mostly read from left to right: neighbours are addressed together. One by one, their
        small operations would cost more than the normals of a small state, and `fold_address` keeps fewer addresses
        than a fine path has.
        """
        components = range(1 + with_area)
        if 1 << level <= _RUN:
            return [self._address(level, index, component) for component in components]
        # The addresses of a run must not take more memory than a state: two int64 a bridge, four bytes a number.
        if self._shape[1] < 4 * _RUN:
            fold = fold_address.__wrapped__  # which keeps nothing
            return [absorb(self.keys, fold((self.block, level, index, component))) for component in components]
        run, place = divmod(index, _RUN)
        if level not in self._runs or self._runs[level][0] != run:
            indices = torch.arange(run * _RUN, (run + 1) * _RUN, device=self.device)
            addresses = fold_addresses((self.block, level), indices, torch.arange(2, device=self.device))
            self._runs[level] = run, absorb(self.keys, addresses[..., None])
        return self._runs[level][1][place].unbind()

    def _normals(self, addressed: Tensor, variance: float) -> Tensor:
        return scaled_normals(addressed, self._shape[1], self._dtype, math.sqrt(variance))

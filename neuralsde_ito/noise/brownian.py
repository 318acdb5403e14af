"""The Brownian path of one block, on a dyadic tree of normals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torchsde
from torch import Tensor

from ..validation import ItoError
from .keys import _absorb, _fold
from .normals import _by_rows, _draw, add_normals

_LEVELS = 20  # a block is never cut finer than 2**20 steps


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

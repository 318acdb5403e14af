"""The images under attack, with their labels and names, as one value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import Split


@dataclass(frozen=True, eq=False)
class Images:
    """``N`` images under attack.

    Attributes:
        x: ``(N, C, H, W)`` in [0, 1].
        y: int64 ``(N,)``, the true labels.
        index: int64 ``(N,)``, the images' names in the noise's address.
    """

    x: Tensor
    y: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Tensor | slice) -> Images:
        """Some of the images, by their positions."""
        return Images(self.x[rows], self.y[rows], self.index[rows])

    def to(self, device: torch.device | str) -> Images:
        """The same images on a device."""
        return Images(self.x.to(device), self.y.to(device), self.index.to(device))

    def batches(self, size: int) -> list[Images]:
        """The images in order, at most ``size`` at a time."""
        return [self[slice(first, first + size)] for first in range(0, len(self), size)]

    @classmethod
    def of(cls, split: Split, batch_size: int = 250, device: torch.device | str = "cpu") -> Images:
        """All images of a split, in its order: made on ``device`` (rounding can differ by device), kept on the CPU."""
        batches = split.batches(batch_size, torch.device(device))
        return cls.join([cls(x, y, index).to("cpu") for index, x, y in batches])

    @classmethod
    def join(cls, parts: Sequence[Images]) -> Images:
        """Several batches as one."""
        x, y, index = (torch.cat([getattr(part, name) for part in parts]) for name in ("x", "y", "index"))
        return cls(x, y, index)

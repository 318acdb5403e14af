"""Pieces of work: a training, or something done with one block of test images; each is named by what determines it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .declared import DataName

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Block:
    """A block of test images: number ``number`` of the first ``count`` images of a data set (a fixed choice)."""

    data: DataName
    count: int
    number: int


@dataclass(frozen=True)
class Work:
    """How much a piece costs, roughly: inferences of a member with and without a gradient, images of training steps."""

    gradients: float = 0
    queries: float = 0
    trained: float = 0


@dataclass(frozen=True, eq=False)
class Piece:
    """A piece of work. Two pieces with the same name have the same result.

    Attributes:
        kind: ``resnet``, ``member``, ``attack``, ``vote``, ``untrained``, ``sweep``, ``suite``, ``paths``, ``gallery``
            or ``density``.
        title: for people.
        inputs: what determines the result beside ``needs``; as JSON has it.
        needs: the pieces whose results it uses.
        make: does the work.
        work: what it costs.
        network: the architecture that it runs, by name.
        system: the networks that it runs, by name: the architecture and omega.
        file: a file that it makes beside its tensors: trained weights.
        block: the number of its block of images.
    """

    kind: str
    title: str
    inputs: Mapping[str, Any]
    needs: tuple[Piece, ...]
    make: Callable[[], Tensors] = field(repr=False)
    work: Work
    network: str
    system: str
    file: Path | None = None
    block: int = -1

    @cached_property
    def name(self) -> str:
        """The kind, and a digest of all that determines the result."""
        content = [self.kind, self.inputs, [piece.name for piece in self.needs]]
        return f"{self.kind}-{hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]}"


def in_order(pieces: Iterable[Piece]) -> list[list[Piece]]:
    """Pieces and all that they need, each once, in stages: a piece needs only pieces of the stages before its own."""
    stage: dict[str, int] = {}
    found: dict[str, Piece] = {}

    def visit(piece: Piece) -> int:
        if piece.name not in stage:
            found[piece.name] = piece
            stage[piece.name] = 1 + max((visit(need) for need in piece.needs), default=-1)
        return stage[piece.name]

    last = max((visit(piece) for piece in pieces), default=-1)
    return [[found[name] for name, at in stage.items() if at == number] for number in range(last + 1)]


def dealt(pieces: Sequence[Piece], seconds: Callable[[Piece], float], rank: int, size: int) -> list[Piece]:
    """The pieces of one stage that process ``rank`` of ``size`` does.

    The dearest are dealt out first, each to the least busy process. A process does those of one system and one block of
    images one after the other, so that it reads them once.
    """
    busy, mine = [0.0] * size, []
    for piece in sorted(pieces, key=seconds, reverse=True):
        least = busy.index(min(busy))
        busy[least] += seconds(piece)
        if least == rank:
            mine.append(piece)
    return sorted(mine, key=lambda piece: (piece.system, piece.block))


def joined(parts: Sequence[Tensors], index: Tensor, column: str, dim: int = 0) -> Tensor:
    """A column of several blocks end to end along ``dim``, checked to hold the images ``index`` ``(N,)``, each once.

    Raises:
        RuntimeError: some image is missing or there twice.
    """
    names = torch.cat([part["index"] for part in parts])
    if not torch.equal(names, index):
        raise RuntimeError("The pieces of a result do not hold each image exactly once.")
    return torch.cat([part[column] for part in parts], dim)

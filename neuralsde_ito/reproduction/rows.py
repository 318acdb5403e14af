"""Rows of tables: what one protocol leaves right, beside the paper's number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..outcomes import ABSTAIN, Outcomes, Paired, Rate
from .declared import Cell
from .laboratory import Laboratory
from .pieces import Piece, joined
from .protocols import Protocol


@dataclass(frozen=True)
class Judged:
    """One row: the decisions on the images of one protocol.

    Attributes:
        protocol: what was done.
        group: ``clean``, ``weak``, ``default``, ``suite`` or ``resnet``.
        pieces: those that hold the decisions, one for each block of images.
        correct, abstained: the columns of decisions from which accuracy and correct + abstained follow. They differ
            where denial and evasion are attacked apart.
        abstentions_right: whether an abstention counts as a right answer in the accuracy too.
    """

    protocol: Protocol
    group: str
    pieces: tuple[Piece, ...]
    correct: str = "labels"
    abstained: str = "labels"
    abstentions_right: bool = False

    def right(self, lab: Laboratory, index: Tensor) -> tuple[Tensor, Outcomes, Rate]:
        """Which images are right, bool ``(N,)``; the outcomes for accuracy; and the rate correct + abstained."""
        parts = [lab.read(piece) for piece in self.pieces]
        truth, labels = joined(parts, index, "truth"), joined(parts, index, self.correct)
        if self.abstentions_right:
            labels = torch.where(labels == ABSTAIN, truth, labels)
        both = Outcomes.of(joined(parts, index, self.abstained), truth).rate("correct", "abstained")
        return labels == truth, Outcomes.of(labels, truth), both


@dataclass(frozen=True)
class Situation:
    """A block of a table: rows about the same images, and the paper's numbers.

    Attributes:
        title: such as ``linf, eps 8/255, omega 0.2, PGD``.
        cell: the paper's numbers.
        rows: what was measured; ``resnet`` is the original ResNet under its own strongest attack.
        resnet: see ``rows``.
        index: int64 ``(N,)``, the images' names.
    """

    title: str
    cell: Cell
    rows: tuple[Judged, ...]
    resnet: Judged
    index: Tensor

    @property
    def pieces(self) -> list[Piece]:
        """All pieces of work that the block needs."""
        return [piece for row in (*self.rows, self.resnet) for piece in row.pieces]

    def results(self, lab: Laboratory) -> dict[str, Any]:
        """The block, ready for JSON."""
        compared, *_ = self.resnet.right(lab, self.index)
        rows = [self._row(lab, row, compared) for row in (*self.rows, self.resnet)]
        cell = self.cell
        paper = {name: getattr(cell, name) for name in ("correct", "correct_abstained", "resnet")}
        return {
            "title": self.title,
            "norm": cell.norm,
            "eps": cell.eps,
            "omega": cell.omega,
            "attack": cell.attack.upper() if cell.norm else None,
            "network": cell.network,
            "paper": {name: value / 100 for name, value in paper.items() if value is not None},
            "rows": rows,
            "nearest": nearest_row(rows, cell.correct) if cell.norm else None,
        }

    def _row(self, lab: Laboratory, row: Judged, compared: Tensor) -> dict[str, Any]:
        right, outcomes, both = row.right(lab, self.index)
        attacks = [need for piece in row.pieces for need in piece.needs if need.kind == "attack"]
        return {
            "protocol": row.protocol.name,
            "group": row.group,
            "title": row.protocol.title,
            "why": row.protocol.why,
            "n": outcomes.n,
            "correct": triple(outcomes.rate("correct")),
            "correct_abstained": triple(both),
            "p": None if row is self.resnet else Paired.of(compared, right).p,
            "records": [piece.name for piece in (*attacks, *row.pieces)],
        }


def triple(rate: Rate) -> list[float]:
    """A rate and its 95 % interval, for JSON."""
    return [rate.value, rate.low, rate.high]


def nearest_row(rows: Sequence[Mapping[str, Any]], paper: float | None) -> dict[str, Any] | None:
    """Which row comes nearest to the paper's accuracy in per cent, and whether that lies in the row's interval."""
    if paper is None:
        return None
    of_ensemble = [row for row in rows if row["group"] != "resnet"]
    row = min(of_ensemble, key=lambda row: abs(100 * row["correct"][0] - paper))
    value, low, high = (100 * number for number in row["correct"])
    near, difference = low <= paper <= high, value - paper
    side = f"{abs(difference):.1f} points {'above' if difference >= 0 else 'below'} the paper"
    found = f"{row['title']}: {value:.1f} %, {side}"
    return {
        "protocol": row["protocol"],
        "title": row["title"],
        "counted": "correct",
        "value": value / 100,
        "difference": difference / 100,
        "near": near,
        "sentence": found if near else f"none; the nearest is {found}",
    }

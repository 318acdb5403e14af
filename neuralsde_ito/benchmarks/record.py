"""Rows of a benchmark, the record that keeps them, and which ratios have moved since a recorded run.

A record is read before anything is measured, so this file imports no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..validation import ItoError, shown

FORMAT = 1  # of a record
PARTS = ("inference", "vote", "path", "attack", "suite", "training", "memory")


@dataclass(frozen=True)
class Row:
    """One line of a benchmark.

    Attributes:
        part: a name in `PARTS`.
        name: what was measured.
        seconds: the median over repeats; in MiB where the part is ``memory``.
        ratio: to the part's first row: the median over repeats of the ratio within a repeat.
        cold: seconds of the first call, with whatever it compiles; None: not of interest.
        note: a remark for the table.
        quartiles: the first and the third of the ratio over repeats; None: it was measured once.
    """

    part: str
    name: str
    seconds: float
    ratio: float
    cold: float | None = None
    note: str = ""
    quartiles: tuple[float, float] | None = None


@dataclass(frozen=True)
class Record:
    """What ``ito-sde bench --json`` has written.

    Attributes:
        path: the file.
        network, machine, date: what was measured, where and when.
        settings: numbers on which ratios depend, by name.
        rows: the measurements.
    """

    path: Path
    network: str
    machine: str
    date: str
    settings: Mapping[str, Any]
    rows: tuple[Row, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that were measured, in order."""
        return tuple(dict.fromkeys(row.part for row in self.rows))

    def check(self, parts: Sequence[str], settings: Mapping[str, Any]) -> None:
        """Refuse a run that cannot be compared with this one.

        Args:
            parts: that it measures; the record may have more.
            settings: that these parts obey.

        Raises:
            ItoError: the record lacks a part, or has another setting.
        """
        if missing := [part for part in parts if part not in self.parts]:
            raise ItoError(
                f"The record {shown(str(self.path))} has no part {missing[0]!r}; give only parts that it has: "
                f"{' '.join(f'--part {part}' for part in self.parts)}."
            )
        for name, value in settings.items():
            if (recorded := self.settings.get(name)) != value:
                raise ItoError(
                    f"The record {shown(str(self.path))} was made with {name} {recorded}, this run has {value}: "
                    "give the same."
                )


def read_record(path: Path) -> Record:
    """The record in a file.

    Raises:
        ItoError: the file cannot be read, is no record, or is one of another version.
    """
    name = shown(str(path))
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ItoError(f"The record {name} cannot be read: {str(error.strerror).lower()}.") from None
    except ValueError:  # not JSON, or not text
        content = None
    if not isinstance(content, dict) or content.get("command") != "bench":
        raise ItoError(f"{name} is no record of a benchmark; make one: ito-sde bench --json > FILE.")
    if content.get("format") != FORMAT:
        raise ItoError(
            f"The record {name} is of another version of ito-sde; make it again with this one: "
            "ito-sde bench --json > FILE."
        )
    try:
        rows = tuple(map(_row, content["rows"]))
        network, machine, date = (str(content[key]) for key in ("network", "machine", "date"))
        return Record(path, network, machine, date, dict(content["settings"]), rows)
    except (KeyError, TypeError, ValueError):
        raise ItoError(f"The record {name} is damaged; make it again: ito-sde bench --json > FILE.") from None


def _row(written: Mapping[str, Any]) -> Row:
    quartiles = written["quartiles"]
    if quartiles is not None:
        first, third = map(float, quartiles)
        quartiles = first, third
    ratio, seconds = float(written["ratio"]), float(written["seconds"])
    if written["part"] not in PARTS or not all(map(math.isfinite, (ratio, seconds, *(quartiles or ())))):
        raise ValueError
    return Row(written["part"], str(written["name"]), seconds, ratio, quartiles=quartiles)


@dataclass(frozen=True)
class Change:
    """A ratio then and now; None where a row is in one of the two runs only.

    Attributes:
        part, name: of the row.
        old, new: the ratios.
        word: ``more`` or ``less``, where the ratio moved beyond the quartiles of both runs; ``new`` or ``gone`` for a
            row of one run; otherwise empty.
    """

    part: str
    name: str
    old: float | None
    new: float | None
    word: str

    @property
    def share(self) -> float | None:
        """By which share of the old ratio it changed; None where that is not known."""
        return None if self.old is None or self.new is None or not self.old else self.new / self.old - 1


def compare_rows(recorded: Sequence[Row], measured: Sequence[Row]) -> list[Change]:
    """What became of each ratio, for the parts that were measured: first the rows measured now, in their order.

    A ratio that was measured once has no quartiles, and is not said to have moved.
    """
    before = {(row.part, row.name): row for row in recorded}
    now = {(row.part, row.name) for row in measured}
    parts = {row.part for row in measured}
    changes = []
    for row in measured:
        old = before.get((row.part, row.name))
        word = "new" if old is None else _moved(old, row)
        changes.append(Change(row.part, row.name, None if old is None else old.ratio, row.ratio, word))
    gone = [row for key, row in before.items() if key not in now and row.part in parts]
    return [*changes, *(Change(row.part, row.name, row.ratio, None, "gone") for row in gone)]


def _moved(old: Row, new: Row) -> str:
    if old.quartiles is None or new.quartiles is None:
        return ""
    if new.ratio > old.quartiles[1] and old.ratio < new.quartiles[0]:
        return "more"
    return "less" if new.ratio < old.quartiles[0] and old.ratio > new.quartiles[1] else ""

"""Results of finished pieces of work, each in a file named by what determines it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from ..files import write_atomically

VERSION = f"1, ito-sde {version('ito-sde')}"  # of what a file means; a file of another version is not used


@dataclass
class Store:
    """A folder of results: ``KIND-DIGEST.safetensors``, tensors with their record in the metadata.

    A file is written whole or not at all, so that a name that exists is a finished piece of work.

    Attributes:
        folder: where the files are.
        refused: names of files that are there and are not used: of another version, or damaged. They are written anew.
    """

    folder: Path
    refused: set[str] = field(default_factory=set)

    def file(self, name: str) -> Path:
        """The file of a piece of work."""
        return self.folder / f"{name}.safetensors"

    def has(self, name: str) -> bool:
        """Whether a usable result is there."""
        return self.record(name) is not None

    def record(self, name: str) -> dict[str, Any] | None:
        """The record of a result; None where there is no usable one."""
        if not self.file(name).is_file():
            return None
        try:
            with safe_open(str(self.file(name)), "pt") as opened:
                metadata = opened.metadata() or {}
            if metadata.get("version") == VERSION:
                return json.loads(metadata["record"])
        except (SafetensorError, OSError, KeyError, ValueError):
            pass
        self.refused.add(name)
        return None

    def read(self, name: str) -> dict[str, Tensor]:
        """The tensors of a result."""
        with safe_open(str(self.file(name)), "pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (it is no mapping)

    def write(self, name: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Keep a result.

        Raises:
            NotWritten: the system refuses it.
        """
        # Copies: safetensors refuses tensors that share memory.
        copies = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
        metadata = {"version": VERSION, "record": json.dumps(record)}
        write_atomically(self.file(name), safetensors_bytes(copies, metadata))

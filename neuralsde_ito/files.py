"""Writing files so that each is written whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from .validation import ItoError, shown


class NotWritten(ItoError, OSError):
    """The system refuses to write a file: no permission, no space, or a folder has that name."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file; its missing folders are made. A kill at any moment leaves the old content or the new one.

    Raises:
        NotWritten: the system refuses it.
    """
    try:
        _write_atomically(path, content)
    except OSError as error:
        raise NotWritten(f"{shown(str(path))} cannot be written: {str(error.strerror or error).lower()}.") from error


def _write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename inside a folder durable, so that a power cut does not undo it. Has no effect on Windows."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of file systems that sync files, but no folders
            raise
    finally:
        os.close(handle)

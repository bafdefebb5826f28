"""Files that are whole or absent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"
"""Ends the name of a file that is being written; one that a killed process left may be removed."""


def share_as_folder(path: Path) -> None:
    """Let those read a file who may read its folder: safetensors writes for the owner alone."""
    path.chmod(path.parent.stat().st_mode & 0o666)


@contextmanager
def written_aside(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Give a file that becomes `path` when the block ends, and never when it does not.

    It is written beside `path` under a hidden name, because renaming is atomic within one file system only. A
    reader, or a kill at any moment, sees the old file or the new one, never a part. A `durable` file also
    survives a loss of power; what is rewritten every second need not.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with open(partial, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
        if durable:
            make_durable(path.parent)
    except BaseException:  # an interrupt too
        partial.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str, *, durable: bool = True) -> None:
    """Write `text` so that the old file or the new one is there, never a part (see `written_aside`)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path, durable=durable) as file:
        file.write(text.encode())


def make_durable(path: Path) -> None:
    """Make a file, or the names in a folder, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

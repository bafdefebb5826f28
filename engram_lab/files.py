"""Files that are whole or absent."""

from __future__ import annotations

import os
from pathlib import Path


def share_as_folder(path: Path) -> None:
    """Let those read a file who may read its folder: safetensors writes for the owner alone."""
    path.chmod(path.parent.stat().st_mode & 0o666)


def write_atomically(path: Path, text: str, *, durable: bool = True) -> None:
    """Write `text` so that a reader, or a kill at any moment, sees the old file or the new one, never a part.

    A `durable` file also survives a loss of power; what is rewritten every second need not.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:  # an interrupt too
        partial.unlink(missing_ok=True)
        raise

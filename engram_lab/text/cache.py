"""A folder that is either absent or finished, made by one process at a time."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from engram_lab.errors import UserError
from engram_lab.files import make_durable

_UNFINISHED = ".building-"


def build_once(entry: Path, build: Callable[[Path], None], waiting: Callable[[], None]) -> None:
    """Make sure the folder `entry` exists, calling `build` on an empty folder if it does not.

    What `build` wrote reaches the disk before it gets its name, so a process killed at any moment leaves no
    folder that looks finished. Others that ask for the same entry wait for the first; the unfinished folders
    of killed processes are removed.

    Args:
        entry: The folder; its parent is made where missing.
        build: Fills the folder it is given. What it raises passes through, and the folder is removed.
        waiting: Called once if another process is building the same entry.

    Raises:
        UserError: the cache cannot be written.
    """
    cache = entry.parent
    with _user_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        with _lock(entry, waiting):
            if entry.exists():
                return
            _remove_unfinished(entry)
            folder = Path(tempfile.mkdtemp(prefix=f".{entry.name}{_UNFINISHED}", dir=cache))
            try:
                build(folder)
                folder.chmod(0o755)
                for path in [*folder.iterdir(), folder]:
                    make_durable(path)
                folder.rename(entry)
                make_durable(cache)
            finally:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _user_errors(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cache_dir = {str(cache)!r} cannot be written: {error.strerror or error}."
        ) from error


@contextmanager
def _lock(entry: Path, waiting: Callable[[], None] | None) -> Iterator[None]:
    """Hold the entry's lock, which dies with the process. Without `waiting`, a taken lock is an error."""
    descriptor = os.open(entry.parent / f".{entry.name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is None:
                raise
            waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # and so unlocks


def _remove_unfinished(entry: Path) -> None:
    """Remove what killed builds left, of this entry (whose lock is held) and of others nobody is building."""
    for folder in entry.parent.glob(f".*{_UNFINISHED}*"):
        owner = entry.with_name(folder.name[1:].split(_UNFINISHED)[0])
        if owner == entry:
            shutil.rmtree(folder, ignore_errors=True)
            continue
        try:
            with _lock(owner, None):
                shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            continue

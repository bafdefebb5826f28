"""Which rows of a file updated in place were written since a checkpoint: append-only, before the rows.

There is one log per checkpoint, `<file>.written-<number>`, holding what was written after it and before the
next. Log and rows may both be in the page cache only: a kill loses neither, a loss of power any part of
either. So a log says in which boot of the machine it was written, and is believed after a loss of power only
if it had been closed, rows and all, before.

    128 bytes: id of the boot, or "closed"; digest of the checkpoint's name | row numbers, int64
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from numba import njit
from torch import Tensor

START = 128
CLOSED = "closed"


class WrittenLog:
    """The logs beside one file of `rows` rows; a row is logged once in each. Nothing is logged without one.

    Logs that cannot be believed are removed when this is made.
    """

    def __init__(self, file: Path, rows: int) -> None:
        self._folder, self._prefix = file.parent, f"{file.name}.written-"
        self._logged = np.zeros(-(-rows // 8), dtype=np.uint8)
        self._descriptor: int | None = None
        for number in self._numbers():
            if self._path(number).stat().st_size < START:  # killed while it was begun
                self._path(number).unlink()
        numbers = self._numbers()
        if numbers and self._start(numbers[-1])[0] in (CLOSED, _boot()):
            self._append_to(numbers[-1], self._start(numbers[-1])[1])
            _unlogged(self._read(numbers[-1]), self._logged)
        else:
            self.forget()

    @staticmethod
    def memory_bytes(rows: int) -> int:
        """Bytes of memory that the log of a file of `rows` rows takes."""
        return -(-rows // 8)

    def mark(self, checkpoint: str) -> None:
        """Begin the log of what is written after `checkpoint`; those before are kept."""
        number = max(self._numbers(), default=0) + 1
        self._append_to(number, _digest(checkpoint))
        self._logged[:] = 0

    def only(self, checkpoint: str) -> None:
        """Forget what was written before `checkpoint`, which is marked if it has not been."""
        numbers = self._numbers()
        if not numbers or self._start(numbers[-1])[1] != _digest(checkpoint):
            self.mark(checkpoint)
        for number in self._numbers()[:-1]:
            self._path(number).unlink()

    def forget(self) -> None:
        """Remove all logs, and log nothing until the next mark."""
        self._end()
        for number in self._numbers():  # oldest first: a kill must not leave an old log without what followed
            self._path(number).unlink()

    def add(self, ids: np.ndarray) -> None:
        """Log rows; OSError when the disk is full."""
        if self._descriptor is None:
            return
        data = memoryview(_unlogged(ids, self._logged).tobytes())
        while data:
            data = data[os.write(self._descriptor, data) :]

    def since(self, checkpoints: Collection[str]) -> Tensor | None:
        """Return rows written since the newest of these was marked, int64 ascending; None if none was."""
        wanted = {_digest(checkpoint) for checkpoint in checkpoints}
        numbers = self._numbers()
        marked = [number for number in numbers if self._start(number)[1] in wanted]
        if not marked:
            return None
        logs = [self._read(number) for number in numbers if number >= marked[-1]]
        return torch.from_numpy(np.unique(np.concatenate(logs)))

    def close(self, *, durable: bool) -> None:
        """End logging; `durable` says that the rows would survive a loss of power."""
        if self._descriptor is not None and durable:
            os.fsync(self._descriptor)
            os.pwrite(self._descriptor, CLOSED.ljust(START // 2).encode(), 0)
            os.fsync(self._descriptor)
        self._end()

    def _append_to(self, number: int, digest: str) -> None:
        self._end()
        self._descriptor = os.open(self._path(number), os.O_RDWR | os.O_CREAT, 0o644)
        half = START // 2
        os.pwrite(self._descriptor, (_boot().ljust(half) + digest.ljust(half)).encode(), 0)
        size = os.fstat(self._descriptor).st_size
        os.ftruncate(self._descriptor, size - (size - START) % 8)  # a number cut off: its row was not written
        os.lseek(self._descriptor, 0, os.SEEK_END)

    def _end(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _start(self, number: int) -> tuple[str, str]:
        with self._path(number).open("rb") as file:
            text = file.read(START).decode("ascii", "replace")
        return text[: START // 2].strip(), text[START // 2 :].strip()

    def _read(self, number: int) -> np.ndarray:
        data = self._path(number).read_bytes()
        return np.frombuffer(data, dtype="<i8", offset=START, count=(len(data) - START) // 8)

    def _numbers(self) -> list[int]:
        names = (path.name for path in self._folder.glob(f"{self._prefix}*"))
        return sorted(int(name[len(self._prefix) :]) for name in names)

    def _path(self, number: int) -> Path:
        return self._folder / f"{self._prefix}{number}"


def _digest(checkpoint: str) -> str:
    return hashlib.blake2b(checkpoint.encode(), digest_size=16).hexdigest()


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@njit(nogil=True, cache=True)
def _unlogged(ids: np.ndarray, logged: np.ndarray) -> np.ndarray:
    """Return those of `ids` without a bit in `logged`, and set it."""
    news = np.empty(len(ids), dtype=np.int64)
    count = 0
    for row in ids:
        bit = np.uint8(1 << (row & 7))
        if not logged[row >> 3] & bit:
            logged[row >> 3] |= bit
            news[count] = row
            count += 1
    return news[:count]

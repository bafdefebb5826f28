"""Which rows of a file updated in place were written since a checkpoint: append-only, before the rows.

There is one log per checkpoint, `<file>.written-<number>`, holding what was written after it and before the
next. Log and rows may both be in the page cache only: a kill loses neither, a loss of power any part of
either. So a log says in which boot of the machine it was written, and is believed after a loss of power only
if it had been closed, rows and all, before. One that has lost or changed row numbers is not believed either.

    64 bytes: id of the boot, or "closed" | 48: digest of the checkpoint's name | k, CRC-32 of the first k
    | row numbers, int64: k, and those that were added when the process was killed
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from numba import njit
from torch import Tensor

BOOT, NOTE_AT, START = 64, 112, 128
NOTE = struct.Struct("<QQ")
CLOSED = "closed"


class WrittenLog:
    """The logs beside one file of `rows` rows; a row is logged once in each. Nothing is logged without one.

    Logs that cannot be believed are removed when this is made.
    """

    def __init__(self, file: Path, rows: int) -> None:
        self._folder, self._prefix = file.parent, f"{file.name}.written-"
        self._rows, self._logged = rows, np.zeros(-(-rows // 8), dtype=np.uint8)
        self._descriptor: int | None = None
        self._noted = (0, 0)
        for number in self._numbers():
            if self._path(number).stat().st_size < START:  # killed while it was begun
                self._path(number).unlink()
        numbers = self._numbers()
        known = None
        if numbers and self._start(numbers[-1])[0] in (CLOSED, _boot()):
            known = self._read(numbers[-1])
        if known is None:
            self.forget()
        else:
            self._append_to(numbers[-1], self._start(numbers[-1])[1], known)
            _unlogged(known, self._logged)

    @staticmethod
    def memory_bytes(rows: int) -> int:
        """Bytes of memory that the log of a file of `rows` rows takes."""
        return -(-rows // 8)

    def mark(self, checkpoint: str) -> None:
        """Begin the log of what is written after `checkpoint`; those before are kept."""
        number = max(self._numbers(), default=0) + 1
        self._append_to(number, _digest(checkpoint), np.empty(0, dtype=np.int64))
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
        count, checksum = self._noted
        noted = count + len(data) // 8, zlib.crc32(data, checksum)
        while data:
            data = data[os.write(self._descriptor, data) :]
        self._note(noted)

    def since(self, checkpoints: Collection[str]) -> Tensor | None:
        """Return rows written since the newest of these was marked, int64 ascending.

        None if none was, or if what was written since cannot be told.
        """
        wanted = {_digest(checkpoint) for checkpoint in checkpoints}
        numbers = self._numbers()
        marked = [number for number in numbers if self._start(number)[1] in wanted]
        if not marked:
            return None
        logs = [self._read(number) for number in numbers if number >= marked[-1]]
        whole = [log for log in logs if log is not None]
        return torch.from_numpy(np.unique(np.concatenate(whole))) if len(whole) == len(logs) else None

    def close(self, *, durable: bool) -> None:
        """End logging; `durable` says that the rows would survive a loss of power."""
        if self._descriptor is not None and durable:
            os.fsync(self._descriptor)
            os.pwrite(self._descriptor, CLOSED.ljust(BOOT).encode(), 0)
            os.fsync(self._descriptor)
        self._end()

    def _append_to(self, number: int, digest: str, known: np.ndarray) -> None:
        """Go on with a log of the rows `known`."""
        self._end()
        self._descriptor = os.open(self._path(number), os.O_RDWR | os.O_CREAT, 0o644)
        os.pwrite(self._descriptor, (_boot().ljust(BOOT) + digest.ljust(NOTE_AT - BOOT)).encode(), 0)
        self._note((len(known), zlib.crc32(known.tobytes())))
        os.ftruncate(self._descriptor, START + 8 * len(known))  # a number cut off: its row was not written
        os.lseek(self._descriptor, 0, os.SEEK_END)

    def _note(self, noted: tuple[int, int]) -> None:
        """Write how many rows there are, and their checksum."""
        assert self._descriptor is not None
        os.pwrite(self._descriptor, NOTE.pack(*noted), NOTE_AT)
        self._noted = noted

    def _end(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _start(self, number: int) -> tuple[str, str]:
        with self._path(number).open("rb") as file:
            text = file.read(NOTE_AT).decode("ascii", "replace")
        return text[:BOOT].strip(), text[BOOT:].strip()

    def _read(self, number: int) -> np.ndarray | None:
        """Return the rows of a log; None if some were lost or changed."""
        data = memoryview(self._path(number).read_bytes())
        count, checksum = NOTE.unpack_from(data, NOTE_AT)
        rows = np.frombuffer(data, dtype="<i8", offset=START, count=(len(data) - START) // 8)
        if len(rows) < count or zlib.crc32(rows[:count].tobytes()) != checksum:
            return None
        return rows if np.all((rows >= 0) & (rows < self._rows)) else None

    def _numbers(self) -> list[int]:
        names = (path.name[len(self._prefix) :] for path in self._folder.glob(f"{self._prefix}*"))
        return sorted(int(name) for name in names if name.isdecimal())

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

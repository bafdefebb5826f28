"""Records between a file and memory: compiled loops of pread and pwrite that leave the interpreter alone.

Shapes: n records, S bytes of one record.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types

BLOCK = 4096
"""Unit of the page cache and of direct reads."""

ENDED = -1
"""What a loop returns where the file ends too early; else it returns 0 or the system's error number."""

_signature = types.int64(types.int32, types.int64, types.int64, types.int64)
_pread: Any = types.ExternalFunction("pread", _signature)
_pwrite: Any = types.ExternalFunction("pwrite", _signature)
_errno_location: Any = types.ExternalFunction("__errno_location", types.CPointer(types.int32)())


@njit(nogil=True, cache=True)
def system_error() -> int:
    """Return the number of the last error of a call of the system, in this thread."""
    return int(carray(_errno_location(), 1)[0])


@njit(nogil=True, cache=True)
def _read(fd: int, target: int, size: int, at: int) -> int:
    got = _pread(np.int32(fd), target, size, at)
    if got < 0:
        return system_error()
    return 0 if got == size else ENDED


@njit(nogil=True, cache=True)
def _write(fd: int, source: int, size: int, at: int) -> int:
    done = 0
    while done < size:  # a disk about to be full takes a part
        put = _pwrite(np.int32(fd), source + done, size - done, at + done)
        if put < 0:
            return system_error()
        done += put
    return 0


@njit(nogil=True, cache=True)
def read_buffered(fd: int, start: int, ids: np.ndarray, out: int, places: np.ndarray, S: int) -> int:
    """Read records `ids` of a file whose records begin at byte `start`, through the page cache.

    Record i goes to `places[i]` of the records at address `out`.
    """
    for i in range(len(ids)):
        failed = _read(fd, out + places[i] * S, S, start + ids[i] * S)
        if failed:
            return failed
    return 0


@njit(nogil=True, cache=True)
def find_runs(ids: np.ndarray, longest: int) -> np.ndarray:
    """Return where runs of up to `longest` consecutive numbers begin in ascending `ids`, and n at the end."""
    starts = np.empty(len(ids) + 1, dtype=np.int64)
    count = 0
    for i in range(len(ids)):
        if i == 0 or ids[i] != ids[i - 1] + 1 or i - starts[count - 1] == longest:
            starts[count] = i
            count += 1
    starts[count] = len(ids)
    return starts[: count + 1]


@njit(nogil=True, cache=True)
def bring_in(fd: int, start: int, ids: np.ndarray, runs: np.ndarray, S: int, room: np.ndarray) -> int:
    """Bring the blocks into the page cache that writing the runs would change in part.

    Writes to one file exclude each other while the kernel reads such a block; reads do not. `room` is
    working memory of a byte.
    """
    failed = 0
    for r in range(len(runs) - 1):
        a = start + ids[runs[r]] * S
        b = start + (ids[runs[r + 1] - 1] + 1) * S
        first, last = a // BLOCK, (b - 1) // BLOCK
        if a % BLOCK or b < (first + 1) * BLOCK:
            failed = _read(fd, room.ctypes.data, 1, a)
        if not failed and last != first and b % BLOCK:
            failed = _read(fd, room.ctypes.data, 1, b - 1)
        if failed:
            return failed
    return failed


@njit(nogil=True, cache=True)
def write_runs(fd: int, start: int, ids: np.ndarray, runs: np.ndarray, records: int, S: int) -> int:
    """Write the records [n, S] at address `records`, run by run."""
    for r in range(len(runs) - 1):
        size = (runs[r + 1] - runs[r]) * S
        failed = _write(fd, records + runs[r] * S, size, start + ids[runs[r]] * S)
        if failed:
            return failed
    return 0

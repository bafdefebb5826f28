"""Where records live: one protocol, and the tier that keeps them on a device.

A store is R records of equal size, numbered from 0. It moves bytes and does not know what they mean
(memory/layout.py does), so that tiers cannot differ in arithmetic.

Shapes: n records moved, S bytes of one record.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from engram_lab.errors import UserError
from engram_lab.memory.room import GIB, require_memory
from engram_lab.memory.row_copy import Workers, alone

SMALLER_TABLE = "lower model.engram.rows_per_head, or set memory.rows and memory.state to bfloat16"
CHUNK_BYTES = 1 << 24
"""Of records that a thread fills at once, where rows that are drawn together are not more."""
DRAWN = 2048
"""Rows that are drawn together: the initial values of rows between two multiples of it cost about as much as
those of one. With small blocks threads wait for the interpreter, with large ones single rows are dear."""

Initial = Callable[[int, int, Tensor], None]
"""Writes the initial records first, ..., first + count - 1 into out [count, S] on the CPU."""


class RowStore(Protocol):
    """R records of S bytes.

    One thread may read while another writes. A row that both concern comes out in any state, torn included;
    no other row suffers. Row numbers and records are on `device`, and buffers are contiguous.
    """

    rows: int
    record_bytes: int
    device: torch.device

    def read(self, ids: Tensor, out: Tensor) -> None:
        """Copy records `ids` (int64 [n]) to the first n of `out` (uint8 [>= n, S])."""

    def write(self, ids: Tensor, records: Tensor) -> None:
        """Replace records `ids` (int64 [n], distinct) by the first n of `records` (uint8 [>= n, S])."""

    def sync(self) -> None:
        """Return when all that was written would survive a loss of power, where the tier can do that."""

    def close(self) -> None:
        """Free threads, memory and files; the store cannot be used any more."""


class DeviceStore:
    """The resident tier: one tensor on the device that computes.

    Raises:
        UserError: the device has not enough memory for the records.
    """

    def __init__(self, rows: int, record_bytes: int, device: torch.device | str = "cpu") -> None:
        self.rows, self.record_bytes, self.device = rows, record_bytes, torch.device(device)
        needed = rows * record_bytes
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
            if needed > free:
                raise UserError(
                    f"The table's rows need {needed / GIB:.1f} GiB on {self.device}, but {free / GIB:.1f} "
                    f"GiB are free; set memory.tier to host, or {SMALLER_TABLE}."
                )
        else:
            require_memory(needed, "The table's rows", SMALLER_TABLE)
        self.records = torch.zeros(rows, record_bytes, dtype=torch.uint8, device=self.device)
        # The widest words that records consist of: a copy byte by byte is several times as slow.
        self._word = torch.int64 if record_bytes % 8 == 0 else torch.int32

    def read(self, ids: Tensor, out: Tensor) -> None:
        """Copy records `ids` [n] to the first n of `out`; on CUDA, on the current stream."""
        words = out[: len(ids)].view(self._word)
        torch.index_select(self.records.view(self._word), 0, ids, out=words)

    def write(self, ids: Tensor, records: Tensor) -> None:
        """Replace records `ids` [n] by the first n of `records`; on CUDA, on the current stream."""
        self.records.view(self._word).index_copy_(0, ids, records[: len(ids)].view(self._word))

    def sync(self) -> None:
        """Return when the device has done all that it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Free the memory."""
        self.records = self.records.new_empty(0, self.record_bytes)


def fill(
    store: RowStore,
    initial: Initial,
    progress: Callable[[int, int], None] | None = None,
    threads: int | None = None,
) -> None:
    """Write the initial record of every row, in parallel.

    `initial` is called from several threads at once; `progress(rows done, rows)` after every chunk, from one
    at a time. The first error of any thread ends the filling and is raised.
    """
    step = max(1, CHUNK_BYTES // store.record_bytes // DRAWN) * DRAWN
    chunks = range(0, store.rows, step)
    done, lock, stop = 0, threading.Lock(), threading.Event()

    def part(first_chunk: int, last_chunk: int) -> None:
        nonlocal done
        buffer = torch.empty(step, store.record_bytes, dtype=torch.uint8)
        try:
            for first in chunks[first_chunk:last_chunk]:
                if stop.is_set():
                    return
                count = min(step, store.rows - first)
                initial(first, count, buffer[:count])
                ids = torch.arange(first, first + count, device=store.device)
                store.write(ids, buffer[:count].to(store.device))
                with lock:
                    done += count
                    if progress is not None:
                        progress(done, store.rows)
        except BaseException:
            stop.set()
            raise

    workers = Workers(threads or len(os.sched_getaffinity(0)))
    with alone():
        try:
            workers.share(len(chunks), part, grain=1)
        finally:
            stop.set()  # an interrupt of this thread too ends the others
            workers.close()

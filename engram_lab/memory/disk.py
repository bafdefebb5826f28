"""The disk tier: records in one file that is updated in place, with the rows read most kept in memory.

What the file looks like is said in memory/table_file.py.

A store that is written reads through the page cache: a record is smaller than a page, and to write it into a
page that is not in memory the kernel reads the page, letting no other write to the file through meanwhile: 13
thousand writes a second; 48 thousand where threads read the pages before; 230 thousand where the rows had
been read, as those of a step have. A store that is only read goes around the page cache, so that its memory
is the cache given to it and nothing else is evicted (memory/deep_reads.py). Deep queues make reads fast: 12
thousand a second in one thread, 56 thousand in 64, 72 thousand around the page cache.

Figures: python benchmarks/disk_rows.py DIRECTORY --gib 2 --turns 2, rows of 208 bytes, on two busy virtual
cores with a virtual disk.

Shapes: n records moved, R rows, S bytes of one record.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import weakref
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engram_lab.errors import UserError
from engram_lab.memory.deep_reads import DeepReads
from engram_lab.memory.disk_copy import (
    BLOCK,
    ENDED,
    bring_in,
    find_runs,
    read_buffered,
    write_runs,
)
from engram_lab.memory.layout import RecordLayout
from engram_lab.memory.room import available_memory
from engram_lab.memory.row_cache import RowCache
from engram_lab.memory.row_copy import Workers, check_ids
from engram_lab.memory.table_file import TableFile
from engram_lab.memory.written_log import WrittenLog

logger = logging.getLogger(__name__)

THREADS = 64  # reads under way at once
READ_GRAIN = 8  # records a thread: a read takes 50 to 100 microseconds
WRITERS = 4  # the kernel lets one write through at a time; more threads only wait
LONGEST_WRITE = 1 << 24


class DiskStore:
    """Records in a file; several readers may share one, a writer has it alone.

    A store that is written keeps a log (memory/written_log.py), written before the rows, so that the file can
    be brought back to a checkpoint by putting back only what was written since. After an error of the disk,
    reading and writing raise it again and the log stays as it is: the checkpoint can still be restored.
    A store that is dropped without `close` leaves the file as a killed process does, free for others to open.

    Args:
        path: the file; created, with all bytes reserved, where there is none and `writable` allows it.
        layout: of the records.
        rows: R.
        fingerprint: of all else that decides what a row means (hash version, tables, seed).
        writable: False to read only.
        cache_rows: rows kept in memory; None takes a sixteenth of all, or what fits a quarter of the
            available memory if that is less; 0 keeps none.
        threads: that read through the page cache; None takes 64.

    Attributes:
        reads, hits: rows read, and those of them found in memory.
        bytes_read: bytes of the records that were read from the file.

    Raises:
        UserError: no room on the disk or in memory, or a file that is in use, cut short, damaged, or of other
            rows.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        path: Path,
        layout: RecordLayout,
        rows: int,
        fingerprint: str,
        *,
        writable: bool = True,
        cache_rows: int | None = None,
        threads: int | None = None,
    ) -> None:
        self.path, self.rows, self.record_bytes = path, rows, layout.record_bytes
        self.reads = self.hits = self.bytes_read = 0
        self._failure = ""
        table = TableFile(path, layout, rows, fingerprint)
        if writable and not path.exists():
            table.create()
        kept = rows_in_memory(rows, self.record_bytes, cache_rows)
        self._cache = RowCache(kept, self.record_bytes) if kept else None
        self._lock, self._writing = threading.Lock(), threading.Lock()
        held = ExitStack()  # knows nothing of the store, or the store would never go
        self._release = weakref.finalize(self, held.close)
        self._release.atexit = False  # the end of the process frees all, and a thread may still read then
        self._file, direct = table.open(writable=writable)
        held.callback(os.close, self._file)
        try:
            if not writable and not any(path.parent.glob(f"{path.name}.written-*")):
                raise UserError(f"{path} was never filled to the end; train or import its table first.")
            self._log = WrittenLog(path, rows) if writable else None
        except BaseException:
            self._release()
            raise
        if self._log is not None:
            held.callback(self._log.close, durable=False)
        self._deep = _deep_reads(self._file, path, self.record_bytes) if direct else None
        if self._deep is not None:
            held.callback(self._deep.close)
        self._workers = Workers(threads or (None if self._deep else THREADS))

    def read(self, ids: Tensor, out: Tensor) -> None:
        """Copy records `ids` [n] to the first n of `out`; UserError when the disk fails."""
        self._raise_failure()
        numbers = check_ids(ids, self.rows)
        assert out.is_contiguous(), out.stride()
        assert out.shape[1] == self.record_bytes, out.shape
        if len(out) < len(numbers):
            raise IndexError(f"{len(numbers)} rows asked for, the buffer holds {len(out)}")
        if self._cache is None:
            missing, given, find = np.arange(len(numbers)), None, 0
        else:
            with self._lock:
                slots, given, find = self._cache.find(numbers)
                (found,), (missing,) = np.nonzero(slots >= 0), np.nonzero(slots < 0)
                self._copy(self._cache.records, slots[found], out, found)
        with self._lock:
            self.reads += len(numbers)
            self.hits += len(numbers) - len(missing)
            self.bytes_read += len(missing) * self.record_bytes
        if not len(missing):
            return
        order = missing[np.argsort(numbers[missing], kind="stable")]
        self._read_file(numbers[order], out, order)
        if self._cache is not None and given is not None:
            with self._lock:
                # Not where a write has put newer bytes, or the slot has gone to another row meanwhile.
                (waiting,) = np.nonzero(self._cache.loaded(given, find))
                self._copy(out, waiting, self._cache.records, given[waiting])

    def write(self, ids: Tensor, records: Tensor) -> None:
        """Replace records `ids` [n], distinct, by the first n of `records`; UserError when the disk fails."""
        log = self._open_log
        self._raise_failure()
        numbers = check_ids(ids, self.rows)
        assert len(records) >= len(numbers), (len(records), len(numbers))
        ascending, packed = numbers, records
        if np.any(numbers[1:] < numbers[:-1]):
            order = np.argsort(numbers)
            ascending, packed = numbers[order], torch.empty_like(records[: len(numbers)])
            self._copy(records, order, packed, np.arange(len(order)))
        with self._writing:
            self._attempt(lambda: log.add(numbers), "logged beside")
            self._write_file(ascending, packed)
            if self._cache is not None:
                # After the file: a reader that has just missed a row holds old bytes, to be replaced.
                with self._lock:
                    slots = self._cache.replaced(numbers)
                    (held,) = np.nonzero(slots >= 0)
                    self._copy(records, held, self._cache.records, slots[held])

    def sync(self) -> None:
        """Return when all that was written would survive a loss of power."""
        if self._log is not None:
            self._attempt(lambda: os.fdatasync(self._file), "made durable in")

    def mark(self, checkpoint: str) -> None:
        """Note that the store is now as in `checkpoint`, in case that is what will be restored."""
        log = self._open_log
        self._attempt(lambda: log.mark(checkpoint), "logged beside")

    def start_log(self, checkpoint: str | None) -> None:
        """Forget what was written before `checkpoint`, the last one marked, or marked now.

        With None the store is in no known state, and must be written whole.
        """
        log = self._open_log
        self._attempt(log.forget if checkpoint is None else lambda: log.only(checkpoint), "logged beside")

    def written_since(self, checkpoints: Collection[str]) -> Tensor | None:
        """Return at least the rows written since one of these was marked, int64 ascending.

        None when the log has none of them: the store may be in any state.
        """
        return self._open_log.since(checkpoints)

    def close(self) -> None:
        """End the threads, make the file durable and close it."""
        if self._file < 0:
            return
        self._workers.close()
        try:
            if not self._failure:
                self.sync()
        finally:
            if self._log is not None:
                self._log.close(durable=not self._failure)
            self._release()
            self._file = -1  # the number may soon be another file's

    @property
    def _open_log(self) -> WrittenLog:
        assert self._log is not None, "the store was opened to be read only"
        return self._log

    def _copy(self, source: Tensor, sources: np.ndarray, target: Tensor, targets: np.ndarray) -> None:
        self._workers.copy(source, torch.from_numpy(sources), target, torch.from_numpy(targets))

    def _read_file(self, ids: np.ndarray, out: Tensor, places: np.ndarray) -> None:
        if self._deep is not None:
            self._succeeded(self._deep.read(self._file, BLOCK, ids, out.data_ptr(), places), "read from")
            return

        def part(first: int, last: int) -> None:
            mine, S = slice(first, last), self.record_bytes
            failed = read_buffered(self._file, BLOCK, ids[mine], out.data_ptr(), places[mine], S)
            self._succeeded(failed, "read from")

        self._workers.share(len(ids), part, READ_GRAIN)

    def _write_file(self, ids: np.ndarray, records: Tensor) -> None:
        S = self.record_bytes
        runs = find_runs(ids, max(1, LONGEST_WRITE // S))

        def prepare(first: int, last: int) -> None:
            mine, byte = runs[first : last + 1], np.empty(1, dtype=np.uint8)
            self._succeeded(bring_in(self._file, BLOCK, ids, mine, S, byte), "read from")

        def part(first: int, last: int) -> None:
            mine = runs[first : last + 1]
            self._succeeded(write_runs(self._file, BLOCK, ids, mine, records.data_ptr(), S), "written to")

        self._workers.share(len(runs) - 1, prepare, READ_GRAIN)
        self._workers.share(len(runs) - 1, part, max(256, -(-len(runs) // WRITERS)))

    def _attempt(self, action: Callable[[], object], what: str) -> None:
        try:
            action()
        except OSError as error:
            self._fail(what, error.strerror or str(error))

    def _succeeded(self, result: int, what: str) -> None:
        if result:
            self._fail(what, "the file ends too early" if result == ENDED else os.strerror(result))

    def _fail(self, what: str, reason: str) -> None:
        if self._log is None:
            remedy = f"mend the disk, or remove {self.path}* to build the table anew, and start again"
        else:
            remedy = "mend the disk or make room there, then resume from the last checkpoint, which is intact"
        self._failure = f"Rows cannot be {what} {self.path}: {reason}; {remedy}."
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure:
            raise UserError(self._failure)


def rows_in_memory(rows: int, record_bytes: int, cache_rows: int | None) -> int:
    """Return how many of `rows` rows a store with that `cache_rows` keeps in memory."""
    if cache_rows is None:
        cache_rows = min(rows // 16, available_memory() // 4 // record_bytes)
    return min(cache_rows, rows)


def _deep_reads(file: int, path: Path, record_bytes: int) -> DeepReads | None:
    """Return what reads around the page cache; or say that the system has none, and go through it."""
    try:
        return DeepReads(record_bytes)
    except OSError as error:
        logger.warning(
            "rows of %s are read through the page cache, more slowly and with more memory than cache_rows "
            "takes: the system gives no asynchronous reads (%s); where none are left, raise "
            "/proc/sys/fs/aio-max-nr",
            path,
            error.strerror,
        )
        fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) & ~os.O_DIRECT)
        return None

"""Copying rows of bytes by number, on CPU threads: what `index_select` and `index_copy_` do.

How much faster, and on which machines not, is measured in benchmarks/gather_rows.py: on few threads it is, by
prefetching; with 16 threads on an H100's host plain `index_select` is ahead.

Shapes: n rows copied, S bytes of one row.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

AHEAD = 16  # rows between a prefetch and its use; 8 to 32 are alike
LINE = 64
MOST_THREADS = 8
GRAIN = 2048  # rows that are worth waking a thread for (some 20 microseconds)


def _emit_prefetch(context: Any, address: Any) -> Any:

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        read, soon, data = word(0), word(3), word(1)
        builder.call(function, [builder.inttoptr(arguments[0], byte), read, soon, data])
        return context.get_dummy_value()

    return types.void(types.int64), generate


def _emit_copy(context: Any, target: Any, source: Any, count: Any) -> Any:

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        target, source = (builder.inttoptr(address, byte) for address in arguments[:2])
        cgutils.raw_memcpy(builder, target, source, arguments[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


prefetch: Any = intrinsic(_emit_prefetch)
"""prefetch(address): ask the processor for the cache line at an address."""
copy_bytes: Any = intrinsic(_emit_copy)
"""copy_bytes(target, source, count): copy between two addresses."""


@njit(nogil=True, cache=True)
def _copy(
    source: int, sources: np.ndarray | None, target: int, targets: np.ndarray | None, n: int, S: int
) -> None:
    lines = (S + LINE - 1) // LINE
    for i in range(n):
        if i + AHEAD < n:
            if sources is not None:
                for line in range(lines):
                    prefetch(source + sources[i + AHEAD] * S + line * LINE)
            if targets is not None:
                for line in range(lines):
                    prefetch(target + targets[i + AHEAD] * S + line * LINE)
        a = i if sources is None else sources[i]
        b = i if targets is None else targets[i]
        copy_bytes(target + b * S, source + a * S, S)


@njit(nogil=True, cache=True)
def _first_outside(ids: np.ndarray, rows: int) -> int:
    for i in range(len(ids)):
        if ids[i] < 0 or ids[i] >= rows:
            return i
    return -1


@contextmanager
def alone() -> Iterator[None]:
    """Let each thread that is started within run torch's operations by itself; once at a time in a process.

    Else every one of them would share its own out to all processors. Threads keep what they started with, so
    those started within should end there.
    """
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


class Workers:
    """Threads that share out a range of work.

    Args:
        threads: how many; None takes one per processor that this process may use, but at most 8: beside a
            training step, more wait for the interpreter longer than they copy.
    """

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or min(MOST_THREADS, len(os.sched_getaffinity(0)))
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="rows")

    def share(self, n: int, work: Callable[[int, int], object], grain: int = GRAIN) -> None:
        """Call work(first, last) on parts of range(n), in parallel where there is more than `grain` to do.

        Returns when all parts have ended, and raises the first error among them.
        """
        parts = min(self.threads, -(-n // grain))
        if parts <= 1:
            if n:
                work(0, n)
            return
        edges = [n * part // parts for part in range(parts + 1)]
        futures = [self._pool.submit(work, a, b) for a, b in pairwise(edges)]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise errors[0]

    def copy(self, source: Tensor, sources: Tensor | None, target: Tensor, targets: Tensor | None) -> None:
        """Copy rows `sources` of `source` to rows `targets` of `target`; None stands for 0, 1, 2, ...

        `source` and `target` are contiguous uint8 [rows, S] in memory the processor can address, the row
        numbers int64 [n]. `targets` must be distinct. IndexError for a row that does not exist.
        """
        numbers = sources if sources is not None else targets
        assert numbers is not None
        n, S = len(numbers), source.shape[1]
        for rows, chosen in ((source, sources), (target, targets)):
            assert rows.is_contiguous(), rows.stride()
            assert rows.device.type == "cpu", rows.device
            assert rows.shape[1] == S, (rows.shape, S)
            if chosen is None and len(rows) < n:
                raise IndexError(f"{n} rows asked for, a buffer holds {len(rows)}")
        a = None if sources is None else check_ids(sources, len(source))
        b = None if targets is None else check_ids(targets, len(target))

        def part(first: int, last: int) -> None:  # holds the tensors, should an interrupt leave it running
            _copy(
                source.data_ptr() + (first * S if a is None else 0),
                None if a is None else a[first:last],
                target.data_ptr() + (first * S if b is None else 0),
                None if b is None else b[first:last],
                last - first,
                S,
            )

        self.share(n, part)

    def close(self) -> None:
        """End the threads; work that was begun is finished."""
        self._pool.shutdown()


def check_ids(ids: Tensor, rows: int) -> np.ndarray:
    """Return `ids` as an array once all are known to be rows; IndexError otherwise."""
    numbers: np.ndarray = ids.numpy()
    assert numbers.dtype == np.int64, numbers.dtype
    if (at := _first_outside(numbers, rows)) >= 0:
        raise IndexError(f"row {numbers[at]} does not exist; there are {rows}")
    return numbers

"""Which rows a step needs: every row once, and where each position finds its own.

A step reads 32 rows a token, many of them several times. What is fetched, trained and written back is the
unique row; a position holds the place of its row among them.

Shapes: A micro-batches of a step, M memories, B batch, T length, H hash heads, n unique rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numba import njit
from torch import Tensor

from engram_lab.memory.row_copy import Workers

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing: the high bits of a product with 2^64 / phi


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """The rows of one step.

    Attributes:
        ids: global row numbers, each once, int64 [n]; head by head, in the order of their first use.
        positions: place in `ids` of every row that is read, int32 [A, M, H, B, T]; heads come before
            positions so that threads, which share out the heads, write far apart.
    """

    ids: Tensor
    positions: Tensor

    @property
    def reads(self) -> int:
        """Rows read, repetitions counted."""
        return self.positions.numel()


def deduplicate(addresses: Sequence[Tensor], first_row: Sequence[int], workers: Workers) -> Plan:
    """Plan a step from the addresses [M, B, T, H] of its micro-batches.

    `first_row` [M] is the global number of each memory's first row. Every head has rows of its own, as the
    hash lays them out, so that heads are searched one by one and their indices stay in the cache.
    """
    stacked = np.stack([a.numpy() for a in addresses])
    A, M, B, T, H = stacked.shape
    reads = A * B * T
    bits = max(2, (2 * reads - 1).bit_length())  # at most half full
    found = np.empty((M * H, reads), dtype=np.int64)
    positions = np.empty((A, M * H, B * T), dtype=np.int32)
    counts = np.zeros(M * H, dtype=np.int64)
    given = stacked.reshape(A, M, B * T, H), np.asarray(first_row, dtype=np.int64), bits
    workers.share(M * H, lambda a, b: _search(*given, found, positions, counts, a, b), grain=1)
    starts = np.concatenate([[0], np.cumsum(counts)])
    ids = np.empty(starts[-1], dtype=np.int64)
    workers.share(M * H, lambda a, b: _join(found, starts, ids, positions, a, b), grain=1)
    return Plan(ids=torch.from_numpy(ids), positions=torch.from_numpy(positions.reshape(A, M, H, B, T)))


@njit(nogil=True, cache=True, error_model="numpy")
def _search(
    addresses: np.ndarray,
    first_row: np.ndarray,
    bits: int,
    found: np.ndarray,
    positions: np.ndarray,
    counts: np.ndarray,
    first: int,
    last: int,
) -> None:
    """For heads `first` to `last`: list the unique rows, and give every read its row's place in the list."""
    A, _, reads, H = addresses.shape
    index = np.empty(1 << bits, dtype=np.int32)  # by hash: place in a head's list, or -1
    end, shift = np.uint64(len(index) - 1), np.uint64(64 - bits)
    for head in range(first, last):
        m, h = head // H, head % H
        rows, count = found[head], 0
        index[:] = -1
        for a in range(A):
            for i in range(reads):
                row = np.int64(addresses[a, m, i, h]) + first_row[m]
                slot = (np.uint64(row) * GOLDEN) >> shift
                while True:
                    place = index[slot]
                    if place < 0:
                        place = np.int32(count)
                        index[slot], rows[count] = place, row
                        count += 1
                        break
                    if rows[place] == row:
                        break
                    slot = (slot + np.uint64(1)) & end
                positions[a, head, i] = place
        counts[head] = count


@njit(nogil=True, cache=True)
def _join(
    found: np.ndarray, starts: np.ndarray, ids: np.ndarray, positions: np.ndarray, first: int, last: int
) -> None:
    """Join the lists of heads `first` to `last` with the others', and let positions count from the start."""
    for head in range(first, last):
        start = starts[head]
        ids[start : starts[head + 1]] = found[head, : starts[head + 1] - start]
        positions[:, head] += np.int32(start)

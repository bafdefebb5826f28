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

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing: the high bits of a product with 2^64 / phi


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """The rows of one step.

    Attributes:
        ids: global row numbers, each once, int64 [n]; head by head, in the order of their first use.
        positions: place in `ids` of every row that is read, int32 [A, M, B, T, H].
        starts: where the rows of each (memory, head) begin in `ids`, int64 [M * H + 1].
        slots: one hash index for each (memory, head): place in its part of `ids`, or -1; int32 [M * H, 2^k].
    """

    ids: Tensor
    positions: Tensor
    starts: np.ndarray
    slots: np.ndarray

    @property
    def reads(self) -> int:
        """Rows read, repetitions counted."""
        return self.positions.numel()


def deduplicate(addresses: Sequence[Tensor], first_row: Sequence[int]) -> Plan:
    """Plan a step from the addresses [M, B, T, H] of its micro-batches.

    `first_row` [M] is the global number of each memory's first row. Every head has rows of its own, as the
    hash lays them out, so that heads are searched one by one and their indices stay in the cache.
    """
    stacked = np.stack([a.numpy() for a in addresses])
    A, M, B, T, H = stacked.shape
    reads = A * B * T
    bits = max(2, (2 * reads - 1).bit_length())  # at most half full
    slots = np.full((M * H, 1 << bits), -1, dtype=np.int32)
    ids = np.empty((M * H, reads), dtype=np.int64)
    positions = np.empty((A, M, B * T, H), dtype=np.int32)
    starts = np.zeros(M * H + 1, dtype=np.int64)
    first = np.asarray(first_row, dtype=np.int64)
    _deduplicate(stacked.reshape(A, M, B * T, H), first, np.uint64(64 - bits), slots, ids, positions, starts)
    unique = np.concatenate([part[:count] for part, count in zip(ids, np.diff(starts), strict=True)])
    return Plan(
        ids=torch.from_numpy(unique),
        positions=torch.from_numpy(positions.reshape(stacked.shape)),
        starts=starts,
        slots=slots,
    )


def overlap(earlier: Plan, later: Plan) -> tuple[Tensor, Tensor]:
    """Return places in `earlier.ids` and in `later.ids` of the rows that both have, int64 [k] each."""
    n = len(later.ids)
    places = np.empty((2, n), dtype=np.int64)
    shift = np.uint64(64 - (earlier.slots.shape[1].bit_length() - 1))
    count = _overlap(
        earlier.ids.numpy(), earlier.starts, earlier.slots, shift, later.ids.numpy(), later.starts, places
    )
    found = torch.from_numpy(places[:, :count])
    return found[0], found[1]


@njit(nogil=True, cache=True, error_model="numpy")
def _deduplicate(
    addresses: np.ndarray,
    first_row: np.ndarray,
    shift: np.uint64,
    slots: np.ndarray,
    ids: np.ndarray,
    positions: np.ndarray,
    starts: np.ndarray,
) -> None:
    A, M, reads, H = addresses.shape
    last = np.uint64(slots.shape[1] - 1)
    total = 0
    for m in range(M):
        for h in range(H):
            index, mine = slots[m * H + h], ids[m * H + h]
            count = 0
            for a in range(A):
                for i in range(reads):
                    row = np.int64(addresses[a, m, i, h]) + first_row[m]
                    slot = (np.uint64(row) * GOLDEN) >> shift
                    while True:
                        place = index[slot]
                        if place < 0:
                            place = np.int32(count)
                            index[slot], mine[count] = place, row
                            count += 1
                            break
                        if mine[place] == row:
                            break
                        slot = (slot + np.uint64(1)) & last
                    positions[a, m, i, h] = total + place
            total += count
            starts[m * H + h + 1] = total


@njit(nogil=True, cache=True, error_model="numpy")
def _overlap(
    earlier: np.ndarray,
    earlier_starts: np.ndarray,
    slots: np.ndarray,
    shift: np.uint64,
    later: np.ndarray,
    later_starts: np.ndarray,
    places: np.ndarray,
) -> int:
    last = np.uint64(slots.shape[1] - 1)
    count = 0
    for head in range(len(slots)):
        index, start = slots[head], earlier_starts[head]
        for i in range(later_starts[head], later_starts[head + 1]):
            slot = (np.uint64(later[i]) * GOLDEN) >> shift
            while index[slot] >= 0:
                place = start + index[slot]
                if earlier[place] == later[i]:
                    places[0, count], places[1, count] = place, i
                    count += 1
                    break
                slot = (slot + np.uint64(1)) & last
    return count

"""Which step had a row last, and where: what tells a gathered row that a later update has made it stale.

Shapes: R rows of all tables, n unique rows of a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numba import njit
from torch import Tensor

from engram_lab.memory.row_copy import Workers

PLACE_BITS = 32


@dataclass(frozen=True, eq=False)
class Returning:
    """Rows of a step that steps not long ago had too.

    Attributes:
        repeated: how many the step just before had.
        stale: for every step whose update may be missing in what was gathered, the places there and here of
            the rows that no later step had, int64 [k] each.
    """

    repeated: int
    stale: dict[int, tuple[Tensor, Tensor]]


class Ledger:
    """The last step that planned to read each of R rows, and the row's place in that step; 8 bytes a row.

    Memory is taken page by page as rows are read.
    """

    def __init__(self, rows: int) -> None:
        self._entries = np.zeros(rows, dtype=np.int64)  # step << 32 | place; 0: never read

    @staticmethod
    def memory_bytes(rows: int) -> int:
        """Bytes of memory that one of `rows` rows takes once they have been read."""
        return 8 * rows

    def enter(self, step: int, ids: Tensor, landed: int, workers: Workers) -> Returning:
        """Enter the unique rows `ids` [n] of a step, and say which the steps after `landed` had last.

        Steps are entered in order.
        """
        numbers, n = ids.numpy(), len(ids)
        before = np.empty(n, dtype=np.int64)
        workers.share(n, lambda a, b: _enter(self._entries, numbers, step, before, a, b))
        counts = np.zeros(step - 1 - landed, dtype=np.int64)  # by age: 0 for the step just before
        places = np.empty((2, n), dtype=np.int64)
        repeated = _group(before, step, counts, places)
        both = torch.from_numpy(places[:, : counts.sum()])
        parts = enumerate(both.split(counts.tolist(), dim=1) if len(counts) else ())
        return Returning(
            repeated, {step - 1 - age: (part[0], part[1]) for age, part in parts if part.numel()}
        )


@njit(nogil=True, cache=True)
def _enter(
    entries: np.ndarray, ids: np.ndarray, step: int, before: np.ndarray, first: int, last: int
) -> None:
    for i in range(first, last):
        before[i] = entries[ids[i]]
        entries[ids[i]] = (step << PLACE_BITS) | i


@njit(nogil=True, cache=True)
def _group(before: np.ndarray, step: int, counts: np.ndarray, places: np.ndarray) -> int:
    """Sort the rows that the last steps had by how long ago that was; return how many the step before had."""
    repeated, recent = 0, len(counts)
    for i in range(len(before)):
        age = step - 1 - (before[i] >> PLACE_BITS)
        if before[i]:
            repeated += age == 0
            if age < recent:
                counts[age] += 1
    place = np.cumsum(counts) - counts
    mask = (1 << PLACE_BITS) - 1
    for i in range(len(before)):
        age = step - 1 - (before[i] >> PLACE_BITS)
        if before[i] and age < recent:
            places[0, place[age]], places[1, place[age]] = before[i] & mask, i
            place[age] += 1
    return repeated

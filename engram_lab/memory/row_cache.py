"""Rows kept in memory in front of a slower store: those read most often stay.

The cache is set-associative: a row may lie in one of eight slots, whose row numbers share a cache line, so a
look-up costs one miss of the processor's cache whatever the size. Reads are counted, for rows that are not
there in a table of hashed counters, and a row takes the least read slot of its set once it has been read as
often (TinyLFU, https://arxiv.org/abs/1512.00727): rows seen once, most of any text, do not drive out the
frequent ones. Counts are halved from time to time, so that rows leave when their time is over.

Shapes: n rows asked for, C slots, S bytes of one record.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from engram_lab.memory.host import map_records
from engram_lab.memory.room import require_memory

WAYS = 8
COUNTERS = 8  # a slot: fewer let rare rows share a counter with a frequent one (4 cost a hit in a hundred)
HALVED_AFTER = 16  # reads a slot
MOST = 255
EMPTY = -1


class RowCache:
    """C slots of S bytes, found by row number; the caller sees to it that one thread at a time is inside.

    A slot is given to a row (`find`) before the row has been read, and is loading until its bytes are there.
    Meanwhile the row may be written, and the slot then given to another row: what a slow reader brings
    belongs there no more.

    Args:
        rows: C, rounded down to a multiple of eight, at least eight.
        record_bytes: S.
    """

    def __init__(self, rows: int, record_bytes: int) -> None:
        require_memory(
            RowCache.memory_bytes(rows, record_bytes), "The rows kept in memory", "lower memory.cache_rows"
        )
        slots = _slots(rows)
        self.records = map_records(slots, record_bytes)
        self._tags = np.full(slots, EMPTY, dtype=np.int64)
        self._counts = np.zeros(slots, dtype=np.uint8)
        self._loading = np.zeros(slots, dtype=np.int64)  # number of the `find` that gave it, or 0 once ready
        self._seen = np.zeros(slots * COUNTERS, dtype=np.uint8)  # reads of rows that are not there
        self._reads = self._finds = 0

    @staticmethod
    def memory_bytes(rows: int, record_bytes: int) -> int:
        """Bytes of memory that a cache of `rows` records takes."""
        return _slots(rows) * (record_bytes + 17 + COUNTERS)

    def find(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """Look rows up and count the reads.

        Returns slots [n], -1 where a row is not there; the slots [n] given to such rows, to be filled, or -1
        where a row gets none; and the number of this call.
        """
        slots, given = np.empty_like(ids), np.empty_like(ids)
        self._finds += 1
        _find(ids, self._tags, self._counts, self._loading, self._finds, self._seen, slots, given)
        self._reads += len(ids)
        if self._reads >= HALVED_AFTER * len(self._tags):
            self._reads = 0
            self._counts >>= 1
            self._seen >>= 1
        return slots, given, self._finds

    def loaded(self, given: np.ndarray, find: int) -> np.ndarray:
        """Return which of the slots [n] still load for call number `find`, which gave them; now ready."""
        waiting: np.ndarray = (given >= 0) & (self._loading[given] == find)
        self._loading[given[waiting]] = 0
        return waiting

    def replaced(self, ids: np.ndarray) -> np.ndarray:
        """Return the slots [n] of rows that are to get new bytes, -1 where a row has none; they are ready."""
        slots = np.empty_like(ids)
        _places(ids, self._tags, self._loading, slots)
        return slots


def _slots(rows: int) -> int:
    return max(1, rows // WAYS) * WAYS


@njit(nogil=True, cache=True)
def _hash(row: int) -> int:
    """Spread rows over 44 bits: neighbours may be alike, say heads of one order."""
    return int((np.uint64(row) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(20))


@njit(nogil=True, cache=True)
def _first_slot(row: int, slots: int) -> int:
    return int(_hash(row) >> 12) % (slots // WAYS) * WAYS


@njit(nogil=True, cache=True)
def _find(
    ids: np.ndarray,
    tags: np.ndarray,
    counts: np.ndarray,
    loading: np.ndarray,
    find: int,
    seen: np.ndarray,
    slots: np.ndarray,
    given: np.ndarray,
) -> None:
    for i in range(len(ids)):
        first = _first_slot(ids[i], len(tags))
        slots[i] = given[i] = -1
        least = -1
        known = False
        for slot in range(first, first + WAYS):
            if tags[slot] == ids[i]:
                known = True
                if counts[slot] < MOST:
                    counts[slot] += 1
                if not loading[slot]:
                    slots[i] = slot
                break
            if not loading[slot] and (least < 0 or counts[slot] < counts[least]):
                least = slot
        if known:
            continue
        mine = _hash(ids[i]) % len(seen)
        if seen[mine] < MOST:
            seen[mine] += 1
        if least >= 0 and seen[mine] >= counts[least]:
            if tags[least] != EMPTY:
                its = _hash(tags[least]) % len(seen)
                seen[its] = max(seen[its], counts[least])
            tags[least], counts[least], loading[least] = ids[i], seen[mine], find
            given[i] = least


@njit(nogil=True, cache=True)
def _places(ids: np.ndarray, tags: np.ndarray, loading: np.ndarray, slots: np.ndarray) -> None:
    for i in range(len(ids)):
        first = _first_slot(ids[i], len(tags))
        slots[i] = -1
        for slot in range(first, first + WAYS):
            if tags[slot] == ids[i]:
                slots[i] = slot
                loading[slot] = 0
                break

"""Exact hit rates of a least-recently-used cache of every size, from one pass over the look-ups.

An LRU cache of c rows hits exactly when fewer than c distinct rows were read since the row was last read
(Mattson et al. 1970), so one histogram of these distances holds the curve of all sizes. The distance is the
number of rows whose latest look-up lies behind this row's: one bit a look-up, counted by a Fenwick tree over
words of 64 bits, which stays in a processor's cache where a tree over single look-ups would not.

Shapes: n look-ups, R distinct rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numba import njit

CHUNK = 1 << 20
"""Look-ups between two reports of progress."""
Advance = Callable[[int], None]
"""Told how many more look-ups are done."""


@dataclass(frozen=True, eq=False)
class ReuseDistances:
    """How many distinct rows were read between a look-up and the one before of the same row."""

    counts: np.ndarray
    """Look-ups by distance, int64 [R]: 0 for a row read twice in a row."""
    first: int
    """Look-ups of rows never read before: no cache hits these."""

    @property
    def look_ups(self) -> int:
        """How many look-ups were counted."""
        return int(self.counts.sum()) + self.first

    def hits(self, sizes: np.ndarray) -> np.ndarray:
        """Return how many look-ups a cache of each of `sizes` rows answers, int64."""
        total = np.concatenate([[0], np.cumsum(self.counts)])
        return total[np.clip(sizes, 0, len(self.counts)).astype(np.int64)]


def reuse_distances(
    ids: np.ndarray, distinct: int, start: int = 0, advance: Advance | None = None
) -> ReuseDistances:
    """Return the distances of look-ups [n] of rows numbered from 0 below `distinct`.

    The look-ups before `start` warm the cache and are not counted.
    """
    ids = np.ascontiguousarray(ids, dtype=np.int32)
    last = np.full(distinct, -1, dtype=np.int64)
    words = np.zeros((len(ids) >> 6) + 1, dtype=np.uint64)
    tree = np.zeros(len(words) + 1, dtype=np.int64)
    counts = np.zeros(max(distinct, 1), dtype=np.int64)
    seen, first = 0, 0
    for begin in range(0, len(ids), CHUNK):
        end = min(begin + CHUNK, len(ids))
        seen, cold = _count(ids, begin, end, start, last, words, tree, counts, seen)
        first += cold
        if advance is not None:
            advance(end - begin)
    return ReuseDistances(counts, first)


@njit(nogil=True, cache=True)
def _ones(word: np.uint64) -> np.int64:
    """Return how many bits of a word are set."""
    word = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


@njit(nogil=True, cache=True)
def _count(
    ids: np.ndarray,
    begin: int,
    end: int,
    start: int,
    last: np.ndarray,
    words: np.ndarray,
    tree: np.ndarray,
    counts: np.ndarray,
    seen: int,
) -> tuple[int, int]:
    """Take in look-ups `begin` to `end`; return the rows seen so far and the first look-ups counted.

    Bit t of `words` is set where look-up t is its row's latest; `tree` [words + 1] is the Fenwick tree over
    their numbers.
    """
    cold = 0
    for t in range(begin, end):
        row = ids[t]
        before = last[row]
        if before >= 0:
            word = before >> 6
            bit = np.uint64(before & 63)
            # latest look-ups up to and with `before`, in earlier words and in its own
            upto = _ones(words[word] << (np.uint64(63) - bit))
            node = word
            while node > 0:
                upto += tree[node]
                node &= node - 1
            if t >= start:
                counts[seen - upto] += 1
            words[word] &= ~(np.uint64(1) << bit)
            _add(tree, word, -1)
        else:
            seen += 1
            if t >= start:
                cold += 1
        words[t >> 6] |= np.uint64(1) << np.uint64(t & 63)
        _add(tree, t >> 6, 1)
        last[row] = t
    return seen, cold


@njit(nogil=True, cache=True)
def _add(tree: np.ndarray, word: int, change: int) -> None:
    node = word + 1
    while node < tree.shape[0]:
        tree[node] += change
        node += node & -node

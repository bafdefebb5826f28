"""Hit rate against cache size, measured on text that did not fill the cache.

The first half of the look-ups warms the LRU cache and is counted for the static one; both are measured on
the second half, so the two compare, and neither is flattered by its own text.

Shapes: n look-ups, R distinct rows, K cache sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engram_lab.caching.distances import Advance, reuse_distances
from engram_lab.caching.stream import LookUps

GROUPS = 8
"""Disjoint samples of the rows from which a sampled curve and its error are made."""
RESOLVED = 20
"""Rows of a group that a cache must hold for a sample to tell its hit rate."""
_MIX = 0xD6E8FEB86659FD93


@dataclass(frozen=True, eq=False, kw_only=True)
class HitRates:
    """The curves of one stream of look-ups."""

    look_ups: int
    """Look-ups measured: the second half of the stream."""
    rows: int
    """Distinct rows read in the whole stream."""
    sizes: np.ndarray
    """Rows cached [K], ascending."""
    lru: np.ndarray
    """Share of the look-ups answered by a least-recently-used cache [K]; NaN where a sample cannot tell."""
    lru_error: np.ndarray | None
    """Standard error of `lru` [K] where rows were sampled; None where the curve is exact."""
    static: np.ndarray
    """Share answered when the rows most frequent in the first half are kept [K]."""
    seen: float
    """Share of the measured look-ups whose row occurs in the first half: the static cache's limit."""


def hit_rates(
    stream: LookUps, sizes: np.ndarray | None = None, sample: float = 1.0, advance: Advance | None = None
) -> HitRates:
    """Measure both caches; `sample` below 1 takes that share of the rows for the LRU curve.

    `advance` is told of as many look-ups as the stream has.
    """
    half = len(stream.ids) // 2
    before = np.bincount(stream.ids[:half], minlength=stream.distinct)
    after = np.bincount(stream.ids[half:], minlength=stream.distinct)
    rows = int(np.count_nonzero(before + after))
    sizes = cache_sizes(rows) if sizes is None else np.asarray(sizes, dtype=np.int64)
    measured = len(stream.ids) - half
    static = np.concatenate([[0], np.cumsum(after[by_frequency(before)])])
    if sample >= 1.0:
        distances = reuse_distances(stream.ids, stream.distinct, half, advance)
        lru, error = distances.hits(sizes) / measured, None
    else:
        lru, error = _sampled(stream, half, sizes, sample, advance)
    return HitRates(
        look_ups=measured,
        rows=rows,
        sizes=sizes,
        lru=lru,
        lru_error=error,
        static=static[np.minimum(sizes, len(static) - 1)] / measured,
        seen=float(static[-1] / measured),
    )


def by_frequency(counts: np.ndarray) -> np.ndarray:
    """Return the rows with a count above 0, the most frequent first, those of equal count by number."""
    order = np.argsort(-counts, kind="stable")
    return order[: np.count_nonzero(counts)]


def cache_sizes(rows: int) -> np.ndarray:
    """Return 1, 2, 5, 10, ... below `rows`, and `rows` itself."""
    steps = [m * 10**k for k in range(len(str(rows))) for m in (1, 2, 5)]
    return np.array([size for size in steps if size < rows] + [rows], dtype=np.int64)


def _sampled(
    stream: LookUps, half: int, sizes: np.ndarray, sample: float, advance: Advance | None
) -> tuple[np.ndarray, np.ndarray]:
    """Estimate the LRU curve from a share of the rows, chosen by hash (SHARDS, Waldspurger et al. 2015).

    Each of `GROUPS` disjoint groups holds sample / GROUPS of the rows; its distances count for GROUPS /
    sample times as much. A group that holds more or fewer look-ups than its share of the stream owes it to
    its hot rows, whose distances are short: the difference is taken from the shortest (SHARDS-adj). The mean
    of the groups is the estimate and their scatter its standard error; caches that hold fewer than `RESOLVED`
    rows of a group are left out: there the hot rows decide, and the error would be too small.
    """
    rate = sample / GROUPS
    hashed = (np.arange(stream.distinct, dtype=np.uint64) + np.uint64(1)) * np.uint64(_MIX)
    hashed ^= hashed >> np.uint64(32)
    hashed *= np.uint64(_MIX)
    share = (hashed >> np.uint64(11)).astype(np.float64) / 2**53
    group = np.where(share < sample, (share / rate).astype(np.int8), np.int8(-1))
    expected = rate * (len(stream.ids) - half)
    curves = []
    for number in range(GROUPS):
        kept = np.flatnonzero(group[stream.ids] == number)
        rows = np.cumsum(group == number) - 1
        found = reuse_distances(rows[stream.ids[kept]], int(rows[-1]) + 1, int(np.searchsorted(kept, half)))
        hits = found.hits(np.ceil(sizes * rate).astype(np.int64)) + (expected - found.look_ups)
        curves.append(np.clip(hits / expected, 0.0, 1.0))
        if advance is not None:
            advance(len(stream.ids) * (number + 1) // GROUPS - len(stream.ids) * number // GROUPS)
    resolved = np.where(sizes * rate < RESOLVED, np.nan, 1.0)
    return resolved * np.mean(curves, axis=0), resolved * np.std(curves, axis=0, ddof=1) / np.sqrt(GROUPS)

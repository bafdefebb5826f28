"""Zipf's law of how often rows are read and Heaps' law of how many there are, with honest intervals.

A text is bursty: a word that occurs once comes back. Intervals therefore come from blocks of neighbouring
look-ups, not from single ones, whose independence would make them many times too narrow.

Shapes: n look-ups, R distinct rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from engram_lab.caching.curves import by_frequency
from engram_lab.caching.stream import LookUps

BLOCKS = 32
"""Blocks of neighbouring look-ups: bits of a word, and enough for a 95 % interval."""
DRAWS = 400
LOWEST_RANK = 10
"""The few commonest n-grams are punctuation and follow no law."""
LOWEST_COUNT = 5
"""Times a row must occur in the first half for its rank to be known well enough."""
FLATTEST, STEEPEST = -5.0, 8.0
"""Exponents looked for; what lies beyond is no law of a text, and is given as the nearer of them."""
_EXACT = 1000
"""Terms of the normalising sum that are added one by one; beyond, the integral is exact to 1e-8."""


@dataclass(frozen=True, kw_only=True)
class ZipfLaw:
    """Share of the look-ups that the row of rank r receives ~ r^-exponent, for r in [first, last].

    Ranks are those of the first half of the stream and look-ups those of the second, as in a cache filled by
    measured frequency: ranks taken from the same look-ups would bend the tail.
    """

    exponent: float
    low: float
    high: float
    """Ends of the 95 % interval, from resampled blocks."""
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class HeapsLaw:
    """Distinct rows ~ look-ups^exponent, over the last factor of `BLOCKS` / 2 in look-ups."""

    exponent: float
    low: float
    high: float
    """Ends of the range that holds 95 % of the orders in which the text's blocks may be read."""
    look_ups: tuple[int, ...]
    distinct: tuple[float, ...]
    """Distinct rows among so many look-ups, the mean over the orders."""


def fit_zipf(stream: LookUps, seed: int = 0) -> tuple[ZipfLaw, ...]:
    """Fit by maximum likelihood: the whole range first, then every decade of ranks by itself.

    One exponent describes the stream if the decades agree with it. A range of which the second half reads
    nothing is left out. Empty if fewer than a hundred ranks are known.
    """
    half = len(stream.ids) // 2
    counts = np.bincount(stream.ids[:half], minlength=stream.distinct)
    rank = np.zeros(stream.distinct, dtype=np.int64)
    order = by_frequency(counts)
    rank[order] = np.arange(1, len(order) + 1)
    last = int(np.count_nonzero(counts >= LOWEST_COUNT))
    if last < 10 * LOWEST_RANK:
        return ()
    ranks = rank[stream.ids[half:]]
    ranges = [(LOWEST_RANK, last)]
    decade = LOWEST_RANK
    while decade * 2 < last:
        ranges.append((decade, min(10 * decade, last)))
        decade *= 10
    laws = (_zipf_between(ranks, *ends, seed) for ends in ranges)
    return tuple(law for law in laws if law is not None)


def _zipf_between(ranks: np.ndarray, first: int, last: int, seed: int) -> ZipfLaw | None:
    logs, numbers = np.zeros(BLOCKS), np.zeros(BLOCKS)
    for block, part in enumerate(np.array_split(ranks, BLOCKS)):
        inside = part[(part >= first) & (part <= last)]
        logs[block], numbers[block] = np.log(inside).sum(), len(inside)
    if not numbers.any():
        return None
    draws = np.random.default_rng(seed).integers(0, BLOCKS, (DRAWS, BLOCKS))
    draws = draws[numbers[draws].any(1)]
    means = logs[draws].sum(1) / numbers[draws].sum(1)
    low, high = (_exponent(mean, first, last) for mean in np.quantile(means, [0.975, 0.025]))
    return ZipfLaw(
        exponent=_exponent(logs.sum() / numbers.sum(), first, last),
        low=low,
        high=high,
        first=first,
        last=last,
    )


def _exponent(mean_log: float, first: int, last: int) -> float:
    """Return the exponent at which the mean log rank is `mean_log`: the likelihood's maximum."""

    def excess(exponent: float) -> float:
        return _mean_log(exponent, first, last) - mean_log

    if excess(FLATTEST) <= 0:
        return FLATTEST
    if excess(STEEPEST) >= 0:
        return STEEPEST
    return float(brentq(excess, FLATTEST, STEEPEST, xtol=1e-10))


def _mean_log(exponent: float, first: int, last: int) -> float:
    """Return the mean of log r where r in [first, last] has probability ~ r^-exponent."""
    split = min(last, first + _EXACT)
    logs = np.log(np.arange(first, split + 1))
    weights = np.exp(-exponent * logs)
    total, moment = weights.sum(), (weights * logs).sum()
    if split < last:  # sum over [split + 1, last] by the midpoint rule, in x = log r
        a, b = np.log(split + 0.5), np.log(last + 0.5)
        x = np.linspace(a, b, 20001)
        y = np.exp((1.0 - exponent) * x)
        total += np.trapezoid(y, x)
        moment += np.trapezoid(y * x, x)
    return float(moment / total)


def fit_heaps(stream: LookUps, orders: int = 40, seed: int = 0) -> HeapsLaw | None:
    """Fit the growth of distinct rows by least squares of logarithms; None for too short a text.

    The text's blocks are read in many random orders, so the curve belongs to the kind of text and not to the
    place where one book happens to end.
    """
    length = len(stream.ids) // BLOCKS
    if length == 0:
        return None
    blocks = np.zeros(stream.distinct, dtype=np.uint32)
    for block in range(BLOCKS):
        blocks[stream.ids[block * length : (block + 1) * length]] |= np.uint32(1 << block)
    patterns, numbers = np.unique(blocks[blocks > 0], return_counts=True)
    taken = [2**k for k in range(1, BLOCKS.bit_length())]
    generator = np.random.default_rng(seed)
    grown = np.zeros((orders, len(taken)))
    for draw in range(orders):
        order = generator.permutation(BLOCKS)
        for place, count in enumerate(taken):
            mask = np.uint32(sum(1 << int(block) for block in order[:count]))
            grown[draw, place] = numbers[(patterns & mask) > 0].sum()
    x = np.log(taken)
    slopes = np.polyfit(x, np.log(grown).T, 1)[0]
    low, high = np.quantile(slopes, [0.025, 0.975])
    return HeapsLaw(
        exponent=float(np.polyfit(x, np.log(grown.mean(0)), 1)[0]),
        low=float(low),
        high=float(high),
        look_ups=tuple(count * length for count in taken),
        distinct=tuple(grown.mean(0).tolist()),
    )

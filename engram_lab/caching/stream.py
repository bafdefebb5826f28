"""The rows that a text looks up, one number a position: by n-gram, or by row of a table of limited size.

Shapes: T tokens, N largest order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numba import njit

from engram_lab.caching.distances import CHUNK, Advance
from engram_lab.model.engram import EngramConfig
from engram_lab.model.hashing import NgramHash

_SPREAD = 0x9E3779B97F4A7C15
"""Odd multiplier (2^64 over the golden ratio) that scatters keys over the slots."""


@dataclass(frozen=True, eq=False)
class LookUps:
    """The rows of one head that a text reads, in the order of reading."""

    ids: np.ndarray
    """Row of every position, int32 [T], numbered from 0."""
    distinct: int
    """One more than the largest number."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Text:
    """Token ids and the rule by which they are looked up."""

    ids: np.ndarray
    """[T], one document after the other, each ended by `eos_id`."""
    canonical: np.ndarray
    """Canonical id of every token id, int32 [V]."""
    eos_id: int
    engram: EngramConfig
    """Its boundary, its canonical ids and its seed are used."""

    def rule(self, orders: tuple[int, ...], rows_per_head: int = 2) -> NgramHash:
        """Return the address function of one head for each of `orders`."""
        engram = replace(
            self.engram, orders=orders, heads=1, layers=self.engram.layers[:1], rows_per_head=rows_per_head
        )
        return NgramHash.build(engram, self.canonical, len(self.canonical), self.eos_id)

    def chunks(self, reach: int) -> Iterator[tuple[np.ndarray, int]]:
        """Yield stretches of the ids [1, P + CHUNK], each with the P ids before it that n-grams reach."""
        for begin in range(0, len(self.ids), CHUNK):
            past = min(begin, reach)
            yield self.ids[None, begin - past : begin + CHUNK].astype(np.int32), past


def ngrams(text: Text, longest: int, advance: Advance | None = None) -> Iterator[tuple[int, LookUps]]:
    """Yield, for n from 1 to `longest`, the look-ups in a table that has a row for every distinct n-gram.

    An n-gram is its first n - 1 tokens' number together with one more canonical id, so that the numbers are
    exact: nothing collides.
    """
    rule = text.rule(tuple(range(1, longest + 1)))
    base = int(rule.canonical.max()) + 1
    ids = np.zeros(len(text.ids), dtype=np.int32)
    for n in range(1, longest + 1):
        numbering = _Numbering()
        for number, (chunk, past) in enumerate(text.chunks(rule.history_length)):
            part = ids[number * CHUNK : (number + 1) * CHUNK]
            token = rule.windows(chunk, past)[n - 1, 0]
            part[:] = numbering.number(part.astype(np.int64) * base + token)
            if advance is not None:
                advance(len(part))
        yield n, LookUps(ids.copy(), numbering.count)


def table_rows_read(text: Text, order: int, rows_per_head: int, advance: Advance | None = None) -> LookUps:
    """Return the look-ups of a head of `order` in a table with about `rows_per_head` rows a head."""
    rule = text.rule((order,), rows_per_head)
    ids = np.empty(len(text.ids), dtype=np.int32)
    for number, (chunk, past) in enumerate(text.chunks(rule.history_length)):
        history = chunk[:, :past] if past else None
        found = rule.addresses(chunk[:, past:], history)[0, 0, :, 0]
        ids[number * CHUNK : (number + 1) * CHUNK] = found
        if advance is not None:
            advance(len(found))
    return LookUps(ids, rule.rows[0])


def interleave(ids: np.ndarray, sequences: int) -> np.ndarray:
    """Return the order in which a batch of `sequences` reads the text: position by position, all at once.

    The text [T] is cut into `sequences` equal stretches that advance together; what is left over is dropped.
    """
    length = len(ids) // sequences
    return np.ascontiguousarray(ids[: length * sequences].reshape(sequences, length).T).reshape(-1)


class _Numbering:
    """Numbers keys in the order in which they are first seen."""

    def __init__(self) -> None:
        self.count = 0
        self._keys, self._values = _slots(2 * CHUNK)

    def number(self, keys: np.ndarray) -> np.ndarray:
        """Return the numbers of keys >= 0, int32, new ones for keys that are new."""
        if 2 * (self.count + len(keys)) > len(self._keys):
            old_keys, old_values = self._keys, self._values
            self._keys, self._values = _slots(2 * len(old_keys))
            _move(old_keys, old_values, self._keys, self._values)
        out = np.empty(len(keys), dtype=np.int32)
        self.count = _number(keys, self._keys, self._values, self.count, out)
        return out


def _slots(count: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full(count, -1, dtype=np.int64), np.empty(count, dtype=np.int32)


@njit(nogil=True, cache=True)
def _slot(keys: np.ndarray, key: int) -> int:
    """Return where `key` is, or where it belongs."""
    mask = np.uint64(keys.shape[0] - 1)
    mixed = np.uint64(key) * np.uint64(_SPREAD)
    slot = np.int64((mixed ^ (mixed >> np.uint64(32))) & mask)
    while keys[slot] >= 0 and keys[slot] != key:
        slot = (slot + 1) & np.int64(mask)
    return int(slot)


@njit(nogil=True, cache=True)
def _number(wanted: np.ndarray, keys: np.ndarray, values: np.ndarray, count: int, out: np.ndarray) -> int:
    for i in range(wanted.shape[0]):
        slot = _slot(keys, wanted[i])
        if keys[slot] < 0:
            keys[slot] = wanted[i]
            values[slot] = count
            count += 1
        out[i] = values[slot]
    return count


@njit(nogil=True, cache=True)
def _move(old_keys: np.ndarray, old_values: np.ndarray, new_keys: np.ndarray, new_values: np.ndarray) -> None:
    for i in range(old_keys.shape[0]):
        if old_keys[i] >= 0:
            slot = _slot(new_keys, old_keys[i])
            new_keys[slot] = old_keys[i]
            new_values[slot] = old_values[i]

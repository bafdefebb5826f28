"""From token ids to row numbers: a pure function, the same in a loader worker and while decoding.

The rules are written down in docs/hashing.md and held to golden vectors in data/hash_vectors.json.

Shapes: B batch, T length, P history length, V vocabulary, M memories, N largest order, H heads of all orders.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from engram_lab.errors import UserError
from engram_lab.model.engram import Boundary, EngramConfig
from engram_lab.model.primes import take_primes

HASH_VERSION = 1
"""Goes up when any address changes for the same configuration; part of a run's identity."""

ADDRESS_FIELDS = (
    "module",
    "layers",
    "orders",
    "heads",
    "rows_per_head",
    "hash_seed",
    "boundary",
    "dead_tokens",
    "canonical",
    "multipliers",
    "pad_rows_to",
    "addresses",
)
"""The fields of `EngramConfig` on which the row read for an n-gram depends; no other field does."""

SALT = 0x1E3779B97F4A7C15
"""Odd multiplier that spreads positions over 63 bits for the `shuffled` control."""
INT64_MAX = np.iinfo(np.int64).max


def head_primes(config: EngramConfig) -> np.ndarray:
    """Return the prime number of rows of every head [M, H], none used twice."""
    taken: set[int] = set()
    return np.array(
        [
            [p for start in config.rows_by_order for p in take_primes(start, config.heads, taken)]
            for _ in config.layers
            if config.n_heads
        ],
        dtype=np.int64,
    ).reshape(len(config.layers), config.n_heads)


def table_rows(config: EngramConfig) -> tuple[int, ...]:
    """Return the rows of each layer's table; needs no vocabulary."""
    unit = config.pad_rows_to
    return tuple(-(-int(total) // unit) * unit for total in head_primes(config).sum(axis=1))


def multipliers(config: EngramConfig, n_canonical: int) -> np.ndarray:
    """Return the odd multipliers [M, N] (int64), small enough that id * multiplier never overflows."""
    half = max(1, (INT64_MAX // n_canonical) // 2)
    width = max(config.orders)
    if config.multipliers == "splitmix":
        draws = [
            [_splitmix(config.hash_seed + 10007 * m, k) % half for k in range(width)]
            for m in range(len(config.layers))
        ]
        return np.array(draws, dtype=np.int64) * 2 + 1
    rows = [
        np.random.default_rng(config.hash_seed + 10007 * layer).integers(0, half, width)
        for layer in config.layers
    ]
    return np.stack(rows) * 2 + 1


def _splitmix(seed: int, k: int) -> int:
    """Return output k + 1 of SplitMix64 started at `seed`, counting from 0 (Qwen leaves out the first)."""
    mask = (1 << 64) - 1
    z = (seed + (k + 2) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


@dataclass(frozen=True, eq=False, kw_only=True)
class NgramHash:
    """The address function of one network: build it with `build`, call `addresses`."""

    orders: tuple[int, ...]
    heads: int
    boundary: Boundary
    salted: bool
    constant: bool
    canonical: np.ndarray = field(repr=False)
    """Canonical id of every token id, int32 [V]."""
    edge: np.ndarray = field(repr=False)
    """Whether a token id marks the edge of a document, bool [V]."""
    pad: int
    """Canonical id seen where there is no token."""
    primes: np.ndarray = field(repr=False)
    multipliers: np.ndarray = field(repr=False)
    rows: tuple[int, ...]

    @classmethod
    def build(
        cls,
        engram: EngramConfig,
        canonical: np.ndarray | None,
        vocab_size: int,
        eos_id: int,
        pad_id: int | None = None,
    ) -> NgramHash:
        """Fix the address function for a vocabulary.

        `canonical` maps each token id to its canonical id; None, or `engram.canonical` off, hashes ids as
        they are. `pad_id` is the token seen before the start, the end-of-text id unless given; pad batches
        on the left with it.
        """
        pad_id = eos_id if pad_id is None else pad_id
        dead = engram.dead_tokens or (eos_id,)
        marks = dead if engram.boundary == "dead_tokens" else (eos_id,)
        for name, ids in (("eos_id", (eos_id,)), ("pad_id", (pad_id,)), ("engram.dead_tokens", dead)):
            if min(ids) < 0 or max(ids) >= vocab_size:
                raise UserError(f"{name} is {ids}: token ids here run from 0 to {vocab_size - 1}.")
        if canonical is None or not engram.canonical:
            canonical = np.arange(vocab_size, dtype=np.int32)
        canonical = np.asarray(canonical, dtype=np.int32)
        if canonical.shape != (vocab_size,) or canonical.min() < 0:
            raise UserError(
                f"the map of canonical ids has shape {canonical.shape}: it needs one id >= 0 for each of the "
                f"{vocab_size} tokens; was it made for another tokenizer?"
            )
        edge = np.zeros(vocab_size, dtype=bool)
        edge[list(marks)] = engram.boundary != "sequence_start"
        return cls(
            orders=engram.orders,
            heads=engram.heads,
            boundary=engram.boundary,
            salted=engram.addresses == "shuffled",
            constant=engram.addresses == "constant" or not engram.n_heads,
            canonical=canonical,
            edge=edge,
            pad=int(canonical[pad_id]),
            primes=head_primes(engram),
            multipliers=multipliers(engram, int(canonical.max()) + 1),
            rows=table_rows(engram),
        )

    @cached_property
    def offsets(self) -> np.ndarray:
        """First row of each head in its layer's table [M, H]."""
        return np.cumsum(self.primes, axis=1) - self.primes

    @property
    def dtype(self) -> type[np.signedinteger]:
        """int32 where every row number fits, else int64."""
        return np.int32 if max(self.rows) <= np.iinfo(np.int32).max else np.int64

    @property
    def history_length(self) -> int:
        """How many earlier token ids the addresses of a position depend on."""
        return max(self.orders) - 1

    def addresses(
        self, ids: np.ndarray, history: np.ndarray | None = None, position: int | None = None
    ) -> np.ndarray:
        """Return the row numbers [M, B, T, H] of token ids [B, T], head offsets added.

        `history` [B, P] holds the token ids before these ones while decoding; `history_length` of them are
        enough. `position` is the number of tokens before `ids`, P unless given (only the `shuffled` control
        looks at it).
        """
        ids, past = self._join(ids, history)
        position = past if position is None else position
        if self._tiles is None:
            return self._numpy_addresses(ids, past, position)
        return self._compiled_addresses(ids, past, position)

    def _join(self, ids: np.ndarray, history: np.ndarray | None) -> tuple[np.ndarray, int]:
        """Return history and ids side by side [B, P + T], checked, and P."""
        past = 0 if history is None else history.shape[1]
        joined = ids if history is None else np.concatenate([history, ids], axis=1)
        if joined.size and (int(joined.min()) < 0 or int(joined.max()) >= len(self.canonical)):
            raise UserError(
                f"token ids run from {joined.min()} to {joined.max()}, but the network's vocabulary has "
                f"{len(self.canonical)}: the tokens were made with another tokenizer."
            )
        return joined, past

    @cached_property
    def _tiles(self) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """What the compiled path reads per block: primes, their inverses, offsets; None where it does not
        apply.
        """
        from engram_lab.model.hash_kernel import BLOCK, LARGEST_PRIME

        if self.constant or self.dtype is not np.int32 or self.primes.max() >= LARGEST_PRIME:
            return None
        primes, offsets = (np.tile(a, (1, BLOCK)) for a in (self.primes, self.offsets))
        return primes.astype(np.int32), 1.0 / primes, offsets.astype(np.int32)

    def _compiled_addresses(self, ids: np.ndarray, past: int, position: int) -> np.ndarray:
        from engram_lab.model.hash_kernel import (
            SMALL_PRIME,
            fill_addresses,
        )  # numba takes half a second to import

        assert self._tiles is not None
        B, T, H = ids.shape[0], ids.shape[1] - past, self.primes.shape[1]
        out = np.empty((len(self.rows), B, T * H), dtype=np.int32)
        slots = [self.orders.index(k) if k in self.orders else -1 for k in range(1, max(self.orders) + 1)]
        fill_addresses(
            np.ascontiguousarray(ids, dtype=np.int32),
            past,
            self.canonical,
            self.edge,
            0 if self.boundary == "reset_at_eos" else 1,
            self.pad,
            SALT if self.salted else 0,
            bool(self.primes.min() <= SMALL_PRIME),
            position,
            self.multipliers,
            self.heads,
            np.array(slots, dtype=np.int64),
            *self._tiles,
            out,
        )
        return out.reshape(len(self.rows), B, T, H)

    def _numpy_addresses(self, ids: np.ndarray, past: int, position: int) -> np.ndarray:
        """Whole-array version: plain to read, and the one the fast path is measured against."""
        B, length = ids.shape
        T = length - past
        out = np.empty((len(self.rows), B, T, self.primes.shape[1]), dtype=self.dtype)
        if self.constant:
            out[:] = self.offsets[:, None, None, :]
            return out
        windows = self.windows(ids, past)
        salt = (np.arange(position, position + T, dtype=np.int64) * SALT) & INT64_MAX
        for m, (factors, primes, offsets) in enumerate(
            zip(self.multipliers, self.primes, self.offsets, strict=True)
        ):
            mix = np.zeros((B, T), dtype=np.int64) if not self.salted else np.broadcast_to(salt, (B, T))
            for k in range(max(self.orders)):
                mix = mix ^ (windows[k] * factors[k])
                if k + 1 in self.orders:
                    first = self.orders.index(k + 1) * self.heads
                    span = slice(first, first + self.heads)
                    out[m, :, :, span] = mix[..., None] % primes[span] + offsets[span]
        return out

    def windows(self, ids: np.ndarray, past: int = 0) -> np.ndarray:
        """Return the canonical id seen k positions back, [N, B, T] (int64), for ids [B, P + T] from `past` =
        P on; what lies beyond an edge is the pad id. Two n-grams are equal if these are.
        """
        B, length = ids.shape
        N = max(self.orders)
        seen = np.empty((N, B, length - past), dtype=np.int64)
        canonical = np.pad(self.canonical[ids], ((0, 0), (N - 1, 0)), constant_values=self.pad)
        edge = np.pad(self.edge[ids], ((0, 0), (N - 1, 0)))
        ends = (
            self.boundary == "reset_at_eos"
        )  # an end-of-text id belongs to what it ends, a dead one to what follows
        hidden = np.zeros((B, length - past), dtype=bool)
        for k in range(N):
            here = slice(N - 1 + past - k, N - 1 + length - k)
            if k:
                hidden |= edge[:, here] if ends else edge[:, here.start + 1 : here.stop + 1]
            seen[k] = np.where(hidden, self.pad, canonical[:, here])
        return seen

"""Rows kept in device memory because they are read most often, and the index that finds them there.

Which rows those are is measured: counted over a calibration text (docs/cache-curve.md says what to expect).
The index is a hash table of its own, so that it costs memory by the rows kept, not by those of the table, and
a kernel can ask it without the host.

Shapes: n look-ups, C rows kept, K slots (a power of two), S bytes of one record.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engram_lab.memory.stores import RowStore

SPREAD = 0x1E3779B97F4A7C15
"""Odd multiplier; the product wraps in 64 bits, and its upper half says where a row's first slot is."""


def hottest(addresses: Iterable[Tensor], count: int) -> Tensor:
    """Return the `count` rows read most often, int64 [C] on the CPU, the most frequent first.

    `addresses` are batches of row numbers of any shape; fewer rows are returned where fewer occur. Memory
    grows with the distinct rows that were read.
    """
    rows, numbers = np.empty(0, np.int64), np.empty(0, np.int64)
    for batch in addresses:
        rows, place = np.unique(np.concatenate([rows, batch.cpu().numpy().ravel()]), return_inverse=True)
        known = np.zeros(len(rows), np.int64)
        np.add.at(known, place[: len(numbers)], numbers)
        known += np.bincount(place[len(numbers) :], minlength=len(rows))
        numbers = known
    order = np.lexsort((rows, -numbers))[:count]
    return torch.from_numpy(rows[order])


@dataclass(frozen=True, eq=False)
class HotRows:
    """C records beside the device that computes.

    Attributes:
        records: uint8 [C, S].
        keys: row number in each slot, int64 [K]; -1 where there is none.
        places: which of `records` it is, int32 [K].
        probes: neighbouring slots a row may be in.
    """

    records: Tensor
    keys: Tensor
    places: Tensor
    probes: int

    @classmethod
    def load(cls, store: RowStore, rows: Tensor, device: torch.device) -> HotRows:
        """Copy the distinct `rows` [C] (int64, CPU) of a store that is not written to any more."""
        rows = rows.to(store.device)
        records = torch.empty((len(rows), store.record_bytes), dtype=torch.uint8, device=store.device)
        store.read(rows, records)
        keys, places, probes = _index(rows.cpu().numpy())
        return cls(
            records.to(device),
            torch.from_numpy(keys).to(device),
            torch.from_numpy(places).to(device),
            probes,
        )

    def find(self, ids: Tensor) -> Tensor:
        """Return the place of each of `ids` [n] among the records, int32 [n]; -1 for rows not kept."""
        slot = (ids * SPREAD) >> 32
        place = torch.full_like(ids, -1, dtype=torch.int32)
        for probe in range(self.probes):
            here = (slot + probe) & (len(self.keys) - 1)
            place = torch.where(self.keys[here] == ids, self.places[here], place)
        return place


def _index(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Put every row into the first free of its slots, all that still wait at once.

    Slots are four times the rows, so that few of them are tried.
    """
    slots = 1 << max(4, (4 * len(rows) - 1).bit_length())
    keys, places = np.full(slots, -1, np.int64), np.zeros(slots, np.int32)
    with np.errstate(over="ignore"):
        first = (rows * np.int64(SPREAD)) >> 32
    waiting, probe = np.arange(len(rows)), 0
    while len(waiting):
        slot = (first[waiting] + probe) & (slots - 1)
        free = np.flatnonzero(keys[slot] < 0)
        taken, chosen = np.unique(slot[free], return_index=True)
        placed = free[chosen]
        keys[taken], places[taken] = rows[waiting[placed]], waiting[placed]
        waiting = np.delete(waiting, placed)
        probe += 1
    return keys, places, probe

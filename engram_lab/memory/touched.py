"""Which rows were ever trained, and which since the last checkpoint: one bit a row for each question."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor


class TouchedRows:
    """Two sets of global row numbers out of R; an eighth of a byte a row each."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._ever = np.zeros(-(-rows // 8), dtype=np.uint8)
        self._recent = np.zeros_like(self._ever)

    @staticmethod
    def memory_bytes(rows: int) -> int:
        """Bytes of memory that two sets out of `rows` rows take."""
        return 2 * -(-rows // 8)

    def mark(self, ids: Tensor) -> None:
        """Add rows, int64 [n] on the CPU, to both sets."""
        _mark(ids.numpy(), self._ever, self._recent)

    def take_recent(self) -> Tensor:
        """Return the rows marked since the last call, int64 [k] ascending, and forget them."""
        found = torch.from_numpy(_members(self._recent))
        self._recent[:] = 0
        return found

    def share(self, first: int, last: int) -> float:
        """Return which share of the rows from `first` up to, not including, `last` was ever marked."""
        return _count(self._ever, first, last) / max(last - first, 1)


@njit(nogil=True, cache=True)
def _mark(ids: np.ndarray, ever: np.ndarray, recent: np.ndarray) -> None:
    for row in ids:
        bit = np.uint8(1 << (row & 7))
        ever[row >> 3] |= bit
        recent[row >> 3] |= bit


@njit(nogil=True, cache=True)
def _members(bits: np.ndarray) -> np.ndarray:
    count = 0
    for byte in bits:
        while byte:
            byte &= byte - 1
            count += 1
    found = np.empty(count, dtype=np.int64)
    count = 0
    for place in range(len(bits)):
        if bits[place]:
            for bit in range(8):
                if bits[place] >> bit & 1:
                    found[count] = place * 8 + bit
                    count += 1
    return found


@njit(nogil=True, cache=True)
def _count(bits: np.ndarray, first: int, last: int) -> int:
    count = 0
    row = first
    while row < last:
        if row & 7 == 0 and row + 8 <= last:
            byte = bits[row >> 3]
            while byte:
                byte &= byte - 1
                count += 1
            row += 8
        else:
            count += bits[row >> 3] >> (row & 7) & 1
            row += 1
    return count

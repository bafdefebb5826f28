"""Gathering rows by a kernel that reads the host's memory across the bus."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WORDS_AT_ONCE = 2048  # of 8 bytes, a program


@triton.jit
def _gather(
    table: tl.tensor,
    ids: tl.tensor,
    out: tl.tensor,
    n: tl.tensor,
    WORDS: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, PADDED)
    chosen = tl.load(ids + rows, mask=rows < n, other=0)
    mask = (rows < n)[:, None] & (columns < WORDS)[None, :]
    values = tl.load(table + chosen[:, None] * WORDS + columns[None, :], mask=mask)
    tl.store(out + rows[:, None] * WORDS + columns[None, :], values, mask=mask)


def gather(table: Tensor, ids: Tensor, out: Tensor) -> None:
    """Copy rows `ids` of `table`, uint8 [R, S] registered with CUDA, to `out` [n, S] on the device.

    S is a multiple of 8; `ids` are on the device.
    """
    words = table.shape[1] // 8
    padded = triton.next_power_of_2(words)
    rows = max(1, WORDS_AT_ONCE // padded)
    grid = (triton.cdiv(len(ids), rows),)
    views = table.view(torch.int64), ids, out.view(torch.int64)
    _gather[grid](*views, len(ids), WORDS=words, PADDED=padded, ROWS=rows)

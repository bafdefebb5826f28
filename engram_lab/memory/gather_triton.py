"""Reading rows by a kernel: from device memory, or straight out of the host's over the bus.

A program keeps many small reads under way at once, which is what the bus needs: on an H100 a handful of
programs reach all that it can do (27 million rows/s whatever their size), so the other processors compute on.
A decoding step has few rows and a whole block to hide them behind: the fewer programs read them, the fewer
processors a matrix product beside them has to do without.

Shapes: n rows, W 4-byte words of one record, U row width, K slots of the index.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram_lab.memory.hot_rows import SPREAD, HotRows
from engram_lab.memory.layout import RecordLayout
from engram_lab.memory.resident import FLOAT8_BLOCK

PROGRAMS = 16
"""At most so many programs read over the bus."""
SHARE = 1024
"""Rows that are worth another of them."""
ROWS = 32
"""Rows that a program has under way at once."""
DECODED = 32
"""Rows that a program decodes."""


@triton.jit(do_not_specialize=["n"])
def _gather(
    ids: tl.tensor,
    source: tl.tensor,
    out: tl.tensor,
    keys: tl.tensor,
    places: tl.tensor,
    hot: tl.tensor,
    n: tl.tensor,
    slots: tl.tensor,
    W: tl.constexpr,
    W_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    PROBES: tl.constexpr,
    SPREAD: tl.constexpr,
) -> None:
    """Copy records `ids` [n] of `source` to `out` [n, W], those in the index from `hot`."""
    word = tl.arange(0, W_PADDED)
    step = tl.num_programs(0) * ROWS
    for begin in range(tl.program_id(0) * ROWS, n, step):
        row = begin + tl.arange(0, ROWS)
        inside = row < n
        wanted = inside[:, None] & (word < W)[None, :]
        id = tl.load(ids + row, inside, 0).to(tl.int64)
        target = out + row.to(tl.int64)[:, None] * W + word[None, :]
        far = source + id[:, None] * W + word[None, :]
        if PROBES == 0:
            tl.store(target, tl.load(far, wanted, 0), wanted)
        else:
            place = tl.full((ROWS,), -1, tl.int32)
            first = (id * SPREAD) >> 32
            for probe in tl.static_range(PROBES):
                slot = (first + probe) & (slots - 1)
                key = tl.load(keys + slot, inside, -1)
                place = tl.where(key == id, tl.load(places + slot, inside, 0), place)
            kept = (place >= 0)[:, None]
            near = hot + place.to(tl.int64)[:, None] * W + word[None, :]
            value = tl.load(far, wanted & (place < 0)[:, None], 0) | tl.load(near, wanted & kept, 0)
            tl.store(target, value, wanted)


@triton.jit(do_not_specialize=["n"])
def _float8(
    records: tl.tensor,
    out: tl.tensor,
    n: tl.tensor,
    S: tl.constexpr,
    SCALES: tl.constexpr,
    U: tl.constexpr,
    U_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Write the weights [n, U] of records [n, S] whose codes come first and whose scales lie at `SCALES`."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, U_PADDED)[None, :]
    wanted = (row < n) & (column < U)
    start = records + row.to(tl.int64) * S
    code = tl.load(start + column, wanted, 0).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    exponent = tl.load(start + SCALES + column // BLOCK, wanted, 0).to(tl.int8, bitcast=True).to(tl.int32)
    scale = ((exponent + 127) << 23).to(tl.float32, bitcast=True)  # an exact power of two
    tl.store(out + row.to(tl.int64) * U + column, (code * scale).to(out.dtype.element_ty), wanted)


def gather(records: Tensor, ids: Tensor, out: Tensor, hot: HotRows | None = None) -> None:
    """Copy `records` `ids` [n] to `out` [n, S] on the current stream, without the host's help.

    `records` [R, S] (uint8, S a multiple of 4) lie in device memory or in host memory registered with CUDA.
    Row numbers are not checked.
    """
    n, words = len(ids), records.shape[1] // 4
    if n == 0:
        return
    index = (ids, ids, ids) if hot is None else (hot.keys, hot.places, hot.records.view(torch.int32))
    programs = triton.cdiv(n, ROWS) if records.is_cuda else min(PROGRAMS, triton.cdiv(n, SHARE))
    _gather[(programs,)](
        ids,
        records.view(torch.int32),
        out.view(torch.int32),
        *index,
        n,
        0 if hot is None else len(hot.keys),
        W=words,
        W_PADDED=triton.next_power_of_2(words),
        ROWS=ROWS,
        PROBES=0 if hot is None else hot.probes,
        SPREAD=SPREAD,
        sanitize_overflow=False,  # products of the index wrap around
    )


def decode_float8(layout: RecordLayout, records: Tensor, out: Tensor) -> None:
    """Write the weights of float8 `records` [n, S] into `out` [n, U], of any floating type."""
    n, U = out.shape
    if n == 0:
        return
    _float8[(triton.cdiv(n, DECODED),)](
        records,
        out,
        n,
        S=layout.record_bytes,
        SCALES=layout.places["scales"].offset,
        U=U,
        U_PADDED=triton.next_power_of_2(U),
        BLOCK=U if layout.weights == "float8_row" else FLOAT8_BLOCK,
        ROWS=DECODED,
    )

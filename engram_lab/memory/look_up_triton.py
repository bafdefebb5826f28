"""Reading rows of a table on a GPU, and adding up what every row's readers send back.

torch's own look-up starts one block of threads a row, too much for rows of a few dozen bytes. The gradient
sorts the ids; sums of equal ids are formed in slices of the sorted list, and those that reach over slices are
put together in order, so that equal inputs give equal bits.

Shapes: n ids, R rows, U row width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_VALUES = 4096
"""Values that one program reads."""
_SLICE, _CHANNELS = 64, 64
"""Sorted ids and channels that one program sums."""
_PIECES = 32
"""Slices of one row's sum that are read at once."""


@triton.jit(do_not_specialize=["n"])
def _read(
    weight: tl.tensor, ids: tl.tensor, out: tl.tensor, n: tl.tensor, U: tl.constexpr, STRIDE: tl.constexpr,
    IDS: tl.constexpr, U_PADDED: tl.constexpr,
) -> None:  # fmt: skip
    i = tl.program_id(0) * IDS + tl.arange(0, IDS)
    u = tl.arange(0, U_PADDED)[None, :]
    row = tl.load(ids + i, i < n, 0).to(tl.int64)
    real = (i < n)[:, None] & (u < U)
    rows = tl.load(weight + row[:, None] * STRIDE + u, real)
    tl.store(out + i[:, None].to(tl.int64) * U + u, rows, real)


@triton.jit
def _add_in_run(a: tl.tensor, a_starts: tl.tensor, b: tl.tensor, b_starts: tl.tensor) -> tuple[Any, Any]:
    return tl.where(b_starts != 0, b, a + b), a_starts | b_starts


@triton.jit(do_not_specialize=["n"])
def _sum_slices(
    grad: tl.tensor, ids: tl.tensor, order: tl.tensor, heads: tl.tensor, tails: tl.tensor, out: tl.tensor,
    n: tl.tensor, U: tl.constexpr, SLICE: tl.constexpr, BU: tl.constexpr,
) -> None:  # fmt: skip
    """Add up the runs of equal ids in one slice of the sorted list.

    A run that began before the slice goes to its head, one that goes on behind it to its tail.
    """
    at = tl.arange(0, SLICE)
    i = tl.program_id(0) * SLICE + at
    u = tl.program_id(1) * BU + tl.arange(0, BU)[None, :]
    row = tl.load(ids + i, i < n, -1)
    begins = row != tl.load(ids + i - 1, (i > 0) & (i < n), -1)
    ends = (row != tl.load(ids + i + 1, i + 1 < n, -1)) & (i < n)
    source = tl.load(order + i, i < n, 0).to(tl.int64)
    values = tl.load(grad + source[:, None] * U + u, (i < n)[:, None] & (u < U), 0.0)
    starts = (begins | (at == 0)).to(tl.int32)
    sums, _ = tl.associative_scan(
        (values, tl.broadcast_to(starts[:, None], SLICE, BU)), axis=0, combine_fn=_add_in_run
    )
    inherited = tl.cumsum(begins.to(tl.int32), axis=0) == 0  # of the run that enters the slice
    last = (at == SLICE - 1) & (i < n)
    place = out + row.to(tl.int64)[:, None] * U + u
    tl.store(place, sums, (ends & (inherited == 0))[:, None] & (u < U))
    piece = tl.program_id(0) * U + tl.zeros_like(row)[:, None] + u
    tl.store(heads + piece, sums, (inherited & (ends | last))[:, None] & (u < U))
    tl.store(tails + piece, sums, (last & (ends == 0) & (inherited == 0))[:, None] & (u < U))


@triton.jit(do_not_specialize=["n", "slices"])
def _join_slices(
    ids: tl.tensor, heads: tl.tensor, tails: tl.tensor, out: tl.tensor, n: tl.tensor, slices: tl.tensor,
    U: tl.constexpr, SLICE: tl.constexpr, PIECES: tl.constexpr, BU: tl.constexpr,
) -> None:  # fmt: skip
    """Finish the run that begins in this slice and goes on behind it, if there is one."""
    number = tl.program_id(0)
    first, last = number * SLICE, number * SLICE + SLICE - 1
    if last + 1 >= n:
        return
    row = tl.load(ids + last)
    if tl.load(ids + last + 1) != row:
        return
    entered = tl.load(ids + first - 1, first > 0, -1)
    if (tl.load(ids + first) == row) & (entered == row):
        return
    u = tl.program_id(1) * BU + tl.arange(0, BU)
    y = tl.load(tails + number * U + u, u < U, 0.0)
    begin = number + 1
    going = True
    while going:
        piece = begin + tl.arange(0, PIECES)
        same = tl.load(ids + piece * SLICE, piece < slices, -1) == row
        y += tl.sum(
            tl.load(heads + piece[:, None] * U + u[None, :], same[:, None] & (u < U)[None, :], 0.0), axis=0
        )
        begin += PIECES
        going = tl.sum(same.to(tl.int32), axis=0) == PIECES
    tl.store(out + row.to(tl.int64) * U + u, y, u < U)


@torch.library.custom_op("engram_lab::look_up", mutates_args=())
def look_up(weight: Tensor, ids: Tensor) -> Tensor:
    """Return rows [..., U] of weight [R, U] for ids [...] of any integer type, all below R.

    Rows may lie apart, as those of records do.
    """
    U = weight.shape[1]
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    out = weight.new_empty(*ids.shape, U)
    width = triton.next_power_of_2(U)
    block = max(1, _VALUES // width)
    with torch.cuda.device_of(weight):
        _read[(triton.cdiv(ids.numel(), block),)](
            weight, ids.contiguous(), out, ids.numel(), U=U, STRIDE=weight.stride(0), IDS=block,
            U_PADDED=width, num_warps=4,
        )  # fmt: skip
    return out


@look_up.register_fake
def _(weight: Tensor, ids: Tensor) -> Tensor:
    return weight.new_empty(*ids.shape, weight.shape[1])


@torch.library.custom_op("engram_lab::look_up_backward", mutates_args=())
def _look_up_backward(grad: Tensor, ids: Tensor, rows: int) -> Tensor:
    """Return the gradient of the table [rows, U], given that of its readings [..., U]."""
    U, n = grad.shape[-1], ids.numel()
    out = grad.new_zeros(rows, U)
    ids, order = ids.flatten().to(torch.int32).sort(stable=True)
    slices, width = triton.cdiv(n, _SLICE), min(_CHANNELS, triton.next_power_of_2(U))
    grid = slices, triton.cdiv(U, width)
    heads, tails = grad.new_empty(slices, U), grad.new_empty(slices, U)
    with torch.cuda.device_of(grad):
        _sum_slices[grid](grad, ids, order, heads, tails, out, n, U=U, SLICE=_SLICE, BU=width, num_warps=4)
        _join_slices[grid](
            ids, heads, tails, out, n, slices, U=U, SLICE=_SLICE, PIECES=_PIECES, BU=width, num_warps=1
        )
    return out


@_look_up_backward.register_fake
def _(grad: Tensor, ids: Tensor, rows: int) -> Tensor:
    return grad.new_empty(rows, grad.shape[-1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    weight, ids = inputs
    ctx.save_for_backward(ids)
    ctx.rows = weight.shape[0]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (ids,) = ctx.saved_tensors
    return _look_up_backward(grad.contiguous(), ids, ctx.rows), None


look_up.register_autograd(_differentiate, setup_context=_save)

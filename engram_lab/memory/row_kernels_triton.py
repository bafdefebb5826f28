"""Row optimizers over records on a GPU: one program a row, one pass over memory.

The functions are those of row_kernels_cpu.py, with the same arithmetic (but that products and sums may fuse)
and the same random bits. How long a row went unread is one number a program, so a gap costs its own row only.
Nothing is read back: step sizes come as arguments, a scale as a tensor.

Shapes: n records, U row width, C columns and N nodes of the table of constants (memory/catch_up.py).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram_lab.memory import catch_up
from engram_lab.memory.layout import RecordLayout

DECAY = tl.constexpr(catch_up.DECAY)
DECAY_SQ = tl.constexpr(catch_up.DECAY_SQ)
DECAY_ROOT = tl.constexpr(catch_up.DECAY_ROOT)
RATE = tl.constexpr(catch_up.RATE)
UNBIAS = tl.constexpr(catch_up.UNBIAS)
NODES = tl.constexpr(catch_up.NODES)
WEIGHT, AVERAGE, SQUARE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _mix(x: tl.tensor) -> tl.tensor:
    """Return 32 bits that look unrelated to those of `x` (uint32), one to one."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _key(start: tl.tensor, row: tl.tensor) -> tl.tensor:
    """What a row's random bits in a step begin with; `start` (int32) stands for seed and step."""
    return _mix(start.to(tl.uint32, bitcast=True) ^ _mix(_mix(row.to(tl.uint32)) ^ (row >> 32).to(tl.uint32)))


@triton.jit
def _load(
    words: tl.tensor,
    halves: tl.tensor,
    base: tl.tensor,
    AT: tl.constexpr,
    NARROW: tl.constexpr,
    c: tl.tensor,
    U: tl.constexpr,
) -> tl.tensor:
    """Return the field at byte `AT` of the record at byte `base`, as float32."""
    if NARROW:
        bits = (
            tl.load(halves + (base + AT) // 2 + c, c < U, 0).to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        )
    else:
        bits = tl.load(words + (base + AT) // 4 + c, c < U, 0)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _store(
    words: tl.tensor,
    halves: tl.tensor,
    base: tl.tensor,
    AT: tl.constexpr,
    NARROW: tl.constexpr,
    c: tl.tensor,
    U: tl.constexpr,
    value: tl.tensor,
    key: tl.tensor,
    NUMBER: tl.constexpr,
) -> None:
    """Put a field back, rounded at random to bfloat16 where it is `NARROW`."""
    if NARROW:
        bits = value.to(tl.uint32, bitcast=True)
        noise = _mix(key + (c.to(tl.uint32) * 4 + NUMBER) * 0x9E3779B9) >> 16
        finite = (bits & 0x7F800000) != 0x7F800000
        bits = tl.where(finite, bits + noise, bits) >> 16
        tl.store(halves + (base + AT) // 2 + c, bits.to(tl.uint16).to(tl.int16, bitcast=True), c < U)
    else:
        tl.store(words + (base + AT) // 4 + c, value.to(tl.int32, bitcast=True), c < U)


@triton.jit
def _catch_up(
    w: tl.tensor,
    m: tl.tensor,
    v: tl.tensor,
    last: tl.tensor,
    gap: tl.tensor,
    table: tl.tensor,
    eps: tl.tensor,
    C: tl.constexpr,
    N: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return w, m, v after `gap` steps without gradients after `last`."""
    d = tl.sqrt_rn(v)
    total = tl.zeros_like(d)
    begin, end, across = table + last * C, table + (last + gap) * C, table + gap * C
    decay, root = tl.load(across + DECAY), tl.load(across + DECAY_ROOT)
    if gap <= 2 * N:
        for k in range(1, gap + 1):
            rate = tl.load(begin + k * C + RATE) * tl.load(table + k * C + DECAY)
            unbias = tl.load(begin + k * C + UNBIAS) * tl.load(table + k * C + DECAY_ROOT)
            total += rate / (d * unbias + eps)
    else:
        for i in tl.static_range(N):
            total += tl.load(begin + NODES + i) / (d + tl.load(begin + NODES + N + i))
        for i in tl.static_range(N):
            total -= tl.load(end + NODES + i) * decay / (d * root + tl.load(end + NODES + N + i))
    return w - m * total, m * decay, v * tl.load(across + DECAY_SQ)


@triton.jit(do_not_specialize=["to"])
def _adam_read(
    words: tl.tensor,
    halves: tl.tensor,
    to: tl.tensor,
    table: tl.tensor,
    eps: tl.tensor,
    out: tl.tensor,
    RECORD: tl.constexpr,
    PLACES: tl.constexpr,
    NARROW: tl.constexpr,
    U: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, WIDTH)
    base = row * RECORD
    w = _load(words, halves, base, PLACES[0], NARROW[0], c, U)
    last = tl.load(words + (base + PLACES[3]) // 4)
    if (last > 0) & (last < to):
        m = _load(words, halves, base, PLACES[1], NARROW[1], c, U)
        v = _load(words, halves, base, PLACES[2], NARROW[1], c, U)
        w, m, v = _catch_up(w, m, v, last, to - last, table, eps, C, N)
    tl.store(out + row * U + c, w, c < U)


@triton.jit(do_not_specialize=["step", "start"])
def _adam_update(
    words: tl.tensor,
    halves: tl.tensor,
    ids: tl.tensor,
    gradients: tl.tensor,
    scale: tl.tensor,
    step: tl.tensor,
    table: tl.tensor,
    beta2: tl.tensor,
    new1: tl.tensor,
    new2: tl.tensor,
    eps: tl.tensor,
    start: tl.tensor,
    RECORD: tl.constexpr,
    PLACES: tl.constexpr,
    NARROW: tl.constexpr,
    U: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, WIDTH)
    base = row * RECORD
    w = _load(words, halves, base, PLACES[0], NARROW[0], c, U)
    m = _load(words, halves, base, PLACES[1], NARROW[1], c, U)
    v = _load(words, halves, base, PLACES[2], NARROW[1], c, U)
    last = tl.load(words + (base + PLACES[3]) // 4)
    if (last > 0) & (last < step - 1):
        w, m, v = _catch_up(w, m, v, last, step - 1 - last, table, eps, C, N)
    g = tl.load(gradients + row * U + c, c < U, 0.0) * tl.load(scale)
    m += (g - m) * new1
    v = v * beta2 + g * g * new2
    rate, unbias = tl.load(table + step * C + RATE), tl.load(table + step * C + UNBIAS)
    w -= tl.div_rn(rate * m, tl.sqrt_rn(v) * unbias + eps)
    key = _key(start, tl.load(ids + row))
    _store(words, halves, base, PLACES[0], NARROW[0], c, U, w, key, WEIGHT)
    _store(words, halves, base, PLACES[1], NARROW[1], c, U, m, key, AVERAGE)
    _store(words, halves, base, PLACES[2], NARROW[1], c, U, v, key, SQUARE)
    tl.store(words + (base + PLACES[3]) // 4, step)


@triton.jit(do_not_specialize=["start"])
def _adagrad_update(
    words: tl.tensor,
    halves: tl.tensor,
    ids: tl.tensor,
    gradients: tl.tensor,
    scale: tl.tensor,
    rate: tl.tensor,
    eps: tl.tensor,
    start: tl.tensor,
    RECORD: tl.constexpr,
    PLACES: tl.constexpr,
    NARROW: tl.constexpr,
    U: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, WIDTH)
    base = row * RECORD
    w = _load(words, halves, base, PLACES[0], NARROW[0], c, U)
    sum_at = words + (base + PLACES[1]) // 4
    g = tl.load(gradients + row * U + c, c < U, 0.0) * tl.load(scale)
    sum_sq = tl.load(sum_at).to(tl.float32, bitcast=True) + tl.sum(g * g, 0) / U
    w -= g * tl.div_rn(rate, tl.sqrt_rn(sum_sq) + eps)
    _store(words, halves, base, PLACES[0], NARROW[0], c, U, w, _key(start, tl.load(ids + row)), WEIGHT)
    tl.store(sum_at, sum_sq.to(tl.int32, bitcast=True))


@triton.jit(do_not_specialize=["step", "start"])
def _average(
    words: tl.tensor,
    halves: tl.tensor,
    ids: tl.tensor,
    gradients: tl.tensor,
    scale: tl.tensor,
    step: tl.tensor,
    table: tl.tensor,
    momentum: tl.tensor,
    new: tl.tensor,
    start: tl.tensor,
    out: tl.tensor,
    RECORD: tl.constexpr,
    PLACES: tl.constexpr,
    NARROW: tl.constexpr,
    U: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, WIDTH)
    base = row * RECORD
    last_at = words + (base + PLACES[2]) // 4
    m = _load(words, halves, base, PLACES[1], NARROW[1], c, U)
    m *= tl.load(table + tl.maximum(step - 1 - tl.load(last_at), 0))
    g = tl.load(gradients + row * U + c, c < U, 0.0) * tl.load(scale)
    m += (g - m) * new
    tl.store(out + row * U + c, g + (m - g) * momentum, c < U)
    _store(words, halves, base, PLACES[1], NARROW[1], c, U, m, _key(start, tl.load(ids + row)), AVERAGE)
    tl.store(last_at, step)


@triton.jit(do_not_specialize=["start"])
def _move(
    words: tl.tensor,
    halves: tl.tensor,
    ids: tl.tensor,
    change: tl.tensor,
    factor: tl.tensor,
    start: tl.tensor,
    RECORD: tl.constexpr,
    PLACES: tl.constexpr,
    NARROW: tl.constexpr,
    U: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, WIDTH)
    base = row * RECORD
    w = _load(words, halves, base, PLACES[0], NARROW[0], c, U)
    w += tl.load(change + row * U + c, c < U, 0.0) * factor
    _store(words, halves, base, PLACES[0], NARROW[0], c, U, w, _key(start, tl.load(ids + row)), WEIGHT)


def adam_read(layout: RecordLayout, records: Tensor, to: int, table: Tensor, eps: float, out: Tensor) -> None:
    """Write to `out` [n, U] the weights after step `to`, gradients of steps not yet seen taken as zero."""
    _launch(_adam_read, layout, records, to, table, eps, out, **_sizes(table))


def adam_update(
    layout: RecordLayout,
    records: Tensor,
    ids: Tensor,
    gradients: Tensor,
    scale: Tensor | float,
    step: int,
    table: Tensor,
    betas: tuple[float, float],
    eps: float,
    start: int,
) -> None:
    """Catch the records up to the step before `step` and take `step`, in place."""
    taken = ids, gradients, _on_device(scale, records), step, table
    beta1, beta2 = betas
    numbers = beta2, 1 - beta1, 1 - beta2, eps, _signed(start)
    _launch(_adam_update, layout, records, *taken, *numbers, **_sizes(table))


def adagrad_update(
    layout: RecordLayout,
    records: Tensor,
    ids: Tensor,
    gradients: Tensor,
    scale: Tensor | float,
    rate: float,
    eps: float,
    start: int,
) -> None:
    """Take a step of row-wise Adagrad, in place."""
    taken = ids, gradients, _on_device(scale, records)
    _launch(_adagrad_update, layout, records, *taken, rate, eps, _signed(start))


def average(
    layout: RecordLayout,
    records: Tensor,
    ids: Tensor,
    gradients: Tensor,
    scale: Tensor | float,
    step: int,
    table: Tensor,
    momentum: float,
    start: int,
    out: Tensor,
) -> None:
    """Take the gradients into the momentum, in place, and write Nesterov's update to `out` [n, U]."""
    taken = ids, gradients, _on_device(scale, records), step, table
    _launch(_average, layout, records, *taken, momentum, 1 - momentum, _signed(start), out)


def move(
    layout: RecordLayout, records: Tensor, ids: Tensor, change: Tensor, factor: float, start: int
) -> None:
    """Add `factor` times `change` [n, U] to the weights, in place."""
    _launch(_move, layout, records, ids, change, factor, _signed(start))


def _launch(kernel: Any, layout: RecordLayout, records: Tensor, *given: Any, **sizes: int) -> None:
    """Run a program for every record."""
    if not len(records):
        return
    with torch.cuda.device_of(records):
        kernel[(len(records),)](
            records.view(torch.int32),
            records.view(torch.int16),
            *given,
            RECORD=layout.record_bytes,
            PLACES=tuple(field.offset for field in layout.places.values()),
            NARROW=(layout.weights == "bfloat16", layout.state == "bfloat16"),
            U=layout.row_dim,
            WIDTH=triton.next_power_of_2(layout.row_dim),
            num_warps=1,
            **sizes,
        )


def _sizes(table: Tensor) -> dict[str, int]:
    return {"C": table.shape[1], "N": (table.shape[1] - catch_up.NODES) // 2}


def _on_device(scale: Tensor | float, records: Tensor) -> Tensor:
    if isinstance(scale, Tensor):
        return scale.float()
    return torch.full((), scale, device=records.device)


def _signed(bits: int) -> int:
    """Return 32 bits as an int32, so that the argument has one type whatever its value."""
    return bits - (bits >> 31 << 32)

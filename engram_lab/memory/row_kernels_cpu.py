"""Row optimizers over records on a CPU: one compiled pass over memory, in one thread.

The kernels release the interpreter's lock and work row by row, so a caller may give disjoint rows to several
threads and gets the same bits whatever their number. A record is taken into scratch space that stays in the
first-level cache, worked on in float32 there, and put back.

Numbers that are stored as bfloat16 are rounded up or down at random, with the odds that make the mean exact:
16 random bits are added below the bits that stay. They are a function of (seed, step, row, column, field),
the same here and in row_kernels_triton.py: a 32-bit mixer (https://github.com/skeeto/hash-prospector) over
the row, over that with seed and step, and over that plus column * 4 + field multiples of the golden ratio.

Shapes: n records, U row width.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from torch import Tensor

from engram_lab.memory.catch_up import DECAY, DECAY_ROOT, DECAY_SQ, NODES, RATE, UNBIAS
from engram_lab.memory.layout import RecordLayout

GOLDEN = np.uint32(0x9E3779B9)
WEIGHT, AVERAGE, SQUARE = np.uint32(0), np.uint32(1), np.uint32(2)
"""Numbers of the fields: each has its own random bits."""


@njit(inline="always")
def mix(x: np.uint32) -> np.uint32:
    """Return a number that looks unrelated to `x`, one to one."""
    x = np.uint32(x ^ (x >> np.uint32(16)))
    x = np.uint32(x * np.uint32(0x7FEB352D))
    x = np.uint32(x ^ (x >> np.uint32(15)))
    x = np.uint32(x * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))


@njit(inline="always")
def _key(start: np.uint32, row: np.int64) -> np.uint32:
    """What a row's random bits in a step begin with; `start` stands for seed and step."""
    return mix(np.uint32(start ^ mix(np.uint32(mix(np.uint32(row)) ^ np.uint32(row >> 32)))))


@njit(inline="always")
def _load(words: np.ndarray, halves: np.ndarray, at: int, narrow: bool, bits: np.ndarray) -> None:
    """Take the field at byte `at` of a record into `bits` [U], as the bits of float32."""
    U = len(bits)
    if narrow:
        field = halves[at // 2 : at // 2 + U]
        for c in range(U):
            bits[c] = np.uint32(field[c]) << np.uint32(16)
    else:
        wide = words[at // 4 : at // 4 + U]
        for c in range(U):
            bits[c] = wide[c]


@njit(inline="always")
def _store(
    words: np.ndarray,
    halves: np.ndarray,
    at: int,
    narrow: bool,
    bits: np.ndarray,
    key: np.uint32,
    number: np.uint32,
) -> None:
    """Put `bits` [U] back, rounded at random to bfloat16 where the field is `narrow`."""
    U = len(bits)
    if narrow:
        field = halves[at // 2 : at // 2 + U]
        for c in range(U):
            place = np.uint32(np.uint32(np.uint32(c) << np.uint32(2)) + number)
            noise = np.uint32(mix(np.uint32(key + np.uint32(place * GOLDEN))) >> np.uint32(16))
            finite = np.uint32(bits[c] & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
            field[c] = np.uint16(np.uint32(bits[c] + (noise if finite else np.uint32(0))) >> np.uint32(16))
    else:
        wide = words[at // 4 : at // 4 + U]
        for c in range(U):
            wide[c] = bits[c]


@njit(inline="always")
def _catch_up(
    last: int,
    gap: int,
    table: np.ndarray,
    eps: np.float32,
    w: np.ndarray,
    m: np.ndarray,
    v: np.ndarray,
    d: np.ndarray,
    total: np.ndarray,
) -> None:
    """Take w, m, v [U] over `gap` steps without gradients after `last`; memory/catch_up.py has the sums."""
    U = len(w)
    n = (table.shape[1] - NODES) // 2
    for c in range(U):
        d[c] = np.sqrt(v[c])
        total[c] = np.float32(0)
    if gap <= 2 * n:
        for k in range(1, gap + 1):
            rate = table[last + k, RATE] * table[k, DECAY]
            root = table[last + k, UNBIAS] * table[k, DECAY_ROOT]
            for c in range(U):
                total[c] += rate / (d[c] * root + eps)
    else:
        now = last + gap
        for i in range(NODES, NODES + n):
            weight, shift = table[last, i], table[last, n + i]
            for c in range(U):
                total[c] += weight / (d[c] + shift)
        decay, root = table[gap, DECAY], table[gap, DECAY_ROOT]
        for i in range(NODES, NODES + n):
            weight, shift = table[now, i] * decay, table[now, n + i]
            for c in range(U):
                total[c] -= weight / (d[c] * root + shift)
    decay, decay_sq = table[gap, DECAY], table[gap, DECAY_SQ]
    for c in range(U):
        w[c] -= m[c] * total[c]
        m[c] *= decay
        v[c] *= decay_sq


@njit(nogil=True, cache=True, error_model="numpy")
def _adam_read(
    words: np.ndarray,
    halves: np.ndarray,
    places: tuple[int, ...],
    narrow: tuple[bool, bool],
    to: int,
    table: np.ndarray,
    eps: np.float32,
    out: np.ndarray,
) -> int:
    n, U = out.shape
    bits = np.empty((3, U), np.uint32)
    values = bits.view(np.float32)
    d, total = np.empty(U, np.float32), np.empty(U, np.float32)
    ahead = 0
    for i in range(n):
        _load(words[i], halves[i], places[0], narrow[0], bits[0])
        last = int(words[i, places[3] // 4])
        ahead += int(last > to)
        if 0 < last < to:
            _load(words[i], halves[i], places[1], narrow[1], bits[1])
            _load(words[i], halves[i], places[2], narrow[1], bits[2])
            _catch_up(last, to - last, table, eps, values[0], values[1], values[2], d, total)
        for c in range(U):
            out[i, c] = values[0, c]
    return ahead


@njit(nogil=True, cache=True, error_model="numpy")
def _adam_update(
    words: np.ndarray,
    halves: np.ndarray,
    places: tuple[int, ...],
    narrow: tuple[bool, bool],
    ids: np.ndarray,
    gradients: np.ndarray,
    scale: np.float32,
    step: int,
    table: np.ndarray,
    beta2: np.float32,
    new1: np.float32,
    new2: np.float32,
    eps: np.float32,
    start: np.uint32,
) -> int:
    n, U = gradients.shape
    bits = np.empty((3, U), np.uint32)
    values = bits.view(np.float32)
    w, m, v = values[0], values[1], values[2]
    d, total = np.empty(U, np.float32), np.empty(U, np.float32)
    rate, unbias = table[step, RATE], table[step, UNBIAS]
    ahead = 0
    for i in range(n):
        _load(words[i], halves[i], places[0], narrow[0], bits[0])
        _load(words[i], halves[i], places[1], narrow[1], bits[1])
        _load(words[i], halves[i], places[2], narrow[1], bits[2])
        last = int(words[i, places[3] // 4])
        ahead += int(last >= step)
        if 0 < last < step - 1:
            _catch_up(last, step - 1 - last, table, eps, w, m, v, d, total)
        g = gradients[i]
        for c in range(U):
            gradient = g[c] * scale
            m[c] += (gradient - m[c]) * new1
            v[c] = v[c] * beta2 + gradient * gradient * new2
            w[c] -= rate * m[c] / (np.sqrt(v[c]) * unbias + eps)
        key = _key(start, ids[i])
        _store(words[i], halves[i], places[0], narrow[0], bits[0], key, WEIGHT)
        _store(words[i], halves[i], places[1], narrow[1], bits[1], key, AVERAGE)
        _store(words[i], halves[i], places[2], narrow[1], bits[2], key, SQUARE)
        words[i, places[3] // 4] = np.uint32(step)
    return ahead


@njit(nogil=True, cache=True, error_model="numpy")
def _adagrad_update(
    words: np.ndarray,
    halves: np.ndarray,
    places: tuple[int, ...],
    narrow: bool,
    ids: np.ndarray,
    gradients: np.ndarray,
    scale: np.float32,
    rate: np.float32,
    eps: np.float32,
    start: np.uint32,
) -> None:
    n, U = gradients.shape
    bits, sum_bits = np.empty(U, np.uint32), np.empty(1, np.uint32)
    w, sum_sq = bits.view(np.float32), sum_bits.view(np.float32)
    squares = np.empty(U, np.float32)
    for i in range(n):
        _load(words[i], halves[i], places[0], narrow, bits)
        g = gradients[i]
        for c in range(U):
            squares[c] = (g[c] * scale) * (g[c] * scale)
        width = U
        while width > 1:  # add up in pairs: as vectors, and in an order of its own
            half = width // 2
            first, second = squares[:half], squares[width - half : width]
            for c in range(half):
                first[c] += second[c]
            width -= half
        sum_bits[0] = words[i, places[1] // 4]
        sum_sq[0] += squares[0] / np.float32(U)
        factor = scale * rate / (np.sqrt(sum_sq[0]) + eps)
        for c in range(U):
            w[c] -= g[c] * factor
        _store(words[i], halves[i], places[0], narrow, bits, _key(start, ids[i]), WEIGHT)
        words[i, places[1] // 4] = sum_bits[0]


@njit(nogil=True, cache=True, error_model="numpy")
def _average(
    words: np.ndarray,
    halves: np.ndarray,
    places: tuple[int, ...],
    narrow: bool,
    ids: np.ndarray,
    gradients: np.ndarray,
    scale: np.float32,
    step: int,
    table: np.ndarray,
    momentum: np.float32,
    new: np.float32,
    start: np.uint32,
    out: np.ndarray,
) -> int:
    n, U = gradients.shape
    bits = np.empty(U, np.uint32)
    m = bits.view(np.float32)
    ahead = 0
    for i in range(n):
        _load(words[i], halves[i], places[0], narrow, bits)
        last = int(words[i, places[1] // 4])
        ahead += int(last >= step)
        decay = table[max(step - 1 - last, 0), DECAY]
        g, update = gradients[i], out[i]
        for c in range(U):
            gradient = g[c] * scale
            m[c] = m[c] * decay
            m[c] += (gradient - m[c]) * new
            update[c] = gradient + (m[c] - gradient) * momentum
        _store(words[i], halves[i], places[0], narrow, bits, _key(start, ids[i]), AVERAGE)
        words[i, places[1] // 4] = np.uint32(step)
    return ahead


@njit(nogil=True, cache=True)
def _move(
    words: np.ndarray,
    halves: np.ndarray,
    place: int,
    narrow: bool,
    ids: np.ndarray,
    change: np.ndarray,
    factor: np.float32,
    start: np.uint32,
) -> None:
    n, U = change.shape
    bits = np.empty(U, np.uint32)
    w = bits.view(np.float32)
    for i in range(n):
        _load(words[i], halves[i], place, narrow, bits)
        by = change[i]
        for c in range(U):
            w[c] += by[c] * factor
        _store(words[i], halves[i], place, narrow, bits, _key(start, ids[i]), WEIGHT)


def adam_read(layout: RecordLayout, records: Tensor, to: int, table: Tensor, eps: float, out: Tensor) -> None:
    """Write to `out` [n, U] the weights after step `to`, gradients of steps not yet seen taken as zero."""
    words, halves = _views(records)
    ahead = _adam_read(
        words, halves, _places(layout), _narrow(layout), to, table.numpy(), np.float32(eps), out.numpy()
    )
    _refuse(ahead, to)


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
    words, halves = _views(records)
    ahead = _adam_update(
        words,
        halves,
        _places(layout),
        _narrow(layout),
        ids.numpy(),
        gradients.numpy(),
        np.float32(scale),
        step,
        table.numpy(),
        np.float32(betas[1]),
        np.float32(1 - betas[0]),  # not 1 - float32(beta): that has few digits left
        np.float32(1 - betas[1]),
        np.float32(eps),
        np.uint32(start),
    )
    _refuse(ahead, step - 1)


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
    words, halves = _views(records)
    _adagrad_update(
        words,
        halves,
        _places(layout),
        _narrow(layout)[0],
        ids.numpy(),
        gradients.numpy(),
        np.float32(scale),
        np.float32(rate),
        np.float32(eps),
        np.uint32(start),
    )


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
    words, halves = _views(records)
    ahead = _average(
        words,
        halves,
        _places(layout)[1:],
        _narrow(layout)[1],
        ids.numpy(),
        gradients.numpy(),
        np.float32(scale),
        step,
        table.numpy(),
        np.float32(momentum),
        np.float32(1 - momentum),
        np.uint32(start),
        out.numpy(),
    )
    _refuse(ahead, step - 1)


def move(
    layout: RecordLayout, records: Tensor, ids: Tensor, change: Tensor, factor: float, start: int
) -> None:
    """Add `factor` times `change` [n, U] to the weights, in place."""
    words, halves = _views(records)
    _move(
        words,
        halves,
        _places(layout)[0],
        _narrow(layout)[0],
        ids.numpy(),
        change.numpy(),
        np.float32(factor),
        np.uint32(start),
    )


def _views(records: Tensor) -> tuple[np.ndarray, np.ndarray]:
    array = records.numpy()
    return array.view(np.uint32), array.view(np.uint16)


def _places(layout: RecordLayout) -> tuple[int, ...]:
    return tuple(field.offset for field in layout.places.values())


def _narrow(layout: RecordLayout) -> tuple[bool, bool]:
    return layout.weights == "bfloat16", layout.state == "bfloat16"


def _refuse(ahead: int, step: int) -> None:
    if ahead:
        raise ValueError(f"{ahead} records hold a later step than {step}: a step was taken twice, or back")

"""Choosing experts on a GPU and sorting the choices; nothing waits for the device.

One pass splits the router's weight; one multiplies, scores, chooses, weighs and counts, so that scores never
travel through memory. Choices are sorted by counting: a token's place among an expert's rows is its rank in
its block of tokens behind what the blocks before it chose, which is the order of a stable sort.

Shapes: N tokens, K choices a token, E experts, D width, P = N * K.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 128
"""Rows of one expert in a tile."""
_ARRANGED = 128
"""Choices, or tiles, that one program places."""
_DIFFERENTIATED = 32
"""Tokens whose choices one program differentiates."""
MOST_EXPERTS = 1024
"""More do not fit the registers of a program that chooses."""


class Routing(NamedTuple):
    """The choices and their order; whole numbers are int32.

    `order` is the choice of every row, `places` the row of every choice. A tile is up to `TILE` neighbouring
    rows of one expert: the expert, or -1 for none, its first row here, the end of the expert's rows, and 0.
    """

    chosen: Tensor  # [N, K]
    weights: Tensor  # [N, K], float32, each token's sum to 1
    slopes: Tensor  # [N, K], what is left of a chosen score's derivative once its weight is taken out
    loads: Tensor  # [E]
    ends: Tensor  # [E], where an expert's rows end
    order: Tensor  # [P]
    places: Tensor  # [P]
    tiles: Tensor  # [P // TILE + E, 4]
    narrow: Tensor  # [E padded to 8, D], the router's weight in bfloat16


@triton.jit(do_not_specialize=["given", "n"])
def _split(
    weight: tl.tensor, high: tl.tensor, low: tl.tensor, given: tl.tensor, n: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """high + low = weight to 17 bits, both bfloat16; 0 beyond what is given."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(weight + i, i < given, 0.0)
    near = w.to(tl.bfloat16)
    tl.store(high + i, near, i < n)
    tl.store(low + i, (w - near.to(tl.float32)).to(tl.bfloat16), i < n)


@triton.jit(do_not_specialize=["N", "E", "blocks"])
def _choose(
    x: tl.tensor, high: tl.tensor, low: tl.tensor, bias: tl.tensor, chosen: tl.tensor, weights: tl.tensor,
    slopes: tl.tensor, ranks: tl.tensor, tallies: tl.tensor, N: tl.tensor, E: tl.tensor, blocks: tl.tensor,
    D: tl.constexpr, K: tl.constexpr, SOFTMAX: tl.constexpr, TOKENS: tl.constexpr, E_PADDED: tl.constexpr,
    K_PADDED: tl.constexpr, BK: tl.constexpr,
) -> None:  # fmt: skip
    """Choose the K experts of the largest score + bias, the largest first; of equals, the first."""
    block = tl.program_id(0)
    n = block * TOKENS + tl.arange(0, TOKENS)
    e = tl.arange(0, E_PADDED)
    k = tl.arange(0, BK)
    logits = tl.zeros((TOKENS, E_PADDED), tl.float32)
    for first in range(0, D, BK):
        rows = tl.load(x + n[:, None].to(tl.int64) * D + first + k[None, :], (n < N)[:, None], 0.0)
        part = e[:, None] * D + first + k[None, :]
        logits = tl.dot(rows, tl.trans(tl.load(high + part, (e < E)[:, None], 0.0)), logits)
        logits = tl.dot(rows, tl.trans(tl.load(low + part, (e < E)[:, None], 0.0)), logits)
    real = (e < E)[None, :]
    if SOFTMAX:
        logits = tl.where(real, logits, float("-inf"))
        scores = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        scores /= tl.sum(scores, axis=1)[:, None]
    else:
        scores = tl.sigmoid(logits)
    # What is chosen, or no expert, is -inf; everything else is above it, whatever the scores are.
    open_ = scores + tl.load(bias + e, e < E, 0.0)[None, :]
    open_ = tl.where(open_ > -1e30, open_, -1e30)
    open_ = tl.where(real, open_, float("-inf"))
    slot = tl.arange(0, K_PADDED)[None, :]
    experts = tl.zeros((TOKENS, K_PADDED), tl.int32)
    parts = tl.zeros((TOKENS, K_PADDED), tl.float32)
    for i in range(K):
        best = tl.max(open_, axis=1)
        number = tl.min(tl.where(open_ == best[:, None], e[None, :], E_PADDED), axis=1)
        taken = e[None, :] == number[:, None]
        # Keeping all scores fills the registers. A sigmoid's is the sum less the bias; those of a softmax may
        # be too small for that.
        part = tl.sum(tl.where(taken, scores, 0.0), axis=1) if SOFTMAX else best
        parts = tl.where(slot == i, part[:, None], parts)
        experts = tl.where(slot == i, number[:, None], experts)
        open_ = tl.where(taken, float("-inf"), open_)
    if not SOFTMAX:
        # Rounded to 2^-24 of the sum; scores that vanish in it weigh alike.
        parts = tl.where(parts > -1e30, tl.maximum(parts - tl.load(bias + experts), 1e-12), float("nan"))
    parts = tl.where(slot < K, parts, 0.0)
    live = (n < N)[:, None] & (slot < K)
    place = n[:, None] * K + slot
    tl.store(chosen + place, experts, live)
    tl.store(weights + place, parts / (tl.sum(parts, axis=1) + 1e-20)[:, None], live)
    tl.store(slopes + place, tl.where(SOFTMAX, 1.0, 1.0 - parts), live)
    picked = ((open_ == float("-inf")) & real & (n < N)[:, None]).to(tl.int32)
    tl.store(tallies + e * blocks + block, tl.sum(picked, axis=0), e < E)
    earlier = tl.cumsum(picked, axis=0) - picked
    for i in range(K):
        number = tl.sum(tl.where(slot == i, experts, 0), axis=1)
        rank = tl.sum(tl.where(e[None, :] == number[:, None], earlier, 0), axis=1)
        tl.store(ranks + n * K + i, rank, n < N)


@triton.jit(do_not_specialize=["blocks"])
def _accumulate(tallies: tl.tensor, loads: tl.tensor, blocks: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Replace an expert's tallies by the sums of those before them; their total is its load."""
    row = tallies + tl.program_id(0) * blocks
    known = 0
    for first in range(0, blocks, BLOCK):
        b = first + tl.arange(0, BLOCK)
        tally = tl.load(row + b, b < blocks, 0)
        tl.store(row + b, known + tl.cumsum(tally, axis=0) - tally, b < blocks)
        known += tl.sum(tally, axis=0)
    tl.store(loads + tl.program_id(0), known)


@triton.jit(do_not_specialize=["P", "E", "blocks", "n_tiles"])
def _arrange(
    chosen: tl.tensor, ranks: tl.tensor, tallies: tl.tensor, loads: tl.tensor, ends: tl.tensor,
    order: tl.tensor, places: tl.tensor, tiles: tl.tensor, P: tl.tensor, E: tl.tensor, blocks: tl.tensor,
    n_tiles: tl.tensor, CHOICES: tl.constexpr, TILE: tl.constexpr, E_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Place the choices, `CHOICES` of which come from one block of tokens; the last programs list tiles."""
    e = tl.arange(0, E_PADDED)
    load = tl.load(loads + e, e < E, 0)
    end = tl.cumsum(load, axis=0)
    start = end - load
    program = tl.program_id(0)
    if program == 0:
        tl.store(ends + e, end, e < E)
    if program * BLOCK < P:
        choice = program * BLOCK + tl.arange(0, BLOCK)
        live = choice < P
        expert = tl.load(chosen + choice, live, 0)
        place = tl.gather(start, expert, 0) + tl.load(ranks + choice, live, 0)
        place += tl.load(tallies + expert * blocks + choice // CHOICES, live, 0)
        tl.store(places + choice, place, live)
        tl.store(order + place, choice, live)
    else:
        tile = program * BLOCK - (P + BLOCK - 1) // BLOCK * BLOCK + tl.arange(0, BLOCK)
        needed = (load + TILE - 1) // TILE
        last = tl.cumsum(needed, axis=0)
        expert = tl.sum(((last[None, :] <= tile[:, None]) & (e < E)[None, :]).to(tl.int32), axis=1)
        known = tl.minimum(expert, E - 1)
        first = tl.gather(start, known, 0) + (tile - tl.gather(last - needed, known, 0)) * TILE
        field = tiles + tile * 4
        tl.store(field, tl.where(expert < E, expert, -1), tile < n_tiles)
        tl.store(field + 1, first, tile < n_tiles)
        tl.store(field + 2, tl.gather(end, known, 0), tile < n_tiles)
        tl.store(field + 3, tl.zeros((BLOCK,), tl.int32), tile < n_tiles)


@triton.jit(do_not_specialize=["N", "P", "columns"])
def _differentiate(
    grad_share: tl.tensor, chosen: tl.tensor, weights: tl.tensor, slopes: tl.tensor, places: tl.tensor,
    out: tl.tensor, N: tl.tensor, P: tl.tensor, columns: tl.tensor, E_OUT: tl.constexpr, K: tl.constexpr,
    TOKENS: tl.constexpr, E_PADDED: tl.constexpr, K_PADDED: tl.constexpr,
) -> None:  # fmt: skip
    """Write the gradient of the logits [N, E_OUT], given that of every row's weight in `columns` parts."""
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    slot = tl.arange(0, K_PADDED)[None, :]
    live = (n < N)[:, None] & (slot < K)
    choice = n[:, None] * K + slot
    place = tl.load(places + choice, live, 0)
    grad = tl.zeros((TOKENS, K_PADDED), tl.float32)
    for column in range(columns):
        grad += tl.load(grad_share + column * P + place, live, 0.0)
    weight = tl.load(weights + choice, live, 0.0)
    grad -= tl.sum(grad * weight, axis=1)[:, None]
    grad *= weight * tl.load(slopes + choice, live, 0.0)
    e = tl.arange(0, E_PADDED)
    y = tl.zeros((TOKENS, E_PADDED), tl.float32)
    for i in range(K):
        number = tl.load(chosen + n * K + i, n < N, 0)
        part = tl.sum(tl.where(slot == i, grad, 0.0), axis=1)
        y += tl.where(e[None, :] == number[:, None], part[:, None], 0.0)
    tl.store(
        out + n[:, None].to(tl.int64) * E_OUT + e[None, :],
        y.to(out.dtype.element_ty),
        (n < N)[:, None] & (e < E_OUT)[None, :],
    )


def route(x: Tensor, weight: Tensor, bias: Tensor, K: int, softmax: bool) -> Routing:
    """Choose K experts for each token of x [N, D] (bfloat16) by weight [E, D] and bias [E] (float32).

    D is a multiple of 64. Scores are sigmoids of the logits or their softmax; the weights are the chosen
    scores over their sum. Logits are those of float32 to 1 part in 2^17.
    """
    (N, D), E = x.shape, len(weight)
    padded, (tokens, channels, warps) = _padded(E), _block(E)
    blocks, P = triton.cdiv(N, tokens), N * K

    def numbers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=x.device)

    chosen, ranks, tallies, loads, ends = (
        numbers(N, K),
        numbers(N, K),
        numbers(E, blocks),
        numbers(E),
        numbers(E),
    )
    order, places, tiles = numbers(P), numbers(P), numbers(P // TILE + E, 4)
    weights = torch.empty((N, K), dtype=torch.float32, device=x.device)
    slopes = torch.empty_like(weights)
    narrow = x.new_empty(aligned(E), D)
    rest, n = torch.empty_like(narrow), narrow.numel()
    with torch.cuda.device_of(x):
        _split[(triton.cdiv(n, _ARRANGED),)](weight, narrow, rest, E * D, n, BLOCK=_ARRANGED, num_warps=1)
        _choose[(blocks,)](
            x, narrow, rest, bias, chosen, weights, slopes, ranks, tallies, N, E, blocks, D=D, K=K,
            SOFTMAX=softmax, TOKENS=tokens, E_PADDED=padded, K_PADDED=triton.next_power_of_2(K), BK=channels,
            num_warps=warps, num_stages=2,
        )  # fmt: skip
        _accumulate[(E,)](tallies, loads, blocks, BLOCK=1024, num_warps=4)
        _arrange[(triton.cdiv(P, _ARRANGED) + triton.cdiv(len(tiles), _ARRANGED),)](
            chosen, ranks, tallies, loads, ends, order, places, tiles, P, E, blocks, len(tiles),
            CHOICES=tokens * K, TILE=TILE, E_PADDED=padded, BLOCK=_ARRANGED, num_warps=4,
        )  # fmt: skip
    return Routing(chosen, weights, slopes, loads, ends, order, places, tiles, narrow)


def route_backward(
    grad_share: Tensor,
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    slopes: Tensor,
    places: Tensor,
    narrow: Tensor,
    E: int,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x, and in float32 of the weight, given that of every row's weight.

    The last comes in parts [columns, P]; the rest is what `route` returned.
    """
    (N, K), aligned = chosen.shape, len(narrow)
    grad = x.new_empty(N, aligned)
    with torch.cuda.device_of(x):
        _differentiate[(triton.cdiv(N, _DIFFERENTIATED),)](
            grad_share, chosen, weights, slopes, places, grad, N, N * K, len(grad_share), E_OUT=aligned, K=K,
            TOKENS=_DIFFERENTIATED, E_PADDED=_padded(aligned), K_PADDED=triton.next_power_of_2(K),
            num_warps=4,
        )  # fmt: skip
    return grad @ narrow, torch.mm(grad.t(), x, out_dtype=torch.float32)[:E]


def aligned(experts: int) -> int:
    """Return a number of columns that fill whole 16 bytes, as the fast products need."""
    return -(-experts // 8) * 8


def _padded(experts: int) -> int:
    return max(16, triton.next_power_of_2(experts))


def _block(experts: int) -> tuple[int, int, int]:
    """Return tokens, channels read at once and warps of a program that chooses.

    Its scores must fit the registers, and its part of the weight the shared memory.
    """
    padded = _padded(experts)
    return max(16, min(64, 16384 // padded)), max(16, min(64, 8192 // padded)), 4 if padded <= 128 else 8

"""Routed experts on a GPU: choose, sort and multiply without copying a token's row for each of its experts.

The products read token rows through the sorted list of choices and apply or differentiate SwiGLU before
their results leave the chip, so that only what the next product needs travels through memory. Weight
gradients come out in float32 from the products' own sums. Nothing waits for the device, and every sum has a
fixed order: equal inputs give equal bits.

Shapes: N tokens, K choices a token, E experts, D width, H hidden width of one expert, P = N * K rows sorted
by expert. A "tile" is up to `TILE` neighbouring rows of one expert.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

TILE = 128
"""Rows of one expert that one program multiplies."""
_UP = _DOWN = (64, 64, 4, 3)
"""Rows and hidden channels one program makes, its warps and loads in flight; measured on an H100."""
_TOP = (32, 4)
"""Tokens and warps of a program that chooses experts."""


@triton.jit(do_not_specialize=["N", "E"])
def _top_k(
    scores: tl.tensor, bias: tl.tensor, chosen: tl.tensor, stride_n: tl.tensor, stride_e: tl.tensor,
    N: tl.tensor, E: tl.tensor, K: tl.constexpr, TOKENS: tl.constexpr, E_PADDED: tl.constexpr,
) -> None:  # fmt: skip
    """Write the K experts of the largest score + bias, the largest first; of equals, the first."""
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    e = tl.arange(0, E_PADDED)
    real = (e < E)[:, None] & (n < N)[None, :]
    x = tl.load(scores + e[:, None] * stride_e + n[None, :] * stride_n, real, float("-inf"))
    x += tl.load(bias + e, e < E, 0.0)[:, None]
    # One integer in the order of the floats, and of equal ones against that of the experts.
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = (bits.to(tl.int64) << 32) | (E_PADDED - 1 - e)[:, None]
    for k in range(K):
        best = tl.max(key, axis=0)
        tl.store(chosen + n * K + k, E_PADDED - 1 - (best & 0xFFFFFFFF), n < N)
        key = tl.where(key == best[None, :], -0x7FFFFFFFFFFFFFFF, key)


@triton.jit
def _up(
    x: tl.tensor, order: tl.tensor, weights: tl.tensor, gate_up: tl.tensor, before: tl.tensor,
    hidden: tl.tensor, tiles: tl.tensor, D: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr,
) -> None:  # fmt: skip
    """before = x[token] gate_up[expert]; hidden = silu(gate) * up * weight."""
    part = tl.program_id(0) // (H // BH)
    tile = tiles + part // (TILE // ROWS) * 4
    expert = tl.load(tile)
    first = tl.load(tile + 1) + part % (TILE // ROWS) * ROWS
    stop = tl.load(tile + 2)
    if (expert < 0) | (first >= stop):
        return
    row = first + tl.arange(0, ROWS)
    live = row < stop
    choice = tl.load(order + row, live, 0)
    h = tl.program_id(0) % (H // BH) * BH + tl.arange(0, BH)
    k = tl.arange(0, BK)
    a = x + (choice // K)[:, None] * D + k[None, :]
    b = gate_up + expert * (2 * D * H) + k[:, None] * (2 * H) + h[None, :]
    gate = tl.zeros((ROWS, BH), tl.float32)
    up = tl.zeros((ROWS, BH), tl.float32)
    for _ in range(0, D, BK):
        rows = tl.load(a)
        gate = tl.dot(rows, tl.load(b), gate)
        up = tl.dot(rows, tl.load(b + H), up)
        a += BK
        b += BK * 2 * H
    share = tl.load(weights + choice)
    out = row[:, None]
    tl.store(before + out * (2 * H) + h[None, :], gate.to(before.dtype.element_ty), live[:, None])
    tl.store(before + out * (2 * H) + H + h[None, :], up.to(before.dtype.element_ty), live[:, None])
    y = gate * tl.sigmoid(gate) * up * share[:, None]
    tl.store(hidden + out * H + h[None, :], y.to(hidden.dtype.element_ty), live[:, None])


@triton.jit
def _down_backward(
    grad: tl.tensor, order: tl.tensor, weights: tl.tensor, down: tl.tensor, before: tl.tensor,
    grad_before: tl.tensor, grad_share: tl.tensor, tiles: tl.tensor, P: tl.tensor, D: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, BH: tl.constexpr,
    BK: tl.constexpr,
) -> None:  # fmt: skip
    """Take grad[token] through out[expert] and SwiGLU, and add up parts of the mixing weights' gradient."""
    part = tl.program_id(0) // (H // BH)
    tile = tiles + part // (TILE // ROWS) * 4
    expert = tl.load(tile)
    first = tl.load(tile + 1) + part % (TILE // ROWS) * ROWS
    stop = tl.load(tile + 2)
    if (expert < 0) | (first >= stop):
        return
    row = first + tl.arange(0, ROWS)
    live = row < stop
    choice = tl.load(order + row, live, 0)
    column = tl.program_id(0) % (H // BH)
    h = column * BH + tl.arange(0, BH)
    k = tl.arange(0, BK)
    a = grad + (choice // K)[:, None] * D + k[None, :]
    b = down + expert * (D * H) + h[:, None] * D + k[None, :]
    # Asked for before the product, so that they arrive meanwhile.
    share = tl.load(weights + choice)
    place = row[:, None] * (2 * H) + h[None, :]
    gate = tl.load(before + place, live[:, None], 0.0)
    up = tl.load(before + place + H, live[:, None], 0.0)
    y = tl.zeros((ROWS, BH), tl.float32)
    for _ in range(0, D, BK):
        y = tl.dot(tl.load(a), tl.trans(tl.load(b)), y)
        a += BK
        b += BK
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    slope = tl.sigmoid(gate)
    silu = gate * slope
    tl.store(grad_share + column * P + row, tl.sum(y * silu * up, axis=1), live)
    y *= share[:, None]
    grad_gate = y * up * slope * (1 + gate * (1 - slope))
    tl.store(grad_before + place, grad_gate.to(grad_before.dtype.element_ty), live[:, None])
    tl.store(grad_before + place + H, (y * silu).to(grad_before.dtype.element_ty), live[:, None])


@triton.jit
def _weight_gradient(
    a_base: tl.tensor, b_base: tl.tensor, order: tl.tensor, ends: tl.tensor, loads: tl.tensor, out: tl.tensor,
    M: tl.constexpr, J: tl.constexpr, K: tl.constexpr, TOKENS_IN_A: tl.constexpr, BI: tl.constexpr,
    BJ: tl.constexpr, BR: tl.constexpr,
) -> None:  # fmt: skip
    """out[expert] [M, J] = a^T b over the expert's rows; a or else b is read by token."""
    expert = tl.program_id(0) // ((M // BI) * (J // BJ))
    part = tl.program_id(0) % ((M // BI) * (J // BJ))
    i = part // (J // BJ) * BI + tl.arange(0, BI)
    j = part % (J // BJ) * BJ + tl.arange(0, BJ)
    stop = tl.load(ends + expert)
    first = stop - tl.load(loads + expert)
    y = tl.zeros((BI, BJ), tl.float32)
    for begin in range(first, stop, BR):
        row = begin + tl.arange(0, BR)
        live = row < stop
        token = tl.load(order + row, live, 0) // K
        row = tl.minimum(row, stop - 1)
        if TOKENS_IN_A:
            a = tl.load(a_base + token[:, None] * M + i[None, :])
            b = tl.load(b_base + row[:, None] * J + j[None, :], live[:, None], 0.0)
        else:
            a = tl.load(a_base + row[:, None] * M + i[None, :], live[:, None], 0.0)
            b = tl.load(b_base + token[:, None] * J + j[None, :])
        y = tl.dot(tl.trans(a), b, y)
    place = out + expert * (M * J) + i[:, None] * J + j[None, :]
    tl.store(place, y.to(out.dtype.element_ty))


def _divisor(width: int, most: int) -> int:
    """Return the largest power of two that divides `width`, `most` at most."""
    return min(width & -width, most)


@triton_op("engram_lab::top_k", mutates_args=())
def top_k(scores: Tensor, bias: Tensor, K: int) -> Tensor:
    """Return the K experts [N, K] (int64) of the largest scores [N, E] + bias [E]; of equals, the first."""
    N, E = scores.shape
    padded = max(16, triton.next_power_of_2(E))
    tokens, warps = _TOP
    chosen = scores.new_empty((N, K), dtype=torch.int64)
    wrap_triton(_top_k)[(triton.cdiv(N, tokens),)](
        scores, bias, chosen, *scores.stride(), N, E, K=K, TOKENS=tokens, E_PADDED=padded, num_warps=warps
    )
    return chosen


@triton_op("engram_lab::router_logits", mutates_args=())
def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """Return x [N, D] (bfloat16) times weight [E, D] (float32) transposed, in float32.

    The weight is the sum of two bfloat16 numbers to 1 part in 2^17, so that the fast units multiply it.
    """
    E = len(weight)
    high = weight.bfloat16()
    both = torch.cat((high, (weight - high).bfloat16()))
    y = torch.mm(both, x.t(), out_dtype=torch.float32)  # so that `top_k` reads neighbouring tokens together
    return (y[:E] + y[E:]).t()


def _save_router(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_router(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    grad = grad.to(x.dtype)
    return grad @ weight.to(x.dtype), (grad.t() @ x).to(weight.dtype)


router_logits.register_autograd(_differentiate_router, setup_context=_save_router)


def arrange(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sort the choices [N, K] by expert, each expert's by token; all results int32.

    Returns the choice of every row [P], the row of every choice [P], each expert's load [E], where its rows
    end [E], and the tiles [n, 4]: an expert, or -1 for none, its first row here, and the end of its rows.
    """
    device = chosen.device
    # Sorting takes one pass a byte.
    keys = chosen.flatten().to(torch.uint8 if experts <= 256 else torch.int16)
    keys, order = keys.sort(stable=True)
    rows = torch.arange(len(order), dtype=torch.int32, device=device)
    places = torch.empty_like(rows).scatter_(0, order, rows)
    numbers = torch.arange(experts, dtype=keys.dtype, device=device)
    ends = torch.searchsorted(keys, numbers, right=True, out_int32=True)
    starts = F.pad(ends[:-1], (1, 0))
    needed = (ends - starts + TILE - 1) // TILE
    last = needed.cumsum(0, dtype=torch.int32)
    tile = torch.arange(len(order) // TILE + experts, dtype=torch.int32, device=device)
    expert = torch.searchsorted(last, tile, right=True, out_int32=True)
    known = expert.clamp_max(experts - 1)
    first = starts[known] + (tile - (last - needed)[known]) * TILE
    tiles = torch.stack((torch.where(expert < experts, expert, -1), first, ends[known], first), dim=1)
    return order.to(torch.int32), places, ends - starts, ends, tiles


def _products(rows: Tensor, weight: Tensor, ends: Tensor, tiles: Tensor) -> Tensor:
    """Return rows [P, in] times their expert's matrix of weight [E, in, out]."""
    return F.grouped_mm(rows, weight, offs=ends)


def _sum_choices(rows: Tensor, places: Tensor, K: int) -> Tensor:
    return rows.index_select(0, places).unflatten(0, (-1, K)).sum(dim=1)


@triton_op("engram_lab::routed_swiglu", mutates_args=())
def _routed_swiglu(
    x: Tensor,
    gate_up_parameter: Tensor,
    out_parameter: Tensor,
    gate_up: Tensor,
    out: Tensor,
    weights: Tensor,
    order: Tensor,
    places: Tensor,
    loads: Tensor,
    ends: Tensor,
    tiles: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weighted sums [N, D], and what the backward pass needs: before [P, 2 H], hidden [P, H]."""
    K, D, H, P, n_tiles = weights.shape[1], x.shape[1], out.shape[1], len(order), len(tiles)
    before, hidden = x.new_empty(P, 2 * H), x.new_empty(P, H)
    rows, bh, warps, stages = _UP
    bh = _divisor(H, bh)
    wrap_triton(_up)[(n_tiles * (TILE // rows) * (H // bh),)](
        x, order, weights, gate_up, before, hidden, tiles, D=D, H=H, K=K,
        TILE=TILE, ROWS=rows, BH=bh, BK=64, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    y = _products(hidden, out, ends, tiles)
    return _sum_choices(y, places, K), before, hidden


@triton_op("engram_lab::routed_swiglu_backward", mutates_args=())
def _routed_swiglu_backward(
    grad: Tensor,
    x: Tensor,
    gate_up: Tensor,
    out: Tensor,
    weights: Tensor,
    order: Tensor,
    places: Tensor,
    loads: Tensor,
    ends: Tensor,
    tiles: Tensor,
    before: Tensor,
    hidden: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, of gate_up and out (in `dtype`), and of the weights [N, K]."""
    K, D, H, P, n_tiles = weights.shape[1], x.shape[1], out.shape[1], len(order), len(tiles)
    E = len(loads)
    rows, bh, warps, stages = _DOWN
    bh = _divisor(H, bh)
    grad_before = torch.empty_like(before)
    grad_share = weights.new_empty(H // bh, P)
    grad_gate_up = torch.empty_like(gate_up, dtype=dtype)
    grad_out = torch.empty_like(out, dtype=dtype)
    wrap_triton(_down_backward)[(n_tiles * (TILE // rows) * (H // bh),)](
        grad, order, weights, out, before, grad_before, grad_share, tiles, P, D=D, H=H, K=K,
        TILE=TILE, ROWS=rows, BH=bh, BK=64, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    bi, bj = _divisor(H, 128), _divisor(D, 128)
    wrap_triton(_weight_gradient)[(E * (H // bi) * (D // bj),)](
        hidden, grad, order, ends, loads, grad_out, M=H, J=D, K=K, TOKENS_IN_A=False,
        BI=bi, BJ=bj, BR=64, num_warps=4, num_stages=3,
    )  # fmt: skip
    grad_rows = _products(grad_before, gate_up.mT, ends, tiles)
    bi, bj = _divisor(D, 128), _divisor(2 * H, 128)
    wrap_triton(_weight_gradient)[(E * (D // bi) * (2 * H // bj),)](
        x, grad_before, order, ends, loads, grad_gate_up, M=D, J=2 * H, K=K, TOKENS_IN_A=True,
        BI=bi, BJ=bj, BR=64, num_warps=4, num_stages=3,
    )  # fmt: skip
    grad_weights = grad_share.sum(dim=0).index_select(0, places).view_as(weights)
    return _sum_choices(grad_rows, places, K), grad_gate_up, grad_out, grad_weights


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, gate_up_parameter, _, *rest = inputs
    ctx.save_for_backward(x, *rest, *output[1:])
    ctx.set_materialize_grads(False)
    ctx.dtype = gate_up_parameter.dtype


def _differentiate(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    backward = _routed_swiglu_backward(grad.contiguous(), *ctx.saved_tensors, ctx.dtype)
    grad_x, grad_gate_up, grad_out, grad_weights = backward
    return grad_x, grad_gate_up, grad_out, None, None, grad_weights, None, None, None, None, None


def routed_swiglu(x: Tensor, *arguments: Tensor) -> Tensor:
    """Return the weighted sum [N, D] of what each token of x [N, D] gets from its experts.

    The `arguments` are the parameters [E, D, 2 H] and [E, H, D], which receive gradients in their own
    precision, the same in that of x, the weights [N, K], and what `arrange` returns.
    """
    y: Tensor = _routed_swiglu(x, *arguments)[0]
    return y


def fits(dtype: torch.dtype, D: int, H: int) -> bool:
    """Whether the kernels take experts of these sizes."""
    return dtype == torch.bfloat16 and D % 64 == 0 and H % 32 == 0


_routed_swiglu.register_autograd(_differentiate, setup_context=_save)

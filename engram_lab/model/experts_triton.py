"""Routed experts on a GPU: choose, sort and multiply without copying a token's row for each of its experts.

The products read token rows through the sorted list of choices and apply or differentiate SwiGLU before
their results leave the chip, so that only what the next product needs travels through memory. Weight
gradients come out in float32 from the products' own sums. Nothing waits for the device, and every sum has a
fixed order: equal inputs give equal bits. To a compiler the whole layer is one operator each way, so that
what it compiles around it depends on the number of experts in the shapes of parameters only.

Shapes: N tokens, K choices a token, E experts, D width, H hidden width of one expert, P = N * K rows sorted
by expert. See `router_triton` for tiles.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from engram_lab.errors import UserError
from engram_lab.model.router_triton import MOST_EXPERTS, TILE, Routing, aligned, route, route_backward

_WIDE = 512
"""Width from which larger blocks and the library's grouped product win; see `_up_block`."""
_GROUPS = 1024
"""The library's product takes fewer."""
_DOWN = (64, 64, 64, 4, 4)
"""Rows and hidden channels one program makes, channels it reads at once, its warps and loads in flight. These
and the blocks below were the fastest of a grid on an H100 with D 256, H 128 and with D 1024, H 512."""
_SUMMED = 4
"""Tokens whose results one program adds up."""


@triton.jit
def _up(
    x: tl.tensor, order: tl.tensor, weights: tl.tensor, gate_up: tl.tensor, before: tl.tensor,
    hidden: tl.tensor, tiles: tl.tensor, D: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr,
) -> None:  # fmt: skip
    """before = x[token] gate_up[expert]; hidden = silu(gate) * up * weight."""
    part = tl.program_id(0) // (H // BH)
    tile = tiles + part // (TILE // ROWS) * 4
    expert = tl.load(tile).to(tl.int64)  # the matrices may hold more than 2^31 values
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
    expert = tl.load(tile).to(tl.int64)  # the matrices may hold more than 2^31 values
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
    place = out + expert.to(tl.int64) * (M * J) + i[:, None] * J + j[None, :]
    tl.store(place, y.to(out.dtype.element_ty))


@triton.jit
def _product(
    rows: tl.tensor, weight: tl.tensor, out: tl.tensor, tiles: tl.tensor, IN: tl.constexpr,
    OUT: tl.constexpr, TRANSPOSED: tl.constexpr, TILE: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr,
) -> None:  # fmt: skip
    """out = rows weight[expert], or with TRANSPOSED rows weight[expert]^T."""
    tile = tiles + tl.program_id(0) // (OUT // BO) * 4
    expert = tl.load(tile).to(tl.int64)  # the matrices may hold more than 2^31 values
    stop = tl.load(tile + 2)
    if expert < 0:
        return
    row = tl.load(tile + 1) + tl.arange(0, TILE)
    o = tl.program_id(0) % (OUT // BO) * BO + tl.arange(0, BO)
    k = tl.arange(0, BK)
    a = rows + tl.minimum(row, stop - 1)[:, None] * IN + k[None, :]
    b = weight + expert * (IN * OUT)
    b += o[:, None] * IN + k[None, :] if TRANSPOSED else k[:, None] * OUT + o[None, :]
    y = tl.zeros((TILE, BO), tl.float32)
    for _ in range(0, IN, BK):
        y = tl.dot(tl.load(a), tl.trans(tl.load(b)) if TRANSPOSED else tl.load(b), y)
        a += BK
        b += BK if TRANSPOSED else BK * OUT
    tl.store(out + row[:, None] * OUT + o[None, :], y.to(out.dtype.element_ty), (row < stop)[:, None])


@triton.jit(do_not_specialize=["N"])
def _sum_choices(
    rows: tl.tensor, places: tl.tensor, more: tl.tensor, out: tl.tensor, N: tl.tensor, D: tl.constexpr,
    K: tl.constexpr, MORE: tl.constexpr, TOKENS: tl.constexpr, BD: tl.constexpr,
) -> None:  # fmt: skip
    """out[token] = the sum of its K rows, and of more[token] with MORE."""
    n = tl.program_id(0) // (D // BD) * TOKENS + tl.arange(0, TOKENS)
    d = tl.program_id(0) % (D // BD) * BD + tl.arange(0, BD)
    live = (n < N)[:, None]
    here = n[:, None].to(tl.int64) * D + d[None, :]
    y = tl.zeros((TOKENS, BD), tl.float32)
    if MORE:
        y = tl.load(more + here, live, 0.0).to(tl.float32)
    for k in tl.static_range(K):
        row = tl.load(places + n * K + k, n < N, 0)
        y += tl.load(rows + row[:, None].to(tl.int64) * D + d[None, :], live, 0.0).to(tl.float32)
    tl.store(out + here, y.to(out.dtype.element_ty), live)


def _divisor(width: int, most: int) -> int:
    """Return the largest power of two that divides `width`, `most` at most."""
    return min(width & -width, most)


def _sum(rows: Tensor, places: Tensor, K: int, more: Tensor | None = None) -> Tensor:
    """Add up the K rows of every token, and `more` [N, D]: [N, D]."""
    N, D = len(places) // K, rows.shape[1]
    out, width = rows.new_empty(N, D), _divisor(D, 256)
    _sum_choices[(triton.cdiv(N, _SUMMED) * (D // width),)](
        rows, places, rows if more is None else more, out, N, D=D, K=K, MORE=more is not None,
        TOKENS=_SUMMED, BD=width, num_warps=4,
    )  # fmt: skip
    return out


def _shared_memory(device: torch.device) -> int:
    """Return the bytes that one program can have."""
    return triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


def _up_block(D: int, H: int, device: torch.device) -> tuple[int, int, int, int, int]:
    """Return `_up`'s block, as `_DOWN` has it; the large one needs an H100's shared memory."""
    if D >= _WIDE and H % 128 == 0 and _shared_memory(device) > 200_000:
        return 128, 128, 64, 8, 4
    return 64, _divisor(H, 64), 32, 4, 4


def _multiply(rows: Tensor, weight: Tensor, ends: Tensor, tiles: Tensor, *, transposed: bool) -> Tensor:
    """Multiply every row of rows [P, IN] with its expert's matrix of weight [E, IN, OUT]: [P, OUT].

    With `transposed` weight is [E, OUT, IN].
    """
    IN, OUT = rows.shape[1], weight.shape[1 if transposed else 2]
    if OUT >= _WIDE and len(weight) < _GROUPS:
        return F.grouped_mm(rows, weight.mT if transposed else weight, offs=ends)
    out, bo = rows.new_empty(len(rows), OUT), _divisor(OUT, 128)
    _product[(len(tiles) * (OUT // bo),)](
        rows, weight, out, tiles, IN=IN, OUT=OUT, TRANSPOSED=transposed, TILE=TILE, BO=bo,
        BK=_divisor(IN, 64), num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


def _sum_by_expert(
    a: Tensor, b: Tensor, routing: tuple[Tensor, Tensor, Tensor], out: Tensor, K: int, *, tokens_in_a: bool
) -> None:
    """Write a^T b over the rows of every expert to out [E, M, J]; a or else b is read by token.

    `routing` is the order, the ends and the loads.
    """
    E, M, J = out.shape
    # A small result takes more programs, so that unequal loads keep all of the GPU at work.
    most = 128 if min(M, J) >= 256 else 64
    bi, bj = _divisor(M, most), _divisor(J, most)
    _weight_gradient[(E * (M // bi) * (J // bj),)](
        a, b, *routing, out, M=M, J=J, K=K, TOKENS_IN_A=tokens_in_a, BI=bi, BJ=bj, BR=64,
        num_warps=4, num_stages=3,
    )  # fmt: skip


_Results = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]  # fmt: skip


@torch.library.custom_op("engram_lab::routed_experts", mutates_args=())
def _routed_experts(
    x: Tensor, router: Tensor, bias: Tensor, gate_up: Tensor, out: Tensor, narrow_gate_up: Tensor,
    narrow_out: Tensor, more: Tensor | None, K: int, softmax: bool,
) -> _Results:  # fmt: skip
    """Return the sums [N, D], `more` included, what `route` does, and what else the backward pass needs.

    gate_up and out receive gradients; their bfloat16 copies are read.
    """
    D, H = x.shape[1], out.shape[1]
    routing = route(x, router, bias, K, softmax)
    P, n_tiles = len(routing.order), len(routing.tiles)
    before, hidden = x.new_empty(P, 2 * H), x.new_empty(P, H)
    rows, bh, bk, warps, stages = _up_block(D, H, x.device)
    with torch.cuda.device_of(x):
        _up[(n_tiles * (TILE // rows) * (H // bh),)](
            x, routing.order, routing.weights, narrow_gate_up, before, hidden, routing.tiles, D=D, H=H, K=K,
            TILE=TILE, ROWS=rows, BH=bh, BK=bk, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        rows_out = _multiply(hidden, narrow_out, routing.ends, routing.tiles, transposed=False)
        y = _sum(rows_out, routing.places, K, more)
    return y, *routing, before, hidden


@_routed_experts.register_fake
def _(
    x: Tensor, router: Tensor, bias: Tensor, gate_up: Tensor, out: Tensor, narrow_gate_up: Tensor,
    narrow_out: Tensor, more: Tensor | None, K: int, softmax: bool,
) -> _Results:  # fmt: skip
    E, H, N = router.shape[0], out.shape[1], x.shape[0]  # `len` would fix the number
    P = N * K

    def numbers(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.int32)

    routing = Routing(
        chosen=numbers(N, K),
        weights=x.new_empty(N, K, dtype=torch.float32),
        slopes=x.new_empty(N, K, dtype=torch.float32),
        loads=numbers(E),
        ends=numbers(E),
        order=numbers(P),
        places=numbers(P),
        tiles=numbers(P // TILE + E, 4),
        narrow=x.new_empty(aligned(E), x.shape[1]),
    )
    before, hidden = x.new_empty(P, 2 * H), x.new_empty(P, H)
    return torch.empty_like(x), *routing, before, hidden


@torch.library.custom_op("engram_lab::routed_experts_backward", mutates_args=())
def _routed_experts_backward(
    grad: Tensor,
    x: Tensor,
    router: Tensor,
    chosen: Tensor,
    weights: Tensor,
    slopes: Tensor,
    loads: Tensor,
    ends: Tensor,
    order: Tensor,
    places: Tensor,
    tiles: Tensor,
    narrow: Tensor,
    before: Tensor,
    hidden: Tensor,
    gate_up: Tensor,
    out: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, router, gate_up and out, the last two in `dtype`."""
    K, (_, H, D), P = weights.shape[1], out.shape, len(order)
    rows, bh, bk, warps, stages = _DOWN
    bh = _divisor(H, bh)
    grad_before = torch.empty_like(before)
    grad_share = weights.new_empty(H // bh, P)
    grad_gate_up = torch.empty_like(gate_up, dtype=dtype)
    grad_out = torch.empty_like(out, dtype=dtype)
    with torch.cuda.device_of(x):
        _down_backward[(len(tiles) * (TILE // rows) * (H // bh),)](
            grad, order, weights, out, before, grad_before, grad_share, tiles, P, D=D, H=H, K=K,
            TILE=TILE, ROWS=rows, BH=bh, BK=bk, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        routing = order, ends, loads
        _sum_by_expert(hidden, grad, routing, grad_out, K, tokens_in_a=False)
        _sum_by_expert(x, grad_before, routing, grad_gate_up, K, tokens_in_a=True)
        grad_rows = _multiply(grad_before, gate_up, ends, tiles, transposed=True)
        routed, grad_router = route_backward(
            grad_share, x, chosen, weights, slopes, places, narrow, len(router)
        )
        grad_x = _sum(grad_rows, places, K, routed)
    return grad_x, grad_router, grad_gate_up, grad_out


@_routed_experts_backward.register_fake
def _(grad: Tensor, x: Tensor, router: Tensor, *kept: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gate_up, out, dtype = kept[-3:]
    grad_gate_up, grad_out = torch.empty_like(gate_up, dtype=dtype), torch.empty_like(out, dtype=dtype)
    return torch.empty_like(x), torch.empty_like(router), grad_gate_up, grad_out


def _save(ctx: Any, inputs: tuple[Any, ...], output: _Results) -> None:
    x, router, _, gate_up, _, narrow_gate_up, narrow_out, more, *_ = inputs
    ctx.save_for_backward(x, router, *output[1:], narrow_gate_up, narrow_out)
    ctx.set_materialize_grads(False)
    ctx.dtype, ctx.more = gate_up.dtype, more is not None


def _differentiate(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    grads = _routed_experts_backward(grad.contiguous(), *ctx.saved_tensors, ctx.dtype)
    grad_x, grad_router, grad_gate_up, grad_out = grads
    more = grad if ctx.more else None
    return grad_x, grad_router, None, grad_gate_up, grad_out, None, None, more, None, None


_routed_experts.register_autograd(_differentiate, setup_context=_save)


def routed_experts(
    x: Tensor, router: Tensor, bias: Tensor, gate_up: Tensor, out: Tensor, K: int, *, softmax: bool,
    narrow: tuple[Tensor, Tensor] | None = None, more: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return what each token of x [N, D] gets from its K experts [N, D], their loads [E], and the choice.

    x is bfloat16; the parameters router [E, D], gate_up [E, D, 2 H] and out [E, H, D] are float32 and get
    gradients in float32. The experts of the largest score + bias [E] are chosen, [N, K]; their weights are
    the scores, sigmoids of the logits or their softmax, over their sum. Loads and choice are int32. `narrow`
    are bfloat16 copies of gate_up and out, made here where nobody keeps any; `more` [N, D] is added to what
    tokens get before that is rounded.

    Raises UserError when there are so many tokens that places of values do not fit 32 bits either.
    """
    tokens, most = x.shape[0], (2**31 - 1) // max(x.shape[1], K * gate_up.shape[2])
    if tokens > most:
        raise UserError(
            f"{tokens:,} tokens pass through the experts at once, and at most {most:,} of them can; lower "
            "data.batch_size, or raise trainer.accumulate_grad_batches."
        )
    narrow_gate_up, narrow_out = narrow or (w.detach().to(x.dtype) for w in (gate_up, out))
    more = None if more is None else more.contiguous()
    y, chosen, _, _, loads, *_ = _routed_experts(
        x.contiguous(), router, bias, gate_up, out, narrow_gate_up, narrow_out, more, K, softmax
    )
    return y, loads, chosen


def fits(dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether the kernels take experts whose second matrices [E, H, D] have this shape."""
    E, H, D = shape
    return dtype == torch.bfloat16 and E <= MOST_EXPERTS and D % 64 == 0 and H % 32 == 0

"""Attention of one new position per sequence over a cache of fixed size, each over its own length.

Shapes: B batch, K key-value heads, G query heads a key-value head, W head width, S longest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _attend(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    lengths: tl.tensor,
    scale: tl.tensor,
    S: tl.tensor,
    K: tl.constexpr,
    G: tl.constexpr,
    G_PADDED: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Attend with the G heads that share one key-value head of one sequence."""
    b, head = tl.program_id(0), tl.program_id(1)
    n = tl.load(lengths + b).to(tl.int32) + 1
    g, w = tl.arange(0, G_PADDED), tl.arange(0, W)
    mine = ((b * K + head) * G + g)[:, None] * W + w[None, :]
    query = tl.load(q + mine, (g < G)[:, None], 0.0)
    base = (b * K + head).to(tl.int64) * S * W
    best = tl.full((G_PADDED,), -float("inf"), tl.float32)
    total = tl.zeros((G_PADDED,), tl.float32)
    sums = tl.zeros((G_PADDED, W), tl.float32)
    for start in range(0, n, BLOCK):
        position = start + tl.arange(0, BLOCK)
        inside = position < n
        place = base + position[:, None] * W + w[None, :]
        score = tl.dot(query, tl.trans(tl.load(k + place, inside[:, None], 0.0))) * scale
        score = tl.where(inside[None, :], score, -float("inf"))
        higher = tl.maximum(best, tl.max(score, 1))
        weight = tl.exp(score - higher[:, None])
        kept = tl.exp(best - higher)
        value = tl.load(v + place, inside[:, None], 0.0)
        sums = sums * kept[:, None] + tl.dot(weight.to(value.dtype), value)
        total = total * kept + tl.sum(weight, 1)
        best = higher
    tl.store(out + mine, (sums / total[:, None]).to(out.dtype.element_ty), (g < G)[:, None])


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """Return [B, K * G, 1, W] for q of that shape over positions 0 to `lengths` [B] of keys [B, K, S, W]."""
    B, heads, _, W = q.shape
    K, S = keys.shape[1:3]
    q = q.contiguous()
    out = torch.empty_like(q)
    _attend[(B, K)](
        q,
        keys,
        values,
        out,
        lengths,
        W**-0.5,
        S,
        K=K,
        G=heads // K,
        G_PADDED=max(16, triton.next_power_of_2(heads // K)),
        W=W,
        BLOCK=64,
    )
    return out

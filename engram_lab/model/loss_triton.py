"""Cross-entropy on a GPU: one pass over each slice of logits gives its losses and leaves its gradient there.

Shapes: N tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOGITS = 2**29
"""Logits held at once, 1 GiB of them; twice as many are no faster on an H100."""


@triton.jit
def _softmax(
    logits: tl.tensor, targets: tl.tensor, losses: tl.tensor, V: tl.constexpr, BLOCK: tl.constexpr,
    DIFFERENTIATE: tl.constexpr,
) -> None:  # fmt: skip
    """Write one row's cross-entropy; with DIFFERENTIATE put softmax - onehot in place of its logits [V]."""
    row = tl.program_id(0)
    base = logits + row.to(tl.int64) * V
    v = tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    chosen = tl.load(base + target).to(tl.float32)  # before any program of this row writes
    x = tl.load(base + v, v < V, float("-inf")).to(tl.float32)
    highest = tl.max(x, axis=0)
    mass = tl.sum(tl.exp(x - highest), axis=0)
    for first in range(BLOCK, V, BLOCK):
        part = tl.load(base + first + v, first + v < V, float("-inf")).to(tl.float32)
        known, highest = highest, tl.maximum(highest, tl.max(part, axis=0))
        mass = mass * tl.exp(known - highest) + tl.sum(tl.exp(part - highest), axis=0)
    tl.store(losses + row, tl.log(mass) + highest - chosen)
    if DIFFERENTIATE:
        slope = tl.exp(x - highest) / mass - tl.where(v == target, 1.0, 0.0)
        tl.store(base + v, slope.to(logits.dtype.element_ty), v < V)
        for first in range(BLOCK, V, BLOCK):
            place = first + v
            part = tl.load(base + place, place < V, float("-inf")).to(tl.float32)
            slope = tl.exp(part - highest) / mass - tl.where(place == target, 1.0, 0.0)
            tl.store(base + place, slope.to(logits.dtype.element_ty), place < V)


@torch.library.custom_op("engram_lab::linear_cross_entropy", mutates_args=(), device_types="cuda")
def linear_cross_entropy(
    h: Tensor, weight: Tensor, targets: Tensor, differentiate: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the sum of the losses, each token's loss [N], and the sum's gradients in h and weight.

    h [N, D] is bfloat16, the sums run in float32; without `differentiate` the gradients are empty.
    """
    total, losses, grad_h, grad_weight = _room(h, weight, targets, differentiate)
    V = weight.shape[0]
    rows = max(1, min(LOGITS // V, len(h)))
    narrow = weight.to(h.dtype)
    buffer = h.new_empty(rows, V)
    block = min(triton.next_power_of_2(V), 16384)
    with torch.cuda.device_of(h):
        for first in range(0, len(h), rows):
            part = h[first : first + rows]
            logits = torch.mm(part, narrow.t(), out=buffer[: len(part)])
            _softmax[(len(part),)](
                logits, targets[first:], losses[first:], V=V, BLOCK=block, DIFFERENTIATE=differentiate,
                num_warps=max(4, min(16, block // 1024)),
            )  # fmt: skip
            if differentiate:
                torch.mm(logits, narrow, out=grad_h[first : first + rows])
                product = torch.mm(logits.t(), part, out_dtype=torch.float32).to(weight.dtype)
                grad_weight = grad_weight.add_(product) if first else product
        torch.sum(losses, dim=0, out=total)
    return total, losses, grad_h, grad_weight


@linear_cross_entropy.register_fake
def _room(
    h: Tensor, weight: Tensor, targets: Tensor, differentiate: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return space for the results."""
    total, losses = h.new_empty((), dtype=torch.float32), h.new_empty(len(h), dtype=torch.float32)
    if differentiate:
        return total, losses, torch.empty_like(h), torch.empty_like(weight)
    return total, losses, h.new_empty(0), weight.new_empty(0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[2:])
    ctx.set_materialize_grads(False)


def _scale(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor, Tensor, None, None]:
    grad_h, grad_weight = ctx.saved_tensors
    return grad_h * grad.to(grad_h.dtype), grad_weight * grad.to(grad_weight.dtype), None, None


linear_cross_entropy.register_autograd(_scale, setup_context=_save)

"""Moving token rows to experts and back, and the products in between.

Shapes: E experts, K choices a token; "choices" are the tokens * K pairs of a token and one of its experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def load(chosen: Tensor, experts: int) -> Tensor:
    """Return how many of the `chosen` [..., K] fell on each expert, int64 [E]; synchronises no device."""
    flat = chosen.flatten()
    return flat.new_zeros(experts).scatter_add_(0, flat, torch.ones_like(flat))


def spread(x: Tensor, order: Tensor, places: Tensor) -> Tensor:
    """Copy token rows x [tokens, D] to the places of their choices, sorted by expert: [tokens * K, D].

    `order` lists the choices by expert, and `places` is its inverse.
    """
    return _Spread.apply(x, order, places)


def gather_choices(y: Tensor, order: Tensor, places: Tensor, K: int) -> Tensor:
    """Add up each token's K rows of y [tokens * K, D], which are sorted by expert: [tokens, D]."""
    return _Gather.apply(y, order, places, K)


class _Spread(torch.autograd.Function):
    """Its gradient is `_Gather`: a sum of gathered rows, where autograd would scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.K = order.numel() // x.shape[0]
        return x.index_select(0, order // ctx.K)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, *ctx.saved_tensors).unflatten(0, (-1, ctx.K)).sum(dim=1), None, None


class _Gather(torch.autograd.Function):
    """Its gradient is `_Spread`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, places: Tensor, K: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.K = K
        return y.index_select(0, places).unflatten(0, (-1, K)).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (order,) = ctx.saved_tensors
        return grads[0].index_select(0, order // ctx.K), None, None, None


class _LoopedMatmul(torch.autograd.Function):
    """One product per group of rows, written straight into its slice of the result; any dtype and width."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        out = x.new_empty(x.shape[0], weight.shape[2])
        for x_e, weight_e, out_e in zip(x.split(counts), weight, out.split(counts), strict=True):
            torch.mm(x_e, weight_e, out=out_e)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
        groups = zip(
            x.split(ctx.counts),
            weight,
            grads[0].split(ctx.counts),
            grad_x.split(ctx.counts),
            grad_weight,
            strict=True,
        )
        for x_e, weight_e, grad_e, grad_x_e, grad_weight_e in groups:
            torch.mm(grad_e, weight_e.t(), out=grad_x_e)
            torch.mm(x_e.t(), grad_e, out=grad_weight_e)
        return grad_x, grad_weight, None


def grouped_matmul(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Multiply rows of x [rows, in], sorted by expert, with their expert's matrix in weight [E, in, out].

    `counts` [E] says how many rows each expert has. CUDA takes the grouped kernel where it `stays_on_device`;
    everything else loops, which on one CPU core is also the fastest of the ways tried
    (benchmarks/experts_cpu.py).
    """
    if x.is_cuda and stays_on_device(x.dtype, weight.shape):
        return F.grouped_mm(x, weight, offs=counts.cumsum(0).to(torch.int32))
    return _looped(x, weight, counts)


def stays_on_device(dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether on CUDA `grouped_matmul` with weight of `shape` [E, in, out] leaves the counts on the device.

    The grouped kernel does, which takes bfloat16 in rows of whole 16 bytes.
    """
    return dtype == torch.bfloat16 and shape[1] % 8 == 0 and shape[2] % 8 == 0


@torch.compiler.disable  # or the loop would be compiled anew for every load
def _looped(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return _LoopedMatmul.apply(x, weight, counts.tolist())

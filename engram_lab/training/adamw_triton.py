"""AdamW of large tensors on a GPU: one pass that scales gradients while it reads them.

torch's fused kernel writes scaled gradients back, an eighth more traffic. Small tensors are left to it, which
takes many at a launch; the state is the same, so that either goes on where the other stopped.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_LARGE = 2**20
"""Values from which a launch of its own costs a tensor less than it gains."""
_BLOCK, _WARPS = 2048, 8
"""Values one program updates, and its warps; the fastest of those tried on an H100."""


@triton.jit
def _update(
    parameter: tl.tensor, grad: tl.tensor, average: tl.tensor, square: tl.tensor, step: tl.tensor,
    rate: tl.tensor, scale: tl.tensor, n: tl.tensor, decay: tl.tensor, gain1: tl.tensor, gain2: tl.tensor,
    log_beta1: tl.tensor, log_beta2: tl.tensor, eps: tl.tensor, narrow: tl.tensor, NARROW: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < n
    g = tl.load(grad + i, live) * tl.load(scale)
    x, m, v = tl.load(parameter + i, live), tl.load(average + i, live), tl.load(square + i, live)
    # 1 - beta^t loses digits in float32 while t is small.
    t = tl.load(step).to(tl.float64)
    correction1 = (1.0 - tl.exp(t * log_beta1)).to(tl.float32)
    correction2 = tl.sqrt((1.0 - tl.exp(t * log_beta2)).to(tl.float32))
    lr = tl.load(rate)
    x -= lr * decay * x
    m += (g - m) * gain1
    v += (g * g - v) * gain2
    x -= lr / correction1 * m / (tl.sqrt(v) / correction2 + eps)
    tl.store(parameter + i, x, live)
    if NARROW:
        tl.store(narrow + i, x.to(narrow.dtype.element_ty), live)
    tl.store(average + i, m, live)
    tl.store(square + i, v, live)


def fits(parameter: Tensor) -> bool:
    """Whether `update` takes the parameter and is the faster way."""
    grad = parameter.grad
    return (
        grad is not None
        and parameter.is_cuda
        and parameter.numel() >= _LARGE
        and parameter.dtype == grad.dtype == torch.float32
        and parameter.is_contiguous()
        and grad.is_contiguous()
    )


def update(
    parameter: Tensor,
    state: dict[str, Tensor],
    *,
    rate: Tensor,
    scale: Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    narrow: Tensor | None,
) -> None:
    """Update a parameter that `fits` by its gradient times `scale`, as `torch.optim.AdamW` does in float32.

    `state` holds the moments "exp_avg" and "exp_avg_sq", and in "step" the number of this step, from 1;
    `rate` and `scale` are single numbers on the parameter's device; `narrow`, if given, becomes a copy of the
    parameter in its own dtype.
    """
    n = parameter.numel()
    with torch.cuda.device_of(parameter):
        _update[(triton.cdiv(n, _BLOCK),)](
            parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], state["step"], rate, scale, n,
            weight_decay, *(1 - beta for beta in betas), *(_log(beta) for beta in betas), eps,
            parameter if narrow is None else narrow, NARROW=narrow is not None, BLOCK=_BLOCK,
            num_warps=_WARPS,
        )  # fmt: skip


def _log(beta: float) -> float:
    return math.log(beta) if beta else -1e4

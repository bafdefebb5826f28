"""Muon for matrices and stacks of matrices: one batched Newton-Schulz iteration for all of one shape.

The rule is Keller Jordan's (https://kellerjordan.github.io/posts/muon/) with the learning-rate adjustment
of "Muon is Scalable for LLM Training" (https://arxiv.org/abs/2502.16982). `torch.optim.Muon` takes 2-D
parameters only and visits them one by one; an expert stack [E, in, out] is E independent matrices, and all
matrices of one shape in a network go through the same few batched products here.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

# The quintic of the post above: it maximises the slope at zero, so singular values end in about [0.7, 1.2].
QUINTIC = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
SMALLEST_NORM = 1e-7


def orthogonalise(matrices: Tensor) -> Tensor:
    """Push every singular value of `matrices` [n, rows, columns] (rows <= columns) towards 1.

    Works and returns in bfloat16, as the published rule does; an all-zero matrix stays zero.
    """
    a, b, c = QUINTIC
    x = matrices.bfloat16()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=SMALLEST_NORM)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def muon_step(
    parameters: list[Tensor],
    gradients: list[Tensor],
    momenta: list[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float,
    momentum: float,
) -> None:
    """Update `parameters` ([rows, columns] or [E, rows, columns]) and `momenta` in place.

    Nesterov momentum, decay decoupled from the gradient, and a step whose root mean square matches that of
    AdamW (0.2 sqrt(max(rows, columns)) times the orthogonal matrix), so that one learning rate serves both.
    """
    torch._foreach_lerp_(momenta, gradients, 1.0 - momentum)
    updates = torch._foreach_lerp(gradients, momenta, momentum)
    same_shape: defaultdict[tuple[int, int, torch.device], list[int]] = defaultdict(list)
    for i, parameter in enumerate(parameters):
        rows, columns = sorted(parameter.shape[-2:])
        same_shape[rows, columns, parameter.device].append(i)

    torch._foreach_mul_(parameters, 1.0 - lr * weight_decay)
    for (rows, columns, _), members in same_shape.items():
        wide = [_wide(updates[i]).reshape(-1, rows, columns).bfloat16() for i in members]
        orthogonal = orthogonalise(torch.cat(wide)).split([len(stack) for stack in wide])
        for i, update in zip(members, orthogonal, strict=True):
            target = _wide(parameters[i])
            step = update.view(target.shape).to(target.dtype)  # scaled in bfloat16 it would be rounded again
            target.sub_(step * (lr * 0.2 * math.sqrt(columns)))


def _wide(matrix: Tensor) -> Tensor:
    """Return the view of `matrix` [..., rows, columns] that has no more rows than columns."""
    return matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix

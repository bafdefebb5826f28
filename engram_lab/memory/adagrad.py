"""Row-wise Adagrad, the rule with the least state for a table: one number a row.

    s_i <- s_i + mean over columns of G_i^2;  W_i <- W_i - lr G_i / (sqrt(s_i) + eps)

It is what recommendation systems train their embedding tables with (FBGEMM's `EXACT_ROWWISE_ADAGRAD`). A
row's rate falls with every read, so a frequent row's falls faster.

Shapes: R rows, U row width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_adagrad_step(
    tables: list[Tensor], gradients: list[Tensor], sums: list[Tensor], *, lr: float | Tensor, eps: float
) -> None:
    """Update `tables` [R, U] and their `sums` [R, 1] in place; a row without a gradient stays as it is."""
    for table, gradient, sum_sq in zip(tables, gradients, sums, strict=True):
        sum_sq.add_(gradient.float().square().mean(1, keepdim=True))
        table.sub_(gradient * (lr / (torch.sqrt(sum_sq) + eps)).to(table.dtype))

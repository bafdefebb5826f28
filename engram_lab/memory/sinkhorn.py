"""Momentum with Sinkhorn balancing, the rule DeepSeek-V4.1 trains its n-gram tables with.

Source: section 2.5 and Algorithm 1 of the DeepSeek-V4.1-Flash report (https://arxiv.org/abs/2609.19969). For
a table of m rows and n columns, with gradient G:

    M <- beta M + (1 - beta) G;  U = beta M + (1 - beta) G                        (Nesterov)
    rho_i = |U_i|;  U_i = 0 where rho_i <= tau mean(rho)                          (idle rows)
    K times, K odd: divide every row by its norm, then every column by its norm, and so on, rows last
    W <- W - gamma lr sqrt(n) U

so every row that moves does so by gamma lr root mean square, and columns move about alike. The constants
below and the absence of weight decay are the report's. Its epsilon of 1e-20 only keeps empty rows and columns
from dividing by zero, which the clamp here does; that scales are kept as vectors instead of rewriting the
matrix is its section 3.1.3. The report trains the token embedding and the head this way too; here it is the
tables alone. Balancing a gradient's rows and columns goes back to SinkGD (https://arxiv.org/abs/2502.06742).

Our reading, where the report is silent: the matrix is one layer's whole table, all its hash heads together.

Shapes: R rows, U row width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

MOMENTUM = 0.95
NORMALISATIONS = 11
IDLE = 1e-3  # tau: share of the mean row norm up to which a row is left where it is
STEP_SIZE = 0.18  # gamma: brings a row's step to the size Adam's usually has; 0.2 in our Muon


def balance(
    update: Tensor, members: Tensor | None = None, total: Callable[[Tensor], Tensor] = lambda part: part
) -> Tensor:
    """Scale rows and columns of `update` [R, U] until each has root mean square 1, about, idle rows aside.

    Active rows have it exactly, columns (over the active rows) nearly. Idle rows, and columns without any
    value, come out as zeros. Multiplying `update` by a positive number changes nothing. Each normalisation
    reads one matrix of squares once and writes one vector: the scaled matrix is formed at the end only.
    Computes in float32 or better.

    `members` [R, M], ones and zeros, is for rows picked from M tables: it says which one each row is from.
    Tables are balanced apart, and rows of zeros leave the mean norm, which decides who is idle, as it is.
    Where each rank has some of these rows, `total` adds up their sums over rows, a few small ones.
    """
    update = update.to(torch.promote_types(update.dtype, torch.float32))
    norms = torch.linalg.vector_norm(update, dim=1)
    if members is None:
        members, mean = update.new_ones(len(update), 1), norms.mean()
    else:
        sums, counts = total(norms @ members), total((norms > 0).to(norms) @ members)
        mean = members @ (sums / counts.clamp(min=1))
    scale = norms.reciprocal().masked_fill(norms <= IDLE * mean, 0.0)  # the first normalisation
    squares = (update * scale.unsqueeze(1)).square_()
    rows, columns = members, update.new_ones(update.shape[1], members.shape[1])  # scales, squared
    smallest = torch.finfo(update.dtype).tiny
    for _ in range(NORMALISATIONS // 2):
        columns = total(squares.mT @ rows).clamp(min=smallest).reciprocal()
        rows = (squares @ columns).clamp(min=smallest).reciprocal() * members
    del squares  # as large as the table
    balanced = rows.sqrt() @ (columns.sqrt() * math.sqrt(update.shape[1])).mT
    return balanced.mul_(update).mul_(scale.unsqueeze(1))


def sinkhorn_step(
    tables: list[Tensor],
    gradients: list[Tensor],
    momenta: list[Tensor],
    *,
    lr: float | Tensor,
    momentum: float,
) -> None:
    """Update `tables` ([R, U] each) and their `momenta` in place; a row never read stays as it is."""
    torch._foreach_lerp_(momenta, gradients, 1.0 - momentum)
    for table, gradient, average in zip(tables, gradients, momenta, strict=True):
        table.sub_(balance(torch.lerp(gradient, average, momentum)).mul_(lr * STEP_SIZE))

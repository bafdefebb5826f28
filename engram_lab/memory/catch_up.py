"""What Adam does to a row while nobody reads it, in a bounded number of operations however long that was.

A step without a gradient still moves a row, by its momentum. From the state m, v after step s on,

    step j moves it by   -rate_j / (1 - beta1^j) * beta1^k m / (beta2^(k/2) sqrt(v) / sqrt(1 - beta2^j) + eps)

with k = j - s. Short gaps are summed like that, term by term. For long ones let T_s(d) be the sum over all
steps after s, without end, for d = sqrt(v) and m = 1; what happens from s to t is then exactly

    T_s(d) - beta1^(t - s) T_t(beta2^((t - s)/2) d)

Each T_s is a sum over j of w_j / (d + eps x_j), with

    x_j = sqrt(1 - beta2^j) beta2^(-k/2)
    w_j = rate_j / (1 - beta1^j) sqrt(1 - beta2^j) (beta1 / sqrt(beta2))^k

As a function of log x the summand is smooth for every d, so a Gauss quadrature in log x for the weights w_j
does it with a few nodes: 8 for betas (0.9, 0.95), whose relative error is below 1e-7 for any d. The rates of
all steps, also those to come, go into the weights exactly, so a changing rate costs nothing.

Shapes: S steps, K terms, n nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from engram_lab.errors import UserError

NEGLIGIBLE = 1e-10
"""Terms of T are summed until the first one smaller than this share of the first."""
TOLERANCE, MOST_NODES, MOST_TERMS = 1e-7, 24, 4096
"""Relative error of a quadrature (float32's own), and nodes and terms beyond which it would cost too much."""

DECAY, DECAY_SQ, DECAY_ROOT, RATE, UNBIAS, NODES = range(6)
"""Columns of the table of constants. By gap k: beta1^k, beta2^k, beta2^(k/2). By step j: rate_j / (1 -
beta1^j), 1 / sqrt(1 - beta2^j). By step s: the n weights of T_s, then its n values of eps x."""


def adam_constants(
    first: int,
    count: int,
    *,
    betas: tuple[float, float],
    eps: float,
    nodes: int,
    rates: Callable[[int], float],
) -> np.ndarray:
    """Return lines `first` to `first + count` of the table of constants, float32 [count, NODES + 2 nodes].

    `rates` gives the learning rate of any step from 1 on, steps beyond the end of the run included.
    """
    beta1, beta2 = betas
    here = np.arange(first, first + count)
    table = np.zeros((count, NODES + 2 * nodes))
    table[:, DECAY] = np.power(beta1, here, dtype=np.float64)
    table[:, DECAY_SQ] = np.power(beta2, here, dtype=np.float64)
    table[:, DECAY_ROOT] = np.power(beta2, here / 2)

    K = _terms(betas)
    steps = np.arange(max(first, 1), first + count + K)
    rate = np.array([rates(int(j)) for j in steps])
    taken = slice(len(here) - min(count, len(steps) - K), None)  # step 0 takes no step
    own = len(steps) - K
    table[taken, RATE] = (rate / _unbias(beta1, steps))[:own]
    table[taken, UNBIAS] = 1 / np.sqrt(_unbias(beta2, steps[:own]))
    if nodes:
        points, weights = _terms_of(steps[:own], rate, betas, K)
        x, w = quadrature(points, weights, nodes)
        table[taken, NODES : NODES + nodes] = w
        table[taken, NODES + nodes :] = eps * np.exp(x)
    return table.astype(np.float32)


def nodes_for(betas: tuple[float, float]) -> int:
    """Return the fewest nodes whose quadrature of T is exact to `TOLERANCE`, early and late in a run.

    Raises UserError when there is no such number: beta1 too near to sqrt(beta2), or above it.
    """
    if betas[0] == 0:
        return 0  # without momentum an unread row rests
    if betas[0] < math.sqrt(betas[1]) and _terms(betas) <= MOST_TERMS:
        d = np.logspace(-8, 16, 200)[:, None]  # in units of eps
        K = _terms(betas)
        sums = []
        for s in (1, 1 << 40):
            y, w = _terms_of(np.array([s]), np.ones(K + 1), betas, K)
            sums.append((y, w, (w / (d + np.exp(y))).sum(1)))
        for n in range(1, MOST_NODES + 1):
            errors = []
            for y, w, exact in sums:
                nodes, weights = quadrature(y, w, n)
                errors.append(np.abs((weights / (d + np.exp(nodes))).sum(1) / exact - 1).max())
            if max(errors) < TOLERANCE:
                return n
    raise UserError(
        f"optimizer.betas is {betas!r}; rows that are caught up when they are read need a beta1 well below "
        f"sqrt(beta2) = {math.sqrt(betas[1]):.4g}, say {betas[1] ** 2:.2g}."
    )


def quadrature(points: np.ndarray, weights: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return nodes and weights [S, n] of the Gauss quadratures for the sums over points [S, K] with weights.

    Golub and Welsch's way: the Lanczos recurrence gives the Jacobi matrix [n, n], whose eigenvalues are the
    nodes. A polynomial of degree below 2 n is summed exactly. Weights must not be negative.
    """
    S = len(points)
    total = weights.sum(1, keepdims=True)
    basis = [np.sqrt(weights / np.maximum(total, np.finfo(float).tiny))]
    jacobi = np.zeros((S, n, n))
    for i in range(n):
        ahead = points * basis[i]
        jacobi[:, i, i] = (ahead * basis[i]).sum(1)
        for vector in basis * 2:  # once is not enough against rounding
            ahead = ahead - (ahead * vector).sum(1, keepdims=True) * vector
        norm = np.sqrt((ahead * ahead).sum(1))
        if i + 1 < n:
            jacobi[:, i, i + 1] = jacobi[:, i + 1, i] = norm
        basis.append(ahead / np.maximum(norm, np.finfo(float).tiny)[:, None])
    nodes, vectors = np.linalg.eigh(jacobi)
    return nodes, vectors[:, 0, :] ** 2 * total


def _terms(betas: tuple[float, float]) -> int:
    """How many terms of T are summed."""
    ratio = betas[0] / math.sqrt(betas[1])
    return math.ceil(math.log(NEGLIGIBLE) / math.log(ratio)) if ratio else 0


def _unbias(beta: float, steps: np.ndarray) -> np.ndarray:
    """1 - beta^j."""
    return 1 - np.power(beta, steps, dtype=np.float64)


def _terms_of(
    steps: np.ndarray, rate: np.ndarray, betas: tuple[float, float], K: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return log x and w, [S, K], of T for consecutive `steps` [S]; `rate` [S + K] starts with theirs."""
    k = np.arange(1, K + 1)
    j = steps[:, None] + k
    root = np.sqrt(_unbias(betas[1], j))
    rates = np.lib.stride_tricks.sliding_window_view(rate[1:], K)
    weights = rates / _unbias(betas[0], j) * root * (betas[0] / math.sqrt(betas[1])) ** k
    return np.log(root) - k / 2 * math.log(betas[1]), weights

"""Chinchilla's law L = E + A N^-alpha + B D^-beta (Hoffmann et al. 2022, approach 3), free and tied (alpha
= beta).

Fitted to log loss with a Huber loss of 1e-3, summed over runs, as in the re-analysis of Besiroglu et al.
(2024). Starts come from variable projection: alpha and beta on a grid, the rest by weighted linear least
squares.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import polars as pl

from scaling.errors import ScalingError
from scaling.frame import Excluded, Source, finished, need, numbers, read
from scaling.lawfit import LawFit, law_fit
from scaling.lse import Terms

LARGEST = 700.0
"""Largest exponent taken, so that a degenerate fit reports a huge number instead of infinity."""
FLOPS_PER_PARAMETER_TOKEN = 6.0
"""C = 6 N D, by which D is filled in when only compute is given."""

SIZE, TOKENS = frozenset({0}), frozenset({1})
"""The term of N and the term of D, in this law and in Kaplan's."""


def fit_chinchilla(
    source: Source,
    *,
    tied: bool = False,
    columns: Mapping[str, str] | None = None,
    delta: float = 1e-3,
    drop_largest: int = 0,
    draws: int = 1000,
    cluster: str | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> LawFit:
    """Fit Chinchilla's law to total_parameters N, tokens D (or budget C = 6 N D) and loss.

    `delta` is Huber's bend on log loss; infinity gives least squares. `drop_largest` leaves out that many
    of the largest losses (five in the published re-analysis, whose outliers are the smallest budgets).
    Intervals are percentiles of `draws` case bootstraps, over clusters when `cluster` names a column.
    """
    frame, excluded, n, d, loss = runs(source, columns, drop_largest)
    mean_n, mean_d = float(np.log(n).mean()), float(np.log(d).mean())
    x, z = np.log(n) - mean_n, np.log(d) - mean_d
    width = 4 if tied else 5
    terms = np.zeros((3, len(loss), width))
    terms[0, :, 0] = terms[1, :, 1] = terms[2, :, 2] = 1.0
    terms[0, :, 3], terms[1, :, width - 1] = -x, -z

    def report(phi: np.ndarray) -> dict[str, np.ndarray]:
        alpha, beta = phi[:, 3], phi[:, width - 1]
        log_a, log_b = phi[:, 0] + alpha * mean_n, phi[:, 1] + beta * mean_d
        share = beta / (alpha + beta)
        return {
            "A": np.exp(np.minimum(log_a, LARGEST)),
            "B": np.exp(np.minimum(log_b, LARGEST)),
            "E": np.exp(phi[:, 2]),
            "alpha": alpha,
            "beta": beta,
            "N_exponent": share,
            "D_exponent": 1 - share,
            "ln_G": (np.log(np.maximum(alpha, 1e-300) / np.maximum(beta, 1e-300)) + log_a - log_b)
            / (alpha + beta),
        }

    def predict(params: Mapping[str, float], columns: Mapping[str, np.ndarray]) -> np.ndarray:
        size, tokens = columns["total_parameters"], columns["tokens"]
        return params["E"] + params["A"] * size ** -params["alpha"] + params["B"] * tokens ** -params["beta"]

    return law_fit(
        name="chinchilla-tied" if tied else "chinchilla",
        formula="E + A N^-alpha + B D^-beta" + (", alpha = beta" if tied else ""),
        data=Terms(terms=terms, log_loss=np.log(loss)),
        starts=_starts(x, z, loss, tied),
        report=report,
        main=("A", "B", "E", "alpha", "beta"),
        labels=("total_parameters", "tokens"),
        exponents=("alpha",) if tied else ("alpha", "beta"),
        rests_on={"A": SIZE, "B": TOKENS} | ({} if tied else {"alpha": SIZE, "beta": TOKENS}),
        predict=predict,
        columns={"total_parameters": n, "tokens": d},
        loss=loss,
        delta=delta,
        draws=draws,
        cluster=labels(frame, cluster),
        confidence=confidence,
        seed=seed,
        excluded=excluded,
        held={
            "N": "total_parameters",
            "D": "tokens" if "tokens" in frame.columns else "budget / (6 N)",
            "dropped_largest": drop_largest,
        },
    )


def compute_optimal(params: Mapping[str, float], budget: float) -> tuple[float, float]:
    """(N, D) with the lowest loss at a budget of C = 6 N D FLOPs (Hoffmann et al. 2022, eq. 4)."""
    alpha, beta = params["alpha"], params["beta"]
    base = (alpha * params["A"] / (beta * params["B"])) ** (1 / (alpha + beta))
    n = base * (budget / FLOPS_PER_PARAMETER_TOKEN) ** (beta / (alpha + beta))
    return n, budget / FLOPS_PER_PARAMETER_TOKEN / n


def runs(
    source: Source, columns: Mapping[str, str] | None, drop_largest: int = 0
) -> tuple[pl.DataFrame, tuple[Excluded, ...], np.ndarray, np.ndarray, np.ndarray]:
    """Finished runs with N, D and loss as arrays; D from compute where there is no column of tokens."""
    frame = read(source, columns)
    need(frame, "total_parameters", "loss")
    if "tokens" not in frame.columns and "budget" not in frame.columns:
        need(frame, "tokens")
    second = "tokens" if "tokens" in frame.columns else "budget"
    frame, excluded = finished(frame, ("total_parameters", second))
    if drop_largest < 0 or drop_largest >= frame.height:
        raise ScalingError(
            f"drop_largest is {drop_largest!r}; from 0 to {frame.height - 1} runs can be left out."
        )
    if drop_largest:
        order = frame["loss"].arg_sort(descending=True)[:drop_largest]
        rows = tuple(sorted(int(frame["_row"][int(i)]) for i in order))
        frame = frame.filter(~pl.col("_row").is_in(rows))
        excluded = (
            *excluded,
            Excluded(reason=f"among the {drop_largest} largest losses", rows=rows, count=len(rows)),
        )
    n = numbers(frame, "total_parameters")
    d = numbers(frame, second)
    if second == "budget":
        d = d / (FLOPS_PER_PARAMETER_TOKEN * n)
    return frame, excluded, n, d, positive_loss(frame)


def positive_loss(frame: pl.DataFrame) -> np.ndarray:
    """Losses [n] whose logarithm can be taken; the first that has none is named."""
    loss = numbers(frame, "loss")
    bad = np.flatnonzero(loss <= 0)
    if len(bad):
        raise ScalingError(
            f"Row {frame['_row'][int(bad[0])]}, column 'loss': {loss[bad[0]]:g} must be greater than 0, "
            "because this law is fitted to log loss."
        )
    return loss


def labels(frame: pl.DataFrame, cluster: str | None) -> np.ndarray | None:
    """Number of the cluster of every row [n], or None when no column is named."""
    if cluster is None:
        return None
    need(frame, cluster)
    return np.unique(frame[cluster].cast(pl.String).fill_null("").to_numpy(), return_inverse=True)[1]


def _starts(x: np.ndarray, z: np.ndarray, loss: np.ndarray, tied: bool, count: int = 6) -> np.ndarray:
    """Best fits of (A, B, E) on a grid of exponents, relative residuals, coefficients kept positive."""
    tried: list[tuple[float, list[float]]] = []
    grid = np.array([0.05, 0.12, 0.2, 0.3, 0.4, 0.55, 0.75, 1.0, 1.4])
    smallest = float(loss.min())
    for alpha in grid:
        for beta in [alpha] if tied else grid:
            terms = np.stack([np.exp(-alpha * x), np.exp(-beta * z), np.ones_like(x)], axis=1) / loss[:, None]
            best = np.linalg.lstsq(terms, np.ones_like(x), rcond=None)[0]
            best = np.maximum(best, 1e-3 * smallest)
            cost = float(np.abs(np.log(loss * (terms @ best)) - np.log(loss)).sum())
            logs = np.log(best).tolist()
            tried.append((cost, [*logs, float(alpha)] if tied else [*logs, float(alpha), float(beta)]))
    tried.sort(key=lambda item: item[0] if math.isfinite(item[0]) else math.inf)
    return np.array([theta for _, theta in tried[:count]])

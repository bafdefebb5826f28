"""What a table cannot tell about a log-sum-exp law, however well the search converged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from scaling.lse import Solution, Terms, solve

LEVEL = 0.05
LOOSE = 0.02
"""Two columns whose logarithms keep closer than this to a straight line are one: realised sizes scatter by
that much about a plan such as D = 20 N.
"""
APART = 0.1
"""Exponents that differ by this share between equally good fits belong to different basins."""


@dataclass(frozen=True, kw_only=True)
class Doubt:
    """A reason why some terms are not identified; `note` starts with its status."""

    note: str
    terms: frozenset[int]


def doubts(
    data: Terms, found: Solution, delta: float, columns: Mapping[str, np.ndarray], labels: tuple[str, ...]
) -> list[Doubt]:
    """Everything that keeps the parameters from being identified.

    `labels` names the terms that a smaller law can do without; further terms (a level) are always kept.
    """
    every = frozenset(range(len(data.terms)))
    out = [
        Doubt(note=note, terms=every) for note in (_collinear(columns), _basins(data, found, delta)) if note
    ]
    best = found.phi[int(np.argmin(found.objective))]
    share = data.value(best[None])[1][0]
    for k in sorted(every):
        label = labels[k] if k < len(labels) else "E"
        if share[k].max() < 1e-4:
            note = f"flat-direction: the term of {label} contributes less than .01 % everywhere"
            out.append(Doubt(note=note, terms=frozenset({k})))
        elif k < len(labels):
            p = _without(data, found, delta, k)
            if p > LEVEL:
                note = f"flat-direction: without the term of {label} the fit is no worse (p = {p:.2g})"
                out.append(Doubt(note=note, terms=frozenset({k})))
    return out


def _collinear(columns: Mapping[str, np.ndarray]) -> str:
    (one, x), (two, z) = list(columns.items())[:2]
    logs = np.stack([np.log(x), np.log(z)])
    logs = logs - logs.mean(axis=1, keepdims=True)
    # the distance from the best line through both, in the direction that varies least
    rest = math.sqrt(max(float(np.linalg.eigvalsh(logs @ logs.T / logs.shape[1])[0]), 0.0))
    if rest > LOOSE:
        return ""
    slope = float(logs[0] @ logs[1] / max(logs[0] @ logs[0], 1e-300))
    return (
        f"collinear: {two} follows {one}^{slope:.3g} to within {100 * rest:.2g} %, so the runs cannot tell"
        " their effects apart"
    )


def _basins(data: Terms, found: Solution, delta: float) -> str:
    n = data.terms.shape[1]
    best = int(np.argmin(found.objective))
    least = deviance(float(found.objective[best]), n, delta)
    near = [
        i
        for i in np.flatnonzero(found.converged)
        if deviance(float(found.objective[i]), n, delta) < least + 2
    ]
    # terms share their columns with heights; what has slopes is an exponent
    slopes = np.flatnonzero((np.ptp(data.terms, axis=1) > 0).any(axis=0))
    away = [float(np.abs(found.phi[i, slopes] - found.phi[best, slopes]).max()) for i in near if len(slopes)]
    if not away or max(away) <= APART:
        return ""
    return f"several-basins: equally good fits differ by {max(away):.2g} in an exponent"


def _without(data: Terms, found: Solution, delta: float, k: int) -> float:
    """p of the law without term k, by its likelihood ratio."""
    others = [i for i in range(len(data.terms)) if i != k]
    used = np.any(data.terms[others] != 0, axis=(0, 1))
    if data.power is not None:
        used[data.power] = True
    kept = np.flatnonzero(used)
    smaller = Terms(
        terms=data.terms[others][:, :, kept],
        log_loss=data.log_loss,
        power=None if data.power is None else int(np.searchsorted(kept, data.power)),
        offset=None if data.offset is None else data.offset[others],
    )
    n = len(data.log_loss)
    less = float(solve(smaller, found.phi[:, kept], delta=delta).objective.min())
    gain = deviance(less, n, delta) - deviance(float(found.objective.min()), n, delta)
    from scipy.special import chdtrc

    return float(chdtrc(len(used) - len(kept), max(gain, 0.0)))


def deviance(objective: float, n: int, delta: float) -> float:
    """-2 ln likelihood under the density proportional to exp(-huber(r) / s), its scale s at its maximum.

    The density integrates to sqrt(2 pi s) erf(delta / sqrt(2 s)) + 2 (s / delta) exp(-delta^2 / (2 s));
    with an infinite delta it is the normal one. Residuals below 1e-8 count as 1e-8.
    """
    objective = max(objective, n * 0.5e-16)
    if math.isinf(delta):
        return n * math.log(2 * math.pi * 2 * objective / n) + n
    scale = np.exp(np.linspace(math.log(objective / n) - 12, math.log(objective / n) + 12, 4801))
    inside = np.array([math.erf(bend) for bend in (delta / np.sqrt(2 * scale)).tolist()])
    normal = np.sqrt(2 * np.pi * scale) * inside
    tails = 2 * scale / delta * np.exp(-(delta**2) / (2 * scale))
    return float((2 * objective / scale + 2 * n * np.log(normal + tails)).min())

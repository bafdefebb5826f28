"""Laws fitted by least squares with an analytic Jacobian, and profile-F intervals for every parameter and
prediction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from scaling.curvefit import Interval
from scaling.frame import Excluded
from scaling.lawfit import LawFit, Predict, unfitted
from scaling.levenberg import Function, Model, extremes, minimise
from scaling.separable import quantile_f

Named = Callable[[np.ndarray], dict[str, np.ndarray]]
"""theta [B, p] -> named parameters [B]"""


def _pick(named: Named, key: str) -> Function:
    return lambda theta: named(theta)[key]


def gauss_fit(
    *,
    name: str,
    formula: str,
    model: Model,
    starts: np.ndarray,
    named: Named,
    main: tuple[str, ...],
    predict: Predict,
    columns: Mapping[str, np.ndarray],
    loss: np.ndarray,
    confidence: float,
    excluded: tuple[Excluded, ...],
    held: Mapping[str, Any],
    needs: Mapping[str, int],
) -> LawFit:
    """Fit a law; `needs` is how many distinct values each column must take."""
    n, p = len(loss), starts.shape[1]
    common: dict[str, Any] = {
        "name": name,
        "formula": formula,
        "n": n,
        "k": p,
        "delta": math.inf,
        "confidence": confidence,
        "held": held,
        "excluded": excluded,
        "columns": columns,
        "loss": loss,
        "formula_of": predict,
        "names": main,
    }
    poor = [key for key, count in needs.items() if len(np.unique(columns[key])) < count]
    if n < p + 2:
        return unfitted(common, f"{n} runs; {p} parameters need at least {p + 2}")
    if poor:
        taken = len(np.unique(columns[poor[0]]))
        return unfitted(common, f"{poor[0]} takes {taken} values; at least {needs[poor[0]]} are needed")
    if np.ptp(loss) <= 1e-12 * float(np.abs(loss).max()):
        return unfitted(common, "all losses are equal", status="flat-direction")
    found = minimise(model, starts, iterations=500)
    winner = int(np.argmin(np.where(np.isfinite(found.rss), found.rss, np.inf)))
    theta, rss = found.theta[winner], float(found.rss[winner])
    dof = n - p
    floor = n * (1e-10 * float(np.abs(loss).max())) ** 2
    critical = rss + max(rss, floor) / dof * quantile_f(confidence, dof)
    values = {key: float(value[0]) for key, value in named(theta[None]).items()}
    notes = [] if found.converged[winner] else [f"not-converged: gradient {found.gradient[winner]:.1e}"]
    intervals: dict[str, Interval] = {}
    for key in values:
        intervals[key] = extremes(model, theta, rss, critical, _pick(named, key))
        if intervals[key] == (None, None) and key in main:
            notes.append(f"flat-direction: the data set no bound on {key}")

    def profile(at: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        size = len(next(iter(at.values())))
        ends = np.empty((2, size))
        for i in range(size):
            here = {key: value[i : i + 1] for key, value in at.items()}

            def mean(t: np.ndarray, here: Mapping[str, np.ndarray] = here) -> np.ndarray:
                every = {key: value[:, None] for key, value in named(t).items()}
                return predict(every, here)[:, 0]  # type: ignore[arg-type]

            low, high = extremes(model, theta, rss, critical, mean)
            ends[:, i] = -np.inf if low is None else low, np.inf if high is None else high
        return ends[0], ends[1]

    deviance = n * math.log(max(rss, floor) / n)
    return LawFit(
        **common,
        params={key: values[key] for key in main},
        intervals=intervals,
        interval_method="profile-F",
        derived={key: value for key, value in values.items() if key not in main},
        objective=rss / 2,
        aicc=deviance + 2 * p + 2 * p * (p + 1) / (n - p - 1) if n - p > 1 else None,
        sd=math.sqrt(rss / dof),
        status=notes[0].split(":")[0] if notes else "converged",
        notes=tuple(notes),
        profile=profile,
        draws={},
    )

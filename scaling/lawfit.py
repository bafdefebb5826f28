"""The frozen result of a log-sum-exp law, its case bootstrap and its status."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scaling.curvefit import Interval
from scaling.errors import ScalingError
from scaling.frame import Excluded
from scaling.lse import Terms, solve

Report = Callable[[np.ndarray], dict[str, np.ndarray]]
"""phi [B, p] -> named parameters [B]"""
Predict = Callable[[Mapping[str, float], Mapping[str, np.ndarray]], np.ndarray]
"""(parameters, columns [m]) -> loss [m]"""
Profile = Callable[[Mapping[str, np.ndarray]], tuple[np.ndarray, np.ndarray]]
"""columns [m] -> ends of the interval of the mean loss [m]"""


@dataclass(frozen=True, kw_only=True)
class LawFit:
    """One standard law fitted to a table of runs."""

    name: str
    formula: str
    n: int
    k: int
    params: dict[str, float]
    intervals: dict[str, Interval]
    interval_method: str
    derived: dict[str, float]
    """Quantities that follow from the parameters; their intervals are in `intervals` too."""
    objective: float | None
    """Sum of Huber losses of the log residuals (half squares when delta is infinite)."""
    delta: float
    aicc: float | None
    """See `huber_aicc`; comparable between laws fitted to the same runs with the same delta."""
    sd: float | None
    """Root mean square of the log residuals."""
    status: str
    notes: tuple[str, ...]
    confidence: float
    held: Mapping[str, Any]
    excluded: tuple[Excluded, ...]
    columns: Mapping[str, np.ndarray] = field(repr=False, compare=False)
    """What was fitted against, by documented column name."""
    loss: np.ndarray = field(repr=False, compare=False)
    draws: Mapping[str, np.ndarray] = field(repr=False, compare=False)
    """Bootstrap draws of every parameter and derived quantity."""
    formula_of: Predict = field(repr=False, compare=False)
    terms: Terms | None = field(default=None, repr=False, compare=False)
    """What was minimised, where the law is a log-sum-exp; `choosing` refits it."""
    phi: np.ndarray | None = field(default=None, repr=False, compare=False)
    """The estimate in the parameters of `terms` [p]."""
    report: Report | None = field(default=None, repr=False, compare=False)
    """From phi [B, p] to named parameters."""
    profile: Profile | None = field(default=None, repr=False, compare=False)
    """Profile interval of the predicted loss, for laws without draws."""

    def predict(self, **columns: Any) -> np.ndarray:
        """Loss at given columns (keywords named as in the schema), each a number or an array."""
        self._check(columns)
        arrays = {name: np.atleast_1d(np.asarray(value, dtype=float)) for name, value in columns.items()}
        if not self.params:
            return np.full(np.broadcast_shapes(*(a.shape for a in arrays.values())), np.nan)
        return self.formula_of({**self.params, **self.derived}, arrays)

    def band(self, **columns: Any) -> tuple[np.ndarray, np.ndarray]:
        """Interval of the mean loss at given columns, by `interval_method`; infinite where there is none."""
        self._check(columns)
        arrays = {name: np.atleast_1d(np.asarray(value, dtype=float)) for name, value in columns.items()}
        shape = np.broadcast_shapes(*(a.shape for a in arrays.values()))
        if self.profile is not None:
            return self.profile({name: np.broadcast_to(value, shape) for name, value in arrays.items()})
        if not self.draws:
            return np.full(shape, -np.inf), np.full(shape, np.inf)
        every = {name: value[:, None] for name, value in self.draws.items()}
        loss = self.formula_of(every, {name: value[None] for name, value in arrays.items()})  # type: ignore[arg-type]
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(loss, [tail, 1 - tail], axis=0)
        return low, high

    def _check(self, columns: Mapping[str, Any]) -> None:
        missing = [name for name in self.columns if name not in columns]
        if missing or len(columns) != len(self.columns):
            raise ScalingError(
                f"{self.name} takes the columns {', '.join(self.columns)}; got {', '.join(columns)}."
            )

    @property
    def residuals(self) -> np.ndarray:
        """ln L - ln fitted, for every run."""
        return np.log(self.loss) - np.log(self.predict(**self.columns))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: parameters at the top level beside `intervals`."""
        return {
            "kind": self.name,
            "formula": self.formula,
            "n": self.n,
            "k": self.k,
            **self.params,
            "objective": self.objective,
            "intervals": {name: list(ends) for name, ends in self.intervals.items()},
            "interval_method": self.interval_method,
            "derived": dict(self.derived),
            "delta": None if math.isinf(self.delta) else self.delta,
            "aicc": self.aicc,
            "sd": self.sd,
            "status": self.status,
            "notes": list(self.notes),
            "confidence": self.confidence,
            "held": dict(self.held),
            "excluded": [item.to_dict() for item in self.excluded],
        }


SUBSAMPLE = 20_000
"""Runs on which starts are compared when there are more."""
MOST_CASES = 200_000_000
"""Most runs times draws in one bootstrap (about ten minutes of one core)."""


def case_weights(n: int, cluster: np.ndarray | None, draws: int, rng: np.random.Generator) -> np.ndarray:
    """How often each run is drawn [draws, n]; whole clusters are drawn when there are any."""
    if cluster is None:
        return rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(float)
    groups = int(cluster.max()) + 1
    return rng.multinomial(groups, np.full(groups, 1 / groups), size=draws).astype(float)[:, cluster]


def law_fit(
    *,
    name: str,
    formula: str,
    data: Terms,
    starts: np.ndarray,
    report: Report,
    main: tuple[str, ...],
    predict: Predict,
    columns: Mapping[str, np.ndarray],
    loss: np.ndarray,
    delta: float,
    draws: int,
    cluster: np.ndarray | None,
    confidence: float,
    seed: int,
    excluded: tuple[Excluded, ...],
    held: Mapping[str, Any],
) -> LawFit:
    """Fit, bootstrap and say how it went."""
    if not delta > 0:
        raise ScalingError(
            f"delta is {delta!r}; Huber's bend must be positive, or infinite for least squares."
        )
    if not 0.5 <= confidence < 1:
        raise ScalingError(
            f"confidence is {confidence!r}; a level from 0.5 up to, but not including, 1 is needed."
        )
    n, p = len(loss), data.terms.shape[2]
    common: dict[str, Any] = {
        "name": name,
        "formula": formula,
        "n": n,
        "k": p,
        "delta": delta,
        "confidence": confidence,
        "held": held,
        "excluded": excluded,
        "columns": columns,
        "loss": loss,
        "formula_of": predict,
    }
    distinct = {key: len(np.unique(value)) for key, value in columns.items()}
    poor = [key for key, count in distinct.items() if count < 3]
    if n < p + 2 or poor or np.ptp(np.log(loss)) <= 1e-12:
        reason = (
            f"{n} runs; {p} parameters need at least {p + 2}"
            if n < p + 2
            else f"{poor[0]} takes {distinct[poor[0]]} values; a power law needs at least 3"
            if poor
            else "all losses are equal"
        )
        return LawFit(
            **common,
            params={},
            intervals={},
            interval_method="none",
            derived={},
            objective=None,
            aicc=None,
            sd=None,
            status="too-few-points" if n < p + 2 or poor else "flat-direction",
            notes=(reason,),
            draws={},
        )
    if n > SUBSAMPLE:
        # a sample chooses the basin; the whole table then needs one start
        some = np.random.default_rng(seed).choice(n, SUBSAMPLE, replace=False)
        first = solve(data.take(some), starts, delta=delta)
        starts = first.phi[[int(np.argmin(first.objective))]]
    found = solve(data, starts, delta=delta)
    winner = int(np.argmin(found.objective))
    phi = found.phi[winner]
    values = {key: float(value[0]) for key, value in report(phi[None]).items()}
    notes = []
    if not found.converged[winner]:
        notes.append(f"not-converged: scaled gradient {found.gradient[winner]:.1e}")
    notes += _degenerate(data, phi)
    rng = np.random.default_rng(seed)
    sample: dict[str, np.ndarray] = {}
    if draws and n * draws > MOST_CASES:
        notes.append(f"no-intervals: {n} runs are too many for {draws} bootstraps; ask for fewer draws")
        draws = 0
    if draws:
        weights = case_weights(n, cluster, draws, rng)
        again = solve(data, np.repeat(phi[None], draws, axis=0), weights, delta)
        sample = report(again.phi)
    tail = (1 - confidence) / 2
    intervals: dict[str, Interval] = {}
    for key, drawn in sample.items():
        low, high = np.quantile(drawn, [tail, 1 - tail])
        intervals[key] = (
            float(low) if math.isfinite(low) else None,
            float(high) if math.isfinite(high) else None,
        )
    rest = data.value(phi[None])[0][0] - data.log_loss
    units = "clusters" if cluster is not None else "cases"
    return LawFit(
        **common,
        params={key: values[key] for key in main},
        intervals=intervals,
        interval_method=f"percentiles of {draws} bootstraps of {units}" if draws else "none",
        derived={key: value for key, value in values.items() if key not in main},
        objective=float(found.objective[winner]),
        aicc=huber_aicc(float(found.objective[winner]), n, p, delta),
        sd=float(np.sqrt((rest**2).mean())),
        status=notes[0].split(":")[0] if notes else "converged",
        notes=tuple(notes),
        draws=sample,
        terms=data,
        phi=phi,
        report=report,
    )


def _degenerate(data: Terms, phi: np.ndarray) -> list[str]:
    """Notes on terms that contribute nothing anywhere: their parameters are not identified."""
    share = data.value(phi[None])[1][0]
    silent = [k + 1 for k in range(len(share)) if share[k].max() < 1e-4]
    return [f"flat-direction: term {k} contributes less than .01 % everywhere" for k in silent]


def huber_aicc(objective: float, n: int, p: int, delta: float) -> float | None:
    """AICc under the density proportional to exp(-huber(r) / s), its scale s at the maximum of the
    likelihood.

    The density integrates to sqrt(2 pi s) erf(delta / sqrt(2 s)) + 2 (s / delta) exp(-delta^2 / (2 s));
    with an infinite delta it is the normal one.
    """
    if n - p <= 1 or objective <= 0:
        return None
    if math.isinf(delta):
        deviance = n * math.log(2 * math.pi * 2 * objective / n) + n
    else:
        scale = np.exp(np.linspace(math.log(objective / n) - 12, math.log(objective / n) + 12, 4801))
        inside = np.array([math.erf(bend) for bend in (delta / np.sqrt(2 * scale)).tolist()])
        normal = np.sqrt(2 * np.pi * scale) * inside
        tails = 2 * scale / delta * np.exp(-(delta**2) / (2 * scale))
        deviance = float((2 * objective / scale + 2 * n * np.log(normal + tails)).min())
    return deviance + 2 * p + 2 * p * (p + 1) / (n - p - 1)

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
from scaling.identify import deviance, doubts
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
    names: tuple[str, ...]
    """Every parameter of the formula, fitted or not."""
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
            **{name: self.params.get(name) for name in self.names},
            "objective": self.objective,
            "intervals": {
                name: list(self.intervals.get(name, (None, None)))
                for name in dict.fromkeys((*self.names, *self.intervals))
            },
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
    labels: tuple[str, ...],
    exponents: tuple[str, ...],
    rests_on: Mapping[str, frozenset[int]],
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
    """Fit, bootstrap and say how it went.

    `labels` names the terms that the law may turn out not to need, `exponents` the parameters that should be
    positive, `rests_on` the terms that a parameter needs (all, where it is not listed): a parameter that
    rests on a term that is not identified has no interval.
    """
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
        "names": main,
    }
    # values that differ by rounding are one
    distinct = {key: len(np.unique(np.round(np.log(value), 4))) for key, value in columns.items()}
    poor = [key for key, count in distinct.items() if count < 3]
    if n < p + 2:
        return unfitted(common, f"{n} runs; {p} parameters need at least {p + 2}")
    if poor:
        return unfitted(common, f"{poor[0]} takes {distinct[poor[0]]} values; a power law needs at least 3")
    if np.ptp(np.log(loss)) <= 1e-12:
        return unfitted(common, "all losses are equal", status="flat-direction")
    part, seen = data, columns
    if n > SUBSAMPLE:
        # a sample chooses the basin and finds what is not identified; the whole table then needs one start
        some = np.random.default_rng(seed).choice(n, SUBSAMPLE, replace=False)
        part, seen = data.take(some), {key: value[some] for key, value in columns.items()}
    sampled = solve(part, starts, delta=delta)
    doubted = doubts(part, sampled, delta, seen, labels)
    found = sampled
    if n > SUBSAMPLE:
        found = solve(data, sampled.phi[[int(np.argmin(sampled.objective))]], delta=delta)
    winner = int(np.argmin(found.objective))
    phi = found.phi[winner]
    values = {key: float(value[0]) for key, value in report(phi[None]).items()}
    notes = [doubt.note for doubt in doubted]
    if not found.converged[winner]:
        notes.append(f"not-converged: scaled gradient {found.gradient[winner]:.1e}")
    notes += [f"negative-exponent: {name} = {values[name]:.3g}" for name in exponents if values[name] <= 0]
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
    unsure = frozenset[int]().union(*(doubt.terms for doubt in doubted))
    for key, drawn in sample.items():
        if unsure & rests_on.get(key, unsure):
            intervals[key] = (None, None)
            continue
        low, high = np.quantile(drawn, [tail, 1 - tail])
        intervals[key] = (
            float(low) if math.isfinite(low) else None,
            float(high) if math.isfinite(high) else None,
        )
    for key in exponents:
        low, high = intervals.get(key, (None, None))
        if values[key] > 0 and low is not None and low <= 0:
            notes.append(f"flat-direction: {key} may be 0, where its term is a constant")
            every = rests_on.get(key, frozenset(range(len(data.terms))))
            heights = [name for name in intervals if name not in exponents]
            intervals |= {name: (None, None) for name in heights if every & rests_on.get(name, every)}
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


def unfitted(common: Mapping[str, Any], reason: str, status: str = "too-few-points") -> LawFit:
    """The result of a law that the runs do not carry."""
    return LawFit(
        **common,
        params={},
        intervals={},
        interval_method="none",
        derived={},
        objective=None,
        aicc=None,
        sd=None,
        status=status,
        notes=(reason,),
        draws={},
    )


def huber_aicc(objective: float, n: int, p: int, delta: float) -> float | None:
    """AICc under the density of `identify.deviance`."""
    if n - p <= 1 or objective <= 0:
        return None
    return deviance(objective, n, delta) + 2 * p + 2 * p * (p + 1) / (n - p - 1)

"""One family fitted to one set of observations: estimates, profile-F intervals, bands and a status.

A parameter value belongs to the interval when holding it there raises the residual sum of squares by no
more than sigma^2 F(1, n - p) (Bates & Watts 1988, ch. 6); sigma^2 = RSS / (n - p), or 1 with a chi-squared
quantile when the SD of every run is known.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from scaling.families import Family
from scaling.observations import MANY, Observations, pure_error
from scaling.separable import Design, interval, quantile_f
from scaling.tails import f_quantile

Interval = tuple[float | None, float | None]
"""Lower and upper end; None where the data set no bound."""


def union(ends: Sequence[Interval]) -> Interval:
    """Smallest interval that holds all of `ends`; an end is None where one of them is unbounded."""
    lows, highs = [low for low, _ in ends if low is not None], [high for _, high in ends if high is not None]
    whole = len(ends) > 0
    return (
        min(lows) if whole and len(lows) == len(ends) else None,
        max(highs) if whole and len(highs) == len(ends) else None,
    )


_CLOUD = {1: (241,), 2: (45, 37), 3: (19, 15, 11)}


@dataclass(frozen=True, kw_only=True)
class CurveFit:
    """A fitted family. `predict` and `band` are all a figure needs."""

    name: str
    formula: str
    k: int
    """Mean parameters of the curve; AICc and BIC count these and any block levels, but not the SD."""
    n: int
    dof: int
    rss: float | None
    sd: float | None
    """Residual SD in nats; None when the SD of the runs was given."""
    aicc: float | None
    bic: float | None
    delta_aicc: float | None = None
    params: dict[str, float]
    intervals: dict[str, Interval]
    status: str
    """"converged" or the first of the problems in `notes`."""
    notes: tuple[str, ...]
    eligible: bool
    """Whether it may be chosen: enough distinct x for its parameters, and no mere check."""
    confidence: float
    family: Family = field(repr=False, compare=False)
    obs: Observations = field(repr=False, compare=False)
    """What was fitted: the runs, or their means by x when there are very many."""
    theta: np.ndarray = field(repr=False, compare=False)
    cloud: np.ndarray = field(repr=False, compare=False)
    """Non-linear parameters inside the confidence region [K, d], internal units."""
    critical: float = field(repr=False, compare=False)

    @property
    def fitted(self) -> bool:
        """Whether there were enough data to fit it at all."""
        return self.rss is not None

    @property
    def design(self) -> Design:
        """The family on the observations it was fitted to."""
        return self.family.design(self.obs.x, self.obs.root_weight, self.obs.blocks)

    def predict(self, x: Sequence[float] | np.ndarray) -> np.ndarray:
        """Mean loss at x [m], averaged over blocks; NaN when the family was not fitted."""
        at = np.atleast_1d(np.asarray(x, dtype=float))
        if not self.fitted:
            return np.full(len(at), np.nan)
        linear, b = self.design.coefficients(self.obs.y, self.theta[None])
        q = len(self.family.nuisance_names)
        return self.family.nuisance(at) @ linear[0, :q] + b[0] * self.family.basis(self.theta[None], at)[0]

    def band(
        self, x: Sequence[float] | np.ndarray, kind: Literal["mean", "new"] = "mean"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pointwise interval for the mean loss, or for one new run, at x [m]: (lower [m], upper [m]).

        The profile-F interval of the prediction: the envelope over all theta in the confidence region of the
        interval that the linear model given theta leaves.
        """
        at = np.atleast_1d(np.asarray(x, dtype=float))
        if not self.fitted or not math.isfinite(self.critical):
            return np.full(len(at), -np.inf), np.full(len(at), np.inf)
        extra = 0.0 if kind == "mean" else 1.0 / float(np.median(self.obs.weight))
        shapes = self.family.basis(self.cloud, at)
        return self._envelope(self._row(self.family.nuisance(at))[None], shapes, extra)

    def contrast(self, minus: np.ndarray | float, plus: np.ndarray | float) -> tuple[float, Interval]:
        """Mean loss at `plus` minus at `minus`, with its profile interval.

        Either may be an array [1 + K] that follows theta: the estimate first, then the cloud. `minus` is
        read off the smooth part of the curve, without the jump.
        """
        if not self.fitted:
            return math.nan, (None, None)
        theta = np.concatenate([self.theta[None], self.cloud])
        low, high = (np.broadcast_to(np.asarray(v, dtype=float), (len(theta),)) for v in (minus, plus))
        smooth = self.family.nuisance(low)
        if self.family.jump_at is not None:
            smooth[:, 1] = 0.0
        rows = self._row(self.family.nuisance(high) - smooth)
        shape = self.family.basis(theta, high[:, None]) - self.family.basis(theta, low[:, None])
        linear, b = self.design.coefficients(self.obs.y, self.theta[None])
        estimate = float(rows[0] @ linear[0] + b[0] * shape[0, 0])
        if not math.isfinite(self.critical):
            return estimate, (None, None)
        lower, upper = self._envelope(rows[1:, None, :], shape[1:], 0.0)
        return estimate, (float(lower[0]), float(upper[0]))

    def _row(self, nuisance: np.ndarray) -> np.ndarray:
        blocks = np.zeros((*nuisance.shape[:-1], self.obs.blocks.shape[1]))
        return np.concatenate([nuisance, blocks], axis=-1)

    def _envelope(self, rows: np.ndarray, shapes: np.ndarray, extra: float) -> tuple[np.ndarray, np.ndarray]:
        """Interval of rows [K or 1, m, q] c + b shapes [K, m] over the cloud."""
        design, theta = self.design, self.cloud
        weighted = design.nuisance * design.root_weight[:, None]
        inverse = np.linalg.pinv(weighted, rcond=1e-10)
        raw = design.basis(theta, design.x) * design.root_weight
        curves = design.curves(theta)
        power = (curves * curves).sum(-1)
        yp = design.weighted(self.obs.y)
        b = design.amplitude(yp, curves)
        rest = yp - b[:, None] * curves
        slack = np.maximum(self.critical - (rest * rest).sum(-1), 0.0)
        linear = ((self.obs.y * design.root_weight)[None] - b[:, None] * raw) @ inverse.T
        centre = np.einsum("kmq,kq->km", np.broadcast_to(rows, (len(theta), *rows.shape[1:])), linear)
        centre = centre + b[:, None] * shapes
        spread = rows @ inverse
        through = np.einsum("kmn,kn->km", np.broadcast_to(spread, (len(theta), *spread.shape[1:])), raw)
        own = (shapes - through) ** 2 / np.where(power > 0, power, np.inf)[:, None]
        radius = np.sqrt(slack[:, None] * ((spread * spread).sum(-1) + own + extra))
        return (centre - radius).min(0), (centre + radius).max(0)

    def summary(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "name": self.name,
            "formula": self.formula,
            "k": self.k,
            "n": self.n,
            "dof": self.dof,
            "rss": self.rss,
            "sd": self.sd,
            "aicc": self.aicc,
            "bic": self.bic,
            "delta_aicc": self.delta_aicc,
            "params": dict(self.params),
            "intervals": {name: list(ends) for name, ends in self.intervals.items()},
            "status": self.status,
            "notes": list(self.notes),
            "eligible": self.eligible,
        }


def fit_curve(family: Family, obs: Observations, confidence: float = 0.95) -> CurveFit:
    """Fit one family with profile intervals. Never raises on data: the status says what went wrong."""
    runs, within = obs, 0.0
    if runs.n > MANY:
        obs, within, _ = runs.means
    design = family.design(obs.x, obs.root_weight, obs.blocks)
    p = design.parameters - (0 if family.amplitude else 1)
    dof = runs.n - p
    distinct = len(obs.cells)
    eligible = distinct >= family.parameters + 3 and dof >= 1 and not family.check_only
    common: dict[str, Any] = {
        "name": family.name,
        "formula": family.formula,
        "k": family.parameters,
        "n": runs.n,
        "dof": dof,
        "confidence": confidence,
        "family": family,
        "obs": obs,
    }
    absent = family.jump_at is not None and not (obs.x == family.jump_at).any()
    if distinct < family.parameters or dof < 1 or absent:
        reason = (
            f"no run at {family.jump_at:g}, so the jump has nothing to rest on"
            if absent
            else f"{distinct} distinct x and {runs.n} runs do not carry {p} parameters"
        )
        return CurveFit(
            **common,
            rss=None,
            sd=None,
            aicc=None,
            bic=None,
            params={},
            intervals={},
            status="too-few-points",
            notes=(reason,),
            eligible=False,
            theta=np.zeros(0),
            cloud=np.zeros((0, len(family.axes))),
            critical=math.inf,
        )
    theta, rss_all = design.minimum(obs.y[None])
    best, own = theta[0], float(max(rss_all[0], 0.0))
    rss = own + within
    critical, sigma2 = _critical(rss, dof, runs, confidence)
    critical -= within
    linear, b = design.coefficients(obs.y, theta)
    params, intervals, notes = {}, {}, []
    cloud = _cloud(design, obs.y, best, critical)
    gaps = False
    for j, axis in enumerate(family.axes):
        params[axis.name] = float(axis.natural(best[j]))
        if j == 0:
            low, high, gaps = interval(design, obs.y, best, own, critical)
        else:
            low, high = _hull(axis, cloud[:, j])
        intervals[axis.name] = (low, high)
        if best[j] <= axis.grid[0] or best[j] >= axis.grid[-1]:
            notes.append(
                f"bound-hit: {axis.name} = {params[axis.name]:.4g} is at the end of its search range"
            )
        elif low is None and high is None:
            notes.append(f"flat-direction: the data set no bound on {axis.name}")
    if family.amplitude and b[0] == 0:
        notes.insert(0, f"flat-direction: the best {family.amplitude} is 0, so the curve has no shape")
    if gaps:
        notes.append(
            f"several-basins: the interval of {family.axes[0].name} has gaps and is given as its hull"
        )
    fit = CurveFit(
        **common,
        rss=rss,
        sd=None if obs.known else math.sqrt(sigma2),
        **_criteria(rss, runs, p),
        params=params,
        intervals=intervals,
        status="converged",
        notes=(),
        eligible=eligible,
        theta=best,
        cloud=cloud,
        critical=critical,
    )
    names = family.nuisance_names
    for j, name in enumerate(names):
        params[name] = float(linear[0, j])
        row = np.zeros((1, 1, design.nuisance.shape[1]))
        row[0, 0, j] = 1.0
        low_, high_ = fit._envelope(row, np.zeros((len(cloud), 1)), 0.0)
        intervals[name] = (float(low_[0]), float(high_[0]))
    if family.amplitude:
        params[family.amplitude] = float(b[0])
        low_, high_ = fit._envelope(np.zeros((1, 1, design.nuisance.shape[1])), np.ones((len(cloud), 1)), 0.0)
        floor = max(float(low_[0]), 0.0) if family.positive else float(low_[0])
        intervals[family.amplitude] = (floor, float(high_[0]))
    if family.derived is not None:
        params.update(family.derived(best, float(b[0])))
    return _noted(fit, notes)


def residuals(fit: CurveFit) -> np.ndarray:
    """Loss minus fitted loss of every observation [n], effects of blocks (paired seeds) taken out."""
    design, y = fit.design, fit.obs.y
    linear, b = design.coefficients(y, fit.theta[None])
    fitted = design.nuisance @ linear[0] + b[0] * fit.family.basis(fit.theta[None], fit.obs.x)[0]
    return np.asarray(y - fitted)


def _noted(fit: CurveFit, notes: Sequence[str]) -> CurveFit:
    """The fit with `notes`; the first one names the status."""
    status = notes[0].split(":")[0] if notes else "converged"
    return dataclasses.replace(fit, notes=tuple(notes), status=status)


def _critical(rss: float, dof: int, obs: Observations, confidence: float) -> tuple[float, float]:
    """Largest RSS inside the confidence region, and sigma^2.

    With replicates whose pure-error test rejects the family at 5 %, sigma^2 is the lack-of-fit mean square
    with its own degrees of freedom: the scatter of cells about the curve, not of seeds, then limits what
    the curve can say.
    """
    if obs.known:
        return rss + quantile_f(confidence, math.inf), 1.0
    within, inner = pure_error(obs)
    outer = dof - inner
    sigma2, free = rss / dof, float(dof)
    if inner >= 1 and outer >= 1 and within > 0:
        between = max(rss - within, 0.0)
        ratio = (between / outer) / (within / inner)
        if ratio > f_quantile(outer, inner, 0.95):
            sigma2, free = between / outer, float(outer)
    return rss + sigma2 * quantile_f(confidence, free), sigma2


def _criteria(rss: float, obs: Observations, p: int) -> dict[str, Any]:
    """AICc = n ln(RSS / n) + 2 k + 2 k (k + 1) / (n - k - 1) and BIC = n ln(RSS / n) + k ln n, k the mean
    parameters.

    With a known SD the chi-squared takes the place of n ln(RSS / n). The SD is not counted (lmfit's
    convention): with ten runs, counting it (Hurvich & Tsai 1989) raises the price of a fourth parameter
    from 6 to 9 and drops true families from the union, whose coverage fell from .88 to .80 in the worst
    cell tried.
    """
    n = obs.n
    deviance = rss
    if not obs.known:
        floor = n * float(obs.weight.mean()) * (1e-10 * float(np.abs(obs.y).max())) ** 2
        deviance = n * math.log(max(rss, floor, 1e-280) / n)
    aicc = deviance + 2 * p + 2 * p * (p + 1) / (n - p - 1) if n - p > 1 else None
    return {"aicc": aicc, "bic": deviance + p * math.log(n)}


def _hull(axis: Any, values: np.ndarray) -> Interval:
    low, high = float(values.min()), float(values.max())
    bottom, top = axis.natural(low), axis.natural(high)
    unbounded_low = low <= axis.grid[0] or bottom <= axis.edge[0]
    unbounded_high = high >= axis.grid[-1] or top >= axis.edge[1]
    return None if unbounded_low else float(bottom), None if unbounded_high else float(top)


def _cloud(design: Design, y: np.ndarray, best: np.ndarray, critical: float) -> np.ndarray:
    """Theta inside the confidence region [K, d], on a grid that is refined twice over its bounding box."""
    d = len(design.axes)
    if d == 0:
        return np.zeros((1, 0))
    yp = design.weighted(y)
    points = design.grid
    inside = points[design.surface(yp)[0] <= critical]
    cell = np.array([np.diff(axis.grid).max() for axis in design.axes])
    low = np.array([axis.grid[0] for axis in design.axes])
    high = np.array([axis.grid[-1] for axis in design.axes])
    for _ in range(3):
        inside = np.concatenate([inside, best[None]])
        bottom = np.maximum(inside.min(0) - cell, low)
        top = np.minimum(inside.max(0) + cell, high)
        counts = _CLOUD[d]
        cell = (top - bottom) / (np.array(counts) - 1)
        mesh = np.meshgrid(
            *(np.linspace(a, c, m) for a, c, m in zip(bottom, top, counts, strict=True)), indexing="ij"
        )
        points = np.stack([part.ravel() for part in mesh], axis=-1)
        curves = design.curves(points)
        b = design.amplitude(yp, curves)
        rest = yp - b[:, None] * curves
        inside = points[(rest * rest).sum(-1) <= critical]
    return np.concatenate([inside, best[None]])

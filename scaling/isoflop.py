"""Iso-FLOP valleys (Hoffmann et al. 2022, approach 2): the best size at each budget, and its power law in
compute.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from scaling.allocation import budgets
from scaling.curvefit import Interval, fit_curve
from scaling.errors import ScalingError
from scaling.families import Family
from scaling.frame import (
    Excluded,
    Source,
    budget_groups,
    finished,
    merged_budgets,
    need,
    numbers,
    read,
)
from scaling.levenberg import extremes, minimise
from scaling.observations import build
from scaling.separable import Axis, quantile_f
from scaling.tails import f_cdf


@dataclass(frozen=True, kw_only=True)
class IsoValley:
    """One budget: c + b (ln x - ln x*)^2."""

    budget: float
    n: int
    optimum: float | None
    """x*, in the units of the column; None when the valley's bottom lies outside the sizes that were run."""
    interval: Interval
    """Profile-F (equal to Fieller's) interval of x*."""
    loss: float | None
    """Loss at the bottom."""
    curvature: float | None
    status: str
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**self.__dict__, "interval": list(self.interval), "notes": list(self.notes)}


@dataclass(frozen=True, kw_only=True)
class IsoFlopFit:
    """All valleys, and x*(C) = x_0 (C / C0)^exponent fitted to all runs at once."""

    column: str
    n: int
    valleys: tuple[IsoValley, ...]
    exponent: float | None
    exponent_interval: Interval
    optimum_at_mean: float | None
    """x* at `mean_budget`, the geometric mean of the budgets."""
    mean_budget: float
    lack_of_fit_p: float | None
    """F test of one power law for all bottoms against a free bottom for each."""
    status: str
    notes: tuple[str, ...]
    confidence: float
    excluded: tuple[Excluded, ...]

    def optimum(self, budget: float) -> float:
        """x* at any budget by the power law; NaN when it was not fitted."""
        if self.exponent is None or self.optimum_at_mean is None:
            return math.nan
        return self.optimum_at_mean * (budget / self.mean_budget) ** self.exponent

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "kind": "isoflop",
            **self.__dict__,
            "valleys": [valley.to_dict() for valley in self.valleys],
            "exponent_interval": list(self.exponent_interval),
            "notes": list(self.notes),
            "excluded": [item.to_dict() for item in self.excluded],
        }


def fit_isoflop(
    source: Source,
    *,
    column: str = "total_parameters",
    columns: Mapping[str, str] | None = None,
    confidence: float = 0.95,
) -> IsoFlopFit:
    """Fit a parabola in ln `column` at each budget and the power law of its bottom in compute.

    The power law is fitted to all runs together, each budget with its own level and curvature, so its
    interval (profile-F) needs no second-stage weights. It wants at least two budgets with at least four
    sizes each.
    """
    if not 0.5 <= confidence < 1:
        raise ScalingError(
            f"confidence is {confidence!r}; a level from 0.5 up to, but not including, 1 is needed."
        )
    frame = read(source, columns)
    need(frame, "budget", column)
    frame, excluded = finished(frame, ("budget", column))
    if (frame[column] <= 0).any():
        raise ScalingError(
            f"Column {column!r} must be positive, because the valley is a parabola in its logarithm."
        )
    compute = numbers(frame, "budget")
    group = budget_groups(compute)
    found = budgets(frame)
    valleys = []
    for index, budget in enumerate(found):
        part = frame.filter(pl.Series(group == index))
        valley = _valley(budget, np.log(numbers(part, column)), numbers(part, "loss"), confidence)
        joined = merged_budgets(compute[group == index])
        notes = (*valley.notes, *((f"budgets-merged: {joined}",) if joined else ()))
        valleys.append(dataclasses.replace(valley, notes=notes))
    mean = float(np.exp(np.log(found).mean()))
    common: dict[str, Any] = {
        "column": column,
        "n": frame.height,
        "valleys": tuple(valleys),
        "mean_budget": mean,
        "confidence": confidence,
        "excluded": excluded,
    }
    good = [i for i, valley in enumerate(valleys) if valley.optimum is not None]
    if len(good) < 2:
        return IsoFlopFit(
            **common,
            exponent=None,
            exponent_interval=(None, None),
            optimum_at_mean=None,
            lack_of_fit_p=None,
            status="too-few-points",
            notes=(f"{len(good)} budgets have a valley inside their sizes; a power law needs at least two",),
        )
    keep = np.isin(group, good)
    return _power_law(
        common, numbers(frame, column)[keep], numbers(frame, "loss")[keep], group[keep], found, valleys
    )


def _valley(budget: float, x: np.ndarray, loss: np.ndarray, confidence: float) -> IsoValley:
    common: dict[str, Any] = {"budget": budget, "n": len(x)}
    low, high = float(x.min()), float(x.max())
    width = max(high - low, 1e-9)
    family = Family(
        name="valley",
        formula="c + b (ln x - ln x*)^2",
        amplitude="b",
        axes=(Axis(name="x*", grid=np.linspace(low - width, high + width, 181), log=True),),
        basis=lambda theta, at: (at - theta[..., :1]) ** 2,
        slope=lambda theta, at: -2 * (at - theta[..., :1])[..., None],
    )
    fit = fit_curve(family, build(x=x, y=loss), confidence)
    if not fit.fitted or len(np.unique(x)) < 4:
        reason = fit.notes[0] if not fit.fitted else f"{len(np.unique(x))} sizes; a valley needs at least 4"
        return IsoValley(
            **common,
            optimum=None,
            interval=(None, None),
            loss=None,
            curvature=None,
            status="too-few-points",
            notes=(reason,),
        )
    bottom = float(fit.theta[0])
    inside = low <= bottom <= high and fit.params["b"] > 0
    notes = (
        ()
        if inside
        else ("vertex-outside-data: the bottom of the parabola lies outside the sizes that were run",)
    )
    return IsoValley(
        **common,
        optimum=math.exp(bottom) if inside else None,
        interval=fit.intervals["x*"],
        loss=fit.params["level"],
        curvature=fit.params["b"],
        status="converged" if inside else "vertex-outside-data",
        notes=notes,
    )


def _power_law(
    common: dict[str, Any],
    size: np.ndarray,
    loss: np.ndarray,
    group: np.ndarray,
    found: tuple[float, ...],
    valleys: list[IsoValley],
) -> IsoFlopFit:
    used, group = np.unique(group, return_inverse=True)
    scale = np.log(np.array(found)[used] / common["mean_budget"])
    bottoms = np.log([valleys[i].optimum or 1.0 for i in used])
    slope, level = np.polyfit(scale, bottoms, 1)
    count, x, one = len(used), np.log(size), np.arange(len(size))

    def model(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        c, b = theta[:, :count][:, group], theta[:, count : 2 * count][:, group]
        away = x - theta[:, -2:-1] - theta[:, -1:] * scale[group]
        jacobian = np.zeros((*away.shape, theta.shape[1]))
        jacobian[:, one, group] = 1.0
        jacobian[:, one, count + group] = away**2
        jacobian[:, :, -2] = -2 * b * away
        jacobian[:, :, -1] = -2 * b * away * scale[group]
        return c + b * away**2 - loss, jacobian

    start = (
        [valleys[i].loss or 0.0 for i in used] + [valleys[i].curvature or 0.0 for i in used] + [level, slope]
    )
    best = minimise(model, np.array([start]))
    theta, rss = best.theta[0], float(best.rss[0])
    dof = len(loss) - len(theta)
    critical = rss + rss / dof * quantile_f(common["confidence"], dof) if dof > 0 else math.inf
    ends = extremes(model, theta, rss, critical, lambda at: at[:, -1])
    free = 0.0
    for index in range(count):
        rows = group == index
        parabola = np.polynomial.polynomial.polyfit(x[rows] - x.mean(), loss[rows], 2)
        free += float(
            ((np.polynomial.polynomial.polyval(x[rows] - x.mean(), parabola) - loss[rows]) ** 2).sum()
        )
    lack = None
    inner = len(loss) - 3 * count
    if count > 2 and inner > 0 and free > 0:
        lack = 1 - f_cdf(count - 2, inner, max(rss - free, 0.0) / (count - 2) / (free / inner))
    notes = [] if best.converged[0] else [f"not-converged: gradient {best.gradient[0]:.1e}"]
    if count == 2:
        notes.append("two budgets: the power law passes through both bottoms and cannot be checked")
    return IsoFlopFit(
        **common,
        exponent=float(theta[-1]),
        exponent_interval=ends,
        optimum_at_mean=float(np.exp(theta[-2])),
        lack_of_fit_p=lack,
        status="converged" if best.converged[0] else "not-converged",
        notes=tuple(notes),
    )

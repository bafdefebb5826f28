"""How much runs scatter about whatever curve is true, and how well that is known."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from scaling.curvefit import CurveFit, fit_curve
from scaling.families import Family, no_slope
from scaling.observations import Observations, build, pure_error
from scaling.tails import f_cdf

PURE_ERROR_DOF = 8
"""Fewest degrees of freedom between seeds at which replicates say how much runs scatter."""
FEW = 6
"""Below this many distinct x no curve but the constant and parabolas is tried."""
PARABOLA = Family(
    name="parabola of either sign",
    formula="c + b1 x + b2 x^2",
    amplitude="b2",
    basis=lambda theta, x: np.broadcast_to(x**2, (*theta.shape[:-1], len(x))).copy(),
    slope=no_slope,
    positive=False,
    extra=(("b1", lambda x: x),),
)


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """What the tests take as the scatter of runs."""

    variance: float
    """Of an observation of weight 1; 0 when there is nothing to take it from."""
    dof: float
    """Degrees of freedom of `variance`, infinite when it is known."""
    source: str
    about: str = ""
    """The family whose residuals it comes from; empty when it is known or comes from replicates."""


@dataclass(frozen=True, kw_only=True)
class Replicates:
    """How runs of one x differ from each other, without any curve."""

    widest: float
    """Largest difference of two runs of one x, nats."""
    means: float
    """Largest difference between the mean losses of two x, nats."""
    sd: float | None
    """SD of one run within cells, block effects taken out, nats; None without degrees of freedom."""
    dof: int
    pairing_p: float | None
    """p of "blocks (paired seeds) share no level", an F test within cells; None without blocks."""


def replicates(obs: Observations) -> Replicates | None:
    """Return how runs of one x differ; None where no x has two runs."""
    cell = np.unique(obs.x, return_inverse=True)[1]
    if int(np.bincount(cell).max()) < 2:
        return None
    runs = [obs.y[cell == number] for number in range(int(cell.max()) + 1)]
    mean = np.bincount(cell, obs.weight * obs.y) / np.bincount(cell, obs.weight)
    within, inner = pure_error(obs)
    p = None
    if obs.block_name and inner and within > 0:
        apart, outer = pure_error(build(x=obs.x, y=obs.y, weight=obs.weight))
        ratio = (apart - within) / (outer - inner) / (within / inner)
        p = 1 - f_cdf(outer - inner, inner, max(ratio, 0.0))
    return Replicates(
        widest=max(float(np.ptp(losses)) for losses in runs),
        means=float(np.ptp(mean)),
        sd=math.sqrt(within / inner / float(np.median(obs.weight))) if inner else None,
        dof=inner,
        pairing_p=p,
    )


def scatter_of(obs: Observations, fits: Iterable[CurveFit]) -> Scatter:
    """The known SD, that of replicates, or that of the residuals of the closest of `fits`.

    The closest has the least residual variance per degree of freedom. AICc would charge a fourth parameter so
    much at seven or eight points that the misfit of a parabola passed for scatter and hid a U. A parabola of
    either sign always competes, so that a hill is not judged by its distance from a constant.
    """
    if obs.known:
        return Scatter(variance=1.0, dof=math.inf, source="column loss_sd")
    within, inner = pure_error(obs)
    if inner >= PURE_ERROR_DOF and within > 0:
        source = f"replicates ({inner} degrees of freedom)"
        return Scatter(variance=within / inner, dof=float(inner), source=source)
    few = len(obs.cells) < FEW
    candidates = [
        (m.rss / m.dof, m.dof, m.name)
        for m in (*fits, fit_curve(PARABOLA, obs))
        if m.rss is not None and m.aicc is not None and m.dof >= 2
        if m.eligible or (few and m.k <= PARABOLA.parameters)
    ]
    if not candidates:
        return Scatter(variance=0.0, dof=0.0, source="nothing")
    variance, dof, name = min(candidates)
    floor = float(obs.weight.mean()) * (1e-12 * max(1.0, float(np.abs(obs.y).max()))) ** 2
    variance = 0.0 if obs.flat else max(variance, floor)
    return Scatter(variance=variance, dof=float(dof), source=f"residuals of {name}", about=name)

"""What a memory sweep allows to be said: any effect at all, its direction, and whether it is a power law."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import chdtrc, fdtrc

from scaling.curvefit import CurveFit, Interval, fit_curve, residuals
from scaling.families import CONSTANT
from scaling.observations import Observations, pure_error
from scaling.scatter import PURE_ERROR_DOF, scatter_of
from scaling.ushape import SIZE, UShape, judge

DRAWS = 999
TURNS = {
    "U-shaped": "loss falls and then rises as memory grows",
    "inverted-U": "loss rises and then falls as memory grows",
    "neither": "loss goes up and down as memory grows by more than runs scatter",
}


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """What the tests and the profile interval of alpha in c - b z_alpha(M/M_ref) allow to be said."""

    verdict: str
    """"power law" (alpha > 0), "log-linear not excluded", "faster than logarithmic" (alpha < 0), "memory
    hurts" (loss rises with memory), "neither" (an effect that neither a straight line nor a power law
    describes), "no effect of memory seen" or "undetermined".
    """
    alpha: float | None
    interval: Interval
    p_effect: float | None
    """p of "loss does not depend on memory", against every curve; see `refused_p`."""
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**self.__dict__, "interval": list(self.interval)}


def refused_p(base: CurveFit, models: Sequence[CurveFit], seed: int = 0) -> float:
    """p of "the curve `base` describes the losses".

    With known SDs or replicates by the chi-squared or F test against a free mean at every size, which sees a
    curve of any shape. Otherwise by the largest gain in AICc of any of `models` over it, against draws about
    it, so that the search through families and breaks is paid for.
    """
    assert base.rss is not None
    obs = base.obs
    within, inner = pure_error(obs)
    between, outer = max(base.rss - within, 0.0), base.dof - inner
    if obs.known:
        return float(chdtrc(outer, between))
    if inner >= PURE_ERROR_DOF and within > 0:
        return float(fdtrc(outer, inner, between / outer / (within / inner)))
    noise = np.random.default_rng(seed).standard_normal((DRAWS, obs.n)) / obs.root_weight
    mean = obs.y - residuals(base)
    y = np.concatenate([obs.y[None], mean + math.sqrt(base.rss / base.dof) * noise])
    own = np.maximum(base.design.minimum(y)[1], 1e-300)
    gains = []
    for model in models:
        design, n, p = model.design, obs.n, model.design.parameters
        rss = np.maximum(design.surface(design.weighted(y)).min(1), 1e-12 * own)
        gains.append(-n * np.log(rss / own) - 2 * p - 2 * p * (p + 1) / (n - p - 1))
    best = np.max(gains, axis=0)
    return (1 + int((best[1:] >= best[0] - 1e-9).sum())) / (DRAWS + 1)


def power_law(obs: Observations, models: Sequence[Any]) -> PowerLaw:
    """The verdict on runs with memory `obs`, from `MemoryModel`s."""
    curve = next(m for m in models if m.name == "box-cox")
    line = next(m for m in models if m.name == "log-linear")
    if obs.flat:
        return _undetermined("all losses are equal")
    if not curve.fitted or not line.fitted:
        return _undetermined((line if not line.fitted else curve).notes[0])
    ends: Interval = curve.intervals["alpha"]
    if not curve.eligible:
        sizes = len(curve.obs.cells)
        return _undetermined(
            f"{sizes} distinct sizes; {curve.k + 3} are needed before an exponent may be claimed", ends
        )
    able = [m for m in models if m.eligible and m.scope == "M > 0" and m.aicc is not None]
    p = refused_p(fit_curve(CONSTANT, curve.obs), able)
    said: dict[str, Any] = {"alpha": None, "interval": ends, "p_effect": p}
    if p > SIZE:
        reason = f"that loss does not depend on memory is not rejected (p = {p:.2g})"
        return PowerLaw(**said, verdict="no effect of memory seen", reason=reason)
    shape = _shape(obs, able)
    if shape.verdict in TURNS:
        reason = f"{TURNS[shape.verdict]} (p = {_deciding(shape):.2g})"
        return PowerLaw(**said, verdict="neither", reason=reason)
    fits = refused_p(curve, able)
    if fits <= SIZE:
        best = min(able, key=lambda m: m.aicc)
        reason = f"the Box-Cox curve, which holds both, is refused (p = {fits:.2g}); {best.name} fits best"
        return PowerLaw(**said, verdict="neither", reason=reason)
    return _by_exponent(curve, line, shape, said)


def _by_exponent(curve: CurveFit, line: CurveFit, shape: UShape, said: dict[str, Any]) -> PowerLaw:
    """The verdict on a curve that Box-Cox describes."""
    low, high = said["interval"]
    slope = line.intervals["b"]
    if shape.verdict == "monotone rising" or (slope[1] is not None and slope[1] < 0):
        top = math.inf if slope[0] is None else -slope[0]
        bottom = -math.inf if slope[1] is None else -slope[1]
        reason = f"by {bottom:.2g} to {top:.2g} nats for each factor e of memory on average"
        return PowerLaw(**said, verdict="memory hurts", reason=reason)
    if curve.params["b"] <= 0:
        reason = "loss depends on memory, but in which direction is not settled"
        return PowerLaw(**said, verdict="undetermined", reason=reason)
    if low is None and high is None:
        return PowerLaw(**said, verdict="undetermined", reason="the data set no bound on alpha")
    said |= {"alpha": curve.params["alpha"]}
    if low is not None and low > 0:
        return PowerLaw(**said, verdict="power law", reason="the interval of alpha lies above 0")
    if high is not None and high < 0:
        reason = "the interval of alpha lies below 0: the gain per decade grows"
        return PowerLaw(**said, verdict="faster than logarithmic", reason=reason)
    return PowerLaw(**said, verdict="log-linear not excluded", reason="the interval of alpha holds 0")


def _shape(obs: Observations, able: Sequence[CurveFit]) -> UShape:
    """The shape of loss against ln M."""
    logs = dataclasses.replace(obs, x=np.log(obs.x))
    return judge(logs, scatter_of(logs, [*able, fit_curve(CONSTANT, obs)]))


def _deciding(shape: UShape) -> float:
    found = {"U-shaped": shape.p_value, "inverted-U": shape.p_inverted, "neither": shape.p_valley_fit}
    return found[shape.verdict] or 0.0


def _undetermined(reason: str, ends: Interval = (None, None)) -> PowerLaw:
    return PowerLaw(verdict="undetermined", alpha=None, interval=ends, p_effect=None, reason=reason)

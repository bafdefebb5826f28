"""Is the curve a U? Tests for a fall followed by a rise, and the words they allow.

The verdict rests on a parametric bootstrap of monotone against valley-shaped regression, once in each
direction (isotonic likelihood ratio: Robertson, Wright & Dykstra 1988; p of an intersection-union test is
the larger one). The statistic is (RSS_monotone - RSS_valley) / s^2. Under the null, losses are drawn about
the fitted monotone curve, and s^2 is drawn as chi-squared with its own degrees of freedom, so that few runs
are paid for as in an F test. Turned upside down the same test finds a hill.

A test against a valley takes a valley for granted, so every word also needs that its own shape is not
refused: RSS_shape / s^2 against draws about the fitted shape. Where the valley and the hill are both
refused, the curve is neither. "Flat" needs a scatter that is known from elsewhere than the residuals: any
curve is flat compared with its own deviations.

The slope test (Lind & Mehlum 2010) and the two-lines test (Simonsohn 2018) are printed beside it because
readers ask for them. They decide nothing here: the first rejects on saturating monotone curves 45 to 100 %
of the time, the second needs about thirty points.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from scaling.observations import Observations
from scaling.scatter import Scatter
from scaling.separable import quantile_t
from scaling.tails import t_cdf
from scaling.unimodal import antitonic, isotonic, valley, valley_fit

DRAWS = 1999
"""Bootstrap draws: the standard error of p = .05 is then .005."""
SIZE = 0.05
CELLS = 64
"""Most positions the test works on; neighbouring ones are merged beyond that."""
METHOD = "isotonic-versus-valley parametric bootstrap"


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """Difference of two mean losses in nats, with its t interval."""

    name: str
    estimate: float
    interval: tuple[float | None, float | None]
    p_value: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "name": self.name,
            "estimate": self.estimate,
            "interval": list(self.interval),
            "p_value": self.p_value,
        }


@dataclass(frozen=True, kw_only=True)
class UShape:
    """What the data say about the shape, in words that a test stands behind."""

    verdict: str
    """"U-shaped", "inverted-U", "monotone falling", "monotone rising", "neither" (no curve with one turn
    fits), "flat" or "undetermined".
    """
    p_value: float | None
    """The larger of the two directional p values; small for a U."""
    method: str
    p_no_rise: float | None
    """p of "the loss never rises with rho" against a valley; small when the right arm is real."""
    p_no_fall: float | None
    """p of "the loss never falls with rho" against a valley; small when the left arm is real."""
    p_inverted: float | None
    """The larger of the two directional p values against a hill; small for an inverted U."""
    p_monotone_fit: float | None
    """p of "the curve is monotone", the better direction, against any differences between rho."""
    p_valley_fit: float | None
    """p of "the curve falls, then rises" (either arm may be absent) against any differences."""
    p_hill_fit: float | None
    """p of "the curve rises, then falls" against any differences."""
    p_flat: float | None
    """p of "the loss does not depend on rho" (F test between cells); None when the scatter is known only
    from the residuals of the constant.
    """
    sd: float | None
    """SD of one run in nats that the tests use, from `sd_source`."""
    sd_source: str
    contrasts: tuple[Contrast, ...]
    slope_p: float | None
    """Lind-Mehlum slope test on the quadratic; see the caveat above."""
    two_lines_p: float | None
    """Simonsohn's two-lines test; see the caveat above."""
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = {name: value for name, value in self.__dict__.items() if name != "contrasts"}
        return {**plain, "contrasts": [contrast.to_dict() for contrast in self.contrasts]}


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Mean loss by position, with precision weights (1 / variance in units of s^2)."""

    x: np.ndarray
    y: np.ndarray
    weight: np.ndarray


def cells(obs: Observations) -> Cells:
    """Weighted means of equal x after removing block effects, merged to at most `CELLS` positions."""
    obs = obs.means[0]
    x, group = np.unique(obs.x, return_inverse=True)
    y = obs.y
    if obs.block_name:
        indicator = (group[:, None] == np.arange(len(x))[None, :]).astype(float)
        design = np.concatenate([indicator, obs.blocks], axis=1)
        effects = np.linalg.lstsq(design * obs.root_weight[:, None], y * obs.root_weight, rcond=None)[0]
        y = y - obs.blocks @ effects[len(x) :]
    if len(x) > CELLS:
        group = group * CELLS // len(x)
    weight = np.bincount(group, obs.weight)
    mean = np.bincount(group, obs.weight * y) / weight
    place = np.bincount(group, obs.weight * obs.x) / weight
    return Cells(x=place, y=mean, weight=weight)


def directional_p(
    y: np.ndarray,
    weight: np.ndarray,
    sd2: np.ndarray | float,
    dof: float,
    rng: np.random.Generator,
    draws: int = DRAWS,
) -> tuple[np.ndarray, np.ndarray]:
    """p of "never rises" and of "never falls" [S]; means y [S, n] have variance sd2 [S] / weight [n]."""
    sets, n = y.shape
    variance = np.broadcast_to(np.asarray(sd2, dtype=float), (sets,))
    found = np.empty((2, sets))
    step = max(1, 20_000 // draws)
    for first in range(0, sets, step):
        part, s2 = y[first : first + step], variance[first : first + step]
        count = len(part)
        bent = valley(part, weight)[0]
        noise = rng.standard_normal((count, draws, n)) * np.sqrt(s2[:, None, None] / weight)
        scale = rng.chisquare(dof, (count, draws)) / dof if math.isfinite(dof) else np.ones((count, draws))
        for which, monotone in enumerate((antitonic, isotonic)):
            fit, prefix = monotone(part, weight)
            observed = (prefix[:, -1] - bent) / s2
            drawn = (fit[:, None] + noise).reshape(-1, n)
            gap = (monotone(drawn, weight)[1][:, -1] - valley(drawn, weight)[0]).reshape(count, draws)
            null = gap / (s2[:, None] * scale)
            reached = null >= (observed - 1e-9 * np.maximum(observed, 1.0))[:, None]
            found[which, first : first + step] = (1 + reached.sum(1)) / (draws + 1)
    return found[0], found[1]


def turn_bounds(obs: Observations, scatter: Scatter, *, seed: int = 0) -> tuple[float | None, float | None]:
    """Where a valley through the mean losses turns: a bound for its bottom on either side, without a formula.

    A bottom at x_j or beyond means a curve that falls through x_1 ... x_j. That is tested from the last
    position inwards until it is not refused, each at `SIZE`: the hypotheses are nested, so the bound errs in
    `SIZE` of the tables at most. An end is None where not even the whole curve is refused.
    """
    data = cells(obs)
    n = len(data.x)
    ends: list[float | None] = []
    for which in (1, 0):
        bound = None
        for length in range(n, 1, -1):
            part = slice(0, length) if which == 0 else slice(n - length, n)
            rng = np.random.default_rng((seed, which, length))
            y, weight = data.y[None, part], data.weight[part]
            if directional_p(y, weight, scatter.variance, scatter.dof, rng)[which][0] > SIZE:
                break
            bound = float(data.x[part][-1 if which == 0 else 0])
        ends.append(bound)
    return ends[0], ends[1]


def fit_p(
    y: np.ndarray,
    fit: np.ndarray,
    weight: np.ndarray,
    scatter: Scatter,
    rss: Callable[[np.ndarray], np.ndarray],
    rng: np.random.Generator,
) -> float:
    """p of "the means y [n] have the shape that `fit` [n] has"; rss maps means [S, n] to the least RSS [S]
    of that shape.
    """
    noise = rng.standard_normal((DRAWS, len(y))) * np.sqrt(scatter.variance / weight)
    null = rss(fit + noise) / _scale(scatter.dof, DRAWS, rng)
    observed = float(rss(y[None])[0])
    return (1 + int((null >= observed * (1 - 1e-9)).sum())) / (DRAWS + 1)


def _scale(dof: float, draws: int, rng: np.random.Generator) -> np.ndarray:
    return rng.chisquare(dof, draws) / dof if math.isfinite(dof) else np.ones(draws)


def two_lines_p(obs: Observations, at: float) -> float | None:
    """Larger one-sided p of "falls left of `at`" and "rises right of it", each from a straight line with
    HC3 errors.
    """
    sides = []
    for keep, sign in ((obs.x <= at, -1.0), (obs.x >= at, 1.0)):
        x, y, w = obs.x[keep], obs.y[keep], obs.root_weight[keep]
        if len(np.unique(x)) < 3:
            return None
        design = np.stack([np.ones_like(x), x - x.mean()], axis=1) * w[:, None]
        inverse = np.linalg.inv(design.T @ design)
        coefficient = inverse @ (design.T @ (y * w))
        rest = y * w - design @ coefficient
        lever = np.clip(np.einsum("ni,ij,nj->n", design, inverse, design), 0.0, 1 - 1e-9)
        meat = design.T @ (design * (rest / (1 - lever))[:, None] ** 2)
        error = math.sqrt(max((inverse @ meat @ inverse)[1, 1], 1e-300))
        sides.append(t_cdf(len(x) - 2, -sign * float(coefficient[1]) / error))
    return max(sides)


def slope_p(obs: Observations) -> float | None:
    """Lind-Mehlum: larger one-sided p of a negative slope at the left end and a positive one at the right."""
    q = obs.blocks.shape[1]
    design = np.concatenate([np.stack([np.ones(obs.n), obs.x, obs.x**2], axis=1), obs.blocks], axis=1)
    design = design * obs.root_weight[:, None]
    dof = obs.n - 3 - q
    if dof < 1 or len(obs.cells) < 4:
        return None
    inverse = np.linalg.pinv(design.T @ design)
    y = obs.y * obs.root_weight
    coefficient = inverse @ (design.T @ y)
    sd2 = 1.0 if obs.known else float(((y - design @ coefficient) ** 2).sum()) / dof
    values = []
    for x, sign in ((obs.x.min(), -1.0), (obs.x.max(), 1.0)):
        row = np.zeros(3 + q)
        row[1:3] = 1.0, 2 * x
        error = math.sqrt(max(sd2 * float(row @ inverse @ row), 1e-300))
        t = sign * float(row @ coefficient) / error
        values.append(t_cdf(math.inf if obs.known else dof, -t))
    return max(values)


def judge(obs: Observations, scatter: Scatter, *, seed: int = 0, confidence: float = 0.95) -> UShape:
    """The verdict for one curve."""
    data = cells(obs)
    unit = float(np.median(obs.weight))
    known = scatter.variance > 0
    fields: dict[str, Any] = {
        "method": METHOD,
        "sd": math.sqrt(scatter.variance / unit) if known else None,
        "sd_source": scatter.source,
        "slope_p": slope_p(obs),
    }
    if len(data.x) < 4 or scatter.dof < 1 or not known:
        tests = ("p_value", "p_no_rise", "p_no_fall", "p_inverted", "p_flat", "two_lines_p")
        fits = ("p_monotone_fit", "p_valley_fit", "p_hill_fit")
        reason = (
            f"{len(data.x)} distinct rho are too few for a shape; at least 4 are needed"
            if len(data.x) < 4
            else "all losses are equal, which says nothing on how much they scatter"
            if obs.flat
            else "no degrees of freedom are left to estimate the scatter of runs"
        )
        nothing: dict[str, Any] = dict.fromkeys((*tests, *fits))
        return UShape(**fields, **nothing, verdict="undetermined", contrasts=(), reason=reason)
    y, weight, variance, dof = data.y, data.weight, scatter.variance, scatter.dof
    rng = np.random.default_rng(seed)
    no_rise, no_fall = (float(p[0]) for p in directional_p(y[None], weight, variance, dof, rng))
    # upside down a rise is a fall
    hill_no_fall, hill_no_rise = (float(p[0]) for p in directional_p(-y[None], weight, variance, dof, rng))
    falling, rising = (
        fit_p(
            turn * y,
            isotonic(turn * y, weight)[0][0],
            weight,
            scatter,
            lambda z: isotonic(z, weight)[1][:, -1],
            rng,
        )
        for turn in (-1.0, 1.0)
    )
    a_valley, a_hill = (
        fit_p(turn * y, valley_fit(turn * y, weight), weight, scatter, lambda z: valley(z, weight)[0], rng)
        for turn in (1.0, -1.0)
    )
    level = float(weight @ y / weight.sum())
    spread = float(weight @ (y - level) ** 2) / variance
    null = rng.chisquare(len(y) - 1, DRAWS) / _scale(dof, DRAWS, rng)
    flat = None
    if scatter.about != "constant":
        flat = (1 + int((null >= spread).sum())) / (DRAWS + 1)
    bottom, top = _turn(y, weight), _turn(-y, weight)
    fields |= {
        "p_value": max(no_rise, no_fall),
        "p_no_rise": no_rise,
        "p_no_fall": no_fall,
        "p_inverted": max(hill_no_rise, hill_no_fall),
        "p_monotone_fit": max(falling, rising),
        "p_valley_fit": a_valley,
        "p_hill_fit": a_hill,
        "p_flat": flat,
        "contrasts": tuple(
            _contrast(name, data, end, bottom, variance, dof, confidence)
            for name, end in (("left end minus bottom", 0), ("right end minus bottom", len(y) - 1))
        ),
        "two_lines_p": two_lines_p(obs, float(data.x[bottom])),
    }
    arms = min(y[0], y[-1]) > y[bottom]
    if max(no_rise, no_fall) <= SIZE < a_valley and arms:
        words = "both 'never rises' and 'never falls' are rejected, and both ends lie above the bottom"
        return UShape(**fields, verdict="U-shaped", reason=words)
    if max(hill_no_rise, hill_no_fall) <= SIZE < a_hill and max(y[0], y[-1]) < y[top]:
        words = "loss rises and then falls: the lowest loss is at an end, not between them"
        return UShape(**fields, verdict="inverted-U", reason=words)
    if max(a_valley, a_hill) <= SIZE:
        words = "no curve with one turn fits: the losses go up and down by more than runs scatter"
        return UShape(**fields, verdict="neither", reason=words)
    if no_fall <= SIZE < min(no_rise, hill_no_rise, falling):
        words = "a right arm is not shown ('never falls' is rejected, 'never rises' is not)"
        return UShape(**fields, verdict="monotone falling", reason=words)
    if no_rise <= SIZE < min(no_fall, hill_no_fall, rising):
        words = "a left arm is not shown ('never rises' is rejected, 'never falls' is not)"
        return UShape(**fields, verdict="monotone rising", reason=words)
    calm = min(no_rise, no_fall, hill_no_rise, hill_no_fall) > SIZE
    if scatter.about and calm and (flat is None or flat > SIZE):
        words = (
            f"the differences between rho are within the scatter about the {scatter.about} curve, but how"
            " much runs scatter is not known on its own: replicate seeds, or give loss_sd"
        )
        return UShape(**fields, verdict="undetermined", reason=words)
    if calm and flat is not None and flat > SIZE:
        words = "the differences between rho are within the scatter of runs; a smaller U is not excluded"
        return UShape(**fields, verdict="flat", reason=words)
    return UShape(**fields, verdict="undetermined", reason="the tests do not agree on one shape")


def _turn(y: np.ndarray, weight: np.ndarray) -> int:
    """Lowest inner position of the best valley through means y [n]; the lowest mean breaks ties."""
    inner = slice(1, len(y) - 1)
    return 1 + int(np.argmin(valley_fit(y, weight)[inner] + 1e-12 * np.abs(y[inner] - y.min())))


def _contrast(
    name: str, data: Cells, end: int, bottom: int, sd2: float, dof: float, confidence: float
) -> Contrast:
    estimate = float(data.y[end] - data.y[bottom])
    error = math.sqrt(sd2 * (1 / data.weight[end] + 1 / data.weight[bottom]))
    half = quantile_t(confidence, dof) * error
    p = 2 * t_cdf(dof, -abs(estimate) / error)
    return Contrast(name=name, estimate=estimate, interval=(estimate - half, estimate + half), p_value=p)

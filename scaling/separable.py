"""Least squares for curves with one shape: y = Z c + b h(x; theta), and what its data say about theta.

Every allocation and memory family of this package has this form: nuisance columns Z (level, jump, blocks),
one basis curve h with at most three non-linear parameters theta, and its amplitude b (sometimes b >= 0).
Given theta the rest is a linear projection, so theta is searched on a grid and polished by Gauss-Newton on
the projected residual (variable projection: Golub & Pereyra 1973, Jacobian of Kaufman 1975). All functions
take a batch of data sets that share one design, so a simulation or a bootstrap costs one matrix product.

Shapes: S data sets, n observations, G grid points, d non-linear parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from scaling.tails import chi_squared_quantile, f_quantile

CHUNK = 4_000_000
"""Largest number of float64 in one intermediate array of a batched search (32 MB)."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One non-linear parameter: its name, where it is searched and whether it is searched as a logarithm."""

    name: str
    grid: np.ndarray
    """Search points in internal units, increasing; the first and the last are the bounds."""
    log: bool = False
    """Internal units are natural logarithms of the reported value."""
    edge: tuple[float, float] = (-math.inf, math.inf)
    """Reported values at or beyond which an interval counts as unbounded."""

    def natural(self, value: np.ndarray | float) -> np.ndarray:
        """From internal to reported units."""
        return np.exp(value) if self.log else np.asarray(value, dtype=float)


Basis = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(theta [..., d], x [n]) -> [..., n]"""
Slope = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(theta [..., d], x [n]) -> [..., n, d], the derivative of the basis by theta"""


def quantile_f(confidence: float, dof: float) -> float:
    """Quantile of F(1, dof); of chi-squared(1) when dof is infinite (the SD is known)."""
    if dof <= 0:
        return math.inf
    return chi_squared_quantile(confidence) if math.isinf(dof) else f_quantile(1, dof, confidence)


def quantile_t(confidence: float, dof: float) -> float:
    """Two-sided quantile of Student's t; of the normal when dof is infinite."""
    return math.sqrt(quantile_f(confidence, dof))


@dataclass(frozen=True)
class Design:
    """One family on one set of observations: everything that does not depend on the losses."""

    basis: Basis
    slope: Slope
    axes: tuple[Axis, ...]
    x: np.ndarray
    """Where the observations are [n]."""
    nuisance: np.ndarray
    """Columns with free coefficients [n, q]; the first is the level."""
    root_weight: np.ndarray
    """Square roots of the precision weights [n]."""
    positive: bool = True
    """Whether the amplitude b is kept at or above zero."""
    cache: dict[str, np.ndarray] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def orthonormal(self) -> np.ndarray:
        """Orthonormal basis of the weighted nuisance columns [n, rank]."""
        left, size, _ = np.linalg.svd(self.nuisance * self.root_weight[:, None], full_matrices=False)
        return left[:, size > 1e-10 * size[0]]

    @property
    def parameters(self) -> int:
        """Number of free mean parameters: nuisance, amplitude and theta."""
        return self.orthonormal.shape[1] + 1 + len(self.axes)

    def project(self, values: np.ndarray) -> np.ndarray:
        """Remove the nuisance columns from weighted values [..., n]."""
        return values - (values @ self.orthonormal) @ self.orthonormal.T

    def curves(self, theta: np.ndarray) -> np.ndarray:
        """Weighted basis curves without their nuisance part, theta [..., d] -> [..., n]."""
        raw = self.basis(theta, self.x) * self.root_weight
        bare = self.project(raw)
        size = np.sqrt((raw * raw).sum(-1, keepdims=True))
        small = np.sqrt((bare * bare).sum(-1, keepdims=True)) <= 1e-9 * size
        return np.where(small, 0.0, bare)

    @cached_property
    def grid(self) -> np.ndarray:
        """The product grid [G, d]; the first axis varies slowest."""
        if not self.axes:
            return np.zeros((1, 0))
        mesh = np.meshgrid(*(axis.grid for axis in self.axes), indexing="ij")
        return np.stack([part.ravel() for part in mesh], axis=-1)

    @cached_property
    def units(self) -> np.ndarray:
        """Unit vectors of the projected curves on the grid [G, n]; zero where a curve is all nuisance."""
        curves = self.curves(self.grid)
        size = np.sqrt((curves * curves).sum(-1, keepdims=True))
        return curves / np.where(size > 0, size, 1.0)

    def weighted(self, y: np.ndarray) -> np.ndarray:
        """Losses [S, n] to weighted losses without their nuisance part [S, n]."""
        return self.project(np.atleast_2d(y) * self.root_weight)

    def amplitude(self, yp: np.ndarray, curves: np.ndarray) -> np.ndarray:
        """Best b for projected losses and curves of equal shape [..., n] -> [...]."""
        power = (curves * curves).sum(-1)
        b = (yp * curves).sum(-1) / np.where(power > 0, power, 1.0)
        return np.maximum(b, 0.0) if self.positive else b

    def surface(self, yp: np.ndarray) -> np.ndarray:
        """Residual sums of squares on the grid [S, G] for projected losses [S, n]."""
        fit = yp @ self.units.T
        if self.positive:
            np.maximum(fit, 0.0, out=fit)
        return (yp * yp).sum(-1, keepdims=True) - fit * fit

    def polish(
        self, yp: np.ndarray, theta: np.ndarray, free: tuple[bool, ...] | None = None, iterations: int = 60
    ) -> tuple[np.ndarray, np.ndarray]:
        """Gauss-Newton with Levenberg damping on the projected residual, kept within the bounds.

        yp [S, n], theta [S, d]; `free` marks the parameters that may move. Returns theta [S, d] and RSS [S].
        """
        theta = theta.copy()
        rss, curves, b = self._state(yp, theta)
        moving = [j for j, on in enumerate(free or (True,) * len(self.axes)) if on]
        if not moving or len(theta) == 0:
            return theta, rss
        low = np.array([self.axes[j].grid[0] for j in moving])
        high = np.array([self.axes[j].grid[-1] for j in moving])
        damping = np.full(len(theta), 1e-3)
        active = np.arange(len(theta))
        quiet = np.zeros(len(theta), dtype=int)
        eye = np.eye(len(moving))
        for _ in range(iterations):
            now, h, amp, loss = theta[active], curves[active], b[active], rss[active]
            residual = yp[active] - amp[:, None] * h
            # one row a moving parameter, so that the sums run along the observations: [m, S, n]
            slope = self.project(np.moveaxis(self.slope(now, self.x), -1, 0)[moving] * self.root_weight)
            power = (h * h).sum(-1)
            along = (h * slope).sum(-1) / np.where(power > 0, power, 1.0)
            jacobian = amp[:, None] * (slope - h * along[..., None])
            gradient = (jacobian * residual).sum(-1).T
            here = now[:, moving]
            held = ((here <= low) & (gradient < 0)) | ((here >= high) & (gradient > 0))
            if held.any():
                gradient = np.where(held, 0.0, gradient)
                jacobian = np.where(held.T[..., None], 0.0, jacobian)
            if len(moving) == 1:
                scale = (jacobian[0] * jacobian[0]).sum(-1)[:, None] + 1e-300
                step = gradient / (scale * (1 + damping[active, None]))
            else:
                hessian = np.einsum("asn,bsn->sab", jacobian, jacobian)
                scale = np.einsum("saa->sa", hessian)
                scale = np.maximum(scale, 1e-12 * scale.max(-1, keepdims=True)) + 1e-300
                shift = damping[active, None, None] * eye * scale[:, None, :]
                step = np.linalg.solve(hessian + shift, gradient[..., None])[..., 0]
            trial = now.copy()
            trial[:, moving] = np.minimum(np.maximum(here + step, low), high)
            rss_new, h_new, amp_new = self._state(yp[active], trial)
            better = rss_new < loss
            gain = np.where(better, loss - rss_new, 0.0)
            won = active[better]
            theta[won], rss[won], curves[won], b[won] = (
                trial[better],
                rss_new[better],
                h_new[better],
                amp_new[better],
            )
            factor = np.where(better, 0.125, 6.0)
            damping[active] = np.minimum(np.maximum(damping[active] * factor, 1e-12), 1e12)
            # an accepted step that gains next to nothing, or several refused ones, end the search
            quiet[active] = np.where(gain > 1e-9 * loss, 0, quiet[active] + np.where(better, 5, 1))
            active = active[(quiet[active] < 5) & ((gradient * step).sum(-1) > 1e-13 * loss)]
            if len(active) == 0:
                break
        return theta, rss

    def minimum(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Best theta [S, d] and its RSS [S] for losses [S, n]: grid, then polish."""
        yp = self.weighted(y)
        theta = np.empty((len(yp), len(self.axes)))
        for part in self._parts(len(yp), len(self.grid)):
            theta[part] = self.grid[np.argmin(self.surface(yp[part]), axis=1)]
        return self.polish(yp, theta)

    def profile(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """RSS with the first axis held at each of its grid points: (RSS [S, G1], theta [S, G1, d])."""
        yp = self.weighted(y)
        first = len(self.axes[0].grid)
        rss = np.empty((len(yp), first))
        theta = np.empty((len(yp), first, len(self.axes)))
        grid = self.grid.reshape(first, -1, len(self.axes))
        for part in self._parts(len(yp), max(len(self.grid), first * len(self.x) * (len(self.axes) + 2))):
            raw = self.surface(yp[part]).reshape(-1, first, grid.shape[1])
            best = raw.argmin(-1)
            theta[part] = grid[np.arange(first), best]
            rss[part] = np.take_along_axis(raw, best[..., None], -1)[..., 0]
            if len(self.axes) > 1:
                theta[part], rss[part] = self.at(yp[part], theta[part])
        return rss, theta

    def at(self, yp: np.ndarray, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Polish all but the first parameter: yp [S, n], theta [S, K, d] -> theta, RSS [S, K]."""
        rows, count, d = theta.shape
        flat = np.repeat(yp, count, axis=0)
        free = (False,) + (True,) * (d - 1)
        polished, rss = self.polish(flat, theta.reshape(-1, d), free, iterations=40)
        return polished.reshape(theta.shape), rss.reshape(rows, count)

    def coefficients(self, y: np.ndarray, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Nuisance coefficients [S, q] and amplitudes [S] at theta [S, d] for losses [S, n]."""
        y = np.atleast_2d(y)
        b = self.amplitude(self.weighted(y), self.curves(theta))
        rest = (y - b[:, None] * self.basis(theta, self.x)) * self.root_weight
        inverse = np.linalg.pinv(self.nuisance * self.root_weight[:, None], rcond=1e-10)
        return rest @ inverse.T, b

    def _state(self, yp: np.ndarray, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        curves = self.curves(theta)
        b = self.amplitude(yp, curves)
        residual = yp - b[..., None] * curves
        return (residual * residual).sum(-1), curves, b

    def _parts(self, rows: int, width: int) -> list[slice]:
        size = max(1, CHUNK // max(width, 1))
        return [slice(start, start + size) for start in range(0, rows, size)]


def interval(
    design: Design, y: np.ndarray, best: np.ndarray, rss: float, critical: float
) -> tuple[float | None, float | None, bool]:
    """Set of the first parameter whose profile RSS stays at or below `critical`: its hull, and whether it
    has gaps.

    y [n], best [d] the estimate. The end is None where the set reaches the end of the search range or the
    axis's `edge`. Reported units. Ends are where the root of the excess RSS is within 1e-6 of its critical
    value.
    """
    axis = design.axes[0]
    curve, inner = design.profile(y[None])
    where = np.searchsorted(axis.grid, best[0])
    grid = np.insert(axis.grid, where, best[0])
    values = np.insert(curve[0], where, rss)
    theta = np.insert(inner[0], where, best, axis=0)
    accepted = values <= critical
    ends = np.flatnonzero(accepted)
    if len(ends) == 0:
        return None, None, False
    first, last = int(ends[0]), int(ends[-1])
    gaps = bool((~accepted[first : last + 1]).any())
    outer = np.array([grid[max(first - 1, 0)], grid[min(last + 1, len(grid) - 1)]])
    inside = np.array([grid[first], grid[last]])
    start = np.stack([theta[first], theta[last]])
    found = _crossings(design, design.weighted(y), outer, inside, start, rss, critical)
    low = None if first == 0 else float(axis.natural(found[0]))
    high = None if last == len(grid) - 1 else float(axis.natural(found[1]))
    low = None if low is not None and low <= axis.edge[0] else low
    high = None if high is not None and high >= axis.edge[1] else high
    return low, high, gaps


def _crossings(
    design: Design,
    yp: np.ndarray,
    outer: np.ndarray,
    inner: np.ndarray,
    theta: np.ndarray,
    floor: float,
    critical: float,
) -> np.ndarray:
    """Where the profile crosses `critical` between accepted `inner` [2] and refused `outer` [2].

    Chords of the root of RSS - floor, which is nearly straight where RSS is nearly a parabola, kept in
    brackets by the Illinois rule.
    """
    outer, inner, theta = outer.copy(), inner.copy(), theta.copy()
    span = design.axes[0].grid[-1] - design.axes[0].grid[0]
    goal = math.sqrt(max(critical - floor, 0.0))

    def excess(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        start = theta.copy()
        start[:, 0] = points
        polished, rss = design.at(yp, start[None])
        return np.sqrt(np.maximum(rss[0] - floor, 0.0)) - goal, polished[0]

    value_out, _ = excess(outer)
    value_in, theta = excess(inner)
    last = np.zeros(2, dtype=int)
    for _ in range(40):
        gap = value_out - value_in
        open_ = (np.abs(outer - inner) > 1e-7 * span) & (gap > 0) & (value_out > 0)
        if not open_.any():
            break
        share = np.where(gap > 0, -value_in / np.where(gap > 0, gap, 1.0), 0.5)
        points = np.where(open_, inner + np.clip(share, 1e-3, 1 - 1e-3) * (outer - inner), inner)
        value, polished = excess(points)
        if (~open_ | (np.abs(value) <= 1e-6 * goal)).all():
            return np.where(open_, points, inner)
        inside = open_ & (value <= 0)
        beyond = open_ & (value > 0)
        theta[inside] = polished[inside]
        # an end that stays twice in a row loses half its weight
        value_out = np.where(inside & (last == 1), value_out / 2, value_out)
        value_in = np.where(beyond & (last == -1), value_in / 2, value_in)
        last = np.where(inside, 1, -1)
        inner, value_in = np.where(inside, points, inner), np.where(inside, value, value_in)
        outer, value_out = np.where(beyond, points, outer), np.where(beyond, value, value_out)
    return inner

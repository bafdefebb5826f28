"""Before the runs: what a planned sweep will be able to say.

Power is by simulation from a stated truth and the profile-F interval of the log + saturating-log family.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scaling.allocation import AllocationFit
from scaling.allocation_families import FLOOR, allocation_families
from scaling.errors import ScalingError
from scaling.families import Family
from scaling.joint_law import FORMS, JointData, curve, optimum_at
from scaling.levenberg import gradient
from scaling.observations import build
from scaling.separable import quantile_f, quantile_t
from scaling.ushape import SIZE, directional_p

SIMULATIONS = 400
"""Simulated sweeps for each plan: the standard error of a share of one half is then .025."""


@dataclass(frozen=True, kw_only=True)
class Truth:
    """The curve that a plan is tried on: log + saturating log in nats.

    The defaults have the optimum at .8, rho = 1 .007 above it and rho = .4 .013: a right arm half as high
    as the published one, so that plans err on the safe side.
    """

    optimum: float = 0.8
    m0: float = 0.1
    a: float = 0.04
    floor: float = FLOOR

    def __post_init__(self) -> None:
        if not 0 < self.optimum < 1:
            raise ScalingError(f"optimum is {self.optimum!r}; a share between 0 and 1 is needed.")
        for name in ("m0", "a", "floor"):
            if not getattr(self, name) > 0:
                raise ScalingError(f"{name} is {getattr(self, name)!r}; it must be positive.")

    @classmethod
    def from_fit(cls, fit: AllocationFit) -> Truth:
        """The log + saturating-log curve of a fit."""
        model = fit.model("log-saturating")
        if model.rho is None or model.params["a+g"] <= 0:
            raise ScalingError(
                "The fit has no log-saturating optimum inside (0, 1) to plan from; state one instead."
            )
        return cls(
            optimum=model.rho,
            m0=model.params["m0"],
            a=model.params["a"],
            floor=float(fit.held.get("r0", FLOOR)),
        )

    def __call__(self, rho: np.ndarray) -> np.ndarray:
        """Loss at rho [n] above a level of zero, nats."""
        theta = np.array([self.optimum, math.log(self.m0)])
        both = self.a * (self.m0 + 1 + self.floor) / (self.optimum + self.floor)  # a + g
        return both * _family(self.floor).basis(theta, np.asarray(rho, dtype=float))


@dataclass(frozen=True, kw_only=True)
class SweepPower:
    """What one planned sweep can be expected to say."""

    rho: tuple[float, ...]
    seeds: int
    runs: int
    median_width: float | None
    """Median width of the interval of rho*; None when half of the intervals are unbounded."""
    bounded: float
    """Share of simulated sweeps whose interval is bounded on both sides."""
    covers: float
    """Share whose interval holds the truth."""
    u_power: float | None
    """Share whose U test rejects both directions."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**self.__dict__, "rho": list(self.rho)}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plans tried, from the fewest runs on, and the first that reaches the target."""

    width: float
    sd: float
    truth: Truth
    tried: tuple[SweepPower, ...]
    chosen: SweepPower | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `cells` lists the runs of the chosen plan."""
        cells = []
        if self.chosen is not None:
            cells = [
                {"rho": rho, "seed": seed} for seed in range(self.chosen.seeds) for rho in self.chosen.rho
            ]
        return {
            "kind": "design",
            "width": self.width,
            "sd": self.sd,
            "truth": dict(self.truth.__dict__),
            "tried": [item.to_dict() for item in self.tried],
            "chosen": None if self.chosen is None else self.chosen.to_dict(),
            "cells": cells,
        }


def packed(count: int, low: float = 0.1) -> tuple[float, ...]:
    """`count` values of rho from `low` to 1, packed towards 1 where the curve is steep."""
    if count < 2:
        raise ScalingError(f"count is {count!r}; a sweep needs at least 2 values of rho.")
    return tuple(round(float(v), 4) for v in 1 - (1 - low) * np.linspace(1, 0, count) ** 2)


def sweep_power(
    rho: Sequence[float],
    *,
    seeds: int = 1,
    sd: float = 0.003,
    truth: Truth | None = None,
    simulations: int = SIMULATIONS,
    confidence: float = 0.95,
    seed: int = 0,
) -> SweepPower:
    """Simulate a sweep over `rho` with `seeds` runs each and an SD between seeds of `sd` nats."""
    truth = truth or Truth()
    cells = np.unique(np.asarray(rho, dtype=float))
    if len(cells) < 5 or cells[0] < 0 or cells[-1] > 1:
        raise ScalingError(f"rho is {list(rho)!r}; at least 5 distinct values in [0, 1] are needed.")
    if not sd > 0 or seeds < 1:
        raise ScalingError(f"sd is {sd!r} and seeds is {seeds!r}; both must be positive.")
    x = np.tile(cells, seeds)
    rng = np.random.default_rng(seed)
    y = truth(x) + sd * rng.standard_normal((simulations, len(x)))
    obs = build(x=x, y=y[0])
    design = _family(truth.floor).design(x, obs.root_weight, obs.blocks)
    dof = len(x) - design.parameters
    _, best = design.minimum(y)
    curves, _ = design.profile(y)
    critical = best * (1 + quantile_f(confidence, dof) / dof)
    grid = design.axes[0].grid
    inside = curves <= critical[:, None]
    first, last = inside.argmax(1), len(grid) - 1 - inside[:, ::-1].argmax(1)
    rows = np.arange(simulations)
    any_inside = inside.any(1)

    def edge(at: np.ndarray, out: np.ndarray) -> np.ndarray:
        gap = curves[rows, out] - curves[rows, at]
        share = np.where(gap > 0, (critical - curves[rows, at]) / np.where(gap > 0, gap, 1.0), 0.0)
        return grid[at] + np.clip(share, 0, 1) * (grid[out] - grid[at])

    low, high = edge(first, np.maximum(first - 1, 0)), edge(last, np.minimum(last + 1, len(grid) - 1))
    bounded = any_inside & (low > 0) & (high < 1)
    width = np.where(bounded | ~any_inside, np.where(any_inside, high - low, 0.0), np.inf)
    median = float(np.median(width))
    covers = (low <= truth.optimum) & (truth.optimum <= high)
    weight = np.full(len(cells), float(seeds))
    means = y.reshape(simulations, seeds, len(cells)).mean(1)
    tested = min(simulations, 100)
    p_rise, p_fall = directional_p(means[:tested], weight, best[:tested] / dof, float(dof), rng, draws=199)
    return SweepPower(
        rho=tuple(cells.tolist()),
        seeds=seeds,
        runs=len(x),
        median_width=median if math.isfinite(median) else None,
        bounded=float(bounded.mean()),
        covers=float((covers & any_inside).mean()),
        u_power=float((np.maximum(p_rise, p_fall) <= SIZE).mean()),
    )


def plan_allocation(
    width: float,
    *,
    sd: float = 0.003,
    truth: Truth | None = None,
    counts: Sequence[int] = (8, 10, 12, 16),
    seeds: Sequence[int] = (1, 2, 3, 5),
    simulations: int = SIMULATIONS,
    seed: int = 0,
) -> Plan:
    """Find the cheapest packed sweep whose interval of rho* has a median width of at most `width`."""
    if not width > 0:
        raise ScalingError(f"width is {width!r}; it must be positive.")
    truth = truth or Truth()
    tried: list[SweepPower] = []
    pairs = sorted(((c, s) for c in counts for s in seeds), key=lambda pair: pair[0] * pair[1])
    for count, many in pairs:
        tried.append(
            sweep_power(packed(count), seeds=many, sd=sd, truth=truth, simulations=simulations, seed=seed)
        )
        reached = tried[-1].median_width
        if reached is not None and reached <= width:
            return Plan(width=width, sd=sd, truth=truth, tried=tuple(tried), chosen=tried[-1])
    return Plan(width=width, sd=sd, truth=truth, tried=tuple(tried), chosen=None)


def forecast_half_width(
    budgets: Sequence[float],
    rho: Sequence[float],
    *,
    seeds: int = 1,
    sd: float = 0.003,
    truth: Truth | None = None,
    at: float | None = None,
    confidence: float = 0.95,
) -> float:
    """Expected half-width of rho* at compute `at` (ten times the largest budget by default) from the joint
    law.

    By the information matrix of the form with drift at a truth that does not drift; each budget is run at
    every rho.
    """
    truth = truth or Truth()
    compute = np.asarray(sorted(budgets), dtype=float)
    if len(compute) < 2:
        raise ScalingError(f"budgets is {list(budgets)!r}; a forecast needs at least two.")
    cells = np.unique(np.asarray(rho, dtype=float))
    form = FORMS[1]
    group = np.repeat(np.arange(len(compute)), len(cells) * seeds)
    x = np.tile(np.tile(cells, seeds), len(compute))
    data = JointData(
        rho=x,
        loss=np.zeros(len(x)),
        root_weight=np.ones(len(x)),
        known=False,
        group=group,
        budget=compute,
        ratio=np.full(len(compute), 1 / truth.floor),
        blocks=np.zeros((len(x), 0)),
    )
    names = form.names(len(compute), 0)
    theta = np.zeros(len(names))
    g = truth.a * (truth.m0 + 1 - truth.optimum) / (truth.optimum + truth.floor)
    for name, value in (("a0", truth.a), ("g0", g), ("ln_m0", math.log(truth.m0))):
        theta[names.index(name)] = value
    jacobian = curve(form, data, theta[None])[1][0]
    target = float(compute[-1] * 10 if at is None else at)
    direction = gradient(optimum_at(form, data, target), theta[None])[0]
    dof = len(x) - len(names)
    if dof < 1:
        raise ScalingError(f"{len(x)} runs do not carry the {len(names)} parameters of the joint law.")
    variance = direction @ np.linalg.pinv(jacobian.T @ jacobian) @ direction
    return quantile_t(confidence, dof) * sd * math.sqrt(max(float(variance), 0.0))


def _family(floor: float) -> Family:
    return next(family for family in allocation_families(floor) if family.name == "log-saturating")

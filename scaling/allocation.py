"""Loss against rho at one budget: every family, the optimum with its interval, the U test and the plateau."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from scaling.allocation_families import FLOOR, allocation_families
from scaling.allocation_results import AllocationFit, AllocationModel, Optimum, Plateau, Valley
from scaling.curvefit import CurveFit, fit_curve
from scaling.errors import ScalingError
from scaling.families import Family
from scaling.frame import Source, budget_groups, finished, numbers, read
from scaling.lack import with_lack
from scaling.observations import Observations, observe, pure_error
from scaling.robust import reweigh
from scaling.unimodal import valley_fit
from scaling.ushape import UShape, cells, judge

CREDIBLE = 4.0
"""Families within this delta AICc of the best one form the headline interval: measured to cover .91-.95
where the best one alone covers .80-.94.
"""
PURE_ERROR_DOF = 8
"""Fewest degrees of freedom between seeds at which the U test takes its SD from replicates instead of
residuals.
"""


def fit_allocation(
    source: Source,
    *,
    budget: float | None = None,
    columns: Mapping[str, str] | None = None,
    floor: float | None = None,
    noise: str = "auto",
    blocks: str = "auto",
    cluster: str | None = None,
    error: str = "gaussian",
    confidence: float = 0.95,
    seed: int = 0,
) -> AllocationFit:
    """Fit loss against rho at one budget.

    `budget` picks one when the table holds several (the nearest group of training FLOPs). `floor` is
    r0 = k / (E_1 - k); by default it comes from the columns `experts` and `top_k`. `noise`, `blocks` and
    `cluster`: see `observations.observe`. `error` "student-t" or "huber" down-weights outlying runs first
    (`robust.reweigh`). `seed` is the bootstrap's. Raises `ScalingError` for data that cannot be read as an
    allocation sweep; whatever the data fail to decide is a status.
    """
    if not 0.5 <= confidence < 1:
        raise ScalingError(
            f"confidence is {confidence!r}; a level from 0.5 up to, but not including, 1 is needed."
        )
    frame, excluded = finished(read(source, columns), ("rho",), "allocation")
    frame, value = one_budget(frame, budget)
    if floor is None:
        floor, origin = expert_floor(frame)
    else:
        origin = "given"
    if not 0 < floor < math.inf:
        raise ScalingError(f"floor is {floor!r}; k / (E_1 - k) must be positive.")
    obs = observe(frame, "rho", noise=noise, blocks=blocks, cluster=cluster, excluded=excluded)
    families = allocation_families(floor)
    obs, tau = with_lack(obs, families) if noise == "known+lack" else (obs, 0.0)
    obs, weighting = reweigh(obs, families, error)
    held = {
        "r0": floor,
        "r0_source": origin,
        "blocks": obs.block_name,
        "sd_known": obs.known,
        "lack_of_fit_sd": tau,
        "error": weighting,
        "runs_left_out": sum(item.count for item in excluded),
    }
    return analyse(obs, families, budget=value, held=held, confidence=confidence, seed=seed)


def fit_allocations(source: Source, **options: Any) -> tuple[AllocationFit, ...]:
    """One `fit_allocation` for each budget of the table, smallest first."""
    columns = options.pop("columns", None)
    frame = read(source, columns)
    kept, _ = finished(frame, ("rho",), "allocation")
    return tuple(fit_allocation(frame, budget=value, **options) for value in budgets(kept) or (None,))


def budgets(frame: pl.DataFrame) -> tuple[float, ...]:
    """Median training FLOPs of every group of budgets, increasing; empty without a usable `budget` column."""
    if "budget" not in frame.columns or frame["budget"].null_count() == frame.height:
        return ()
    values = numbers(frame, "budget")
    if not np.isfinite(values).all():
        row = frame["_row"][int(np.flatnonzero(~np.isfinite(values))[0])] if "_row" in frame.columns else "?"
        raise ScalingError(f"Row {row}, column 'budget': some runs have a budget and this one has none.")
    groups = budget_groups(values)
    return tuple(float(np.median(values[groups == group])) for group in range(groups.max() + 1))


def expert_floor(frame: pl.DataFrame) -> tuple[float, str]:
    """r0 = k / (E_1 - k) from `experts`, `top_k` and rho, by E(rho) = k + rho (E_1 - k); or the default."""
    if {"experts", "top_k"} <= set(frame.columns):
        experts, active, rho = (numbers(frame, name) for name in ("experts", "top_k", "rho"))
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = active * rho / (experts - active)
        usable = np.isfinite(ratio) & (ratio > 0) & (rho > 0)
        if usable.any():
            return float(np.median(ratio[usable])), "columns experts and top_k"
    return FLOOR, "default, because the table has no experts and top_k"


def analyse(
    obs: Observations,
    families: tuple[Family, ...],
    *,
    budget: float | None = None,
    held: Mapping[str, Any] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> AllocationFit:
    """The fit of observations that are ready."""
    models = _compare(tuple(_model(fit_curve(family, obs, confidence)) for family in families))
    sd2, dof, source = _scatter(obs, models)
    shape = judge(obs, sd2, dof, source, seed=seed, confidence=confidence)
    optimum = _headline(obs, models, shape, confidence)
    data = cells(obs)
    valley = None
    if len(data.x) >= 3:
        fit = valley_fit(data.y, data.weight)
        low = np.flatnonzero(fit <= fit.min())
        valley = Valley(
            rho=tuple(data.x.tolist()),
            loss=tuple(fit.tolist()),
            bottom=(float(data.x[low[0]]), float(data.x[low[-1]])),
        )
    return AllocationFit(
        budget=budget,
        n=obs.n,
        cells=len(obs.cells),
        optimum=optimum,
        models=models,
        valley=valley,
        u_shape=shape,
        plateau=_plateau(obs, models, optimum, sd2, dof, source),
        held=held or {},
        excluded=obs.excluded,
        observations=obs,
    )


def one_budget(frame: pl.DataFrame, budget: float | None) -> tuple[pl.DataFrame, float | None]:
    """The rows of one budget and its FLOPs; `ScalingError` when there are several and none was chosen."""
    found = budgets(frame)
    if not found:
        if budget is not None:
            raise ScalingError(f"budget={budget:g} was asked for, but the table has no column 'budget'.")
        return frame, None
    if budget is None:
        if len(found) > 1:
            listing = ", ".join(f"{value:.3g}" for value in found)
            held = f"Column 'budget' holds {len(found)} budgets ({listing} FLOPs), and this fit takes one;"
            raise ScalingError(
                f"{held} choose with budget=, fit each with fit_allocations, or all together with fit_joint.",
                shell=f"{held} choose with --budget {found[-1]:.3g}, or fit shares at all with `scaling fit joint`.",
            )
        return frame, found[0]
    nearest = int(np.argmin(np.abs(np.log(np.array(found) / budget)))) if budget > 0 else -1
    if nearest < 0 or abs(math.log(found[nearest] / budget)) > math.log(1.5):
        listing = ", ".join(f"{value:.3g}" for value in found)
        raise ScalingError(f"budget is {budget!r}; the table has {listing} FLOPs.")
    groups = budget_groups(numbers(frame, "budget"))
    return frame.filter(pl.Series(groups == nearest)), found[nearest]


def _model(fit: CurveFit) -> AllocationModel:
    """Add the optimum and what it gains over rho = 1."""
    extra: dict[str, Any] = {
        "rho": None,
        "interval": (None, None),
        "over_one": None,
        "over_one_interval": (None, None),
    }
    notes = list(fit.notes)
    shapeless = bool(fit.family.amplitude) and fit.params.get(fit.family.amplitude) == 0.0
    if fit.fitted and fit.family.axes and not shapeless:
        rho = fit.params["rho*"]
        extra["interval"] = fit.intervals["rho*"]
        inside = 0.0 < rho < 1.0
        if not inside:
            notes = [note for note in notes if not note.startswith("bound-hit: rho*")]
            notes.insert(
                0, f"vertex-outside-data: the curve has no minimum inside (0, 1); it ends at rho* = {rho:.3g}"
            )
        else:
            extra["rho"] = rho
            theta = np.concatenate([fit.theta[None], fit.cloud])
            extra["over_one"], extra["over_one_interval"] = fit.contrast(theta[:, 0], 1.0)
            low, high = float(fit.obs.x.min()), float(fit.obs.x.max())
            if not low <= rho <= high:
                notes.insert(
                    0, f"extrapolating: rho* = {rho:.3g} lies outside the runs ({low:g} to {high:g})"
                )
    status = notes[0].split(":")[0] if notes else fit.status
    return AllocationModel(**{**fit.__dict__, **extra, "notes": tuple(notes), "status": status})


def _compare(models: tuple[AllocationModel, ...]) -> tuple[AllocationModel, ...]:
    scores = [m.aicc for m in models if m.eligible and m.aicc is not None]
    if not scores:
        return models
    best = min(scores)
    return tuple(m if m.aicc is None else dataclasses.replace(m, delta_aicc=m.aicc - best) for m in models)


def _scatter(obs: Observations, models: tuple[AllocationModel, ...]) -> tuple[float, float, str]:
    """Variance of an observation of weight 1, its degrees of freedom, and where it comes from."""
    if obs.known:
        return 1.0, math.inf, "column loss_sd"
    within, inner = pure_error(obs)
    if inner >= PURE_ERROR_DOF and within > 0:
        return within / inner, float(inner), f"replicates ({inner} degrees of freedom)"
    scored = [m for m in models if m.eligible and m.aicc is not None]
    candidates = scored or [m for m in models if m.fitted and not m.family.check_only]
    if len(obs.cells) < 6:
        candidates = [m for m in models if m.fitted and m.dof >= 2 and m.name in ("constant", "quadratic")]
        candidates.sort(key=lambda m: (m.rss or 0.0) / m.dof)
    else:
        candidates.sort(key=lambda m: math.inf if m.aicc is None else m.aicc)
    if not candidates or candidates[0].rss is None:
        return 0.0, 0.0, "nothing"
    best = candidates[0]
    assert best.rss is not None
    floor = float(obs.weight.mean()) * (1e-12 * max(1.0, float(np.abs(obs.y).max()))) ** 2
    variance = best.rss / best.dof
    return (0.0 if obs.flat else max(variance, floor)), float(best.dof), f"residuals of {best.name}"


def _headline(
    obs: Observations, models: tuple[AllocationModel, ...], shape: UShape, confidence: float
) -> Optimum:
    credible = sorted(
        (m for m in models if m.eligible and m.delta_aicc is not None and m.delta_aicc < CREDIBLE),
        key=lambda m: m.delta_aicc or 0.0,
    )
    common: dict[str, Any] = {"confidence": confidence, "members": tuple(m.name for m in credible)}
    if obs.flat:
        return Optimum(**common, rho=None, interval=(None, None), model=None, reason="all losses are equal")
    if not any(m.family.axes for m in models if m.eligible):
        return Optimum(
            **common,
            rho=None,
            interval=(None, None),
            model=credible[0].name if credible else None,
            reason=f"{len(obs.cells)} distinct rho; a curve with an optimum needs at least 6 to be chosen",
        )
    best = credible[0]
    lows, highs = zip(*(m.interval for m in credible), strict=True)
    low = None if any(v is None for v in lows) else min(lows)
    high = None if any(v is None for v in highs) else max(highs)
    common |= {"interval": (low, high), "model": best.name}
    if not best.family.axes:
        return Optimum(**common, rho=None, reason="the constant fits best: no dependence on rho is seen")
    if best.rho is None:
        return Optimum(**common, rho=None, reason=f"{best.name} fits best and has no minimum inside (0, 1)")
    if best.over_one is not None and best.family.jump_at is not None and best.over_one < 0:
        return Optimum(
            **common,
            rho=None,
            reason=f"{best.name} puts rho = 1, without memory, below the smooth optimum {best.rho:.3g}",
        )
    if low is None or high is None:
        side = "no side" if low is high else "only the upper side" if low is None else "only the lower side"
        return Optimum(**common, rho=None, reason=f"the interval is bounded on {side}")
    if shape.verdict != "U-shaped" and shape.verdict != "undetermined":
        return Optimum(
            **common,
            rho=None,
            reason=f"curves have a minimum, but without assuming one: {shape.verdict}; {shape.reason}",
        )
    return Optimum(
        **common,
        rho=best.rho,
        reason=f"{best.name} has the lowest AICc; the interval is the union over members",
    )


def _plateau(
    obs: Observations,
    models: tuple[AllocationModel, ...],
    optimum: Optimum,
    sd2: float,
    dof: float,
    source: str,
) -> Plateau:
    unit = float(np.median(obs.weight))
    epsilon = math.sqrt(sd2 / unit) if sd2 > 0 else None
    best = next((m for m in models if m.name == optimum.model), None)
    if optimum.rho is None or best is None or epsilon is None:
        return Plateau(interval=None, epsilon=epsilon, epsilon_source=source, model=None)
    inside = np.linspace(0.0, 1.0, 2001)
    inside = inside[(inside >= obs.x.min()) & (inside <= obs.x.max())]
    grid = np.sort(np.concatenate([inside, [optimum.rho]]))
    loss = best.predict(grid)
    near = grid[loss <= loss.min() + epsilon]
    return Plateau(
        interval=(float(near[0]), float(near[-1])), epsilon=epsilon, epsilon_source=source, model=best.name
    )

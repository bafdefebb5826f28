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
from scaling.curvefit import CurveFit, Interval, fit_curve, union
from scaling.errors import ScalingError
from scaling.families import Family
from scaling.frame import Source, budget_groups, finished, merged_budgets, numbers, read
from scaling.lack import with_lack
from scaling.observations import Observations, observe
from scaling.robust import reweigh
from scaling.scatter import Scatter, scatter_of
from scaling.unimodal import valley_fit
from scaling.ushape import SIZE, UShape, cells, judge, turn_bounds

CREDIBLE = 4.0
"""Families within this delta AICc of the best one form the headline interval: measured to cover .91-.95
where the best one alone covers .80-.94.
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
        "budgets_merged": "" if value is None else merged_budgets(numbers(frame, "budget")),
        "experts_divided": experts_divided(frame),
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


def experts_divided(frame: pl.DataFrame) -> int | None:
    """E_1 - k, the experts that rho divides, where `experts`, `top_k` and rho agree on one whole number."""
    if not {"experts", "top_k"} <= set(frame.columns):
        return None
    experts, active, rho = (numbers(frame, name) for name in ("experts", "top_k", "rho"))
    with np.errstate(invalid="ignore", divide="ignore"):
        divided = (experts - active) / rho
    divided = divided[np.isfinite(divided) & (divided > 0)]
    if not len(divided):
        return None
    whole = round(float(np.median(divided)))
    agree = np.abs(rho * whole - (experts - active)) < 0.5  # a table may give rho to two digits
    return whole if whole > 0 and agree.all() else None


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
    scatter = scatter_of(obs, models)
    shape = judge(obs, scatter, seed=seed, confidence=confidence)
    optimum = _headline(obs, models, shape, scatter, confidence, seed)
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
        plateau=_plateau(obs, models, optimum, scatter),
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
                shell=f"{held} choose with --budget {found[-1]:.3g}, or fit all with `scaling fit joint`.",
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
        low, high = fit.intervals["rho*"]
        # a vertex beyond an end is an optimum at that end
        extra["interval"] = (low if low is None else min(low, 1.0), high if high is None else max(high, 0.0))
        inside = 0.0 < rho < 1.0
        if not inside:
            notes = [note for note in notes if not note.startswith("bound-hit: rho*")]
            notes.insert(
                0, f"vertex-outside-data: the curve has no minimum inside (0, 1); it ends at rho* = {rho:.3g}"
            )
        else:
            extra["rho"] = rho
            theta = np.concatenate([fit.theta[None], fit.cloud])
            extra["over_one"], extra["over_one_interval"] = fit.contrast(np.clip(theta[:, 0], 0.0, 1.0), 1.0)
            first, last = float(fit.obs.x.min()), float(fit.obs.x.max())
            if not first <= rho <= last:
                notes.insert(
                    0, f"extrapolating: rho* = {rho:.3g} lies outside the runs ({first:g} to {last:g})"
                )
    status = notes[0].split(":")[0] if notes and fit.fitted else fit.status
    return AllocationModel(**{**fit.__dict__, **extra, "notes": tuple(notes), "status": status})


def _compare(models: tuple[AllocationModel, ...]) -> tuple[AllocationModel, ...]:
    scores = [m.aicc for m in models if m.eligible and m.aicc is not None]
    if not scores:
        return models
    best = min(scores)
    return tuple(m if m.aicc is None else dataclasses.replace(m, delta_aicc=m.aicc - best) for m in models)


def _headline(
    obs: Observations,
    models: tuple[AllocationModel, ...],
    shape: UShape,
    scatter: Scatter,
    confidence: float,
    seed: int,
) -> Optimum:
    credible = sorted(
        (m for m in models if m.eligible and m.delta_aicc is not None and m.delta_aicc < CREDIBLE),
        key=lambda m: m.delta_aicc or 0.0,
    )
    best = credible[0] if credible else None
    low, high = union([m.interval for m in credible])
    # a monotone curve that is not refused has its optimum at an end, whatever the families say
    low = low if shape.p_no_fall is not None and shape.p_no_fall <= SIZE else None
    high = high if shape.p_no_rise is not None and shape.p_no_rise <= SIZE else None
    jump = best is not None and best.family.jump_at is not None and (best.over_one or 0.0) < 0
    from_valley = shape.verdict == "U-shaped" and (low is None or high is None)
    if from_valley:
        low, high = _closed((low, high), credible, turn_bounds(obs, scatter, seed=seed))
    if jump:
        high = None
    if shape.verdict not in ("U-shaped", "monotone falling", "monotone rising"):
        low = high = None
    rho: float | None = None
    if obs.flat:
        reason = "all losses are equal"
    elif best is None or not any(m.family.axes for m in models if m.eligible):
        reason = f"{len(obs.cells)} distinct rho; a curve with an optimum needs at least 6 to be chosen"
    elif not best.family.axes:
        reason = "no curve has a lower AICc than the constant: too few runs, or no dependence on rho"
    elif shape.verdict in ("monotone falling", "monotone rising"):
        reason = shape.reason
    elif shape.verdict != "U-shaped":
        reason = f"without assuming a curve the shape is {shape.verdict}: {shape.reason}"
    elif best.rho is None:
        reason = f"{best.name} fits best and has no minimum inside (0, 1)"
    elif jump:
        reason = f"{best.name} puts rho = 1, without memory, below the smooth optimum {best.rho:.3g}"
    elif low is None or high is None:
        ends = [name for name, end in (("0", low), ("1", high)) if end is None]
        reason = f"an optimum at {' or '.join(ends)} is not refused"
    else:
        rho = best.rho
        reason = f"{best.name} has the lowest AICc; the interval is the union over members"
        if from_valley:
            reason += ", which leave an end open that the test of the valley bounds"
    return Optimum(
        rho=rho,
        interval=(low, high),
        confidence=confidence,
        model=None if best is None else best.name,
        members=tuple(m.name for m in credible),
        edge_members=tuple(m.name for m in credible if m.family.axes and m.rho is None),
        reason=reason,
    )


def _closed(ends: Interval, members: list[AllocationModel], bounds: Interval) -> Interval:
    """Open ends of the members' union from the valley's bounds, but not inside what a member holds.

    A member that cannot exclude an end of [0, 1] does not outweigh that the U test does.
    """
    inner = [m.rho for m in members if m.rho is not None]
    low, high = ends
    if low is None and bounds[0] is not None:
        low = min([bounds[0], *inner, *(m.interval[0] for m in members if m.interval[0] is not None)])
    if high is None and bounds[1] is not None:
        high = max([bounds[1], *inner, *(m.interval[1] for m in members if m.interval[1] is not None)])
    return low, high


def _plateau(
    obs: Observations, models: tuple[AllocationModel, ...], optimum: Optimum, scatter: Scatter
) -> Plateau:
    unit, source = float(np.median(obs.weight)), scatter.source
    epsilon = math.sqrt(scatter.variance / unit) if scatter.variance > 0 else None
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

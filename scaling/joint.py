"""The joint law of `joint_law` fitted to runs at several budgets: rho*(C), its drift and its forecast."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from scaling.allocation import budgets, expert_floor
from scaling.curvefit import Interval, union
from scaling.errors import ScalingError
from scaling.frame import Source, budget_groups, finished, merged_budgets, numbers, read
from scaling.joint_law import FORMS, Form, JointData, curve, optimum_at, residuals
from scaling.joint_results import Drift, Forecast, JointFit, JointModel
from scaling.levenberg import Function, extremes, minimise
from scaling.observations import MANY, MOST, Observations, build, observe
from scaling.separable import quantile_f
from scaling.tails import f_cdf

STABLE = 0.05
"""Largest |rho*(C_max) - rho*(C_min)| that may still be called stable, when its whole interval lies within.
"""
CREDIBLE = 4.0


def fit_joint(
    source: Source,
    *,
    columns: Mapping[str, str] | None = None,
    noise: str = "auto",
    blocks: str = "auto",
    confidence: float = 0.95,
    forecast: float = 10.0,
) -> JointFit:
    """Fit the joint law to runs at two or more budgets.

    Needs `budget`, `rho` and `loss`; `experts` and `top_k` are used where present. `forecast` is
    the factor beyond the largest budget at which rho* is forecast.
    """
    data, obs, held = prepare(source, columns=columns, noise=noise, blocks=blocks)
    return analyse(data, obs, confidence=confidence, forecast=forecast, held=held)


def prepare(
    source: Source,
    *,
    columns: Mapping[str, str] | None = None,
    noise: str = "auto",
    blocks: str = "auto",
) -> tuple[JointData, Observations, dict[str, Any]]:
    """The data of the law, the runs behind them, and what is held fixed; options as in `fit_joint`."""
    frame, excluded = finished(read(source, columns), ("budget", "rho"), "allocation")
    found = budgets(frame)
    if len(found) < 2:
        raise ScalingError(
            f"Column 'budget' holds one budget ({found[0]:.3g} FLOPs); the joint law needs at least two."
        )
    obs = observe(frame, "rho", noise=noise, blocks=blocks, excluded=excluded)
    compute = numbers(frame, "budget")
    group = budget_groups(compute)
    floors = [expert_floor(frame.filter(pl.Series(group == index))) for index in range(len(found))]
    data = JointData(
        rho=obs.x,
        loss=obs.y,
        root_weight=obs.root_weight,
        known=obs.known,
        group=group,
        budget=np.array(found),
        ratio=np.array([1 / floor for floor, _ in floors]),
        blocks=obs.blocks,
    )
    held = {
        "S": data.ratio.tolist(),
        "S_source": "; ".join(sorted({origin for _, origin in floors})),
        "blocks": obs.block_name,
        "sd_known": obs.known,
        "budgets_merged": [merged_budgets(compute[group == index]) for index in range(len(found))],
    }
    if len(data.loss) > MANY:
        data = _compact(data, obs)
    return data, obs, held


def analyse(
    data: JointData,
    obs: Observations | None = None,
    *,
    forms: tuple[Form, ...] = FORMS,
    confidence: float = 0.95,
    forecast: float = 10.0,
    held: Mapping[str, Any] | None = None,
) -> JointFit:
    """The fit of data that are ready."""
    models = [fit_form(form, data, confidence) for form in forms]
    scores = [m.aicc for m in models if m.eligible and m.aicc is not None]
    if scores:
        models = [
            m if m.aicc is None else dataclasses.replace(m, delta_aicc=m.aicc - min(scores)) for m in models
        ]
    chosen = min(
        (m for m in models if m.eligible and m.aicc is not None), key=lambda m: m.aicc or 0.0, default=None
    )
    moving = [m for m in models if m.eligible and m.form.drift and (m.delta_aicc or 0.0) < CREDIBLE]
    forecasts: list[Forecast] = []
    if chosen is not None and moving:
        headline = min(moving, key=lambda m: m.delta_aicc or 0.0)
        for budget in (*data.budget.tolist(), float(data.budget.max()) * forecast):
            each = {m.name: m.forecast(budget) for m in moving}
            joined = union([item.interval for item in each.values()])
            forecasts.append(dataclasses.replace(each[headline.name], union=joined))
    return JointFit(
        n=len(data.loss) + data.merged,
        budgets=tuple(data.budget.tolist()),
        models=tuple(models),
        best=None if chosen is None else chosen.name,
        drift=_drift(models, moving, data),
        rho_star=tuple(forecasts),
        confidence=confidence,
        held=held or {},
        excluded=() if obs is None else obs.excluded,
        data=data,
    )


def _compact(data: JointData, obs: Observations) -> JointData:
    """Runs of equal budget, rho and block replaced by their weighted means; neighbours in rho beyond
    `MOST`.
    """
    place = np.unique(data.rho, return_inverse=True)[1]
    if place.max() >= MOST:
        place = place * MOST // (int(place.max()) + 1)
    weight, groups, blocks = data.root_weight**2, len(data.budget), int(obs.block_of.max()) + 1
    key = (place * groups + data.group) * blocks + obs.block_of
    first, cell = np.unique(key, return_index=True, return_inverse=True)[1:]
    total = np.bincount(cell, weight)
    loss = np.bincount(cell, weight * data.loss) / total
    rho = np.bincount(cell, weight * data.rho) / total
    same = np.bincount(cell, (data.rho != data.rho[first][cell]).astype(float)) == 0
    rho[same] = data.rho[first][same]
    small = build(x=rho, y=loss, weight=total, block=obs.block_of[first])
    return dataclasses.replace(
        data,
        rho=rho,
        loss=loss,
        root_weight=np.sqrt(total),
        group=data.group[first],
        blocks=small.blocks,
        within=float((weight * (data.loss - loss[cell]) ** 2).sum()),
        merged=len(data.loss) - len(loss),
    )


def fit_form(form: Form, data: JointData, confidence: float = 0.95, parameters: bool = True) -> JointModel:
    """One form of the law; starts by variable projection on a grid of its non-linear parameters.

    `parameters` asks for the interval of every parameter, which takes most of the time.
    """
    groups, blocks = len(data.budget), data.blocks.shape[1]
    names = form.names(groups, blocks)
    n, p = len(data.loss) + data.merged, len(names)
    cells = len(set(zip(data.group.tolist(), data.rho.tolist(), strict=True)))
    missing = form.jump and not (data.rho == 1.0).any()
    dof = n - p
    common: dict[str, Any] = {
        "name": form.name,
        "k": p - blocks,
        "n": n,
        "dof": dof,
        "form": form,
        "data": data,
    }
    if dof < 1 or cells < p - blocks or missing:
        reason = "no run at rho = 1" if missing else f"{cells} cells and {n} runs do not carry {p} parameters"
        return _absent(common, p, "too-few-points", reason)
    level = np.array(
        [
            np.average(data.loss[data.group == g], weights=data.root_weight[data.group == g])
            for g in range(groups)
        ]
    )
    if float(np.abs(data.loss - level[data.group]).max()) <= 1e-12 * max(1.0, float(np.abs(data.loss).max())):
        return _absent(common, p, "flat-direction", "all losses of a budget are equal")
    model = residuals(form, data)
    found = minimise(model, _starts(form, data))
    winner = int(np.argmin(found.rss))
    theta, own = found.theta[winner], float(found.rss[winner])
    rss = own + data.within
    sigma2 = 1.0 if data.known else rss / dof
    critical = own + sigma2 * quantile_f(confidence, math.inf if data.known else dof)
    notes = []
    if not found.converged[winner]:
        notes.append(f"not-converged: gradient {found.gradient[winner]:.1e}")
    law = [i for i, name in enumerate(names) if not name.startswith(("E_", "block_"))]
    params = {names[i]: float(theta[i]) for i in range(p)}
    if not form.interaction and (params["a0"] <= 0 or params["g0"] <= 0):
        notes.append(
            "flat-direction: experts or memory do not pay (a0 or g0 is not positive), so rho* has no meaning"
        )
    if abs(params["ln_m0"]) > 12:
        notes.append(
            f"bound-hit: ln m0 = {params['ln_m0']:.3g} has run away; the memory term is a line or a step"
        )
    same = (found.rss <= own + 0.01 * (critical - own)) & found.converged
    where = optimum_at(form, data, float(data.budget.max()))
    spread = np.ptp(where(found.theta[same])) if same.any() else 0.0
    if spread > 0.02:
        notes.append(f"several-basins: equally good fits differ by {spread:.2g} in rho*")
    intervals = {}
    for i in law if parameters else ():
        intervals[names[i]] = extremes(model, theta, own, critical, _coordinate(i))
    floor = n * (1e-10 * float(np.abs(data.loss * data.root_weight).max())) ** 2
    deviance = rss if data.known else n * math.log(max(rss, floor, 1e-280) / n)
    aicc = deviance + 2 * p + 2 * p * (p + 1) / (n - p - 1) if n - p > 1 else None
    return JointModel(
        **common,
        rss=rss,
        aicc=aicc,
        bic=deviance + p * math.log(n),
        delta_aicc=None,
        params=params,
        intervals=intervals,
        status=notes[0].split(":")[0] if notes else "converged",
        notes=tuple(notes),
        eligible=cells >= p - blocks + 3 and not notes,
        theta=theta,
        critical=critical,
    )


def _absent(common: dict[str, Any], p: int, status: str, reason: str) -> JointModel:
    return JointModel(
        **common,
        rss=None,
        aicc=None,
        bic=None,
        delta_aicc=None,
        params={},
        intervals={},
        status=status,
        notes=(reason,),
        eligible=False,
        theta=np.full(p, np.nan),
        critical=math.inf,
    )


def _coordinate(index: int) -> Function:
    return lambda theta: theta[:, index]


def _starts(form: Form, data: JointData, count: int = 4) -> np.ndarray:
    """The best linear fits on a grid of ln m0 and the drift exponents [count, p]."""
    names = form.names(len(data.budget), data.blocks.shape[1])
    at = {name: i for i, name in enumerate(names)}
    bent = [at[name] for name in ("ln_m0", "tau_a", "tau_g", "tau_m") if name in at]
    linear = [i for i in range(len(names)) if i not in bent]
    tried = []
    for log_share in np.log(np.geomspace(1e-3, 10, 9)):
        for tau_a in (-0.2, 0.0, 0.2) if form.drift else (0.0,):
            for tau_g in (-0.2, 0.0, 0.2) if form.drift else (0.0,):
                theta = np.zeros(len(names))
                theta[at["a0"]] = theta[at["g0"]] = 1.0
                theta[at["ln_m0"]] = log_share
                if form.drift:
                    theta[at["tau_a"]], theta[at["tau_g"]] = tau_a, tau_g
                jacobian = curve(form, data, theta[None])[1][0][:, linear] * data.root_weight[:, None]
                best = np.linalg.lstsq(jacobian, data.loss * data.root_weight, rcond=None)[0]
                rest = data.loss * data.root_weight - jacobian @ best
                theta[linear] = best
                tried.append((float(rest @ rest), theta))
    tried.sort(key=lambda item: item[0])
    return np.stack([theta for _, theta in tried[:count]])


def _drift(models: list[JointModel], moving: list[JointModel], data: JointData) -> Drift:
    free = next(m for m in models if m.form == FORMS[1])
    fixed = next(m for m in models if m.form == FORMS[0])
    p_value = None
    if free.rss is not None and fixed.rss is not None and free.rss > 0 and not data.known:
        extra = fixed.dof - free.dof
        p_value = 1 - float(
            f_cdf(extra, free.dof, max(fixed.rss - free.rss, 0.0) / extra / (free.rss / free.dof))
        )
    if not moving:
        nothing: Interval = (None, None)
        return Drift(
            verdict="undetermined",
            difference=None,
            interval=nothing,
            union=nothing,
            margin=STABLE,
            p_value=p_value,
        )
    lowest, highest = float(data.budget.min()), float(data.budget.max())

    def difference(model: JointModel) -> Function:
        top, bottom = (optimum_at(model.form, data, budget) for budget in (highest, lowest))
        return lambda theta: top(theta) - bottom(theta)

    ends = {model.name: model.interval_of(difference(model)) for model in moving}
    headline = min(moving, key=lambda m: m.delta_aicc or 0.0)
    value = float(difference(headline)(headline.theta[None])[0])
    low, high = union(list(ends.values()))
    verdict = "undetermined"
    if low is not None and low > 0:
        verdict = "rises with compute"
    elif high is not None and high < 0:
        verdict = "falls with compute"
    elif low is not None and high is not None and low >= -STABLE and high <= STABLE:
        verdict = "stable"
    return Drift(
        verdict=verdict,
        difference=value,
        interval=ends[headline.name],
        union=(low, high),
        margin=STABLE,
        p_value=p_value,
    )

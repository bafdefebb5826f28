"""How far to believe a fit: lack of fit, leave-one-out, ordered extrapolation and influence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from scaling.allocation import fit_allocation
from scaling.curvefit import CurveFit, Interval, fit_curve
from scaling.errors import ScalingError, nearest
from scaling.frame import budget_groups, finished, numbers, read
from scaling.joint import JointFit, fit_form, prepare
from scaling.joint_law import FORMS
from scaling.lawfit import LawFit, case_weights
from scaling.lse import solve
from scaling.observations import Observations, pure_error
from scaling.tails import f_cdf

REFITS = 400
"""Most refits that leave-one-out does; beyond that many runs it says nothing new."""


@dataclass(frozen=True, kw_only=True)
class LackOfFit:
    """F test of the family against one free mean for each x, from replicates."""

    statistic: float | None
    p_value: float | None
    dof: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"statistic": self.statistic, "p_value": self.p_value, "dof": list(self.dof)}


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Runs predicted by a fit that did not see them."""

    what: str
    x: tuple[float, ...]
    observed: tuple[float, ...]
    predicted: tuple[float, ...]
    interval: tuple[tuple[float, float], ...]
    """Interval for a new run at each x."""
    inside: int
    """How many observations lie in their interval."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; infinite ends become null."""
        ends = [[end if math.isfinite(end) else None for end in pair] for pair in self.interval]
        return {
            **self.__dict__,
            "x": list(self.x),
            "observed": list(self.observed),
            "predicted": list(self.predicted),
            "interval": ends,
        }


@dataclass(frozen=True, kw_only=True)
class Influence:
    """What the first parameter becomes when something is left out."""

    left_out: str
    value: float | None
    change: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dict(self.__dict__)


def lack_of_fit(fit: CurveFit) -> LackOfFit:
    """Pure-error test (Draper & Smith 1998, sec. 2.1); without replicates there is none, and p is None."""
    within, inner = pure_error(fit.obs)
    outer = fit.dof - inner
    if fit.rss is None or inner < 1 or outer < 1 or within <= 0:
        return LackOfFit(statistic=None, p_value=None, dof=(max(outer, 0), inner))
    statistic = max(fit.rss - within, 0.0) / outer / (within / inner)
    return LackOfFit(statistic=statistic, p_value=1 - f_cdf(outer, inner, statistic), dof=(outer, inner))


def leave_one_out(fit: CurveFit) -> float | None:
    """Root mean square error of each run predicted by the fit to the others, nats; None where it cannot be
    done.
    """
    if not fit.fitted or fit.n > REFITS or fit.dof < 2:
        return None
    obs = fit.obs
    errors = []
    for i in range(fit.n):
        keep = np.arange(fit.n) != i
        if fit.family.jump_at is not None and not (obs.x[keep] == fit.family.jump_at).any():
            continue
        design = fit.family.design(obs.x[keep], obs.root_weight[keep], obs.blocks[keep])
        theta, _ = design.minimum(obs.y[None, keep])
        linear, b = design.coefficients(obs.y[keep], theta)
        row = np.concatenate([fit.family.nuisance(obs.x[i : i + 1]), obs.blocks[i : i + 1]], axis=1)
        predicted = float(row[0] @ linear[0] + b[0] * fit.family.basis(theta, obs.x[i : i + 1])[0, 0])
        errors.append(obs.y[i] - predicted)
    return float(np.sqrt(np.mean(np.square(errors)))) if errors else None


def extrapolate(fit: CurveFit, held: np.ndarray, what: str) -> HeldOut | None:
    """Fit the family without the runs where `held` [n] is true, and predict them with intervals for a new
    run.
    """
    obs = fit.obs
    if not held.any() or held.all():
        return None
    again = fit_curve(fit.family, obs.take(~held), fit.confidence)
    if not again.fitted:
        return None
    x, y = obs.x[held], obs.y[held]
    low, high = again.band(x, "new")
    predicted = again.predict(x)
    return HeldOut(
        what=what,
        x=tuple(x.tolist()),
        observed=tuple(y.tolist()),
        predicted=tuple(predicted.tolist()),
        interval=tuple(zip(low.tolist(), high.tolist(), strict=True)),
        inside=int(((y >= low) & (y <= high)).sum()),
    )


def extrapolations(fit: CurveFit) -> tuple[HeldOut, ...]:
    """The ordered hold-outs of one curve: its largest x (rho = 1, or the largest memory) and its smallest."""
    x = fit.obs.x
    out = []
    for end, word in ((x.max(), "largest"), (x.min(), "smallest")):
        result = extrapolate(fit, x == end, f"{word} x ({end:g})")
        if result is not None:
            out.append(result)
    return tuple(out)


def _block(obs: Observations, block: int) -> str:
    """Name a block: by its seed, where that is what its runs share, or by its place."""
    seed = obs.seed[obs.block_of == block][0]
    known = obs.block_name == "seed" and np.isfinite(seed)
    return f"{obs.block_name} {seed:g}" if known else f"{obs.block_name} {block + 1}"


def influence(fit: CurveFit) -> tuple[Influence, ...]:
    """The first parameter (rho*, alpha) without each x in turn, and without each block."""
    if not fit.fitted or not fit.family.axes or fit.n > REFITS:
        return ()
    obs, axis = fit.obs, fit.family.axes[0]
    whole = float(axis.natural(fit.theta[0]))
    cases = [(f"x = {cell:g}", obs.x != cell) for cell in obs.cells]
    if obs.block_name:
        cases += [(_block(obs, block), obs.block_of != block) for block in np.unique(obs.block_of)]
    out = []
    for name, keep in cases:
        part = obs.take(keep)
        design = fit.family.design(part.x, part.root_weight, part.blocks)
        jump = fit.family.jump_at
        if len(part.cells) < fit.family.parameters or (jump is not None and not (part.x == jump).any()):
            out.append(Influence(left_out=name, value=None, change=None))
            continue
        value = float(axis.natural(design.minimum(part.y[None])[0][0, 0]))
        out.append(Influence(left_out=name, value=value, change=value - whole))
    return tuple(out)


def leave_out_budget(
    fit: JointFit, source: pl.DataFrame, options: Mapping[str, Any] | None = None
) -> tuple[Influence, ...]:
    """The forecast rho* of a joint fit at its largest budget without each budget in turn.

    `source` is the table that was fitted.
    """
    if fit.best is None or len(fit.budgets) < 3:
        return ()
    frame, _ = finished(read(source), ("budget", "rho"), "allocation")
    groups = budget_groups(numbers(frame, "budget"))
    target = fit.budgets[-1]
    whole = fit.model("drift").forecast(target).rho
    out = []
    for index, budget in enumerate(fit.budgets):
        part = frame.filter(pl.Series(groups != index)).drop("_row")
        again = fit_form(FORMS[1], prepare(part, **dict(options or {}))[0], parameters=False)
        value = again.forecast(target).rho if again.rss is not None else None
        change = None if value is None or whole is None else value - whole
        out.append(Influence(left_out=f"budget {budget:.3g}", value=value, change=change))
    return tuple(out)


def held_out_budget(fit: JointFit, source: pl.DataFrame) -> dict[str, Any] | None:
    """rho* at the largest budget: forecast from the smaller ones, beside the one measured there alone.

    None with fewer than three budgets, because two are needed for a drift.
    """
    if len(fit.budgets) < 3:
        return None
    frame, _ = finished(read(source), ("budget", "rho"), "allocation")
    groups = budget_groups(numbers(frame, "budget"))
    last = groups == groups.max()
    drifting = fit_form(FORMS[1], prepare(frame.filter(pl.Series(~last)).drop("_row"))[0], parameters=False)
    alone = fit_allocation(frame.filter(pl.Series(last)).drop("_row"))
    if drifting.rss is None:
        return None
    forecast = drifting.forecast(fit.budgets[-1])
    ends: Interval = forecast.interval
    measured = alone.optimum.rho
    inside = None
    if measured is not None:
        inside = (ends[0] is None or ends[0] <= measured) and (ends[1] is None or measured <= ends[1])
    return {
        "what": f"largest budget ({fit.budgets[-1]:.3g} FLOPs)",
        "forecast": forecast.rho,
        "interval": list(ends),
        "measured": measured,
        "measured_interval": list(alone.optimum.interval),
        "inside": inside,
    }


def law_influence(
    fit: LawFit, parameter: str, groups: Mapping[str, np.ndarray] | None = None
) -> tuple[Influence, ...]:
    """A parameter (or derived quantity) of a log-sum-exp law without each run in turn, all refits at once.

    `groups` maps names to masks [n] that are left out together, such as one mask for each budget. Empty for
    a law that was not fitted, or that is fitted otherwise (Clark, Tao). Raises `ScalingError` for an
    unknown parameter.
    """
    if fit.terms is None or fit.phi is None or fit.report is None:
        return ()
    known = {**fit.params, **fit.derived}
    if parameter not in known:
        raise ScalingError(
            f"{fit.name} has no {parameter!r}; it has {', '.join(known)}.{nearest(parameter, known)}"
        )
    if groups is None:
        groups = {f"row {i + 1}": np.arange(fit.n) == i for i in range(fit.n)}
    weight = 1.0 - np.stack([np.asarray(mask, dtype=float) for mask in groups.values()])
    start = np.repeat(fit.phi[None], len(weight), axis=0)
    values = fit.report(solve(fit.terms, start, weight, fit.delta).phi)[parameter]
    return tuple(
        Influence(left_out=name, value=float(value), change=float(value) - known[parameter])
        for name, value in zip(groups, values, strict=True)
    )


def hold_out_compute(fit: LawFit, share: float = 0.1, draws: int = 400, seed: int = 0) -> HeldOut | None:
    """Fit a log-sum-exp law without the runs of largest compute and predict their losses.

    Holds out the `share` of the runs with the largest C (6 N D where the law takes N and D). Intervals are
    percentiles of the prediction over case bootstraps of the remaining runs, each with a residual of that
    fit added: for one new run. None for a law that was not fitted, or that is fitted otherwise, or when too
    few runs remain.
    """
    if not 0 < share < 1:
        raise ScalingError(f"share is {share!r}; a share of the runs between 0 and 1 is needed.")
    if fit.terms is None or fit.phi is None or fit.report is None:
        return None
    columns = fit.columns
    compute = columns["budget"] if "budget" in columns else columns["total_parameters"] * columns["tokens"]
    count = max(1, round(share * fit.n))
    order = np.argsort(compute, kind="stable")
    rest, held = np.sort(order[:-count]), np.sort(order[-count:])
    if len(rest) < fit.k + 2:
        return None
    part = fit.terms.take(rest)
    best = solve(part, fit.phi[None], delta=fit.delta)
    residual = part.log_loss - part.value(best.phi)[0][0]
    rng = np.random.default_rng(seed)
    weight = case_weights(len(rest), None, draws, rng)
    again = solve(part, np.repeat(best.phi, draws, axis=0), weight, fit.delta)
    far = fit.terms.take(held)
    noise = rng.choice(residual, size=(draws, count)) * math.sqrt(len(rest) / (len(rest) - fit.k))
    drawn = np.exp(far.value(again.phi)[0] + noise)
    tail = (1 - fit.confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail], axis=0)
    observed = fit.loss[held]
    return HeldOut(
        what=f"the {count} runs of largest compute",
        x=tuple(compute[held].tolist()),
        observed=tuple(observed.tolist()),
        predicted=tuple(np.exp(far.value(best.phi)[0][0]).tolist()),
        interval=tuple(zip(low.tolist(), high.tolist(), strict=True)),
        inside=int(((observed >= low) & (observed <= high)).sum()),
    )

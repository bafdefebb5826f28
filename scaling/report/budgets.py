"""The section on how the best share moves with compute, for studies of several budgets."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from scaling.allocation import CREDIBLE, AllocationFit
from scaling.joint import JointFit, JointModel
from scaling.report import plots, words
from scaling.report.document import Block, Paragraph, Picture, Pictures, Section, Table
from scaling.report.drawing import Curve, Estimate, Label, Points
from scaling.report.models import SCORES, scores
from scaling.report.numbers import budget_label, fixed, interval, percent, significant
from scaling.ushape import cells

STEPS = 25
"""Budgets at which the law's band is found; each takes a profile, so the picture stays quick."""


def across(fit: JointFit, shares: Sequence[AllocationFit]) -> Section:
    """Return the section on rho*(C); `shares` are the fits of each budget by itself, smallest first."""
    blocks: tuple[Block, ...] = (
        Paragraph(words.drift(fit)),
        Pictures((*_overlay(shares), _picture(fit, shares))),
        *((forecasts(fit),) if fit.rho_star else ()),
        models(fit),
    )
    return Section(ident="compute", title="Best share against compute", blocks=blocks)


def headline(fit: JointFit) -> JointModel | None:
    """Return the credible form that lets the optimum move, else the one with the lowest AICc."""
    moving = [
        m
        for m in fit.models
        if m.eligible and m.form.drift and m.delta_aicc is not None and m.delta_aicc < CREDIBLE
    ]
    if moving:
        return min(moving, key=lambda m: m.delta_aicc or 0.0)
    return None if fit.best is None else fit.model(fit.best)


def forecasts(fit: JointFit) -> Table:
    """Return rho* at every budget and at the forecast's, by the joint law."""
    level = percent(fit.confidence)
    return Table(
        title="Best share by the joint law",
        columns=("budget", "", "ρ*", f"{level} interval", "union of credible forms"),
        rows=tuple(
            (
                budget_label(f.budget),
                "measured" if f.measured else "forecast",
                fixed(f.rho),
                interval(*f.interval),
                interval(*f.union),
            )
            for f in fit.rho_star
        ),
        numeric=frozenset({"ρ*"}),
    )


def models(fit: JointFit) -> Table:
    """Return every form of the joint law."""
    ordered = sorted(fit.models, key=lambda m: (not m.eligible, math.inf if m.aicc is None else m.aicc))
    level = percent(fit.confidence)
    return Table(
        title="Forms of the joint law",
        columns=("form", f"parameters and {level} intervals", *SCORES, "status"),
        rows=tuple(
            (
                m.name,
                _parameters(m),
                *scores(m),
                "; ".join(m.notes) or m.status,
            )
            for m in ordered
        ),
        numeric=frozenset(SCORES),
        note=(
            "L = E_C − a ln(1 + ρS) − g ln(1 + (1−ρ)/m) + J 1[ρ=1] + χ (product of the logarithms), with"
            " a = a0 (C/C0)^τ_a, g = g0 (C/C0)^τ_g, m = m0 (C/C0)^τ_m, S = (E₁−k)/k and a level for every"
            " budget, which is not shown."
        ),
    )


def _parameters(model: JointModel) -> str:
    shown = []
    for name, value in model.params.items():
        if name.startswith(("E_", "block_")):
            continue
        low, high = model.intervals.get(name, (None, None))
        ends = ", ".join("unbounded" if end is None else significant(end) for end in (low, high))
        shown.append(f"{name.replace('tau', 'τ').replace('chi', 'χ')} = {significant(value)} [{ends}]")
    return "; ".join(shown) or "–"


def _picture(fit: JointFit, shares: Sequence[AllocationFit]) -> Picture:
    model = headline(fit)
    law = None
    if model is not None and model.rss is not None:
        right = max((f.budget for f in fit.rho_star), default=max(fit.budgets))
        law = _law(model, np.geomspace(min(fit.budgets), right, STEPS))
    measured = [share for share in shares if share.budget is not None]
    return plots.drift(
        Label(
            name="compute",
            title="Best share against compute",
            caption=(
                "Points: each budget fitted by itself, with the union interval over its credible models;"
                " dotted where an end is not bounded. Line and band: the joint law"
                + (f" ({model.name})" if model is not None else "")
                + ", 95 %, carried beyond the largest budget."
            ),
            alt=f"Best share against compute. {words.drift(fit)}",
        ),
        np.array([share.budget for share in measured], dtype=float),
        [Estimate.of("ρ*", s.optimum.rho, s.optimum.interval) for s in measured],
        law,
    )


def _overlay(shares: Sequence[AllocationFit]) -> tuple[Picture, ...]:
    """Return the budgets' best curves on top of each other; none where a budget has no curve."""
    points, curves = [], []
    for share in shares:
        if share.best is None or not share.best.fitted:
            return ()
        means = cells(share.observations)
        grid = np.linspace(float(means.x.min()), float(means.x.max()), 201)
        if share.best.family.jump_at is not None:
            grid = grid[grid < 1.0]
        loss = share.best.predict(grid)
        lowest = float(loss.min())
        points.append(Points(x=means.x, y=means.y - lowest, seed=np.full(len(means.x), math.nan)))
        curves.append(Curve(name=budget_label(share.budget), x=grid, mean=loss - lowest))
    return (
        plots.overlay(
            Label(
                name="overlay",
                title="Loss above the lowest, by budget",
                caption="Means over seeds, and each budget's model with the lowest AICc, above its lowest.",
                alt="Loss above the lowest against share, one curve a budget.",
            ),
            points,
            curves,
        ),
    )


def _law(model: JointModel, budgets: np.ndarray) -> Curve:
    found = [model.forecast(float(budget)) for budget in budgets]
    low = np.array([0.0 if f.interval[0] is None else f.interval[0] for f in found])
    high = np.array([1.0 if f.interval[1] is None else f.interval[1] for f in found])
    mean = np.array([math.nan if f.rho is None else f.rho for f in found])
    return Curve(name=f"joint law ({model.name})", x=budgets, mean=mean, low=low, high=high)

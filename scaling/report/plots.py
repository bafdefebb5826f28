"""The pictures of results: loss against share, loss against memory, the best share against compute.

Each takes plain numbers, knows nothing of fits, and returns one `Picture`. rho is the realised share of the
sparse parameters held by routed experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scaling.report import theme
from scaling.report.document import Picture
from scaling.report.drawing import (
    LOSS,
    SHARE,
    Array,
    Curve,
    Estimate,
    Label,
    Points,
    bands,
    finish,
    interval_bar,
    log_ticks,
    raw,
    ticked,
)
from scaling.report.numbers import short, significant

NARROWEST = 0.002
"""Least span of losses shown, nats: below the scatter of any training run there is nothing to see."""


def allocation(
    label: Label,
    points: Points,
    curves: Sequence[Curve],
    *,
    optimum: Estimate | None,
    plateau: tuple[float, float] | None,
) -> Picture:
    """Draw loss against rho in one budget: seeds, credible models, rho* with its interval, the plateau."""
    with theme.figure(2.7) as (drawn, axes):
        if plateau is not None:
            axes.axvspan(*plateau, color=theme.GREEN, alpha=0.13, lw=0, label="within one SD of the best")
        axes.axvline(1.0, color=theme.MUTED, lw=0.8, ls=(0, (2, 2)))
        bands(axes, curves)
        raw(axes, points, hollow=points.x >= 1.0, hollow_label="ρ = 1: pure MoE")
        low, high = float(points.y.min()), float(points.y.max())
        room = max(high - low, NARROWEST)
        if optimum is not None:
            said = "ρ* and its 95 % interval" if optimum.value is not None else "what the models leave for ρ*"
            interval_bar(axes, optimum, low - 0.14 * room, (0.0, 1.0), label=said)
        axes.set(xlim=(-0.04, 1.05), ylim=(low - 0.24 * room, high + 0.1 * room), xlabel=SHARE, ylabel=LOSS)
        axes.set_xticks(np.linspace(0, 1, 6))
        return finish(drawn, axes, label)


def memory(
    label: Label,
    points: Points,
    curves: Sequence[Curve],
    *,
    axis: str,
    without: Points | None,
) -> Picture:
    """Draw loss against memory size on a log axis, with the models' fan beyond the largest run.

    `without` are runs of no memory at all; they stand at the left edge, off the log scale.
    """
    with theme.figure(2.7) as (drawn, axes):
        axes.set_xscale("log")
        largest, smallest = float(points.x.max()), float(points.x.min())
        right = max([largest, *(float(c.x.max()) for c in curves)])
        if right > largest:
            axes.axvspan(
                largest, right * 1.15, color=theme.MUTED, alpha=0.09, lw=0, label="beyond the largest run"
            )
        bands(axes, curves)
        raw(axes, points)
        left = smallest / 1.5
        ticks = log_ticks(smallest, right)
        labels = [short(t) for t in ticks]
        if without is not None:
            edge = smallest / max(2.5, (right / smallest) ** 0.12)
            raw(
                axes,
                Points(x=np.full(len(without.y), edge), y=without.y, seed=without.seed),
                hollow=np.ones(len(without.y), dtype=bool),
                hollow_label="no memory",
                label=None,
            )
            left, ticks, labels = edge / 1.4, [edge, *ticks], ["none", *labels]
        axes.set_xlim(left, right * 1.15)
        axes.set_xticks(ticks, labels)
        axes.minorticks_off()
        axes.set(xlabel=axis, ylabel=LOSS)
        return finish(drawn, axes, label)


def overlay(label: Label, points: Sequence[Points], curves: Sequence[Curve]) -> Picture:
    """Draw every budget's loss above its own lowest, in thousandths of a nat, so that only shapes differ."""
    with theme.figure(2.7) as (drawn, axes):
        for number, (cells, curve) in enumerate(zip(points, curves, strict=True)):
            colour = theme.SERIES[number % len(theme.SERIES)]
            dash = theme.DASHES[number % len(theme.DASHES)]
            axes.plot(curve.x, 1e3 * curve.mean, color=colour, ls=dash, label=curve.name)
            axes.plot(cells.x, 1e3 * cells.y, theme.MARKERS[number % len(theme.MARKERS)], color=colour, ms=4)
        axes.set(xlim=(-0.04, 1.05), xlabel=SHARE, ylabel="loss above the lowest (0.001 nats)")
        axes.set_xticks(np.linspace(0, 1, 6))
        return finish(drawn, axes, label)


def drift(
    label: Label,
    budgets: Array,
    optima: Sequence[Estimate],
    law: Curve | None,
) -> Picture:
    """Draw rho* of each budget with its interval, and the joint law's rho*(C) with its band and forecast."""
    with theme.figure(2.7) as (drawn, axes):
        axes.set_xscale("log")
        if law is not None:
            bands(axes, [law])
            largest = float(budgets.max())
            right = float(law.x.max())
            if right > largest * 1.01:
                axes.axvspan(
                    largest, right, color=theme.MUTED, alpha=0.09, lw=0, label="beyond the largest budget"
                )
        for number, (budget, optimum) in enumerate(zip(budgets, optima, strict=True)):
            said = "ρ* fitted in each budget, 95 %" if number == 0 else None
            low = 0.0 if optimum.low is None else optimum.low
            high = 1.0 if optimum.high is None else optimum.high
            open_end = optimum.low is None or optimum.high is None
            axes.plot(
                [budget, budget], [low, high], color=theme.INK, lw=1.4, ls=":" if open_end else "-", zorder=3
            )
            if optimum.value is not None:
                axes.plot([budget], [optimum.value], "o", color=theme.INK, label=said, zorder=4)
        ends = [float(budgets.min()), float(law.x.max()) if law is not None else float(budgets.max())]
        ticked(axes, *ends, say=significant)
        axes.set(ylim=_shares(optima, law), xlabel="training compute C (FLOPs)", ylabel="best share ρ*")
        return finish(drawn, axes, label)


def _shares(optima: Sequence[Estimate], law: Curve | None) -> tuple[float, float]:
    """Return limits that hold every interval and are at least .3 apart, so that little looks little."""
    lows = [0.0 if o.low is None else o.low for o in optima]
    highs = [1.0 if o.high is None else o.high for o in optima]
    if law is not None and law.low is not None and law.high is not None:
        lows.append(float(law.low.min()))
        highs.append(float(law.high.max()))
    low, high = min(lows, default=0.0), max(highs, default=1.0)
    spare = max(0.3 - (high - low), 0.06) / 2
    return max(low - spare, -0.03), min(high + spare, 1.03)

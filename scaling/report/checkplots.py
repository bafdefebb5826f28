"""The pictures that let a reader doubt a fit: intervals by model, a profile, residuals, held-out runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scaling.report import theme
from scaling.report.document import Picture
from scaling.report.drawing import (
    Array,
    Estimate,
    Label,
    Points,
    finish,
    interval_bar,
    raw,
    ticked,
)

NAMES = 1.5
"""Inches left of a panel whose rows are named."""


def forest(
    label: Label,
    estimates: Sequence[Estimate],
    union: Estimate | None = None,
    *,
    axis: str,
    within: tuple[float, float] | None = None,
) -> Picture:
    """Draw each estimate with its interval, their union last; arrows point where there is no bound.

    The axis shows what the intervals span, and all of `within`, where there is such a range, when one is
    unbounded.
    """
    rows = [*estimates, *([] if union is None else [union])]
    with theme.figure(0.29 * len(rows)) as (drawn, axes):
        known = [v for row in rows for v in (row.low, row.high, row.value) if v is not None]
        blank = (None, None, None)
        drawn_rows = [row for row in rows if (row.value, row.low, row.high) != blank]
        bounded = drawn_rows and all(None not in (row.low, row.high) for row in drawn_rows)
        low, high = (min(known), max(known)) if bounded or within is None else within
        if within is not None:
            low, high = max(low, within[0]), min(high, within[1])
        pad = 0.06 * max(high - low, 0.02)
        limits = (low, high)
        for row, estimate in enumerate(rows):
            last = estimate is union
            if (estimate.value, estimate.low, estimate.high) == blank:
                middle = (limits[0] + limits[1]) / 2
                axes.text(middle, row, estimate.note, va="center", ha="center", color=theme.MUTED, fontsize=9)
                continue
            interval_bar(
                axes,
                estimate,
                float(row),
                limits,
                colour=theme.INK if last else theme.BLUE,
                label=None,
                heavy=last,
            )
        axes.set_yticks(range(len(rows)), [r.name for r in rows])
        axes.set(ylim=(len(rows) - 0.5, -0.5), xlim=(limits[0] - pad, limits[1] + pad), xlabel=axis)
        axes.locator_params(axis="x", nbins=6)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        return finish(drawn, axes, label, left=NAMES)


def profile(
    label: Label,
    x: Array,
    statistic: Array,
    threshold: float,
    *,
    axis: str,
    null: float | None,
    null_label: str,
) -> Picture:
    """Draw a profile statistic of one parameter; the data cannot reject what is under the threshold."""
    with theme.figure(2.1) as (drawn, axes):
        axes.plot(x, statistic, color=theme.BLUE, label="profile F of the fit")
        axes.axhline(threshold, color=theme.VERMILION, ls=(0, (5, 2)), lw=1.2, label="95 % threshold")
        inside = statistic <= threshold
        axes.fill_between(x, 0, statistic, where=inside.tolist(), color=theme.BLUE, alpha=0.12, lw=0)
        if null is not None:
            axes.axvline(null, color=theme.MUTED, lw=0.9, ls=(0, (2, 2)), label=null_label)
        axes.set(ylim=(0, 3.2 * threshold), xlim=(float(x.min()), float(x.max())), xlabel=axis, ylabel="F")
        return finish(drawn, axes, label)


def residuals(
    label: Label,
    points: Points,
    *,
    axis: str,
    log: bool,
    sd: float | None,
) -> Picture:
    """Draw residuals in thousandths of a nat, with a band of two of their SDs each way."""
    with theme.figure(1.9) as (drawn, axes):
        if log:
            axes.set_xscale("log")
        if sd:
            axes.axhspan(
                -2e3 * sd, 2e3 * sd, color=theme.MUTED, alpha=0.12, lw=0, label="± 2 SD of the residuals"
            )
        axes.axhline(0, color=theme.MUTED, lw=0.8)
        raw(axes, Points(x=points.x, y=1e3 * points.y, seed=points.seed), join=False)
        if log:
            ticked(axes, float(points.x.min()), float(points.x.max()))
        axes.set(xlabel=axis, ylabel="residual (0.001 nats)")
        return finish(drawn, axes, label)


def held_out(
    label: Label,
    actual: Array,
    predicted: Sequence[Estimate],
    groups: Sequence[str],
) -> Picture:
    """Draw predictions of runs that the fit did not see against what they turned out to be."""
    with theme.figure(2.7) as (drawn, axes):
        means = np.array([p.value for p in predicted], dtype=float)
        ends = [v for p in predicted for v in (p.low, p.high) if v is not None]
        low, high = min(*ends, *actual, *means), max(*ends, *actual, *means)
        pad = 0.06 * max(high - low, 1e-6)
        axes.plot([low - pad, high + pad], [low - pad, high + pad], color=theme.MUTED, lw=0.9, ls=(0, (2, 2)))
        for number, group in enumerate(dict.fromkeys(groups)):
            colour, marker = theme.SERIES[number % 6], theme.MARKERS[number % 8]
            for x, p, own in zip(actual, predicted, groups, strict=True):
                if own == group and p.low is not None and p.high is not None:
                    axes.plot([x, x], [p.low, p.high], color=colour, lw=1.0, alpha=0.7)
            mine = [own == group for own in groups]
            axes.plot(actual[mine], means[mine], ls="none", marker=marker, color=colour, label=group)
        axes.set(
            xlim=(low - pad, high + pad),
            ylim=(low - pad, high + pad),
            xlabel="measured loss (nats per token)",
            ylabel="predicted loss (nats per token)",
        )
        return finish(drawn, axes, label)

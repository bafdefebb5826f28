"""The pictures of standard laws: loss against size at each budget, the best size, fitted against measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from scaling.report import theme
from scaling.report.document import Picture
from scaling.report.drawing import DRAWN, LOSS, Array, Curve, Estimate, Label, bands, finish, ticked
from scaling.report.numbers import significant


def isoflop(label: Label, budgets: Sequence[tuple[str, Array, Array, Curve]], *, axis: str) -> Picture:
    """Draw loss against size, each budget (name, sizes, losses, the law along it) in its own colour."""
    with theme.figure(3.0) as (drawn, axes):
        axes.set_xscale("log")
        for number, (name, size, loss, curve) in enumerate(budgets):
            colour = theme.SERIES[number % len(theme.SERIES)]
            marker = theme.MARKERS[number % len(theme.MARKERS)]
            dash = theme.DASHES[number // len(theme.SERIES) % len(theme.DASHES)]
            axes.plot(size, loss, marker, color=colour, ms=3.6, mew=0, alpha=0.85, label=name)
            axes.plot(curve.x, curve.mean, color=colour, ls=dash, lw=1.2)
        every = np.concatenate([size for _, size, _, _ in budgets])
        ticked(axes, float(every.min()), float(every.max()))
        axes.set(xlabel=axis, ylabel=LOSS)
        return finish(drawn, axes, label)


def frontier(label: Label, bottoms: Sequence[tuple[float, Estimate]], laws: Sequence[Curve]) -> Picture:
    """Draw the best size against compute: the bottom of each valley with its interval, and what laws say."""
    with theme.figure(2.7) as (drawn, axes):
        axes.set(xscale="log", yscale="log")
        bands(axes, laws)
        heights = [y for law in laws for y in (law.mean, law.low, law.high) if y is not None]
        low = min([float(y.min()) for y in heights] + [b.value for _, b in bottoms if b.value is not None])
        high = max([float(y.max()) for y in heights] + [b.value for _, b in bottoms if b.value is not None])
        for number, (budget, bottom) in enumerate(bottoms):
            if bottom.value is None:
                continue
            ends = (low if bottom.low is None else bottom.low, high if bottom.high is None else bottom.high)
            dash = ":" if None in (bottom.low, bottom.high) else "-"
            axes.plot([budget] * 2, ends, color=theme.INK, lw=1.4, ls=dash, zorder=3)
            said = "bottom of each valley, 95 %" if number == 0 else None
            axes.plot([budget], [bottom.value], "o", color=theme.INK, label=said, zorder=4)
        reach = [float(x) for law in laws for x in (law.x.min(), law.x.max())] + [b for b, _ in bottoms]
        ticked(axes, min(reach), max(reach), say=significant)
        ticked(axes, low, high, of="y")
        axes.set(xlabel="training compute C (FLOPs)", ylabel="best size N* (parameters)")
        return finish(drawn, axes, label)


def agreement(label: Label, measured: Array, fitted: Array) -> Picture:
    """Draw fitted against measured loss; runs on the dashed line are met exactly."""
    with theme.figure(2.7) as (drawn, axes):
        low, high = float(min(measured.min(), fitted.min())), float(max(measured.max(), fitted.max()))
        pad = 0.05 * max(high - low, 1e-6)
        ends = [low - pad, high + pad]
        axes.plot(ends, ends, color=theme.MUTED, lw=0.9, ls=(0, (2, 2)), label="fitted = measured")
        kept = np.linspace(0, len(measured) - 1, min(len(measured), DRAWN)).astype(int)
        dots: dict[str, Any] = {"color": theme.INK, "ms": 3.4, "mew": 0, "alpha": 0.6}
        axes.plot(measured[kept], fitted[kept], "o", label="one run", **dots)
        axes.set(xlim=ends, ylim=ends, xlabel=f"measured {LOSS}", ylabel="fitted loss")
        return finish(drawn, axes, label)

"""What the pictures share: the plain numbers they take, and how runs, bands and intervals are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scaling.report import theme
from scaling.report.document import Picture
from scaling.report.numbers import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
LOSS = "validation loss (nats per token)"
DRAWN = 3000
"""Runs drawn at most; beyond that a picture would be a blot, and slow to open."""
JOINED = 32
"""Seeds joined by lines at most."""
SHARE = "ρ: share of sparse parameters in routed experts"


@dataclass(frozen=True, kw_only=True)
class Label:
    """What is written around a picture."""

    name: str
    """Stem of its file."""
    title: str
    caption: str
    alt: str
    """What it shows, for those who do not see it."""


def finish(drawn: Figure, axes: Axes, label: Label, *, left: float | None = None) -> Picture:
    """Lay a drawn figure out under its title and return it; `left` is its margin in inches."""
    axes.set_title(label.title)
    theme.settle(drawn, axes, left=left)
    return Picture(name=label.name, svg=theme.to_svg(drawn, label.alt), alt=label.alt, caption=label.caption)


@dataclass(frozen=True, kw_only=True)
class Points:
    """Raw runs: position, loss and seed; runs of a seed are joined, as they share data and initial values."""

    x: Array
    y: Array
    seed: Array
    """NaN where a run has none."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A fitted mean with its 95 % band (None where the fit gives none)."""

    name: str
    x: Array
    mean: Array
    low: Array | None = None
    high: Array | None = None


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with an interval; None stands for not identified, or for an end that the data do not bound."""

    name: str
    value: float | None
    low: float | None
    high: float | None
    note: str = ""

    @classmethod
    def of(
        cls, name: str, value: float | None, ends: tuple[float | None, float | None], note: str = ""
    ) -> Estimate:
        """Make one from a value and the two ends of its interval."""
        return cls(name=name, value=value, low=ends[0], high=ends[1], note=note)


def bands(axes: Axes, curves: Sequence[Curve]) -> None:
    """Draw every curve and its band, told apart by colour and by dashes."""
    for number, curve in enumerate(curves):
        colour = theme.SERIES[number % len(theme.SERIES)]
        dash = theme.DASHES[number % len(theme.DASHES)]
        if curve.low is not None and curve.high is not None:
            axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.12, lw=0)
        axes.plot(curve.x, curve.mean, color=colour, ls=dash, label=curve.name, zorder=3)


def joined(seed: Array) -> Array:
    """Return the seeds whose runs are joined by lines: none where they are too many, or each has one run."""
    found, count = np.unique(seed[np.isfinite(seed)], return_counts=True)
    return found if len(seed) <= DRAWN and len(found) <= JOINED and (count > 1).any() else found[:0]


def raw(
    axes: Axes,
    points: Points,
    *,
    hollow: NDArray[np.bool_] | None = None,
    hollow_label: str | None = None,
    label: str | None = "one run",
    join: bool = True,
) -> None:
    """Draw the runs themselves; hollow diamonds are runs of another kind, as those without memory."""
    x, y, seed = points.x, points.y, points.seed
    hollow = np.zeros(len(x), dtype=bool) if hollow is None else hollow
    if len(x) > DRAWN:
        kept = np.sort(np.lexsort((y, x))[np.linspace(0, len(x) - 1, DRAWN).astype(int)])
        label = None if label is None else f"one run ({DRAWN} of {len(x)} drawn)"
        x, y, seed, hollow, join = x[kept], y[kept], seed[kept], hollow[kept], False
    if join:
        for own in joined(seed):
            order = np.flatnonzero(seed == own)
            order = order[np.argsort(x[order], kind="stable")]
            axes.plot(x[order], y[order], color=theme.MUTED, lw=0.6, alpha=0.55, zorder=2)
    solid: dict[str, Any] = {"color": theme.INK, "ms": 3.8, "alpha": 0.75, "mew": 0, "label": label}
    open_: dict[str, Any] = {
        "mfc": theme.PAPER,
        "mec": theme.INK,
        "mew": 1.0,
        "ms": 4.2,
        "label": hollow_label,
    }
    for kind, marker, style in ((~hollow, "o", solid), (hollow, "D", open_)):
        if kind.any():
            axes.plot(x[kind], y[kind], marker, zorder=4, **style)


def interval_bar(
    axes: Axes,
    estimate: Estimate,
    y: float,
    limits: tuple[float, float],
    *,
    colour: str = theme.INK,
    label: str | None = "ρ* and its 95 % interval",
    heavy: bool = True,
) -> None:
    """Draw an interval as a bar with a mark at the estimate; an unbounded end is an arrow at the limit."""
    if estimate.value is None and estimate.low is None and estimate.high is None:
        return
    low = limits[0] if estimate.low is None else estimate.low
    high = limits[1] if estimate.high is None else estimate.high
    axes.plot(
        [low, high],
        [y, y],
        color=colour,
        lw=2.4 if heavy else 1.6,
        solid_capstyle="butt",
        label=label,
        zorder=3,
    )
    if estimate.low is None:
        axes.plot([low], [y], "<", color=colour, ms=5.5, zorder=4)
    if estimate.high is None:
        axes.plot([high], [y], ">", color=colour, ms=5.5, zorder=4)
    if estimate.value is not None:
        axes.plot([estimate.value], [y], "o", color=colour, ms=5.5, mec=theme.PAPER, mew=1.0, zorder=5)


def log_ticks(low: float, high: float) -> list[float]:
    """Return round tick positions, at most about six, between two ends of a log axis."""
    for steps in ((1,), (1, 3), (1, 2, 5)):
        ticks = [
            float(step) * 10.0**power
            for power in range(int(np.floor(np.log10(low))) - 1, int(np.ceil(np.log10(high))) + 1)
            for step in steps
        ]
        ticks = [t for t in ticks if low * 0.98 <= t <= high * 1.02]
        if len(ticks) >= 3:
            return ticks[:: 1 + len(ticks) // 7]
    return ticks or [low, high]


def ticked(
    axes: Axes, low: float, high: float, *, of: str = "x", say: Callable[[float | None], str] = short
) -> None:
    """Put round ticks between two ends on a log axis; `say` names them."""
    ticks = log_ticks(low, high)
    getattr(axes, f"set_{of}ticks")(ticks, [say(tick) for tick in ticks])
    axes.minorticks_off()

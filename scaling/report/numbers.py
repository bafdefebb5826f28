"""Numbers as a reader takes them in: enough digits to compare, none to admire."""

from __future__ import annotations

import math


def short(value: float | None) -> str:
    """Return a count with a suffix: 2048 -> "2.05k", 3.1e6 -> "3.1M", 1e18 -> "1e18"; None -> "–"."""
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    if size >= 9.995e14:
        return f"{value:.3g}".replace("e+", "e")
    for unit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= 0.9995 * unit:
            return f"{value / unit:.3g}{suffix}"
    return f"{value:.3g}" if size != int(size) else str(int(value))


def fixed(value: float | None, digits: int = 3) -> str:
    """Return a number with a fixed number of decimals; None and non-finite values are a dash."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def significant(value: float | None, digits: int = 3) -> str:
    """Return a number with significant digits; None and non-finite values are a dash."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


def duration(seconds: float) -> str:
    """Return a time with its unit: 54.6 -> "54.6 s", 459 -> "7.65 min", 3e4 -> "8.33 h"."""
    for unit, name in ((3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.3g} {name}" if seconds < 1000 * unit else f"{seconds / unit:.0f} {name}"
    return f"{seconds:.3g} s"


def interval(low: float | None, high: float | None, digits: int = 3) -> str:
    """Return "[0.70, 0.85]"; an end that the data do not bound is said so."""
    if low is None and high is None:
        return "unbounded"
    ends = ("unbounded" if end is None else fixed(end, digits) for end in (low, high))
    return f"[{', '.join(ends)}]"


def p_value(value: float | None) -> str:
    """Return "p = 0.03" or "p < 0.001"."""
    if value is None or not math.isfinite(value):
        return "p not available"
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"


def percent(confidence: float) -> str:
    """Return a confidence as people say it: .95 -> "95 %"."""
    return f"{100 * confidence:g} %"


def plural(count: int, noun: str) -> str:
    """Return "1 run" or "3 runs"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def budget_label(budget: float | None) -> str:
    """Return how a budget is called throughout the report."""
    return "one budget" if budget is None else f"C = {significant(budget, 2)} FLOPs"

"""A table of runs in, a checked polars frame with the documented names out."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from scaling.errors import ScalingError, nearest
from scaling.files import load
from scaling.schema import ALIASES, BY_NAME, NAMES, NO_CONTROL, NULLS, STATUS_WORDS, STATUSES, Column, squash

Source = pl.DataFrame | Mapping[str, Any] | str | Path
"""What every fit accepts: a polars frame, a mapping of columns, or the path of a file (`scaling.files`)."""

BUDGET_GAP = 1.15
"""Runs of one budget differ by at most this factor in training compute: the realised FLOPs of an iso-FLOP
sweep scatter by a few per cent, planned budgets differ by a factor of two or more.
"""

_POLARS: dict[type, pl.DataType] = {str: pl.String(), int: pl.Int64(), float: pl.Float64()}


@dataclass(frozen=True, kw_only=True)
class Excluded:
    """Rows that were read but not fitted, and why."""

    reason: str
    rows: tuple[int, ...]
    """Row numbers, counted from 1 without the header; at most the first hundred."""
    count: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"reason": self.reason, "rows": list(self.rows), "count": self.count}


def read(source: Source, columns: Mapping[str, str] | None = None) -> pl.DataFrame:
    """Read runs, give the columns their documented names and check types and ranges.

    `columns` maps a documented name to the name used in the data, and wins over the recognised spellings.
    Columns that are not documented stay as they are. A row without a loss is kept here and left out by the
    fits, which say so. Raises `ScalingError` naming row and column for anything else that cannot be right.
    """
    frame = _load(source)
    if frame.height == 0:
        raise ScalingError("The table has no rows; it needs one row for each run.")
    frame = _rename(frame, columns or {})
    for name in frame.columns:
        if name in BY_NAME:
            frame = frame.with_columns(_typed(frame, BY_NAME[name]))
    if "control" in frame.columns:
        control = pl.col("control").fill_null("")
        none = control.str.to_lowercase().is_in(list(NO_CONTROL))
        frame = frame.with_columns(pl.when(none).then(pl.lit("")).otherwise(control).alias("control"))
    if "status" in frame.columns:
        lower = pl.col("status").str.to_lowercase()
        frame = frame.with_columns(lower.replace_strict(STATUS_WORDS, default=pl.col("status")))
    return frame


def need(frame: pl.DataFrame, *names: str) -> None:
    """Raise `ScalingError` unless every one of `names` is a column."""
    for name in names:
        if name not in frame.columns:
            unit = f" ({BY_NAME[name].unit})" if name in BY_NAME and BY_NAME[name].unit else ""
            what = f"Column {name!r}{unit} is missing; the table has {_listing(frame.columns)}."
            if name not in BY_NAME:
                raise ScalingError(f"{what}{nearest(name, frame.columns)}")
            close = _close(name, frame.columns)
            meant = f"name it with columns={{{name!r}: {close or 'its name'!r}}}".replace("'", '"')
            typed = f"name it with --map {name}={shlex.quote(close) if close else 'NAME'}"
            asked = f" Did you mean {close!r}? If so," if close else " If another column holds it,"
            raise ScalingError(f"{what}{asked} {meant}.", shell=f"{what}{asked} {typed}.")


def _close(name: str, columns: Sequence[str]) -> str:
    """Return the column most like a documented name, or "" when none is like it."""
    spellings = {squash(name), *(alias for alias, meant in ALIASES.items() if meant == name)}
    for column in columns:
        if any(len(spelling) > 2 and spelling in squash(column) for spelling in spellings):
            return column
    bare = {squash(column): column for column in columns}
    close = [m for spelling in spellings for m in difflib.get_close_matches(spelling, bare, 1, 0.75)]
    return bare[close[0]] if close else ""


def finished(
    frame: pl.DataFrame, required: Sequence[str], sweep: str | None = None
) -> tuple[pl.DataFrame, tuple[Excluded, ...]]:
    """Return the rows to fit and what was left out: not finished, controls, other sweeps, no loss.

    A value missing in one of `required` in a row that is otherwise to be fitted is an error that names the
    row.
    """
    need(frame, "loss", *required)
    frame = frame.with_row_index("_row", offset=1)
    excluded: list[Excluded] = []

    def drop(kept: pl.DataFrame, unwanted: pl.Expr, reason: str) -> pl.DataFrame:
        out = kept.filter(unwanted)
        if out.height:
            rows = tuple(int(row) for row in out["_row"].head(100))
            excluded.append(Excluded(reason=reason, rows=rows, count=out.height))
        return kept.filter(~unwanted)

    if "status" in frame.columns:
        state = pl.col("status").fill_null("finished")
        check_statuses(frame["status"])
        for value in STATUSES:
            if value != "finished":
                frame = drop(frame, state == value, value)
    if "control" in frame.columns:
        frame = drop(frame, pl.col("control") != "", "control run")
    if sweep is not None and "sweep" in frame.columns:
        serves = pl.col("sweep").fill_null(sweep).str.contains(sweep, literal=True)
        frame = drop(frame, ~serves, f"another sweep than {sweep!r}")
    frame = drop(frame, pl.col("loss").is_null() | ~pl.col("loss").is_finite(), "loss missing or not finite")
    for name in required:
        held = pl.col(name)
        bad = frame.filter(held.is_null() | ~held.cast(pl.Float64).is_finite())
        if bad.height:
            raise ScalingError(
                f"Row {bad['_row'][0]}, column {name!r}: a finite number is needed, found none."
            )
    if frame.height == 0:
        raise ScalingError(
            "No run is left to fit: "
            + (
                "; ".join(f"{item.count} left out ({item.reason})" for item in excluded)
                or "the table is empty"
            )
            + "."
        )
    return frame, tuple(excluded)


def check_statuses(status: pl.Series) -> None:
    """Refuse a state that no run can have, by a ScalingError."""
    for value in status.drop_nulls().unique().sort():
        if value not in STATUSES:
            raise ScalingError(
                f"Column 'status' has {value!r}; allowed are {', '.join(map(repr, STATUSES))}."
                f"{nearest(value, STATUSES)}"
            )


def budget_groups(budget: np.ndarray) -> np.ndarray:
    """Group index of every run by training compute [n], sorted by compute; see `BUDGET_GAP`.

    A group that spans more than the factor is split at its widest gap, so that no chain of small steps joins
    budgets that are apart.
    """
    values, place = np.unique(np.log(budget), return_inverse=True)
    label = np.zeros(len(values), dtype=int)
    todo, widest = [(0, len(values))], np.log(BUDGET_GAP)
    while todo:
        first, last = todo.pop()
        if values[last - 1] - values[first] <= widest:
            continue
        gaps = np.diff(values[first:last])
        wide = np.flatnonzero(gaps >= gaps.max() * (1 - 1e-9))
        cut = first + 1 + int(wide[np.abs(wide - len(gaps) / 2).argmin()])
        if gaps.max() < widest / 10:  # no gap worth the name: halve the span
            cut = int(np.searchsorted(values, (values[first] + values[last - 1]) / 2))
        label[cut] = 1
        todo += [(first, cut), (cut, last)]
    return np.cumsum(label)[place]


def merged_budgets(budget: np.ndarray) -> str:
    """What was taken for one budget, in words; empty when all values are equal."""
    values = np.unique(budget)
    if len(values) < 2:
        return ""
    return f"{len(values)} values from {values[0]:.4g} to {values[-1]:.4g} FLOPs taken for one budget"


def numbers(frame: pl.DataFrame, name: str) -> np.ndarray:
    """One column as float64 [n]."""
    return frame[name].cast(pl.Float64).to_numpy().astype(float)


def _load(source: Source) -> pl.DataFrame:
    if isinstance(source, pl.DataFrame):
        return source
    if isinstance(source, Mapping):
        try:
            return pl.DataFrame(dict(source), strict=False)
        except (pl.exceptions.PolarsError, TypeError, ValueError) as error:
            raise ScalingError(f"The columns do not form a table: {error}".rstrip(".") + ".") from error
    if not isinstance(source, (str, Path)):
        raise ScalingError(
            f"Runs cannot be read from a {type(source).__name__}; a frame, a mapping or a path is needed."
        )
    return load(Path(source))


def _rename(frame: pl.DataFrame, columns: Mapping[str, str]) -> pl.DataFrame:
    renames: dict[str, str] = {}
    for name, given in columns.items():
        if name not in BY_NAME:
            known = f"which is not a documented column.{nearest(name, NAMES)}"
            raise ScalingError(
                f"columns names {name!r}, {known}",
                shell=f"--map {name}={given} names {name!r}, {known} `scaling columns` lists them.",
            )
        if given not in frame.columns:
            missing = (
                f"which the table does not have; it has {_listing(frame.columns)}."
                f"{nearest(given, frame.columns)}"
            )
            raise ScalingError(
                f"columns maps {name!r} to {given!r}, {missing}",
                shell=f"--map {name}={given} names {given!r}, {missing}",
            )
        renames[given] = name
    taken = set(renames.values())
    meant: dict[str, list[str]] = {}
    for given in frame.columns:
        name = given if given in BY_NAME else ALIASES.get(squash(given), "")
        if name and name not in taken and given not in renames:
            meant.setdefault(name, []).append(given)
    renames |= {_chosen(frame, name, spelt): name for name, spelt in meant.items()}
    # a column displaced by another keeps its data under another name
    clash = {
        name: f"{name}_unmapped" for name in frame.columns if name in renames.values() and name not in renames
    }
    return frame.rename({**clash, **renames})


def _chosen(frame: pl.DataFrame, name: str, spelt: Sequence[str]) -> str:
    """Return which of several spellings of a documented name is meant: its own, or any where all agree."""
    for own in (name, *(given for given in spelt if squash(given) == squash(name))):
        if own in spelt:
            return own
    first = frame[spelt[0]]
    for other in spelt[1:]:
        if not first.equals(frame[other].alias(first.name), null_equal=True):
            said = f"Columns {spelt[0]!r} and {other!r} can both be {name!r}, and they differ; choose with"
            raise ScalingError(
                f'{said} columns={{"{name}": "{spelt[0]}"}}.',
                shell=f"{said} --map {name}={shlex.quote(spelt[0])}.",
            )
    return spelt[0]


def _typed(frame: pl.DataFrame, column: Column) -> pl.Series:
    series = frame[column.name]
    if series.dtype in (pl.Categorical, pl.Enum):
        series = series.cast(pl.String)
    if series.dtype == pl.String:
        stripped = series.str.strip_chars()
        series = stripped.set(stripped.str.to_lowercase().is_in(list(NULLS)).fill_null(False), None)
    if column.kind is str:
        if series.dtype.is_nested() or series.dtype == pl.Object:
            raise ScalingError(f"Column {column.name!r} holds {series.dtype}; text is needed.")
        return series.cast(pl.String)
    if series.dtype == pl.String:
        cast = series.cast(pl.Float64, strict=False)
        bad = (series.is_not_null() & cast.is_null()).arg_true()
        if len(bad):
            row = int(bad[0])
            raise ScalingError(f"Row {row + 1}, column {column.name!r}: {_no_number(series[row])}")
        series = cast
    elif not (series.dtype.is_numeric() or series.dtype in (pl.Boolean, pl.Null)):
        raise ScalingError(f"Column {column.name!r} holds {series.dtype}; numbers are needed.")
    series = series.cast(pl.Float64)
    _check_range(series, column)
    if column.kind is int and column.name == "seed":
        fraction = (series.is_finite() & (series != series.round())).arg_true()
        if len(fraction):
            row = int(fraction[0])
            raise ScalingError(f"Row {row + 1}, column 'seed': {series[row]!r} is not a whole number.")
        wide = (series.is_finite() & (series.abs() >= 2.0**63)).arg_true()
        if len(wide):
            row = int(wide[0])
            raise ScalingError(f"Row {row + 1}, column 'seed': {series[row]!r} must be below 2^63.")
        series = series.set(series.is_infinite().fill_null(False), None)
        return series.fill_nan(None).cast(_POLARS[int]).alias(column.name)
    return series.alias(column.name)


def _no_number(text: str) -> str:
    """Say why a text is no number, and what is."""
    if re.fullmatch(r"[+-]?\d{1,3},\d{3}", text):
        point, none = text.replace(",", "."), text.replace(",", "")
        return f"{text!r} has a comma; write {point!r} if it is a decimal one, else {none!r}."
    if re.fullmatch(r"[+-]?\d*,\d+", text):
        return f"{text!r} has a decimal comma; write {text.replace(',', '.')!r}."
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?", text):
        return f"{text!r} has commas between thousands; write {text.replace(',', '')!r}."
    if text.endswith("%"):
        return f"{text!r} is in per cent; write the share, a number from 0 to 1."
    if re.fullmatch(r"[+-]?\d+(\.\d*)?\s*[kKmMbBgGtT]", text):
        return f"{text!r} has a suffix; write the whole number, such as 1.5e9."
    return f"{text!r} is not a number."


def _check_range(series: pl.Series, column: Column) -> None:
    low, high = column.lower, column.upper
    if column.name == "loss":
        # a diverged run is left out later, with its row number, instead of refusing the table
        series = series.set(series.is_infinite().fill_null(False), None)
    if low is not None:
        below = ((series <= low) if column.exclusive else (series < low)).fill_null(False).arg_true()
        if len(below):
            row = int(below[0])
            bound = f"greater than {low:g}" if column.exclusive else f"at least {low:g}"
            raise ScalingError(f"Row {row + 1}, column {column.name!r}: {series[row]!r} must be {bound}.")
    if high is not None:
        above = ((series > high) & series.is_not_nan()).fill_null(False).arg_true()
        if len(above):
            row = int(above[0])
            top = series.fill_nan(None).max()
            percent = isinstance(top, float) and 2.0 <= top <= 100.0 and column.name.startswith("rho")
            hint = "; if these are per cents, divide them by 100" if percent else ""
            raise ScalingError(
                f"Row {row + 1}, column {column.name!r}: {series[row]!r} must be at most {high:g}{hint}."
            )


def _listing(names: Sequence[str]) -> str:
    names = [name for name in names if name != "_row"]
    shown = ", ".join(repr(name) for name in names[:12])
    return shown + (f" and {len(names) - 12} more" if len(names) > 12 else "")

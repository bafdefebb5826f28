"""What a table of runs says before anything is fitted: who ran, who did not finish, what was held fixed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from scaling.frame import budget_groups, check_statuses, numbers
from scaling.report.document import Table
from scaling.report.numbers import budget_label, fixed, plural, short, significant
from scaling.schema import BY_NAME

ROWS_SHOWN = 500
"""Rows of runs printed on the page; the files beside it always hold every run."""

LONGEST = 24
"""Letters of a run's name on the page; some are hashes, and mlflow_run and the files identify it anyway."""
_SHOWN = (
    "run",
    "status",
    "reason",
    "control",
    "sweep",
    "budget",
    "rho",
    "experts",
    "slots",
    "memory_parameters",
    "total_parameters",
    "tokens",
    "seed",
    "loss",
    "seconds",
    "attempts",
    "openings",
    "mlflow_run",
)
_TEXTS = frozenset({"run", "status", "reason", "control", "sweep", "study", "mlflow_run"})
# What a sweep of shares means to hold equal within a budget; one of memory adds to a fixed backbone.
_EQUAL = frozenset({"budget", "tokens", "total_parameters"})
_FACTORS = (
    "budget",
    "tokens",
    "total_parameters",
    "active_parameters",
    "sparse_parameters",
    "experts",
    "top_k",
    "rho",
    "slots",
    "memory_parameters",
    "total_mismatch",
    "flops_mismatch",
    "seed",
)


@dataclass(frozen=True, kw_only=True)
class Runs:
    """The runs of a study, told apart by what the report does with them."""

    every: pl.DataFrame
    fitted: pl.DataFrame
    """Finished, no control, with a finite loss."""
    controls: pl.DataFrame
    left_out: pl.DataFrame
    """Not finished, or without a finite loss; `status` and `reason` are always filled."""

    @property
    def failed(self) -> int:
        """How many runs failed (or finished without a loss)."""
        return self._count("failed")

    @property
    def interrupted(self) -> int:
        """How many runs were stopped before they finished and can be continued."""
        return self._count("interrupted")

    @property
    def running(self) -> int:
        """How many runs had not finished when they were read."""
        return self._count("running")

    def _count(self, status: str) -> int:
        return self.left_out.filter(pl.col("status") == status).height


def told_apart(frame: pl.DataFrame) -> Runs:
    """Sort the rows of a checked frame (`scaling.frame.read`) into fitted, controls and left out."""
    filled = frame.with_columns(
        _text(frame, "status", "finished"), _text(frame, "control", ""), _text(frame, "reason", "")
    )
    check_statuses(filled["status"])
    has_loss = pl.col("loss").is_finite().fill_null(False)
    lost = (pl.col("status") == "finished") & ~has_loss
    why = (
        pl.when(lost & (pl.col("reason") == ""))
        .then(pl.lit("no finite loss"))
        .when((pl.col("status") == "interrupted") & (pl.col("reason") == ""))
        .then(pl.lit("stopped before it finished"))
        .when((pl.col("status") == "failed") & (pl.col("reason") == ""))
        .then(pl.lit("no reason was recorded"))
        .when((pl.col("status") == "running") & (pl.col("reason") == ""))
        .then(pl.lit("had not finished when the runs were read"))
        .otherwise("reason")
    )
    filled = filled.with_columns(reason=why, status=pl.when(lost).then(pl.lit("failed")).otherwise("status"))
    finished = pl.col("status") == "finished"
    return Runs(
        every=filled,
        fitted=filled.filter(finished & (pl.col("control") == "")),
        controls=filled.filter(finished & (pl.col("control") != "")),
        left_out=filled.filter(~finished),
    )


def _text(frame: pl.DataFrame, name: str, default: str) -> pl.Expr:
    if name not in frame.columns:
        return pl.lit(default, pl.String).alias(name)
    return pl.col(name).cast(pl.String).fill_null(default)


def in_budgets(frame: pl.DataFrame) -> list[tuple[float | None, pl.DataFrame]]:
    """Return the runs of each budget, smallest first, with the budget's median FLOPs (None where unknown)."""
    if "budget" not in frame.columns or frame["budget"].null_count() or frame.is_empty():
        return [(None, frame)]
    group = budget_groups(numbers(frame, "budget"))
    parts = [frame.filter(pl.Series(group == g)) for g in range(int(group.max()) + 1)]
    return [(float(np.median(numbers(part, "budget"))), part) for part in parts]


def overview(runs: Runs) -> Table:
    """Return one line a sweep and budget: how many runs, cells and seeds, at which sizes."""
    lines = tuple(
        (
            name,
            budget_label(budget),
            str(part.height),
            _distinct(part, "rho"),
            _distinct(part, "slots"),
            _distinct(part, "seed"),
            _span(part, "total_parameters"),
            _span(part, "tokens"),
            _lowest(part, "slots" if name == "memory" else "rho"),
        )
        for name, sweep in _sweeps(runs.fitted).items()
        for budget, part in in_budgets(sweep)
    )
    counts = ("runs", "shares ρ", "table sizes", "seeds")
    columns = ("sweep", "budget", *counts, "parameters", "tokens", "lowest mean loss")
    said = [place for place in range(len(columns)) if any(line[place] != "–" for line in lines)]
    return Table(
        title="Runs that were fitted",
        columns=tuple(columns[place] for place in said),
        rows=tuple(tuple(line[place] for place in said) for line in lines),
        numeric=frozenset(counts),
        note="Losses are in the unit of column loss: nats per token, unless the data are in another.",
    )


def _lowest(part: pl.DataFrame, by: str) -> str:
    """Say where the mean over seeds is lowest."""
    if by not in part.columns or part[by].null_count():
        return fixed(float(part["loss"].to_numpy().min()), 4)
    means = part.group_by(by).agg(pl.col("loss").mean()).sort("loss", by)
    at = f"ρ = {means[by][0]:.4g}" if by == "rho" else f"M = {short(means[by][0])}"
    return f"{fixed(means['loss'][0], 4)} at {at}"


def left_out(runs: Runs) -> Table | None:
    """Return the runs that were not fitted and why, or None when there is none."""
    if runs.left_out.is_empty():
        return None
    return Table(
        title="Runs that were not fitted",
        **_listing(
            runs.left_out, ("run", "status", "reason", "budget", "rho", "slots", "seed", "mlflow_run")
        ),
    )


def listing(runs: Runs) -> Table:
    """Return every run with what identifies it, at most `ROWS_SHOWN` of them."""
    order = [
        name for name in ("budget", "control", "rho", "slots", "seed", "run") if name in runs.every.columns
    ]
    frame = runs.every.sort(order, nulls_last=True)
    note = "The same rows, with every column, are in runs.csv and runs.parquet."
    if frame.height > ROWS_SHOWN:
        note = f"The first {ROWS_SHOWN} of {frame.height} runs; runs.csv and runs.parquet hold every one."
    idle = {"reason"} if not frame["reason"].str.len_chars().sum() else set()
    if "attempts" not in frame.columns or frame["attempts"].max() == 1:
        idle.add("attempts")
    if "openings" in frame.columns and frame["openings"].max() == 1:
        idle.add("openings")
    elif "openings" in frame.columns:
        note += " Openings count how often a run was started: 2 is one interruption."
    shown = [name for name in _SHOWN if name not in idle]
    return Table(title="Every run", note=note, long=True, **_listing(frame.head(ROWS_SHOWN), tuple(shown)))


def held_fixed(runs: Runs, mismatch: str = "") -> Table:
    """Return what did and did not vary among the fitted runs of each sweep; `mismatch` says what the columns
    of that name count.
    """
    sweeps = _sweeps(runs.fitted)
    rows = tuple(
        (name, *(_varied(part, name, _matched(sweep, part)) for sweep, part in sweeps.items()))
        for name in _FACTORS
    )
    return Table(
        title="What varied and what was held fixed",
        columns=("column", *sweeps),
        rows=rows,
        note=(
            "Per cents say how far apart the smallest and the largest value within one budget are: the"
            " mismatch of what a budget should hold equal."
            + (f" {mismatch[:1].upper()}{mismatch[1:]}." if mismatch else "")
        ),
    )


def _matched(sweep: str, part: pl.DataFrame) -> frozenset[str]:
    """Return what a sweep means to hold equal within a budget; one of sizes holds its compute alone."""
    if sweep == "memory":
        return frozenset({"tokens"})
    return _EQUAL if {"rho", "slots", "memory_parameters"} & set(part.columns) else frozenset({"budget"})


def _sweeps(fitted: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """Return the runs of each sweep; a run that serves two is in both."""
    if "sweep" not in fitted.columns:
        return {"all runs": fitted}
    served = pl.col("sweep").fill_null("all runs").str.split("+")
    names = fitted.select(served.explode()).to_series().unique().sort()
    return {name: fitted.filter(served.list.contains(name)) for name in names}


def _varied(frame: pl.DataFrame, name: str, matched: frozenset[str]) -> str:
    """Say whether a column varied, over which values, and how far apart they are within a budget."""
    if name not in frame.columns or frame[name].null_count() == frame.height:
        return "not recorded"
    values = frame[name].drop_nulls().unique().sort()
    if len(values) == 1:
        return f"fixed: {_number(name, values[0])}"
    ends = dict.fromkeys((_number(name, values[0]), _number(name, values[-1])))
    said = f"{' to '.join(ends)}, {plural(len(values), 'value')}"
    if name not in matched:
        return said
    spread = 0.0
    for _, part in in_budgets(frame):
        inside = part[name].drop_nulls().cast(pl.Float64).to_numpy()
        if len(inside) and inside.min() > 0:
            spread = max(spread, float(inside.max() / inside.min() - 1))
    return f"{said}; {significant(100 * spread, 2)} %"


def _distinct(frame: pl.DataFrame, name: str) -> str:
    return str(frame[name].drop_nulls().n_unique()) if name in frame.columns else "–"


def _span(frame: pl.DataFrame, name: str) -> str:
    if name not in frame.columns or frame[name].null_count() == frame.height:
        return "–"
    low, high = short(frame[name].min()), short(frame[name].max())  # type: ignore[arg-type]
    return low if low == high else f"{low} to {high}"


def _listing(frame: pl.DataFrame, names: tuple[str, ...]) -> dict[str, Any]:
    kept = [n for n in names if n in frame.columns and (n == "loss" or frame[n].null_count() < frame.height)]
    kept = [n for n in kept if n not in ("control",) or (frame[n] != "").any()]
    rows = tuple(
        tuple(_cell(name, row[name]) for name in kept) for row in frame.select(kept).iter_rows(named=True)
    )
    return {"columns": tuple(kept), "rows": rows, "numeric": frozenset(kept) - _TEXTS}


def _cell(name: str, value: object) -> str:
    if value is None:
        return "–"
    if name not in _TEXTS:
        return _number(name, value)
    text = str(value)
    return f"{text[:LONGEST]}…" if name == "run" and len(text) > LONGEST + 1 else text


def _number(name: str, value: Any) -> str:
    if name in ("rho", "rho_nominal", "loss"):
        return fixed(float(value), 4)
    if name in ("seed", "experts", "top_k", "attempts", "openings") or (
        name in BY_NAME and BY_NAME[name].kind is str
    ):
        return significant(value, 6)
    return significant(float(value), 3) if name == "budget" else short(float(value))

"""Read one study out of an MLflow store into the frame of runs that the rest of `scaling` takes.

What the store must hold is the contract of `scaling.schema`: a run a trial, tagged `kind=trial` and
`study=<name>`, one tag a column (numbers as text, a null as an absent tag), and the final validation loss as
metric `final/loss`; what the run took may be metric `final/seconds`. A SQLite store is read without
importing MLflow; any other address goes through its client.
"""

from __future__ import annotations

import json
import math
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import polars as pl

from scaling.errors import ScalingError, nearest
from scaling.schema import BY_NAME

LOSS_METRIC, SECONDS_METRIC = "final/loss", "final/seconds"

# The columns that a run carries as tags of the same name; the rest of the schema is for other people's
# tables.
TAGS = (
    "study",
    "run",
    "sweep",
    "control",
    "reason",
    "budget",
    "rho",
    "rho_nominal",
    "slots",
    "memory_parameters",
    "total_parameters",
    "active_parameters",
    "sparse_parameters",
    "experts",
    "top_k",
    "tokens",
    "seed",
)

# Tags that say what made a run; they ride along, outside the schema, so that a report can tell mixed runs.
PROVENANCE = ("code_version", "data_hash", "machine")
# Numbers that ride along: how far a cell misses the budget it was to have, as a share of it; how often the
# run was opened, which is more than once where it was interrupted and resumed.
NUMBERS = ("total_mismatch", "flops_mismatch", "openings")

# Numbers of a run's memories at its end (`scaling.report.health`): metrics of this prefix, as columns.
HEALTH = "memory/"

# A run's evaluations (`scaling.report.progress`): the history of this metric, as JSON in a column of its own.
COURSE_METRIC, COURSE = "val/loss", "evaluations"

# MLflow's five states of a run, in the words of the frame.
STATUSES = {
    "FINISHED": "finished",
    "FAILED": "failed",
    "KILLED": "interrupted",
    "RUNNING": "running",
    "SCHEDULED": "running",
}

# MLflow stores an infinity as the largest double (and a NaN as 0 with a flag).
_LARGEST_FINITE = 1.79e308

_LONG = {
    "mlflow_run": pl.String,
    "mlflow_status": pl.String,
    "start_time": pl.Int64,
    "loss": pl.Float64,
    "seconds": pl.Float64,
    "key": pl.String,
    "value": pl.String,
}
_POINTS = {"mlflow_run": pl.String, "step": pl.Int64, "loss": pl.Float64}
_NUMBERS = {"mlflow_run": pl.String, "key": pl.String, "number": pl.Float64}

# `latest_metrics` keeps the value of the largest step, and of the latest time within it: what a resumed run
# appended last.
_TRIALS = """
SELECT r.run_uuid AS mlflow_run, r.status AS mlflow_status, r.start_time AS start_time,
       CASE WHEN m.is_nan THEN NULL ELSE m.value END AS loss,
       CASE WHEN c.is_nan THEN NULL ELSE c.value END AS seconds, t.key AS key, t.value AS value
FROM runs r
JOIN tags s ON s.run_uuid = r.run_uuid AND s.key = 'study' AND s.value = ?
JOIN tags k ON k.run_uuid = r.run_uuid AND k.key = 'kind' AND k.value = 'trial'
JOIN tags t ON t.run_uuid = r.run_uuid
LEFT JOIN latest_metrics m ON m.run_uuid = r.run_uuid AND m.key = ?
LEFT JOIN latest_metrics c ON c.run_uuid = r.run_uuid AND c.key = ?
WHERE r.lifecycle_stage = 'active'
"""

_HEALTH = """
SELECT m.run_uuid AS mlflow_run, m.key AS key, m.value AS number
FROM latest_metrics m
JOIN tags s ON s.run_uuid = m.run_uuid AND s.key = 'study' AND s.value = ?
WHERE m.key LIKE ? AND NOT m.is_nan
"""

_COURSE = """
SELECT m.run_uuid AS mlflow_run, m.step AS step, m.value AS loss
FROM metrics m
JOIN tags s ON s.run_uuid = m.run_uuid AND s.key = 'study' AND s.value = ?
WHERE m.key = ? AND NOT m.is_nan
ORDER BY m.run_uuid, m.step, m.timestamp
"""

_STUDIES = """
SELECT DISTINCT s.value FROM tags s
JOIN tags k ON k.run_uuid = s.run_uuid AND k.key = 'kind' AND k.value = 'trial'
JOIN runs r ON r.run_uuid = s.run_uuid AND r.lifecycle_stage = 'active'
WHERE s.key = 'study' ORDER BY s.value
"""


def _is_sqlite(uri: str) -> bool:
    return uri.startswith("sqlite:")


def studies(uri: str) -> list[str]:
    """Return the names of the studies that have trials in the store, sorted.

    Raises:
        ScalingError: when the store does not exist or is not an MLflow store.
    """
    if _is_sqlite(uri):
        with closing(_open_sqlite(uri)) as connection:
            return [name for (name,) in _query(connection, uri, _STUDIES, {"value": pl.String}, []).rows()]
    return sorted({run.data.tags["study"] for run in _remote_trials(uri, None)})


def read_study(uri: str, study: str) -> pl.DataFrame:
    """Return the study's runs, one row a cell, sorted by run name.

    Columns are those of `scaling.schema`, and others that trace a row back: `code_version` and
    `data_hash`, `machine`, `total_mismatch`, `flops_mismatch` and `openings`, the tags of those names; the
    last value of every metric below `memory/`, by its name; `evaluations`, the history of `val/loss` as JSON;
    `mlflow_run`, the id of the MLflow run it was read from; and `attempts`, how many MLflow runs share
    this row's `run` name. Where a cell was tried more than once, the row is the finished attempt if there
    is one, else the running one, else the latest: nothing is counted twice. Deleted runs are left out. A
    run that MLflow calls finished but whose loss is missing or not finite is `failed`, and `reason` says
    so.

    Args:
        uri: `sqlite:///relative/path.db`, `sqlite:////absolute/path.db`, or any address MLflow's client
            takes.
        study: the value of the tag `study`.

    Raises:
        ScalingError: when the store or the study does not exist, or a tag that should be a number is not one.
    """
    if _is_sqlite(uri):
        with closing(_open_sqlite(uri)) as connection:
            long = _query(connection, uri, _TRIALS, _LONG, [study, LOSS_METRIC, SECONDS_METRIC])
            health = _query(connection, uri, _HEALTH, _NUMBERS, [study, f"{HEALTH}%"])
            points = _query(connection, uri, _COURSE, _POINTS, [study, COURSE_METRIC])
    else:
        trials = _remote_trials(uri, study)
        long = pl.DataFrame([row for run in trials for row in _long_rows(run)], schema=_LONG, orient="row")
        health = pl.DataFrame(
            [
                (run.info.run_id, key, value)
                for run in trials
                for key, value in run.data.metrics.items()
                if key.startswith(HEALTH) and not math.isnan(value)
            ],
            schema=_NUMBERS,
            orient="row",
        )
        points = _remote_points(uri, [run.info.run_id for run in trials])
    if long.is_empty():
        raise ScalingError(_no_such_study(uri, study))
    names = sorted(health["key"].unique())
    numbers = health.pivot(on="key", on_columns=names, index="mlflow_run", values="number")
    wide = _wide(long).join(numbers, on="mlflow_run", how="left")
    return _one_row_a_cell(_typed(wide.join(_courses(points), on="mlflow_run", how="left")), names)


def _no_such_study(uri: str, study: str) -> str:
    known = studies(uri)
    if not known:
        return f"The store {uri!r} holds no study: no run carries the tags kind=trial and study=<name>."
    listed = ", ".join(map(repr, known[:8]))
    return f"The store {uri!r} has no study {study!r}; it has {listed}.{nearest(study, known)}"


def _open_sqlite(uri: str) -> sqlite3.Connection:
    address = uri.removeprefix("sqlite:///").partition("?")[0]
    path = Path(address)
    if not uri.startswith("sqlite:///") or not path.is_file():
        raise ScalingError(
            f"There is no SQLite store at {uri!r} (looked for {str(path.resolve())!r}); the address is"
            " sqlite:///relative/path.db or sqlite:////absolute/path.db."
        )
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=30.0)


def _query(
    connection: sqlite3.Connection, uri: str, sql: str, schema: dict[str, Any], parameters: list[str]
) -> pl.DataFrame:
    try:
        return pl.read_database(
            sql,
            connection,
            infer_schema_length=None,
            schema_overrides=schema,
            execute_options={"parameters": parameters},
        )
    except sqlite3.Error as error:
        raise ScalingError(f"{uri!r} cannot be read as an MLflow store: {error}.") from error


def _remote_trials(uri: str, study: str | None) -> list[Any]:
    """Return the store's trials (of one study, or of all) through MLflow's client, page by page."""
    try:
        from mlflow.entities import ViewType
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient
    except ImportError as error:
        raise ScalingError(
            f"Reading {uri!r} needs the package mlflow; only sqlite:/// stores are read without it."
        ) from error
    wanted = (
        "tags.kind = 'trial'" if study is None else f"tags.kind = 'trial' and tags.study = {_quoted(study)}"
    )
    runs: list[Any] = []
    try:
        client = MlflowClient(tracking_uri=uri)
        experiments = [e.experiment_id for e in _pages(client.search_experiments, view_type=ViewType.ALL)]
        # A request names at most 200 experiments, so that its address stays short enough for any server.
        for first in range(0, len(experiments), 200):
            runs += _pages(
                client.search_runs, experiment_ids=experiments[first : first + 200], filter_string=wanted
            )
    except MlflowException as error:
        raise ScalingError(
            f"The MLflow store {uri!r} did not answer: {str(error).splitlines()[0]}"
        ) from error
    return runs


def _remote_points(uri: str, runs: list[str]) -> pl.DataFrame:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    rows = [
        (run, point.step, point.value)
        for run in runs
        for point in sorted(
            client.get_metric_history(run, COURSE_METRIC), key=lambda p: (p.step, p.timestamp)
        )
        if not math.isnan(point.value)
    ]
    return pl.DataFrame(rows, schema=_POINTS, orient="row")


def _courses(points: pl.DataFrame) -> pl.DataFrame:
    """Return each run's evaluations as JSON; where a resumed run repeated one, the later counts."""
    seen: dict[str, dict[int, float]] = {}
    for run, step, loss in points.iter_rows():
        seen.setdefault(run, {})[step] = loss
    rows = [(run, json.dumps(list(course.items()))) for run, course in seen.items()]
    return pl.DataFrame(rows, schema={"mlflow_run": pl.String, COURSE: pl.String}, orient="row")


def _quoted(value: str) -> str:
    if "'" in value and '"' in value:
        raise ScalingError(
            f"The study name {value!r} holds both kinds of quotes, which MLflow cannot search for."
        )
    return f'"{value}"' if "'" in value else f"'{value}'"


def _pages(search: Any, **arguments: Any) -> list[Any]:
    found: list[Any] = []
    token = None
    while True:
        page = search(max_results=1000, page_token=token, **arguments)
        found += page
        token = page.token
        if not token:
            return found


def _long_rows(run: Any) -> list[tuple[object, ...]]:
    found = [run.data.metrics.get(name) for name in (LOSS_METRIC, SECONDS_METRIC)]
    head = (run.info.run_id, run.info.status, run.info.start_time, *found)
    return [(*head, key, value) for key, value in run.data.tags.items()]


def _wide(long: pl.DataFrame) -> pl.DataFrame:
    """Turn one row a tag into one row a run; every tag of the schema is a column of text."""
    wanted = [*TAGS, *PROVENANCE, *NUMBERS, "mlflow.runName"]
    runs = long.group_by("mlflow_run").agg(pl.col("mlflow_status", "start_time", "loss", "seconds").first())
    tags = (
        long.filter(pl.col("key").is_in(wanted))
        .unique(["mlflow_run", "key"])
        .pivot(on="key", on_columns=wanted, index="mlflow_run", values="value")
    )
    return runs.join(tags, on="mlflow_run", how="left")


def _typed(wide: pl.DataFrame) -> pl.DataFrame:
    """Turn text into numbers, and MLflow's state of a run into what the frame calls its status."""
    loss, seconds = (pl.when(pl.col(n).abs() < _LARGEST_FINITE).then(n) for n in ("loss", "seconds"))
    state = pl.col("mlflow_status")
    lost = (state == "FINISHED") & loss.is_null()
    reason = (
        pl.when(lost)
        .then(pl.coalesce("reason", pl.lit(f"finished without a finite {LOSS_METRIC}")))
        .when(state == "KILLED")
        .then(pl.coalesce("reason", pl.lit("stopped before it finished")))
        .when(state == "FAILED")
        .then(pl.coalesce("reason", pl.lit("failed; no reason was recorded")))
    )
    status = pl.when(lost).then(pl.lit("failed")).otherwise(state.replace_strict(STATUSES, default="failed"))
    names = [*(name for name in TAGS if BY_NAME[name].kind is not str), *NUMBERS]
    numbers = [_number(wide, name) for name in names]
    return wide.with_columns(
        *numbers,
        loss=loss,
        loss_sd=pl.lit(None, pl.Float64),
        seconds=seconds,
        status=status,
        reason=reason,
        run=pl.coalesce("run", "mlflow.runName", "mlflow_run"),
        control=pl.col("control").fill_null(""),
    )


def _number(wide: pl.DataFrame, name: str) -> pl.Series:
    text = wide[name]
    number = text.cast(pl.Float64, strict=False)
    bad = (text.is_not_null() & number.is_null()).arg_true()
    if len(bad):
        row = int(bad[0])
        raise ScalingError(
            f"MLflow run {wide['mlflow_run'][row]}: its tag {name!r} is {text[row]!r}, not a number."
        )
    return number.cast(pl.Int64) if name == "seed" else number


def _one_row_a_cell(runs: pl.DataFrame, health: list[str]) -> pl.DataFrame:
    """Keep the attempt that counts of each cell: finished, else running; of equals the last."""
    ranks = {"finished": 0, "running": 1, "interrupted": 2, "failed": 2}
    rank = pl.col("status").replace_strict(ranks, return_dtype=pl.Int64)
    return (
        runs.with_columns(rank.alias("rank"), pl.len().over("run").alias("attempts"))
        .sort("run", "rank", "start_time", "mlflow_run", descending=[False, False, True, False])
        .unique("run", keep="first", maintain_order=True)
        .select(
            *TAGS,
            "status",
            "loss",
            "loss_sd",
            "seconds",
            *PROVENANCE,
            *NUMBERS,
            *health,
            COURSE,
            "mlflow_run",
            "attempts",
        )
    )

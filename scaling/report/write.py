"""One study, one folder: the page, the same as Markdown, its pictures, the runs and the fits."""

from __future__ import annotations

import hashlib
import io
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl

from scaling.files import CONTEXT, RUNS, RUNS_AS_TEXT
from scaling.frame import read
from scaling.report.analysis import Study, analyse
from scaling.report.html import to_html
from scaling.report.markdown import to_markdown
from scaling.report.page import build
from scaling.report.plain import plain

SCHEMA = 1
"""Version of fits.json; it grows when a name in it changes its meaning or goes away."""


def write_report(
    frame: pl.DataFrame,
    out_dir: str | Path,
    *,
    title: str | None = None,
    context: Mapping[str, object] | None = None,
) -> Path:
    """Fit what the runs hold and write the report; return the path of its page.

    The folder receives report.html (one file that needs nothing else), report.md, figures/*.svg, runs.csv,
    runs.parquet, fits.json and context.json. The same runs and context give the same bytes, and the folder
    alone gives both.

    Args:
        frame: runs, one a row; see `scaling.schema` for the columns. Unfinished runs are listed, not fitted.
        out_dir: the folder; made if absent, and files of these names in it are replaced.
        title: the page's heading; by default the study's name.
        context: what the caller knows and the runs do not say, shown as given. The checklist looks for
            `data`, `data_hash`, `repetition`, `flops`, `mismatch` (what `total_mismatch` and `flops_mismatch`
            leave out), `hyper_parameters`, `code_version`, `machine`, `added` (runs that were chosen after
            results had been seen) and `workers` (how many runs trained at a time); any other name is shown
            too. A list of mappings becomes a table (`mismatches`, the budget's error cell by cell).

    Raises:
        ScalingError: when the frame is no table of runs.
    """
    checked = read(frame)
    study = analyse(checked)
    table = checked.write_csv()
    runs_hash = hashlib.sha256(table.encode()).hexdigest()
    made_with = versions()
    told = plain(dict(context or {}))
    page = build(
        study,
        title=title or _name(checked),
        context=told,
        runs_hash=runs_hash,
        versions=made_with,
    )
    fits = {**to_dict(study), "runs_hash": runs_hash, "versions": made_with}
    folder = Path(out_dir)
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for old in figures.glob("*.svg"):
        old.unlink()
    for picture in page.pictures():
        _put(figures / f"{picture.name}.svg", picture.svg)
    _put(folder / RUNS_AS_TEXT, table)
    parquet = io.BytesIO()
    checked.write_parquet(parquet)
    _put(folder / RUNS, parquet.getvalue())
    for name, content in (("fits.json", plain(fits)), (CONTEXT, told)):
        _put(folder / name, f"{json.dumps(content, indent=1, allow_nan=False, default=str)}\n")
    _put(folder / "report.md", to_markdown(page))
    path = folder / "report.html"
    _put(path, to_html(page))
    return path


def _put(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all: a reader never meets half of one."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    part.replace(path)


def to_dict(study: Study) -> dict[str, Any]:
    """Return a study's fits as plain values: the body of fits.json."""
    runs = study.runs
    return {
        "schema": SCHEMA,
        "runs": {
            "all": runs.every.height,
            "fitted": runs.fitted.height,
            "controls": runs.controls.height,
            "failed": runs.failed,
            "interrupted": runs.interrupted,
        },
        "allocation": [fit.to_dict() for fit in study.allocations],
        "joint": [fit.to_dict() for fit in study.joint],
        "memory": [{"budget": sizes.budget, **sizes.fit.to_dict()} for sizes in study.memories],
        "standard": None if study.standard is None else study.standard.to_dict(),
        "checks": [trial.to_dict() for trial in study.trials],
        "budget_checks": None if study.budget_trial is None else study.budget_trial.to_dict(),
        "next_runs": [run.to_dict() for run in study.next_runs],
        "unfitted": list(study.unfitted),
    }


def versions() -> dict[str, str]:
    """Return the versions that can change a number or a picture."""
    names = ("numpy", "scipy", "polars", "matplotlib")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _name(frame: pl.DataFrame) -> str:
    names = frame["study"].drop_nulls().unique().to_list() if "study" in frame.columns else []
    return f"Study {names[0]}" if len(names) == 1 else "Scaling study"

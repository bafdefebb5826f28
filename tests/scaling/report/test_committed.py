"""Reports in the repository say what this version of the writer says of their runs."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from scaling.report import write_report
from scaling.report.write import versions

REPORTS = Path(__file__).parents[3] / "reports"
FILES = ("context.json", "fits.json", "report.html", "report.md", "runs.csv")


@pytest.mark.parametrize("name", ["allocation-shakedown"])
def test_a_committed_report_is_what_its_runs_and_context_give(name: str, tmp_path: Path) -> None:
    kept = REPORTS / name
    if json.loads((kept / "fits.json").read_text())["versions"] != versions():
        pytest.skip("other library versions may give other digits and pictures")
    context = json.loads((kept / "context.json").read_text())
    write_report(pl.read_parquet(kept / "runs.parquet"), tmp_path, context=context)
    pictures = [f"figures/{file.name}" for file in sorted((kept / "figures").iterdir())]
    assert [f"figures/{file.name}" for file in sorted((tmp_path / "figures").iterdir())] == pictures
    changed = [
        file for file in (*FILES, *pictures) if (kept / file).read_bytes() != (tmp_path / file).read_bytes()
    ]
    assert changed == [], f"make it again: scaling report reports/{name} --out reports/{name}"

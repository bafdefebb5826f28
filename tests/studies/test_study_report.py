"""What a study's report says beyond its runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from made_up_studies import a_study, recorded

from engram_lab.studies.extension import ExtraCell, extend, study_directory
from engram_lab.studies.report import write_study_report


@pytest.mark.parametrize(
    ("mode", "sentence"),
    [("strict", "leaves the router out"), ("published", "leaves out the memory's projections")],
)
def test_what_the_mismatches_leave_out_follows_the_budgets_mode(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, sentence: str
) -> None:
    recipe = a_study(tiny, rho=[0, 0.5, 1]).override({"budget.mode": mode})
    frame = recorded(recipe)
    monkeypatch.setattr("scaling.mlflow_reader.read_study", lambda uri, name: frame)
    page = write_study_report(recipe, tmp_path / "reports", say=lambda line: None)
    assert sentence in page.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("workers", "sentence"),
    [
        (None, "one run at a time on each GPU, or on each core"),
        (1, "one run at a time."),
        (2, "up to 2 runs at a time; those that share a device slow each other down"),
    ],
)
def test_the_cost_says_how_many_ran_at_a_time(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int | None, sentence: str
) -> None:
    recipe = a_study(tiny, rho=[0, 0.5, 1], workers=workers)
    frame = recorded(recipe).with_columns(seconds=40.0)
    monkeypatch.setattr("scaling.mlflow_reader.read_study", lambda uri, name: frame)
    page = write_study_report(recipe, tmp_path / "reports", say=lambda line: None)
    line = next(line for line in page.with_suffix(".md").read_text().splitlines() if "runs cost?" in line)
    assert "| 40 s a run, " in line
    assert sentence in line


def test_the_recipe_shown_claims_no_size_of_vocabulary_that_the_text_decides(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = a_study(tiny, rho=[0, 0.5, 1])
    frame = recorded(recipe)
    monkeypatch.setattr("scaling.mlflow_reader.read_study", lambda uri, name: frame)
    page = write_study_report(recipe, tmp_path / "reports", say=lambda line: None)
    shown = yaml.safe_load(json.loads((page.parent / "context.json").read_text())["recipe"])
    assert "vocab_size" not in shown["model"]
    assert shown["text"]["vocab_size"] == recipe.text.vocab_size


@pytest.mark.parametrize(
    ("cells", "sentence"),
    [
        ((), "| no: every cell is one of the recipe below"),
        ((ExtraCell(rho=0.75, seed=1),), "| yes, 1 beside those of the recipe below: rho 0.75 seed 1; tests"),
    ],
)
def test_the_report_says_which_cells_were_added_after_results_had_been_seen(
    tiny: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cells: tuple[ExtraCell, ...],
    sentence: str,
) -> None:
    recipe = a_study(tiny, rho=[0, 0.5, 1]).override({"tracking.directory": str(tmp_path / "mlruns")})
    study_directory(recipe).mkdir(parents=True)
    extend(study_directory(recipe), cells)
    frame = recorded(recipe)
    monkeypatch.setattr("scaling.mlflow_reader.read_study", lambda uri, name: frame)
    page = write_study_report(recipe, tmp_path / "reports", say=lambda line: None)
    line = next(line for line in page.with_suffix(".md").read_text().splitlines() if "added after" in line)
    assert sentence in line

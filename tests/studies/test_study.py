"""A whole study, from text to report, as the command line runs it; killed, interrupted, grown and changed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from mlflow.tracking import MlflowClient

from engram_lab.cli import main
from engram_lab.studies.queue import StudyQueue
from scaling.mlflow_reader import read_study

STUDY = {"rho": [0, 0.5, 1], "rows_per_head": [40], "seeds": [0, 1], "workers": 2}
CELLS = 8


@pytest.fixture
def file(tiny: dict[str, Any], tmp_path: Path) -> Path:
    study = {**tiny, "kind": "study", "name": "small", "budget": {}, "study": STUDY}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(study))
    return path


def command(file: Path, *arguments: str) -> list[str]:
    reports = str(file.parent / "reports")
    return [sys.executable, "-m", "engram_lab.cli", "run", str(file), "--reports", reports, *arguments]


def run(file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(file, *arguments),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=file.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def frame(file: Path) -> pl.DataFrame:
    recipe = yaml.safe_load(file.read_text())
    return read_study(recipe["tracking"]["uri"], recipe["name"])


def parent_status(file: Path) -> str:
    recipe = yaml.safe_load(file.read_text())
    client = MlflowClient(recipe["tracking"]["uri"])
    experiment = client.get_experiment_by_name(recipe["name"])
    assert experiment is not None
    (parent,) = client.search_runs([experiment.experiment_id], "tags.kind = 'study'")
    return str(parent.info.status)


@pytest.mark.slow
def test_a_study_runs_from_text_to_report_and_a_second_call_trains_nothing(file: Path) -> None:
    first = run(file)
    assert first.returncode == 0, first.stderr
    page = file.parent / "reports" / "small" / "report.html"
    assert str(page) in first.stdout
    assert page.stat().st_size > 10_000
    runs = frame(file)
    kept = {path.stem: yaml.safe_load(path.read_text()) for path in page.parent.glob("configurations/*")}
    assert {run: recipe["seed"] for run, recipe in kept.items()} == dict(runs.select("run", "seed").rows())
    assert len(runs) == CELLS == runs["run"].n_unique()
    assert set(runs["status"]) == {"finished"}
    assert runs["loss"].is_finite().all()
    assert (runs["seconds"] > 0).all()
    assert "| What did the runs cost? | not stated" not in page.with_suffix(".md").read_text()
    assert sorted(runs["sweep"].unique()) == ["allocation", "allocation+memory", "memory"]
    assert parent_status(file) == "FINISHED"
    # A second call trains nothing again; the study grows by a share, and refuses what would lose its cells.
    results = {path: path.stat().st_mtime_ns for path in file.parent.glob("mlruns/runs/*/result.json")}
    assert len(results) == CELLS
    grown = run(file, "--study.rho=[0,0.2,0.5,1]")
    assert grown.returncode == 0, grown.stderr
    assert f"{CELLS} finished before" in grown.stdout
    assert all(path.stat().st_mtime_ns == before for path, before in results.items())
    after = frame(file)
    assert len(after) == CELLS + 2
    assert (
        runs.select("run", "loss")
        .join(after, on="run")
        .select(pl.col("loss") == pl.col("loss_right"))["loss"]
        .all()
    )
    changed = run(file, "--optimizer.learning_rate=0.1", "--study.rho=[0,0.2,0.5,1]")
    assert changed.returncode == 2
    assert "optimizer.learning_rate changed" in changed.stderr
    assert len(frame(file)) == CELLS + 2


@pytest.mark.slow
def test_killed_at_random_moments_and_interrupted_every_cell_counts_once(file: Path) -> None:
    chance = random.Random(1)
    for attempt, how in enumerate((signal.SIGKILL, signal.SIGINT, signal.SIGKILL)):
        process = subprocess.Popen(
            command(file), cwd=file.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        queue_file = file.parent / "mlruns" / "studies" / "small" / "journal.log"
        size = queue_file.stat().st_size if queue_file.exists() else 0
        while process.poll() is None and (
            not queue_file.exists() or queue_file.stat().st_size <= size + 4000 * (not attempt)
        ):
            time.sleep(0.05)
        time.sleep(chance.uniform(0.0, 3.0))
        process.send_signal(how)
        _, errors = process.communicate(timeout=120)
        if process.returncode >= 0:
            assert process.returncode in (0, 130), errors
            assert "Traceback" not in errors
    finished = run(file)
    assert finished.returncode == 0, finished.stderr
    states = StudyQueue(file.parent / "mlruns" / "studies" / "small", "small").states()
    assert len(states) == CELLS
    assert {cell.state for cell in states} == {"finished"}
    runs = frame(file)
    assert len(runs) == CELLS == runs["run"].n_unique()
    assert set(runs["status"]) == {"finished"}
    assert parent_status(file) == "FINISHED"


@pytest.mark.slow
def test_a_study_that_sigterm_stops_has_saved_its_cells_and_says_so(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    process = subprocess.Popen(
        command(file, "--data.tokens=1280000", "--data.repeat=true"),
        cwd=file.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    runs = file.parent / "mlruns" / "runs"
    while process.poll() is None and len({c.parent for c in runs.glob("*/checkpoints/*.ckpt")}) < 2:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    assert "Traceback" not in errors
    assert "continues where this stopped" in errors
    assert parent_status(file) == "KILLED"
    monkeypatch.chdir(file.parent)
    assert main(["study", "status", "small"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("2 interrupted, ")


@pytest.mark.slow
def test_a_diverged_cell_is_marked_and_the_others_are_fitted(file: Path) -> None:
    recipe = yaml.safe_load(file.read_text())
    recipe["study"] = {
        "rho": [0, 0.5, 1],
        "workers": 2,
        "controls": {"wild": {"optimizer.learning_rate": 1e30, "optimizer.gradient_clip": 0}},
        "control_rho": [0.5],
    }
    file.write_text(yaml.safe_dump(recipe))
    done = run(file)
    assert done.returncode == 1
    assert "diverged: the training loss was nan" in done.stdout
    runs = frame(file)
    assert runs.filter(pl.col("status") == "failed")["control"].to_list() == ["wild"]
    assert "wild" in (file.parent / "reports" / "small" / "report.md").read_text()

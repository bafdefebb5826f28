"""Whole runs of a recipe, in this process and from the command line, and what they left."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import yaml
from mlflow.tracking import MlflowClient

from engram_lab.recipe import Recipe
from engram_lab.training.run import train


def curves(recipe: Recipe, metric: str) -> dict[int, float]:
    """The last value a step of the recipe's only run."""
    client = MlflowClient(recipe.tracking.uri)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert len(runs) == 1, "a resumed run continues in the same MLflow run"
    return {m.step: m.value for m in client.get_metric_history(runs[0].info.run_id, metric)}


def status(recipe: Recipe) -> tuple[str, str | None]:
    client = MlflowClient(recipe.tracking.uri)
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return run.info.status, run.data.tags.get("reason")


def moved(recipe: Recipe, folder: Path) -> Recipe:
    """The same run, recorded elsewhere."""
    tracking = replace(recipe.tracking, uri=f"sqlite:///{folder}/mlflow.db", directory=str(folder))
    return replace(recipe, tracking=tracking)


def start(file: Path) -> subprocess.Popen[bytes]:
    """Run it from the command line, in a session of its own: a signal to that reaches all its processes."""
    return subprocess.Popen(
        [sys.executable, "-m", "engram_lab.cli", "run", str(file)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def to_the_end(recipe: Recipe, folder: Path) -> None:
    """Train it; from the command line where that starts several processes."""
    if recipe.trainer["devices"] == 1:
        train(recipe, progress_bar=False)
        return
    file = folder / "to_the_end.yaml"
    folder.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(recipe.to_dict()))
    process = start(file)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()

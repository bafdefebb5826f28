"""Which runs there are, by their folders: whether a model was trained on its own or in a study.

A run that ended without a result left the same folder whether it was stopped or failed: which of them, the
store knows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import yaml
from filelock import FileLock, Timeout

from engram_lab.errors import UserError

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a study has hundreds of recipes to read
MOST_RUNS = 50_000  # the largest page that MLflow hands out
State = Literal["finished", "running", "failed", "unfinished", "damaged"]


@dataclass(frozen=True, kw_only=True)
class ListedRun:
    """A run's folder in one line."""

    identity: str
    name: str
    """The recipe's: of a study's cell, that of the study."""
    cell: str
    """What the study calls it; of a model trained on its own, its share and its seed."""
    loss: float | None
    """Final validation loss in nats a token; None while the run is unfinished, or damaged."""
    state: State
    """`running` is what a process of this machine trains right now, `damaged` one whose result is."""
    reason: str
    """What is damaged, or why it failed, as far as the store knows."""
    saved_step: int | None
    """Step of the checkpoint that an unfinished run goes on from."""


def runs(directory: Path) -> list[ListedRun]:
    """The runs below `directory` (a recipe's tracking.directory), by the time they were begun or last gone on
    with.
    """
    recipes = sorted((directory / "runs").glob("*/recipe.yaml"), key=lambda file: file.stat().st_mtime)

    @cache
    def labels(study: str) -> dict[str, str]:
        return _labels(directory / "studies" / study / "job.json")

    failed = cache(_failed)
    return [_listed(file, labels, failed) for file in recipes]


def _listed(
    file: Path, labels: Callable[[str], dict[str, str]], failed: Callable[[str, str], dict[str, str]]
) -> ListedRun:
    recipe = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    rho, identity = recipe["budget"]["rho"], file.parent.name
    alone = ("" if rho is None else f"rho {rho:g} ") + f"seed {recipe['seed']}"
    loss: float | None = None
    state: State = "unfinished"
    reason = ""
    result = file.with_name("result.json")
    if result.exists():
        try:
            loss = float(json.loads(result.read_text(encoding="utf-8"))["loss"])
            state = "finished"
        except (OSError, ValueError, KeyError, TypeError):  # the other runs are worth listing without it
            state, reason = "damaged", "result.json cannot be read"
    elif _held(file.with_name("lock")):
        state = "running"
    elif (known := failed(recipe["tracking"]["uri"], recipe["name"]).get(identity)) is not None:
        state, reason = "failed", known
    return ListedRun(
        identity=identity,
        name=recipe["name"],
        cell=labels(recipe["name"]).get(identity, alone),
        loss=loss,
        state=state,
        reason=reason,
        saved_step=saved_step(file.parent),
    )


def saved_step(run: Path) -> int | None:
    """Step of the checkpoint that the run in this folder goes on from, or None."""
    return max((int(step.stem.split("=")[1]) for step in run.glob("checkpoints/step=*.ckpt")), default=None)


def _labels(job: Path) -> dict[str, str]:
    """What a study calls its cells, by the identities of their runs."""
    if not job.is_file():
        return {}
    cells = json.loads(job.read_text(encoding="utf-8"))["cells"]
    return {identity: cell["label"] for identity, cell in cells.items()}


def _held(lock: Path) -> bool:
    """Say whether a process holds the lock that a run is trained under (`engram_lab.training.run`)."""
    if not lock.exists():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # a folder that may only be read: whether it is held cannot be asked
        return False


def _failed(uri: str, experiment: str) -> dict[str, str]:
    """Why the experiment's runs failed that the store calls so, by identity; none where no store answers."""
    from engram_lab.tracking import names
    from engram_lab.tracking.client import client, database_path, one_sentence, resolve

    try:
        uri = resolve(uri)
        if (path := database_path(uri)) is not None and not (path.exists() and path.stat().st_size):
            return {}  # MLflow would make one
        with one_sentence(uri):
            found = client(uri).get_experiment_by_name(experiment)
            if found is None:
                return {}
            runs = client(uri).search_runs(
                [found.experiment_id], "attributes.status = 'FAILED'", max_results=MOST_RUNS
            )
    except UserError:  # the folders are worth listing without it
        return {}
    tags = [run.data.tags for run in runs]
    return {known.get(names.IDENTITY, ""): known.get(names.REASON, "") for known in tags}

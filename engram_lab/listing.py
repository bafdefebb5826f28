"""Which runs there are, from their folders alone: whether a model was trained on its own or in a study."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import yaml

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a study has hundreds of recipes to read


@dataclass(frozen=True, kw_only=True)
class ListedRun:
    """A run's folder in one line."""

    identity: str
    name: str
    """The recipe's: of a study's cell, that of the study."""
    rho: float | None
    """Nominal; None for a network taken as written."""
    seed: int
    loss: float | None
    """Final validation loss in nats a token; None while the run is unfinished."""
    saved_step: int | None
    """Step of the checkpoint that an unfinished run goes on from."""


def runs(directory: Path) -> list[ListedRun]:
    """The runs below `directory` (a recipe's tracking.directory), by the time they were begun or last gone on
    with.
    """
    recipes = sorted((directory / "runs").glob("*/recipe.yaml"), key=lambda file: file.stat().st_mtime)
    return [_listed(file) for file in recipes]


def _listed(file: Path) -> ListedRun:
    recipe = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    result, steps = file.with_name("result.json"), file.parent.glob("checkpoints/step=*.ckpt")
    return ListedRun(
        identity=file.parent.name,
        name=recipe["name"],
        rho=recipe["budget"]["rho"],
        seed=recipe["seed"],
        loss=json.loads(result.read_text())["loss"] if result.exists() else None,
        saved_step=max((int(step.stem.split("=")[1]) for step in steps), default=None),
    )

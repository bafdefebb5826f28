"""Studies of the tiny recipe, and losses for their cells without training."""

from __future__ import annotations

from typing import Any

import polars as pl

from engram_lab.recipe import Recipe
from engram_lab.studies.plan import plan
from engram_lab.text import prepare
from engram_lab.training.run import columns


def a_study(tiny: dict[str, Any], **study: Any) -> Recipe:
    """A study whose shares divide ten experts."""
    return Recipe.from_dict({**tiny, "kind": "study", "budget": {}, "study": study})


def recorded(recipe: Recipe) -> pl.DataFrame:
    """The runs of the study's allocation sweep, with losses on a valley about .6."""
    rows: list[dict[str, Any]] = []
    for cell in plan(recipe, prepare(recipe.text)):
        described = columns(cell.run, cell.tags)
        bump = 0.001 * ((7 * len(rows)) % 5 - 2)
        rows.append({**described, "status": "finished", "loss": 3 + (described["rho"] - 0.6) ** 2 + bump})
    return pl.DataFrame(rows)

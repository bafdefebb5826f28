"""From a study's runs to its report: the frame is read, and what the runs do not say is added as context."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import torch
import yaml

from engram_lab.errors import UserError
from engram_lab.recipe import Recipe
from engram_lab.tracking.version import code_version


def write_study_report(recipe: Recipe, reports: Path, *, say: Callable[[str], None]) -> Path:
    """Fit the study's runs and write `<reports>/<study>/`; returns the path of report.html.

    Raises:
        UserError: the store holds no runs of the study, or the report cannot be written.
    """
    from scaling.errors import ScalingError
    from scaling.mlflow_reader import read_study
    from scaling.report import write_report

    say("fitting and writing the report")
    try:
        frame = read_study(recipe.tracking.uri, recipe.name)
        return write_report(frame, reports / recipe.name, title=recipe.name, context=_context(recipe, frame))
    except ScalingError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(
            f"the report cannot be written to {reports / recipe.name}: {error.strerror}."
        ) from error


def _context(recipe: Recipe, frame: pl.DataFrame) -> dict[str, Any]:
    """What the runs' columns do not say: text, counting conventions, recipe, code and machine."""
    hashes = frame["data_hash"].drop_nulls().unique().sort().to_list() if "data_hash" in frame.columns else []
    return {
        "data": f"{recipe.text.source}, validation by document",
        "data_hash": ", ".join(digest[:16] for digest in hashes),
        "repetition": "allowed by the recipe"
        if recipe.data.repeat
        else "none: every training token is fresh",
        "flops": "training, forward and backward, a multiply-add counted as two; scores over the whole "
        "sequence and the output head included",
        "parameters": "all but the token embedding and the output head",
        "metric": "validation loss after the last step, nats per token",
        "checkpoints": "one, after the last step",
        "smoothing": "no: neither smoothed nor interpolated",
        "recipe": yaml.safe_dump(recipe.to_dict(), sort_keys=False),
        "code": code_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores"
        + (f", {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else ""),
    }

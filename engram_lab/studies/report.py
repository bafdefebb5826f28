"""From a study's runs to its report: the frame is read, and what the runs do not say is added as context."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from engram_lab.errors import UserError
from engram_lab.recipe import Recipe, run_directory
from engram_lab.studies.extension import ExtraCell, read_extension, study_directory

MISMATCH = {
    "strict": "the mismatch of FLOPs leaves the router out, whose FLOPs grow with the experts; the column "
    "budget counts it",
    "published": "the mismatch of parameters leaves out the memory's projections, which come on top; the "
    "column total_parameters counts them",
}
"""By budget.mode: what `total_mismatch` and `flops_mismatch` leave out (`engram_lab.budget.solve`)."""


def write_study_report(recipe: Recipe, reports: Path, *, say: Callable[[str], None]) -> Path:
    """Fit the study's runs and write `<reports>/<study>/`; returns the path of report.html.

    Beside the report lies every run's recipe, `configurations/<run>.yaml`, where the runs' folders are here.

    Raises:
        UserError: the store holds no runs of the study, or the report cannot be written.
    """
    from scaling.errors import ScalingError
    from scaling.mlflow_reader import read_study
    from scaling.report import write_report

    say("fitting and writing the report")
    try:
        frame = read_study(recipe.tracking.uri, recipe.name)
        page = write_report(frame, reports / recipe.name, context=_context(recipe, frame))
        _keep_configurations(recipe, frame["run"].to_list(), page.parent / "configurations")
        return page
    except ScalingError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(
            f"the report cannot be written to {reports / recipe.name}: {error.strerror}."
        ) from error


def _keep_configurations(recipe: Recipe, runs: Iterable[str], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.yaml"):
        old.unlink()
    for run in runs:
        file = run_directory(recipe, run) / "recipe.yaml"
        if file.is_file():
            shutil.copyfile(file, folder / f"{run}.yaml")


def _context(recipe: Recipe, frame: pl.DataFrame) -> dict[str, Any]:
    """What the runs' columns do not say: text, counting conventions, recipe."""
    said = recipe.to_dict()
    del said["model"]["vocab_size"]  # the text's tokenizer decides it, whatever stands there
    hashes = frame["data_hash"].drop_nulls().unique().sort().to_list() if "data_hash" in frame.columns else []
    return {
        "data": f"{recipe.text.source}, validation by document",
        "data_hash": ", ".join(digest[:16] for digest in hashes),
        "repetition": "allowed by the recipe"
        if recipe.data.repeat
        else "none: every training token is fresh",
        "flops": "training, forward and backward, a multiply-add counted as two; scores over the whole "
        "sequence and the output head included",
        "mismatch": MISMATCH[recipe.budget.mode],
        "parameters": "all but the token embedding and the output head",
        "metric": "validation loss after the last step, nats per token",
        "checkpoints": "one, after the last step",
        "smoothing": "no: neither smoothed nor interpolated",
        "added": _added(read_extension(study_directory(recipe))),
        "workers": _workers(None if recipe.study is None else recipe.study.workers),
        "recipe": yaml.safe_dump(said, sort_keys=False),
    }


def _added(cells: Sequence[ExtraCell]) -> str:
    """Say which cells were chosen after results had been seen."""
    if not cells:
        return "no: every cell is one of the recipe below"
    named = "; ".join(f"rho {cell.rho:g} seed {cell.seed}" for cell in cells)
    return (
        f"yes, {len(cells)} beside those of the recipe below: {named}; tests and intervals take all cells "
        "for chosen beforehand"
    )


def _workers(most: int | None) -> str:
    """Say how many runs the recipe lets train at a time, and what that does to their seconds."""
    if most is None:
        return "one run at a time on each GPU, or on each core where there is no GPU"
    if most == 1:
        return "one run at a time"
    return (
        f"up to {most} runs at a time; those that share a device slow each other down, and their sum counts "
        "its time more than once"
    )

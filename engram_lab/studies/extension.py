"""Cells added to a study after it was planned: the runs that would say most, given those there are."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from engram_lab.budget import solve
from engram_lab.errors import UserError
from engram_lab.files import write_atomically
from engram_lab.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class ExtraCell:
    """An allocation cell beside those of the recipe."""

    rho: float
    seed: int


def study_directory(recipe: Recipe) -> Path:
    """Where the study's queue, job, logs and added cells live."""
    return Path(recipe.tracking.directory) / "studies" / recipe.name


def read_extension(directory: Path) -> tuple[ExtraCell, ...]:
    """The cells added to the study in `directory`, in the order they were added."""
    file = directory / "extension.json"
    return tuple(ExtraCell(**cell) for cell in json.loads(file.read_text())) if file.exists() else ()


def extend(directory: Path, cells: Iterable[ExtraCell]) -> tuple[ExtraCell, ...]:
    """Add cells to the study; the next run of it trains them. Returns those that were not there before."""
    known = read_extension(directory)
    new = tuple(dict.fromkeys(cell for cell in cells if cell not in known))
    write_atomically(
        directory / "extension.json", json.dumps([asdict(cell) for cell in (*known, *new)], indent=1)
    )
    return new


def only_budget(recipe: Recipe) -> tuple[str, Recipe]:
    """The name of the study's budget, "" where it has no name, and the recipe that cells are added to.

    Raises:
        UserError: there are several.
    """
    assert recipe.study is not None
    budgets = recipe.study.budgets or {"": {}}
    if len(budgets) > 1:
        raise UserError(
            f"the study {recipe.name!r} has {len(budgets)} budgets; cells are added to a study of one. "
            "Add shares or seeds to its recipe instead."
        )
    ((name, fields),) = budgets.items()
    return name, recipe.override(fields)


def settle(
    recipe: Recipe, cells: Iterable[ExtraCell], before: Iterable[ExtraCell] = ()
) -> tuple[tuple[ExtraCell, ...], tuple[ExtraCell, ...]]:
    """Return the cells that are new to the study, and those that it has: of its recipe or added `before`.

    A share stands for the whole number of experts it rounds to, and is called as the study already calls it.

    Raises:
        UserError: a cell that cannot be built, or a study of several budgets.
    """
    study, recipe = recipe.study, only_budget(recipe)[1]
    assert study is not None
    before = tuple(before)
    called: dict[int, float] = {}
    for rho in (*study.rho, *(cell.rho for cell in before)):
        called.setdefault(_experts(recipe, rho), rho)
    known = {*before, *(ExtraCell(rho=rho, seed=seed) for rho in study.rho for seed in study.seeds)}
    new: list[ExtraCell] = []
    there: list[ExtraCell] = []
    for cell in cells:
        named = replace(cell, rho=called.setdefault(_experts(recipe, cell.rho), cell.rho))
        (there if named in known else new).append(named)
        known.add(named)
    return tuple(new), tuple(there)


def propose(recipe: Recipe, count: int) -> tuple[ExtraCell, ...]:
    """The runs at `count` shares that would narrow the interval of the best share most, by the runs so far.

    Only shares that come out as a whole number of experts and whose memory can be built are proposed, each
    with every seed that pairs it with the others.

    Raises:
        UserError: the study has several budgets, or its runs do not support a proposal.
    """
    from scaling import fit_allocation
    from scaling.errors import ScalingError
    from scaling.mlflow_reader import read_study
    from scaling.sequential import next_runs, shares_in_reach

    recipe = only_budget(recipe)[1]
    try:
        fit = fit_allocation(read_study(recipe.tracking.uri, recipe.name))
        shares = [rho for rho in shares_in_reach(fit).tolist() if _can_be_built(recipe, rho)]
        return tuple(ExtraCell(rho=run.rho, seed=run.seed) for run in next_runs(fit, count, shares))
    except ScalingError as error:
        raise UserError(str(error)) from error


def _experts(recipe: Recipe, rho: float) -> int:
    """The experts of the cell at that share."""
    budget = replace(recipe.budget, rho=rho)
    return solve(recipe.model, budget, sequence_length=recipe.data.sequence_length).experts


def _can_be_built(recipe: Recipe, rho: float) -> bool:
    try:
        _experts(recipe, rho)
    except UserError:
        return False
    return True

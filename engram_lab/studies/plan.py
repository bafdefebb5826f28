"""From a study recipe to its cells: every run of it, resolved, once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from engram_lab.errors import UserError
from engram_lab.recipe import Recipe, ResolvedRun, resolve
from engram_lab.studies.extension import ExtraCell, only_budget

if TYPE_CHECKING:
    from engram_lab.text import TokenCorpus, UnreadText

MAIN_BUDGET = "main"  # the only budget of a study that names none


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a study.

    Args:
        sweep: which fits it serves: `allocation`, `memory`, or `allocation+memory`.
        budget: name of its budget.
        control: name of its control, or "" for none.
        rho: nominal share of the routed experts.
        rows_per_head: size of the added table; 0 in an allocation sweep.
        run: the resolved run.
    """

    sweep: str
    budget: str
    control: str
    rho: float
    rows_per_head: int
    run: ResolvedRun

    @property
    def label(self) -> str:
        """A name for people, such as `rho 0.8 seed 1` or, in a memory sweep, `table 2048 seed 1`."""
        what = f"table {self.rows_per_head}" if self.sweep == "memory" else f"rho {self.rho:g}"
        parts = [self.budget if self.budget != MAIN_BUDGET else "", self.control, what]
        return " ".join([p for p in parts if p] + [f"seed {self.run.recipe.seed}"])

    @property
    def tags(self) -> dict[str, Any]:
        """The columns a study adds to those of the run."""
        tags: dict[str, Any] = {"study": self.run.recipe.name, "sweep": self.sweep, "control": self.control}
        tags["budget_name"] = self.budget
        if self.sweep == "memory":
            tags["rho"] = 1.0  # all experts stay: a table comes on top
        return tags


def plan(
    recipe: Recipe, corpus: TokenCorpus | UnreadText, extra: Iterable[ExtraCell] = ()
) -> tuple[Cell, ...]:
    """Resolve every cell, in the order they are run: seed by seed, so that an early look sees whole curves.

    `extra` cells, added since the study was planned, come last; those the recipe has anyway are passed over.

    Raises:
        UserError: two values of an axis that come out as the same run, or a cell that cannot be built.
    """
    assert recipe.study is not None
    cells: dict[str, Cell] = {}
    for cell in _cells(recipe, corpus):
        twin = cells.get(cell.run.identity)
        if twin is None:
            cells[cell.run.identity] = cell
        elif {twin.sweep, cell.sweep} == {"allocation", "memory"} and not cell.control:
            cells[cell.run.identity] = replace(twin, sweep="allocation+memory")
        else:
            raise UserError(
                f"the cells {twin.label!r} and {cell.label!r} come out as the same run "
                f"({cell.run.allocation.experts} experts, {cell.run.allocation.slots:,} rows); "
                "remove one of them, or enlarge the budget."
            )
    for place in extra:
        budget, base = only_budget(recipe)
        changes = {"kind": "train", "study": None, "seed": place.seed, "budget.rho": place.rho}
        added = Cell(
            sweep="allocation",
            budget=budget or MAIN_BUDGET,
            control="",
            rho=place.rho,
            rows_per_head=0,
            run=resolve(base.override(changes), corpus),
        )
        cells.setdefault(added.run.identity, added)
    return tuple(cells.values())


def _cells(recipe: Recipe, corpus: TokenCorpus | UnreadText) -> Iterator[Cell]:
    study = recipe.study
    assert study is not None
    places: list[tuple[str, str, float, int, dict[str, Any]]] = []  # sweep, control, rho, rows a head, fields
    for rho in study.rho:
        places.append(("allocation", "", rho, 0, {"budget.rho": rho}))
    for control, changes in study.controls.items():
        for rho in study.control_rho:
            places.append(("allocation", control, rho, 0, {"budget.rho": rho, **changes}))
    if study.rows_per_head:
        places.append(("memory", "", 1.0, 0, {"budget.rho": None, "model.engram": None}))
    for rows in study.rows_per_head:
        places.append(("memory", "", 1.0, rows, {"budget.rho": None, "model.engram.rows_per_head": rows}))
    budgets: Mapping[str, Mapping[str, Any]] = study.budgets or {MAIN_BUDGET: {}}
    for seed in study.seeds:
        for budget, fields in budgets.items():
            base = recipe.override({**fields, "kind": "train", "study": None, "seed": seed})
            for sweep, control, rho, rows, changes in places:
                yield Cell(
                    sweep=sweep,
                    budget=budget,
                    control=control,
                    rho=rho,
                    rows_per_head=rows,
                    run=resolve(base.override(changes), corpus),
                )

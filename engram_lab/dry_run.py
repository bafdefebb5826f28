"""What a recipe would run, printed before anything is spent."""

from __future__ import annotations

from dataclasses import dataclass, field

from engram_lab.budget import Allocation, budget_table, component_table
from engram_lab.recipe import Recipe, resolve
from engram_lab.studies.extension import read_extension, study_directory
from engram_lab.studies.plan import MAIN_BUDGET, Cell, plan
from engram_lab.text import TokenCorpus, UnreadText


@dataclass
class _Group:
    """Different networks of one sweep at one budget, over all seeds."""

    names: list[str] = field(default_factory=list)
    allocations: list[Allocation] = field(default_factory=list)
    sequence_length: int = 0


def dry_run(recipe: Recipe, text: TokenCorpus | UnreadText, *, components: bool = False) -> None:
    """Print how the parameters of every cell are divided and how much would be trained, and train nothing.

    With `components`, each network is taken apart below its table.
    """
    if recipe.kind == "train":
        run = resolve(recipe, text)
        cells: tuple[Cell, ...] = (
            Cell(sweep="", budget=MAIN_BUDGET, control="", rho=0.0, rows_per_head=0, run=run),
        )
    else:
        cells = plan(recipe, text, read_extension(study_directory(recipe)))
    groups = _groups(cells)
    for (budget, control, sweep), group in groups.items():
        if len(groups) > 1:
            words = [f"budget {budget}" if budget != MAIN_BUDGET else "", f"{sweep} sweep", control]
            print(", ".join(word for word in words if word))
        print(budget_table(group.allocations, group.names if sweep == "memory" else ()) + "\n")
        for name, allocation in zip(group.names, group.allocations, strict=True) if components else ():
            print(
                name
                + "\n"
                + component_table(allocation.network, sequence_length=group.sequence_length)
                + "\n"
            )
    tokens = sum(cell.run.tokens for cell in cells)
    print(f"{len(cells)} run(s), {tokens:,} tokens in all")


def _groups(cells: tuple[Cell, ...]) -> dict[tuple[str, str, str], _Group]:
    groups: dict[tuple[str, str, str], _Group] = {}
    for cell in cells:
        allocation = cell.run.allocation
        for sweep in cell.sweep.split("+"):
            group = groups.setdefault((cell.budget, cell.control, sweep), _Group())
            if allocation in group.allocations:
                continue
            if sweep == "memory":
                name = f"table {cell.rows_per_head}" if cell.rows_per_head else "no table"
            else:
                name = "as written" if allocation.rho is None else f"rho {allocation.rho_nominal:g}"
            group.names.append(name)
            group.allocations.append(allocation)
            group.sequence_length = cell.run.recipe.data.sequence_length
    return groups

"""Budgets as tables a person can read before anything is spent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from engram_lab.budget.config import BudgetConfig
from engram_lab.budget.count import ParameterCount, bytes_per_token, count
from engram_lab.budget.flops import BACKWARD, flops_per_token
from engram_lab.budget.rows import NEAR_START
from engram_lab.budget.solve import FLOPS_TOLERANCE, TOLERANCE, Allocation, solve
from engram_lab.model.config import ModelConfig

CONVENTIONS = (
    "Parameters leave out the token embedding and the head; active is what one token uses.",
    "FLOPs are those of training, forward and backward: a multiply-add is two, scores over the whole "
    "sequence, head included.",
)
MODES = {
    "published": "published (the default): rows replace experts; the memory's projections come on top, so "
    "that totals are above that of rho = 1 by them. Δ is from rho = 1, of what the heading names.",
    "strict": "strict: the projections are paid for, at rho = 1 by wider shared experts; the router's FLOPs "
    "vary with the experts. Δ is from rho = 1, of what the heading names.",
}
DIFFERENCES = {
    "published": {"Δ total": "Δ total less projections"},
    "strict": {"Δ FLOPs": "Δ FLOPs less router"},
}
"""By mode: headings of columns whose differences leave something out (`engram_lab.budget.solve`)."""
AS_WRITTEN = (
    "tables on top: all experts stay and rows are added, so that totals differ by design and have no Δ."
)
HEADINGS = (
    "rho",
    "realised",
    "experts",
    "rows",
    "memory",
    "projections",
    "total",
    "Δ total",
    "active",
    "sparse",
    "FLOPs/token",
    "router",
    "Δ FLOPs",
    "bytes/token",
)


def solve_all(
    network: ModelConfig, rhos: Iterable[float], budget: BudgetConfig, *, sequence_length: int
) -> list[Allocation]:
    """Solve `budget` at each rho; see `solve`."""
    return [solve(network, replace(budget, rho=rho), sequence_length=sequence_length) for rho in rhos]


def budget_table(cells: Sequence[Allocation], names: Sequence[str] = ()) -> str:
    """Return the cells as an aligned table with its conventions below, for a terminal or a Markdown code
    block.

    `names` stand in the first column instead of rho.
    """
    lines = [_line(cell) for cell in cells]
    headings = _headings(cells)
    if names:
        headings = ("cell", *headings[1:])
        lines = [(name, *line[1:]) for name, line in zip(names, lines, strict=True)]
    modes = {cell.mode for cell in cells if cell.rho is not None}
    notes = [text for mode, text in MODES.items() if mode in modes]
    if any(cell.rho is None for cell in cells):
        notes.append(AS_WRITTEN)
    return "\n".join([align([headings, *lines]), "", *notes, *CONVENTIONS, *_warnings(cells)])


def _headings(cells: Sequence[Allocation]) -> tuple[str, ...]:
    """Return the headings; those of differences say what is left out of them."""
    said: dict[str, str] = {}
    for cell in cells:
        memory = cell.network.engram
        none_left_out = memory is None or memory.module == "mlp"  # which is sized as a whole: it has no rows
        if cell.rho is not None and not (cell.mode == "published" and none_left_out):
            said |= DIFFERENCES[cell.mode]
    return tuple(said.get(name, name) for name in HEADINGS)


def _warnings(cells: Sequence[Allocation]) -> Iterator[str]:
    """Say where primes were too few to meet the total with heads of about equal size, and where strict mode
    could not hold what it promises.
    """
    for cell in cells:
        memory = cell.network.engram
        if cell.rho is None or memory is None or memory.module in ("mlp", "product_key"):
            continue
        least, most = min(memory.rows_by_order), max(memory.rows_by_order)
        if least < NEAR_START * most:
            yield (
                f"warning: at rho {cell.rho_nominal:g} heads have from {least:,} to {most:,} rows: so few "
                "rows meet the total in no other way; fewer engram.heads or a smaller engram.row_dim make "
                "them more alike."
            )
    total, flops = TOLERANCE["strict"].near, FLOPS_TOLERANCE
    missed = [
        cell
        for cell in cells
        if cell.mode == "strict" and (abs(cell.total_mismatch) > total or abs(cell.flops_mismatch) > flops)
    ]
    if missed:
        places = ", ".join(f"{cell.rho_nominal:g}" for cell in missed)
        modules = sorted({cell.network.engram.module for cell in missed if cell.network.engram})
        yield (
            f"warning: at rho {places} no size of the memory ({', '.join(modules)}) was found that holds the "
            f"total to {total:.2%} and FLOPs to {flops:.1%}, as strict mode should; Δ says what is left."
        )


def component_table(network: ModelConfig, *, sequence_length: int) -> str:
    """Return what each component of `network` has in parameters and costs per token, as an aligned table."""
    parameters, flops = count(network), flops_per_token(network, sequence_length)
    work = {
        "head": flops.head,
        "attention": flops.attention + flops.scores,
        "hyper_connections": flops.hyper_connections,
        "dense": flops.dense,
        "shared_experts": flops.shared_experts,
        "router": flops.router,
        "experts_active": flops.experts,
        "memory_projections": flops.memory,
    }
    fetched = bytes_per_token(network.engram) if network.engram else 0

    def line(name: str, size: int, forward: int, read: int) -> tuple[str, ...]:
        return (name, *(f"{number:,}" for number in (size, forward, BACKWARD * forward, read)))

    lines: list[tuple[str, ...]] = [("component", "parameters", "FLOPs forward", "backward", "bytes fetched")]
    for name in ParameterCount.__dataclass_fields__:
        shown = name.replace("rows", "memory_rows").replace("_", " ")
        read = fetched if name == "rows_active" else 0
        lines.append(line(shown, getattr(parameters, name), work.get(name, 0), read))
    lines.append(line("all", parameters.everything, flops.forward, fetched))
    notes = (
        f"total {parameters.total:,}, active {parameters.active:,}, sparse {parameters.sparse:,} "
        "(embedding and head left out)",
        f"FLOPs and bytes of table rows are per token, at {sequence_length:,} tokens a sequence; forward and "
        f"backward are {flops.training:,} FLOPs",
    )
    return "\n".join([align(lines), "", *notes])


def _line(cell: Allocation) -> tuple[str, ...]:
    memory = cell.network.engram
    return (
        "-" if cell.rho_nominal is None else f"{cell.rho_nominal:g}",
        "-" if cell.rho is None else f"{cell.rho:.4f}",
        f"{cell.experts}",
        f"{cell.slots:,}",
        human(cell.memory_parameters),
        human(cell.memory_projections),
        human(cell.total_parameters),
        "-" if cell.rho is None else f"{cell.total_mismatch:+.3%}",
        human(cell.active_parameters),
        human(cell.sparse_parameters),
        human(cell.flops_per_token),
        f"{cell.router_flops_per_token / cell.flops_per_token:.2%}",
        "-" if cell.rho is None else f"{cell.flops_mismatch:+.2%}",
        f"{bytes_per_token(memory) if memory else 0:,}",
    )


def human(number: float) -> str:
    """Return a count to four digits with its thousands, millions or billions named: 1.283 M."""
    for size, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.4g} {name}"
    return f"{number:g}"


def align(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of text as columns, each flush right but for the first."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if n else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )

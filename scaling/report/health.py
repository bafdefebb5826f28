"""Were the memories at work? Gates, contributions and rows at the end of each run, against what ill ones had.

Runs carry these numbers as columns `memory/layer<block>/<name>`; a table without any has no such section.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import polars as pl

from scaling.report.document import Block, Caution, Paragraph, Section, Table
from scaling.report.numbers import fixed, plural, short, significant
from scaling.report.runs import Runs

GATE_STUCK = 0.99
"""Mean of a gate at which published runs without an effect stood: it passes all and chooses nothing."""
LEAST_CONTRIBUTION = 0.01
"""RMS of what a memory adds over that of the stream it is added to, below which it cannot matter."""
NAMED = re.compile(r"memory/layer(\d+)/(\w+)")
_SHOWN = {
    "gate_mean": "gate, mean",
    "gate_p10": "10 %",
    "gate_p50": "50 %",
    "gate_p90": "90 %",
    "contribution_ratio": "added / stream",
    "row_norm": "norm of a row",
    "populated_rows": "rows used",
}


@dataclass(frozen=True, kw_only=True)
class Health:
    """The memories of the finished runs.

    Args:
        layers: blocks that hold one in some run, from the lowest up.
        frame: the finished runs, controls included, that carry numbers.
        ill: what is outside the range, a phrase a memory.
    """

    layers: tuple[int, ...]
    frame: pl.DataFrame
    ill: tuple[str, ...]


def health(runs: Runs) -> Health | None:
    """Return what the runs say of their memories, or None where they say nothing."""
    found = [match for name in runs.every.columns if (match := NAMED.fullmatch(name))]
    if not found:
        return None
    said = pl.any_horizontal(pl.col(match.string).is_not_null() for match in found)
    frame = pl.concat([runs.fitted, runs.controls]).filter(said)
    if frame.is_empty():
        return None
    layers = tuple(sorted({int(match[1]) for match in found}))
    ill = tuple(
        words for row in frame.iter_rows(named=True) for layer in layers if (words := _ill(row, layer))
    )
    return Health(layers=layers, frame=frame, ill=ill)


def caution(found: Health | None) -> list[Block]:
    """Return what the head of the page says: nothing, unless a memory is outside the range."""
    if found is None or not found.ill:
        return []
    text = f"The memory is ill in {plural(len(found.ill), 'place')}: {'; '.join(found.ill[:6])}"
    return [Caution(text + ("; and others." if len(found.ill) > 6 else "."))]


def section(found: Health) -> Section:
    """Return the section: the range, what is outside it, and every cell's numbers."""
    runs = plural(found.frame.height, "run")
    inside = "every memory is inside this range" if not found.ill else f"outside are {'; '.join(found.ill)}"
    text = (
        f"A memory is taken to be at work where its gate is not stuck (mean below {GATE_STUCK}) and what it"
        f" adds has at least {100 * LEAST_CONTRIBUTION:g} % of the RMS of the stream it is added to;"
        f" published runs that saw no effect of memory were outside. Of {runs} with memory, {inside}."
    )
    return Section(
        ident="health", title="Were the memories at work?", blocks=(Paragraph(text), _table(found))
    )


def _ill(row: dict[str, float | None], layer: int) -> str:
    """Say what is wrong with a run's memory, or nothing."""
    gate = row.get(f"memory/layer{layer}/gate_mean")
    added = row.get(f"memory/layer{layer}/contribution_ratio")
    wrong = []
    if gate is not None and not gate < GATE_STUCK:  # NaN is ill too
        wrong.append(f"gate {fixed(gate)}")
    if added is not None and not added >= LEAST_CONTRIBUTION:
        wrong.append(f"adds {significant(100 * added, 2)} %")
    if not wrong:
        return ""
    names = {"control": "", "rho": "ρ = ", "slots": "M = ", "seed": "seed "}
    where = [f"{names[n]}{_plain(n, row[n])}" for n in names if row.get(n) not in (None, "")]
    return f"{', '.join([*where, f'block {layer}'])}: {', '.join(wrong)}"


def _plain(name: str, value: object) -> str:
    if name == "rho":
        return f"{value:.4g}"
    return short(float(str(value))) if name == "slots" else str(value)


def _table(found: Health) -> Table:
    """Return one line a cell and block, means over its seeds."""
    by = [name for name in ("control", "rho", "slots") if name in found.frame.columns]
    if "control" in by and not (found.frame["control"] != "").any():
        by.remove("control")
    shown = [
        name
        for name in _SHOWN
        if any(f"memory/layer{layer}/{name}" in found.frame.columns for layer in found.layers)
    ]
    lines = []
    cells = (
        found.frame.sort(by, nulls_last=True).group_by(by, maintain_order=True) if by else [((), found.frame)]
    )
    for place, part in cells:
        for layer in found.layers:
            numbers = [_mean(part, f"memory/layer{layer}/{name}") for name in shown]
            if any(number is not None for number in numbers):
                where = [
                    _plain(n, value) if value is not None else "–" for n, value in zip(by, place, strict=True)
                ]
                lines.append((*where, str(layer), str(part.height), *(significant(n) for n in numbers)))
    heads = {"control": "control", "rho": "ρ", "slots": "slots"}
    return Table(
        title="Gates and contributions at the end of training",
        columns=(*(heads[n] for n in by), "block", "runs", *(_SHOWN[name] for name in shown)),
        rows=tuple(lines),
        numeric=frozenset({"ρ", "slots", "block", "runs", *_SHOWN.values()}),
        note=(
            "Means over the runs of a cell, from one batch of validation text. Per cents are quantiles of the"
            " gate; added / stream is a ratio of RMS; rows used is the share ever read."
        ),
        long=True,
    )


def _mean(part: pl.DataFrame, name: str) -> float | None:
    if name not in part.columns:
        return None
    mean = part[name].cast(pl.Float64).mean()
    return None if mean is None else float(str(mean))

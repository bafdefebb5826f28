"""A fit as a terminal shows it: the words of its tests, then its table."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from scaling.report import words
from scaling.report.document import Table
from scaling.report.numbers import percent, significant

WIDTH = 100
"""Columns of prose; tables take what they need."""
CELL = 48
"""Longest cell of a table; longer ones are cut there, and whole in the JSON."""


def to_text(fit: Any) -> str:
    """Return any result of `scaling.fit_*` as text."""
    result = fit.to_dict()
    # each section imports what it draws, which takes longer than a small fit: only the one that is needed
    match result["kind"]:
        case "allocation":
            from scaling.report import shares

            return _said(words.allocation(fit), shares.models(fit))
        case "memory":
            from scaling.report import memories

            return _said(words.memory(fit), memories.models(fit))
        case "joint":
            from scaling.report import budgets

            tables = ([budgets.forecasts(fit)] if fit.rho_star else []) + [budgets.models(fit)]
            return _said(words.drift(fit), *tables)
        case _:
            return _fields(result)


def _said(sentence: str, *tables: Table) -> str:
    prose = textwrap.fill(sentence, WIDTH, break_on_hyphens=False)
    return "\n\n".join([prose, *(_table(_without(table, "formula")) for table in tables)])


def _without(table: Table, column: str) -> Table:
    """Return the table without a column that is too wide for a terminal."""
    kept = [i for i, name in enumerate(table.columns) if name != column]
    rows = tuple(tuple(row[i] for i in kept) for row in table.rows)
    return replace(table, columns=tuple(table.columns[i] for i in kept), rows=rows)


def _table(table: Table) -> str:
    lines = [table.columns, *table.rows]
    cut = [[cell if len(cell) <= CELL else f"{cell[: CELL - 1]}…" for cell in line] for line in lines]
    widths = [max(len(line[i]) for line in cut) for i in range(len(table.columns))]
    flush = [str.rjust if name in table.numeric else str.ljust for name in table.columns]
    shown = [
        "  ".join(set_(cell, width) for set_, cell, width in zip(flush, line, widths, strict=True)).rstrip()
        for line in cut
    ]
    return "\n".join([table.title, shown[0], "  ".join("-" * width for width in widths), *shown[1:]])


def _fields(result: Mapping[str, Any]) -> str:
    """Return a law's parameters with their intervals, then whatever else it holds, one line each."""
    intervals = result.get("intervals", {})
    derived = result.get("derived", {})
    rows = []
    for name, value in [*result.items(), *derived.items()]:
        if isinstance(value, float) and name in intervals:
            low, high = intervals[name]
            ends = ", ".join("unbounded" if end is None else significant(end, 5) for end in (low, high))
            rows.append((name, significant(value, 6), f"[{ends}]"))
    shown = {row[0] for row in rows} | {"intervals", "derived", "excluded", "valleys"}
    parts = []
    if rows:
        columns = ("parameter", "estimate", f"{percent(result['confidence'])} interval")
        table = Table(title="", columns=columns, rows=tuple(rows), numeric=frozenset({"estimate"}))
        parts.append(_table(table))
    for valley in result.get("valleys", ()):
        low, high = valley["interval"]
        ends = ", ".join("unbounded" if end is None else significant(end, 4) for end in (low, high))
        parts.append(
            f"C = {significant(valley['budget'])}: optimum {significant(valley['optimum'], 4)} [{ends}],"
            f" {valley['status']}"
        )
    rest = [f"{name}: {_one(value)}" for name, value in result.items() if name not in shown and value != []]
    return "\n".join([*rest, *parts])


def _one(value: Any) -> str:
    if isinstance(value, float):
        return significant(value, 6)
    if isinstance(value, (list, tuple)):
        return ", ".join(_one(item) for item in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_one(item)}" for name, item in value.items())
    return str(value)

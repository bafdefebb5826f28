"""The section on where the numbers come from: runs, what was held fixed, the checklist, the context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from scaling.report.analysis import Study
from scaling.report.checklist import checklist
from scaling.report.controls import controls
from scaling.report.document import Block, Caution, Code, Section, Table
from scaling.report.method import method
from scaling.report.numbers import plural, significant
from scaling.report.runs import Runs, held_fixed, left_out, overview

Records = Sequence[Mapping[str, object]]


def data(study: Study, context: Mapping[str, object], runs_hash: str) -> Section:
    """Return the section; `context` is what the caller knows and the runs do not say."""
    runs = study.runs
    has_runs = runs.fitted.height > 0
    blocks: list[Block | None] = [
        left_out(runs),
        overview(runs) if has_runs else None,
        controls(runs),
        held_fixed(runs, str(context.get("mismatch") or "")) if has_runs else None,
        checklist(runs, context, method(study)),
        *_made_by(runs),
        *_context(context, runs_hash),
    ]
    kept = tuple(block for block in blocks if block is not None)
    return Section(ident="data", title="Data and method", blocks=kept)


def _made_by(runs: Runs) -> list[Block]:
    """Return what code and data made the fitted runs, with a caution where they are not one."""
    rows, mixed = [], []
    for name in ("code_version", "data_hash", "machine"):
        if name not in runs.fitted.columns or runs.fitted[name].null_count() == runs.fitted.height:
            continue
        said = runs.fitted[name].cast(pl.String).fill_null("not recorded")
        found = said.value_counts(name="runs").sort(name)
        rows += [(name.replace("_", " "), value, plural(count, "run")) for value, count in found.iter_rows()]
        if found.height > 1:
            mixed.append(f"{found.height} values of {name.replace('_', ' ')}")
    blocks: list[Block] = []
    if mixed:
        text = f"The fitted runs are mixed: {' and '.join(mixed)}. Differences between them are in every fit."
        blocks.append(Caution(text))
    if rows:
        blocks.append(Table(title="What made the runs", columns=("", "value", "runs"), rows=tuple(rows)))
    return blocks


def _context(context: Mapping[str, object], runs_hash: str) -> list[Block]:
    """Return the caller's context: texts of one line and mappings in one table, the rest one by one."""
    lines = [("sha256 of runs.csv", runs_hash)]
    apart: list[Block] = []
    for key, value in context.items():
        name = key.replace("_", " ")
        if isinstance(value, Mapping):
            lines += [(f"{name}: {inner}".replace("_", " "), str(item)) for inner, item in value.items()]
        elif isinstance(value, (list, tuple)) and value and all(isinstance(r, Mapping) for r in value):
            apart.append(_records(name.capitalize(), value))
        elif "\n" in str(value):
            apart.append(Code(title=name.capitalize(), text=str(value)))
        else:
            lines.append((name, str(value)))
    return [Table(title="Where the numbers come from", columns=("", "value"), rows=tuple(lines)), *apart]


def _records(title: str, records: Records) -> Table:
    columns = tuple(dict.fromkeys(str(key) for record in records for key in record))
    numeric = frozenset(c for c in columns if all(isinstance(r.get(c), (int, float)) for r in records))
    rows = tuple(
        tuple(_cell(record.get(column), column in numeric) for column in columns) for record in records
    )
    return Table(title=title, columns=columns, rows=rows, numeric=numeric, long=True)


def _cell(value: object, numeric: bool) -> str:
    if value is None:
        return "–"
    return significant(float(str(value)), 6) if numeric else str(value)

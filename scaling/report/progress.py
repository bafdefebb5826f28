"""How losses went while the runs trained: whether the order of the shares had settled by the end.

A run carries its evaluations as JSON in column `evaluations`: [[step, loss], ...], the last at its last step.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import polars as pl

from scaling.report import theme
from scaling.report.document import Block, Paragraph, Picture, Pictures, Section, Table
from scaling.report.drawing import Array, Label, finish
from scaling.report.numbers import budget_label, fixed, short
from scaling.report.runs import Runs, in_budgets


@dataclass(frozen=True, kw_only=True)
class Course:
    """Mean validation loss of one cell at every evaluation.

    Args:
        rho: the cell's share.
        runs: how many are averaged.
        tokens: trained on by then, [evaluations].
        loss: nats a token, [evaluations].
    """

    rho: float
    runs: int
    tokens: Array
    loss: Array


def progress(runs: Runs) -> Section | None:
    """Return the section, or None where no sweep of shares carries evaluations before its last one."""
    frame = runs.fitted
    if not {"evaluations", "rho", "tokens"} <= set(frame.columns):
        return None
    if "sweep" in frame.columns:
        frame = frame.filter(
            pl.col("sweep").fill_null("allocation").str.split("+").list.contains("allocation")
        )
    blocks: list[Block] = []
    for number, (budget, part) in enumerate(in_budgets(frame), start=1):
        found = courses(part)
        if len(found) > 1 and len(found[0].tokens) > 1:
            lead = Paragraph(_lead(found, budget))
            blocks += [lead, Pictures((_picture(found, budget, number),)), _table(found, budget)]
    if not blocks:
        return None
    return Section(ident="progress", title="While they trained", blocks=tuple(blocks))


def courses(runs: pl.DataFrame) -> list[Course]:
    """Return every share's course, from the smallest up, of the runs evaluated at the steps most were."""
    told = runs.filter(pl.col("evaluations").is_not_null() & pl.col("tokens").is_not_null())
    rows = [(row["rho"], row["tokens"], json.loads(row["evaluations"])) for row in told.iter_rows(named=True)]
    rows = [row for row in rows if row[2]]
    if not rows:
        return []
    schedules = [tuple(step for step, _ in seen) for _, _, seen in rows]
    usual = max(schedules, key=schedules.count)
    cells: dict[float, list[tuple[float, list[float]]]] = {}
    for (rho, tokens, seen), schedule in zip(rows, schedules, strict=True):
        if schedule == usual:
            cells.setdefault(rho, []).append((tokens, [loss for _, loss in seen]))
    steps = np.array(usual, dtype=float)
    return [
        Course(
            rho=rho,
            runs=len(members),
            tokens=members[0][0] * steps / steps[-1],
            loss=np.mean([losses for _, losses in members], axis=0),
        )
        for rho, members in sorted(cells.items())
    ]


def _lead(found: list[Course], budget: float | None) -> str:
    """Say which share had the lowest mean at every evaluation: an order that changes had not settled."""
    best = [min(found, key=lambda course: course.loss[place]).rho for place in range(len(found[0].tokens))]
    told = ", ".join(
        f"ρ = {fixed(rho, 4)} at {short(tokens)} tokens"
        for rho, tokens in zip(best, found[0].tokens, strict=True)
    )
    change = "was the same at every evaluation" if len(set(best)) == 1 else "changed while they trained"
    return f"At {budget_label(budget)} the share with the lowest mean loss {change}: {told}."


def _picture(found: list[Course], budget: float | None, number: int) -> Picture:
    base = found[-1]
    with theme.figure(2.7) as (drawn, axes):
        axes.axhline(0.0, color=theme.MUTED, lw=0.8, ls=(0, (2, 2)))
        for place, course in enumerate(found[:-1]):
            axes.plot(
                course.tokens,
                course.loss - base.loss,
                marker=theme.MARKERS[place % len(theme.MARKERS)],
                ms=3.5,
                color=theme.SERIES[place % len(theme.SERIES)],
                ls=theme.DASHES[place % len(theme.DASHES)],
                label=f"ρ = {course.rho:.3g}",
            )
        ticks = axes.get_xticks()[1:-1]
        axes.set_xticks(ticks, [short(tick) for tick in ticks])
        axes.set(xlabel="tokens trained on", ylabel=f"loss minus that of ρ = {base.rho:.3g} (nats)")
        return finish(
            drawn,
            axes,
            Label(
                name=f"progress-{number}",
                title=budget_label(budget),
                caption=(
                    "Means over seeds at every evaluation; lines that still move apart had not settled. The"
                    " scatter of the share they are measured from is in all of them."
                ),
                alt=f"Validation loss of every share above that of {base.rho:.3g}, against tokens.",
            ),
        )


def _table(found: list[Course], budget: float | None) -> Table:
    heads = tuple(f"{short(tokens)} tokens" for tokens in found[0].tokens)
    return Table(
        title=f"Mean validation loss, {budget_label(budget)}",
        columns=("ρ", "runs", *heads),
        rows=tuple(
            (fixed(course.rho, 4), str(course.runs), *(fixed(loss, 4) for loss in course.loss))
            for course in found
        ),
        numeric=frozenset({"ρ", "runs", *heads}),
        long=True,
    )

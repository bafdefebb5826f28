"""The questions a reader asks of a study of scaling, answered from the data where the data can answer.

After Li, Kudugunta and Zettlemoyer, "(Mis)Fitting: A Survey of Scaling Laws" (ICLR 2025): its four groups,
in our own words. What neither the runs nor the caller's context say is left standing as "not stated in the
data", so that it is seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from scaling.frame import BUDGET_GAP
from scaling.report.document import Table
from scaling.report.numbers import budget_label, duration, plural, short
from scaling.report.runs import Runs, in_budgets

UNSTATED = "not stated in the data"
RECIPE = "as the recipe below says"
BESIDE = f"how many ran at a time, and slowed each other down, is {UNSTATED}"
VALUES = f"their values are in the recipe below; how they were chosen is {UNSTATED}"


@dataclass(frozen=True, kw_only=True)
class Method:
    """How the fits were made, in the words of whoever made them."""

    forms: Sequence[str]
    chosen: Sequence[str]
    assumed: Sequence[str]
    minimised: Sequence[str]
    algorithms: Sequence[str]
    intervals: Sequence[str]
    checks: Sequence[str]
    troubles: Sequence[str]
    """Fits that did not simply converge, each with its status."""


def checklist(runs: Runs, context: Mapping[str, object], method: Method) -> Table:
    """Return the checklist as a table."""
    fitted = runs.fitted
    recipe, values = (RECIPE, VALUES) if "recipe" in context else (UNSTATED, UNSTATED)
    mismatch = [_line(context["mismatch"])] if context.get("mismatch") else []

    def told(*names: str, default: str = UNSTATED) -> str:
        found = [_line(context[name]) for name in names if context.get(name) not in (None, "")]
        return "; ".join(found) or default

    groups = {
        "Hypothesis": (
            ("Which forms were fitted?", _all(method.forms, "none")),
            ("Which variables do they relate?", _variables(fitted)),
            ("Which form was chosen, and how?", _all(method.chosen, "none")),
            ("What do the forms take for granted?", _all(method.assumed, "nothing was fitted")),
        ),
        "Training": (
            ("How many models were trained?", _models(runs)),
            ("At which sizes, on how many tokens?", _sizes(fitted)),
            ("On which data?", told("data", "data_hash", default=_named(fitted, "data_hash") or UNSTATED)),
            ("With which tokenizer and context length?", told("tokenizer", default=recipe)),
            ("Was any token seen twice?", told("repetition")),
            ("How are parameters counted?", told("parameters")),
            ("How is compute counted?", told("flops")),
            ("How were hyper-parameters chosen?", told("hyper_parameters", default=values)),
            ("Did the learning rate end with the tokens of each run?", told("schedule", default=recipe)),
            ("By which code?", _named(fitted, "code_version") or told("code_version", "code")),
            ("On which machine?", _named(fitted, "machine") or told("machine")),
            ("What did the runs cost?", _cost(runs.every, told("workers", default=BESIDE))),
            ("How far do cells miss their budget?", "; ".join([_missed(fitted), *mismatch])),
        ),
        "Data": (
            ("What is the metric?", told("metric", default=f"Column loss; on which text is {UNSTATED}.")),
            (
                "How many checkpoints of a run are used?",
                told("checkpoints", default=f"One row is taken for one run; which checkpoint is {UNSTATED}."),
            ),
            ("How many seeds?", _seeds(fitted)),
            ("Were runs added after results had been seen?", told("added")),
            ("Was any run left out?", _left_out(runs)),
            ("Was any run interrupted?", _taken_up(fitted)),
            ("Which runs were taken for one budget?", _merged(fitted)),
            (
                "Were the losses changed before fitting?",
                told("smoothing", default=f"Not here; whether they were smoothed before is {UNSTATED}."),
            ),
        ),
        "Fitting": (
            ("What is minimised?", _all(method.minimised, "nothing")),
            ("By which algorithm, from where?", _all(method.algorithms, "none")),
            ("How are intervals made?", _all(method.intervals, "none")),
            ("Which fits did not simply converge?", _all(method.troubles, "None: every fit converged.")),
            ("How was the fit checked?", _all(method.checks, "not checked: too few runs")),
            ("Can it be repeated?", "runs.csv, runs.parquet and fits.json lie beside this page."),
        ),
    }
    return Table(
        title="Checklist",
        columns=("part", "question", "answer"),
        rows=tuple((part, *row) for part, rows in groups.items() for row in rows),
        note="After Li, Kudugunta and Zettlemoyer, (Mis)Fitting: A Survey of Scaling Laws, 2025.",
    )


def _all(said: Sequence[str], otherwise: str) -> str:
    return "; ".join(said) or otherwise


def _line(value: object) -> str:
    return ", ".join(map(str, value.values())) if isinstance(value, Mapping) else str(value)


def _named(frame: pl.DataFrame, name: str) -> str:
    """Return the values of a column that says what made the runs."""
    found = frame[name].drop_nulls().unique().sort().to_list() if name in frame.columns else []
    return ", ".join(map(str, found))


def _missed(frame: pl.DataFrame) -> str:
    said = []
    for name, what in (("total_mismatch", "parameters"), ("flops_mismatch", "FLOPs per token")):
        if name in frame.columns and frame[name].null_count() < frame.height:
            worst = 100 * float(np.abs(frame[name].drop_nulls().to_numpy()).max())
            said.append(f"{what} by at most {worst:.2g} %")
    return "; ".join(said) or UNSTATED


def _variables(frame: pl.DataFrame) -> str:
    names = ("rho", "slots", "memory_parameters", "budget", "tokens", "total_parameters", "experts")
    varied = [n for n in names if n in frame.columns and frame[n].drop_nulls().n_unique() > 1]
    return "loss and " + ", ".join(varied) if varied else "loss alone: nothing varied"


def _models(runs: Runs) -> str:
    parts = [f"{plural(runs.every.height, 'run')}: {runs.fitted.height} fitted"]
    if runs.controls.height:
        parts.append(f"{runs.controls.height} controls")
    if runs.left_out.height:
        parts.append(f"{runs.left_out.height} left out")
    return ", ".join(parts) + "."


def _merged(frame: pl.DataFrame) -> str:
    """Say which budgets hold runs of unequal compute, and how unequal."""
    if "budget" not in frame.columns or frame["budget"].null_count() == frame.height:
        return f"All of them: compute is {UNSTATED}."
    said = []
    found = in_budgets(frame)
    for budget, part in found:
        flops = part["budget"].drop_nulls()
        low, high = float(flops.min()), float(flops.max())  # type: ignore[arg-type]
        if high > low * (1 + 1e-9):
            said.append(
                f"{budget_label(budget)} holds {flops.n_unique()} values {100 * (high / low - 1):.2g} % apart"
            )
    rule = f"Runs less than a factor {BUDGET_GAP:g} from the next in compute: {plural(len(found), 'budget')}"
    return f"{rule}; {'; '.join(said)}." if said else f"{rule}, each of one value."


def _sizes(frame: pl.DataFrame) -> str:
    said = []
    for name, unit in (("total_parameters", "parameters"), ("tokens", "tokens")):
        if name in frame.columns and frame[name].null_count() < frame.height:
            low, high = frame[name].min(), frame[name].max()
            ends = short(low), short(high)  # type: ignore[arg-type]
            said.append(f"{' to '.join(dict.fromkeys(ends))} {unit}")
    return "; ".join(said) or UNSTATED


def _seeds(frame: pl.DataFrame) -> str:
    if "seed" not in frame.columns or frame["seed"].null_count() == frame.height:
        return UNSTATED
    by = [name for name in ("sweep", "rho", "slots") if name in frame.columns]
    counts = [
        n
        for _, part in in_budgets(frame)
        for n in (part.group_by(by).agg(pl.col("seed").n_unique().alias("n"))["n"] if by else ())
    ]
    seeds = plural(frame["seed"].drop_nulls().n_unique(), "seed")
    if not counts:
        return seeds
    low, high = min(counts), max(counts)
    return f"{seeds}; {low if low == high else f'{low} to {high}'} a cell."


def _taken_up(fitted: pl.DataFrame) -> str:
    """Say how many finished runs were stopped on the way and taken up again."""
    if "openings" not in fitted.columns or fitted["openings"].null_count() == fitted.height:
        return UNSTATED
    again = fitted.filter(pl.col("openings") > 1)
    if again.is_empty():
        return "None that finished: each was started once."
    most = max(map(int, again["openings"].to_list()))
    times = "once" if most == 2 else f"up to {most - 1} times"
    return (
        f"{again.height} of {fitted.height} that finished, {times} each, and taken up again where they stood"
        " (column openings counts the starts)."
    )


def _cost(every: pl.DataFrame, beside: str) -> str:
    """Say how long runs took, controls among them; `beside` says how many ran at a time."""
    took = every["seconds"].drop_nulls().drop_nans() if "seconds" in every.columns else pl.Series([])
    if took.is_empty():
        return UNSTATED
    ends = dict.fromkeys(duration(float(end)) for end in (took.min(), took.max()))  # type: ignore[arg-type]
    said = f"{' to '.join(ends)} a run, {duration(float(took.sum()))} summed over runs"
    if len(took) < every.height:
        said += f" ({len(took)} of {every.height} say it)"
    return f"{said}: wall time of training, compilation, evaluations and checkpoints included; {beside}."


def _left_out(runs: Runs) -> str:
    if runs.left_out.is_empty():
        return f"None of the table's; whether it leaves any out is {UNSTATED}."
    reasons = runs.left_out.group_by("status", "reason").len().sort("status", "reason")
    return "; ".join(f"{n} {status}: {reason}" for status, reason, n in reasons.iter_rows())

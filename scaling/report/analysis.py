"""From a table of runs to the fits it calls for, and to what could not be fitted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import polars as pl

from scaling.allocation import AllocationFit, budgets, fit_allocations
from scaling.errors import ScalingError
from scaling.frame import need
from scaling.joint import JointFit, fit_joint
from scaling.memory import SIZES, MemoryFit, fit_memory
from scaling.report.adequacy import BudgetTrial, Trial, budget_trial, trials
from scaling.report.numbers import budget_label
from scaling.report.runs import Runs, told_apart
from scaling.report.standard import Standard, calls_for_laws, standard
from scaling.sequential import NextRun, next_runs

NEXT = 3
"""At how many shares further runs are proposed."""
Fit = TypeVar("Fit")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A sweep of memory sizes at one budget."""

    budget: float | None
    """None where the table has one budget or none, so that there is nothing to tell apart."""
    fit: MemoryFit


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study's runs and fits."""

    runs: Runs
    allocations: tuple[AllocationFit, ...]
    """One for each budget, smallest first."""
    joint: tuple[JointFit, ...]
    """The law across budgets; empty with fewer than two."""
    memories: tuple[Sizes, ...]
    """One for each budget, smallest first."""
    standard: Standard | None
    """Laws of size, tokens, experts or vocabulary, where the table sweeps neither shares nor memory."""
    trials: tuple[Trial, ...]
    """What tries the chosen model of every sweep."""
    budget_trial: BudgetTrial | None
    next_runs: tuple[NextRun, ...]
    """The runs that would sharpen the best share at the largest budget most."""
    unfitted: tuple[str, ...]
    """Sentences on laws that the runs seem to ask for and that could not be fitted."""


def analyse(frame: pl.DataFrame) -> Study:
    """Fit the sweeps of a checked frame (`scaling.frame.read`), budget by budget."""
    need(frame, "loss")
    names = sorted(frame["study"].drop_nulls().unique()) if "study" in frame.columns else []
    if len(names) > 1:
        listed = ", ".join(map(repr, names[:8]))
        held = f"Column 'study' holds {len(names)} studies ({listed}), and a report is of one;"
        raise ScalingError(f"{held} keep its rows alone.", shell=f"{held} choose with --study {names[0]}.")
    runs = told_apart(frame)
    swept = bool({"rho", *SIZES} & set(frame.columns))
    if not swept and not calls_for_laws(runs.fitted):
        _refuse(frame)
    unfitted: list[str] = []
    allocations: tuple[AllocationFit, ...] = ()
    joint: tuple[JointFit, ...] = ()
    memories: tuple[Sizes, ...] = ()
    shares, sizes = _serving(runs.fitted, "allocation"), _serving(runs.fitted, "memory")
    if shares.height:
        allocations = _tried(lambda: fit_allocations(frame), "share", unfitted)
    if len(allocations) > 1:
        joint = _tried(lambda: (fit_joint(frame),), "share and compute", unfitted)
    if sizes.height:
        at = budgets(sizes)
        several: tuple[float | None, ...] = at if len(at) > 1 else (None,)
        memories = _tried(lambda: _sizes(frame, several), "memory", unfitted)
    found = None
    if not (shares.height or sizes.height):
        found = standard(frame, runs.fitted, unfitted)
    if runs.fitted.is_empty():
        why = "Every finished run is a control" if runs.controls.height else "No run has finished with a loss"
        unfitted.append(f"{why}, so nothing is fitted.")
    return Study(
        runs=runs,
        allocations=allocations,
        joint=joint,
        memories=memories,
        standard=found,
        trials=trials(allocations, [(_of(sizes), sizes.fit) for sizes in memories]),
        budget_trial=next((budget_trial(fit, frame) for fit in joint), None),
        next_runs=_next(allocations),
        unfitted=tuple(unfitted),
    )


def _refuse(frame: pl.DataFrame) -> None:
    """Say what a table must hold for a report."""
    laws = "or total_parameters, at 3 values or more, and tokens or budget (standard laws)"
    try:
        need(frame, "rho")
    except ScalingError as error:
        wanted = f"A report needs rho (shares), slots or memory_parameters (memory), {laws}."
        raise ScalingError(f"{wanted} {error}", shell=f"{wanted} {error.in_shell({})}") from None


def _sizes(frame: pl.DataFrame, at: tuple[float | None, ...]) -> tuple[Sizes, ...]:
    return tuple(Sizes(budget=budget, fit=fit_memory(frame, budget=budget)) for budget in at)


def _of(sizes: Sizes) -> str:
    return "memory" if sizes.budget is None else f"memory, {budget_label(sizes.budget)}"


def _next(allocations: tuple[AllocationFit, ...]) -> tuple[NextRun, ...]:
    if not allocations:
        return ()
    try:
        return next_runs(allocations[-1], NEXT)
    except ScalingError:
        return ()


def _tried(fit: Callable[[], tuple[Fit, ...]], against: str, unfitted: list[str]) -> tuple[Fit, ...]:
    try:
        return fit()
    except ScalingError as error:
        unfitted.append(f"No law of loss against {against} is fitted: {error}")
        return ()


def _serving(fitted: pl.DataFrame, sweep: str) -> pl.DataFrame:
    """Return a sweep's runs; a table without `sweep` is one of shares if rho varies, else of sizes."""
    column = {"allocation": "rho", "memory": "slots"}[sweep]
    if sweep == "memory" and column not in fitted.columns:
        column = "memory_parameters"
    if column not in fitted.columns:
        return fitted.clear()
    if "sweep" in fitted.columns:
        return fitted.filter(pl.col("sweep").fill_null(sweep).str.split("+").list.contains(sweep))
    shares = fitted["rho"].n_unique() if "rho" in fitted.columns else 0
    return fitted if (shares > 1) == (sweep == "allocation") else fitted.clear()

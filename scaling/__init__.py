"""Fits for allocation curves, memory laws and their drift, and what each fit cannot say.

A table of runs in (polars frame, mapping of columns, CSV, Parquet; names in `scaling.schema`), frozen
results out:

    fit_allocation(table) -> AllocationFit           loss against rho at one budget
    fit_allocations(table) -> (AllocationFit, ...)   one for each budget
    fit_memory(table) -> MemoryFit                   loss against memory size
    fit_joint(table) -> JointFit                     all budgets: rho*(C), its drift and forecast
    fit_chinchilla, fit_kaplan, fit_gadre, fit_clark, fit_tao -> LawFit
    fit_isoflop(table) -> IsoFlopFit                 valleys at each budget (approach 2)
    bootstrap, delta, fieller                        second opinions on one interval
    lack_of_fit, leave_one_out, extrapolations, influence, leave_out_budget, held_out_budget, law_influence,
    hold_out_compute sweep_power, plan_allocation, forecast_half_width, next_runs    before the runs

Every result has `to_dict()` (the stable JSON schema, see docs/scaling.md). The families of an allocation or
memory fit are `.models`, each with a status, `.predict(x)` (mean loss) and `.band(x, kind="mean" | "new")`
(pointwise profile interval), so that a figure needs no statistics of its own; `JointModel.predict(rho,
group)` and `.forecast(budget)`, `LawFit.predict(total_parameters=..., tokens=...)` and `.band(...)` do the
same for the laws. The fitted points are `.observations` (x, y, weight, seed, excluded). Intervals are pairs
whose end is None where the data set no bound.

The names are imported when first used, so that `import scaling` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "AllocationFit": "allocation",
    "AllocationModel": "allocation",
    "fit_allocation": "allocation",
    "fit_allocations": "allocation",
    "MemoryFit": "memory",
    "MemoryModel": "memory",
    "fit_memory": "memory",
    "JointFit": "joint",
    "JointModel": "joint",
    "fit_joint": "joint",
    "fit_chinchilla": "chinchilla",
    "compute_optimal": "chinchilla",
    "fit_kaplan": "powerlaws",
    "fit_gadre": "powerlaws",
    "fit_clark": "routedlaws",
    "fit_tao": "routedlaws",
    "IsoFlopFit": "isoflop",
    "fit_isoflop": "isoflop",
    "LawFit": "lawfit",
    "bootstrap": "uncertainty",
    "delta": "uncertainty",
    "fieller": "uncertainty",
    "lack_of_fit": "choosing",
    "leave_one_out": "choosing",
    "extrapolations": "choosing",
    "influence": "choosing",
    "leave_out_budget": "choosing",
    "law_influence": "choosing",
    "hold_out_compute": "choosing",
    "held_out_budget": "choosing",
    "Truth": "design",
    "sweep_power": "design",
    "plan_allocation": "design",
    "forecast_half_width": "design",
    "next_runs": "sequential",
    "packed": "design",
    "ScalingError": "errors",
    "read": "frame",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'scaling' has no attribute {name!r}")
    return getattr(import_module(f"scaling.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})

"""What tries a fit: lack of fit, leave-one-out, runs held out at the ends, and every cell's influence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from scaling.allocation import AllocationFit, AllocationModel
from scaling.choosing import (
    HeldOut,
    Influence,
    LackOfFit,
    extrapolations,
    held_out_budget,
    influence,
    lack_of_fit,
    leave_one_out,
    leave_out_budget,
)
from scaling.curvefit import CurveFit
from scaling.joint import JointFit
from scaling.memory import MemoryFit
from scaling.report.numbers import budget_label

BUDGETS = 6
"""Most budgets that are left out one by one: each is a whole joint fit."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The trials of one chosen curve."""

    of: str
    """What the curve is of: a budget's shares, or memory."""
    axis: str
    """"rho", "slots" or "memory_parameters"."""
    model: CurveFit
    lack: LackOfFit
    loo: float | None
    """Root mean square error of leaving one run out, nats."""
    held_out: tuple[HeldOut, ...]
    held_out_model: str
    """The family that predicts the ends; smooth, because a jump at a held-out end cannot be predicted."""
    parameter: str
    """The parameter whose influences are listed."""
    influences: tuple[Influence, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "of": self.of,
            "axis": self.axis,
            "model": self.model.name,
            "lack_of_fit": self.lack.to_dict(),
            "leave_one_out": self.loo,
            "held_out_model": self.held_out_model,
            "held_out": [item.to_dict() for item in self.held_out],
            "parameter": self.parameter,
            "influence": [item.to_dict() for item in self.influences],
        }


@dataclass(frozen=True, kw_only=True)
class BudgetTrial:
    """The trials of the joint law: each budget left out, and the largest one forecast from the others."""

    influences: tuple[Influence, ...]
    held_out: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"influence": [item.to_dict() for item in self.influences], "held_out": self.held_out}


def trials(shares: Sequence[AllocationFit], sizes: Sequence[tuple[str, MemoryFit]]) -> tuple[Trial, ...]:
    """Try the chosen model of every sweep; a sweep without one has nothing to try.

    `sizes` are sweeps of memory with what each is called.
    """
    found = []
    for share in shares:
        best = share.best
        if best is not None and best.fitted and not share.observations.flat:
            found.append(_trial(budget_label(share.budget), "rho", best, _smooth(share), best, "ρ*"))
    for label, size in sizes:
        if size.best is not None and not size.observations.flat:
            chosen, curve = size.model(size.best), size.model("box-cox")
            found.append(_trial(label, size.size_column, chosen, chosen, curve, "α"))
    return tuple(found)


def budget_trial(fit: JointFit, frame: pl.DataFrame) -> BudgetTrial | None:
    """Try the joint law by its budgets; None with too few of them, or too many for the time it takes."""
    if fit.best is None or not 3 <= len(fit.budgets) <= BUDGETS:
        return None
    return BudgetTrial(influences=leave_out_budget(fit, frame), held_out=held_out_budget(fit, frame))


def _trial(
    of: str, axis: str, model: CurveFit, ends: CurveFit, influenced: CurveFit, parameter: str
) -> Trial:
    return Trial(
        of=of,
        axis=axis,
        model=model,
        lack=lack_of_fit(model),
        loo=leave_one_out(model),
        held_out=extrapolations(ends) if ends.fitted else (),
        held_out_model=ends.name,
        parameter=parameter,
        influences=influence(influenced),
    )


def _smooth(fit: AllocationFit) -> AllocationModel:
    """Return the chosen model, or the best one without a jump in its place."""
    assert fit.best is not None
    if fit.best.family.jump_at is None:
        return fit.best
    smooth = [m for m in fit.models if m.eligible and m.family.jump_at is None and m.delta_aicc is not None]
    return min(smooth, key=lambda m: m.delta_aicc or 0.0, default=fit.best)

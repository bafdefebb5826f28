"""Loss against memory size: every family, the exponent alpha with its interval, and whether it is a power
law.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scaling.allocation import one_budget
from scaling.curvefit import CurveFit, fit_curve
from scaling.errors import ScalingError
from scaling.frame import Excluded, Source, finished, merged_budgets, numbers, read
from scaling.lack import with_lack
from scaling.memory_families import memory_families
from scaling.memory_verdict import PowerLaw, power_law
from scaling.observations import Observations, observe
from scaling.robust import reweigh

SIZES = ("slots", "memory_parameters")
"""Columns that can hold the size, in order of preference."""


@dataclass(frozen=True, kw_only=True)
class MemoryModel(CurveFit):
    """One family on the rows its formula is defined for."""

    scope: str
    """"M > 0" or "all": AICc is only compared within one scope."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**self.summary(), "scope": self.scope}


@dataclass(frozen=True, kw_only=True)
class MemoryFit:
    """Everything one memory sweep says. `to_dict` is the stable JSON schema."""

    n: int
    cells: int
    """Distinct sizes."""
    size_column: str
    unit: float
    """M_ref: the geometric mean of the sizes above zero, in the units of `size_column`."""
    decades: float
    """log10 of the largest over the smallest size above zero."""
    models: tuple[MemoryModel, ...]
    best: str | None
    """The family with the lowest AICc among those on M > 0."""
    power_law: PowerLaw
    held: Mapping[str, Any]
    excluded: tuple[Excluded, ...]
    observations: Observations = field(repr=False, compare=False)

    def model(self, name: str) -> MemoryModel:
        """The family called `name`."""
        for model in self.models:
            if model.name == name:
                return model
        raise ScalingError(f"There is no memory family {name!r}; there are {[m.name for m in self.models]}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; see docs/scaling.md for the schema."""
        return {
            "kind": "memory",
            "n": self.n,
            "cells": self.cells,
            "size_column": self.size_column,
            "unit": self.unit,
            "decades": self.decades,
            "models": [model.to_dict() for model in self.models],
            "best": self.best,
            "power_law": self.power_law.to_dict(),
            "held": dict(self.held),
            "excluded": [item.to_dict() for item in self.excluded],
        }


def fit_memory(
    source: Source,
    *,
    size: str | None = None,
    budget: float | None = None,
    columns: Mapping[str, str] | None = None,
    noise: str = "auto",
    blocks: str = "auto",
    cluster: str | None = None,
    error: str = "gaussian",
    confidence: float = 0.95,
) -> MemoryFit:
    """Fit loss against memory size at one budget.

    `size` is the column of sizes: "slots" or "memory_parameters", by default the first that is present. A
    run with size 0 has no memory. The other options are those of `fit_allocation`.
    """
    if not 0.5 <= confidence < 1:
        raise ScalingError(
            f"confidence is {confidence!r}; a level from 0.5 up to, but not including, 1 is needed."
        )
    frame = read(source, columns)
    if size is None:
        size = next((name for name in SIZES if name in frame.columns), SIZES[0])
    elif size not in SIZES:
        raise ScalingError(f"size is {size!r}; allowed are 'slots' and 'memory_parameters'.")
    frame, excluded = finished(frame, (size,), "memory")
    frame, value = one_budget(frame, budget)
    sizes = numbers(frame, size)
    if not (sizes > 0).any():
        raise ScalingError(
            f"Column {size!r} has no size above zero; a memory law needs at least one run with memory."
        )
    obs = observe(frame, size, noise=noise, blocks=blocks, cluster=cluster, excluded=excluded)
    families = memory_families(obs.x)
    able = tuple(f for f in families if f.where is None)
    obs, tau = with_lack(obs, able) if noise == "known+lack" else (obs, 0.0)
    obs, weighting = reweigh(obs, able, error)
    held = {
        "blocks": obs.block_name,
        "sd_known": obs.known,
        "lack_of_fit_sd": tau,
        "error": weighting,
        "runs_left_out": sum(item.count for item in excluded),
        "budgets_merged": "" if value is None else merged_budgets(numbers(frame, "budget")),
    }
    return analyse(obs, size=size, held=held, confidence=confidence)


def analyse(
    obs: Observations, *, size: str = "slots", held: Mapping[str, Any] | None = None, confidence: float = 0.95
) -> MemoryFit:
    """The fit of observations that are ready."""
    above = obs.x[obs.x > 0]
    unit = float(np.exp(np.log(above).mean()))
    has_zero = bool((obs.x == 0).any())
    positive = obs.take(obs.x > 0) if has_zero else obs
    models = []
    for family in memory_families(obs.x):
        only = family.where is not None
        fit = fit_curve(family, positive if only else obs, confidence)
        scope = "M > 0" if only or not has_zero else "all"
        models.append(MemoryModel(**_in_units(fit, unit), scope=scope))
    models = _compare(models)
    credible = [m for m in models if m.delta_aicc is not None and m.eligible and m.scope == "M > 0"]
    best = min(credible, key=lambda m: m.delta_aicc or 0.0).name if credible else None
    return MemoryFit(
        n=obs.n,
        cells=len(obs.cells),
        size_column=size,
        unit=unit,
        decades=float(np.log10(above.max() / above.min())),
        models=tuple(models),
        best=best,
        power_law=power_law(positive, models),
        held=held or {},
        excluded=obs.excluded,
        observations=obs,
    )


def _in_units(fit: CurveFit, unit: float) -> dict[str, Any]:
    """Fields of a fit whose sizes (M0, M_break) are given in the units of the data."""
    params, intervals = dict(fit.params), dict(fit.intervals)
    for name in ("M0", "M_break"):
        if name in params:
            params[name] *= unit
            low, high = intervals[name]
            intervals[name] = (None if low is None else low * unit, None if high is None else high * unit)
    return {**fit.__dict__, "params": params, "intervals": intervals}


def _compare(models: list[MemoryModel]) -> list[MemoryModel]:
    out = []
    for model in models:
        scores = [m.aicc for m in models if m.scope == model.scope and m.eligible and m.aicc is not None]
        delta = None if model.aicc is None or not scores else model.aicc - min(scores)
        out.append(MemoryModel(**{**model.__dict__, "delta_aicc": delta}))
    return out

"""The standard laws that a table calls for: which are fitted, and what tries the one that is chosen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from scaling.allocation import CREDIBLE
from scaling.chinchilla import FLOPS_PER_PARAMETER_TOKEN, fit_chinchilla
from scaling.choosing import HeldOut, Influence, hold_out_compute, law_influence
from scaling.errors import ScalingError
from scaling.frame import budget_groups
from scaling.isoflop import IsoFlopFit, fit_isoflop
from scaling.lawfit import LawFit
from scaling.powerlaws import fit_gadre, fit_kaplan
from scaling.report.numbers import budget_label
from scaling.routedlaws import fit_clark, fit_tao

DISTINCT = 3
"""Values that a column must take before a law of it is tried."""
DRAWS = 1000
MOST_BUDGETS = 12
"""Most budgets left out one by one, and drawn apart."""


@dataclass(frozen=True, kw_only=True)
class Standard:
    """Laws of size, tokens, experts or vocabulary fitted to the same runs."""

    laws: tuple[LawFit, ...]
    """Every law that the columns allow, lowest AICc of those on the same scale first."""
    valleys: IsoFlopFit | None
    """Valleys of loss against size; None unless at least one budget has its bottom among its sizes."""
    held_out: HeldOut | None
    """The runs of largest compute, predicted by the first law from the rest."""
    influence_on: str
    """The quantity of the first law whose influences are listed, or ""."""
    influences: tuple[Influence, ...]

    @property
    def first(self) -> LawFit:
        """The law that the pictures show."""
        return self.laws[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "laws": [law.to_dict() for law in self.laws],
            "isoflop": None if self.valleys is None else self.valleys.to_dict(),
            "held_out": None if self.held_out is None else self.held_out.to_dict(),
            "influence_on": self.influence_on,
            "influence": [item.to_dict() for item in self.influences],
        }


def calls_for_laws(fitted: pl.DataFrame) -> bool:
    """Whether the columns of a table hold what a standard law relates."""
    return bool(_called_for(fitted))


def standard(frame: pl.DataFrame, fitted: pl.DataFrame, unfitted: list[str]) -> Standard | None:
    """Fit the laws that `frame` calls for; `fitted` are its rows that can be fitted.

    What could not be fitted is added to `unfitted` as a sentence. None where nothing was fitted.
    """
    fits = []
    for call in _called_for(fitted):
        try:
            law = call.fit(frame, 0)
        except ScalingError as error:
            unfitted.append(f"{call.name} is not fitted: {error}")
            continue
        if law.params:
            fits.append((law, call))
        else:
            unfitted.append(f"{call.name} is not fitted: {'; '.join(law.notes)}.")
    if not fits:
        return None
    # AICc of the laws of log loss and of those by least squares stand on different scales
    scale = fits[0][0].delta
    fits.sort(key=lambda item: (item[0].delta != scale, math.inf if item[0].aicc is None else item[0].aicc))
    lowest = fits[0][0].aicc
    near = [
        law.delta != scale or not (lowest and law.aicc) or law.aicc < lowest + CREDIBLE for law, _ in fits
    ]
    # a bootstrap takes a second, and is not worth it for a law that the data refuse
    laws = tuple(call.fit(frame, DRAWS) if ok else law for (law, call), ok in zip(fits, near, strict=True))
    parameter = next((name for name in ("N_exponent", "eta", "alpha_N") if name in _known(laws[0])), "")
    return Standard(
        laws=laws,
        valleys=_valleys(frame, unfitted),
        held_out=hold_out_compute(laws[0]),
        influence_on=parameter,
        influences=law_influence(laws[0], parameter, apart(laws[0])) if parameter else (),
    )


def compute(law: LawFit) -> np.ndarray | None:
    """Return the training FLOPs of every run [n], 6 N D where the law takes N and D; None without them."""
    columns = law.columns
    if "budget" in columns:
        return columns["budget"]
    if {"total_parameters", "tokens"} <= set(columns):
        return FLOPS_PER_PARAMETER_TOKEN * columns["total_parameters"] * columns["tokens"]
    return None


def apart(law: LawFit) -> dict[str, np.ndarray] | None:
    """Return a mask [n] for each budget by its label; None where runs form no budgets, or too many."""
    flops = compute(law)
    if flops is None:
        return None
    groups = budget_groups(flops)
    if not 2 <= groups.max() + 1 <= MOST_BUDGETS:
        return None
    masks = [groups == group for group in range(groups.max() + 1)]
    return {budget_label(float(np.median(flops[mask]))): mask for mask in masks}


@dataclass(frozen=True, kw_only=True)
class _Call:
    """A law to fit, with a number of bootstrap draws (for which laws by least squares have no use)."""

    name: str
    fit: Callable[[pl.DataFrame, int], LawFit]


def _called_for(fitted: pl.DataFrame) -> list[_Call]:
    varied = {
        name
        for name in fitted.columns
        if fitted[name].dtype.is_numeric() and fitted[name].drop_nulls().n_unique() >= DISTINCT
    }
    laws: list[_Call] = []
    if "total_parameters" in varied and varied & {"tokens", "budget"}:
        laws += [
            _Call(name="Chinchilla's law", fit=lambda frame, draws: fit_chinchilla(frame, draws=draws)),
            _Call(
                name="Chinchilla's law with one exponent",
                fit=lambda frame, draws: fit_chinchilla(frame, tied=True, draws=draws),
            ),
            _Call(name="Kaplan's law", fit=lambda frame, draws: fit_kaplan(frame, draws=draws)),
        ]
    if {"over_training", "budget"} <= varied:
        laws.append(_Call(name="Gadre's law", fit=lambda frame, draws: fit_gadre(frame, draws=draws)))
    if "experts" in varied and varied & {"active_parameters", "total_parameters"}:
        laws.append(_Call(name="Clark's law", fit=lambda frame, draws: fit_clark(frame)))
    if "vocabulary_parameters" in varied and {"total_parameters", "tokens"} <= varied:
        laws.append(_Call(name="Tao's law", fit=lambda frame, draws: fit_tao(frame)))
    return laws


def _known(law: LawFit) -> set[str]:
    return {*law.params, *law.derived} if law.terms is not None else set()


def _valleys(frame: pl.DataFrame, unfitted: list[str]) -> IsoFlopFit | None:
    if "total_parameters" not in frame.columns:
        return None
    if "budget" not in frame.columns:
        if "tokens" not in frame.columns:
            return None
        flops = FLOPS_PER_PARAMETER_TOKEN * pl.col("total_parameters") * pl.col("tokens")
        frame = frame.with_columns(budget=flops)
    try:
        fit = fit_isoflop(frame)
    except ScalingError as error:
        unfitted.append(f"No valleys of loss against size are fitted: {error}")
        return None
    return fit if any(valley.optimum is not None for valley in fit.valleys) else None

"""The section that tries the fits: residuals, lack of fit, held-out runs, influence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scaling.choosing import Influence
from scaling.curvefit import residuals
from scaling.report import checkplots
from scaling.report.adequacy import BudgetTrial, Trial
from scaling.report.document import Block, Paragraph, Picture, Pictures, Section, Table
from scaling.report.drawing import SHARE, Estimate, Label, Points
from scaling.report.memories import AXES
from scaling.report.numbers import fixed, interval, short, significant

INFLUENCES = 12
"""Rows of an influence table: the largest changes; fits.json holds every one."""


def checks(trials: Sequence[Trial], budgets: BudgetTrial | None) -> Section | None:
    """Return the section, or None where no model was chosen."""
    if not trials:
        return None
    text = (
        "Residuals of the model with the lowest AICc, with the effects of paired seeds taken out. A pattern"
        " along the axis would mean that the formula, and not chance, is wrong there."
    )
    blocks: list[Block] = [Paragraph(text)]
    blocks.append(Pictures(tuple(_residuals(trial, n) for n, trial in enumerate(trials, start=1))))
    blocks.append(adequacy(trials))
    held = [trial for trial in trials if trial.held_out]
    if held:
        blocks.append(Paragraph(_said(held)))
        blocks.append(Pictures((_held_out(held),)))
        blocks.append(ends(held))
    if budgets is not None and budgets.held_out is not None:
        blocks.append(forecast(budgets.held_out))
    blocks += [
        influences(trial.of, trial.parameter, trial.influences) for trial in trials if trial.influences
    ]
    if budgets is not None and budgets.influences:
        blocks.append(influences("all budgets", "ρ* at the largest budget", budgets.influences))
    return Section(ident="checks", title="How far to believe it", blocks=tuple(blocks))


def adequacy(trials: Sequence[Trial]) -> Table:
    """Return lack of fit and leave-one-out error of every chosen model."""
    return Table(
        title="Does the chosen formula fit?",
        columns=("sweep", "model", "lack of fit F", "p", "verdict", "residual SD", "leave-one-out error"),
        rows=tuple(
            (
                trial.of,
                trial.model.name,
                significant(trial.lack.statistic),
                significant(trial.lack.p_value, 2),
                _verdict(trial.lack.p_value),
                fixed(trial.model.sd, 4),
                fixed(trial.loo, 4),
            )
            for trial in trials
        ),
        numeric=frozenset({"lack of fit F", "p", "residual SD", "leave-one-out error"}),
        note=(
            "Lack of fit compares the scatter of cells about the curve with that of seeds within cells; where"
            " it is rejected, intervals rest on the former. Errors are in nats."
        ),
    )


def _verdict(p_value: float | None) -> str:
    if p_value is None:
        return "no replicates to test it"
    return "rejected at 5 %" if p_value < 0.05 else "not rejected"


def ends(trials: Sequence[Trial]) -> Table:
    """Return the runs at each end of a sweep, predicted from the rest."""
    rows = []
    for trial in trials:
        for held in trial.held_out:
            for observed, predicted, (low, high) in zip(
                held.observed, held.predicted, held.interval, strict=True
            ):
                inside = "yes" if low <= observed <= high else "no"
                rows.append(
                    (
                        trial.of,
                        _end(held.what, trial.axis),
                        trial.held_out_model,
                        fixed(observed, 4),
                        fixed(predicted, 4),
                        interval(low, high, 4) if np.isfinite([low, high]).all() else "unbounded",
                        inside,
                    )
                )
    columns = ("sweep", "held out", "model", "measured", "predicted", "95 % interval of a new run", "inside")
    return Table(
        title="Runs held out and predicted",
        columns=columns,
        rows=tuple(rows),
        numeric=frozenset({"measured", "predicted"}),
        long=True,
    )


def forecast(held: Mapping[str, Any]) -> Table:
    """Return rho* of the largest budget, forecast from the smaller ones and measured."""

    def value_of(name: str) -> str:
        return "not identified" if held[name] is None else fixed(held[name])

    inside = "cannot be said" if held["inside"] is None else "yes" if held["inside"] else "no"
    return Table(
        title="Best share of the largest budget, forecast from the smaller ones",
        columns=(
            "budget",
            "forecast ρ*",
            "95 % interval",
            "measured ρ*",
            "95 % interval, measured",
            "inside",
        ),
        rows=(
            (
                str(held["what"]),
                value_of("forecast"),
                interval(*held["interval"]),
                value_of("measured"),
                interval(*held["measured_interval"]),
                inside,
            ),
        ),
    )


def influences(of: str, parameter: str, found: Sequence[Influence]) -> Table:
    """Return what a parameter becomes without each cell, seed or budget, the largest changes first."""
    ordered = sorted(found, key=lambda item: -abs(item.change or 0.0))
    note = ""
    if len(ordered) > INFLUENCES:
        note = f"The {INFLUENCES} largest of {len(ordered)}; fits.json holds every one."
    return Table(
        title=f"Influence on {parameter}, {of}",
        columns=("left out", f"{parameter} without it", "change"),
        rows=tuple(
            (
                _left_out(item.left_out, parameter),
                fixed(item.value),
                fixed(item.change) if item.change is None or item.change < 0 else f"+{fixed(item.change)}",
            )
            for item in ordered[:INFLUENCES]
        ),
        numeric=frozenset({f"{parameter} without it", "change"}),
        note=note,
    )


def _left_out(what: str, parameter: str) -> str:
    """Return "x = 0.704545" as "ρ = 0.7045"; seeds and budgets as they are."""
    value = what.removeprefix("x = ")
    if value == what:
        return what
    return f"ρ = {float(value):.4g}" if parameter.startswith("ρ") else f"M = {short(float(value))}"


def _said(trials: Sequence[Trial]) -> str:
    parts = []
    for trial in trials:
        for held in trial.held_out:
            what = _end(held.what, trial.axis)
            parts.append(f"{trial.of}, {what}: {held.inside} of {len(held.x)}")
    return f"Runs held out that fell inside the 95 % interval predicted from the rest: {'; '.join(parts)}."


def _residuals(trial: Trial, number: int) -> Picture:
    obs, model = trial.model.obs, trial.model
    return checkplots.residuals(
        Label(
            name=f"residuals-{number}",
            title=f"{trial.of}: {model.name}",
            caption=f"Loss minus the fitted loss of {model.name}.",
            alt=f"Residuals of {model.name}, in thousandths of a nat.",
        ),
        Points(x=obs.x, y=residuals(model), seed=obs.seed),
        axis=SHARE if trial.axis == "rho" else AXES[trial.axis],
        log=trial.axis != "rho",
        sd=model.sd,
    )


def _held_out(trials: Sequence[Trial]) -> Picture:
    actual, predicted, groups = [], [], []
    for trial in trials:
        for held in trial.held_out:
            for observed, mean, (low, high) in zip(held.observed, held.predicted, held.interval, strict=True):
                bounded = bool(np.isfinite([low, high]).all())
                actual.append(observed)
                predicted.append(Estimate.of("", mean, (low, high) if bounded else (None, None)))
                groups.append(f"{trial.of}, {_end(held.what, trial.axis)}")
    return checkplots.held_out(
        Label(
            name="held-out",
            title="Held-out runs",
            caption=(
                "Each run at an end of a sweep against its prediction from the rest, with the 95 % interval"
                " of a new run."
            ),
            alt=_said(trials),
        ),
        np.array(actual),
        predicted,
        groups,
    )


def _end(what: str, axis: str) -> str:
    """Return "largest x (131072)" as "M = 131k"."""
    value = float(what.partition("(")[2].rstrip(")"))
    return f"ρ = {value:.4g}" if axis == "rho" else f"M = {short(value)}"

"""The section on loss against memory: the law with its fan, the profile of alpha, and the models compared."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from scaling.allocation import CREDIBLE
from scaling.memory import MemoryFit, MemoryModel
from scaling.report import checkplots, plots, words
from scaling.report.analysis import Sizes
from scaling.report.document import Block, Paragraph, Picture, Pictures, Section, Table
from scaling.report.drawing import Label, Points
from scaling.report.models import SCORES, curve, formula, profile_f, scores, status
from scaling.report.numbers import budget_label, interval, percent, significant

FAN = 10.0
"""How far beyond the largest memory the law is drawn: a reader asks what ten times more would bring."""
WIDEST = 3.0
"""The profile of alpha is drawn at most this far from 0; beyond, curves differ in their last point alone."""
AXES = {"slots": "memory slots (table rows)", "memory_parameters": "memory parameters"}


def memories(sweeps: Sequence[Sizes]) -> Section:
    """Return the section on loss against memory."""
    blocks: list[Block] = []
    for number, sweep in enumerate(sweeps, start=1):
        fit = sweep.fit
        of = "" if sweep.budget is None else f", {budget_label(sweep.budget)}"
        blocks.append(Paragraph(words.memory(fit, sweep.budget)))
        profile = _profile(fit, number, of)
        blocks.append(Pictures((_picture(fit, number, of), *([] if profile is None else [profile]))))
        blocks.append(models(fit, of))
    return Section(ident="memory", title="Loss against memory", blocks=tuple(blocks))


def models(fit: MemoryFit, of: str = "") -> Table:
    """Return every family fitted to one sweep of memory sizes; `of` tells it from others."""
    ordered = sorted(
        fit.models, key=lambda m: (m.scope, not m.eligible, math.inf if m.aicc is None else m.aicc, m.k)
    )
    level = percent(fit.models[0].confidence)
    return Table(
        title=f"Models of loss against memory{of}",
        columns=("model", f"parameters and {level} intervals", *SCORES, "runs", "status", "formula"),
        rows=tuple((m.name, _parameters(m), *scores(m), m.scope, status(m), formula(m)) for m in ordered),
        numeric=frozenset(SCORES),
        note=(
            f"M is {fit.size_column}; M_ref = {significant(fit.unit, 4)} is the geometric mean of the sizes;"
            " z_α(u) = (1 − u^−α)/α, which is ln u at α = 0. AICc is compared among models of the same runs."
        ),
    )


def credible(fit: MemoryFit) -> list[MemoryModel]:
    """Return the models on M > 0 within `CREDIBLE` of the best, best first; else the straight line."""
    near = [
        m
        for m in fit.models
        if m.eligible and m.scope == "M > 0" and m.delta_aicc is not None and m.delta_aicc < CREDIBLE
    ]
    if near:
        return sorted(near, key=lambda m: m.delta_aicc or 0.0)
    return [m for m in fit.models if m.name == "log-linear" and m.fitted]


def _parameters(model: MemoryModel) -> str:
    shown = []
    for name, value in model.params.items():
        if name == "level":
            continue
        low, high = model.intervals.get(name, (None, None))
        ends = f"[{significant(low) if low is not None else 'unbounded'}, "
        ends += f"{significant(high) if high is not None else 'unbounded'}]"
        shown.append(f"{name.replace('alpha', 'α')} = {significant(value)} {ends}")
    return "; ".join(shown) or "–"


def _picture(fit: MemoryFit, number: int, of: str) -> Picture:
    obs = fit.observations
    above = obs.x > 0
    grid = np.geomspace(float(obs.x[above].min()), FAN * float(obs.x.max()), 121)
    without = None
    if not above.all():
        without = Points(x=obs.x[~above], y=obs.y[~above], seed=obs.seed[~above])
    return plots.memory(
        Label(
            name=f"memory-{number}",
            title=f"Loss against memory{of}",
            caption=(
                f"Every run, with each credible model and the 95 % band of its mean, carried to {FAN:g} times"
                " the largest memory."
            ),
            alt=f"Loss against memory on a log axis. {words.memory(fit)}",
        ),
        Points(x=obs.x[above], y=obs.y[above], seed=obs.seed[above]),
        [curve(m, grid) for m in credible(fit)],
        axis=AXES[fit.size_column],
        without=without,
    )


def _profile(fit: MemoryFit, number: int, of: str) -> Picture | None:
    model = fit.model("box-cox")
    if not model.fitted or fit.observations.flat:
        return None
    low, high = model.intervals["alpha"]
    left, right = -WIDEST if low is None else low, WIDEST if high is None else high
    margin = 0.5 * max(right - left, 0.2)
    values = np.linspace(max(left - margin, -WIDEST), min(right + margin, WIDEST), 161)
    statistic, threshold = profile_f(model, values)
    return checkplots.profile(
        Label(
            name=f"alpha-{number}",
            title=f"Profile of the exponent α{of}",
            caption=(
                "Loss is c − b (1 − (M/M_ref)^−α)/α. The data reject no α under the dashed line; α = 0 is a"
                " straight line in the logarithm of memory, α > 0 a power law."
            ),
            alt=f"Profile of the exponent alpha; 95 % interval {interval(low, high)}.",
        ),
        values,
        statistic,
        threshold,
        axis="exponent α",
        null=0.0,
        null_label="α = 0: log-linear",
    )

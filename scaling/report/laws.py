"""The section on standard laws: what each says, how well it fits, and what the chosen one stands on."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from scaling.chinchilla import FLOPS_PER_PARAMETER_TOKEN
from scaling.isoflop import IsoFlopFit
from scaling.lawfit import LawFit
from scaling.report import checkplots, lawplots
from scaling.report.checks import influences
from scaling.report.document import Block, Paragraph, Picture, Pictures, Section, Table
from scaling.report.drawing import Curve, Estimate, Label, Points
from scaling.report.numbers import budget_label, fixed, percent, short, significant
from scaling.report.standard import Standard, apart, compute

FORECAST = 10.0
"""How far beyond the largest compute the best size is drawn."""
STEPS = 41
NAMES: Mapping[str, str] = {
    "chinchilla": "Chinchilla's law",
    "chinchilla-tied": "Chinchilla's law, α = β",
    "kaplan": "Kaplan's law",
    "gadre": "Gadre's law",
    "clark": "Clark's law",
    "tao": "Tao's law",
}
AXES: Mapping[str, str] = {
    "total_parameters": "parameters N",
    "active_parameters": "active parameters N",
    "tokens": "training tokens D",
    "budget": "training compute C (FLOPs)",
    "over_training": "tokens per parameter M",
    "experts": "routed experts E",
    "vocabulary_parameters": "vocabulary parameters N_v",
}
_SIGNS = (("alpha", "α"), ("beta", "β"), ("eta", "η"))


def laws(found: Standard) -> Section:
    """Return the section."""
    blocks: list[Block] = [Paragraph(said(law)) for law in found.laws if law.interval_method != "none"]
    if found.valleys is not None:
        blocks.append(Paragraph(bottoms(found.valleys)))
    blocks.append(Pictures((*_isoflop(found.first), _agreement(found.first))))
    blocks.append(Pictures((*_frontier(found), *_exponents(found))))
    blocks.append(Pictures(tuple(_residuals(found.first, column) for column in found.first.columns)))
    blocks.append(comparison(found))
    blocks += [parameters(law) for law in found.laws]
    if found.valleys is not None:
        blocks.append(valleys(found.valleys))
    if found.held_out is not None:
        blocks.append(Paragraph(_held_out_said(found)))
        blocks.append(Pictures((_held_out(found),)))
    if found.influences:
        blocks.append(influences(_name(found.first), _sign(found.influence_on), found.influences))
    kept = tuple(block for block in blocks if not (isinstance(block, Pictures) and not block.pictures))
    return Section(ident="laws", title="Standard laws", blocks=kept)


def said(law: LawFit) -> str:
    """Say a law's parameters with their intervals, its scatter and whatever its status warns of."""
    shown = [f"{_sign(name)} = {_with(law, name)}" for name in law.params]
    best = ""
    if "N_exponent" in law.derived:
        best = f" The size with the lowest loss at a budget grows as C^a, a = {_with(law, 'N_exponent')}."
    elif "best_multiplier" in law.derived:
        best = f" The lowest loss at a budget is at M = {_with(law, 'best_multiplier')} tokens per parameter."
    warned = f" Caution: {'; '.join(law.notes)}." if law.notes else ""
    return (
        f"{_name(law)}, L = {_sign(law.formula)}, on {law.n} runs: {', '.join(shown)}"
        f" ({_level(law)}).{best} Runs scatter about it by {_scatter(law)}.{warned}"
    )


def summary(found: Standard) -> str:
    """Say in one line which law fits best, how well, and how the best size grows."""
    law = found.first
    rivals = f" of {len(found.laws)} laws" if len(found.laws) > 1 else ""
    best = ""
    if "N_exponent" in law.derived:
        best = (
            f"; by it the size with the lowest loss at a budget grows as C^a, a = {_with(law, 'N_exponent')}"
        )
    head = f"{_name(law)} has the lowest AICc{rivals}" if rivals else f"{_name(law)} is fitted"
    warned = f" Caution: {'; '.join(law.notes)}." if law.notes else ""
    return f"{head}, and runs scatter about it by {_scatter(law)}{best}.{warned}"


def headline(found: Standard) -> list[tuple[str, str, str]]:
    """Return what stands at the head of the page: (name, value, remark)."""
    law = found.first
    facts = [("Law with the lowest AICc", _name(law), f"of {len(found.laws)} fitted, {law.status}")]
    if "E" in law.params:
        facts.append(("Loss without end, E", significant(law.params["E"], 4), f"95 % {_interval(law, 'E')}"))
    if "N_exponent" in law.derived:
        value = f"C^{significant(law.derived['N_exponent'], 3)}"
        facts.append(("Best size grows as", value, f"95 % {_interval(law, 'N_exponent')}"))
    return facts


def bottoms(fit: IsoFlopFit) -> str:
    """Say how the bottoms of the valleys move with compute."""
    inside = sum(valley.optimum is not None for valley in fit.valleys)
    head = f"{inside} of {len(fit.valleys)} budgets have the bottom of their valley among their sizes"
    if fit.exponent is None:
        return f"{head}; a power law of the bottoms needs two."
    ends = _ends(*fit.exponent_interval)
    tail = ""
    if fit.lack_of_fit_p is not None:
        fits = "is rejected" if fit.lack_of_fit_p < 0.05 else "is not rejected"
        tail = f" That one power law joins all bottoms {fits} (p = {significant(fit.lack_of_fit_p, 2)})."
    notes = f" Caution: {'; '.join(fit.notes)}." if fit.notes else ""
    level = percent(fit.confidence)
    return f"{head}; N* grows as C^a, a = {significant(fit.exponent)} {ends} ({level}).{tail}{notes}"


def comparison(found: Standard) -> Table:
    """Return every law with its AICc; laws of log loss and of least squares are not compared."""
    scores = ("k", "AICc", "Δ AICc", "scatter")
    scale, lowest = found.first.delta, found.first.aicc
    rows = []
    for law in found.laws:
        apart_by = None
        if law.delta == scale and law.aicc is not None and lowest is not None:
            apart_by = law.aicc - lowest
        rows.append(
            (
                _name(law),
                f"L = {_sign(law.formula)}",
                str(law.k),
                fixed(law.aicc, 1),
                fixed(apart_by, 1),
                _scatter(law),
                _minimised(law),
                law.status,
            )
        )
    return Table(
        title="Laws fitted to the same runs",
        columns=("law", "formula", *scores, "minimised", "status"),
        rows=tuple(rows),
        numeric=frozenset(scores),
        note=(
            "AICc compares laws that minimise the same thing. Laws more than 4 behind the first are shown"
            " without intervals."
        ),
    )


def parameters(law: LawFit) -> Table:
    """Return a law's parameters, and what follows from them."""
    return Table(
        title=f"Parameters of {_name(law)}",
        columns=("parameter", "estimate", f"{percent(law.confidence)} interval"),
        rows=tuple(
            (_sign(name), significant(value, 5), _interval(law, name))
            for name, value in {**law.params, **law.derived}.items()
        ),
        numeric=frozenset({"estimate"}),
        note=f"Intervals: {law.interval_method}. Held: {_held(law)}." if law.held else "",
    )


def valleys(fit: IsoFlopFit) -> Table:
    """Return the bottom of every budget's valley."""
    return Table(
        title="Valleys of loss against size",
        columns=("budget", "runs", "best size N*", f"{percent(fit.confidence)} interval", "loss", "status"),
        rows=tuple(
            (
                budget_label(valley.budget),
                str(valley.n),
                short(valley.optimum),
                _ends(*valley.interval, counts=True),
                fixed(valley.loss, 4),
                "; ".join(valley.notes) or valley.status,
            )
            for valley in fit.valleys
        ),
        numeric=frozenset({"runs", "best size N*", "loss"}),
        note="A parabola in ln N at each budget; intervals are profile F, the loss is that at the bottom.",
    )


def _isoflop(law: LawFit) -> tuple[Picture, ...]:
    """Return loss against size, budget by budget; none where the law has no N and D, or runs no budgets."""
    groups = apart(law)
    if groups is None or set(law.columns) != {"total_parameters", "tokens"}:
        return ()
    size, flops = law.columns["total_parameters"], compute(law)
    assert flops is not None
    drawn = []
    for name, mask in groups.items():
        grid = np.geomspace(float(size[mask].min()), float(size[mask].max()), STEPS)
        tokens = float(np.median(flops[mask])) / FLOPS_PER_PARAMETER_TOKEN / grid
        line = Curve(name=name, x=grid, mean=law.predict(total_parameters=grid, tokens=tokens))
        drawn.append((name.removesuffix(" FLOPs"), size[mask], law.loss[mask], line))
    label = Label(
        name="law-isoflop",
        title="Loss against size at each budget",
        caption=f"Every run, and {_name(law)} along each budget (D = C/6N). C in FLOPs.",
        alt=f"Loss against size, one curve a budget. {said(law)}",
    )
    return (lawplots.isoflop(label, drawn, axis=AXES["total_parameters"]),)


def _agreement(law: LawFit) -> Picture:
    label = Label(
        name="law-agreement",
        title="Fitted against measured loss",
        caption=f"{_name(law)}; runs on the dashed line are met exactly.",
        alt=f"Fitted against measured loss of {law.n} runs; scatter {_scatter(law)}.",
    )
    return lawplots.agreement(label, law.loss, law.predict(**law.columns))


def _residuals(law: LawFit, column: str) -> Picture:
    fitted = law.predict(**law.columns)
    rest = law.loss - fitted
    label = Label(
        name=f"law-residuals-{column}",
        title=f"Residuals against {AXES.get(column, column).partition(' (')[0]}",
        caption=f"Measured minus fitted loss of {_name(law)}. A pattern would mean that its form is wrong.",
        alt=f"Residuals of {_name(law)} against {column}, in thousandths of a nat.",
    )
    x = law.columns[column]
    points = Points(x=x, y=rest, seed=np.full(len(x), math.nan))
    sd = float(np.sqrt((rest**2).mean()))
    return checkplots.residuals(label, points, axis=AXES.get(column, column), log=True, sd=sd)


def _frontier(found: Standard) -> tuple[Picture, ...]:
    """Return the best size against compute, by the law and by the valleys."""
    law, flops = found.first, compute(found.first)
    curves = []
    if flops is not None and {"N_exponent", "ln_G"} <= set(law.derived):
        budgets = np.geomspace(float(flops.min()), FORECAST * float(flops.max()), STEPS)
        reach = np.log(budgets / FLOPS_PER_PARAMETER_TOKEN)
        mean = np.exp(law.derived["ln_G"] + law.derived["N_exponent"] * reach)
        low = high = None
        if law.draws:
            drawn = law.draws["ln_G"][:, None] + law.draws["N_exponent"][:, None] * reach
            tail = (1 - law.confidence) / 2
            low, high = np.exp(np.quantile(drawn, [tail, 1 - tail], axis=0))
        curves.append(Curve(name=_name(law), x=budgets, mean=mean, low=low, high=high))
    marks = []
    if found.valleys is not None:
        bottom = found.valleys
        marks = [(v.budget, Estimate.of("", v.optimum, v.interval)) for v in bottom.valleys]
        if bottom.exponent is not None:
            ends = [v.budget for v in bottom.valleys]
            grid = np.geomspace(min(ends), FORECAST * max(ends), STEPS)
            power = np.array([bottom.optimum(float(budget)) for budget in grid])
            curves.append(Curve(name="power law of the bottoms", x=grid, mean=power))
    if not curves:
        return ()
    label = Label(
        name="law-frontier",
        title="Best size against compute",
        caption=f"With 95 % intervals, carried to {FORECAST:g} times the largest compute.",
        alt=f"The size with the lowest loss at each compute. {said(law)}",
    )
    return (lawplots.frontier(label, marks, curves),)


def _exponents(found: Standard) -> tuple[Picture, ...]:
    rows = [
        Estimate.of(_sign(name), value, found.first.intervals.get(name, (None, None)))
        for name, value in {**found.first.params, **found.first.derived}.items()
        if name in ("alpha", "beta", "eta", "alpha_N", "alpha_D", "N_exponent", "alpha_1", "alpha_2")
    ]
    if found.valleys is not None and found.valleys.exponent is not None:
        ends = found.valleys.exponent_interval
        rows.append(Estimate.of("a, of the valleys", found.valleys.exponent, ends))
    if not rows:
        return ()
    label = Label(
        name="law-exponents",
        title="Exponents",
        caption=f"{_name(found.first)}, with 95 % intervals; a is the exponent of the best size in compute.",
        alt=f"Exponents with their intervals. {said(found.first)}",
    )
    return (checkplots.forest(label, rows, axis="exponent"),)


def _held_out_said(found: Standard) -> str:
    held = found.held_out
    assert held is not None
    return (
        f"Fitted without {held.what}, {_name(found.first)} predicts them: {held.inside} of"
        f" {len(held.observed)} fell inside the 95 % interval of a new run."
    )


def _held_out(found: Standard) -> Picture:
    held = found.held_out
    assert held is not None
    label = Label(
        name="law-held-out",
        title="Largest compute, held out",
        caption="Each held-out run against its prediction, with the 95 % interval of a new run.",
        alt=_held_out_said(found),
    )
    predicted = [Estimate.of("", p, ends) for p, ends in zip(held.predicted, held.interval, strict=True)]
    groups = [held.what] * len(predicted)
    return checkplots.held_out(label, np.array(held.observed), predicted, groups)


def _name(law: LawFit) -> str:
    return NAMES.get(law.name, law.name)


def _sign(name: str) -> str:
    """Return a parameter or formula as people write it."""
    text = {"N_exponent": "a = β/(α+β)", "D_exponent": "b = α/(α+β)", "ln_G": "ln G"}.get(name, name)
    for word, sign in _SIGNS:
        text = text.replace(word, sign)
    return text


def _with(law: LawFit, name: str) -> str:
    value = {**law.params, **law.derived}[name]
    return f"{significant(value, 4)} {_interval(law, name)}"


def _interval(law: LawFit, name: str) -> str:
    if law.interval_method == "none":
        return "not computed"
    return _ends(*law.intervals.get(name, (None, None)))


def _ends(low: float | None, high: float | None, *, counts: bool = False) -> str:
    if low is None and high is None:
        return "unbounded"
    said = [
        "unbounded" if end is None else short(end) if counts else significant(end, 4) for end in (low, high)
    ]
    return f"[{', '.join(said)}]"


def _level(law: LawFit) -> str:
    if law.interval_method == "none":
        return "intervals not computed"
    return f"{percent(law.confidence)} intervals, {law.interval_method}"


def _scatter(law: LawFit) -> str:
    """Return the root mean square of the residuals of log loss, as per cents of the loss."""
    return f"{significant(100 * float(np.sqrt((law.residuals**2).mean())), 2)} %"


def _minimised(law: LawFit) -> str:
    if math.isinf(law.delta):
        return "squares"
    return f"Huber loss of log loss, δ = {law.delta:g}"


def _held(law: LawFit) -> str:
    return "; ".join(f"{name} = {value}" for name, value in law.held.items())

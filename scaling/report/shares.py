"""The section on loss against share: pictures, the words beside them, and the tables behind them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from scaling.allocation import CREDIBLE, AllocationFit
from scaling.report import checkplots, plots, words
from scaling.report.document import Block, Paragraph, Picture, Pictures, Section, Table
from scaling.report.drawing import Curve, Estimate, Label, Points, joined
from scaling.report.models import SCORES, curve, formula, scores, status
from scaling.report.numbers import budget_label, fixed, interval, percent, significant
from scaling.scatter import Replicates, replicates
from scaling.ushape import UShape

if TYPE_CHECKING:
    from scaling.sequential import NextRun


def shares(fits: Sequence[AllocationFit], proposed: Sequence[NextRun]) -> Section:
    """Return the section on loss against rho, budget by budget; `proposed` are runs to make next."""
    blocks: list[Block] = []
    for number, fit in enumerate(fits, start=1):
        blocks.append(Paragraph(words.allocation(fit)))
        blocks.append(Pictures((_picture(fit, number), *_intervals(fit, number))))
    blocks.append(evidence(fits))
    blocks += [models(fit) for fit in fits]
    if proposed:
        blocks.append(further(proposed))
    return Section(ident="shares", title="Loss against share", blocks=tuple(blocks))


def evidence(fits: Sequence[AllocationFit]) -> Table:
    """Return the evidence for and against a U, one column a budget."""
    asked: tuple[tuple[str, Callable[[UShape], str]], ...] = (
        ("verdict", lambda u: u.verdict),
        ("p of the U (the larger of the next two)", lambda u: significant(u.p_value, 2)),
        ("p, loss never rises with ρ", lambda u: significant(u.p_no_rise, 2)),
        ("p, loss never falls with ρ", lambda u: significant(u.p_no_fall, 2)),
        ("p of a hill, an inverted U", lambda u: significant(u.p_inverted, 2)),
        ("p, loss does not depend on ρ", lambda u: significant(u.p_flat, 2)),
        ("left end minus bottom, nats", lambda u: _contrast(u, "left")),
        ("right end minus bottom, nats", lambda u: _contrast(u, "right")),
        ("SD of one run in these tests, nats", lambda u: f"{fixed(u.sd, 4)} from {u.sd_source}"),
        ("p, slope test (decides nothing)", lambda u: significant(u.slope_p, 2)),
        ("p, two-lines test (decides nothing)", lambda u: significant(u.two_lines_p, 2)),
    )
    seen = [replicates(fit.observations) for fit in fits]
    between: tuple[tuple[str, Callable[[Replicates], str]], ...] = (
        ("SD of one run between seeds, nats", lambda r: f"{fixed(r.sd, 4)} ({r.dof} degrees of freedom)"),
        ("largest difference of two runs of one ρ, nats", lambda r: fixed(r.widest, 4)),
        ("p, runs of one seed share no level", lambda r: significant(r.pairing_p, 2)),
    )
    rows = [(name, *(say(fit.u_shape) for fit in fits)) for name, say in asked]
    if any(seen):
        rows += [(name, *("–" if r is None else say(r) for r in seen)) for name, say in between]
    return Table(
        title="Is it a U?",
        columns=("", *(budget_label(fit.budget) for fit in fits)),
        rows=tuple(rows),
        note=(
            "The verdict rests on a bootstrap of monotone against valley-shaped regression, once in each"
            " direction, and on both end contrasts. The bottom is the lowest inner cell, picked by the same"
            " losses, so that contrasts with it lean upwards. The slope test (Lind and Mehlum) rejects on"
            " saturating monotone curves far too often, and the two-lines test (Simonsohn) needs about thirty"
            " points."
        ),
    )


def further(proposed: Sequence[NextRun]) -> Table:
    """Return the runs that would sharpen the best share most."""
    return Table(
        title=f"Runs that would sharpen ρ* most, {budget_label(proposed[0].budget)}",
        columns=("ρ", "seed", "expected SD of ρ*, relative to now"),
        rows=tuple((fixed(run.rho, 4), str(run.seed), fixed(run.sd_ratio, 2)) for run in proposed),
        numeric=frozenset({"ρ", "seed", "expected SD of ρ*, relative to now"}),
        note=(
            "One after the other, each given those before it, averaged over what the runs still allow; where"
            " experts are counted, only shares of whole experts, and where seeds are paired, all of them."
        ),
    )


def _contrast(u: UShape, side: str) -> str:
    for contrast in u.contrasts:
        if contrast.name.startswith(side):
            return f"{fixed(contrast.estimate, 4)} {interval(*contrast.interval, digits=4)}"
    return "–"


def models(fit: AllocationFit) -> Table:
    """Return every family fitted to one budget's sweep: those that may be chosen first, by AICc."""
    ordered = sorted(fit.models, key=lambda m: (not m.eligible, math.inf if m.aicc is None else m.aicc, m.k))
    rows = tuple(
        (
            m.name,
            fixed(m.rho),
            interval(*m.interval) if m.fitted and m.family.axes else "–",
            *scores(m),
            status(m),
            formula(m),
        )
        for m in ordered
    )
    floor = f"{significant(fit.held.get('r0'))} ({fit.held.get('r0_source')})"
    return Table(
        title=f"Models of loss against share, {budget_label(fit.budget)}",
        columns=(
            "model",
            "ρ*",
            f"{percent(fit.optimum.confidence)} interval of ρ*",
            *SCORES,
            "status",
            "formula",
        ),
        rows=rows,
        numeric=frozenset({"ρ*", *SCORES}),
        note=(
            f"k counts the curve's parameters; R = (k + ρ(E₁ − k))/E₁ with k/(E₁ − k) = {floor}. Models"
            f" within {CREDIBLE:g} of the lowest AICc are credible. The cubic, and models with fewer"
            " than k + 3 distinct ρ, are shown and never chosen."
        ),
    )


def _picture(fit: AllocationFit, number: int) -> Picture:
    obs, best = fit.observations, fit.optimum
    credible = [fit.model(name) for name in best.members]
    jump = any(m.family.jump_at is not None for m in credible)
    unknown = best.rho is None and best.interval == (None, None)
    caption = "Every run, with each credible model and the 95 % band of its mean."
    if len(joined(obs.seed)):
        caption += " Thin grey lines join the runs of one seed."
    if jump:
        caption += " Where a model has a level of its own at ρ = 1, its curve shows the limit from the left."
    return plots.allocation(
        Label(
            name=f"share-{number}",
            title=budget_label(fit.budget),
            caption=caption,
            alt=f"Loss against share. {words.shape(fit)} {words.optimum(fit)}",
        ),
        Points(x=obs.x, y=obs.y, seed=obs.seed),
        [_below_one(fit, name) for name in best.members],
        optimum=None if unknown else Estimate.of("ρ*", best.rho, best.interval),
        plateau=fit.plateau.interval,
    )


def _below_one(fit: AllocationFit, name: str) -> Curve:
    """Return a model's curve over the runs; one with a jump at rho = 1 stops short of it."""
    model = fit.model(name)
    x = fit.observations.x
    grid = np.linspace(float(x.min()), float(x.max()), 201)
    return curve(model, grid[grid < 1.0] if model.family.jump_at is not None else grid)


def _intervals(fit: AllocationFit, number: int) -> tuple[Picture, ...]:
    """Return the picture of every model's rho*; none where no model has anything to show."""
    rows = [
        Estimate.of(m.name, m.rho, m.interval, note="no minimum inside (0, 1)")
        for m in fit.models
        if m.fitted and m.family.axes
    ]
    if fit.observations.flat or all((row.value, row.low, row.high) == (None, None, None) for row in rows):
        return ()
    best = fit.optimum
    drawn = checkplots.forest(
        Label(
            name=f"optimum-{number}",
            title=f"ρ* by model, {budget_label(fit.budget)}",
            caption=(
                "95 % profile intervals; an arrow is an end that the data do not bound. The union is over the"
                " credible models."
            ),
            alt=f"The best share in every model. {words.optimum(fit)}",
        ),
        rows,
        Estimate.of("union", best.rho, best.interval, note="not identified"),
        axis="best share ρ*",
        within=(0.0, 1.0),
    )
    return (drawn,)

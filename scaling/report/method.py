"""How a study's fits were made, read off the fits themselves, for the checklist."""

from __future__ import annotations

import math

from scaling.allocation import CREDIBLE
from scaling.observations import MOST
from scaling.report.analysis import Study
from scaling.report.checklist import Method
from scaling.report.numbers import budget_label, percent


def method(study: Study) -> Method:
    """Return what the checklist says of the fits."""
    curves = bool(study.allocations or study.memories)
    found = study.standard
    laws = () if found is None else found.laws
    fitted = study.runs.fitted
    columns = {name for name in fitted.columns if fitted[name].null_count() < fitted.height}
    weights = " and ".join(name for name in ("weight", "loss_sd") if name in columns)
    assumed, chosen, minimised, algorithms, intervals = [], [], [], [], []
    if study.allocations:
        chosen.append(
            f"by AICc; the interval of ρ* is the union over every form within {CREDIBLE:g} of the lowest"
        )
        assumed.append("at most one minimum in ρ, but for a level of its own at ρ = 1 with a jump")
    if study.memories:
        chosen.append("the form of the memory law by AICc; whether it is a power law by the interval of α")
        assumed.append("loss that moves one way with memory, but for a jump or break where a form has one")
    if curves:
        paired = any(fit.observations.block_name for fit in study.allocations)
        paired |= any(sizes.fit.observations.block_name for sizes in study.memories)
        assumed.append("runs of a seed share a level" if paired else "runs scatter independently")
        minimised.append(f"squared residuals of the loss, weighted by {weights or 'nothing: all runs alike'}")
        algorithms.append(
            "variable projection: a grid over the non-linear parameters, the rest solved exactly, then"
            " Levenberg-Marquardt from the grid's best points"
        )
        intervals.append("profile F, 95 %; an end that the data do not bound is said so")
    if found is not None:
        chosen.append("by AICc among laws that minimise the same thing")
        assumed.append("runs scatter independently about one power law for each term")
        minimised += sorted(
            {
                "squared residuals of the law"
                if math.isinf(law.delta)
                else f"Huber loss of log loss, δ = {law.delta:g}, summed"
                for law in laws
            }
        )
        algorithms.append("Newton or Levenberg-Marquardt steps from the best points of a grid of exponents")
        made = sorted({law.interval_method for law in laws if law.interval_method != "none"})
        intervals += [f"{how}, {percent(laws[0].confidence)}" for how in made]
    return Method(
        forms=_forms(study),
        chosen=chosen,
        assumed=assumed,
        minimised=minimised,
        algorithms=algorithms,
        intervals=intervals,
        checks=_checks(study),
        troubles=_troubles(study),
    )


def _forms(study: Study) -> list[str]:
    forms = [f"loss against share: {', '.join(m.name for m in f.models)}" for f in study.allocations[:1]]
    forms += [f"all budgets: {', '.join(m.name for m in f.models)}" for f in study.joint]
    forms += [f"loss against memory: {', '.join(m.name for m in s.fit.models)}" for s in study.memories[:1]]
    if study.standard is not None:
        forms.append(", ".join(law.name for law in study.standard.laws))
        forms += ["valleys of loss against size"] if study.standard.valleys is not None else []
    return forms


def _checks(study: Study) -> list[str]:
    tests = []
    if study.allocations:
        tests.append("bootstrap test of a U against monotone curves")
    if study.trials:
        tests.append("residuals, lack of fit, leave-one-out, held-out ends, influence")
    if study.budget_trial is not None:
        tests.append("the largest budget forecast from the others, each budget left out")
    if study.standard is not None:
        tests.append("residuals")
        tests += ["the largest compute held out"] if study.standard.held_out is not None else []
        tests += ["influence"] if study.standard.influences else []
    return tests


def _troubles(study: Study) -> list[str]:
    """Return every fit with a status other than converged, and every sweep whose cells were merged."""
    said = []
    sweeps = [(budget_label(fit.budget), fit.models, fit.observations) for fit in study.allocations]
    sweeps += [("memory", sizes.fit.models, sizes.fit.observations) for sizes in study.memories]  # type: ignore[misc]
    for of, models, observations in sweeps:
        said += [f"{model.name} ({of}): {model.status}" for model in models if model.status != "converged"]
        if len(observations.cells) > MOST:
            said.append(f"{of}: {len(observations.cells)} distinct positions were merged to {MOST}")
    for fit in study.joint:
        said += [
            f"{model.name} (all budgets): {model.status}"
            for model in fit.models
            if model.status != "converged"
        ]
    if study.standard is not None:
        said += [f"{law.name}: {law.status}" for law in study.standard.laws if law.status != "converged"]
        if study.standard.valleys is not None:
            said += [
                f"valley at {budget_label(valley.budget)}: {valley.status}"
                for valley in study.standard.valleys.valleys
                if valley.status != "converged"
            ]
    return said

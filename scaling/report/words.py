"""Sentences that say what a fit's statuses and tests allow, and no more.

Every claim word comes from the verdict of a test; the test's p value or interval stands in the same sentence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from scaling.report.numbers import (
    budget_label,
    fixed,
    interval,
    p_value,
    percent,
    plural,
    short,
    significant,
)
from scaling.scatter import replicates
from scaling.ushape import SIZE

if TYPE_CHECKING:
    from scaling.allocation_results import AllocationFit
    from scaling.joint_results import JointFit
    from scaling.memory import MemoryFit
    from scaling.report.runs import Runs
    from scaling.ushape import UShape


def counted(runs: Runs) -> str:
    """Say how many runs stand behind the page and what became of the rest."""
    parts = [f"{plural(runs.fitted.height, 'finished run')}"]
    if runs.controls.height:
        parts.append(f"{plural(runs.controls.height, 'control')}")
    if runs.failed:
        parts.append(f"{plural(runs.failed, 'failed run')}")
    if runs.interrupted:
        parts.append(f"{plural(runs.interrupted, 'interrupted run')}")
    if runs.running:
        parts.append(f"{plural(runs.running, 'run')} not finished")
    return ", ".join(parts)


def resumable(runs: Runs) -> str | None:
    """Say that interrupted runs are not lost; None where there are none."""
    if not runs.interrupted:
        return None
    were = "was" if runs.interrupted == 1 else "were"
    return f"{plural(runs.interrupted, 'run')} {were} interrupted and can be resumed by the same command."


def _u_shaped(u: UShape) -> str:
    return (
        "loss against ρ is U-shaped: that it never rises and that it never falls are both rejected"
        f" ({p_value(u.p_value)}), and both ends lie above the bottom"
    )


def _inverted(u: UShape) -> str:
    return (
        f"loss rises and then falls as ρ grows ({p_value(u.p_inverted)}): the lowest loss is at an end,"
        " not between them"
    )


def _falling(u: UShape) -> str:
    return (
        f"loss falls as ρ grows ({p_value(u.p_no_fall)}) and a rise towards ρ = 1 is not shown"
        f" ({p_value(u.p_no_rise)}): this is no evidence of an optimum between the ends"
        f"{_nor_against(u, 'right')}"
    )


def _rising(u: UShape) -> str:
    return (
        f"loss rises as ρ grows ({p_value(u.p_no_rise)}) and a fall from ρ = 0 is not shown"
        f" ({p_value(u.p_no_fall)}): this is no evidence of an optimum between the ends"
        f"{_nor_against(u, 'left')}"
    )


def _nor_against(u: UShape, side: str) -> str:
    """Say how high an arm that is not shown may still be: what is not seen is not thereby absent."""
    arm = next((contrast for contrast in u.contrasts if contrast.name.startswith(side)), None)
    if arm is None or arm.interval[1] is None or arm.interval[1] <= 0:
        return ""
    return (
        f", nor against one whose {side} arm is lower than {fixed(arm.interval[1], 4)} nats"
        f" (the {arm.name} is {fixed(arm.estimate, 4)} {interval(*arm.interval, digits=4)})"
    )


def _neither(u: UShape) -> str:
    return (
        "loss against ρ is neither monotone nor a curve with one turn: it goes up and down by more than"
        f" runs scatter (a valley {p_value(u.p_valley_fit)}, a hill {p_value(u.p_hill_fit)})"
    )


def _flat(u: UShape) -> str:
    if u.p_flat is None:
        return _undetermined(u)
    return (
        f"no dependence of loss on ρ is seen beyond the scatter of runs ({p_value(u.p_flat)});"
        " a U smaller than that scatter is not excluded"
    )


def _undetermined(u: UShape) -> str:
    return f"the shape of loss against ρ is undetermined at this scale: {u.reason}"


SHAPES: Mapping[str, Callable[[UShape], str]] = {
    "U-shaped": _u_shaped,
    "inverted-U": _inverted,
    "monotone falling": _falling,
    "monotone rising": _rising,
    "neither": _neither,
    "flat": _flat,
    "undetermined": _undetermined,
}
"""Verdict of `scaling.ushape` -> how it is said."""


def shape(fit: AllocationFit) -> str:
    """Say what shape the loss has in rho, in the words of the U test."""
    return f"At {budget_label(fit.budget)} {SHAPES[fit.u_shape.verdict](fit.u_shape)}."


ONE_ARM: Mapping[str, str] = {
    "monotone falling": "falls, no rise shown",
    "monotone rising": "rises, no fall shown",
}
"""Verdicts of `scaling.ushape` whose p value stands for one arm alone -> what may stand beside it."""


def verdict(u: UShape) -> str:
    """Return the shape's verdict as it stands beside its p value, claiming no more than that one test.

    Equal losses that no test could be made on are no evidence of flatness.
    """
    if u.verdict == "flat" and u.p_flat is None:
        return "undetermined"
    return ONE_ARM.get(u.verdict, u.verdict)


def verdict_p(u: UShape) -> str:
    """Return the p value that the shape's verdict rests on, by name where it is not that of a U."""
    match u.verdict:
        case "monotone falling":
            return p_value(u.p_no_fall)
        case "monotone rising":
            return p_value(u.p_no_rise)
        case "flat":
            return p_value(u.p_flat)
        case "inverted-U":
            return p_value(u.p_inverted)
        case "neither":
            return f"{p_value(u.p_valley_fit)} of a valley"
        case _:
            return p_value(u.p_value)


def optimum(fit: AllocationFit) -> str:
    """Say which share is best, or why none is named."""
    best = fit.optimum
    if best.rho is None:
        bounded = best.interval != (None, None)
        left = interval(*best.interval)
        union = f"; the credible models together leave {left}" if bounded else ""
        return f"No best share is named: {best.reason}{union}."
    level = f"{percent(best.confidence)} interval"
    named = f"the best share is ρ* = {fixed(best.rho)}, {level} {interval(*best.interval)}"
    members = f"{plural(len(best.members), 'credible model')} ({', '.join(best.members)})"
    if fit.u_shape.verdict == "U-shaped":
        return f"Over {members}, {named}."
    return f"If one minimum is taken for granted, which the runs do not show, then over {members} {named}."


def against_pure(fit: AllocationFit) -> str | None:
    """Say what the best share gains over rho = 1; None without such runs or without a named optimum."""
    best = fit.best
    if best is None or fit.optimum.rho is None or best.over_one is None:
        return None
    if not (fit.observations.x >= 1.0).any():
        return None
    low, high = best.over_one_interval
    nats = f"{fixed(best.over_one, 4)} nats {interval(low, high, 4)} under {best.name}"
    if low is not None and low > 0:
        return f"Pure MoE (ρ = 1) loses to the best share by {nats}."
    return f"No difference between the best share and pure MoE (ρ = 1) is shown: {nats}."


def scatter(fit: AllocationFit) -> str | None:
    """Say how far runs of one share differ, to be held against the curve; None without replicates."""
    found = replicates(fit.observations)
    if found is None:
        return None
    said = (
        f"Two runs of one share differ by up to {fixed(found.widest, 4)} nats, the means of two shares by"
        f" up to {fixed(found.means, 4)}."
    )
    if found.pairing_p is None:
        return said
    if found.pairing_p > SIZE:
        return f"{said} That runs of one seed share a level is not shown ({p_value(found.pairing_p)})."
    return f"{said} Runs of one seed share a level ({p_value(found.pairing_p)}), which the fits take out."


def plateau(fit: AllocationFit) -> str | None:
    """Say how wide a range of shares is as good as the best for all that one run can tell."""
    flat = fit.plateau
    if flat.interval is None or flat.epsilon is None:
        return None
    low, high = flat.interval
    return (
        f"Every share from {fixed(low, 2)} to {fixed(high, 2)} is within {fixed(flat.epsilon, 4)} nats of"
        f" the best, one standard deviation of a run (from {flat.epsilon_source})."
    )


def allocation(fit: AllocationFit) -> str:
    """Say everything about one budget's sweep of shares, as one paragraph."""
    return " ".join(s for s in (shape(fit), optimum(fit), against_pure(fit), plateau(fit)) if s)


def drift(fit: JointFit) -> str:
    """Say whether the best share moves with compute, in the words of its test."""
    moved = fit.drift
    span = f"From {budget_label(min(fit.budgets))} to {budget_label(max(fit.budgets))}"
    change = f"it changes by {fixed(moved.difference)} {interval(*moved.union)} (union of the credible forms)"
    if moved.verdict in ("rises with compute", "falls with compute"):
        return f"{span} the best share {moved.verdict}: {change}."
    if moved.verdict == "stable":
        return f"{span} the best share is stable to ±{moved.margin:g}: {change}."
    if moved.difference is None:
        return f"{span} whether the best share moves is undetermined: no form that lets it move is credible."
    return f"{span} whether the best share moves is undetermined: {change}."


MEMORIES: Mapping[str, str] = {
    "power law": "loss follows a power law of memory: {found}, lies above 0",
    "log-linear not excluded": (
        "a straight line in the logarithm of memory is not excluded: {found}, holds 0"
    ),
    "faster than logarithmic": (
        "each further decade of memory gains more than the one before: {found}, lies below 0; such a curve"
        " must not be carried beyond the runs"
    ),
    "no effect of memory seen": "no effect of memory on loss is seen: {reason}",
    "memory hurts": "loss rises with memory: {reason}",
    "neither": "neither a straight line in the logarithm of memory nor a power law describes loss: {reason}",
    "undetermined": "the law of memory is undetermined at this scale: {reason}",
}
"""Verdict of `scaling.memory` -> how it is said."""


def memory(fit: MemoryFit, budget: float | None = None) -> str:
    """Say what the memory sweep shows, in the words of its test of alpha; `budget` tells it from others."""
    law = fit.power_law
    size = "rows" if fit.size_column == "slots" else "memory parameters"
    above = fit.observations.x[fit.observations.x > 0]
    low, high = float(above.min()), float(above.max())
    decades = f" ({fixed(fit.decades, 1)} decades)"
    span = f"At {short(low)} {size}" if low == high else f"From {short(low)} to {short(high)} {size}{decades}"
    level = f"{percent(fit.models[0].confidence)} interval"
    found = f"α = {significant(law.alpha, 2)}, {level} {interval(*law.interval, digits=2)}"
    said = MEMORIES[law.verdict].format(found=found, reason=law.reason)
    at = "" if budget is None else f"At {budget_label(budget)}: "
    return f"{at}{span} {said}.{_ten_times(fit)}"


STRAIGHT = frozenset({"power law", "log-linear not excluded", "memory hurts"})
"""Verdicts under which a straight line may say what ten times the memory does."""


def _ten_times(fit: MemoryFit) -> str:
    """Say what a decade of memory gains, where a straight line is allowed to say so."""
    line = fit.model("log-linear")
    if not line.fitted or fit.power_law.verdict not in STRAIGHT:
        return ""
    sign = math.copysign(math.log(10), line.params["b"])
    ends = [None if end is None else sign * end for end in line.intervals["b"]]
    low, high = ends if sign > 0 else ends[::-1]
    gain = f"{fixed(abs(sign * line.params['b']), 4)} nats {interval(low, high, 4)}"
    if low is None or low <= 0:
        return f" What ten times the memory does to loss is not told from nothing: {gain}."
    return f" On average here, ten times the memory {'lowers' if sign > 0 else 'raises'} loss by {gain}."

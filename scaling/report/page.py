"""The page of an analysed study: a summary in plain words, then everything that stands behind it."""

from __future__ import annotations

from collections.abc import Mapping

from scaling.report import health, words
from scaling.report.analysis import Study
from scaling.report.budgets import across
from scaling.report.checks import checks
from scaling.report.data import data
from scaling.report.document import Block, Bullets, Caution, Facts, Page, Section
from scaling.report.laws import headline, laws
from scaling.report.laws import summary as summary_of_laws
from scaling.report.memories import memories
from scaling.report.numbers import budget_label, fixed, interval, plural
from scaling.report.progress import progress
from scaling.report.runs import listing
from scaling.report.shares import shares


def build(
    study: Study, *, title: str, context: Mapping[str, object], runs_hash: str, versions: Mapping[str, str]
) -> Page:
    """Return the page; `runs_hash` and `versions` say what the numbers were made from and with."""
    found = health.health(study.runs)
    parts = (
        summary(study),
        shares(study.allocations, study.next_runs) if study.allocations else None,
        *(across(fit, study.allocations) for fit in study.joint),
        memories(study.memories) if study.memories else None,
        None if study.standard is None else laws(study.standard),
        None if found is None else health.section(found),
        progress(study.runs),
        checks(study.trials, study.budget_trial),
        data(study, context, runs_hash),
        Section(ident="runs", title="Runs", blocks=(listing(study.runs),)),
    )
    made_with = ", ".join(f"{name} {number}" for name, number in versions.items())
    return Page(
        title=title,
        subtitle=words.counted(study.runs),
        sections=tuple(part for part in parts if part is not None),
        footer=f"Runs: sha256 {runs_hash}. Made with {made_with}.",
    )


def summary(study: Study) -> Section:
    """Return the head of the page: what the tests allow to be said, in a few sentences."""
    sentences = [f"{words.shape(fit)} {words.optimum(fit)}" for fit in study.allocations]
    sentences += [said for fit in study.allocations[-1:] if (said := words.scatter(fit))]
    sentences += [words.drift(fit) for fit in study.joint]
    sentences += [words.memory(sizes.fit, sizes.budget) for sizes in study.memories]
    if study.standard is not None:
        sentences.append(summary_of_laws(study.standard))
    blocks: list[Block] = [Facts(_facts(study)), Bullets((*sentences, *study.unfitted))]
    lost = study.runs.left_out.height
    if lost:
        verb = "is" if lost == 1 else "are"
        text = f"{plural(lost, 'run')} of the study {verb} in no fit; each is listed with its reason below."
        blocks.append(Caution(" ".join(filter(None, (text, words.resumable(study.runs))))))
    blocks += health.caution(health.health(study.runs))
    return Section(ident="summary", title="What the runs say", blocks=tuple(blocks))


def _facts(study: Study) -> tuple[tuple[str, str, str], ...]:
    facts: list[tuple[str, str, str]] = []
    for fit in study.allocations[-1:]:
        best, at = fit.optimum, f"at {budget_label(fit.budget)}"
        if best.rho is None:
            facts.append(("Best share ρ*", "not identified", at))
        else:
            given = "" if fit.u_shape.verdict == "U-shaped" else ", if there is one minimum"
            remark = f"95 % {interval(*best.interval, digits=2)}{given}, {at}"
            facts.append(("Best share ρ*", fixed(best.rho, 2), remark))
        facts.append(
            ("Loss against share", words.verdict(fit.u_shape), f"{words.verdict_p(fit.u_shape)}, {at}")
        )
    for several in study.joint:
        moved = several.drift
        remark = "no credible form lets it move"
        if moved.difference is not None:
            remark = f"by {fixed(moved.difference)} {interval(*moved.union)}"
        facts.append(("Best share against compute", several.drift.verdict, remark))
    for law in (sizes.fit.power_law for sizes in study.memories[-1:]):
        remark = f"α: 95 % {interval(*law.interval, digits=2)}"
        facts.append(("Loss against memory", law.verdict, remark))
    if study.standard is not None:
        facts += headline(study.standard)
    runs = study.runs
    remark = f"of {runs.every.height}; {runs.failed} failed"
    if runs.interrupted:
        remark += f", {runs.interrupted} interrupted"
    facts.append(("Runs fitted", str(runs.fitted.height), remark))
    return tuple(facts)

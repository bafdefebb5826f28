"""Words follow evidence, whatever the runs: no claim word without the test behind it."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_up_runs import allocation_rows, memory_rows, smooth, study

import scaling
from scaling import fit_allocation, fit_joint, fit_memory
from scaling.frame import read
from scaling.report import words
from scaling.report.analysis import analyse
from scaling.report.document import Facts
from scaling.report.memories import models as memory_models
from scaling.report.page import summary
from scaling.report.shares import evidence, models


def codes(module: str) -> set[str]:
    """Every text that a module's source gives as a verdict, as a keyword or to a name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((Path(scaling.__file__).parent / f"{module}.py").read_text())):
        value = None
        if (isinstance(node, ast.keyword) and node.arg == "verdict") or (
            isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "verdict" for t in node.targets)
        ):
            value = node.value
        if value is not None:
            inner = [n.value for n in ast.walk(value) if isinstance(n, ast.Constant)]
            found |= {text for text in inner if isinstance(text, str)}
    return found


@pytest.mark.parametrize(("module", "said"), [("ushape", words.SHAPES), ("memory_verdict", words.MEMORIES)])
def test_every_verdict_that_a_test_can_give_has_its_words(module: str, said: dict[str, object]) -> None:
    found = codes(module)
    assert len(found) >= 5
    assert found <= set(said)


@pytest.mark.parametrize("code", words.SHAPES)
def test_a_u_is_claimed_by_its_own_verdict_alone(code: str) -> None:
    fit = fit_allocation(study(allocation_rows("u")))
    turned = replace(fit, u_shape=replace(fit.u_shape, verdict=code, reason="A REASON"))
    said = words.shape(turned)
    assert ("is U-shaped" in said) == (code == "U-shaped")
    assert said.endswith(".")
    assert words.verdict_p(turned.u_shape).startswith("p ")


@pytest.mark.parametrize("code", words.MEMORIES)
def test_a_power_law_is_claimed_by_its_own_verdict_alone(code: str) -> None:
    fit = fit_memory(study(memory_rows()))
    said = words.memory(replace(fit, power_law=replace(fit.power_law, verdict=code, reason="A REASON")))
    assert ("follows a power law" in said) == (code == "power law")
    assert "{" not in said


def test_an_arm_that_is_not_shown_is_not_said_to_be_absent() -> None:
    fit = fit_allocation(study(allocation_rows("falling", sd=0.01)))
    right = next(c for c in fit.u_shape.contrasts if c.name.startswith("right"))
    high = right.interval[1]
    assert fit.u_shape.verdict == "monotone falling"
    assert high is not None
    assert high > 0
    said = words.shape(fit)
    assert f"nor against one whose right arm is lower than {high:.4f} nats" in said
    assert words.verdict(fit.u_shape) == "falls, no rise shown"  # p is that of the fall, not of monotony
    below = replace(right, interval=(-0.03, -0.01))
    excluded = replace(fit, u_shape=replace(fit.u_shape, contrasts=(below,)))
    assert "nor against" not in words.shape(excluded)


def test_no_sentence_says_twice_why_no_best_share_is_named() -> None:
    said = words.optimum(fit_allocation(study(allocation_rows("falling"))))
    assert said.startswith("No best share is named: a right arm is not shown (")
    assert said.count(":") == 1


@pytest.mark.parametrize("level", [0.0, 0.02])
def test_the_scatter_between_seeds_is_told_beside_the_span_of_the_curve(level: float) -> None:
    rows = [
        {**row, "loss": float(str(row["loss"])) + level * float(str(row["seed"]))}
        for row in allocation_rows("u", sd=0.002)
    ]
    fit = fit_allocation(study(rows))
    losses = np.array([row["loss"] for row in rows], dtype=float).reshape(-1, 2)  # [share, seed]
    apart, means = np.ptp(losses, axis=1), losses.mean(axis=1)
    said = words.scatter(fit)
    assert said is not None
    assert (
        f"differ by up to {apart.max():.4f} nats, the means of two shares by up to {np.ptp(means):.4f}"
        in said
    )
    assert ("Runs of one seed share a level (p < 0.001)" in said) == (level > 0)
    assert ("share a level is not shown" in said) == (level == 0)
    assert words.scatter(fit_allocation(study(allocation_rows("u", seeds=1)))) is None


SHAPES = st.sampled_from(["u", "flat", "falling", "rising"])
SLOW = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


@pytest.mark.parametrize(("shape", "claim"), [("falling", "loss falls"), ("rising", "loss rises")])
def test_a_monotone_truth_is_called_so_and_gets_no_best_share(shape: str, claim: str) -> None:
    said = words.allocation(fit_allocation(study(allocation_rows(shape))))
    assert claim in said
    assert "No best share is named" in said
    assert "U-shaped" not in said


@SLOW
@given(
    shape=SHAPES,
    shares=st.lists(st.sampled_from(np.linspace(0, 1, 21).tolist()), min_size=1, max_size=9, unique=True),
    seeds=st.integers(1, 2),
    sd=st.sampled_from([0.0, 0.0005, 0.01]),
    rng=st.integers(0, 9),
)
def test_a_u_and_a_best_share_are_claimed_only_with_their_tests(
    shape: str, shares: list[float], seeds: int, sd: float, rng: int
) -> None:
    fit = fit_allocation(study(allocation_rows(shape, shares=shares, seeds=seeds, sd=sd, rng=rng)))
    said = words.allocation(fit)
    assert ("is U-shaped" in said) == (fit.u_shape.verdict == "U-shaped")
    assert ("the best share is ρ*" in said) == (fit.optimum.rho is not None)
    assert ("No best share is named" in said) == (fit.optimum.rho is None)
    if fit.optimum.rho is not None:
        assert None not in fit.optimum.interval
        assert ("If one minimum is taken for granted" in said) == (fit.u_shape.verdict != "U-shaped")
    if "Pure MoE (ρ = 1) loses" in said:
        assert 1.0 in shares
        assert fit.best is not None
        assert (fit.best.over_one_interval[0] or 0.0) > 0
    if fit.u_shape.p_value is None:
        assert words.verdict(fit.u_shape) in ("undetermined", "flat")
    assert "nan" not in said
    assert all(
        len(row) == len(table.columns) for table in (models(fit), evidence([fit])) for row in table.rows
    )


@SLOW
@given(
    sizes=st.integers(1, 8),
    seeds=st.integers(1, 2),
    sd=st.sampled_from([0.0, 0.001, 0.05]),
    bend=st.sampled_from([-0.02, 0.0, 0.02]),
    rng=st.integers(0, 9),
)
def test_a_power_law_is_claimed_only_with_its_interval(
    sizes: int, seeds: int, sd: float, bend: float, rng: int
) -> None:
    rows = [
        {**row, "loss": float(str(row["loss"])) + bend * np.log(float(str(row["slots"])) / 8192) ** 2}
        for row in memory_rows(sizes=sizes, seeds=seeds, sd=sd, rng=rng)
    ]
    fit = fit_memory(study(rows))
    said = words.memory(fit)
    low, high = fit.power_law.interval
    if "follows a power law" in said:
        assert low is not None
        assert low > 0
    if "a straight line in the logarithm of memory is not excluded" in said:
        assert low is None or low <= 0
        assert high is None or high >= 0
    moved = re.search(r"ten times the memory (lowers|raises) loss by \d+\.\d+ nats \[(\d+\.\d+), ", said)
    assert (moved is not None) == ("On average here" in said)
    assert "nan" not in said
    assert all(len(row) == len(memory_models(fit).columns) for row in memory_models(fit).rows)


@pytest.mark.parametrize(
    ("drift", "verdict"), [(0.0, "stable"), (0.35, "rises with compute"), (-0.35, "falls with compute")]
)
def test_the_drift_is_said_as_its_verdict_says_it(drift: float, verdict: str) -> None:
    rows = []
    for number, budget in enumerate((1e15, 4e15, 1.6e16)):
        for row in allocation_rows("u", budgets=(budget,), sd=0.0003, rng=number):
            rho = float(str(row["rho"]))
            memory = smooth("rising", rho) - 3.4
            rows.append({**row, "loss": float(str(row["loss"])) - drift * number * memory})
    fit = fit_joint(study(rows))
    assert fit.drift.verdict == verdict
    assert f"the best share {'is ' if verdict == 'stable' else ''}{verdict}" in words.drift(fit)


def test_a_best_share_without_a_shown_u_is_conditional_wherever_it_stands() -> None:
    found = analyse(read(study(allocation_rows("u"))))
    shown = found.allocations[0]
    assert shown.optimum.rho is not None
    unshown = replace(shown, u_shape=replace(shown.u_shape, verdict="undetermined"))
    remarks = {}
    for name, fit in (("shown", shown), ("unshown", unshown)):
        facts = next(b for b in summary(replace(found, allocations=(fit,))).blocks if isinstance(b, Facts))
        remarks[name] = facts.items[0][2]
    assert "If one minimum is taken for granted" in words.allocation(unshown)
    assert "if there is one minimum" in remarks["unshown"]
    assert "if there is one minimum" not in remarks["shown"]

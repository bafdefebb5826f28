"""The simulation behind the coverage table: it asks the same question as the delivered intervals, and it
holds in small.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from scaling import fit_allocation
from scaling.curvefit import union

PATH = Path(__file__).parents[2] / "benchmarks" / "scaling_coverage.py"
SPEC = importlib.util.spec_from_file_location("scaling_coverage", PATH)
coverage = importlib.util.module_from_spec(SPEC)
sys.modules["scaling_coverage"] = coverage
SPEC.loader.exec_module(coverage)

CELLS = {f"{cell.group}: {cell.name}": cell for cell in coverage.cells()}


@pytest.mark.parametrize("name", ["log-saturating", "quadratic+jump"])
def test_the_simulated_question_is_the_one_the_headline_answers(name):
    rng = np.random.default_rng(2)
    y = coverage.truth(name, coverage.RHO) + 0.002 * rng.standard_normal((5, 10))
    fits = [fit_allocation({"rho": coverage.RHO, "loss": row}) for row in y]
    ends = [union([fit.model(member).interval for member in fit.optimum.members]) for fit in fits]
    for value in (0.82, 0.75, 0.7):
        assert coverage.union_covers(y, value).tolist() == [coverage.holds(pair, value) for pair in ends]
    for fit, pair in zip(fits, ends, strict=True):
        if fit.u_shape.verdict == "U-shaped":  # then an end that the union leaves open is closed
            assert all(own is None or own == end for own, end in zip(pair, fit.optimum.interval, strict=True))


def test_the_simulated_end_is_the_one_the_headline_leaves_open():
    rng = np.random.default_rng(0)
    mean = coverage.MONOTONE["falling, saturating"](coverage.RHO)
    y = mean + 0.001 * rng.standard_normal((8, 10))
    open_ends = sum(
        fit_allocation({"rho": coverage.RHO, "loss": row}).optimum.interval[1] is None for row in y
    )
    hits = coverage.end_covers(mean, 1.0, 0.001, 8, np.random.default_rng(0))
    assert hits == open_ends >= 6  # a U is named by chance in .07 at most: P(fewer) < .02


def test_a_cell_is_judged_by_exact_binomial_tests():
    cell = coverage.Cell("", "", 0.93, 0.97, lambda n, g: 0)
    assert coverage.consistent(190, 200, cell)
    assert not coverage.consistent(168, 200, cell)
    assert not coverage.consistent(1995, 2000, cell)


@pytest.mark.parametrize(
    "name",
    [
        "rho*, own family: log-saturating, SD 0.001",
        "rho*, own family: quadratic+jump, SD 0.001",
        "rho*, union: log-saturating, SD 0.002",
        "rho*, union: quadratic, SD 0.001",
        "memory, Box-Cox: alpha, alpha 0.15, SD 0.001",
        "memory, Box-Cox: mean loss at 10x, alpha 0.0, SD 0.001",
        "joint law: rho*(C_max) - rho*(C_min), SD 0.001",
        "U test, size: falling, saturating, SD 0.001",
        "U test, size: flat, SD 0.001",
        "rho*, headline at an end: falling, saturating, SD 0.001",
        "rho*, headline at an end: rising, cubic, SD 0.001",
    ],
)
def test_reduced_coverage(name):
    cell = CELLS[name]
    hits = cell.hits(100, np.random.default_rng(7))
    assert coverage.consistent(hits, 100, cell), f"{hits} of 100, wanted {cell.low} to {cell.high}"

"""Planning: power grows with runs, and the package starts quickly."""

import json
import subprocess
import sys

import numpy as np
import pytest
from scaling_truths import RHO, ten_points, u_curve

from scaling import (
    ScalingError,
    Truth,
    fit_allocation,
    forecast_half_width,
    packed,
    plan_allocation,
    sweep_power,
)


def test_the_truth_is_the_curve_written_out():
    truth = Truth(optimum=0.7, m0=0.05, a=0.02)
    expected = u_curve(RHO, 0.7, 0.05, 0.02, level=0.0)
    np.testing.assert_allclose(truth(RHO), expected, atol=1e-12)
    fit = fit_allocation(ten_points(sd=1e-6))
    assert Truth.from_fit(fit).optimum == pytest.approx(0.8, abs=1e-3)


def test_more_seeds_and_less_noise_give_narrower_intervals_that_cover():
    base = sweep_power(packed(8), sd=0.002, simulations=120)
    seeds = sweep_power(packed(8), seeds=3, sd=0.002, simulations=120)
    quiet = sweep_power(packed(8), sd=0.0005, simulations=120)
    assert quiet.median_width < seeds.median_width < base.median_width
    assert min(base.covers, seeds.covers, quiet.covers) > 0.85
    assert quiet.u_power >= base.u_power


def test_a_plan_reaches_its_width_and_lists_its_cells():
    plan = plan_allocation(0.15, sd=0.001, counts=(8, 10), seeds=(1, 2), simulations=100)
    assert plan.chosen.median_width <= 0.15
    plain = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert len(plain["cells"]) == plan.chosen.runs
    assert set(plain["cells"][0]) == {"rho", "seed"}
    hopeless = plan_allocation(1e-6, sd=0.01, counts=(8,), seeds=(1,), simulations=50)
    assert hopeless.chosen is None


def test_packing_is_denser_towards_one():
    steps = np.diff(packed(9))
    assert (np.diff(steps) < 0).all()
    assert packed(9)[-1] == 1.0


def test_four_budgets_forecast_better_than_two():
    rho = packed(8)
    four = forecast_half_width([1e18, 4e18, 1.6e19, 6.4e19], rho, sd=0.001)
    two = forecast_half_width([1e18, 6.4e19], rho, sd=0.001)
    assert four < two
    assert 0.015 < four < 0.06


@pytest.mark.parametrize(
    "call",
    [
        lambda: packed(1),
        lambda: sweep_power([0.1, 0.2]),
        lambda: sweep_power(packed(8), sd=0),
        lambda: plan_allocation(0),
        lambda: Truth(optimum=1.5),
        lambda: forecast_half_width([1e18], packed(8)),
    ],
)
def test_impossible_plans_are_sentences(call):
    with pytest.raises(ScalingError):
        call()


HEAVY = (
    "'pandas', 'matplotlib', 'torch', 'mlflow', 'lightning', 'engram_lab', 'scipy.stats', 'scipy.optimize'"
)


def loaded(statement, names):
    code = f"import sys, scaling; {statement}; print([m for m in ({names}) if m in sys.modules])"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_importing_the_package_imports_nothing_heavy():
    assert loaded("pass", "'numpy', 'polars', 'scipy', " + HEAVY) == "[]"


def test_fitting_imports_neither_plots_nor_stores():
    names = "scaling.fit_allocation, scaling.fit_memory, scaling.fit_joint, scaling.fit_chinchilla"
    assert loaded(names, HEAVY) == "[]"

"""The runs to make next help, can be made, and leave seeds paired."""

import numpy as np
import pytest
from scaling_truths import RHO, ten_points, u_curve

from scaling import ScalingError, fit_allocation, next_runs

EXPERTS, TOP_K = 48, 4
SHARES = np.array([4, 15, 26, 35, 41, 46, 48]) / 44 - TOP_K / 44


def sweep(seeds, shares=SHARES, sd=0.001):
    """A sweep of whole experts, every share with every one of `seeds`, as a study records it."""
    rho, seed = (grid.ravel() for grid in np.meshgrid(shares, seeds))
    noise = sd * np.random.default_rng(1).standard_normal(len(rho))
    experts = np.round(TOP_K + rho * (EXPERTS - TOP_K))
    top_k = np.full(len(rho), TOP_K)
    return {"rho": rho, "loss": u_curve(rho) + noise, "seed": seed, "experts": experts, "top_k": top_k}


def without(table, row):
    return {name: np.delete(values, row) for name, values in table.items()}


def test_the_proposed_run_beats_the_average_candidate():
    table = ten_points(sd=0.001)
    fit = fit_allocation(table)
    proposal = next_runs(fit)[0]
    assert 0 <= proposal.rho <= 1
    assert proposal.sd_ratio < 1
    spread = {}
    for rho in (proposal.rho, 0.45):
        widths = []
        for seed in range(6):
            extra = u_curve(np.array([rho])) + 0.001 * np.random.default_rng(seed + 50).standard_normal(1)
            more = {"rho": np.append(RHO, rho), "loss": np.append(table["loss"], extra)}
            low, high = fit_allocation(more).model("log-saturating").interval
            widths.append((1.0 if high is None else high) - (0.0 if low is None else low))
        spread[rho] = np.median(widths)
    assert spread[proposal.rho] < spread[0.45]


def test_several_runs_have_fresh_seeds():
    table = ten_points() | {"seed": np.zeros(10, dtype=int)}
    runs = next_runs(fit_allocation(table), 4, candidates=RHO)
    assert len({(run.rho, run.seed) for run in runs}) == 4
    assert all(run.seed >= 1 for run in runs)
    ratios = [run.sd_ratio for run in runs]
    assert ratios == sorted(ratios, reverse=True)


def test_only_shares_of_whole_experts_are_proposed():
    fit = fit_allocation(sweep([0]))
    assert fit.held["experts_divided"] == EXPERTS - TOP_K
    runs = next_runs(fit, 60)
    places = np.array([run.rho for run in runs]) * (EXPERTS - TOP_K)
    np.testing.assert_allclose(places, places.round(), atol=1e-6)
    assert len({run.rho for run in runs}) > 1


def test_shares_with_two_digits_still_tell_the_experts_and_contradictions_do_not():
    table = sweep([0])
    assert fit_allocation(table | {"rho": table["rho"].round(2)}).held["experts_divided"] == 44
    assert fit_allocation(table | {"experts": table["experts"][::-1].copy()}).held["experts_divided"] is None
    assert fit_allocation(ten_points()).held["experts_divided"] is None


def test_a_paired_sweep_stays_paired():
    table = sweep([0, 1])
    fit = fit_allocation(table)
    assert fit.observations.block_name == "seed"
    runs = next_runs(fit, 2)
    assert [run.seed for run in runs] == [0, 1, 0, 1]
    new = {run.rho for run in runs}
    assert len(new) == 2
    assert not new & set(SHARES.round(9))
    ratios = [run.sd_ratio for run in runs]
    assert ratios == sorted(ratios, reverse=True)
    more = sweep([0, 1], np.append(SHARES, sorted(new)))
    assert fit_allocation(more).observations.block_name == "seed"


def test_a_share_that_lacks_a_seed_gets_that_one():
    table = sweep([0, 1])
    row = int(np.flatnonzero((table["seed"] == 1) & (table["rho"] == SHARES[3]))[0])
    (run,) = next_runs(fit_allocation(without(table, row)), candidates=SHARES)
    assert (run.rho, run.seed) == (pytest.approx(SHARES[3]), 1)


def test_runs_without_seeds_are_not_paired():
    table = sweep([0, 1])
    del table["seed"]
    assert len(next_runs(fit_allocation(table), 3)) == 3


@pytest.mark.parametrize(
    "call",
    [
        lambda: next_runs(fit_allocation(ten_points()), 0),
        lambda: next_runs(fit_allocation(ten_points()), 1, candidates=[2.0]),
        lambda: next_runs(fit_allocation({"rho": [0.1, 0.2], "loss": [1.0, 2.0]})),
    ],
)
def test_impossible_proposals_are_sentences(call):
    with pytest.raises(ScalingError):
        call()

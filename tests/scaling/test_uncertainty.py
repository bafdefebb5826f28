"""Bootstraps, delta, leave-one-out, hold-outs, influence and lack of fit."""

import json

import numpy as np
import pytest
from scaling_truths import RHO, ten_points, u_curve

from scaling import (
    ScalingError,
    bootstrap,
    delta,
    extrapolations,
    fit_allocation,
    fit_memory,
    influence,
    lack_of_fit,
    leave_one_out,
)
from scaling.allocation_families import allocation_families
from scaling.observations import build
from scaling.uncertainty import weighted_minimum


@pytest.fixture(scope="module")
def fit():
    return fit_allocation(ten_points()).model("log-saturating")


@pytest.mark.parametrize("method", ["wild", "cluster"])
def test_bootstraps_are_near_the_profile_interval_and_repeat(fit, method):
    one, two = bootstrap(fit, method=method, draws=500), bootstrap(fit, method=method, draws=500)
    assert one == two
    assert one.interval[0] < fit.rho < one.interval[1]
    width = one.interval[1] - one.interval[0]
    profile = fit.interval[1] - fit.interval[0]
    # resampling runs loses rho = 1 in a third of the draws, and with it the right arm
    assert 0.3 < width / profile < (2.0 if method == "wild" else 8.0)


def test_bootstrap_weights_equal_refits_one_by_one():
    family = next(f for f in allocation_families() if f.name == "quadratic")
    rho = np.tile(RHO, 3)
    y = 1.7 + 0.08 * (rho - 0.6) ** 2 + 0.001 * np.random.default_rng(0).standard_normal(30)
    counts = np.random.default_rng(1).multinomial(30, np.full(30, 1 / 30), size=20).astype(float)
    obs = build(x=rho, y=y)
    theta = weighted_minimum(family.design(obs.x, obs.root_weight, obs.blocks), y, counts)
    for row, value in zip(counts, theta[:, 0], strict=True):
        b = np.polyfit(rho, y, 2, w=np.sqrt(row))
        assert value == pytest.approx(-b[1] / (2 * b[0]), abs=2e-3)


def test_wild_bootstrap_by_block_needs_clusters(fit):
    with pytest.raises(ScalingError, match="at least 5"):
        bootstrap(fit, by="block")
    with pytest.raises(ScalingError, match="'magic'"):
        bootstrap(fit, method="magic")


def test_delta_agrees_with_the_profile_when_noise_is_small():
    small = fit_allocation(ten_points(sd=2e-5)).model("log-saturating")
    assert delta(small).ratio == pytest.approx(1, abs=0.02)
    np.testing.assert_allclose(delta(small).interval, small.interval, atol=2e-4)


def test_leave_one_out_equals_the_hat_matrix_for_a_line():
    sizes = np.geomspace(1e5, 1e7, 9)
    y = 1.7 - 0.01 * np.log(sizes) + 0.001 * np.random.default_rng(0).standard_normal(9)
    line = fit_memory({"slots": sizes, "loss": y}).model("log-linear")
    design = np.stack([np.ones(9), np.log(sizes)], axis=1)
    hat = design @ np.linalg.pinv(design)
    errors = (y - hat @ y) / (1 - np.diag(hat))
    assert leave_one_out(line) == pytest.approx(np.sqrt((errors**2).mean()), rel=1e-8)


def test_hold_outs_are_predicted_by_the_right_family(fit):
    held = extrapolations(fit)
    assert {item.what for item in held} == {"largest x (1)", "smallest x (0.1)"}
    assert all(item.inside == 1 for item in held)
    json.dumps([item.to_dict() for item in held], allow_nan=False)


def test_a_wrong_family_misses_what_it_did_not_see():
    sizes = np.geomspace(1e3, 1e7, 10)
    loss = 1.7 - 0.01 * np.log(sizes) + 1e-5 * np.random.default_rng(0).standard_normal(10)
    loss[-1] += 0.01
    line = fit_memory({"slots": sizes, "loss": loss})
    largest = extrapolations(line.model("log-linear"))[0]
    assert largest.inside == 0


def test_influence_names_the_point_that_decides(fit):
    rows = {row.left_out: row for row in influence(fit)}
    assert len(rows) == 10
    assert all(abs(row.change) < 0.1 for row in rows.values())
    table = ten_points()
    table["loss"][1] += 0.02
    moved = influence(fit_allocation(table).model("quadratic"))
    largest = max(moved, key=lambda row: abs(row.change))
    assert largest.left_out in ("x = 0.2", "x = 0.1", "x = 1")


def test_influence_calls_seeds_by_their_numbers():
    noise = 0.001 * np.random.default_rng(0).standard_normal(20)
    runs = {"rho": np.tile(RHO, 2), "loss": u_curve(np.tile(RHO, 2)) + noise, "seed": np.repeat([0, 7], 10)}
    left_out = {row.left_out for row in influence(fit_allocation(runs).model("log-saturating"))}
    assert {name for name in left_out if "seed" in name} == {"seed 0", "seed 7"}


def test_lack_of_fit_against_the_textbook():
    rho = np.repeat(RHO, 3)
    y = u_curve(rho) + 0.0003 * np.random.default_rng(0).standard_normal(30)
    models = fit_allocation({"rho": rho, "loss": y})
    bad, good = lack_of_fit(models.model("quadratic")), lack_of_fit(models.model("log-saturating"))
    within = sum(((y[rho == r] - y[rho == r].mean()) ** 2).sum() for r in RHO)
    rss = models.model("quadratic").rss
    assert bad.statistic == pytest.approx(((rss - within) / 7) / (within / 20))
    assert bad.dof == (7, 20)
    assert bad.p_value < 0.001 < good.p_value
    assert lack_of_fit(fit_allocation(ten_points()).model("quadratic")).p_value is None

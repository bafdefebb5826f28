"""The U test: size and power in small, its invariances, and the caveated tests beside it."""

import numpy as np
import pytest
from scaling_truths import RHO, ten_points, u_curve

from scaling.observations import build
from scaling.scatter import Scatter
from scaling.ushape import cells, directional_p, judge, slope_p, turn_bounds, two_lines_p


def shape(y, sd, dof=8.0, seed=0):
    return judge(build(x=RHO, y=y), Scatter(variance=sd**2, dof=dof, source="test"), seed=seed)


def test_a_clear_u_is_named_and_its_contrasts_are_positive():
    table = ten_points()
    result = shape(table["loss"], 0.0005)
    assert result.verdict == "U-shaped"
    assert result.p_value == max(result.p_no_rise, result.p_no_fall)
    assert all(contrast.interval[0] > 0 for contrast in result.contrasts)


@pytest.mark.parametrize(
    ("curve", "word"),
    [(lambda x: 1.7 - 0.03 * x, "monotone falling"), (lambda x: 1.7 + 0.03 * x, "monotone rising")],
)
def test_a_line_is_monotone(curve, word):
    y = curve(RHO) + 0.0005 * np.random.default_rng(0).standard_normal(10)
    assert shape(y, 0.0005).verdict == word


def test_the_directions_swap_when_rho_is_turned_round():
    y, one = ten_points()["loss"][None], np.ones(10)
    forward = directional_p(y, one, 1e-6, 6.0, np.random.default_rng(0))
    backward = directional_p(y[:, ::-1], one, 1e-6, 6.0, np.random.default_rng(0))
    np.testing.assert_allclose(forward, backward[::-1], atol=0.03)


def test_size_on_flat_noise_is_small():
    rng = np.random.default_rng(0)
    both = directional_p(rng.standard_normal((300, 10)), np.ones(10), 1.0, 8.0, rng, draws=199)
    assert (np.maximum(*both) <= 0.05).sum() <= 36  # P(more | rate .07) < 1e-3


def test_more_noise_in_the_sd_means_less_certainty():
    table = ten_points(sd=0.002)
    certain = shape(table["loss"], 0.002, dof=100.0)
    unsure = shape(table["loss"], 0.002, dof=2.0)
    assert unsure.p_value > certain.p_value


def test_cells_average_seeds_and_remove_block_levels():
    rho = np.tile(RHO, 2)
    y = u_curve(rho) + np.repeat([0.0, 0.02], 10)
    data = cells(build(x=rho, y=y, block=np.repeat([0, 1], 10), block_name="seed"))
    np.testing.assert_allclose(data.y, u_curve(RHO) + 0.01, atol=1e-12)
    np.testing.assert_allclose(data.weight, 2)


def test_lind_mehlum_calls_a_saturating_curve_a_u_which_is_why_it_decides_nothing():
    hits = called = 0
    for seed in range(20):
        y = 1.7 + 0.05 * np.exp(-6 * RHO) + 0.0005 * np.random.default_rng(seed).standard_normal(10)
        hits += slope_p(build(x=RHO, y=y)) < 0.05
        called += shape(y, 0.0005, seed=seed).verdict == "U-shaped"
    assert hits >= 15
    assert called <= 5  # P(more | rate .05) < 1e-3


def test_two_lines_find_a_v_with_many_points():
    x = np.linspace(0, 1, 40)
    y = np.abs(x - 0.6) + 0.02 * np.random.default_rng(0).standard_normal(40)
    assert two_lines_p(build(x=x, y=y), 0.6) < 0.01
    assert two_lines_p(build(x=x, y=x + 0.02 * np.sin(9 * x)), 0.6) > 0.5


def test_too_few_cells_give_a_reason():
    result = judge(
        build(x=np.array([0.1, 0.5, 1.0]), y=np.array([1.0, 0.9, 1.0])),
        Scatter(variance=1e-6, dof=5.0, source="test"),
    )
    assert result.verdict == "undetermined"
    assert "too few" in result.reason


ZIGZAG = np.where(np.arange(10) % 2 == 0, 1.70, 1.72)


@pytest.mark.parametrize(
    ("curve", "word"),
    [
        (1.7 - 0.08 * (RHO - 0.5) ** 2, "inverted-U"),
        (1.7 - 0.08 * (RHO - 0.4) ** 2, "inverted-U"),
        (ZIGZAG, "neither"),
        (ZIGZAG - 0.06 * RHO, "neither"),
        (ZIGZAG + 0.06 * RHO, "neither"),
        (1.7 + 0.02 * np.cos(4 * np.pi * RHO), "neither"),
    ],
)
def test_shapes_that_are_no_u_have_their_own_words(curve, word):
    found = [
        shape(curve + 0.001 * np.random.default_rng(seed).standard_normal(10), 0.001, dof=20.0).verdict
        for seed in range(10)
    ]
    assert found.count(word) >= 8  # P(fewer | rate .95) < .02
    assert "U-shaped" not in found


def test_flat_is_said_of_flat_losses_whose_scatter_is_known():
    found = [
        shape(1.7 + 0.001 * np.random.default_rng(seed).standard_normal(10), 0.001, dof=20.0).verdict
        for seed in range(40)
    ]
    assert found.count("flat") >= 28  # each of four tests errs in 5 % at most: P(fewer | rate .85) < .01


@pytest.mark.parametrize(
    "curve",
    [
        RHO * 0,
        1.7 - 0.08 * (RHO - 0.5) ** 2,
        ZIGZAG,
        ZIGZAG - 0.02 * RHO,
        1.7 + 0.02 * np.cos(4 * np.pi * RHO),
    ],
)
def test_a_scatter_known_only_from_the_constant_never_says_flat(curve):
    y = curve + 0.001 * np.random.default_rng(0).standard_normal(10)
    scatter = Scatter(variance=float(np.var(y, ddof=1)), dof=9.0, source="residuals", about="constant")
    result = judge(build(x=RHO, y=y), scatter)
    assert result.p_flat is None
    assert result.verdict in ("undetermined", "inverted-U")


def test_upside_down_a_u_is_a_hill():
    y = ten_points()["loss"]
    up, down = shape(y, 0.0005), shape(-y, 0.0005)
    assert (up.verdict, down.verdict) == ("U-shaped", "inverted-U")
    assert down.p_inverted == pytest.approx(up.p_value, abs=0.02)
    assert down.p_hill_fit == pytest.approx(up.p_valley_fit, abs=0.06)


def test_the_fit_of_a_true_shape_is_rarely_refused():
    draws = [
        shape(u_curve(RHO) + 0.002 * np.random.default_rng(s).standard_normal(10), 0.002, seed=s)
        for s in range(40)
    ]
    assert sum(result.p_valley_fit <= 0.05 for result in draws) <= 8  # P(more | rate .05) < 1e-3


def bounds(y, sd=0.001):
    return turn_bounds(build(x=RHO, y=y), Scatter(variance=sd**2, dof=20.0, source="test"))


def test_bounds_of_a_clear_turn_are_its_neighbours():
    assert bounds(1.7 + 0.5 * np.abs(RHO - 0.6)) == pytest.approx((0.5, 0.7))


def test_a_monotone_curve_bounds_its_bottom_on_one_side_only():
    low, high = bounds(1.7 - 0.1 * RHO)
    assert (low, high) == (pytest.approx(0.9), None)
    assert bounds(1.7 + 0.1 * RHO) == (None, pytest.approx(0.2))
    assert bounds(np.full(10, 1.7) + 1e-5 * RHO) == (None, None)


def test_the_bounds_hold_the_turn():
    missed = 0
    for seed in range(60):
        noise = 0.002 * np.random.default_rng(seed).standard_normal(10)
        low, high = bounds(1.7 + 0.03 * np.abs(RHO - 0.65) + noise, 0.002)
        missed += (low is not None and low > 0.65) or (high is not None and high < 0.65)
    assert missed <= 14  # each side errs in 5 % at most: P(more | rate .1) < 1e-3

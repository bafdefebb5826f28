"""Memory laws: recovery, units, scopes, and what may be called a power law."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling import ScalingError, fit_memory

SIZES = np.geomspace(2.6e5, 2.6e5 * 10**2.5, 10)


def box_cox(x, alpha, b=0.012, c=1.75):
    u = np.log(x / np.exp(np.log(SIZES).mean()))
    return c - b * (u if alpha == 0 else (1 - np.exp(-alpha * u)) / alpha)


def noise(seed, sd=0.0005, n=10):
    return sd * np.random.default_rng(seed).standard_normal(n)


@pytest.mark.parametrize(("alpha", "verdict"), [(0.5, "power law"), (-0.5, "faster than logarithmic")])
def test_a_strong_exponent_is_named(alpha, verdict):
    fit = fit_memory({"slots": SIZES, "loss": box_cox(SIZES, alpha) + noise(0)})
    assert fit.power_law.verdict == verdict
    low, high = fit.power_law.interval
    assert low < alpha < high


def test_a_logarithm_is_not_called_a_power_law():
    verdicts = [
        fit_memory({"slots": SIZES, "loss": box_cox(SIZES, 0.0) + noise(seed)}).power_law.verdict
        for seed in range(12)
    ]
    assert verdicts.count("log-linear not excluded") >= 9


def test_no_effect_is_said():
    fit = fit_memory({"slots": SIZES, "loss": 1.75 + noise(0)})
    assert fit.power_law.verdict == "no effect of memory seen"
    assert fit.power_law.alpha is None


def test_the_run_without_memory_enters_only_where_the_formula_can_use_it():
    sizes = np.append(SIZES, 0.0)
    loss = 1.8 - 0.01 * np.log1p(sizes / 3e4) + noise(1, n=11)
    fit = fit_memory({"slots": sizes, "loss": loss})
    assert fit.model("log-linear").scope == "M > 0"
    assert fit.model("log-linear").n == 10
    assert fit.model("shifted-log").n == 11
    low, high = fit.model("shifted-log").intervals["M0"]
    assert low < 3e4 < high
    assert "jump+log-linear" in [model.name for model in fit.models]


def test_units_of_size_do_not_matter():
    loss = box_cox(SIZES, 0.2) + noise(2)
    one = fit_memory({"slots": SIZES, "loss": loss})
    two = fit_memory({"memory_parameters": SIZES * 1280, "loss": loss})
    assert two.unit == pytest.approx(one.unit * 1280)
    for name in ("log-linear", "box-cox", "shifted-log", "one-break"):
        first, second = one.model(name), two.model(name)
        assert second.rss == pytest.approx(first.rss, rel=1e-6)
        for key, value in first.params.items():
            factor = 1280 if key in ("M0", "M_break") else 1
            assert second.params[key] == pytest.approx(value * factor, rel=1e-4, abs=1e-6)


def test_the_base_of_the_loss_scales_slopes_and_leaves_alpha():
    loss = box_cox(SIZES, 0.2) + noise(2)
    nats = fit_memory({"slots": SIZES, "loss": loss})
    bits = fit_memory({"slots": SIZES, "loss": loss / math.log(2)})
    assert bits.power_law.alpha == pytest.approx(nats.power_law.alpha, abs=1e-5)
    assert bits.model("log-linear").params["b"] == pytest.approx(
        nats.model("log-linear").params["b"] / math.log(2)
    )


def test_a_break_is_found():
    u = np.log(SIZES / SIZES[0])
    loss = 1.8 - 0.02 * u + 0.015 * np.maximum(u - 3, 0) + noise(0, 0.0002)
    fit = fit_memory({"slots": SIZES, "loss": loss})
    assert fit.best == "one-break"
    low, high = fit.model("one-break").intervals["M_break"]
    assert low < SIZES[0] * np.exp(3) < high


def test_json_and_bands():
    fit = fit_memory({"slots": SIZES, "loss": box_cox(SIZES, 0.1) + noise(0)})
    plain = json.loads(json.dumps(fit.to_dict(), allow_nan=False))
    assert {"verdict", "alpha", "interval"} <= set(plain["power_law"])
    for model in plain["models"]:
        assert {"name", "params", "intervals", "aicc", "status"} <= set(model)
    narrow = fit.model("box-cox").band(SIZES[-1:], "mean")
    wide = fit.model("box-cox").band(10 * SIZES[-1:], "mean")
    new = fit.model("box-cox").band(10 * SIZES[-1:], "new")
    assert wide[1] - wide[0] > narrow[1] - narrow[0]
    assert new[1] - new[0] > wide[1] - wide[0]


def test_mistakes_are_sentences():
    with pytest.raises(ScalingError, match="no size above zero"):
        fit_memory({"slots": [0, 0], "loss": [1, 1]})
    with pytest.raises(ScalingError, match="'slots'"):
        fit_memory({"loss": [1.0]})
    with pytest.raises(ScalingError, match="memory_parameters"):
        fit_memory({"slots": [1.0], "loss": [1.0]}, size="rows")


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 1000, 1001, 5000, 1e5, 1e9]), min_size=1, max_size=12),
    scale=st.sampled_from([0.0, 1e-12, 1e-3, 1.0]),
    seed=st.integers(0, 99),
)
def test_hostile_tables(sizes, scale, seed):
    loss = 2 + scale * np.random.default_rng(seed).standard_normal(len(sizes))
    if not any(sizes):
        with pytest.raises(ScalingError):
            fit_memory({"slots": sizes, "loss": loss})
        return
    fit = fit_memory({"slots": sizes, "loss": loss})
    json.dumps(fit.to_dict(), allow_nan=False)
    if len({size for size in sizes if size > 0}) < 6:
        assert fit.power_law.alpha is None


@pytest.mark.parametrize("curve", ["valley", "hill", "zigzag"])
@pytest.mark.parametrize("seeds", [1, 3])
def test_a_bent_curve_is_an_effect_that_no_line_describes(curve, seeds):
    u = np.log(SIZES / np.exp(np.log(SIZES).mean()))
    bent = {"valley": 0.004 * u**2, "hill": -0.004 * u**2, "zigzag": 0.01 * (-1.0) ** np.arange(10)}[curve]
    rng = np.random.default_rng(0)
    table = {
        "slots": np.tile(SIZES, seeds),
        "loss": np.tile(1.75 + bent, seeds) + 0.0005 * rng.standard_normal(10 * seeds),
    }
    law = fit_memory(table).power_law
    if curve == "zigzag" and seeds == 1:
        assert law.verdict in ("no effect of memory seen", "undetermined")
    else:
        assert law.verdict == "neither"
        assert law.p_effect < 0.05
        assert law.alpha is None


@pytest.mark.parametrize("alpha", [0.0, 0.5, -0.5])
def test_memory_that_hurts_is_said_to_hurt(alpha):
    law = fit_memory({"slots": SIZES, "loss": box_cox(SIZES, alpha, b=-0.012) + noise(0)}).power_law
    assert law.verdict == "memory hurts"
    assert law.alpha is None


def test_a_sharp_break_is_no_power_law():
    u = np.log(SIZES / SIZES[0])
    loss = 1.8 - 0.02 * u + 0.018 * np.maximum(u - 3, 0) + noise(0, 0.0001)
    law = fit_memory({"slots": SIZES, "loss": loss}).power_law
    assert law.verdict == "neither"
    assert "one-break" in law.reason


def test_the_test_of_any_effect_keeps_its_size():
    p = [
        fit_memory({"slots": SIZES[:8], "loss": 1.75 + noise(seed, 0.001, 8)}).power_law.p_effect
        for seed in range(60)
    ]
    assert sum(value <= 0.05 for value in p) <= 10  # P(more | rate .05) < 1e-3

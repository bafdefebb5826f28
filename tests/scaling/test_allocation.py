"""Allocation fits: recovery, metamorphic relations, the union, and data that cannot decide."""

import json
import math

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scaling_truths import RHO, ten_points, u_curve

from scaling import ScalingError, fit_allocation, fit_allocations
from scaling.allocation import expert_floor
from scaling.allocation_families import allocation_families
from scaling.frame import finished, read


def same(a, b, rel=1e-5, absolute=2e-6):
    if a is None or b is None:
        assert a is b
    else:
        assert a == pytest.approx(b, rel=rel, abs=absolute)


def alike(one, two, loss=1.0, intervals=True):
    same(one.optimum.rho, two.optimum.rho)
    for first, second in zip(one.models, two.models, strict=True):
        same(first.rho, second.rho)
        if intervals:
            for a, b in zip(first.interval, second.interval, strict=True):
                same(a, b, absolute=2e-5)
        if first.rss is not None:
            assert second.rss == pytest.approx(first.rss * loss**2, rel=1e-4)


def test_the_optimum_and_its_shape_are_recovered():
    fit = fit_allocation(ten_points())
    assert fit.optimum.model == "log-saturating"
    low, high = fit.optimum.interval
    assert low < 0.8 < high
    assert abs(fit.optimum.rho - 0.8) < 0.03
    assert fit.u_shape.verdict == "U-shaped"
    assert fit.u_shape.p_value <= 0.05
    assert fit.plateau.interval[0] < fit.optimum.rho < fit.plateau.interval[1]
    assert fit.model("log-saturating").over_one_interval[0] > 0


def test_the_parabola_is_biased_and_loses_when_the_curve_is_steep_at_one():
    fit = fit_allocation(ten_points(sd=0.0002))
    assert fit.model("quadratic").rho < 0.75
    assert fit.model("quadratic").delta_aicc > 4


def test_the_schema_of_the_json():
    plain = json.loads(json.dumps(fit_allocation(ten_points()).to_dict(), allow_nan=False))
    assert {"rho", "interval", "confidence"} <= set(plain["optimum"])
    assert len(plain["optimum"]["interval"]) == 2
    assert {"verdict", "p_value", "method"} <= set(plain["u_shape"])
    names = [model["name"] for model in plain["models"]]
    assert names == ["constant", *(n + j for n in ("quadratic",) for j in ("", "+jump")), "cubic"] + [
        n + j for n in ("log-saturating", "box-cox") for j in ("", "+jump")
    ]
    for model in plain["models"]:
        assert {"name", "k", "rss", "aicc", "rho", "interval", "status"} <= set(model)
        k, n = model["k"], plain["n"]
        assert model["aicc"] == pytest.approx(
            n * math.log(model["rss"] / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1)
        )
    assert {"interval", "epsilon"} <= set(plain["plateau"])


def test_the_headline_is_the_union_of_credible_families():
    fit = fit_allocation(ten_points(sd=0.002))
    members = [model for model in fit.models if model.eligible and model.delta_aicc < 4]
    assert {model.name for model in members} == set(fit.optimum.members)
    lows = [model.interval[0] for model in members]
    expected = None if None in lows else min(lows)
    assert fit.optimum.interval[0] == expected


def test_row_order_and_the_unit_of_loss_do_not_matter():
    table = ten_points()
    fit = fit_allocation(table)
    order = np.random.default_rng(0).permutation(10)
    alike(fit, fit_allocation({name: values[order] for name, values in table.items()}))
    bits = fit_allocation({"rho": RHO, "loss": table["loss"] / math.log(2) + 5})
    alike(fit, bits, loss=1 / math.log(2))


def test_doubled_rows_of_half_weight_change_no_estimate():
    table = ten_points()
    fit = fit_allocation(table)
    twice = {name: np.repeat(values, 2) for name, values in table.items()} | {"weight": np.full(20, 0.5)}
    double = fit_allocation(twice)
    for first, second in zip(fit.models, double.models, strict=True):
        same(first.params.get("rho*"), second.params.get("rho*"), absolute=1e-5)
        assert first.rss == pytest.approx(second.rss, rel=1e-6)


def test_doubled_rows_of_half_weight_change_no_interval_when_they_form_clusters_or_the_sd_is_known():
    table = ten_points()
    twice = {name: np.repeat(values, 2) for name, values in table.items()} | {"weight": np.full(20, 0.5)}
    clustered = fit_allocation(twice | {"cluster": np.repeat(np.arange(10), 2)}, cluster="cluster")
    alike(fit_allocation(table), clustered)
    sd = {"loss_sd": np.full(10, 0.0005)}
    known = fit_allocation(table | sd)
    assert known.model("quadratic").sd is None
    alike(known, fit_allocation(twice | {"loss_sd": np.full(20, 0.0005)}))


def test_known_sd_uses_chi_squared():
    table = ten_points() | {"loss_sd": np.full(10, 0.0005)}
    quadratic = fit_allocation(table).model("quadratic")
    design = np.stack([np.ones(10), RHO, RHO**2], axis=1)
    rest = table["loss"] - design @ np.linalg.lstsq(design, table["loss"], rcond=None)[0]
    assert quadratic.rss == pytest.approx(float((rest**2).sum()) / 0.0005**2, rel=1e-9)


def test_lack_of_fit_is_added_to_a_known_sd_only_where_there_is_some():
    rng = np.random.default_rng(0)
    clean = ten_points() | {"loss_sd": np.full(10, 0.0005)}
    assert fit_allocation(clean, noise="known+lack").held["lack_of_fit_sd"] < 0.0006
    rough = clean | {"loss": clean["loss"] + 0.004 * rng.standard_normal(10)}
    fit = fit_allocation(rough, noise="known+lack")
    assert 0.001 < fit.held["lack_of_fit_sd"] < 0.01
    known = fit_allocation(rough).model("log-saturating")
    wider = fit.model("log-saturating")
    assert (wider.interval[1] or 1) - (wider.interval[0] or 0) > (known.interval[1] or 1) - (
        known.interval[0] or 0
    )


def test_paired_seeds_are_blocks_and_their_level_costs_no_precision():
    rng = np.random.default_rng(0)
    shift = np.repeat([0.0, 0.01, -0.008], 10)
    rho = np.tile(RHO, 3)
    loss = u_curve(rho) + shift + 0.0005 * rng.standard_normal(30)
    table = {"rho": rho, "loss": loss, "seed": np.repeat([1, 2, 3], 10)}
    fit = fit_allocation(table)
    assert fit.held["blocks"] == "seed"
    assert fit.optimum.rho == pytest.approx(0.8, abs=0.03)
    blind = fit_allocation(table, blocks="none")
    assert blind.model("log-saturating").rss > 20 * fit.model("log-saturating").rss


def test_the_level_is_the_mean_over_blocks():
    rho = np.tile(RHO, 2)
    loss = u_curve(rho) + np.repeat([0.0, 0.02], 10)
    fit = fit_allocation({"rho": rho, "loss": loss, "seed": np.repeat([0, 1], 10)})
    np.testing.assert_allclose(fit.model("log-saturating").predict(RHO), u_curve(RHO) + 0.01, atol=1e-7)


def test_lack_of_fit_widens_an_interval():
    rho = np.repeat(RHO, 6)
    rng = np.random.default_rng(0)
    loss = u_curve(rho) + np.repeat(0.002 * rng.standard_normal(10), 6) + 1e-5 * rng.standard_normal(60)
    fit = fit_allocation({"rho": rho, "loss": loss}).model("quadratic")
    naive = math.sqrt(fit.rss / fit.dof)
    assert fit.sd > 2 * naive


def test_outliers_decide_a_gaussian_fit_and_not_a_robust_one():
    rho = np.linspace(0.05, 1, 20)
    loss = u_curve(rho) + 0.0003 * np.random.default_rng(0).standard_normal(20)
    loss[3] += 0.03
    plain = fit_allocation({"rho": rho, "loss": loss}).model("log-saturating")
    for error in ("student-t", "huber"):
        robust = fit_allocation({"rho": rho, "loss": loss}, error=error).model("log-saturating")
        assert abs(robust.rho - 0.8) < 0.03
        assert robust.sd < plain.sd / 3


def test_experts_give_the_floor():
    frame, _ = finished(
        read({"rho": [0.0, 0.5, 1.0], "loss": [1, 1, 1], "experts": [6, 56, 106], "top_k": [6, 6, 6]}),
        ("rho",),
    )
    value, origin = expert_floor(frame)
    assert value == pytest.approx(0.06)
    assert "experts" in origin


def test_several_budgets_need_a_choice():
    table = ten_points()
    two = {
        "rho": np.tile(RHO, 2),
        "loss": np.concatenate([table["loss"], table["loss"] - 0.1]),
        "budget": np.repeat([1e18, 4e18], 10),
    }
    with pytest.raises(ScalingError, match="2 budgets"):
        fit_allocation(two)
    assert fit_allocation(two, budget=4e18).budget == 4e18
    assert [fit.budget for fit in fit_allocations(two)] == [1e18, 4e18]
    with pytest.raises(ScalingError, match="the table has"):
        fit_allocation(two, budget=1e20)


@pytest.mark.parametrize(
    "options",
    [{"noise": "knwon"}, {"error": "cauchy"}, {"confidence": 1.0}, {"floor": -1.0}, {"noise": "known"},
     {"budget": 1e18}, {"blocks": "nope"}, {"cluster": "nope"}],
)  # fmt: skip
def test_a_wrong_option_is_one_sentence(options):
    with pytest.raises(ScalingError) as caught:
        fit_allocation(ten_points(), **options)
    assert "\n" not in str(caught.value)


def undecided(fit):
    assert fit.optimum.rho is None
    assert None in fit.optimum.interval
    assert fit.optimum.reason
    for model in fit.models:
        assert " " not in model.status
    json.dumps(fit.to_dict(), allow_nan=False)
    return fit


def test_equal_losses_are_flat_only_when_their_scatter_is_known():
    fit = undecided(fit_allocation({"rho": RHO, "loss": np.full(10, 1.7)}))
    assert fit.u_shape.verdict == "undetermined"
    assert "equal" in fit.u_shape.reason
    table = {"rho": RHO, "loss": np.full(10, 1.7), "loss_sd": np.full(10, 0.001)}
    assert undecided(fit_allocation(table)).u_shape.verdict == "flat"
    assert fit.optimum.interval == (None, None)


def test_noise_has_no_optimum():
    for seed in range(6):
        loss = 1.7 + 0.001 * np.random.default_rng(seed).standard_normal(10)
        undecided(fit_allocation({"rho": RHO, "loss": loss}))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_few_points_have_no_optimum(count):
    fit = undecided(fit_allocation({"rho": RHO[-count:], "loss": u_curve(RHO[-count:])}))
    assert fit.u_shape.verdict == "undetermined"


def test_three_points_with_many_seeds_have_no_optimum():
    rho = np.repeat([0.2, 0.7, 1.0], 8)
    loss = 1.7 + 0.1 * (rho - 0.6) ** 2 + 0.001 * np.random.default_rng(0).standard_normal(24)
    undecided(fit_allocation({"rho": rho, "loss": loss}))


@pytest.mark.parametrize(
    "curve", [lambda x: 1.75 - 0.03 * x, lambda x: 1.7 + 0.05 * np.exp(-5 * x), lambda x: 1.7 + 0.02 * x**2]
)
def test_monotone_curves_have_no_optimum(curve):
    for seed in range(3):
        loss = curve(RHO) + 0.0005 * np.random.default_rng(seed).standard_normal(10)
        fit = fit_allocation({"rho": RHO, "loss": loss})
        assert fit.u_shape.verdict.startswith("monotone")
        undecided(fit)


@pytest.mark.parametrize("sd", [0.0, 0.0005])
def test_a_hill_is_called_one_without_replicates(sd):
    noise = sd * np.random.default_rng(0).standard_normal(10)
    fit = undecided(fit_allocation({"rho": RHO, "loss": 1.7 - 0.1 * (RHO - 0.5) ** 2 + noise}))
    assert fit.u_shape.verdict == "inverted-U"
    assert fit.optimum.interval == (None, None)


def test_a_zigzag_is_undetermined_alone_and_neither_with_replicates():
    zigzag = np.where(np.arange(10) % 2 == 0, 1.70, 1.72) - 0.01 * RHO
    assert undecided(fit_allocation({"rho": RHO, "loss": zigzag})).u_shape.verdict == "undetermined"
    rng = np.random.default_rng(0)
    table = {"rho": np.tile(RHO, 3), "loss": np.tile(zigzag, 3) + 0.001 * rng.standard_normal(30)}
    fit = undecided(fit_allocation(table))
    assert fit.u_shape.verdict == "neither"
    assert fit.optimum.interval == (None, None)


def test_flat_needs_replicates():
    rng = np.random.default_rng(4)
    alone = fit_allocation({"rho": RHO, "loss": 1.7 + 0.001 * rng.standard_normal(10)})
    assert alone.u_shape.verdict == "undetermined"
    rho = np.tile(RHO, 3)
    assert (
        fit_allocation({"rho": rho, "loss": 1.7 + 0.001 * rng.standard_normal(30)}).u_shape.verdict == "flat"
    )


@pytest.mark.parametrize(
    ("curve", "end"),
    [
        (lambda x: 1.75 - 0.03 * x, 1),
        (lambda x: 1.7 + 0.05 * np.exp(-6 * x), 1),
        (lambda x: 1.71 - 0.02 * np.log(x + 0.06), 1),
        (lambda x: 1.7 + 0.03 * x, 0),
        (lambda x: 1.71 + 0.04 * x**3, 0),
        (lambda x: 1.71 - 0.004 * np.log1p((1 - x) / 0.03), 0),
    ],
)
def test_an_optimum_at_an_end_stays_in_the_interval(curve, end):
    held = 0
    for seed in range(8):
        loss = curve(RHO) + 0.001 * np.random.default_rng(seed).standard_normal(10)
        held += fit_allocation({"rho": RHO, "loss": loss}).optimum.interval[end] is None
    assert held >= 5  # P(fewer | rate .9) < .006


def test_a_log_curve_without_one_of_its_terms_is_an_optimum_at_an_end():
    families = {model.name: model for model in allocation_families()}
    x = np.linspace(0, 1, 101)
    for name, rest in (("log-saturating", ()), ("box-cox", (0.5,))):
        only_experts = families[name].basis(np.array([1.2, np.log(0.05), *rest]), x)
        only_memory = families[name].basis(np.array([-0.06, np.log(0.05), *rest]), x)
        assert (np.diff(only_experts) < 0).all()
        assert (np.diff(only_memory) > 0).all()


def test_an_optimum_outside_the_runs_is_not_claimed():
    rho = np.linspace(0.1, 0.5, 9)
    loss = u_curve(rho) + 1e-4 * np.random.default_rng(0).standard_normal(9)
    fit = undecided(fit_allocation({"rho": rho, "loss": loss}))
    assert fit.model("quadratic").status in ("extrapolating", "vertex-outside-data")


def test_equal_rows_of_a_constant_cell_and_failed_runs_are_visible():
    table = ten_points()
    frame = pl.DataFrame(
        {
            "rho": np.append(RHO, 0.5),
            "loss": np.append(table["loss"], np.nan),
            "status": ["finished"] * 10 + ["failed"],
        }
    )
    fit = fit_allocation(frame)
    assert fit.n == 10
    assert fit.excluded[0].rows == (11,)
    assert fit.held["runs_left_out"] == 1


@settings(max_examples=12, deadline=None)
@given(
    rho=st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.5000001, 0.8, 0.97, 1.0]), min_size=1, max_size=14),
    scale=st.sampled_from([0.0, 1e-12, 1e-3, 1.0, 1e6]),
    seed=st.integers(0, 999),
    seeds=st.booleans(),
)
def test_hostile_tables_give_a_status_and_never_a_traceback(rho, scale, seed, seeds):
    rng = np.random.default_rng(seed)
    table = {"rho": rho, "loss": 2 + scale * rng.standard_normal(len(rho))}
    if seeds:
        table["seed"] = rng.integers(0, 3, len(rho))
    fit = fit_allocation(table)
    json.dumps(fit.to_dict(), allow_nan=False)
    if len(set(rho)) < 6:
        assert fit.optimum.rho is None
    for model in fit.models:
        assert model.status
        if model.rho is not None:
            assert 0 < model.rho < 1
            low, high = model.interval
            assert low is None or low <= model.rho + 1e-9
            assert high is None or model.rho <= high + 1e-9
        band = model.band([0.0, 0.5, 1.0])
        assert (band[0] <= band[1]).all()


@pytest.mark.slow
def test_a_million_runs():
    rng = np.random.default_rng(0)
    rho = rng.uniform(0, 1, 1_000_000)
    fit = fit_allocation(
        {"rho": rho, "loss": 1.7 + 0.1 * (rho - 0.7) ** 2 + 0.003 * rng.standard_normal(len(rho))}
    )
    assert fit.optimum.rho == pytest.approx(0.7, abs=0.002)
    assert fit.n == 1_000_000


def test_merging_many_runs_changes_nothing():
    rng = np.random.default_rng(0)
    rho = np.tile(RHO, 60)
    table = {"rho": rho, "loss": u_curve(rho) + 0.002 * rng.standard_normal(600)}
    merged = fit_allocation(table)
    part = {name: values[:500] for name, values in table.items()}
    whole = fit_allocation(part)
    design = np.stack([np.ones(600), rho, rho**2], axis=1)
    rest = table["loss"] - design @ np.linalg.lstsq(design, table["loss"], rcond=None)[0]
    assert merged.model("quadratic").rss == pytest.approx(float((rest**2).sum()), rel=1e-9)
    assert merged.model("quadratic").dof == 597
    assert whole.optimum.rho == pytest.approx(merged.optimum.rho, abs=0.02)


def seven(curve, seeds, sd, seed=0):
    rho = np.repeat([0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0], seeds)
    return {"rho": rho, "loss": curve(rho) + sd * np.random.default_rng(seed).standard_normal(len(rho))}


@pytest.mark.parametrize("sd", [0.0003, 0.001])
def test_a_u_that_no_family_describes_has_an_optimum_all_the_same(sd):
    """A kink at .7: less noise shows the misfit of every family, and must not lose the optimum."""
    for seed in range(3):
        table = seven(lambda x: 1.7 + 0.047 * np.abs(x - 0.7), 2, sd, seed)
        fit = fit_allocation(table)
        low, high = fit.optimum.interval
        assert fit.u_shape.verdict == "U-shaped"
        assert abs(fit.optimum.rho - 0.7) < 0.08
        assert 0.2 <= low <= 0.7 <= high <= 1.0
        assert low <= fit.optimum.rho <= high
        assert fit_allocation(table).to_dict() == fit.to_dict()


def test_a_u_of_five_points_is_bounded_though_no_curve_may_be_chosen():
    rho = np.repeat([0.2, 0.4, 0.6, 0.8, 1.0], 3)
    loss = 1.7 + 0.06 * (rho - 0.6) ** 2 + 0.001 * np.random.default_rng(0).standard_normal(15)
    fit = fit_allocation({"rho": rho, "loss": loss})
    assert (fit.u_shape.verdict, fit.optimum.rho) == ("U-shaped", None)
    assert fit.optimum.interval == pytest.approx((0.4, 0.8))


def test_the_misfit_of_a_parabola_does_not_pass_for_scatter():
    """Seven points of an asymmetric curve read off a plot, a deep left arm and a right arm of one point."""
    rho = [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
    loss = [1.7248, 1.7205, 1.7163, 1.7128, 1.7109, 1.7122, 1.7160]
    fit = fit_allocation({"rho": rho, "loss": loss})
    assert fit.u_shape.verdict == "U-shaped"
    assert fit.optimum.interval[0] < 0.82 < fit.optimum.interval[1]

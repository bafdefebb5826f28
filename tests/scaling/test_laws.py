"""The standard laws: recovery, exact derivatives, independent optimisers, hostile tables."""

import json
import math

import numpy as np
import pytest
from scipy.optimize import minimize

from scaling import (
    ScalingError,
    compute_optimal,
    fit_chinchilla,
    fit_clark,
    fit_gadre,
    fit_isoflop,
    fit_kaplan,
    fit_tao,
    hold_out_compute,
    law_influence,
)
from scaling.lse import Terms, huber

PUBLISHED = {"A": 477.84, "B": 2143.86, "E": 1.81724, "alpha": 0.34731, "beta": 0.36718}


def runs(n=120, sd=0.004, seed=0, tied=False):
    rng = np.random.default_rng(seed)
    size = np.exp(rng.uniform(np.log(5e7), np.log(1.6e10), n))
    budget = np.exp(rng.uniform(np.log(6e18), np.log(3e21), n))
    tokens = budget / 6 / size
    p = PUBLISHED | ({"beta": PUBLISHED["alpha"]} if tied else {})
    loss = p["E"] + p["A"] * size ** -p["alpha"] + p["B"] * tokens ** -p["beta"]
    return {"N": size, "C": budget, "D": tokens, "loss": loss * np.exp(sd * rng.standard_t(3, n))}


def objective(phi, table, delta=1e-3):
    a, b, e, alpha, beta = phi
    logits = np.stack(
        [a - alpha * np.log(table["N"]), b - beta * np.log(table["D"]), np.full(len(table["N"]), e)]
    )
    return huber(np.logaddexp.reduce(logits, axis=0) - np.log(table["loss"]), delta).sum()


def test_noise_free_chinchilla_is_recovered():
    table = runs(sd=0)
    fit = fit_chinchilla(table, draws=0)
    for name, value in PUBLISHED.items():
        assert fit.params[name] == pytest.approx(value, rel=1e-4)
    assert fit.status == "converged"


def test_no_scipy_start_does_better():
    table = runs()
    fit = fit_chinchilla(table, draws=0)
    best = np.inf
    rng = np.random.default_rng(0)
    for _ in range(12):
        start = [
            rng.uniform(0, 10),
            rng.uniform(0, 10),
            rng.uniform(0, 1),
            rng.uniform(0, 1),
            rng.uniform(0, 1),
        ]
        found = minimize(
            lambda phi: 1e4 * objective(phi, table), start, method="Nelder-Mead",
            options={"maxiter": 6000, "maxfev": 6000, "xatol": 1e-9, "fatol": 1e-9},
        )  # fmt: skip
        best = min(best, objective(found.x, table))
    assert fit.objective <= best * (1 + 1e-9)
    p = fit.params
    again = objective([math.log(p["A"]), math.log(p["B"]), math.log(p["E"]), p["alpha"], p["beta"]], table)
    assert fit.objective == pytest.approx(again, rel=1e-9)


@pytest.mark.parametrize("power", [None, 3])
def test_gradient_and_hessian_match_central_differences(power):
    rng = np.random.default_rng(0)
    terms = rng.normal(size=(3, 7, 4))
    if power is not None:
        terms[:, :, power] = 0.0
    data = Terms(terms=terms, log_loss=rng.normal(size=7), power=power, offset=rng.normal(size=(3, 7)))
    phi = rng.normal(size=(1, 4)) + 1.5

    def parts(at):
        value, share = data.value(at)
        rest = value - data.log_loss
        gradient, hessian, _ = data.derivatives(
            at, value, share, rest, np.ones_like(rest), np.ones_like(rest)
        )
        return 0.5 * (rest**2).sum(), gradient[0], hessian[0]

    _, gradient, hessian = parts(phi)
    for j in range(4):
        step = np.zeros((1, 4))
        step[0, j] = 1e-5
        up, down = parts(phi + step), parts(phi - step)
        assert gradient[j] == pytest.approx((up[0] - down[0]) / 2e-5, rel=1e-6, abs=1e-7)
        np.testing.assert_allclose(hessian[j], (up[1] - down[1]) / 2e-5, rtol=1e-5, atol=1e-6)


def test_tokens_are_filled_in_from_compute():
    table = runs()
    full = fit_chinchilla(table, draws=0)
    short = fit_chinchilla({name: table[name] for name in ("N", "C", "loss")}, draws=0)
    assert short.params["alpha"] == pytest.approx(full.params["alpha"], rel=1e-9)


def test_row_order_units_and_half_weights():
    table = runs()
    fit = fit_chinchilla(table, draws=0)
    order = np.random.default_rng(1).permutation(len(table["N"]))
    other = fit_chinchilla({name: value[order] for name, value in table.items()}, draws=0)
    assert other.objective == pytest.approx(fit.objective, rel=1e-12)
    million = fit_chinchilla({**table, "N": table["N"] / 1e6, "D": table["D"] / 1e9}, draws=0)
    assert million.params["alpha"] == pytest.approx(fit.params["alpha"], rel=1e-6)
    assert million.params["A"] == pytest.approx(fit.params["A"] * 1e6 ** -fit.params["alpha"], rel=1e-5)


def test_bootstrap_intervals_hold_the_truth_and_clusters_widen_them():
    table = runs(n=150)
    fit = fit_chinchilla(table, draws=300)
    for name, value in PUBLISHED.items():
        low, high = fit.intervals[name]
        assert low < value < high
    low, high = fit.band(total_parameters=1e9, tokens=2e10)
    assert low[0] < fit.predict(total_parameters=1e9, tokens=2e10)[0] < high[0]
    twice = {name: np.repeat(value, 2) for name, value in table.items()}
    pairs = np.repeat(np.arange(150), 2)
    cases = fit_chinchilla(twice, draws=300)
    clusters = fit_chinchilla(twice | {"cluster": pairs}, draws=300, cluster="cluster")

    def width(result):
        return result.intervals["alpha"][1] - result.intervals["alpha"][0]

    assert width(clusters) == pytest.approx(width(fit), rel=0.15)
    assert width(cases) < 0.85 * width(clusters)


def test_tied_exponents():
    table = runs(sd=0.001, tied=True)
    tied, free = fit_chinchilla(table, tied=True, draws=0), fit_chinchilla(table, draws=0)
    assert tied.params["alpha"] == tied.params["beta"]
    assert tied.params["alpha"] == pytest.approx(PUBLISHED["alpha"], rel=0.02)
    assert tied.objective >= free.objective
    assert tied.aicc < free.aicc + 1


def test_dropping_the_largest_losses_is_visible():
    table = runs()
    fit = fit_chinchilla(table, draws=0, drop_largest=5)
    assert fit.n == 115
    dropped = set(np.argsort(table["loss"])[-5:] + 1)
    assert set(fit.excluded[-1].rows) == dropped


def test_the_compute_optimal_point_is_a_minimum():
    budget = 1e21
    size, tokens = compute_optimal(PUBLISHED, budget)
    assert 6 * size * tokens == pytest.approx(budget)

    def loss(n):
        return (
            PUBLISHED["A"] * n ** -PUBLISHED["alpha"]
            + PUBLISHED["B"] * (budget / 6 / n) ** -PUBLISHED["beta"]
        )

    assert loss(size) < min(loss(size * 1.02), loss(size / 1.02))


def test_influence_of_runs_equals_refits_without_them():
    table = runs(n=60)
    fit = fit_chinchilla(table, draws=0)
    rows = law_influence(fit, "alpha")
    assert len(rows) == 60
    for i in (0, 17):
        without = {name: np.delete(value, i) for name, value in table.items()}
        assert rows[i].value == pytest.approx(fit_chinchilla(without, draws=0).params["alpha"], rel=1e-5)
    large = np.argsort(table["loss"])[-5:]
    grouped = law_influence(fit, "N_exponent", {"five largest losses": np.isin(np.arange(60), large)})
    dropped = fit_chinchilla(table, draws=0, drop_largest=5)
    assert grouped[0].value == pytest.approx(dropped.derived["N_exponent"], rel=1e-5)
    with pytest.raises(ScalingError, match="'alpha'"):
        law_influence(fit, "alpa")


def test_the_largest_compute_is_predicted_from_the_rest():
    inside = total = 0
    for seed in range(3):
        held = hold_out_compute(fit_chinchilla(runs(n=100, seed=seed), draws=0), draws=200)
        inside, total = inside + held.inside, total + len(held.x)
    assert total == 30
    assert inside >= 23  # P(fewer | rate .95) < 1e-3
    wrong = runs(n=100, sd=0.0005)
    late = wrong["C"] >= np.sort(wrong["C"])[-10]
    wrong["loss"] = np.where(late, wrong["loss"] * 1.05, wrong["loss"])
    assert hold_out_compute(fit_chinchilla(wrong, draws=0), draws=200).inside == 0


def test_chinchilla_json():
    fit = fit_chinchilla(runs(), draws=20)
    plain = json.loads(json.dumps(fit.to_dict(), allow_nan=False))
    assert {"A", "B", "E", "alpha", "beta", "objective", "intervals"} <= set(plain)
    assert set(fit.params) <= set(plain["intervals"])


def test_kaplan_is_recovered():
    rng = np.random.default_rng(0)
    size, tokens = (np.exp(rng.uniform(np.log(lo), np.log(hi), 90)) for lo, hi in ((1e6, 1e10), (1e8, 1e11)))
    loss = ((8.8e13 / size) ** (0.076 / 0.095) + 5.4e13 / tokens) ** 0.095
    fit = fit_kaplan({"N": size, "D": tokens, "loss": loss}, draws=0)
    assert fit.params["alpha_N"] == pytest.approx(0.076, rel=1e-4)
    assert fit.params["alpha_D"] == pytest.approx(0.095, rel=1e-4)
    assert fit.params["N_c"] == pytest.approx(8.8e13, rel=1e-2)
    np.testing.assert_allclose(fit.predict(total_parameters=size, tokens=tokens), loss, rtol=1e-6)


def test_gadre_is_recovered_from_either_pair_of_columns():
    rng = np.random.default_rng(0)
    size, tokens = (np.exp(rng.uniform(np.log(lo), np.log(hi), 80)) for lo, hi in ((1e7, 1e10), (1e8, 1e11)))
    c, m = 6 * size * tokens, tokens / size
    loss = 2 + (40 * m**0.15 + 300 * m**-0.15) * c**-0.15
    for table in ({"N": size, "D": tokens}, {"budget": c, "over_training": m}):
        fit = fit_gadre(table | {"loss": loss}, draws=0)
        for name, value in (("a", 40), ("b", 300), ("E", 2), ("eta", 0.15)):
            assert fit.params[name] == pytest.approx(value, rel=1e-3)


def test_clark_is_recovered_and_its_predictions_have_bands():
    rng = np.random.default_rng(0)
    size = np.exp(rng.uniform(np.log(1e7), np.log(1e9), 90))
    experts = rng.choice([1, 2, 4, 8, 16, 32, 64, 128, 256, 512], 90).astype(float)
    effective = 1 / (1 / (experts - 1 + 1 / (1 / 1.5 - 1 / 300)) + 1 / 300)
    mean = np.exp(
        -0.08 * np.log(size) - 0.12 * np.log(effective) + 0.004 * np.log(size) * np.log(effective) + 2.4
    )
    fit = fit_clark({"N": size, "E": experts, "loss": mean * np.exp(0.002 * rng.standard_normal(90))})
    for name, value in (("a", -0.08), ("c", 0.004), ("E_start", 1.5), ("E_max", 300)):
        low, high = fit.intervals[name]
        assert low < value < high or abs(fit.params[name] / value - 1) < 0.1
    low, high = fit.band(total_parameters=1e8, experts=64.0)
    assert low[0] < fit.predict(total_parameters=1e8, experts=64.0)[0] < high[0]


def test_tao_takes_normalised_losses():
    rng = np.random.default_rng(0)
    size, vocabulary, tokens = (
        np.exp(rng.uniform(np.log(lo), np.log(hi), 90)) for lo, hi in ((1e6, 1e10), (1e6, 1e9), (1e8, 1e11))
    )
    loss = -5 + 50 * size**-0.25 + 30 * vocabulary**-0.3 + 300 * tokens**-0.3
    fit = fit_tao({"N": size, "N_v": vocabulary, "D": tokens, "loss": loss})
    for name, value in (("E", -5), ("alpha_1", 0.25), ("alpha_2", 0.3), ("beta", 0.3)):
        assert fit.params[name] == pytest.approx(value, rel=1e-3)


def valleys(seed=0, sd=0.003, budgets=4):
    rng = np.random.default_rng(seed)
    c = np.repeat(np.geomspace(1e18, 3e19, budgets), 9)
    size = 0.13 * c**0.49 * np.exp(np.tile(np.linspace(-1.5, 1.5, 9), budgets))
    loss = 5 * c**-0.03 + 0.04 * (np.log(size) - np.log(0.15 * c**0.49)) ** 2
    return {"C": c, "N": size, "loss": loss + sd * rng.standard_normal(len(c))}


def test_iso_flop_valleys_and_their_power_law():
    fit = fit_isoflop(valleys())
    assert fit.exponent_interval[0] < 0.49 < fit.exponent_interval[1]
    assert fit.optimum(1e20) == pytest.approx(0.15 * 1e20**0.49, rel=0.1)
    for valley in fit.valleys:
        assert valley.interval[0] < 0.15 * valley.budget**0.49 * 1.1
        assert valley.status == "converged"
    json.dumps(fit.to_dict(), allow_nan=False)


def test_one_budget_has_a_valley_and_no_exponent():
    fit = fit_isoflop(valleys(budgets=1))
    assert fit.valleys[0].optimum is not None
    assert fit.exponent is None


def test_a_hill_is_no_valley():
    table = valleys(sd=0.0)
    fit = fit_isoflop(table | {"loss": 10 - table["loss"]})
    assert all(valley.optimum is None for valley in fit.valleys)


@pytest.mark.parametrize("fit", [fit_chinchilla, fit_kaplan, fit_gadre])
def test_hostile_tables_of_log_loss_laws(fit):
    few = {"N": [1e6, 1e7, 1e8], "D": [1e9, 1e9, 1e9], "loss": [3.0, 2.5, 2.2]}
    assert fit(few, draws=10).status == "too-few-points"
    equal = {name: np.asarray(value) for name, value in runs().items()} | {"loss": np.full(120, 2.0)}
    assert fit(equal, draws=10).status == "flat-direction"
    one = runs() | {"N": np.full(120, 1e8)}
    one.pop("C")
    result = fit(one, draws=10)
    json.dumps(result.to_dict(), allow_nan=False)
    if fit is not fit_gadre:
        assert result.status == "too-few-points"
    with pytest.raises(ScalingError, match="Row 2, column 'loss'"):
        fit({"N": [1e6, 1e7], "D": [1e9, 1e9], "loss": [3.0, -1.0]})
    with pytest.raises(ScalingError, match="missing"):
        fit({"N": [1e6], "loss": [1.0]})


def test_hostile_tables_of_profiled_laws():
    table = {"N": [1e6, 1e7], "E": [1.0, 2.0], "N_v": [1e6, 1e6], "D": [1e9, 1e9], "loss": [3.0, 2.5]}
    assert fit_clark(table).status == "too-few-points"
    assert fit_tao(table).status == "too-few-points"
    noise = np.random.default_rng(0).normal(2, 0.1, 40)
    rng = np.random.default_rng(1)
    wild = {"N": rng.uniform(1e6, 1e8, 40), "E": rng.choice([1, 2, 4, 8, 16, 32], 40), "loss": noise}
    json.dumps(fit_clark(wild).to_dict(), allow_nan=False)


@pytest.mark.parametrize("shape", ["noise", "grows with size", "wide"])
@pytest.mark.parametrize("law", [fit_chinchilla, fit_kaplan, fit_gadre, fit_clark, fit_tao, fit_isoflop])
def test_tables_that_no_law_describes_have_a_status_and_finite_json(law, shape):
    rng = np.random.default_rng(0)
    size, tokens = np.exp(rng.uniform(15, 22, 40)), np.exp(rng.uniform(18, 25, 40))
    loss = {
        "noise": 2 + 0.1 * rng.random(40),
        "grows with size": size**0.1,
        "wide": np.exp(rng.uniform(-6, 6, 40)),
    }[shape]
    table = {"N": size, "D": tokens, "V": size[::-1], "E": rng.integers(1, 64, 40), "loss": loss}
    if law is fit_isoflop:
        table |= {"C": rng.choice([1e18, 1e19], 40)}
    fit = law(table)
    assert fit.status
    json.dumps(fit.to_dict(), allow_nan=False)


def unidentified(fit, status, *names):
    plain = fit.to_dict()
    assert fit.status == status, fit.notes
    for name in names:
        assert plain["intervals"][name] == [None, None]
    json.dumps(plain, allow_nan=False)


@pytest.mark.parametrize("scatter", [0.0, 0.004])
@pytest.mark.parametrize("sd", [0.0, 0.004])
def test_tokens_that_follow_parameters_are_collinear(sd, scatter):
    rng = np.random.default_rng(0)
    size = runs()["N"]
    tokens = 20 * size * np.exp(scatter * rng.standard_normal(120))
    p = PUBLISHED
    loss = p["E"] + p["A"] * size ** -p["alpha"] + p["B"] * tokens ** -p["beta"]
    table = {"N": size, "D": tokens, "loss": loss * np.exp(sd * rng.standard_normal(120))}
    unidentified(fit_chinchilla(table, draws=50), "collinear", "A", "B", "E", "alpha", "beta", "N_exponent")
    unidentified(fit_kaplan(table, draws=50), "collinear", "N_c", "D_c", "alpha_N", "alpha_D")
    assert fit_gadre(table, draws=50).status in ("collinear", "too-few-points")
    one = runs() | {"C": np.full(120, 1e20), "D": 1e20 / 6 / size}
    unidentified(fit_chinchilla(one, draws=50), "collinear", "A", "B", "E", "alpha", "beta")


@pytest.mark.parametrize("sd", [0.0, 0.004])
def test_a_law_that_does_not_need_tokens_says_so_and_keeps_what_it_knows(sd):
    table = runs(n=200)
    noise = np.exp(sd * np.random.default_rng(1).standard_normal(200))
    loss = (1.8 + 478 * table["N"] ** -0.347) * noise
    fit = fit_chinchilla(table | {"loss": loss}, draws=100)
    unidentified(fit, "flat-direction", "B", "beta", "E", "N_exponent", "ln_G")
    assert "tokens" in fit.notes[0]
    low, high = fit.intervals["alpha"]
    assert low <= 0.347 * (1 + 1e-6)
    assert high >= 0.347 * (1 - 1e-6)


@pytest.mark.parametrize("law", [fit_chinchilla, fit_kaplan, fit_gadre])
def test_pure_noise_has_no_law(law):
    clean = 0
    for seed in range(4):
        loss = 2.5 * np.exp(0.01 * np.random.default_rng(seed).standard_normal(120))
        clean += law(runs() | {"loss": loss}, draws=20).status == "converged"
    assert clean == 0


def test_a_loss_that_grows_with_size_has_a_negative_exponent():
    table = runs()
    loss = 2 + 1e-3 * table["N"] ** 0.2 + 2143 * table["D"] ** -0.37
    fit = fit_chinchilla(table | {"loss": loss}, draws=20)
    assert fit.status == "negative-exponent"
    assert fit.params["alpha"] == pytest.approx(-0.2, rel=1e-3)


def test_a_published_like_table_is_identified():
    fit = fit_chinchilla(runs(n=240), draws=100)
    assert fit.status == "converged"
    assert not fit.notes


@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_key_is_there_with_too_few_runs(count):
    table = {name: value[:count] for name, value in runs().items()}
    for law, names in (
        (fit_chinchilla, ("A", "B", "E", "alpha", "beta")),
        (fit_kaplan, ("N_c", "D_c", "alpha_N", "alpha_D")),
        (fit_gadre, ("a", "b", "E", "eta")),
    ):
        plain = law(table).to_dict()
        assert plain["status"] == "too-few-points"
        for name in names:
            assert plain[name] is None
            assert plain["intervals"][name] == [None, None]
    few = {"N": [1e6, 1e7], "E": [1.0, 2.0], "N_v": [1e6, 1e6], "D": [1e9, 1e9], "loss": [3.0, 2.5]}
    for law, name in ((fit_clark, "E_max"), (fit_tao, "alpha_2")):
        plain = law(few).to_dict()
        assert plain[name] is None
        assert plain["intervals"][name] == [None, None]

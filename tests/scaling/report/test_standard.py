"""Reports of tables that hold standard laws, and checklists that say no more than their table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from made_up_runs import allocation_rows, memory_rows, study

from scaling import fit_chinchilla, fit_isoflop
from scaling.errors import ScalingError
from scaling.report import write_report
from scaling.report.checklist import UNSTATED

TRUE = {"A": 477.84, "B": 2143.86, "E": 1.81724, "alpha": 0.34731, "beta": 0.36718}


def runs(budgets: int = 6, sizes: int = 9, sd: float = 0.002) -> pl.DataFrame:
    """Sizes in a valley at each budget, as digitised tables name them."""
    noise = np.random.default_rng(0)
    compute = np.repeat(6e18 * 3.0 ** np.arange(budgets), sizes)
    best = 2e8 * np.sqrt(compute / 6e18)
    size = best * np.tile(np.geomspace(1 / 8, 8, sizes), budgets)
    tokens = compute / 6 / size
    loss = TRUE["E"] + TRUE["A"] * size ** -TRUE["alpha"] + TRUE["B"] * tokens ** -TRUE["beta"]
    loss *= np.exp(sd * noise.standard_normal(len(loss)))
    names = ("Model Size", "Training Tokens", "Training FLOP", "loss")
    return pl.DataFrame(dict(zip(names, (size, tokens, compute, loss), strict=True)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(runs(), tmp_path_factory.mktemp("laws")).parent


def test_a_table_of_sizes_and_tokens_gets_its_laws_pictures_and_tables(whole: Path) -> None:
    drawn = {path.stem for path in (whole / "figures").iterdir()}
    assert drawn == {
        *("law-isoflop", "law-agreement", "law-frontier", "law-exponents", "law-held-out"),
        *("law-residuals-total_parameters", "law-residuals-tokens"),
    }
    text = (whole / "report.md").read_text().replace("\\", "")
    for title in (
        "Laws fitted to the same runs",
        "Parameters of Chinchilla's law",
        "Valleys of loss",
        "Influence",
    ):
        assert f"### {title}" in text
    assert "nan" not in text.lower().replace("finance", "")
    assert "Loss against share" not in text


def test_the_numbers_are_those_of_the_functions(whole: Path) -> None:
    found = json.loads((whole / "fits.json").read_text())["standard"]
    laws = {law["kind"]: law for law in found["laws"]}
    assert laws["chinchilla"]["alpha"] == pytest.approx(fit_chinchilla(runs(), draws=0).params["alpha"])
    assert found["isoflop"]["exponent"] == pytest.approx(fit_isoflop(runs()).exponent)
    scores = [law["aicc"] for law in found["laws"]]
    assert scores == sorted(scores)
    assert laws["kaplan"]["interval_method"] == "none"


def test_runs_at_one_compute_each_have_no_valleys_and_still_a_report(tmp_path: Path) -> None:
    frame = runs().with_row_index("i").with_columns(pl.col("Model Size") * 1.05 ** pl.col("i")).drop("i")
    path = write_report(frame.drop("Training FLOP"), tmp_path)
    assert "Chinchilla's law" in path.read_text()


def test_too_few_runs_for_a_law_is_said_and_no_law_is_drawn(tmp_path: Path) -> None:
    path = write_report(runs(2, 3), tmp_path)
    text = path.read_text()
    assert "is not fitted: 6 runs; 5 parameters need at least 7" in text
    assert "Parameters of Chinchilla&#x27;s law</h3>" not in text


def test_experts_give_clarks_law(tmp_path: Path) -> None:
    size, experts = (a.ravel() for a in np.meshgrid(np.geomspace(1e7, 1e9, 5), [1.0, 4, 16, 64, 256]))
    noise = 0.002 * np.random.default_rng(0).standard_normal(len(size))
    loss = np.exp(
        2.5 - 0.08 * np.log(size) - 0.06 * np.log(experts) + 0.002 * np.log(size) * np.log(experts) + noise
    )
    path = write_report(pl.DataFrame({"active_parameters": size, "experts": experts, "loss": loss}), tmp_path)
    assert "Parameters of Clark" in path.read_text()


@pytest.mark.parametrize("sweep", ["memory", "shares"])
def test_a_table_of_one_sweep_alone_is_reported_without_the_other(tmp_path: Path, sweep: str) -> None:
    rows = study(memory_rows()) if sweep == "memory" else study(allocation_rows("u"))
    column = "slots" if sweep == "memory" else "rho"
    path = write_report(rows.select(column, "loss"), tmp_path)
    text = path.read_text()
    assert ('id="memory"' in text) == (sweep == "memory")
    assert ('id="shares"' in text) == (sweep == "shares")
    assert 'id="laws"' not in text


def test_a_table_that_calls_for_nothing_is_told_what_a_report_needs(tmp_path: Path) -> None:
    with pytest.raises(ScalingError, match="total_parameters, at 3 values or more"):
        write_report(pl.DataFrame({"x": [1.0, 2.0], "loss": [1.0, 2.0]}), tmp_path)


def answers(path: Path) -> dict[str, str]:
    lines = path.with_suffix(".md").read_text().replace("\\", "").splitlines()
    table = lines[lines.index("### Checklist") :]
    return {
        cells[2].strip(): cells[3].strip() for cells in (line.split("|") for line in table) if len(cells) == 5
    }


def test_a_bare_tables_checklist_claims_nothing_that_the_table_does_not_say(tmp_path: Path) -> None:
    bare = answers(write_report(study(allocation_rows("u")).select("rho", "loss"), tmp_path))
    outside = [
        *("On which data?", "With which tokenizer and context length?", "Was any token seen twice?"),
        *("How are parameters counted?", "How is compute counted?", "How were hyper-parameters chosen?"),
        *("Did the learning rate end with the tokens of each run?", "By which code?", "On which machine?"),
        *("How many seeds?", "How far do cells miss their budget?", "Was any run interrupted?"),
    ]
    assert {question: bare[question] for question in outside} == dict.fromkeys(outside, UNSTATED)
    for question in (
        "What is the metric?",
        "How many checkpoints of a run are used?",
        "Was any run left out?",
    ):
        assert UNSTATED in bare[question]
    for word in ("tokenizer", "embedding", "cosine", "nats"):
        assert all(word not in answer for answer in bare.values())


def test_what_the_context_states_is_stated(tmp_path: Path) -> None:
    context = {"metric": "Pile test loss", "parameters": "all", "recipe": "steps: 3"}
    said = answers(write_report(study(allocation_rows("u")), tmp_path, context=context))
    assert said["What is the metric?"] == "Pile test loss"
    assert said["How are parameters counted?"] == "all"
    assert "recipe below" in said["Did the learning rate end with the tokens of each run?"]
    assert UNSTATED in said["How were hyper-parameters chosen?"]  # a recipe says which, not why


def test_what_mismatches_leave_out_is_said_where_they_stand(tmp_path: Path) -> None:
    rows = study(allocation_rows("u")).with_columns(flops_mismatch=pl.lit(-5e-4))
    page = write_report(rows, tmp_path, context={"mismatch": "the router is left out of flops_mismatch"})
    missed = answers(page)["How far do cells miss their budget?"]
    assert missed == "FLOPs per token by at most 0.05 %; the router is left out of flops_mismatch"
    varied = page.with_suffix(".md").read_text().replace("\\", "")
    assert "should hold equal. The router is left out of flops_mismatch." in varied


def test_budgets_that_hold_unequal_compute_and_fits_at_a_bound_are_noted(tmp_path: Path) -> None:
    said = answers(write_report(study(allocation_rows("falling")), tmp_path))
    assert "C = 1e15 FLOPs holds 9 values 0.1 % apart" in said["Which runs were taken for one budget?"]
    fits = json.loads((tmp_path / "fits.json").read_text())
    odd = [m for fit in fits["allocation"] for m in fit["models"] if m["status"] != "converged"]
    for model in odd:
        assert f"{model['name']} (" in said["Which fits did not simply converge?"]
    assert odd

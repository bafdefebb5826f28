from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_up_studies import a_study, recorded

from engram_lab.errors import UserError
from engram_lab.recipe import Recipe
from engram_lab.studies.extension import ExtraCell, extend, propose, read_extension, settle
from engram_lab.studies.plan import Cell, plan
from engram_lab.text import prepare


def cells(tiny: dict[str, Any], study: dict[str, Any], **changes: Any) -> tuple[Cell, ...]:
    recipe = Recipe.from_dict({**tiny, "kind": "study", "budget": {}, "study": study, **changes})
    return plan(recipe, prepare(recipe.text))


def test_every_combination_is_one_cell_and_seeds_come_one_after_the_other(tiny: dict[str, Any]) -> None:
    planned = cells(tiny, {"rho": [0, 0.5, 1], "seeds": [0, 1]})
    assert [(c.rho, c.run.recipe.seed) for c in planned] == [
        (0.0, 0), (0.5, 0), (1.0, 0), (0.0, 1), (0.5, 1), (1.0, 1),
    ]  # fmt: skip
    assert len({c.run.identity for c in planned}) == 6
    assert {c.sweep for c in planned} == {"allocation"}


def test_the_network_without_memory_serves_both_sweeps_once(tiny: dict[str, Any]) -> None:
    planned = cells(tiny, {"rho": [0.5, 1], "rows_per_head": [50, 100]})
    assert [c.sweep for c in planned] == ["allocation", "allocation+memory", "memory", "memory"]
    assert [c.run.allocation.slots > 0 for c in planned] == [True, False, True, True]
    assert {c.run.allocation.experts for c in planned if c.sweep == "memory"} == {12}
    assert planned[3].tags["rho"] == 1.0


def test_totals_agree_across_rho(tiny: dict[str, Any]) -> None:
    planned = cells(tiny, {"rho": [0, 0.2, 0.5, 0.8, 0.9, 1]})
    assert all(abs(c.run.allocation.total_mismatch) < 1e-3 for c in planned)


def test_two_shares_that_come_out_as_the_same_run_are_refused(tiny: dict[str, Any]) -> None:
    with pytest.raises(
        UserError, match=r"'rho 0\.5 seed 0' and 'rho 0\.51 seed 0' come out as the same run \(7 exp"
    ):
        cells(tiny, {"rho": [0.5, 0.51]})


def test_budgets_and_controls_change_fields_of_the_recipe(tiny: dict[str, Any]) -> None:
    planned = cells(
        tiny,
        {
            "rho": [0.5],
            "budgets": {"small": {}, "wide": {"model.d_model": 32}},
            "controls": {"frozen": {"model.engram.frozen_table": True}},
            "control_rho": [0.5],
        },
    )
    assert [(c.budget, c.control) for c in planned] == [
        ("small", ""), ("small", "frozen"), ("wide", ""), ("wide", "frozen"),
    ]  # fmt: skip
    assert planned[2].run.network.d_model == 32
    assert planned[1].run.network.engram is not None
    assert planned[1].run.network.engram.frozen_table
    assert planned[1].tags["control"] == "frozen"


def test_extra_cells_come_last_and_once(tiny: dict[str, Any], tmp_path: Path) -> None:
    added = extend(
        tmp_path, [ExtraCell(rho=0.9, seed=4), ExtraCell(rho=0.5, seed=0), ExtraCell(rho=0.9, seed=4)]
    )
    assert len(added) == 2
    assert extend(tmp_path, added) == ()
    assert read_extension(tmp_path) == added
    recipe = Recipe.from_dict({**tiny, "kind": "study", "budget": {}, "study": {"rho": [0.5, 1]}})
    planned = plan(recipe, prepare(recipe.text), added)
    assert [c.label for c in planned] == ["rho 0.5 seed 0", "rho 1 seed 0", "rho 0.9 seed 4"]
    assert planned[-1].run.allocation.rho == pytest.approx(0.9)


def test_shares_that_round_to_a_cell_of_the_recipe_are_that_cell(tiny: dict[str, Any]) -> None:
    recipe = a_study(tiny, rho=[0, 0.5, 1], seeds=[0, 1])
    asked = [ExtraCell(rho=0.97, seed=0), ExtraCell(rho=0.97, seed=2), ExtraCell(rho=0.9, seed=0)]
    new, there = settle(recipe, asked)
    assert new == (ExtraCell(rho=1.0, seed=2), ExtraCell(rho=0.9, seed=0))
    assert there == (ExtraCell(rho=1.0, seed=0),)
    # One that was added before, by the name it got then, and one that is asked for twice.
    new, there = settle(recipe, [replace(asked[2], rho=0.88), asked[1], asked[1]], [asked[2]])
    assert new == (ExtraCell(rho=1.0, seed=2),)
    assert there == (asked[2], ExtraCell(rho=1.0, seed=2))


def test_cells_are_added_to_the_only_budget_of_a_study(tiny: dict[str, Any]) -> None:
    recipe = a_study(tiny, rho=[0.5, 1], budgets={"wide": {"model.ffn.experts": 22}})
    (*_, added) = plan(recipe, prepare(recipe.text), settle(recipe, [ExtraCell(rho=0.95, seed=0)])[0])
    assert (added.label, added.run.allocation.experts) == ("wide rho 0.95 seed 0", 21)
    several = a_study(tiny, rho=[0.5, 1], budgets={"a": {}, "b": {"model.d_model": 32}})
    with pytest.raises(UserError, match="2 budgets"):
        settle(several, [ExtraCell(rho=0.95, seed=0)])


def test_proposed_cells_are_whole_experts_and_leave_seeds_paired(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = a_study(tiny, rho=[0, 0.1, 0.3, 0.5, 0.7, 0.9, 1], seeds=[0, 1])
    monkeypatch.setattr("scaling.mlflow_reader.read_study", lambda uri, name: recorded(recipe))
    cells = propose(recipe, 2)
    new, there = settle(recipe, cells)
    assert (new, there) == (cells, ())
    assert [cell.seed for cell in cells] == [0, 1, 0, 1]
    assert {cell.rho for cell in cells} <= {0.2, 0.4, 0.6, 0.8}
    assert len(plan(recipe, prepare(recipe.text), cells)) == 18


def test_shares_whose_memory_cannot_be_built_are_not_proposed(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # One expert's parameters do not do for the smallest primes of 14 hash heads.
    wide = {**tiny["model"], "engram": {**tiny["model"]["engram"], "heads": 7}}
    recipe = a_study({**tiny, "model": wide}, rho=[0, 0.1, 0.2, 0.3, 0.5, 0.7, 1], seeds=[0, 1])
    monkeypatch.setattr("scaling.mlflow_reader.read_study", lambda uri, name: recorded(recipe))
    assert {cell.rho for cell in propose(recipe, 3)} == {0.4, 0.6, 0.8}
    with pytest.raises(UserError, match="lower rho"):
        settle(recipe, [ExtraCell(rho=0.9, seed=0)])


@pytest.mark.parametrize(
    ("study", "sentence"),
    [
        ({}, "neither `rho` nor `rows_per_head`"),
        ({"rho": [0.5, 1.5]}, r"study\.rho holds 1\.5"),
        ({"rho": [0.5, 0.5]}, r"study\.rho holds 0\.5 twice"),
        ({"rho": [0.5], "seeds": []}, r"study\.seeds is empty"),
        ({"rho": [0.5], "rows_per_head": [0]}, r"rows_per_head holds 0"),
        ({"rho": [0.5], "workers": 0}, r"study\.workers is 0"),
        ({"rho": [0.5], "controls": {"a": {}}}, r"control_rho"),
        ({"rhos": [0.5]}, r"'study\.rhos'.*'rho'"),
        ({"rho": [0.5], "budgets": {"a": {"model.d_modell": 3}}}, r"'model\.d_modell'.*'d_model'"),
    ],
)
def test_a_study_that_makes_no_sense_gets_one_sentence(
    tiny: dict[str, Any], study: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        cells(tiny, study)

"""Reading tables: names, types, ranges, and the words when something is wrong."""

import numpy as np
import polars as pl
import pytest

from scaling import ScalingError, fit_allocation, read
from scaling.frame import budget_groups, finished
from scaling.schema import ALIASES, BY_NAME, COLUMNS, squash

CONTRACT = {
    *("study", "run", "sweep", "control", "status", "reason", "budget", "rho", "rho_nominal", "slots"),
    *("memory_parameters", "total_parameters", "active_parameters", "sparse_parameters", "experts", "top_k"),
    *("tokens", "seed", "loss", "loss_sd"),
}


def test_every_documented_column_is_there_with_its_unit_and_words():
    assert set(BY_NAME) >= CONTRACT
    assert all(column.doc.endswith(".") for column in COLUMNS)
    assert BY_NAME["budget"].unit == "FLOPs"
    assert BY_NAME["loss"].unit == "nats/token"


def test_no_spelling_means_two_columns():
    seen = {}
    for column in COLUMNS:
        for alias in (column.name, *column.aliases):
            assert seen.setdefault(squash(alias), column.name) == column.name
    assert set(ALIASES.values()) == set(BY_NAME)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_files_are_read(tmp_path, suffix):
    frame = pl.DataFrame({"rho": [0.0, 0.5, 1.0], "loss": [1.8, 1.7, 1.75], "seed": [0, 1, None]})
    path = tmp_path / f"runs{suffix}"
    if suffix == ".parquet":
        frame.write_parquet(path)
    else:
        frame.write_csv(path, separator="\t" if suffix == ".tsv" else ",")
    assert read(path).select("rho", "loss", "seed").equals(frame)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("Training FLOP", "budget"),
        ("Model Size", "total_parameters"),
        ("N", "total_parameters"),
        ("D", "tokens"),
        ("C", "budget"),
        ("val-loss", "loss"),
        ("P_tot", "total_parameters"),
    ],
)
def test_common_spellings_are_recognised(given, meant):
    assert meant in read({given: [1.0, 2.0]}).columns


def test_an_explicit_mapping_wins_over_a_recognised_spelling():
    frame = read({"loss": [9.0, 9.0], "bits": [1.0, 2.0], "rho": [0.1, 0.2]}, {"loss": "bits"})
    assert frame["loss"].to_list() == [1.0, 2.0]
    assert frame["loss_unmapped"].to_list() == [9.0, 9.0]


@pytest.mark.parametrize(
    ("table", "columns", "words"),
    [
        ({"rho": [0.1, 1.2], "loss": [1, 1]}, None, ("Row 2", "'rho'", "1.2", "at most 1")),
        ({"rho": [10, 80], "loss": [1, 1]}, None, ("Row 1", "per cents")),
        ({"rho": [0.1, -0.2], "loss": [1, 1]}, None, ("Row 2", "'rho'", "at least 0")),
        ({"rho": ["a", "b"], "loss": [1, 1]}, None, ("Row 1", "'rho'", "'a'", "not a number")),
        ({"rho": [0.1], "budget": [0.0], "loss": [1]}, None, ("Row 1", "'budget'", "greater than 0")),
        ({"rho": [0.1], "seed": [1.5], "loss": [1]}, None, ("Row 1", "'seed'", "whole")),
        ({"rho": [0.1], "seed": [1e30], "loss": [1]}, None, ("Row 1", "'seed'", "below 2^63")),
        ({"rho": [0.1], "loss": [1]}, {"loss": "los"}, ("'los'", "Did you mean 'loss'")),
        ({"rho": [0.1], "loss": [1]}, {"rhoo": "rho"}, ("'rhoo'", "Did you mean 'rho'")),
        ({"rho": [0.1], "loss": [[1, 2]]}, None, ("'loss'", "numbers are needed")),
        ({"rho": [], "loss": []}, None, ("no rows",)),
        ({"rho": [0.1], "loss": [1e300]}, None, ("Row 1", "'loss'", "at most")),
        ({"slots": [1e300], "loss": [1]}, None, ("Row 1", "'slots'", "at most")),
    ],
)
def test_a_mistake_is_one_sentence_that_names_row_and_column(table, columns, words):
    with pytest.raises(ScalingError) as caught:
        read(table, columns)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_files_that_cannot_be_read_say_so(tmp_path):
    (tmp_path / "runs.parquet").write_bytes(b"not parquet")
    for path in (tmp_path / "runs.parquet", tmp_path / "absent.csv", tmp_path / "runs.parquet.xlsx"):
        with pytest.raises(ScalingError, match=r"cannot be read|does not exist"):
            read(path)
    (tmp_path / "runs.xlsx").write_bytes(b"x")
    with pytest.raises(ScalingError, match=r"\.csv, .*\.parquet"):
        read(tmp_path / "runs.xlsx")
    with pytest.raises(ScalingError, match="int"):
        read(3)


def test_rows_left_out_are_listed_with_their_reason():
    frame = read(
        {
            "rho": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7],
            "loss": [1.0, 1.0, float("inf"), 1.0, None, 1.0, 1.0],
            "status": ["finished", "failed", "finished", "running", None, "finished", "interrupted"],
            "control": ["", "", None, "", "", "frozen", ""],
        }
    )
    kept, excluded = finished(frame, ("rho",))
    assert kept["_row"].to_list() == [1]
    assert {(item.reason, item.rows) for item in excluded} == {
        ("failed", (2,)),
        ("running", (4,)),
        ("interrupted", (7,)),
        ("control run", (6,)),
        ("loss missing or not finite", (3, 5)),
    }


def test_a_missing_coordinate_of_a_finished_run_is_an_error():
    with pytest.raises(ScalingError, match="Row 2, column 'rho'"):
        finished(read({"rho": [0.1, float("nan")], "loss": [1.0, 1.0]}), ("rho",))


def test_runs_of_the_other_sweep_are_left_out():
    frame = read(
        {"rho": [0.1, 0.2, 0.3], "loss": [1, 1, 1], "sweep": ["allocation", "memory", "allocation+memory"]}
    )
    assert finished(frame, ("rho",), "allocation")[0]["_row"].to_list() == [1, 3]
    assert finished(frame, ("rho",), "memory")[0]["_row"].to_list() == [2, 3]


def test_a_misspelt_status_names_the_nearest():
    with pytest.raises(ScalingError, match="'finished'"):
        finished(read({"rho": [0.1], "loss": [1.0], "status": ["finishd"]}), ("rho",))


def test_budgets_within_a_few_per_cent_are_one_group():
    budget = np.array([1.02e18, 4e18, 0.98e18, 4.1e18, 1e18])
    assert budget_groups(budget).tolist() == [0, 1, 0, 1, 0]


def test_no_chain_of_small_steps_joins_budgets_that_are_apart():
    steps = 1e18 * 1.1 ** np.arange(8)
    groups = budget_groups(steps)
    for group in np.unique(groups):
        members = steps[groups == group]
        assert members.max() / members.min() <= 1.15 * (1 + 1e-9)
    planned = np.repeat([1e18, 1.3e18, 1.69e18], 4) * np.tile([0.97, 0.99, 1.01, 1.03], 3)
    assert budget_groups(planned).tolist() == np.repeat([0, 1, 2], 4).tolist()
    assert budget_groups(1e18 * np.array([1.0, 1.12, 1.16, 1.2])).tolist() == [0, 1, 1, 1]


def test_budgets_that_were_merged_are_told():
    rho = np.linspace(0.1, 1, 10)
    table = {"rho": rho, "loss": 1.7 + (rho - 0.6) ** 2, "budget": 1e18 * np.linspace(1, 1.1, 10)}
    assert "10 values from 1e+18 to 1.1e+18" in fit_allocation(table).held["budgets_merged"]
    assert fit_allocation(table | {"budget": np.full(10, 1e18)}).held["budgets_merged"] == ""

"""The contract between the writer and the reader of a study, on a store made with MLflow's own client."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from scaling.cli import main
from scaling.cli_tables import is_store
from scaling.errors import ScalingError
from scaling.frame import read
from scaling.mlflow_reader import LOSS_METRIC, SECONDS_METRIC, TAGS, _remote_trials, read_study, studies
from scaling.schema import NAMES

CELL = {
    "sweep": "allocation",
    "budget": 1.2e15,
    "rho": 0.75,
    "rho_nominal": 0.74,
    "slots": 2048,
    "memory_parameters": 524288,
    "total_parameters": 3_000_000,
    "active_parameters": 1_000_000,
    "sparse_parameters": 2_000_000,
    "experts": 48,
    "top_k": 4,
    "tokens": 1_000_000,
}


class Store:
    """A study as tracking writes it."""

    def __init__(self, folder: Path) -> None:
        from mlflow.tracking import MlflowClient

        self.uri = f"sqlite:///{folder / 'mlflow.db'}"
        self.client = MlflowClient(self.uri)
        self.experiment = self.client.create_experiment("first", artifact_location=str(folder / "artifacts"))
        self.parent = self.client.create_run(
            self.experiment, tags={"kind": "study", "study": "first"}
        ).info.run_id
        first = self.trial("a", seed=0, losses=[(100, 3.25)])
        for step, gate in ((50, 0.9), (100, 0.1 + 0.2)):
            self.client.log_metric(first, "memory/layer1/gate_mean", gate, step=step)
        self.client.log_metric(first, "memory/layer1/row_norm", math.nan, step=100)
        for order, (step, loss) in enumerate([(100, 3.25), (50, 9.0), (50, 3.75)]):
            self.client.log_metric(first, "val/loss", loss, step=step, timestamp=1_000 + order)
        for order, seconds in enumerate([20.5, 51.25]):  # each opening says the time of all until then
            self.client.log_metric(first, SECONDS_METRIC, seconds, timestamp=1_000 + order)
        second = self.trial("b", seed=1, losses=[(100, 3.5), (100, 3.25), (50, 9.0)], rho=1.0, slots=0)
        self.client.log_metric(second, SECONDS_METRIC, math.nan)
        self.client.log_metric(second, "memory/layer1/row_norm", 2.5, step=100)
        self.trial("c", seed=2, losses=[(100, math.inf)], end="FAILED", reason="infinite loss at step 7")
        self.trial("d", seed=3, losses=[], end="RUNNING")
        self.trial("e", seed=4, losses=[(1, 3.0), (2, math.nan)])
        self.trial("f", seed=5, losses=[], end="KILLED")
        self.trial("g", seed=6, losses=[], end="FAILED")
        self.trial("h", seed=7, losses=[(1, 3.75)], control="frozen", without=("rho_nominal", "top_k"))
        self.trial("i", seed=8, losses=[], end="FAILED")
        self.trial("i", seed=8, losses=[(1, 3.125)])
        self.trial("i", seed=8, losses=[], end="FAILED")
        gone = self.trial("j", seed=9, losses=[(1, 2.0)])
        self.client.delete_run(gone)
        self.trial("k", study='it\'s "second"', seed=0, losses=[(1, 4.0)])
        self.trial(
            "l",
            study="third",
            seed=0,
            losses=[(1, 4.0)],
            code_version="git:1a2b",
            flops_mismatch=0.0125,
            openings=2,
        )
        self.broken = self.trial("m", study="broken", seed=0, losses=[(1, 3.0)], budget="plenty")

    def trial(
        self,
        run: str,
        *,
        seed: int,
        losses: list[tuple[int, float]],
        study: str = "first",
        end: str = "FINISHED",
        reason: str | None = None,
        control: str = "",
        without: tuple[str, ...] = (),
        **changed: object,
    ) -> str:
        cell: dict[str, Any] = {
            **CELL,
            **changed,
            "study": study,
            "run": run,
            "control": control,
            "seed": seed,
        }
        tags = {name: v if isinstance(v, str) else repr(v) for name, v in cell.items() if name not in without}
        tags |= {"kind": "trial", "mlflow.parentRunId": self.parent, "note": "not a column"}
        if reason is not None:
            tags["reason"] = reason
        made = self.client.create_run(self.experiment, tags=tags, run_name=f"cell {run}").info.run_id
        self.client.log_metric(made, "train/loss", 5.0, step=3)
        for order, (step, loss) in enumerate(losses):
            self.client.log_metric(made, LOSS_METRIC, loss, step=step, timestamp=1_000 + order)
        if end != "RUNNING":
            self.client.set_terminated(made, end)
        return made


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def runs(store: Store) -> dict[str, dict[str, Any]]:
    return {row["run"]: row for row in read_study(store.uri, "first").iter_rows(named=True)}


def test_a_run_comes_back_with_every_column_as_it_was_written(runs: dict[str, dict[str, Any]]) -> None:
    row = runs["a"]
    assert {name: row[name] for name in CELL} == CELL
    assert (row["study"], row["seed"], row["control"], row["loss"], row["loss_sd"]) == (
        "first",
        0,
        "",
        3.25,
        None,
    )
    assert (row["status"], row["reason"], row["attempts"]) == ("finished", None, 1)


def test_parents_and_deleted_runs_and_other_studies_are_left_out(runs: dict[str, dict[str, Any]]) -> None:
    assert sorted(runs) == list("abcdefghi")


def test_a_resumed_run_counts_with_the_value_of_its_last_step(runs: dict[str, dict[str, Any]]) -> None:
    assert runs["b"]["loss"] == 3.25
    assert runs["b"]["rho"] == 1.0
    assert runs["b"]["slots"] == 0


@pytest.mark.parametrize(
    ("run", "status", "reason"),
    [
        ("c", "failed", "infinite loss at step 7"),
        ("d", "running", None),
        ("e", "failed", "finished without a finite final/loss"),
        ("f", "interrupted", "stopped before it finished"),
        ("g", "failed", "failed; no reason was recorded"),
    ],
)
def test_the_state_of_a_run_is_said_in_the_words_of_the_frame(
    runs: dict[str, dict[str, Any]], run: str, status: str, reason: str | None
) -> None:
    assert (runs[run]["status"], runs[run]["reason"], runs[run]["loss"]) == (status, reason, None)


def test_an_absent_tag_is_a_null_and_a_control_keeps_its_name(runs: dict[str, dict[str, Any]]) -> None:
    assert runs["h"]["rho_nominal"] is None
    assert runs["h"]["top_k"] is None
    assert runs["h"]["control"] == "frozen"


def test_a_cell_tried_again_counts_once_with_its_finished_attempt(
    runs: dict[str, dict[str, Any]],
) -> None:
    assert (runs["i"]["status"], runs["i"]["loss"], runs["i"]["attempts"]) == ("finished", 3.125, 3)


def test_the_frame_passes_the_checks_that_any_table_passes(store: Store) -> None:
    frame = read_study(store.uri, "first")
    assert frame.equals(read(frame))
    assert set(TAGS) <= set(NAMES)


def test_what_a_run_took_is_read_where_it_was_written(runs: dict[str, dict[str, Any]]) -> None:
    assert runs["a"]["seconds"] == 51.25
    assert runs["b"]["seconds"] is None  # a NaN says nothing
    assert runs["h"]["seconds"] is None
    assert runs["h"]["loss"] == 3.75


def test_the_last_health_numbers_of_a_memory_are_columns_of_their_own(
    runs: dict[str, dict[str, Any]],
) -> None:
    assert runs["a"]["memory/layer1/gate_mean"] == 0.1 + 0.2  # the last of two evaluations, to the last bit
    assert runs["a"]["memory/layer1/row_norm"] is None  # a NaN says nothing
    assert runs["b"]["memory/layer1/row_norm"] == 2.5
    assert runs["b"]["memory/layer1/gate_mean"] is None
    assert "train/loss" not in runs["a"]


def test_evaluations_come_back_in_order_and_a_repeated_one_once(runs: dict[str, dict[str, Any]]) -> None:
    assert runs["a"]["evaluations"] == "[[50, 3.75], [100, 3.25]]"
    assert runs["b"]["evaluations"] is None


def test_what_made_a_run_rides_along(store: Store) -> None:
    frame = read_study(store.uri, "third")
    assert frame["code_version"].to_list() == ["git:1a2b"]
    assert frame["data_hash"].to_list() == [None]
    assert frame["flops_mismatch"].to_list() == [0.0125]
    assert frame["openings"].to_list() == [2.0]


def test_a_null_column_still_has_its_type(store: Store) -> None:
    frame = read_study(store.uri, "third")
    assert frame.schema["reason"] == pl.String
    assert frame.schema["loss_sd"] == pl.Float64
    assert frame.schema["seed"] == pl.Int64


def test_the_client_and_the_query_read_the_same_frame(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path taken for servers, pointed at the same store."""
    from scaling import mlflow_reader

    monkeypatch.setattr(mlflow_reader, "_is_sqlite", lambda uri: False)
    through_client = read_study(store.uri, "first")
    names = studies(store.uri)
    monkeypatch.undo()
    assert through_client.equals(read_study(store.uri, "first"))
    assert names == studies(store.uri) == ["broken", "first", 'it\'s "second"', "third"]
    assert len(_remote_trials(store.uri, "third")) == 1


def test_any_study_name_can_be_read(store: Store) -> None:
    assert read_study(store.uri, 'it\'s "second"')["run"].to_list() == ["k"]


def test_a_store_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(ScalingError, match="no SQLite store"):
        read_study(f"sqlite:///{tmp_path / 'none.db'}", "first")
    assert not list(tmp_path.iterdir())


def test_another_file_is_named_as_no_store(tmp_path: Path) -> None:
    (tmp_path / "notes.db").write_text("not a database at all, but long enough to have a header" * 9)
    with pytest.raises(ScalingError, match="cannot be read as an MLflow store"):
        read_study(f"sqlite:///{tmp_path / 'notes.db'}", "first")


def test_a_study_that_is_not_there_gets_the_nearest_name(store: Store) -> None:
    with pytest.raises(ScalingError, match="Did you mean 'first'"):
        read_study(store.uri, "frist")
    with pytest.raises(ScalingError, match=r"it has 'broken', 'first', .*'third'"):
        read_study(store.uri, "quite another")


def test_a_tag_that_is_no_number_is_named_with_its_run(store: Store) -> None:
    with pytest.raises(ScalingError, match=f"{store.broken}: its tag 'budget' is 'plenty'"):
        read_study(store.uri, "broken")


def test_reading_sqlite_imports_no_mlflow(store: Store) -> None:
    code = f"import sys; from scaling.mlflow_reader import read_study; read_study({store.uri!r}, 'first');"
    code += "sys.exit('mlflow' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode
        == 0
    )


@pytest.mark.parametrize(
    ("address", "store"),
    [("sqlite:///a.db", True), ("http://host:5000", True), ("runs.csv", False), ("/tmp/runs.parquet", False)],
)
def test_addresses_of_stores_are_told_from_files(address: str, store: bool) -> None:
    assert is_store(address) is store


def test_the_command_reports_on_a_store_and_shows_what_failed(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", store.uri, "--study", "first", "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "infinite loss at step 7" in page
    assert "had not finished when the runs were read" in page
    assert "undetermined at this scale" in page
    assert pl.read_parquet(tmp_path / "out" / "runs.parquet").equals(read_study(store.uri, "first"))
    capsys.readouterr()
    assert main(["report", store.uri, "--out", str(tmp_path / "none")]) == 2
    assert "'broken', 'first', " in capsys.readouterr().err
    assert not (tmp_path / "none").exists()

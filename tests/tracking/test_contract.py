"""What tracking writes is what `scaling` reads: every column of the table of runs makes the round trip."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import polars as pl
import pytest

from engram_lab.tracking import open_run, reap
from engram_lab.tracking.client import client
from scaling import schema
from scaling.mlflow_reader import read_study, studies

CELL: dict[str, Any] = {
    "study": "quick",
    "run": "ab12",
    "sweep": "allocation+memory",
    "control": "",
    "budget": 1.5e13,
    "rho": 0.1 + 0.2,
    "rho_nominal": 0.3,
    "slots": 32_771,
    "memory_parameters": 524_336,
    "total_parameters": 2_000_001,
    "active_parameters": 400_000,
    "sparse_parameters": 1_600_001,
    "experts": 19,
    "top_k": 4,
    "tokens": 1_048_576,
    "seed": 3,
}


def write(uri: str, identity: str, **changed: Any) -> Any:
    parent = open_run(uri, "quick", "study:quick", "quick", {"kind": "study", "study": "quick"})
    tags = {**CELL, "run": identity, **changed}
    return open_run(uri, "quick", identity, f"cell {identity}", tags, parent.run_id)


def test_every_column_comes_back(uri: str) -> None:
    write(uri, "ab12").finish(3.25)
    frame = read_study(uri, "quick")
    assert frame.height == 1
    row = frame.row(0, named=True)
    assert {name: row[name] for name in CELL} == CELL
    assert (row["status"], row["reason"], row["loss"]) == ("finished", None, 3.25)
    written = {*CELL, "status", "reason", "loss"}
    assert written <= set(schema.NAMES)
    assert studies(uri) == ["quick"]


def test_states_come_back(uri: str) -> None:
    write(uri, "a").finish(3.0)
    write(uri, "b").fail("diverged: the loss is nan at step 12")
    write(uri, "c").interrupt("interrupted (SIGINT)")
    write(uri, "d")
    write(uri, "e", rho=None, slots=None).finish(math.inf)
    states = {r["run"]: (r["status"], r["loss"]) for r in read_study(uri, "quick").iter_rows(named=True)}
    assert states["a"] == ("finished", 3.0)
    assert states["b"] == ("failed", None)
    assert states["c"] == ("interrupted", None)
    assert states["d"] == ("running", None)
    assert states["e"] == ("failed", None)
    reasons = dict(read_study(uri, "quick").select("run", "reason").iter_rows())
    assert reasons["b"] == "diverged: the loss is nan at step 12"
    assert reasons["c"] == "interrupted (SIGINT)"


def test_a_cell_that_was_resumed_counts_once(uri: str) -> None:
    first = write(uri, "a")
    assert reap(uri, "quick", alive=lambda who: False)
    again = write(uri, "a", seed=np.int64(3))
    assert again == first
    again.finish(2.5)
    again.finish(2.25)  # a finished run that is opened once more says its loss again
    frame = read_study(uri, "quick")
    assert frame.select("run", "status", "loss", "seed").rows() == [("a", "finished", 2.25, 3)]
    assert frame["seed"].dtype == pl.Int64


def test_the_address_of_a_server_reads_the_same(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader's way through MLflow's client, which servers need, agrees with its way through SQLite."""
    write(uri, "a").finish(3.0)
    write(uri, "b").fail("diverged")
    direct = read_study(uri, "quick")
    import mlflow.tracking

    monkeypatch.setattr(mlflow.tracking, "MlflowClient", lambda tracking_uri: client(uri))
    assert read_study("http://somewhere", "quick").equals(direct)

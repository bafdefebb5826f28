from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from engram_lab.errors import UserError
from engram_lab.tracking import initialise_store, open_run, store
from engram_lab.tracking.client import client, resolve
from engram_lab.tracking.store import artifact_location, experiment_id

ROOT = Path(__file__).resolve().parents[2]

OPENS = """
import sys, time
from pathlib import Path
import mlflow  # the slow import first, so that both processes reach the store together
from engram_lab.tracking import open_run
Path(sys.argv[2]).touch()
while not Path(sys.argv[3]).exists():
    time.sleep(0.001)
for number in range(3):
    record = open_run(sys.argv[1], "study", f"same-{number}", "name")
    record.log_values({"m": 1.0})
    print(record.run_id)
"""


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


LOCKS = """
import sys
from engram_lab.tracking import store
real = store.store_lock
def lock(uri):
    print("mlflow.store.tracking.sqlalchemy_store" in sys.modules)
    return real(uri)
store.store_lock = lock
store.initialise_store(sys.argv[1])
"""


def test_the_slow_import_keeps_no_other_process_waiting(tmp_path: Path) -> None:
    out, errors = start(LOCKS, f"sqlite:///{tmp_path}/mlflow.db").communicate(timeout=60)
    assert out.split() == ["True"], errors


def test_two_processes_meet_on_a_fresh_store(tmp_path: Path) -> None:
    """Both create schema, experiment and runs at once; they end with the same three runs."""
    uri = f"sqlite:///{tmp_path}/deep/down/mlflow.db"
    go = tmp_path / "go"
    processes = [start(OPENS, uri, str(tmp_path / f"ready{i}"), str(go)) for i in range(2)]
    while not all((tmp_path / f"ready{i}").exists() or processes[i].poll() is not None for i in range(2)):
        time.sleep(0.01)
    go.touch()
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    first, second = (out.split() for out, _ in outputs)
    assert first == second
    assert len(set(first)) == 3
    with closing(sqlite3.connect(tmp_path / "deep/down/mlflow.db")) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert database.execute("SELECT count(*) FROM experiments WHERE name = 'study'").fetchone() == (1,)
        assert database.execute("SELECT count(*) FROM runs").fetchone() == (3,)


def test_a_killed_creation_leaves_nothing_that_looks_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        initialise_store(f"sqlite:///{tmp_path}/mlflow.db")
    assert [file.name for file in tmp_path.iterdir() if file.name != "mlflow.db.lock"] == []
    monkeypatch.undo()
    initialise_store(f"sqlite:///{tmp_path}/mlflow.db")


def test_relative_address_is_bound_to_the_directory(
    empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(empty_store)
    absolute = initialise_store("sqlite:///mlflow.db")
    monkeypatch.chdir(tmp_path)
    assert absolute == f"sqlite:///{empty_store}/mlflow.db"
    assert resolve(absolute) == absolute


def test_nothing_is_written_beside_the_store(
    empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow likes to make mlruns/ or mlflow.db in the working directory."""
    monkeypatch.chdir(tmp_path)
    record = open_run(f"sqlite:///{empty_store}/mlflow.db", "kept", "id", "name")
    record.log_text("a: 1\n", "recipe.yaml")
    assert list(tmp_path.iterdir()) == []
    kept = empty_store / "artifacts" / "kept" / record.run_id / "artifacts" / "recipe.yaml"
    assert kept.read_text() == "a: 1\n"


def test_artifacts_stay_below_their_root(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/x/mlflow.db"
    for name in ("study", "../../etc", "a/b", "..", "ü b"):
        location = artifact_location(uri, name)
        assert location is not None
        assert location.startswith((tmp_path / "x" / "artifacts").as_uri() + "/")
        assert ".." not in location
    assert artifact_location(uri, "s", tmp_path / "else") == (tmp_path / "else" / "s").as_uri()
    assert artifact_location("http://server", "s", tmp_path) is None


@pytest.mark.parametrize(
    "address", ["mlruns/mlflow.db", "sqlite:///", "sqlite://x", "file:/tmp/x", "", "postgres"]
)
def test_what_is_not_a_store_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="it must be sqlite:///PATH"):
        initialise_store(address)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        initialise_store(f"sqlite:///{tmp_path}/file/mlflow.db")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"):
        initialise_store(f"sqlite:///{tmp_path}/mlflow.db")


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("notes, not a database; longer than the header of one " * 20)
    with pytest.raises(UserError, match=r"not a database.*move it away"):
        initialise_store(f"sqlite:///{tmp_path}/mlflow.db")


def test_a_locked_store(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_BUSY_SECONDS", 0.2)
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"), isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UserError, match="another program has locked it"):
            initialise_store(uri)
        other.execute("ROLLBACK")
    assert initialise_store(uri) == uri


def test_a_lock_that_another_process_keeps(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_LOCK_SECONDS", 0.2)
    code = "import sys, time; from engram_lab.tracking.store import store_lock\n"
    code += "with store_lock(sys.argv[1]):\n    print('held', flush=True); time.sleep(60)"
    other = start(code, uri)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="Another process has held"):
            initialise_store(uri)
    finally:
        other.kill()
        other.communicate()
    assert initialise_store(uri) == uri  # the system releases the lock of a killed process


def test_a_server_that_does_not_answer() -> None:
    started = time.perf_counter()
    with pytest.raises(UserError, match="is the server running"):
        initialise_store("http://127.0.0.1:9")
    assert time.perf_counter() - started < 20


def test_a_store_of_another_version(uri: str) -> None:
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as database:
        database.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
        database.commit()
    with pytest.raises(UserError, match="mlflow db upgrade"):
        initialise_store(uri)


def test_a_deleted_experiment_is_named(uri: str) -> None:
    initialise_store(uri)
    key = experiment_id(uri, "study")
    assert experiment_id(uri, "study") == key
    client(uri).delete_experiment(key)
    with pytest.raises(UserError, match=f"restore -x {key}"):
        experiment_id(uri, "study")


def test_importing_tracking_is_cheap() -> None:
    code = "import sys, engram_lab.tracking; print({'mlflow', 'torch', 'lightning'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_telemetry_is_off(uri: str) -> None:
    code = "import sys; from engram_lab.tracking import initialise_store; initialise_store(sys.argv[1])\n"
    code += "from mlflow.telemetry.utils import is_telemetry_disabled; print(is_telemetry_disabled())"
    clean = {
        k: v for k, v in os.environ.items() if k not in ("CI", "MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK")
    }
    done = subprocess.run(
        [sys.executable, "-c", code, uri], cwd=ROOT, capture_output=True, text=True, env=clean
    )
    assert done.stdout == "True\n", done.stderr

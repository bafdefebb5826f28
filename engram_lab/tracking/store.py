"""Creating a store once, whoever comes first, and finding experiments in it."""

from __future__ import annotations

import getpass
import hashlib
import logging
import os
import re
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from engram_lab.errors import UserError
from engram_lab.tracking.client import client, database_path, load, one_sentence, resolve

# Creating a schema takes about five seconds on a slow machine; a holder that needs longer is stuck.
_LOCK_SECONDS = 60.0
# How long a writer may wait for another before the store counts as locked.
_BUSY_SECONDS = 10.0
_ATTEMPTS = 5
# MLflow's pages open an experiment of this kind at its runs, not at the traces of a chat program.
_TRAINING = {"mlflow.experimentKind": "custom_model_development"}

_ready: set[str] = set()


def initialise_store(uri: str) -> str:
    """Make sure that the store at `uri` exists and can be written, and return its absolute address.

    A SQLite store is built beside its final place under a file lock and then moved there, so that two
    processes that start at once agree and a killed one leaves nothing half made. It is put into write-ahead
    mode: readers (the MLflow pages, a report) never wait for a run that writes. A database on a server gets
    MLflow's own schema creation under the same kind of lock, which holds back the processes of one machine.

    Raises:
        UserError: the address is not one of a store, or the store cannot be opened, written or is locked.
    """
    uri = resolve(uri)
    path = database_path(uri)
    if uri in _ready and (path is None or path.exists()):
        return uri
    load(uri)  # before the lock: workers that start together spend these seconds side by side
    try:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        with store_lock(uri):
            if path is not None:
                if not path.exists():
                    _create_sqlite(path)
                _check_sqlite(path)
            with one_sentence(uri):
                client(uri).search_experiments(max_results=1)
    except OSError as error:
        raise UserError(f"The store {uri!r} cannot be written: {error}.") from error
    _ready.add(uri)
    return uri


@contextmanager
def store_lock(uri: str) -> Iterator[None]:
    """Guard a look-up-then-create on a resolved address against this machine's other processes.

    Raises UserError when another process keeps the lock for a minute.
    """
    path = database_path(uri)
    if path is None:
        name = hashlib.sha256(uri.encode()).hexdigest()[:16]
        path = Path(tempfile.gettempdir()) / f"engram-lab-{getpass.getuser()}-{name}"
    lock = FileLock(path.with_name(path.name + ".lock"))
    try:
        lock.acquire(timeout=_LOCK_SECONDS)
    except Timeout as error:
        raise UserError(
            f"Another process has held {lock.lock_file!r} for {_LOCK_SECONDS:.0f} s; end it, or point the "
            "tracking uri elsewhere."
        ) from error
    try:
        yield
    finally:
        lock.release()


def artifact_location(uri: str, experiment: str, root: str | Path | None = None) -> str | None:
    """Return where an experiment's artifacts go: ROOT/EXPERIMENT; None lets an MLflow server decide.

    ROOT is `artifacts` beside a SQLite file and `mlruns/artifacts` for a database server, unless it is given.
    """
    if uri.startswith("http"):
        return None
    path = database_path(uri)
    root = Path(root or (path.parent / "artifacts" if path else "mlruns/artifacts")).resolve()
    folder = re.sub(r"[^\w.-]+|\.{2,}", "_", experiment).strip(".") or "_"
    return (root / folder).as_uri()


def experiment_id(uri: str, name: str, artifact_root: str | Path | None = None) -> str:
    """Return the id of the experiment `name`, created when there is none; `uri` is an initialised address.

    Raises UserError when the experiment was deleted: its name stays taken until it is restored or purged.
    """
    from mlflow.exceptions import MlflowException

    store = client(uri)
    for attempt in range(_ATTEMPTS):
        with one_sentence(uri):
            found = store.get_experiment_by_name(name)
        if found is not None and found.lifecycle_stage == "active":
            return str(found.experiment_id)
        if found is not None:
            raise UserError(
                f"The experiment {name!r} was deleted in the store {uri!r}; restore it with 'mlflow "
                f"experiments restore -x {found.experiment_id}', or use another name."
            )
        try:
            where = artifact_location(uri, name, artifact_root)
            return str(store.create_experiment(name, where, tags=_TRAINING))
        except MlflowException as error:
            # Another process may have created it between the look and the attempt: look again.
            if attempt == _ATTEMPTS - 1:
                raise UserError(f"The store {uri!r} refused the experiment {name!r}: {error}.") from error
    raise AssertionError("unreachable")


def _create_sqlite(path: Path) -> None:
    """Build an empty MLflow database in write-ahead mode at `path`, complete or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.new")
    unfinished.unlink(missing_ok=True)
    # MLflow's migrations tell of forty revisions, one line each.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    try:
        with one_sentence(f"sqlite:///{path}"):
            artifacts = (path.parent / "artifacts").as_uri()
            SqlAlchemyStore(f"sqlite:///{unfinished}", artifacts).engine.dispose()
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _check_sqlite(path: Path) -> None:
    """Set write-ahead mode and take the write lock once; UserError says what stands in the way."""
    try:
        with closing(sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
    except sqlite3.Error as error:
        advice = {
            "locked": "another program has locked it: close that, then try again",
            "not a database": "the file is something else: move it away, or name another path",
            "I/O error": "its disk may be full: make room there",  # SQLite's words for no room beside it
        }
        why = next((text for sign, text in advice.items() if sign in str(error)), "check its permissions")
        raise UserError(f"The store '{path}' cannot be written ({error}); {why}.") from error

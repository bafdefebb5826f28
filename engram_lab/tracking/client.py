"""The door to MLflow: addresses, the client, and errors said in one sentence.

MLflow takes two seconds to import, so that happens here and only when a store is used.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from engram_lab.errors import UserError

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

DEFAULT_URI = "sqlite:///mlruns/mlflow.db"

_SQLITE = "sqlite:///"
_CONNECT_SECONDS = 5.0


def resolve(uri: str) -> str:
    """Return `uri` with a relative SQLite path made absolute: a change of directory then changes nothing.

    Raises UserError for what is not the address of a store: a bare path, or MLflow's retired file store.
    """
    scheme = uri.partition(":")[0] if ":" in uri else ""
    if scheme == "sqlite" and uri.startswith(_SQLITE) and len(uri) > len(_SQLITE):
        return _SQLITE + str(Path(uri.removeprefix(_SQLITE)).expanduser().resolve())
    if scheme in ("http", "https") or scheme.split("+")[0] in ("postgresql", "mysql", "mssql"):
        return uri
    raise UserError(
        f"tracking uri is {uri!r}; it must be {_SQLITE}PATH, an http(s):// address of an MLflow server, or a "
        f"postgresql+psycopg://, mysql or mssql address; the default is {DEFAULT_URI}."
    )


def database_path(uri: str) -> Path | None:
    """Return the file of a resolved SQLite address, or None for a server."""
    return Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None


def load(uri: str) -> None:
    """Import what of MLflow serves a resolved address, telemetry off; the first call takes seconds."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ASYNC_LOGGING", "false")
    import mlflow.tracking

    if not uri.startswith("http"):
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401

        # It logs whatever a database refuses, ninety lines each time, and raises it too: once is enough.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


@lru_cache(maxsize=8)
def client(uri: str) -> MlflowClient:
    """Return this process's client of a resolved address."""
    load(uri)
    from mlflow.tracking import MlflowClient

    if uri.startswith("http"):
        _probe(uri)
    with one_sentence(uri):
        return MlflowClient(tracking_uri=uri)


def _probe(uri: str) -> None:
    """Refuse a server that does not answer now; MLflow's client would retry for minutes before it said so."""
    address = urlsplit(uri)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"tracking uri {uri!r}: nothing answers at {address.hostname}:{port} ({error}); is the "
            "server running?"
        ) from error


@contextmanager
def one_sentence(uri: str) -> Iterator[None]:
    """Turn what MLflow or the disk complains about inside the block into a UserError of one sentence."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
        text = str(error)
        if "out-of-date database schema" in text:
            raise UserError(
                f"The store {uri!r} was written by another version of MLflow; back it up, then run "
                f"'mlflow db upgrade {uri}'."
            ) from error
        lines = [line for line in text.splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(f"The store {uri!r} refused: {lines[0].rstrip('.')}.") from error

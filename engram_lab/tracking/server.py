"""Opening MLflow's pages on a store."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

from engram_lab.errors import UserError
from engram_lab.tracking.client import database_path, resolve
from engram_lab.tracking.signals import raise_on_sigterm


def serve(uri: str, port: int = 5000, host: str = "127.0.0.1") -> int:
    """Serve MLflow's pages on the store until interrupted; return the server's exit status, 0 after Ctrl-C.

    One worker and no job runner: two processes that answer after some seconds, where the defaults start
    fifteen.

    Raises:
        UserError: there is no such store yet, or the port is taken.
    """
    uri = resolve(uri)
    path = database_path(uri)
    if path is not None and not path.exists():
        raise UserError(f"There is no store at {uri!r} yet; run a recipe first, or name another one.")
    if uri.startswith("http"):
        raise UserError(f"{uri!r} is a server already: open it in a browser.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"port {port} of {host} cannot be used ({error}); choose another one.") from error
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--host", host, "--port", str(port), "--workers", "1"]
    if path is not None:
        command += ["--artifacts-destination", str(path.parent / "artifacts")]
    environment = {
        **os.environ,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    print(f"serving {uri} at http://{host}:{port} in some seconds; Ctrl-C ends it", flush=True)
    # A session of its own keeps the terminal's Ctrl-C from the server, which would answer with a traceback.
    server = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        with raise_on_sigterm():
            # A signal may land in a thread of some library and would not wake a wait without end.
            while server.poll() is None:
                time.sleep(0.2)
            return server.returncode
    except KeyboardInterrupt:
        return 0
    finally:
        server.terminate()
        server.wait()

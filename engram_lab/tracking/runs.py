"""The life of a run: opened once per identity, true to its status however its process ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engram_lab.tracking import names
from engram_lab.tracking.client import client, one_sentence
from engram_lab.tracking.owner import owner, owner_alive
from engram_lab.tracking.record import RunRecord, tag_text, write_tags
from engram_lab.tracking.signals import Terminated, raise_on_sigterm, stopped_by
from engram_lab.tracking.store import experiment_id, initialise_store, store_lock
from engram_lab.tracking.version import code_version, machine


def open_run(
    uri: str,
    experiment: str,
    identity: str,
    name: str,
    tags: Mapping[str, object] | None = None,
    parent: str | None = None,
    artifact_root: str | Path | None = None,
) -> RunRecord:
    """Open the run of `identity`: the one there is, set running again, or a new one.

    Args:
        uri: address of the store, created when it is not there.
        experiment: the study's name, or the recipe's for a single run; created when it is not there.
        identity: what makes this run this run (the hash of its recipe); unique within the experiment.
        name: what people see; never parsed back.
        tags: written on every opening. Numbers become their repr, None removes a tag. `run` defaults to
            `identity`, `kind` to "trial" below a parent and to "single" without one.
        parent: MLflow id of the study's run; MLflow's pages nest this one under it.
        artifact_root: the folder of all experiments' artifacts, read when the experiment is created. By
            default `artifacts` beside a SQLite file; an MLflow server decides for itself.

    Two processes of one machine that open the same identity get the same run. Runs that a person deleted are
    not found again. Raises UserError when the store cannot be used.
    """
    uri = initialise_store(uri)
    wanted: dict[str, object] = {
        names.RUN: identity,
        names.KIND: names.TRIAL if parent else names.SINGLE,
        **(tags or {}),
        names.IDENTITY: identity,
        names.OWNER: owner(),
        names.PARENT: parent,
        names.REASON: None,
        **code_version(),
        **machine(),
    }
    quote = '"' if "'" in identity else "'"
    with store_lock(uri), one_sentence(uri):
        experiment_key = experiment_id(uri, experiment, artifact_root)
        found = _search(uri, experiment_key, f"tags.{names.IDENTITY} = {quote}{identity}{quote}")
        if not found:
            written = {key: tag_text(value) for key, value in wanted.items() if value is not None}
            written[names.OPENINGS] = "1"
            run = client(uri).create_run(experiment_key, tags=written, run_name=name)
            return RunRecord(uri, str(run.info.run_id))
        run_id = str(found[0].info.run_id)
        openings = int(found[0].data.tags.get(names.OPENINGS, "1")) + 1
        write_tags(uri, run_id, {**wanted, names.OPENINGS: openings})
        client(uri).update_run(run_id, status="RUNNING", name=name)
        return RunRecord(uri, run_id)


@contextmanager
def running(record: RunRecord) -> Iterator[RunRecord]:
    """Mark the run when the block is left: finished, failed with the error, or killed by SIGINT or SIGTERM.

    For code that takes no care of signals itself: while the block runs in the main thread, SIGTERM raises
    `Terminated` in it, where Lightning alone would exit with status 0. Exceptions pass through. A store that
    cannot be told is logged and hides nothing: the run then says RUNNING until `reap`. Blocks nest (a study
    around its trials).
    """
    with raise_on_sigterm():
        try:
            yield record
        except BaseException as error:
            record.leave(*_how(error))
            raise
        record.finish()


def reap(uri: str, experiment: str, alive: Callable[[str], bool] = owner_alive) -> list[str]:
    """Mark as killed every run of `experiment` that says RUNNING although nothing runs it; return their ids.

    Args:
        uri: address of the store.
        experiment: name of the experiment; one that does not exist has nothing to reap.
        alive: says whether an owner (`owner()` of the process that opened the run) still works. The default
            trusts owners on other machines.

    Runs without an owner were not opened by `open_run` and are left alone.
    """
    uri = initialise_store(uri)
    reaped = []
    with store_lock(uri), one_sentence(uri):
        found = client(uri).get_experiment_by_name(experiment)
        if found is None:
            return []
        for run in _search(uri, found.experiment_id, "attributes.status = 'RUNNING'"):
            who = run.data.tags.get(names.OWNER)
            if who is None or alive(who):
                continue
            record = RunRecord(uri, str(run.info.run_id))
            record.end("KILLED", f"its process ended without a word ({who})")
            reaped.append(record.run_id)
    return reaped


def _search(uri: str, experiment_key: str, condition: str) -> list[Any]:
    """Return the experiment's active runs that meet `condition`, oldest first."""
    found: list[Any] = []
    token = None
    while True:
        page = client(uri).search_runs(
            [experiment_key], condition, order_by=["attributes.start_time ASC"], page_token=token
        )
        found += page
        token = page.token
        if not token:
            return found


def _how(error: BaseException) -> tuple[str, str | None]:
    """Return status and reason of a run that ended with `error`."""
    if isinstance(error, Terminated):
        return "KILLED", "terminated (SIGTERM)"
    # Lightning turns Ctrl-C into SystemExit(1) while it handles the KeyboardInterrupt.
    if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
        return "KILLED", f"interrupted ({stopped_by(error).name})"
    if isinstance(error, SystemExit) and error.code in (None, 0):
        return "FINISHED", None
    return "FAILED", f"{type(error).__name__}: {error}"

"""Running a study: plan its cells, queue them, keep workers at them, and write the report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from filelock import FileLock, Timeout

from engram_lab import tracking
from engram_lab.errors import UserError
from engram_lab.files import write_atomically
from engram_lab.recipe import Recipe
from engram_lab.studies.extension import read_extension, study_directory
from engram_lab.studies.plan import Cell, plan
from engram_lab.studies.progress import ProgressReader, StudyProgress
from engram_lab.studies.queue import CellState, QueuedCell, StudyQueue
from engram_lab.studies.report import write_study_report
from engram_lab.text import prepare
from engram_lab.training.callbacks import StopRequest
from engram_lab.training.preflight import preflight

POLL_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """How a study ended.

    Args:
        cells: every cell and its state.
        report: the report's page, or None while no cell has finished.
    """

    cells: tuple[CellState, ...]
    report: Path | None


def run_study(
    recipe: Recipe,
    *,
    reports: Path,
    show: Callable[[StudyProgress], None],
    say: Callable[[str], None],
) -> StudyResult:
    """Run every cell of the study that has no result yet, then write its report.

    Args:
        recipe: a recipe of kind `study`.
        reports: the folder the report's folder goes into.
        show: called twice a second with the progress of the whole study.
        say: called with what happens, a line each.

    Raises:
        UserError: the study cannot be run as asked; cells that fail do not raise, they are marked.
        KeyboardInterrupt: it was interrupted; the next call continues.
    """
    assert recipe.study is not None
    directory = study_directory(recipe)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the study's folder {directory} cannot be made: {error.strerror}.") from error
    try:
        with FileLock(directory / "runner.lock", timeout=0):
            corpus = prepare(recipe.text)
            cells = plan(recipe, corpus, read_extension(directory))
            _check_growth(directory, recipe, cells)
            for run in {cell.budget: cell.run for cell in cells}.values():
                preflight(run, corpus)
            tracking.initialise_store(recipe.tracking.uri)
            uri = recipe.tracking.uri
            parent = tracking.open_run(
                uri,
                recipe.name,
                f"study:{recipe.name}",
                name=recipe.name,
                tags={"kind": "study", "study": recipe.name, "data_hash": corpus.data_hash},
                artifact_root=Path(recipe.tracking.directory) / "artifacts",
            )
            with tracking.running(parent):
                tracking.reap(uri, recipe.name)
                states = _run_cells(recipe, cells, directory, parent.run_id, show, say)
                report = None
                if any(cell.state == "finished" for cell in states):
                    report = write_study_report(recipe, reports, say=say)
                    parent.log_artifact(report.parent)
            return StudyResult(cells=tuple(states), report=report)
    except Timeout:
        raise UserError(
            f"the study {recipe.name!r} is being run by another process, which holds "
            f"{directory / 'runner.lock'}."
        ) from None


def worker_count(recipe: Recipe) -> int:
    """Workers on this machine: what the study asks for, else one a GPU or one a core."""
    assert recipe.study is not None
    if recipe.study.workers is not None:
        return recipe.study.workers
    if recipe.trainer.get("accelerator") != "cpu" and torch.cuda.is_available():
        return torch.cuda.device_count()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_growth(directory: Path, recipe: Recipe, cells: tuple[Cell, ...]) -> None:
    """A study may grow by cells; a change that would orphan its finished ones is refused."""
    file = directory / "job.json"
    if not file.exists():
        return
    before = json.loads(file.read_text())
    kept = {cell.run.identity for cell in cells}
    lost = [cell["label"] for identity, cell in before["cells"].items() if identity not in kept]
    if not lost:
        return
    changed = ", ".join(_differences(before["recipe"], recipe.to_dict())) or "the text or the code's version"
    raise UserError(
        f"the study {recipe.name!r} has run with another recipe: {changed} changed, which would leave out "
        f"{len(lost)} of its cells ({lost[0]}, ...); undo that, or give the changed study another name."
    )


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield path


def _run_cells(
    recipe: Recipe,
    cells: tuple[Cell, ...],
    directory: Path,
    parent_run: str,
    show: Callable[[StudyProgress], None],
    say: Callable[[str], None],
) -> list[CellState]:
    assert recipe.study is not None
    budgets = list(recipe.study.budgets or {"": {}})
    controls = ["", *recipe.study.controls]
    workers = worker_count(recipe)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // workers)
    job = {
        "name": recipe.name,
        "parent_run": parent_run,
        "threads": threads,
        "recipe": recipe.to_dict(),
        "cells": {
            c.run.identity: {"label": c.label, "tags": c.tags, "recipe": c.run.recipe.to_dict()}
            for c in cells
        },
    }
    write_atomically(directory / "job.json", json.dumps(job))
    write_atomically(directory / "recipe.yaml", yaml.safe_dump(recipe.to_dict(), sort_keys=False))
    queue = StudyQueue(directory, recipe.name)
    queue.enqueue(
        QueuedCell(
            identity=c.run.identity,
            label=c.label,
            place={
                "rho": c.rho,
                "rows_per_head": c.rows_per_head,
                "seed": c.run.recipe.seed,
                "budget": budgets.index(c.budget) if recipe.study.budgets else 0,
                "control": controls.index(c.control),
            },
        )
        for c in cells
    )
    tokens = {c.run.identity: c.run.tokens for c in cells}
    counts = queue.counts()
    ahead = min(workers, counts["waiting"])
    say(
        f"{recipe.name}: {len(cells)} cells, {sum(tokens.values()):,} tokens in all, "
        + (f"{counts['finished']} finished before, {ahead} worker(s)" if ahead else "nothing left to train")
    )
    reported: set[str] = {c.identity for c in queue.states() if c.state in ("finished", "failed")}
    with _workers(directory, ahead, threads) as pool, _interruptible() as stop:
        reader = ProgressReader(directory, tokens, ahead)
        while True:
            pool.tend(queue)
            states = queue.states()
            for cell in states:
                if cell.state in ("finished", "failed") and cell.identity not in reported:
                    reported.add(cell.identity)
                    say(
                        f"{cell.label}: "
                        + (f"loss {cell.loss:.4f}" if cell.loss is not None else cell.reason)
                    )
            show(reader.read(states))
            if stop.reason is not None:
                raise KeyboardInterrupt(stop.reason)
            if pool.idle:
                break
            time.sleep(POLL_SECONDS)
    return queue.states()


@contextmanager
def _interruptible() -> Iterator[StopRequest]:
    """SIGINT and SIGTERM end the study between two looks at it, after its workers have saved their place."""
    request = StopRequest()
    with request.listening():
        yield request


class WorkerPool:
    """The worker processes of a study.

    Args:
        directory: the study's folder.
        size: how many to keep while cells wait.
        threads: cores for each.
    """

    def __init__(self, directory: Path, size: int, threads: int) -> None:
        self.directory, self.size, self.threads = directory, size, threads
        self._slots: dict[int, tuple[subprocess.Popen[bytes], IO[bytes]]] = {}

    def tend(self, queue: StudyQueue) -> None:
        """Collect workers that have ended, take back what they left, and start new ones while cells wait."""
        for slot, (process, output) in list(self._slots.items()):
            if process.poll() is not None:
                output.close()
                del self._slots[slot]
        if len(self._slots) < self.size:
            queue.reap()
            waiting = queue.counts()["waiting"]
            for slot in range(self.size):
                if slot not in self._slots and waiting > 0:
                    self._start(slot)
                    waiting -= 1

    @property
    def idle(self) -> bool:
        """No worker is running."""
        return not self._slots

    def stop(self, *, patience: float = 60.0) -> None:
        """Ask every worker to save its place and end; kill what has not ended after `patience` seconds."""
        for process, _ in self._slots.values():
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + patience
        for process, output in self._slots.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            output.close()
        self._slots.clear()

    def _start(self, slot: int) -> None:
        logs = self.directory / "logs"
        logs.mkdir(exist_ok=True)
        output = open(logs / f"worker-{slot}.log", "ab")  # noqa: SIM115  (closed when the worker has ended)
        environment = dict(os.environ)
        # torch's compiler would start a process a core in every worker.
        environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(self.threads))
        if torch.cuda.device_count() > 1:
            environment["CUDA_VISIBLE_DEVICES"] = str(slot % torch.cuda.device_count())
        process = subprocess.Popen(
            [sys.executable, "-m", "engram_lab.studies.worker", str(self.directory)],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the study, which then asks its workers to stop
        )
        self._slots[slot] = (process, output)


@contextmanager
def _workers(directory: Path, size: int, threads: int) -> Iterator[WorkerPool]:
    pool = WorkerPool(directory, size, threads)
    try:
        yield pool
    finally:
        pool.stop()

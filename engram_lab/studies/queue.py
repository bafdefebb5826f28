"""The queue of a study's cells: an Optuna study in a journal file, with claims that die with their worker.

Optuna hands a waiting trial to whoever asks first, but creates a new one when none waits, and a journal has
no heartbeat. So asking happens under a file lock, and a worker proves that it lives by holding a lock of
its own: the system releases it however the worker ends.
"""

from __future__ import annotations

import os
import uuid
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from filelock import FileLock, Timeout
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from engram_lab.errors import UserError

State = Literal["waiting", "running", "finished", "failed"]
LARGEST = 2**62
SPACE: dict[str, BaseDistribution] = {
    "rho": FloatDistribution(0.0, 1.0),
    "rows_per_head": IntDistribution(0, LARGEST),
    "seed": IntDistribution(0, LARGEST),
    "budget": IntDistribution(0, LARGEST),  # position in the list of budgets
    "control": IntDistribution(0, LARGEST),  # position in the list of controls, 0 for none
}
MAX_ATTEMPTS = 3  # a cell whose worker died this often is failed: it is likely to kill the next one too


@dataclass(frozen=True, kw_only=True)
class QueuedCell:
    """A cell as the queue knows it: the identity of its run and where it lies on the study's axes."""

    identity: str
    label: str
    place: dict[str, float | int]


@dataclass(frozen=True, kw_only=True)
class CellState:
    """Where a cell stands."""

    identity: str
    label: str
    state: State
    reason: str
    loss: float | None


class StudyQueue:
    """The cells of one study and who works on them.

    Args:
        directory: the study's folder; the journal and the locks live there.
        name: the study's name in Optuna.

    Raises:
        UserError: the journal cannot be written.
    """

    def __init__(self, directory: Path, name: str) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
            storage = JournalStorage(JournalFileBackend(str(directory / "journal.log")))
            with FileLock(directory / "lock"):
                self._study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
        except OSError as error:
            raise UserError(
                f"the study's queue in {directory} cannot be written: {error.strerror}."
            ) from error

    def enqueue(self, cells: Iterable[QueuedCell]) -> int:
        """Queue the cells that are not finished, running or waiting, failed ones again unless they diverged.

        Returns:
            How many were queued.
        """
        added = 0
        with FileLock(self.directory / "lock"):
            self._reap()
            last = self._last_trials()
            for cell in cells:
                trial = last.get(cell.identity)
                if trial is None or (trial.state == TrialState.FAIL and trial.user_attrs.get("retry", True)):
                    self._enqueue(cell.place, cell.identity, cell.label, attempts=0)
                    added += 1
        return added

    def claim(self, worker: FileLock) -> tuple[int, str] | None:
        """Take the next waiting cell for the holder of `worker`.

        Returns:
            Trial number and identity, or None if no cell waits.
        """
        with FileLock(self.directory / "lock"):
            self._reap()
            if not self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                return None
            trial = self._study.ask(SPACE)
            trial.set_user_attr("worker", Path(worker.lock_file).name)
            return trial.number, trial.user_attrs["identity"]

    def finish(self, number: int, loss: float) -> None:
        """The cell of that trial has its loss."""
        self._study.tell(number, loss)

    def fail(self, number: int, reason: str, *, retry: bool) -> None:
        """The cell of that trial has none, and why; `retry` lets a later call queue it again."""
        self._annotate(number, reason=reason, retry=retry)
        self._study.tell(number, state=TrialState.FAIL)

    def give_back(self, number: int) -> None:
        """The worker stops before the cell is done: it waits again, in its old place."""
        with FileLock(self.directory / "lock"):
            self._wait_again(number)

    def states(self) -> list[CellState]:
        """Every cell once, in the order they were first queued; what a dead worker left running waits."""
        return [
            CellState(
                identity=identity,
                label=trial.user_attrs["label"],
                state=self._state(trial),
                reason=trial.user_attrs.get("reason", "") if trial.state == TrialState.FAIL else "",
                loss=trial.value if trial.state == TrialState.COMPLETE else None,
            )
            for identity, trial in self._last_trials().items()
        ]

    def counts(self) -> Counter[State]:
        """How many cells are in each state."""
        return Counter(cell.state for cell in self.states())

    def reap(self) -> None:
        """Let what dead workers left running wait again."""
        with FileLock(self.directory / "lock"):
            self._reap()

    def new_worker(self) -> FileLock:
        """A held lock that stands for the calling process."""
        lock = FileLock(self.directory / "workers" / f"{os.getpid()}-{uuid.uuid4().hex[:8]}")
        lock.acquire()
        return lock

    def _enqueue(self, place: dict[str, Any], identity: str, label: str, attempts: int) -> None:
        self._study.enqueue_trial(
            place, user_attrs={"identity": identity, "label": label, "attempts": attempts + 1}
        )

    def _reap(self) -> None:
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            attributes = trial.user_attrs
            if "worker" in attributes and self._alive(attributes["worker"]):
                continue
            attempts = attributes["attempts"]
            if attempts >= MAX_ATTEMPTS:
                self.fail(trial.number, f"its worker died {attempts} times", retry=True)
                continue
            self._annotate(trial.number, attempts=attempts + 1)
            self._wait_again(trial.number)

    def _state(self, trial: FrozenTrial) -> State:
        names: dict[TrialState, State] = {
            TrialState.WAITING: "waiting",
            TrialState.RUNNING: "running",
            TrialState.COMPLETE: "finished",
            TrialState.FAIL: "failed",
        }
        worker = trial.user_attrs.get("worker")  # none in the instant between claim and signature
        left = trial.state == TrialState.RUNNING and worker is not None and not self._alive(worker)
        return "waiting" if left else names[trial.state]

    def _alive(self, worker: str) -> bool:
        try:
            FileLock(self.directory / "workers" / worker, timeout=0).acquire().lock.release()
        except Timeout:
            return True
        return False

    def _wait_again(self, number: int) -> None:
        """Let a running trial wait under its old number: what was begun is ended before the rest is begun."""
        self._study._storage.set_trial_state_values(self._id(number), TrialState.WAITING)

    def _annotate(self, number: int, **attributes: Any) -> None:
        trial_id = self._id(number)
        for name, value in attributes.items():
            self._study._storage.set_trial_user_attr(trial_id, name, value)

    def _id(self, number: int) -> int:
        return next(t for t in self._study.get_trials(deepcopy=False) if t.number == number)._trial_id

    def _last_trials(self) -> dict[str, FrozenTrial]:
        """The trial that counts for each identity: a finished one, else the newest."""
        last: dict[str, FrozenTrial] = {}
        for trial in self._study.get_trials(deepcopy=False):
            identity = trial.user_attrs.get("identity")
            if identity is None:
                continue
            if identity not in last or last[identity].state != TrialState.COMPLETE:
                last[identity] = trial
        return last

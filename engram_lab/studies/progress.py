"""How far a study is, and an honest guess of what is left."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engram_lab.studies.queue import CellState

STALE_SECONDS = 30.0
"""A worker reports at every logged step; one silent for longer is not counted in the speed."""
MEASURED_SECONDS, MEASURED_SHARE = 10.0, 0.02
"""Of training, and of what this call has to train, before what is left is told."""


@dataclass(frozen=True, kw_only=True)
class StudyProgress:
    """How far a study is.

    Args:
        finished: cells with a result.
        failed: cells marked failed.
        cells: all of them.
        tokens_done: of all cells that have not failed, as last reported: of a killed one more than its
            checkpoint holds, until it is continued.
        tokens: of all cells that have not failed.
        tokens_per_second: of the running workers together, while they train.
        seconds_left: from the tokens trained since the first of this call and the time they took, evaluations
            included: those left shared by all workers, or the longest cell's by one if that takes longer.
            None until that is known.
    """

    finished: int
    failed: int
    cells: int
    tokens_done: float
    tokens: float
    tokens_per_second: float
    seconds_left: float | None


class ProgressReader:
    """Reads the progress of a study's cells, from before its workers are started.

    Args:
        directory: the study's folder.
        tokens: tokens of each cell.
        workers: that train at the same time.
    """

    def __init__(self, directory: Path, tokens: Mapping[str, int], workers: int) -> None:
        self.directory, self.tokens, self.workers = directory, tokens, workers
        self._opened = time.time()
        # Time, and tokens trained by then, from which the speed of all workers together is measured.
        self._begin: tuple[float, float] | None = None

    def read(self, states: Sequence[CellState]) -> StudyProgress:
        """Put the cells' states and the workers' reports together."""
        done, total, speed, trained = 0.0, 0.0, 0.0, 0.0
        longest, latest = 0.0, self._opened
        for cell in states:
            tokens = self.tokens.get(cell.identity, 0)
            report = self._report(cell.identity)
            if report is not None and report["time"] >= self._opened:  # else it is of an earlier call
                trained += tokens * (report["step"] - report["first"]) / report["steps"]
                latest = max(latest, report["time"])
                if cell.state == "running" and time.time() - report["time"] < STALE_SECONDS:
                    speed += report["speed"]
            if cell.state == "failed":
                continue
            part = 0.0 if report is None else report["step"] / report["steps"]
            mine = tokens if cell.state == "finished" else tokens * part
            total, done, longest = total + tokens, done + mine, max(longest, tokens - mine)
        return StudyProgress(
            finished=sum(c.state == "finished" for c in states),
            failed=sum(c.state == "failed" for c in states),
            cells=len(states),
            tokens_done=done,
            tokens=total,
            tokens_per_second=speed,
            seconds_left=self._left(trained, latest, total - done, longest),
        )

    def _left(self, trained: float, latest: float, rest: float, longest: float) -> float | None:
        if self._begin is None:
            if trained > 0:
                self._begin = latest, trained  # start-up happens once and says nothing about what is left
            return None
        elapsed, trained = latest - self._begin[0], trained - self._begin[1]
        if elapsed < MEASURED_SECONDS or trained < MEASURED_SHARE * (trained + rest):
            return None
        return max(rest, self.workers * longest) * elapsed / trained

    def _report(self, identity: str) -> dict[str, float] | None:
        try:
            report: dict[str, float] = json.loads(
                (self.directory / "progress" / f"{identity}.json").read_text()
            )
        except FileNotFoundError:
            return None
        return report

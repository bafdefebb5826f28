"""How far a study is and what is left, and the line that tells it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from engram_lab.commands import describe
from engram_lab.studies import progress, worker
from engram_lab.studies.progress import ProgressReader, StudyProgress
from engram_lab.studies.queue import CellState, State
from engram_lab.training.callbacks import Progress, StopRequest

HALF = StudyProgress(
    finished=1,
    failed=0,
    cells=2,
    tokens_done=150.0,
    tokens=200.0,
    tokens_per_second=1234.0,
    seconds_left=61.0,
)


def test_a_study_under_way_tells_its_speed_and_what_is_left() -> None:
    assert describe(HALF) == "1/2 cells, 75% of the tokens, 1,234 tokens/s, about 1 min 1 s left"
    early = replace(HALF, finished=0, failed=1, tokens_done=2.0, seconds_left=None)
    assert describe(early) == "0/2 cells, 1 failed, 1% of the tokens, 1,234 tokens/s"


def test_a_study_that_is_through_tells_neither() -> None:
    through = replace(HALF, finished=2, tokens_done=200.0, tokens_per_second=0.0, seconds_left=0.0)
    assert describe(through) == "2/2 cells, 100% of the tokens"
    none_left = replace(HALF, finished=0, failed=2, tokens_done=0.0, tokens=0.0, seconds_left=None)
    assert describe(none_left) == "0/2 cells, 2 failed, 100% of the tokens"


class Study:
    """Two workers and cells of 1,000 steps of a token, whose workers report every hundredth step."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, cells: int) -> None:
        self.folder, self.cells, self.now = folder, cells, 1e9
        (folder / "progress").mkdir()
        clock = SimpleNamespace(time=lambda: self.now)
        monkeypatch.setattr(progress, "time", clock)
        monkeypatch.setattr(worker, "time", clock)
        self.open()

    def open(self) -> None:
        """Begin a call of the study, with workers of its own."""
        self.states: list[State] = ["waiting"] * self.cells
        files = [self.folder / "progress" / f"id{n}.json" for n in range(self.cells)]
        self._observers = [worker._observer(file, os.getppid(), StopRequest()) for file in files]
        self.reader = ProgressReader(self.folder, {file.stem: 1000 for file in files}, workers=2)

    def report(self, cell: int, step: int, speed: float = 10.0) -> None:
        self.states[cell] = "running"
        self._observers[cell](Progress(step, 1000, speed, 3.0))

    def read(self) -> StudyProgress:
        return self.reader.read(
            [
                CellState(identity=f"id{n}", label="", state=state, reason="", loss=None)
                for n, state in enumerate(self.states)
            ]
        )

    def train(self, cells: tuple[int, ...], first: int, last: int) -> list[float | None]:
        """Train cells side by side, ten steps a second; return what is told as left after each report."""
        told = []
        for step in range(first + 100, last + 1, 100):
            self.now += 9.5
            for cell in cells:
                self.report(cell, step)
            self.now += 0.5
            told.append(self.read().seconds_left)
        return told


def test_what_is_left_is_told_from_steps_after_start_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(tmp_path, monkeypatch, 4)
    assert study.read().seconds_left is None
    study.report(0, 0, 0.0)
    study.report(1, 0, 0.0)
    study.now += 60.0  # they compile
    assert study.read().seconds_left is None
    assert study.train((0, 1), 0, 400) == [None, *map(pytest.approx, (180.0, 170.0, 160.0))]


def test_what_an_earlier_call_trained_counts_neither_as_speed_nor_as_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped 80 steps after its last report, which who continues reports at once, and then compiles."""
    study = Study(tmp_path, monkeypatch, 4)
    study.report(0, 500)
    study.report(1, 500)
    study.now += 5.0
    study.open()
    assert study.read().tokens_done == 1000
    study.states = ["running", "running", "waiting", "waiting"]  # not heard of yet
    assert study.read().tokens_per_second == 0
    for cell in (0, 1):
        study.report(cell, 580, 0.0)
        assert study.read().seconds_left is None
    study.now += 60.0
    assert study.read().tokens_done == 1160
    told = study.train((0, 1), 580, 880)
    assert told == [None, *map(pytest.approx, (122.0, 112.0))]


def test_steps_that_a_killed_call_lost_are_left_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(tmp_path, monkeypatch, 2)
    study.report(0, 900)
    study.report(1, 900)
    study.open()
    study.now += 5.0
    study.report(0, 500, 0.0)  # from its checkpoint
    study.report(1, 500, 0.0)
    assert study.train((0, 1), 500, 800) == [None, *map(pytest.approx, (30.0, 20.0))]


def test_a_cell_that_fails_leaves_the_speed_of_the_others_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(tmp_path, monkeypatch, 4)
    study.train((0, 1), 0, 800)
    study.states[0] = "failed"
    assert study.read().seconds_left == pytest.approx(110.0)  # 200 and 2,000 steps at 20 a second


def test_cells_that_had_their_result_say_nothing_about_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(tmp_path, monkeypatch, 6)
    study.train((0, 1), 0, 300)
    study.states[2:4] = ["finished", "finished"]  # trained elsewhere, taken over at once
    assert study.read().seconds_left == pytest.approx(170.0)


def test_the_last_cell_has_one_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study(tmp_path, monkeypatch, 2)
    study.report(0, 0, 0.0)
    study.report(1, 600, 0.0)
    study.now += 10.0
    study.report(0, 100)
    study.report(1, 700)
    study.read()
    study.now += 20.0
    study.report(0, 300)
    study.report(1, 900)
    assert study.read().seconds_left == pytest.approx(70.0)

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engram_lab.errors import UserError
from engram_lab.tracking.writer import MetricWriter, Point

ROOT = Path(__file__).resolve().parents[2]


class Store:
    """Takes points, or fails while `failing`, or is slow."""

    def __init__(self) -> None:
        self.batches: list[list[Point]] = []
        self.failing: BaseException | None = None
        self.delay = 0.0
        self.attempts = 0

    def __call__(self, points: list[Point]) -> None:
        self.attempts += 1
        time.sleep(self.delay)
        if self.failing is not None:
            raise self.failing
        self.batches.append(points)

    @property
    def points(self) -> list[Point]:
        return [point for batch in self.batches for point in batch]


def points(n: int, first: int = 0) -> list[Point]:
    return [Point("loss", float(i), 0, i) for i in range(first, first + n)]


def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def test_order_is_kept_and_nothing_is_written_twice() -> None:
    store = Store()
    writer = MetricWriter(store, "here", flush_points=7, flush_seconds=0.01)
    for i in range(3000):
        writer.add(points(1, i))
    writer.close()
    assert store.points == points(3000)
    assert max(len(batch) for batch in store.batches) <= 1000
    assert writer.waiting == 0


def test_few_points_leave_after_their_time_and_many_at_once() -> None:
    store = Store()
    writer = MetricWriter(store, "here", flush_points=100, flush_seconds=0.3)
    writer.add(points(1))
    assert store.batches == []
    until(lambda: len(store.points) == 1)
    slow = MetricWriter(store, "here", flush_points=100, flush_seconds=60)
    slow.add(points(99))
    time.sleep(0.1)
    assert len(store.points) == 1
    slow.add(points(1, 99))
    until(lambda: len(store.points) == 101)
    writer.close()
    slow.close()


def test_adding_never_waits_for_a_slow_store() -> None:
    store = Store()
    store.delay = 0.5
    writer = MetricWriter(store, "here", flush_points=1, flush_seconds=60)
    started = time.perf_counter()
    for i in range(20):
        writer.add(points(1, i))
    assert time.perf_counter() - started < 0.4
    writer.close()
    assert store.points == points(20)


def test_a_store_that_recovers_loses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    store = Store()
    store.failing = RuntimeError("database is locked")
    writer = MetricWriter(store, "run 1", flush_points=1, flush_seconds=0.01, patience=1.0)
    writer.add(points(3))
    until(lambda: store.attempts >= 3)
    assert [r.message for r in caplog.records if r.levelno == logging.WARNING] == [
        "metrics wait: run 1 does not take them (database is locked)"
    ]
    store.failing = None
    writer.add(points(2, 3))
    writer.close()
    assert store.points == points(5)


def test_a_store_that_stays_away_is_reported_while_training_and_at_the_end() -> None:
    store = Store()
    store.failing = RuntimeError("run was deleted\nmore")
    writer = MetricWriter(store, "run 1 of sqlite:///x", flush_points=1, flush_seconds=0.01, patience=0.1)
    writer.add(points(2))

    sentence = r"^2 metric values could not be written to run 1 of sqlite:///x: run was deleted\.$"
    until(lambda: writer._final)
    with pytest.raises(UserError, match=sentence):
        writer.add([])
    with pytest.raises(UserError, match=sentence):
        writer.close()


def test_a_store_that_comes_back_late_is_forgiven() -> None:
    store = Store()
    store.failing = RuntimeError("database is locked")
    writer = MetricWriter(store, "run 1", flush_points=1, flush_seconds=0.01, patience=0.1)
    writer.add(points(2))
    until(lambda: writer._final)
    store.failing = None
    until(lambda: writer.waiting == 0)
    writer.add(points(1, 2))
    writer.close()
    assert store.points == points(3)


FULL = RuntimeError("(sqlite3.OperationalError) database or disk is full\nmore")
LOSS = "3 metric values could not be written to run 1: (sqlite3.OperationalError) database or disk is full."


def losses(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.message for r in caplog.records if "could not be written" in r.message]


def test_a_full_disk_is_not_waited_for_at_the_end() -> None:
    store = Store()
    store.failing = FULL
    writer = MetricWriter(store, "run 1", flush_points=100, flush_seconds=60)
    writer.add(points(3))
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        writer.close()
    assert str(caught.value) == LOSS
    assert time.monotonic() - started < 10


def test_left_in_failure_it_tries_once_and_says_what_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    store = Store()
    store.failing = FULL
    writer = MetricWriter(store, "run 1", flush_points=100, flush_seconds=60)
    writer.add(points(3))
    writer.leave()
    assert store.attempts == 1
    assert losses(caplog) == [LOSS]
    assert not [thread for thread in threading.enumerate() if thread.name == "metric-writer"]

    store.failing = None
    writer.leave()
    assert store.points == points(3)
    assert losses(caplog) == [LOSS]


def test_a_loss_is_not_told_twice_but_the_next_one_is(caplog: pytest.LogCaptureFixture) -> None:
    store = Store()
    store.failing = FULL
    writer = MetricWriter(store, "run 1", flush_points=100, flush_seconds=60)
    writer.add(points(3))
    with pytest.raises(UserError):
        writer.close()
    writer.leave()
    assert losses(caplog) == []

    store.failing = None
    assert writer.flush()
    store.failing = FULL
    writer.add(points(3))
    writer.leave()
    assert losses(caplog) == [LOSS]


def test_a_crash_of_the_thread_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    class Crash(BaseException):
        pass

    store = Store()
    store.failing = Crash("the thread is gone")
    writer = MetricWriter(store, "run 1", flush_points=1)
    writer.add(points(1))
    until(lambda: "crashed" in caplog.text)
    with pytest.raises(UserError, match="the thread is gone"):
        writer.add(points(1, 1))
    store.failing = None
    writer.close()
    assert store.points == points(1)


def test_closed_and_used_again() -> None:
    store = Store()
    writer = MetricWriter(store, "here")
    writer.close()
    writer.add(points(2))
    writer.close()
    writer.add(points(2, 2))
    writer.close()
    writer.close()
    assert store.points == points(4)
    assert not [thread for thread in threading.enumerate() if thread.name == "metric-writer"]


def test_a_process_that_leaves_without_a_word_still_writes(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from engram_lab.tracking.writer import MetricWriter, Point
writer = MetricWriter(lambda points: Path(sys.argv[1]).write_text(repr(len(points))), "a file")
writer.add([Point("loss", 1.0, 0, 0)] * 3)
sys.exit(5)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], cwd=ROOT, capture_output=True)
    assert done.returncode == 5, done.stderr
    assert (tmp_path / "out").read_text() == "3"

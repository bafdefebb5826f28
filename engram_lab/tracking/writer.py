"""Metric points on their way to the store: buffered, written by a thread, never lost in silence."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from engram_lab.errors import UserError

# MLflow takes at most this many metrics in one call.
LARGEST_BATCH = 1000
# What SQLite and other databases say of a full disk.
FULL = ("disk is full", "No space left on device")

log = logging.getLogger(__name__)


class Point(NamedTuple):
    """One value of one metric. `timestamp` is in milliseconds since 1970."""

    key: str
    value: float
    timestamp: int
    step: int


class MetricWriter:
    """Collects points and hands them to `send` in batches, from a thread of its own.

    One call to a SQLite store costs milliseconds and one to a server tens of them, whatever it carries: a
    training step must not pay that. A batch leaves when `flush_points` points wait, when the oldest has
    waited `flush_seconds`, and on `close`.

    When `send` fails, the points stay and go with the next batch; the first failure is logged. Once failures
    have lasted `patience` seconds (a locked file is waited for, a deleted run is not worth training for),
    or the thread itself has crashed, the next `add` or `close` raises UserError.

    Args:
        send: writes up to 1,000 points to the store; called by one thread at a time.
        destination: names the store and the run in messages.
        flush_points: how many points start a batch.
        flush_seconds: how long a point waits at most.
        patience: how long failures may last, in seconds.
    """

    def __init__(
        self,
        send: Callable[[list[Point]], None],
        destination: str,
        *,
        flush_points: int = 500,
        flush_seconds: float = 5.0,
        patience: float = 120.0,
    ) -> None:
        self._send = send
        self._destination = destination
        self._flush_points = flush_points
        self._flush_seconds = flush_seconds
        self._patience = patience
        self._points: list[Point] = []
        self._guard = threading.Lock()
        self._sending = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._failing_since: float | None = None
        self._failure: BaseException | None = None
        self._final = self._raised = False

    @property
    def waiting(self) -> int:
        """How many points have not reached the store."""
        return len(self._points)

    def add(self, points: Iterable[Point]) -> None:
        """Take points and return at once; UserError when earlier ones could not be written for too long."""
        if self._final:
            self._give_up()
        with self._guard:
            self._points.extend(points)
            full = len(self._points) >= self._flush_points
        if self._thread is None:
            self._start()
        if full:
            self._wake.set()

    def flush(self) -> bool:
        """Write everything that waits, in the calling thread; says whether it arrived."""
        with self._sending:
            while self._points:
                batch = self._points[:LARGEST_BATCH]
                try:
                    self._send(batch)
                except Exception as error:
                    self._note(error)
                    return False
                with self._guard:
                    del self._points[: len(batch)]
                self._failing_since = self._failure = None
                self._final = self._raised = False
        return True

    def close(self) -> None:
        """Stop the thread and write what is left, trying for as long as `patience` allows.

        Raises UserError when points are left over, on a full disk at once: nobody makes room before they are
        told. The writer may be used again afterwards.
        """
        self._stop()
        while not self.flush():
            if self._final or any(words in str(self._failure) for words in FULL):
                self._give_up()
            time.sleep(min(1.0, self._patience / 10))

    def leave(self) -> None:
        """Stop the thread and try once to write what is left; how much is lost is logged, if not yet raised.

        For work that has failed: the error that ended it must not wait for the store, nor give way to its.
        """
        self._stop()
        if not self.flush() and not self._raised:
            log.warning("%s", self._loss())

    def _stop(self) -> None:
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            atexit.unregister(self.close)
        self._closing = False

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="metric-writer", daemon=True)
        # A process may leave without a word to its loggers (sys.exit in a script): the points still go.
        atexit.register(self.close)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._closing:
                self._wake.wait(self._flush_seconds)
                self._wake.clear()
                if self._points and not self._closing and not self.flush():
                    # The wake-up of a full buffer would try again at once, for ever.
                    time.sleep(min(1.0, self._patience / 10))
        except BaseException as crash:
            self._failure, self._final = crash, True
            log.exception("the thread that writes metrics to %s crashed", self._destination)

    def _note(self, error: Exception) -> None:
        now = time.monotonic()
        self._failure = error
        if self._failing_since is None:
            self._failing_since = now
            log.warning("metrics wait: %s does not take them (%s)", self._destination, _first_line(error))
        self._final = now - self._failing_since >= self._patience

    def _give_up(self) -> None:
        self._raised = True
        raise UserError(self._loss()) from self._failure

    def _loss(self) -> str:
        assert self._failure is not None
        return (
            f"{self.waiting} metric values could not be written to {self._destination}: "
            f"{_first_line(self._failure)}."
        )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__

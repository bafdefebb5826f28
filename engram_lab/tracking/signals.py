"""SIGTERM as an exception, so that clean-up runs, and which signal an interruption stands for."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(SystemExit):
    """SIGTERM reached the process; unwinds it with exit status 143, as a shell reports it."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


def stopped_by(error: BaseException) -> signal.Signals:
    """Return the signal that an interruption stands for: SIGTERM where its reason says so, else SIGINT.

    A run that is asked to stop by either saves its place and ends with a KeyboardInterrupt whose message
    names the signal, which another of its processes may have received.
    """
    return signal.SIGTERM if signal.SIGTERM.name in str(error) else signal.SIGINT


@contextmanager
def raise_on_sigterm() -> Iterator[None]:
    """Raise `Terminated` in the main thread when SIGTERM arrives while the block runs there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(signum: int, frame: FrameType | None) -> None:
        # A second signal must not interrupt the clean-up that the first one started.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

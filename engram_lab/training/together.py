"""How the processes of a run end when one of them fails: all of them, and with the words of the first.

The first to fail notes why in the run's folder, before its connections close. What that does to the others is
a consequence, which nobody needs to read: the leader, which keeps the run's record, raises what was noted,
and the others end without a word. They end with status 0, since Lightning kills the leader, in the midst of
its record, when another process ends with any other. A process that waits for one that is gone, and would for
ever, is ended after a while.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from engram_lab.errors import UserError
from engram_lab.files import write_atomically
from engram_lab.training.callbacks import Interrupted
from engram_lab.training.module import Diverged

FILE = "failure.json"
GRACE_SECONDS = 30.0
"""For a process to end by itself once another has failed: as long as a busy machine may take."""
POLL_SECONDS = 0.5
KINDS: dict[str, type[Exception]] = {"user": UserError, "diverged": Diverged, "interrupted": Interrupted}


@dataclass(frozen=True)
class Failure:
    """Why a run ended before its time.

    Args:
        rank: of the first process that failed.
        kind: one of `KINDS`, or "error" for what nobody expected.
        says: the sentence.
    """

    rank: int
    kind: str
    says: str

    @classmethod
    def of(cls, error: BaseException, rank: int) -> Failure:
        """Return what is told of `error`."""
        if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
            return cls(rank, "interrupted", str(error) or "interrupted")
        for kind, known in KINDS.items():
            if isinstance(error, known):
                return cls(rank, kind, str(error))
        says = f"process {rank} of the run failed with {type(error).__name__}"
        return cls(rank, "error", ": ".join([says, *str(error).splitlines()[:1]]))

    def error(self) -> Exception:
        """Return it as the leader raises it."""
        return KINDS.get(self.kind, UserError)(self.says)


@contextlib.contextmanager
def leading(directory: Path, record: Callable[[str], None]) -> Iterator[None]:
    """Lead a run: raise what the first of its processes to fail has noted.

    Args:
        directory: the run's folder.
        record: keeps the reason where this process waits for one that has failed, and must be ended.
    """
    file = directory / FILE
    file.unlink(missing_ok=True)

    def end() -> None:
        said = _read(file).says
        record(said)
        print(f"error: {said}", file=sys.stderr, flush=True)
        os._exit(1)

    with _watching(file.exists, end):
        try:
            yield
        except BaseException as error:
            if not dist.is_initialized():  # one process, or none of the others has been started yet
                raise
            first = _note(file, Failure.of(error, 0))
            if first.rank == 0:
                raise
            raise first.error() from error


@contextlib.contextmanager
def following(directory: Path, rank: int) -> Iterator[None]:
    """Take part in a run: end without a word when it fails, but with a traceback of what nobody expected."""
    file, parent = directory / FILE, os.getppid()
    with _watching(lambda: file.exists() or os.getppid() != parent, lambda: os._exit(0)):
        try:
            yield
        except BaseException as error:
            first = _note(file, Failure.of(error, rank))
            if first.rank == rank and first.kind == "error":
                traceback.print_exception(error)
            raise SystemExit(0) from None


@contextlib.contextmanager
def _watching(failed: Callable[[], bool], end: Callable[[], None]) -> Iterator[None]:
    """Call `end`, from another thread, when this has not ended by itself long after the run has `failed`."""
    left = threading.Event()

    def watch() -> None:
        while not left.wait(POLL_SECONDS):
            # Twice: what lies there may be of an earlier launch, and the leader about to delete it.
            if failed() and not left.wait(GRACE_SECONDS) and failed():
                end()

    thread = threading.Thread(target=watch, name="together", daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()


def _note(file: Path, failure: Failure) -> Failure:
    """Write it down unless another process came first, and return what is written there.

    Where nothing can be written, perhaps for the very reason of the failure, that is `failure` itself.
    """
    mine = file.with_name(f"{FILE}.{failure.rank}")
    try:
        write_atomically(mine, json.dumps(asdict(failure)), durable=False)
        with contextlib.suppress(FileExistsError):
            os.link(mine, file)  # whole, or not there
        mine.unlink()
        return _read(file)
    except OSError:
        return failure


def _read(file: Path) -> Failure:
    return Failure(**json.loads(file.read_text()))

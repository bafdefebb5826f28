"""A disk that fills up or a Ctrl-C in the midst of a write ends a run in one sentence; it goes on exactly."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from engram_lab.errors import UserError
from engram_lab.memory import disk, row_checkpoint
from engram_lab.memory.disk import DiskStore
from engram_lab.memory.host import HostStore
from engram_lab.recipe import Recipe
from engram_lab.training import checkpoint_file
from engram_lab.training.callbacks import Progress
from engram_lab.training.fit import RunResult
from engram_lab.training.run import train

HOST: dict[str, Any] = {"tier": "host"}
DISK: dict[str, Any] = {"tier": "disk", "cache_rows": 100}
ENOSPC = 28


def run(tiny: dict[str, Any], folder: Path, memory: dict[str, Any]) -> Recipe:
    tracking = {"uri": f"sqlite:///{folder}/mlflow.db", "directory": str(folder)}
    return Recipe.from_dict({**tiny, "memory": memory, "tracking": tracking})


@pytest.fixture(scope="module")
def reference() -> list[RunResult]:
    """The run that nothing happened to, once it has been trained."""
    return []


def undisturbed(tiny: dict[str, Any], tmp_path: Path, reference: list[RunResult]) -> RunResult:
    if not reference:
        content = run(tiny, tmp_path / "reference", {"unique_rows": True})
        reference.append(train(content, progress_bar=False))
    return reference[0]


def checkpoints(folder: Path) -> list[str]:
    return [file.name for file in folder.glob("runs/*/checkpoints/*.ckpt")]


def fills_up(call: Callable[..., Any], when: Callable[..., bool]) -> Callable[..., Any]:
    """`call`, but that the disk is full when its arguments say so."""

    def full(*given: Any, **options: Any) -> Any:
        if when(*given):
            raise OSError(ENOSPC, os.strerror(ENOSPC))
        return call(*given, **options)

    return full


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("write-back", "Rows cannot be written to "),
        ("rows", "The table rows of step 9 cannot be saved in "),
        ("checkpoint", "The checkpoint of step 9 cannot be saved in "),
    ],
)
def test_a_full_disk_ends_the_run_in_one_sentence_and_the_checkpoint_before_is_whole(
    tiny: dict[str, Any], tmp_path: Path, reference: list[RunResult], what: str, says: str
) -> None:
    expected = undisturbed(tiny, tmp_path, reference)
    wanted = run(tiny, tmp_path / "run", DISK)
    written, trained = disk.write_runs, 0

    def observe(progress: Progress) -> None:
        nonlocal trained
        trained = progress.step

    with pytest.MonkeyPatch.context() as patch:
        if what == "write-back":
            patch.setattr(disk, "write_runs", lambda *a: ENOSPC if trained >= 7 else written(*a))
        elif what == "rows":
            full = fills_up(row_checkpoint.write, lambda path, *_: path.name == "step=9.rank=0.rows")
            patch.setattr(row_checkpoint, "write", full)
        else:
            full = fills_up(checkpoint_file.written_aside, lambda path: path.name == "step=9.ckpt")
            patch.setattr(checkpoint_file, "written_aside", full)
        with pytest.raises(UserError) as caught:
            train(wanted, observer=observe, progress_bar=False)
    message = str(caught.value)
    assert message.startswith(says)
    assert "No space left on device" in message
    assert "intact." in message
    assert "\n" not in message
    assert checkpoints(tmp_path / "run") == ["step=6.ckpt"]
    result = train(wanted, progress_bar=False)
    assert (result.loss, result.reused) == (expected.loss, False)


@pytest.mark.parametrize("times", [1, 2], ids=["once", "twice"])
@pytest.mark.parametrize(("memory", "store"), [(HOST, HostStore), (DISK, DiskStore)], ids=["host", "disk"])
def test_interrupted_in_the_midst_of_a_write_back_it_ends_the_same(
    tiny: dict[str, Any],
    tmp_path: Path,
    reference: list[RunResult],
    memory: dict[str, Any],
    store: type[HostStore] | type[DiskStore],
    times: int,
) -> None:
    """The first Ctrl-C lets the step end and saves; the second ends the run where it stands."""
    expected = undisturbed(tiny, tmp_path, reference)
    wanted = run(tiny, tmp_path / "run", memory)
    write, writes = store.write, 0

    def interrupted(self: Any, ids: Tensor, records: Tensor) -> None:
        nonlocal writes
        if not threading.current_thread().name.startswith("write"):
            return write(self, ids, records)
        writes += 1
        half = len(ids) // 2
        write(self, ids[:half], records)
        if writes == 8:
            # What the next Ctrl-C would do says that the one before has been heard.
            # After the second the run is ending, and what its signals do may have changed back already.
            for answer, seconds in ((signal.default_int_handler, 60), (signal.SIG_IGN, 2))[:times]:
                os.kill(os.getpid(), signal.SIGINT)
                deadline = time.monotonic() + seconds
                while signal.getsignal(signal.SIGINT) is not answer and time.monotonic() < deadline:
                    time.sleep(0.01)
        write(self, ids[half:], records[half:])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(wanted, progress_bar=False)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    (checkpoint,) = checkpoints(tmp_path / "run")
    step = int(checkpoint.removeprefix("step=").removesuffix(".ckpt"))
    assert step == 6 if times == 2 else step >= 8
    result = train(wanted, progress_bar=False)
    assert (result.loss, result.reused) == (expected.loss, False)

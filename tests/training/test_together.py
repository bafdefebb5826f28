"""A process that waits for one that has failed is ended; the first to fail is the one that is told of."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from engram_lab.errors import UserError
from engram_lab.training import together
from engram_lab.training.callbacks import Interrupted
from engram_lab.training.module import Diverged
from engram_lab.training.together import FILE, Failure

STUCK = """
import sys, time
from pathlib import Path
from engram_lab.training import together

together.GRACE_SECONDS, together.POLL_SECONDS = 0.2, 0.05
folder, role = Path(sys.argv[1]), sys.argv[2]
ways = {"leader": lambda: together.leading(folder, (folder / "reason").write_text),
        "follower": lambda: together.following(folder, 1)}
with ways[role]():
    together._note(folder / together.FILE, together.Failure(2, "user", "The disk is full."))
    time.sleep(100)
"""


def test_the_first_failure_is_kept(tmp_path: Path) -> None:
    found: list[Failure] = []
    together_now = threading.Barrier(8)

    def fail(rank: int) -> None:
        together_now.wait()
        found.append(together._note(tmp_path / FILE, Failure(rank, "user", f"reason {rank}")))

    threads = [threading.Thread(target=fail, args=(rank,)) for rank in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert [file.name for file in tmp_path.iterdir()] == [FILE]


def test_what_is_told_of_a_failure_is_its_sentence() -> None:
    for error in (UserError("The disk is full."), Diverged("the loss was nan"), Interrupted("by SIGINT")):
        told = Failure.of(error, 3)
        assert told.rank == 3
        assert (type(told.error()), str(told.error())) == (type(error), str(error))
    lightnings = SystemExit(1)
    lightnings.__context__ = KeyboardInterrupt()
    assert isinstance(Failure.of(lightnings, 1).error(), Interrupted)
    assert str(Failure.of(ValueError("odd\nindeed"), 1).error()) == (
        "process 1 of the run failed with ValueError: odd"
    )


def test_a_leader_forgets_failures_of_the_past_and_raises_its_own_alone(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps({"rank": 1, "kind": "user", "says": "long ago"}))
    with pytest.raises(ValueError, match="its own"), together.leading(tmp_path, lambda reason: None):
        raise ValueError("its own")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("role", "status"), [("leader", 1), ("follower", 0)])
def test_a_process_that_would_wait_for_ever_is_ended(tmp_path: Path, role: str, status: int) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", STUCK, str(tmp_path), role], capture_output=True, text=True, timeout=90
    )
    assert ended.returncode == status, ended.stderr
    assert ended.stderr == ("error: The disk is full.\n" if role == "leader" else "")
    assert (tmp_path / "reason").exists() == (role == "leader")


def test_a_failure_that_nobody_can_write_down_is_told_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(together.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(together, "write_atomically", full)
    with (
        pytest.raises(UserError, match=r"^The checkpoint cannot be saved\.$"),
        together.leading(tmp_path, lambda reason: None),
    ):
        raise UserError("The checkpoint cannot be saved.")


def test_what_an_earlier_launch_left_ends_nobody_once_the_leader_has_deleted_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(together, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(together, "GRACE_SECONDS", 0.01)
    there = iter([True, False, False, True, True])  # left over, deleted, and at last a failure of this launch
    looks, ended_at, ended = 0, [], threading.Event()

    def failed() -> bool:
        nonlocal looks
        looks += 1
        return next(there, True)

    def end() -> None:
        ended_at.append(looks)
        ended.set()

    with together._watching(failed, end):
        assert ended.wait(30)
    assert ended_at[0] == 5


def test_lightnings_broadcast_is_called_what_checkpoints_silence() -> None:
    """Under another name it would make every process wait for its device after every step again."""
    assert callable(_TrainingEpochLoop._broadcast_sigterm_tensor)

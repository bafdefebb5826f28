"""The queue of cells: every cell once, whoever dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from engram_lab.errors import UserError
from engram_lab.studies.queue import MAX_ATTEMPTS, QueuedCell, StudyQueue


def cell(number: int) -> QueuedCell:
    place = {"rho": number / 10, "rows_per_head": 0, "seed": 0, "budget": 0, "control": 0}
    return QueuedCell(identity=f"id{number}", label=f"cell {number}", place=place)


@pytest.fixture
def queue(tmp_path: Path) -> StudyQueue:
    queue = StudyQueue(tmp_path, "study")
    queue.enqueue(cell(n) for n in range(3))
    return queue


def test_cells_come_out_in_order_and_once(queue: StudyQueue) -> None:
    me = queue.new_worker()
    claims = [queue.claim(me) for _ in range(4)]
    assert [c and c[1] for c in claims] == ["id0", "id1", "id2", None]


def test_queueing_again_adds_nothing(queue: StudyQueue) -> None:
    assert queue.enqueue(cell(n) for n in range(4)) == 1
    me = queue.new_worker()
    number, _ = queue.claim(me)  # type: ignore[misc]
    queue.finish(number, 1.5)
    assert queue.enqueue(cell(n) for n in range(4)) == 0
    assert queue.states()[0].loss == 1.5


def test_a_diverged_cell_is_not_tried_again_and_a_failed_one_is(queue: StudyQueue) -> None:
    me = queue.new_worker()
    first, second = queue.claim(me), queue.claim(me)
    assert first
    assert second
    queue.fail(first[0], "diverged: nan", retry=False)
    queue.fail(second[0], "disk full", retry=True)
    assert [c.reason for c in queue.states()[:2]] == ["diverged: nan", "disk full"]
    assert queue.enqueue(cell(n) for n in range(3)) == 1
    assert [c.state for c in queue.states()] == ["failed", "waiting", "waiting"]


def test_a_cell_given_back_waits_again_before_those_that_were_not_begun(queue: StudyQueue) -> None:
    me = queue.new_worker()
    for _ in range(MAX_ATTEMPTS + 1):  # an interruption is no fault of the cell's
        first, second = queue.claim(me), queue.claim(me)
        assert first
        assert second
        queue.give_back(first[0])
        queue.give_back(second[0])
        assert queue.counts() == {"waiting": 3}
    assert queue.enqueue(cell(n) for n in range(3)) == 0
    again = StudyQueue(queue.directory, "study")
    claims = [again.claim(me) for _ in range(4)]
    assert [c and c[1] for c in claims] == ["id0", "id1", "id2", None]
    again.finish(claims[0][0], 1.5)  # type: ignore[index]
    assert [c.state for c in queue.states()] == ["finished", "running", "running"]


CLAIM_AND_WAIT = """
    import sys, time
    from pathlib import Path
    from engram_lab.studies.queue import StudyQueue
    queue = StudyQueue(Path(sys.argv[1]), "study")
    me = queue.new_worker()
    print(queue.claim(me), flush=True)
    time.sleep(60)
"""


def claim_elsewhere(directory: Path) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CLAIM_AND_WAIT), str(directory)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, process.stdout.readline()


def test_what_a_killed_worker_left_is_queued_again_and_what_a_living_one_holds_is_not(
    queue: StudyQueue, tmp_path: Path
) -> None:
    process, line = claim_elsewhere(tmp_path)
    try:
        assert "id0" in line
        queue.reap()
        assert queue.counts() == {"running": 1, "waiting": 2}
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    queue.reap()
    assert queue.counts() == {"waiting": 3}
    me = queue.new_worker()
    assert [queue.claim(me)[1] for _ in range(3)] == ["id0", "id1", "id2"]  # type: ignore[index]


def test_a_cell_that_kills_every_worker_is_failed(tmp_path: Path) -> None:
    queue = StudyQueue(tmp_path, "study")
    queue.enqueue([cell(0)])
    for _ in range(MAX_ATTEMPTS):
        worker = queue.new_worker()
        assert queue.claim(worker) is not None
        worker.release()  # the worker ends without a word
        queue.reap()
    (state,) = queue.states()
    assert (state.state, state.reason) == ("failed", f"its worker died {MAX_ATTEMPTS} times")
    assert queue.enqueue([cell(0)]) == 1, "a later call may try once more"


def test_many_processes_never_take_the_same_cell(tmp_path: Path) -> None:
    queue = StudyQueue(tmp_path, "study")
    queue.enqueue(cell(n) for n in range(12))
    script = """
        import sys
        from pathlib import Path
        from engram_lab.studies.queue import StudyQueue
        queue = StudyQueue(Path(sys.argv[1]), "study")
        me = queue.new_worker()
        while (claim := queue.claim(me)) is not None:
            print(claim[1], flush=True)
            queue.finish(claim[0], 1.0)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    taken = [line for p in processes for line in p.communicate(timeout=120)[0].split()]
    assert sorted(taken) == sorted(f"id{n}" for n in range(12))
    assert StudyQueue(tmp_path, "study").counts() == {"finished": 12}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"):
        StudyQueue(tmp_path / "study", "study")


def test_a_file_in_the_way_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "studies").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        StudyQueue(tmp_path / "studies" / "study", "study")

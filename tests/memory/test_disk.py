"""The disk tier: what was written is read, on disks that fail and after kills at any moment too."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from torch import Tensor

from engram_lab.errors import UserError
from engram_lab.memory import written_log
from engram_lab.memory.disk import DiskStore
from engram_lab.memory.disk_copy import BLOCK
from engram_lab.memory.layout import RecordLayout
from engram_lab.memory.stores import fill

LAYOUT = RecordLayout(row_dim=16, rule="adagrad", alignment=4)  # 68 bytes: records lie across blocks
ROWS = 3000


def number_of(first: int, count: int, out: Tensor) -> None:
    """Records whose bytes say which row they are."""
    rows = torch.arange(first, first + count)
    out.copy_((rows[:, None] * 7 + torch.arange(out.shape[1])).to(torch.uint8))


def filled(path: Path, **options: object) -> DiskStore:
    """A store that is as in checkpoint "start"."""
    store = DiskStore(path, LAYOUT, ROWS, "hash 1", **options)  # type: ignore[arg-type]
    fill(store, number_of)
    store.start_log("start")
    return store


def everything(store: DiskStore) -> Tensor:
    out = torch.empty(ROWS, LAYOUT.record_bytes, dtype=torch.uint8)
    store.read(torch.arange(ROWS), out)
    return out


def expected() -> Tensor:
    out = torch.empty(ROWS, LAYOUT.record_bytes, dtype=torch.uint8)
    number_of(0, ROWS, out)
    return out


def write_ones(store: DiskStore, *ids: int) -> None:
    store.write(torch.tensor(ids), torch.ones(len(ids), LAYOUT.record_bytes, dtype=torch.uint8))


@pytest.mark.parametrize("cache_rows", [0, 500])
@pytest.mark.parametrize("writable", [True, False])
def test_records_outlive_the_store(tmp_path: Path, writable: bool, cache_rows: int) -> None:
    store = filled(tmp_path / "t.rows")
    write_ones(store, 2999, 5, 6, 7, 1000)
    store.close()
    store.close()
    rows = expected()
    rows[[2999, 5, 6, 7, 1000]] = 1
    again = DiskStore(tmp_path / "t.rows", LAYOUT, ROWS, "hash 1", writable=writable, cache_rows=cache_rows)
    assert torch.equal(everything(again), rows)
    ids = torch.randint(0, ROWS, (700,), generator=torch.Generator().manual_seed(1))
    out = torch.empty(700, LAYOUT.record_bytes, dtype=torch.uint8)
    again.read(ids, out)
    assert torch.equal(out, rows[ids])
    assert again.reads == ROWS + 700
    assert (again.hits > 0) == (cache_rows > 0)
    assert again.bytes_read == (again.reads - again.hits) * LAYOUT.record_bytes
    again.close()


class OneTable(RuleBasedStateMachine):
    """A disk store, opened and closed at will, beside a tensor and a list of what was written."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "t.rows"
        self.rows = expected()
        self.since: dict[str, set[int]] = {"start": set()}
        filled(self.path).close()
        self.store = self.opened(0)

    def opened(self, cache_rows: int) -> DiskStore:
        return DiskStore(self.path, LAYOUT, ROWS, "hash 1", cache_rows=cache_rows, threads=3)

    @rule(seed=st.integers(0, 2**20), n=st.integers(0, 400), first=st.integers(0, ROWS - 1))
    def write(self, seed: int, n: int, first: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        ids = first + torch.randperm(min(2 * n + 1, ROWS - first), generator=generator)[:n]
        records = torch.randint(0, 256, (n, LAYOUT.record_bytes), dtype=torch.uint8, generator=generator)
        self.store.write(ids, records)
        self.rows[ids] = records[: len(ids)]
        for written in self.since.values():
            written.update(ids.tolist())

    @rule(seed=st.integers(0, 2**20), n=st.integers(0, 400))
    def read(self, seed: int, n: int) -> None:
        ids = torch.randint(0, ROWS, (n,), generator=torch.Generator().manual_seed(seed))
        out = torch.empty(n, LAYOUT.record_bytes, dtype=torch.uint8)
        self.store.read(ids, out)
        assert torch.equal(out, self.rows[ids])

    @rule(checkpoint=st.sampled_from("abc"))
    def mark(self, checkpoint: str) -> None:
        self.store.mark(checkpoint)
        self.since.pop(checkpoint, None)
        self.since[checkpoint] = set()

    @rule(checkpoint=st.sampled_from("abc"))
    def start_log(self, checkpoint: str) -> None:
        newest = list(self.since)[-1]
        self.store.start_log(checkpoint)
        self.since = {checkpoint: self.since[newest] if newest == checkpoint else set()}

    @rule(cache_rows=st.sampled_from([0, 8, 300]), writable=st.booleans())
    def reopen(self, cache_rows: int, writable: bool) -> None:
        self.store.close()
        if not writable:
            reader = DiskStore(self.path, LAYOUT, ROWS, "hash 1", cache_rows=cache_rows, writable=False)
            assert torch.equal(everything(reader), self.rows)
            reader.close()
        self.store = self.opened(cache_rows)

    @invariant()
    def the_log_is_right(self) -> None:
        for checkpoint, written in self.since.items():
            found = self.store.written_since([checkpoint])
            assert found is not None
            assert found.tolist() == sorted(written)

    def teardown(self) -> None:
        assert torch.equal(everything(self.store), self.rows)
        self.store.close()
        self.folder.cleanup()


TestOneTable = OneTable.TestCase
TestOneTable.settings = settings(max_examples=15, stateful_step_count=20)


def test_frequent_rows_stay_in_memory_when_all_others_are_read_once(tmp_path: Path) -> None:
    store = filled(tmp_path / "t.rows", cache_rows=400)
    frequent = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))[:200]
    out = torch.empty(ROWS, LAYOUT.record_bytes, dtype=torch.uint8)
    for _ in range(4):
        store.read(frequent, out)
    store.read(torch.arange(ROWS), out)
    store.hits = 0
    store.read(frequent, out)
    # The least recently read would all be gone. Some frequent rows have no room in their set of eight, or
    # share their counter with another row.
    assert store.hits >= 0.85 * len(frequent)
    assert torch.equal(out[:200], expected()[frequent])
    store.close()


def test_a_slow_read_leaves_a_slot_that_another_row_has_got_meanwhile(tmp_path: Path) -> None:
    """A gather under way, an update of the same row, and a checkpoint that reads: three threads, one slot."""
    store = filled(tmp_path / "t.rows", cache_rows=8)  # one set: any row may take any slot
    out = torch.empty(ROWS, LAYOUT.record_bytes, dtype=torch.uint8)
    store.read(torch.arange(1, 8), out)
    store.read(torch.arange(1, 8), out)  # the slot of row 0 will be the one read least
    read_file, slow = store._read_file, (0, 100)
    reached, go_on = ({row: threading.Event() for row in slow} for _ in range(2))

    def held_up(ids: np.ndarray, out: Tensor, places: np.ndarray) -> None:
        read_file(ids, out, places)
        if len(ids) == 1 and ids[0] in slow:
            reached[ids[0]].set()
            assert go_on[ids[0]].wait(30)

    store._read_file = held_up  # type: ignore[method-assign]
    buffers = {row: torch.empty(1, LAYOUT.record_bytes, dtype=torch.uint8) for row in slow}
    threads = {
        row: threading.Thread(target=store.read, args=(torch.tensor([row]), buffers[row])) for row in slow
    }
    threads[0].start()
    assert reached[0].wait(30)  # row 0 has a slot, and old bytes are on their way to it
    write_ones(store, 0)
    threads[100].start()
    assert reached[100].wait(30)  # row 100 has taken that slot
    for row in slow:
        go_on[row].set()
        threads[row].join()
    store._read_file = read_file  # type: ignore[method-assign]
    after = expected()
    after[0] = 1
    assert torch.equal(buffers[100], after[100:101])
    for row in (100, 0):
        store.read(torch.tensor([row]), buffers[row])
        assert torch.equal(buffers[row], after[row : row + 1]), row
    store.close()


def test_a_writer_has_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "t.rows"
    store = filled(path)
    for writable in (True, False):
        with pytest.raises(UserError, match="is in use by another process"):
            DiskStore(path, LAYOUT, ROWS, "hash 1", writable=writable)
    store.close()
    readers = [DiskStore(path, LAYOUT, ROWS, "hash 1", writable=False) for _ in range(2)]
    with pytest.raises(UserError, match="is in use"):
        DiskStore(path, LAYOUT, ROWS, "hash 1")
    for reader in readers:
        assert torch.equal(everything(reader), expected())
        reader.close()


def queues_of_reads() -> int:
    """Queues of asynchronous reads that this process has; the system maps memory for each."""
    return Path("/proc/self/maps").read_text().count("/[aio]")


def test_a_store_that_is_dropped_leaves_nothing_open(tmp_path: Path) -> None:
    path = tmp_path / "t.rows"
    filled(path).close()
    gc.collect()
    before = queues_of_reads(), threading.active_count(), len(os.listdir("/proc/self/fd"))
    for writable in (False, True):
        store = DiskStore(path, LAYOUT, ROWS, "hash 1", writable=writable)
        assert torch.equal(everything(store), expected())
        if store._deep is not None:
            assert queues_of_reads() > before[0]
        if writable:
            write_ones(store, 9)
        threads = store._workers._pool._threads.copy()
        assert threads or not writable  # reads around the page cache need none
        del store
        gc.collect()
        for thread in threads:
            thread.join(30)
        assert (queues_of_reads(), threading.active_count(), len(os.listdir("/proc/self/fd"))) == before
    again = DiskStore(path, LAYOUT, ROWS, "hash 1")
    written = again.written_since(["start"])
    assert written is not None
    assert written.tolist() == [9]
    again.close()


def test_a_store_of_another_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.rows"
    filled(path).close()
    for writable in (True, False):
        for rows, fingerprint in ((ROWS - 1, "hash 1"), (ROWS, "hash 2")):
            with pytest.raises(UserError, match=rf"and this run needs ({rows}|'{fingerprint}')"):
                DiskStore(path, LAYOUT, rows, fingerprint, writable=writable)


def test_a_table_that_is_missing_or_half_filled_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "t.rows"
    with pytest.raises(UserError, match="cannot be opened: No such file"):
        DiskStore(path, LAYOUT, ROWS, "hash 1", writable=False)
    DiskStore(path, LAYOUT, ROWS, "hash 1").close()
    with pytest.raises(UserError, match="never filled to the end"):
        DiskStore(path, LAYOUT, ROWS, "hash 1", writable=False)


@pytest.mark.parametrize("target", ["rows", "log"])
def test_a_full_disk_stops_the_store_and_loses_no_knowledge(tmp_path: Path, target: str) -> None:
    """/dev/full takes the place of the open file: every write to it fails for want of space."""
    path = tmp_path / "t.rows"
    store = filled(path)
    write_ones(store, 1, 2)
    descriptor = store._file if target == "rows" else store._open_log._descriptor
    assert descriptor is not None
    full = os.open("/dev/full", os.O_RDWR)
    os.dup2(full, descriptor)
    message = (
        "No space left on device; mend the disk or make room there, then resume from the last checkpoint"
    )
    for ids in ((3, 4), (5, 6)):
        with pytest.raises(UserError, match=message):
            write_ones(store, *ids)
    with pytest.raises(UserError, match=message):
        store.read(torch.tensor([1]), torch.empty(1, LAYOUT.record_bytes, dtype=torch.uint8))
    store.close()
    os.close(full)
    again = DiskStore(path, LAYOUT, ROWS, "hash 1")
    written = again.written_since(["start"])
    assert written is not None
    changed = (everything(again) != expected()).any(1).nonzero().flatten()
    assert set(changed.tolist()) <= set(written.tolist()) <= {1, 2, 3, 4}
    again.close()


def test_a_file_that_shrinks_is_noticed_and_no_row_made_up(tmp_path: Path) -> None:
    store = filled(tmp_path / "t.rows", cache_rows=0)
    os.truncate(tmp_path / "t.rows", BLOCK + 2000 * LAYOUT.record_bytes)
    with pytest.raises(
        UserError, match=r"Rows cannot be read from .*: the file ends too early; .*checkpoint"
    ):
        everything(store)
    with pytest.raises(UserError, match="ends too early"):
        write_ones(store, 1)
    store.close()


def test_who_only_reads_is_not_sent_to_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "t.rows"
    filled(path).close()
    store = DiskStore(path, LAYOUT, ROWS, "hash 1", writable=False, cache_rows=0)
    os.truncate(path, BLOCK + BLOCK)
    with pytest.raises(UserError) as caught:
        everything(store)
    assert str(caught.value) == (
        f"Rows cannot be read from {path}: the file ends too early; mend the disk, or remove {path}* to "
        "build the table anew, and start again."
    )
    store.close()


def test_the_log_knows_what_was_written_since_each_mark(tmp_path: Path) -> None:
    path = tmp_path / "t.rows"
    store = filled(path)

    def since(*checkpoints: str) -> list[int] | None:
        found = store.written_since(checkpoints)
        return None if found is None else found.tolist()

    assert since("start") == []
    write_ones(store, 9, 3)
    write_ones(store, 3, 4)
    store.mark("a")
    assert since("a") == []
    write_ones(store, 3, 100)
    assert (since("start"), since("a"), since("start", "a")) == ([3, 4, 9, 100], [3, 100], [3, 100])
    store.close()
    store = DiskStore(path, LAYOUT, ROWS, "hash 1")
    write_ones(store, 100, 2999)
    assert (since("start"), since("a"), since("b")) == ([3, 4, 9, 100, 2999], [3, 100, 2999], None)
    store.start_log("a")  # committed: what came before is not needed any more
    assert (since("start"), since("a")) == (None, [3, 100, 2999])
    store.start_log("b")
    assert (since("a"), since("b")) == (None, [])
    write_ones(store, 8)
    store.start_log(None)
    write_ones(store, 8)
    assert since("a", "b") is None
    store.close()
    store = DiskStore(path, LAYOUT, ROWS, "hash 1")
    assert since("a", "b") is None
    store.close()


def test_a_log_cut_off_while_it_was_written_is_read_to_its_last_whole_number(tmp_path: Path) -> None:
    store = filled(tmp_path / "t.rows")
    write_ones(store, 9, 3)
    store.close()
    (log,) = tmp_path.glob("*.written-*")
    with log.open("ab") as file:
        file.write(b"\x01\x02\x03")
    (tmp_path / "t.rows.written-99").write_bytes(b"begun")
    store = DiskStore(tmp_path / "t.rows", LAYOUT, ROWS, "hash 1")
    write_ones(store, 11)
    found = store.written_since(["start"])
    assert found is not None
    assert found.tolist() == [3, 9, 11]
    store.close()


@pytest.mark.parametrize("last", [True, False], ids=["the last log", "one before"])
@pytest.mark.parametrize("closed", [True, False], ids=["closed", "killed"])
@pytest.mark.parametrize("damage", ["short", "changed", "no row's number", "of an older version"])
def test_a_log_that_lost_or_changed_numbers_is_not_believed(
    tmp_path: Path, damage: str, closed: bool, last: bool
) -> None:
    """Rows that it does not name would stay as they were written after the checkpoint."""
    store = filled(tmp_path / "t.rows")
    write_ones(store, 9, 3)
    write_ones(store, 11)
    (log,) = tmp_path.glob("*.written-*")
    if not last:
        store.mark("later")
        write_ones(store, 12)
    if closed:
        store.close()
    else:
        store._release()
    whole = log.read_bytes()
    changed = {
        "short": whole[:-8],
        "changed": whole[:-8] + (10).to_bytes(8, "little"),
        "no row's number": whole + b"\xff" * 8,
        "of an older version": whole[:112] + b" " * 16 + whole[128:],
    }
    log.write_bytes(changed[damage])
    store = DiskStore(tmp_path / "t.rows", LAYOUT, ROWS, "hash 1")
    assert store.written_since(["start"]) is None
    store.close()


def test_a_copy_of_a_log_by_another_name_is_left_alone(tmp_path: Path) -> None:
    store = filled(tmp_path / "t.rows")
    write_ones(store, 9)
    store.close()
    (tmp_path / "t.rows.written-old").write_bytes(b"a copy")
    store = DiskStore(tmp_path / "t.rows", LAYOUT, ROWS, "hash 1")
    found = store.written_since(["start"])
    assert found is not None
    assert found.tolist() == [9]
    store.close()


@pytest.mark.parametrize("closed", [True, False])
def test_after_a_loss_of_power_only_a_log_that_was_closed_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed: bool
) -> None:
    store = filled(tmp_path / "t.rows")
    write_ones(store, 9)
    if closed:
        store.close()
    else:
        store._release()  # what the end of the process does
    monkeypatch.setattr(written_log, "_boot", lambda: "another boot")
    store = DiskStore(tmp_path / "t.rows", LAYOUT, ROWS, "hash 1")
    found = store.written_since(["start"])
    assert (found is not None and found.tolist() == [9]) if closed else found is None
    store.close()


WRITER = """
import sys, torch
from pathlib import Path
from engram_lab.memory.disk import DiskStore
from engram_lab.memory.layout import RecordLayout
store = DiskStore(Path(sys.argv[1]), RecordLayout(row_dim=16, rule="adagrad", alignment=4), 3000, "hash 1")
generator = torch.Generator().manual_seed(0)
store.write(torch.tensor([0]), torch.full((1, 68), 255, dtype=torch.uint8))
print("writing", flush=True)
while True:
    ids = torch.randint(0, 1500, (5,), generator=generator).unique()
    store.write(ids, torch.randint(0, 256, (len(ids), 68), dtype=torch.uint8))
"""


def test_after_a_kill_every_row_that_changed_is_in_the_log(tmp_path: Path) -> None:
    path = tmp_path / "t.rows"
    filled(path).close()
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    writer.stdout.readline()
    time.sleep(0.01)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    store = DiskStore(path, LAYOUT, ROWS, "hash 1")
    written = store.written_since(["start"])
    assert written is not None
    changed = (everything(store) != expected()).any(1).nonzero().flatten()
    assert {0} <= set(changed.tolist()) <= set(written.tolist()) <= set(range(1500))
    store.close()

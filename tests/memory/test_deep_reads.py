"""Many reads under way at once give the bytes of the file, and its errors."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from engram_lab.memory import deep_reads, disk
from engram_lab.memory.deep_reads import AT_ONCE, DeepReads
from engram_lab.memory.disk import DiskStore
from engram_lab.memory.disk_copy import BLOCK, ENDED
from engram_lab.memory.layout import RecordLayout

ROWS = 900


@pytest.fixture(params=[3, 84, 4096, 5000])
def content(request: pytest.FixtureRequest, tmp_path: Path) -> np.ndarray:
    """Records [R, S] of a file whose first block is another thing's."""
    S = request.param
    records = np.random.default_rng(S).integers(0, 256, (ROWS, S), dtype=np.uint8)
    spare = -(ROWS * S) % BLOCK
    (tmp_path / "t").write_bytes(bytes(BLOCK) + records.tobytes() + bytes(spare))
    return records


@contextmanager
def opened(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    yield file
    os.close(file)


@pytest.mark.parametrize("depth", [1, 4, 512])
def test_every_record_comes_to_its_place(tmp_path: Path, content: np.ndarray, depth: int) -> None:
    reads, draw = DeepReads(content.shape[1], depth), np.random.default_rng(1)
    with opened(tmp_path / "t") as file:
        for ids in (draw.integers(0, ROWS, 2000), np.arange(ROWS), np.array([5, 5, ROWS - 1]), np.arange(0)):
            ids = np.sort(ids)
            places = draw.permutation(len(ids) + 3)[: len(ids)]
            out = np.full((len(ids) + 3, content.shape[1]), 77, dtype=np.uint8)
            wanted = out.copy()
            wanted[places] = content[ids]
            assert reads.read(file, BLOCK, ids, out.ctypes.data, places) == 0
            assert (out == wanted).all()
    reads.close()


def test_calls_at_the_same_time_do_not_mix(tmp_path: Path, content: np.ndarray) -> None:
    reads, S = DeepReads(content.shape[1], 4), content.shape[1]

    def call(file: int, seed: int) -> bool:
        ids = np.sort(np.random.default_rng(seed).integers(0, ROWS, 300))
        out, places = np.zeros((300, S), dtype=np.uint8), np.arange(300)
        return reads.read(file, BLOCK, ids, out.ctypes.data, places) == 0 and bool(
            (out == content[ids]).all()
        )

    with opened(tmp_path / "t") as file, ThreadPoolExecutor(2 * AT_ONCE) as threads:
        assert all(threads.map(lambda seed: call(file, seed), range(24)))
    reads.close()


def test_two_calls_are_inside_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads, both = DeepReads(84, 4), threading.Barrier(AT_ONCE, timeout=10)

    def meeting(*_: object) -> int:
        both.wait()  # never returns for a call that is alone
        return 0

    monkeypatch.setattr(deep_reads, "_read", meeting)
    none = np.arange(0)
    with ThreadPoolExecutor(AT_ONCE) as threads:
        calls = [threads.submit(reads.read, 0, BLOCK, none, 0, none) for _ in range(AT_ONCE)]
        assert [call.result() for call in calls] == [0] * AT_ONCE
    assert AT_ONCE > 1
    reads.close()


def test_errors_are_told_and_leave_nothing_under_way(tmp_path: Path, content: np.ndarray) -> None:
    reads, ids = DeepReads(content.shape[1], 4), np.arange(ROWS)
    out = np.empty_like(content)
    with opened(tmp_path / "t") as file:
        beyond = ids + ROWS + BLOCK
        assert reads.read(file, BLOCK, beyond, out.ctypes.data, ids) == ENDED
        assert reads.read(file, BLOCK + 1, ids[:0], out.ctypes.data, ids[:0]) == 0
        assert reads.read(file, BLOCK, ids, out.ctypes.data, ids) == 0
        assert (out == content).all()
    assert reads.read(file, BLOCK, ids, out.ctypes.data, ids) == errno.EBADF
    reads.close()
    assert reads.read(file, BLOCK, ids, out.ctypes.data, ids) == errno.EINVAL
    reads.close()


def test_a_system_without_such_reads_goes_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    layout = RecordLayout(row_dim=16, weights="float8", rule=None, alignment=4)
    given = torch.randint(0, 256, (ROWS, layout.record_bytes), dtype=torch.uint8)
    store = DiskStore(tmp_path / "t", layout, ROWS, "x", cache_rows=0)
    store.write(torch.arange(ROWS), given)
    store.mark("filled")
    store.close()

    def refused(record_bytes: int) -> DeepReads:
        raise OSError(errno.EPERM, "forbidden")

    reason = "asynchronous reads (forbidden); where none are left, raise /proc/sys/fs/aio-max-nr"
    for reads, said in ((DeepReads, []), (refused, [reason])):
        monkeypatch.setattr(disk, "DeepReads", reads)
        store = DiskStore(tmp_path / "t", layout, ROWS, "x", cache_rows=0, writable=False)
        out, ids = torch.empty_like(given), torch.randperm(ROWS)
        store.read(ids, out)
        assert torch.equal(out, given[ids])
        store.close()
        assert [record.getMessage()[-len(reason) :] for record in caplog.records] == said


def test_one_queue_does_where_the_system_has_no_second(
    tmp_path: Path, content: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[deep_reads._Queue] = []

    def scarce(*options: object) -> deep_reads._Queue:
        if made:
            raise OSError(errno.EAGAIN, "none left")
        made.append(queue(*options))  # type: ignore[arg-type]
        return made[0]

    queue = deep_reads._Queue
    monkeypatch.setattr(deep_reads, "_Queue", scarce)
    reads, ids = DeepReads(content.shape[1], 4), np.arange(ROWS)
    outs = [np.zeros_like(content) for _ in range(4)]
    with opened(tmp_path / "t") as file, ThreadPoolExecutor(len(outs)) as threads:
        call = lambda out: reads.read(file, BLOCK, ids, out.ctypes.data, ids)  # noqa: E731
        assert list(threads.map(call, outs)) == [0] * len(outs)
    assert all((out == content).all() for out in outs)
    reads.close()
    assert made[0].context.value == 0
    with pytest.raises(OSError, match="none left"):
        DeepReads(content.shape[1], 4)

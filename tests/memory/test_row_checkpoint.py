"""Saving the rows that changed: no more files than needed, and nothing of a file that cannot be finished."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from failures import largest_file, refusal
from saved_tables import (
    LAYOUT,
    checkpoints,
    content,
    initial,
    new_store,
    row_files,
    some_rows,
    started,
    touch,
)

from engram_lab.memory import row_file


def test_files_hold_at_most_twice_the_rows(tmp_path: Path) -> None:
    """Rows that change often are gathered in one file; what is committed stays until the next is."""
    store = new_store()
    rows = started(tmp_path, store)
    committed: list[str] = []
    most = 0
    for step in range(1, 12):
        touch(store, some_rows(0), step)
        manifest = rows.save(step, store, some_rows(0))
        assert set(committed) <= set(row_files(tmp_path))
        rows.committed([manifest], store)
        committed = row_files(tmp_path)
        held = [file["rows"] for file in manifest["files"]]
        assert sum(held) <= 200
        most = max(most, len(held))
    assert most == 2
    again = new_store()
    checkpoints(tmp_path).restore([manifest], again, initial)
    assert torch.equal(content(again), content(store))


@pytest.mark.parametrize("size", [0, 100, 3000])
def test_a_write_that_fails_half_way_leaves_the_checkpoint_before(tmp_path: Path, size: int) -> None:
    store = new_store()
    rows = started(tmp_path, store)
    touch(store, some_rows(1), 1)
    manifest = rows.save(1, store, some_rows(1))
    before, expected = row_files(tmp_path), content(store)
    touch(store, some_rows(2), 2)
    with largest_file(size):
        message = refusal(lambda: rows.save(2, store, some_rows(2)))
    assert f"rows of step 2 cannot be saved in {tmp_path}: File too large" in message
    assert "the checkpoint before is intact" in message
    assert row_files(tmp_path) == before
    again = new_store()
    checkpoints(tmp_path).restore([manifest], again, initial)
    assert torch.equal(content(again), expected)
    # With room again, nothing of what failed is lost.
    manifest = rows.save(2, store, some_rows(2))
    checkpoints(tmp_path).restore([manifest], again, initial)
    assert torch.equal(content(again), content(store))


def test_room_is_asked_for_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = new_store()
    rows = started(tmp_path, store)
    nearly = list(os.statvfs(tmp_path))
    for free, fits in ((1, False), (20_000, True)):
        nearly[1], nearly[4] = 1, free  # f_frsize, f_bavail
        found = os.statvfs_result(nearly)
        monkeypatch.setattr(os, "statvfs", lambda _, found=found: found)
        if fits:
            manifest = rows.save(2, store, some_rows(2))
            assert manifest["files"][0]["bytes"] <= free
        else:
            message = refusal(lambda: rows.save(1, store, some_rows(1)))
            assert (
                f"Saving 100 table rows of step 1 needs 0.0 GiB, but {tmp_path} has 0.0 GiB free" in message
            )
            assert row_files(tmp_path) == []


@pytest.mark.parametrize("count", [0, 1, 999])
def test_the_room_asked_for_is_what_a_file_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    store = new_store()
    file = started(tmp_path, store).save(1, store, some_rows(0, count))["files"]
    if file:
        assert 0 <= row_file.file_bytes(LAYOUT, count) - file[0]["bytes"] <= 4096


def test_an_interrupt_leaves_no_part_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = new_store()
    rows = started(tmp_path, store)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rows.save(1, store, some_rows(1))
    assert row_files(tmp_path) == []

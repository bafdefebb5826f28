"""Saved rows that are missing, damaged or of another run are refused, in one sentence that names the file."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from failures import refusal
from saved_tables import (
    FINGERPRINT,
    LAYOUT,
    checkpoints,
    content,
    initial,
    new_store,
    open_store,
    some_rows,
    started,
    touch,
)

from engram_lab.memory import row_checkpoint, row_file
from engram_lab.memory.layout import RecordLayout


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, list[row_checkpoint.Manifest]]:
    """A checkpoint of two files, and where the second lies."""
    store = new_store()
    rows = started(tmp_path, store)
    for step in (1, 2):
        touch(store, some_rows(step), step)
        manifest = rows.save(step, store, some_rows(step))
    return tmp_path / "step=2.rank=0.rows", [manifest]


def restore_refused(
    saved: tuple[Path, list[row_checkpoint.Manifest]],
    layout: RecordLayout = LAYOUT,
    fingerprint: str = FINGERPRINT,
) -> str:
    path, manifests = saved
    store = new_store(layout)
    message = refusal(
        lambda: checkpoints(path.parent, layout, fingerprint).restore(manifests, store, initial)
    )
    assert str(path.parent) in message
    return message


def test_a_missing_file_is_named(saved: tuple[Path, list[row_checkpoint.Manifest]]) -> None:
    saved[0].unlink()
    assert f"{saved[0]} of step 2 is missing; put a whole copy back" in restore_refused(saved)


def test_a_truncated_file_is_named(saved: tuple[Path, list[row_checkpoint.Manifest]]) -> None:
    whole = saved[0].read_bytes()
    for size in (0, 5, 40, len(whole) // 2, len(whole) - 1):
        saved[0].write_bytes(whole[:size])
        message = restore_refused(saved)
        assert f"{saved[0]} is damaged: it holds {size:,} bytes instead of {len(whole):,}" in message


def test_any_flipped_bit_is_found(
    saved: tuple[Path, list[row_checkpoint.Manifest]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = saved[0].read_bytes()
    chance = random.Random(0)
    ends = [*range(20), *range(len(whole) - 20, len(whole))]
    for place in [*ends, *(chance.randrange(len(whole)) for _ in range(60))]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << chance.randrange(8)
        saved[0].write_bytes(damaged)
        assert f"{saved[0]} is damaged: its checksum differs" in restore_refused(saved)


def test_the_file_of_another_run_is_refused(saved: tuple[Path, list[row_checkpoint.Manifest]]) -> None:
    """Whole, of the right size, but not the one the checkpoint lists."""
    other = saved[0].parent / "other"
    store = new_store()
    rows = started(other, store)
    touch(store, some_rows(2), 77)
    rows.save(2, store, some_rows(2))
    assert (other / saved[0].name).stat().st_size == saved[0].stat().st_size
    shutil.copyfile(other / saved[0].name, saved[0])
    assert "its checksum differs" in restore_refused(saved)


def test_rows_of_another_configuration_are_refused(
    saved: tuple[Path, list[row_checkpoint.Manifest]],
) -> None:
    saved = saved[0].with_name("step=1.rank=0.rows"), saved[1]
    message = restore_refused(saved, fingerprint="hash 2, table abc, seed 0")
    assert "hash version, tables or seed differ (hash 1, table abc, seed 0 instead of hash 2" in message
    for change, says in (
        ({"row_dim": 4}, "row_dim 3, but the run has 4"),
        ({"rule": "sinkhorn"}, "rule 'adam', but the run has 'sinkhorn'"),
        ({"state": "bfloat16"}, "state 'float32', but the run has 'bfloat16'"),
        ({"weights": "bfloat16"}, "weights 'float32', but the run has 'bfloat16'"),
    ):
        assert says in restore_refused(saved, layout=replace(LAYOUT, **change))


def test_files_of_a_later_version_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = new_store()
    rows = started(tmp_path, store)
    with monkeypatch.context() as later:
        later.setattr(row_file, "VERSION", row_file.VERSION + 1)
        manifest = rows.save(1, store, some_rows(0))
    message = restore_refused((tmp_path / "step=1.rank=0.rows", [manifest]))
    assert f"has version {row_file.VERSION + 1}, but this program reads version {row_file.VERSION}" in message


def test_a_lasting_store_is_restored_when_the_damage_is_mended(tmp_path: Path) -> None:
    """What could not be put back is still known to be wrong."""
    store = open_store("disk", tmp_path)
    rows = started(tmp_path, store)
    for step in (1, 2):
        touch(store, some_rows(step), step)
        manifest = rows.save(step, store, some_rows(step))
        rows.committed([manifest], store)
    expected = content(store)
    touch(store, some_rows(3, 500), 3)
    path = tmp_path / "step=2.rank=0.rows"
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) - 200] ^= 1
    path.write_bytes(damaged)
    refusal(lambda: checkpoints(tmp_path).restore([manifest], store, initial))
    path.write_bytes(whole)
    checkpoints(tmp_path).restore([manifest], store, initial)
    assert torch.equal(content(store), expected)

"""A table comes back bit for bit from its saved rows, whatever happened to process, tier and ranks."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import tempfile
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_tables import (
    LAYOUT,
    ROWS,
    checkpoints,
    content,
    initial,
    new_store,
    open_store,
    row_files,
    some_rows,
    started,
    touch,
)
from torch import Tensor

from engram_lab.memory import row_checkpoint, row_file
from engram_lab.memory.row_checkpoint import RowCheckpoints
from engram_lab.memory.stores import DeviceStore, RowStore


def test_a_row_is_as_in_the_newest_file_or_as_drawn(tmp_path: Path) -> None:
    store = new_store()
    rows = started(tmp_path, store)
    begin = content(store)
    manifest = rows.save(0, store, torch.empty(0, dtype=torch.int64))
    assert manifest["files"] == []
    for step, ids in ((5, some_rows(0)), (9, some_rows(1))):
        touch(store, ids, step)
        manifest = rows.save(step, store, ids)
        assert json.loads(json.dumps(manifest)) == manifest
    expected = content(store)
    untouched = torch.ones(ROWS, dtype=torch.bool)
    untouched[torch.cat([some_rows(0), some_rows(1)])] = False
    assert torch.equal(expected[untouched], begin[untouched])
    again = new_store()
    touched = checkpoints(tmp_path).restore([manifest], again, initial)
    assert torch.equal(content(again), expected)
    assert torch.equal(touched, torch.cat([some_rows(0), some_rows(1)]).unique())


def test_records_of_many_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_file, "CHUNK", 700)
    store = new_store()
    rows = started(tmp_path, store)
    touch(store, some_rows(0, 333), 1)
    manifest = rows.save(1, store, some_rows(0, 333))
    monkeypatch.setattr(row_file, "CHUNK", 64 << 20)  # files say themselves how they are cut
    again = new_store()
    checkpoints(tmp_path).restore([manifest], again, initial)
    assert torch.equal(content(again), content(store))


@pytest.mark.parametrize("alignment", [4, 64, 256])
def test_another_alignment_reads_the_same_rows(tmp_path: Path, alignment: int) -> None:
    store = new_store()
    rows = started(tmp_path, store)
    touch(store, some_rows(0), 3)
    manifest = rows.save(3, store, some_rows(0))
    other = replace(LAYOUT, alignment=alignment)
    again = new_store(other)
    checkpoints(tmp_path, other).restore([manifest], again, initial)
    expected, found = LAYOUT.fields(content(store)), other.fields(content(again))
    for name, values in expected.items():
        assert torch.equal(found[name], values), name
    at = list(other.places.values())[-1]
    assert (content(again)[:, at.offset + at.width * at.dtype.itemsize :] == 0).all(), "padding is zero"


class Part:
    """Every third row of a table, by the numbers they have in it."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        self.rows, self.record_bytes, self.device = ROWS, LAYOUT.record_bytes, torch.device("cpu")
        self.store = new_store()

    def owns(self, ids: Tensor) -> Tensor:
        return ids % self.ranks == self.rank

    def read(self, ids: Tensor, out: Tensor) -> None:
        assert self.owns(ids).all()
        self.store.read(ids, out)

    def write(self, ids: Tensor, records: Tensor) -> None:
        mine = self.owns(ids)
        self.store.write(ids[mine], records[mine])

    def sync(self) -> None: ...

    def close(self) -> None: ...


@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.integers(0, 1 << 20))
@settings(max_examples=8, deadline=None)
def test_any_number_of_ranks_goes_on_with_the_rows_of_any_other(worlds: list[int], seed: int) -> None:
    """Ranks save their own rows; a run goes on with other numbers of ranks again and again."""
    whole, step = new_store(), 0
    manifests: list[row_checkpoint.Manifest] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started(folder, whole)
        for ranks in worlds:
            parts = [Part(rank, ranks) for rank in range(ranks)]
            rows = [checkpoints(folder) for _ in range(ranks)]
            for part, mine in zip(parts, rows, strict=True):
                touched = mine.restore(manifests, part, initial, part.owns)
                assert part.owns(touched).all()
                owned = part.owns(torch.arange(ROWS))
                assert torch.equal(content(part.store)[owned], content(whole)[owned])
            for _ in range(2):
                step += 1
                ids = some_rows(seed + step, 150)
                touch(whole, ids, step)
                manifests = []
                for part, mine in zip(parts, rows, strict=True):
                    own = ids[part.owns(ids)]
                    touch(part, own, step)
                    manifests.append(mine.save(step, part, own, part.rank))
                rows[0].committed(manifests, parts[0])


class Run:
    """A training run with a table, as far as its rows are concerned, and what they must be."""

    def __init__(self, folder: Path, tier: str) -> None:
        self.folder, self.tier = folder, tier
        self.drawn, self.step = 0, 0
        self.recent: set[int] = set()
        self.ever: set[int] = set()
        self.manifests: list[row_checkpoint.Manifest] = []
        self.truth = DeviceStore(ROWS, LAYOUT.record_bytes)
        initial(0, ROWS, self.truth.records)
        self.at_checkpoint = 0, self.truth.records.clone(), set[int]()
        self.store = open_store(tier, folder)
        self.rows = checkpoints(folder)
        self.rows.restore([], self.store, self.initial)

    def initial(self, first: int, count: int, out: Tensor) -> None:
        self.drawn += count
        initial(first, count, out)

    def train(self, ids: list[int]) -> None:
        self.step += 1
        numbers = torch.tensor(sorted(ids))
        for store in (self.store, self.truth):
            touch(store, numbers, self.step)
        self.recent |= set(ids)
        self.ever |= set(ids)

    def save(self, *, commit: bool, settle: bool) -> None:
        """Save the rows; then the training checkpoint is committed or not; then old files are deleted or not.

        A process does not outlive what it could not commit.
        """
        ids = torch.tensor(sorted(self.recent), dtype=torch.int64)
        manifest = json.loads(json.dumps(self.rows.save(self.step, self.store, ids)))
        self.recent = set()
        files = manifest["files"]
        assert sum(f["rows"] for f in files) <= 2 * len(self.ever)
        assert sum((self.folder / f["name"]).stat().st_size for f in files) == sum(f["bytes"] for f in files)
        if not commit:
            self.restart()
            return
        self.manifests = [manifest]
        self.at_checkpoint = self.step, self.truth.records.clone(), set(self.ever)
        if settle:
            self.rows.committed([manifest], self.store)
            assert row_files(self.folder) == sorted(f["name"] for f in files)

    def restart(self) -> None:
        """A new process: only files remain, the table's among them."""
        self.store.close()
        self.store = open_store(self.tier, self.folder)
        self.rows, self.drawn = checkpoints(self.folder), 0
        touched = self.rows.restore(self.manifests, self.store, self.initial)
        if self.tier == "disk":
            assert self.drawn < ROWS / 2, "a file that survived is not written anew"
        self.step, records, ever = self.at_checkpoint
        self.recent, self.ever = set(), set(ever)
        self.truth.records.copy_(records)
        assert set(touched.tolist()) == ever
        assert torch.equal(content(self.store), records)
        assert row_files(self.folder) == sorted(f["name"] for m in self.manifests for f in m["files"])


ACTIONS = st.one_of(
    st.lists(st.integers(0, 39), min_size=1, max_size=12, unique=True),
    st.sampled_from(["saved", "committed", "settled", "restart"]),
)


@pytest.mark.parametrize("tier", ["resident", "host", "disk"])
@given(actions=st.lists(ACTIONS, max_size=25))
@settings(max_examples=40, deadline=None)
def test_a_restart_at_any_moment_is_exact(tier: str, actions: list[list[int] | str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), tier)
        for action in [*actions, "restart"]:
            if isinstance(action, list):
                run.train(action)
            elif action == "restart":
                run.restart()
            else:
                run.save(commit=action != "saved", settle=action == "settled")
        run.store.close()


def test_only_what_changed_is_put_back_into_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store("disk", tmp_path)
    rows = started(tmp_path, store)
    touch(store, some_rows(1), 1)
    manifest = rows.save(1, store, some_rows(1))
    rows.committed([manifest], store)
    expected = content(store)
    changed_since = torch.cat([some_rows(1)[:5], torch.tensor([0, ROWS - 1])]).unique()
    touch(store, changed_since, 2)
    written, write = [], store.write

    def spy(ids: Tensor, records: Tensor) -> None:
        written.append(ids.clone())
        write(ids, records)

    monkeypatch.setattr(store, "write", spy)
    checkpoints(tmp_path).restore([manifest], store, initial)
    assert torch.equal(torch.cat(written).sort().values, changed_since)
    assert torch.equal(content(store), expected)
    store.close()


def test_a_run_changes_its_tier(tmp_path: Path) -> None:
    """On disk, in memory, on the same disk again, whose file knows nothing of what happened in between."""
    expected = new_store()
    started(tmp_path / "elsewhere", expected)
    manifests: list[row_checkpoint.Manifest] = []
    for step, tier in enumerate(["disk", "host", "disk", "resident", "resident", "disk"], 1):
        store = open_store(tier, tmp_path)
        rows = checkpoints(tmp_path)
        rows.restore(manifests, store, initial)
        assert torch.equal(content(store), content(expected))
        for target in (store, expected):
            touch(target, some_rows(step), step)
        manifests = [rows.save(step, store, some_rows(step))]
        rows.committed(manifests, store)
        touch(store, some_rows(step + 100), 99)
        store.close()


def test_a_lasting_store_of_another_run_is_written_anew(tmp_path: Path) -> None:
    """Two runs of equal rows in two folders take turns with one table file."""
    store = open_store("disk", tmp_path)
    outcome = {}
    for seed, name in enumerate(("one", "two")):
        rows = started(tmp_path / name, store)
        touch(store, some_rows(seed), seed)
        manifest = rows.save(1, store, some_rows(seed))
        rows.committed([manifest], store)
        outcome[name] = manifest, content(store)
    for name in ("one", "two", "one"):
        manifest, expected = outcome[name]
        checkpoints(tmp_path / name).restore([manifest], store, initial)
        assert torch.equal(content(store), expected)


def changed(step: int) -> Tensor:
    return some_rows(step, 400)


def train_step(store: RowStore, step: int) -> None:
    touch(store, changed(step), step)


def commit(folder: Path, manifests: list[row_checkpoint.Manifest]) -> None:
    """What stands for the training checkpoint."""
    (folder / "manifest.partial").write_text(json.dumps(manifests))
    os.replace(folder / "manifest.partial", folder / "manifest.json")


def continue_run(folder: Path, store: RowStore) -> tuple[RowCheckpoints, int]:
    file = folder / "manifest.json"
    manifests = json.loads(file.read_text()) if file.exists() else []
    rows = checkpoints(folder)
    rows.restore(manifests, store, initial)
    return rows, manifests[0]["step"] if manifests else 0


def train_until_killed(tier: str, folder: Path, ready: Connection) -> None:
    torch.set_num_threads(1)
    store = open_store(tier, folder)
    rows, step = continue_run(folder, store)
    ready.send(step)
    while True:
        step += 1
        train_step(store, step)
        if step % 2 == 0:
            manifest = rows.save(step, store, torch.cat([changed(step - 1), changed(step)]).unique())
            commit(folder, [manifest])
            rows.committed([manifest], store)


@pytest.mark.slow
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_killed_at_random_moments_the_rows_are_those_of_the_checkpoint(tier: str, tmp_path: Path) -> None:
    chance = random.Random(0)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["engram_lab.memory.row_checkpoint", "hypothesis", "pytest"])
    expected, trained = new_store(), 0
    started(tmp_path / "elsewhere", expected)
    for _ in range(6):
        here, there = context.Pipe()
        process = context.Process(target=train_until_killed, args=(tier, tmp_path, there), daemon=True)
        process.start()
        assert here.poll(120), "the process has not begun to train"
        assert here.recv() == trained
        time.sleep(chance.uniform(0.0, 0.1))
        process.kill()
        process.join()
        store = open_store(tier, tmp_path)
        _, step = continue_run(tmp_path, store)
        assert step >= trained
        for s in range(trained + 1, step + 1):
            train_step(expected, s)
        trained = step
        assert torch.equal(content(store), content(expected))
        store.close()
    assert trained

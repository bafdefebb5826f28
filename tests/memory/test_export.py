"""Rows exported from any tier come back bit for bit, in the format asked for, or not at all."""

from __future__ import annotations

import itertools
import json
import os
import random
from pathlib import Path

import pytest
import torch
from failures import largest_file, refusal
from safetensors.torch import load_file
from torch import Tensor

from engram_lab.errors import UserError
from engram_lab.memory import export
from engram_lab.memory.export import export_rows, remove_rows
from engram_lab.memory.host import HostStore
from engram_lab.memory.layout import RecordLayout
from engram_lab.memory.resident import RowStorage, round_rows
from engram_lab.memory.saved_rows import INDEX, SavedRows
from engram_lab.memory.stores import DeviceStore, RowStore, fill

U = 36
TABLES = {"tables.0.weight": 700, "tables.1.weight": 0, "tables.2.weight": 301}
ROWS = sum(TABLES.values())
TRAINED = RecordLayout(row_dim=U, rule="adam")
STORAGES: tuple[RowStorage, ...] = ("float32", "bfloat16", "float8", "float8_row")
REMEDY = "put a whole copy back, or remove the run's folder and train it again."


def trained(seed: int = 0) -> tuple[Tensor, DeviceStore]:
    """Weights [R, U], and a store that holds them with state of optimizers beside them."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(ROWS, U, generator=generator) * torch.rand(ROWS, 1, generator=generator)
    weights[3] = 0
    store = DeviceStore(ROWS, TRAINED.record_bytes)
    TRAINED.encode(weights, store.records)
    TRAINED.fields(store.records)["exp_avg"].normal_()
    TRAINED.fields(store.records)["last"].fill_(7)
    return weights, store


def save(store: RowStore, folder: Path, **options: object) -> None:
    export_rows(store, folder, TABLES, TRAINED.decode, row_dim=U, **options)  # type: ignore[arg-type]


def content(store: RowStore) -> Tensor:
    out = torch.empty(store.rows, store.record_bytes, dtype=torch.uint8)
    store.read(torch.arange(store.rows), out)
    return out


def table_of(values: Tensor, name: str) -> Tensor:
    starts = dict(zip(TABLES, itertools.accumulate(TABLES.values(), initial=0), strict=False))
    return values[starts[name] : starts[name] + TABLES[name]]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_progress_ends_with_all_rows(tmp_path: Path) -> None:
    told: list[tuple[int, ...]] = []
    save(trained()[1], tmp_path, max_shard_bytes=5 * U * 4, progress=lambda *rows: told.append(rows))
    assert len(told) == len(list(tmp_path.glob("*.safetensors"))) > 4
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1] == (ROWS, ROWS)


def test_an_error_of_one_writer_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Path] = []

    def fails(tensors: object, path: Path) -> None:
        begun.append(path)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engram_lab.memory.export.save_file", fails)
    with pytest.raises(UserError, match=r"cannot be exported to .*: No space left on device"):
        save(trained()[1], tmp_path, max_shard_bytes=U * 4)
    assert len(begun) < ROWS / 2
    assert files(tmp_path) == []


def test_an_interrupt_ends_the_writers_and_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(done: int, rows: int) -> None:
        raise KeyboardInterrupt

    read: list[int] = []

    def weights(records: Tensor) -> Tensor:
        read.append(len(records))
        return TRAINED.decode(records)

    (tmp_path / ".rows-00001-of-00009.safetensors.partial").touch()  # of a process that was killed
    with pytest.raises(KeyboardInterrupt):
        export_rows(
            trained()[1], tmp_path, TABLES, weights, row_dim=U, max_shard_bytes=U * 4, progress=interrupted
        )
    assert len(read) < ROWS / 2
    assert files(tmp_path) == [".rows-00001-of-00009.safetensors.partial"]
    save(trained()[1], tmp_path)
    assert not [name for name in files(tmp_path) if name.endswith(".partial")]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("max_shard_bytes", [1, 5000, 1 << 30])
@pytest.mark.parametrize("chunk", [500, 64 << 20])
def test_rows_come_back_rounded_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    storage: RowStorage,
    max_shard_bytes: int,
    chunk: int,
) -> None:
    monkeypatch.setattr(export, "CHUNK", chunk)
    if max_shard_bytes == 1:
        for name, rows in (("tables.0.weight", 7), ("tables.2.weight", 5)):
            monkeypatch.setitem(TABLES, name, rows)
    rows = sum(TABLES.values())
    weights, store = trained()
    weights = weights[:rows]
    save(store, tmp_path, storage=storage, max_shard_bytes=max_shard_bytes)
    saved = SavedRows(tmp_path)
    stored = weights if storage == "float32" else round_rows(weights, storage)
    for name, count in TABLES.items():
        assert torch.equal(saved.weights(name, 0, count), table_of(stored, name))
        some = slice(count // 3, count - count // 4)
        assert torch.equal(
            saved.weights(name, some.start, some.stop - some.start), table_of(stored, name)[some]
        )
    size = RecordLayout(row_dim=U, weights=storage, rule=None, alignment=4).record_bytes
    most = max(1, max_shard_bytes // size)
    assert len(files(tmp_path)) == 1 + -(-rows // most)
    for path in tmp_path.glob("*.safetensors"):
        shard = load_file(path)
        whole = sum(t.numel() * t.element_size() for t in shard.values())
        assert whole <= max(max_shard_bytes, size)


def test_a_shard_is_read_by_anyone(tmp_path: Path) -> None:
    """A small table is one tensor under the name of its weights."""
    weights, store = trained()
    save(store, tmp_path)
    assert files(tmp_path) == ["rows-00001-of-00001.safetensors", INDEX]
    tensors = load_file(tmp_path / "rows-00001-of-00001.safetensors")
    assert sorted(tensors) == [name for name, rows in TABLES.items() if rows]
    for name, values in tensors.items():
        assert torch.equal(values, table_of(weights, name))


@pytest.mark.parametrize("storage", STORAGES)
def test_a_store_of_the_same_format_gets_the_same_bytes(tmp_path: Path, storage: RowStorage) -> None:
    """Exported, served from a host table, and exported again from there: no bit differs."""
    weights, store = trained()
    save(store, tmp_path / "one", storage=storage, max_shard_bytes=9000)
    layout = RecordLayout(row_dim=U, weights=storage, rule=None, alignment=64)
    served = HostStore(ROWS, layout.record_bytes)
    fill(served, SavedRows(tmp_path / "one").initial(layout, TABLES))
    expected = torch.empty(ROWS, layout.record_bytes, dtype=torch.uint8)
    layout.encode(weights, expected)
    assert torch.equal(content(served), expected)
    export_rows(served, tmp_path / "two", TABLES, layout.decode, row_dim=U, storage=storage)
    again = SavedRows(tmp_path / "two")
    for name, count in TABLES.items():
        assert torch.equal(again.weights(name, 0, count), SavedRows(tmp_path / "one").weights(name, 0, count))
    served.close()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("rows", ["float32", "bfloat16"])
def test_a_table_to_be_trained_starts_from_the_exported_rows(
    tmp_path: Path, storage: RowStorage, rows: RowStorage
) -> None:
    _, store = trained()
    save(store, tmp_path, storage=storage)
    saved = SavedRows(tmp_path)
    layout = RecordLayout(row_dim=U, weights=rows, rule="adam", state="bfloat16")
    new = DeviceStore(ROWS, layout.record_bytes)
    new.records.fill_(255)
    fill(new, saved.initial(layout, TABLES))
    fields = layout.fields(new.records)
    for name, count in TABLES.items():
        found = saved.weights(name, 0, count)
        assert torch.equal(table_of(fields["weight"], name), found.to(fields["weight"].dtype))
    assert all((values.float() == 0).all() for kind, values in fields.items() if kind != "weight")


def test_weights_are_caught_up_by_the_function_given(tmp_path: Path) -> None:
    weights, store = trained()
    before = content(store)
    export_rows(store, tmp_path, TABLES, lambda records: TRAINED.decode(records) * 2, row_dim=U)
    saved = SavedRows(tmp_path)
    for name, count in TABLES.items():
        assert torch.equal(saved.weights(name, 0, count), table_of(weights * 2, name))
    assert torch.equal(content(store), before)


def test_other_tables_are_refused(tmp_path: Path) -> None:
    _, store = trained()
    save(store, tmp_path)
    saved = SavedRows(tmp_path)
    message = refusal(lambda: saved.initial(TRAINED, {"tables.0.weight": 700}))
    assert "tables.0.weight [700, 36], tables.1.weight [0, 36], tables.2.weight [301, 36]" in message
    assert "the network's are tables.0.weight [700, 36]: use" in message
    refusal(lambda: saved.initial(RecordLayout(row_dim=U + 1), TABLES))
    assert f"there is no {INDEX} in it; {REMEDY}" in refusal(lambda: SavedRows(tmp_path / "elsewhere"))


def test_damage_to_a_shard_is_named(tmp_path: Path) -> None:
    _, store = trained()
    save(store, tmp_path, max_shard_bytes=40_000)
    path = tmp_path / "rows-00002-of-00004.safetensors"
    whole = path.read_bytes()
    read_all = lambda: [SavedRows(tmp_path).weights(name, 0, n) for name, n in TABLES.items()]  # noqa: E731
    chance = random.Random(0)
    for _ in range(20):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        assert refusal(read_all) == f"{path} is damaged: {REMEDY}"
    path.write_bytes(whole[:-1])
    assert f"{path} is damaged" in refusal(read_all)
    path.unlink()
    assert refusal(read_all) == f"{path} is missing: {REMEDY}"
    path.write_bytes(whole)
    read_all()


def test_damage_to_the_index_is_named(tmp_path: Path) -> None:
    _, store = trained()
    save(store, tmp_path, max_shard_bytes=40_000)
    path = tmp_path / INDEX
    whole = json.loads(path.read_text())
    for change in (
        {"tables": TABLES | {"tables.0.weight": 701}},
        {"shards": whole["shards"][:-1]},
        {"shards": whole["shards"] * 2},
        {"shards": [{}]},
        {"storage": "float9"},
    ):
        path.write_text(json.dumps(whole | change))
        refusal(lambda: SavedRows(tmp_path))
    path.write_text(json.dumps(whole)[:-9])
    assert refusal(lambda: SavedRows(tmp_path)) == f"{path} is damaged: {REMEDY}"
    path.write_text(json.dumps(whole | {"format": 9}))
    assert "has format 9, but this version reads format 1 only" in refusal(lambda: SavedRows(tmp_path))


def test_an_export_that_fails_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, store = trained()
    save(store, tmp_path)
    before = files(tmp_path)
    _, other = trained(1)
    with largest_file(50_000):
        message = refusal(lambda: save(other, tmp_path, max_shard_bytes=45_000 * 3))
    assert message.startswith(f"The table rows cannot be exported to {tmp_path}: ")
    nearly = list(os.statvfs(tmp_path))
    nearly[1], nearly[4] = 1, ROWS * U * 4 - 1  # f_frsize, f_bavail
    found = os.statvfs_result(nearly)
    with monkeypatch.context() as full:
        full.setattr(os, "statvfs", lambda _: found)
        assert "Exporting 1,001 table rows needs 0.0 GiB" in refusal(lambda: save(other, tmp_path))
    assert files(tmp_path) == before
    assert torch.equal(SavedRows(tmp_path).weights("tables.0.weight", 0, 700), weights[:700])


def test_an_export_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    _, store = trained()
    save(store, tmp_path, max_shard_bytes=20_000)
    weights, other = trained(1)
    save(other, tmp_path, max_shard_bytes=80_000)
    assert files(tmp_path) == [*(f"rows-0000{i}-of-00002.safetensors" for i in (1, 2)), INDEX]
    assert torch.equal(SavedRows(tmp_path).weights("tables.2.weight", 0, 301), weights[700:])
    remove_rows(tmp_path)
    assert files(tmp_path) == []

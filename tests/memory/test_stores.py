"""What every store must do, and what only some of them can get wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engram_lab.errors import UserError
from engram_lab.memory import room
from engram_lab.memory.disk import DiskStore
from engram_lab.memory.host import HostStore, map_records
from engram_lab.memory.layout import RecordLayout
from engram_lab.memory.shard import Shard
from engram_lab.memory.stores import DeviceStore, RowStore, fill

Make = Callable[[int, int], RowStore]


@pytest.fixture(params=["device", "shard", "host", "disk", "disk without cache"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    """Open empty stores of one kind; they are closed in the end.

    The shard is that of the only rank, which holds all rows; one of several writes its own and leaves the
    others (test_a_shard_keeps_its_own_rows).
    """
    opened: list[RowStore] = []

    def build(rows: int, record_bytes: int) -> RowStore:
        if request.param == "device":
            store: RowStore = DeviceStore(rows, record_bytes)
        elif request.param == "shard":
            store = Shard(rows, record_bytes, torch.device("cpu"), rank=0, ranks=1)
        elif request.param == "host":
            store = HostStore(rows, record_bytes, threads=2)
        else:
            layout = RecordLayout(row_dim=record_bytes // 4, rule=None, alignment=4)
            cached = rows // 3 if request.param == "disk" else 0
            path = tmp_path / f"{len(opened)}.rows"
            store = DiskStore(path, layout, rows, "test", cache_rows=cached, threads=4)
        opened.append(store)
        return store

    yield build
    for store in opened:
        store.close()


def random_bytes(rows: int, record_bytes: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, record_bytes), dtype=torch.uint8, generator=generator)


def fill_from(expected: Tensor) -> Callable[[int, int, Tensor], None]:
    return lambda first, count, out: out.copy_(expected[first : first + count])  # type: ignore[return-value]


def everything(store: RowStore) -> Tensor:
    out = torch.empty(store.rows, store.record_bytes, dtype=torch.uint8)
    store.read(torch.arange(store.rows), out)
    return out


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 3000),
    record_bytes=st.sampled_from([4, 20, 64, 208, 4096, 4100]),
    seed=st.integers(0, 2**30),
    operations=st.lists(st.tuples(st.booleans(), st.integers(0, 5000)), max_size=12),
)
def test_equals_a_tensor(
    make: Make, rows: int, record_bytes: int, seed: int, operations: list[tuple[bool, int]]
) -> None:
    """Under any sequence of reads, repeated rows included, and writes."""
    expected = random_bytes(rows, record_bytes, seed)
    store = make(rows, record_bytes)
    fill(store, fill_from(expected), threads=2)
    generator = torch.Generator().manual_seed(seed)
    for number, (writes, n) in enumerate(operations):
        if writes:
            ids = torch.randperm(rows, generator=generator)[:n]
            records = random_bytes(len(ids) + 3, record_bytes, seed + number)
            store.write(ids, records)
            expected[ids] = records[: len(ids)]
        else:
            ids = torch.randint(0, rows, (n,), generator=generator)
            out = torch.full((n + 2, record_bytes), 7, dtype=torch.uint8)
            store.read(ids, out)
            assert torch.equal(out[:n], expected[ids])
            assert (out[n:] == 7).all(), "what lies behind the rows asked for was touched"
    assert torch.equal(everything(store), expected)


@pytest.mark.parametrize("rows", [1, 2, 64, 101])
def test_a_shard_keeps_its_own_rows(rows: int) -> None:
    """Filled with all rows, and written rows of others too, every shard holds its own and no others."""
    ranks, expected = 3, random_bytes(rows, 20, 0)
    shards = [Shard(rows, 20, torch.device("cpu"), rank=rank, ranks=ranks) for rank in range(ranks)]
    ids = torch.randperm(rows, generator=torch.Generator().manual_seed(1))[: rows // 2]
    written = random_bytes(len(ids) + 3, 20, 2)
    for shard in shards:
        fill(shard, fill_from(expected), threads=2)
        shard.write(ids, written)
    expected[ids] = written[: len(ids)]
    for rank, shard in enumerate(shards):
        mine = torch.tensor(range(rank, rows, ranks), dtype=torch.int64).flip(0)
        assert shard.held.rows == len(mine)
        out = torch.full((len(mine) + 1, 20), 7, dtype=torch.uint8)
        shard.read(mine, out)
        assert torch.equal(out[:-1], expected[mine])
        assert (out[-1] == 7).all()


@pytest.mark.parametrize("bad", [-1, 100, 2**40])
def test_rows_that_do_not_exist_are_refused(make: Make, bad: int) -> None:
    store, expected = make(100, 64), random_bytes(100, 64, 1)
    fill(store, fill_from(expected))
    ids, records = torch.tensor([3, bad]), torch.zeros(2, 64, dtype=torch.uint8)
    with pytest.raises((IndexError, RuntimeError)):
        store.read(ids, records)
    with pytest.raises((IndexError, RuntimeError)):
        store.write(ids, records)
    others = torch.arange(100) != 3
    assert torch.equal(everything(store)[others], expected[others])


def test_reading_beside_writing_of_other_rows(make: Make) -> None:
    """One thread reads even rows while another rewrites odd ones: neither sees a byte of the other."""
    rows, record_bytes = 20_000, 72
    store = make(rows, record_bytes)
    expected = random_bytes(rows, record_bytes, 0)
    fill(store, fill_from(expected))
    even, odd = torch.arange(0, rows, 2), torch.arange(1, rows, 2)
    errors: list[BaseException] = []
    done = threading.Event()

    def write() -> None:
        try:
            generator = torch.Generator().manual_seed(1)
            for number in range(60):
                ids = odd[torch.randperm(len(odd), generator=generator)[:4000]]
                records = random_bytes(len(ids), record_bytes, number)
                store.write(ids, records)
                expected[ids] = records
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    writer = threading.Thread(target=write)
    writer.start()
    generator, out = torch.Generator().manual_seed(2), torch.empty(4000, record_bytes, dtype=torch.uint8)
    while not done.is_set():
        ids = even[torch.randperm(len(even), generator=generator)[:4000]]
        store.read(ids, out)
        assert torch.equal(out, expected[ids])
    writer.join()
    assert not errors
    assert torch.equal(everything(store), expected)


def test_rows_that_are_read_while_they_are_written_are_right_afterwards(make: Make) -> None:
    """Also where reading puts rows into a cache: an old value must not stay there."""
    rows, record_bytes = 4000, 64
    store = make(rows, record_bytes)
    fill(store, lambda first, count, out: out.zero_())  # type: ignore[arg-type, return-value]
    out = torch.empty(1500, record_bytes, dtype=torch.uint8)
    generator, done = torch.Generator().manual_seed(2), threading.Event()

    def read() -> None:
        while not done.is_set():
            store.read(torch.randint(0, rows, (1500,), generator=generator), out)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(1, 80):
        ids = torch.randperm(rows)
        store.write(ids, torch.full((rows, record_bytes), number, dtype=torch.uint8))
        if number % 20 == 0:
            assert (everything(store) == number).all()
    done.set()
    reader.join()
    assert (everything(store) == 79).all()


def test_filling_reports_progress_and_stops_at_the_first_error(make: Make) -> None:
    rows, record_bytes = 120_000, 512
    store, seen = make(rows, record_bytes), []
    fill(store, lambda first, count, out: out.zero_(), lambda done, of: seen.append((done, of)))  # type: ignore[arg-type, return-value]
    assert seen == sorted(seen)
    assert seen[-1] == (rows, rows)
    assert len(seen) > 2

    def broken(first: int, count: int, out: Tensor) -> None:
        if first:
            raise ValueError(f"row {first}")

    with pytest.raises(ValueError, match="row "):
        fill(store, broken)


def test_too_little_memory_is_said_before_any_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"need 931322.6 GiB .* GiB are available; set memory.tier to disk"):
        HostStore(10**10, 10**5)
    with pytest.raises(UserError, match=r"lower model\.engram\.rows_per_head"):
        DeviceStore(10**10, 10**5)
    monkeypatch.setattr("engram_lab.memory.room.available_memory", lambda: 999)
    with pytest.raises(UserError, match=r"need 0\.0 GiB"):
        HostStore(10, 100)


def test_the_smallest_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Control groups of both versions, limits of parents included; file caches can be given back."""

    def group(path: str, version: int, limit: str, used: int, cache: int) -> None:
        folder = tmp_path / path
        folder.mkdir(parents=True, exist_ok=True)
        names = ("memory.max", "memory.current")
        if version == 1:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\n")

    monkeypatch.setattr(room, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(room, "_memberships", lambda: ["0::/a/b", "4:memory:/c", "2:cpu,cpuacct:/d"])
    free = room.available_memory()
    assert free > 2**20
    group("a/b", 2, "max", 10, 0)
    assert room.available_memory() > 2**20
    group("a", 2, "1000", 900, 50)
    assert room.available_memory() == 150
    group("memory/c", 1, "500", 490, 30)
    assert room.available_memory() == 40
    group("", 2, "100", 99, 0)
    assert room.available_memory() == 1


def test_a_mapping_is_of_exactly_the_size_asked_for() -> None:
    records = map_records(3, 4100)
    assert records.untyped_storage().nbytes() == 3 * 4100
    assert (records == 0).all()


def test_an_error_in_a_thread_reaches_the_caller() -> None:
    from engram_lab.memory.row_copy import Workers

    workers, ended = Workers(3), []

    def work(first: int, last: int) -> None:
        if first == 0:
            raise RuntimeError("a thread died")
        ended.append((first, last))

    with pytest.raises(RuntimeError, match="a thread died"):
        workers.share(9, work, grain=1)
    assert sorted(ended) == [(3, 6), (6, 9)]
    workers.close()
    with pytest.raises(RuntimeError):
        workers.share(9, work, grain=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_registered_mapping_is_pinned_and_given_back() -> None:
    store = HostStore(10_000, 208)
    assert store.records.is_pinned()
    expected = random_bytes(10_000, 208, 0)
    fill(store, fill_from(expected))
    assert torch.equal(store.records.to("cuda", non_blocking=True).cpu(), expected)
    on_device = DeviceStore(10_000, 208, "cuda")
    fill(on_device, fill_from(expected))
    ids = torch.randperm(10_000)[:500]
    out = torch.empty(500, 208, dtype=torch.uint8, device="cuda")
    on_device.read(ids.cuda(), out)
    assert torch.equal(out.cpu(), expected[ids])
    on_device.write(ids.cuda(), out.flip(0))
    expected[ids] = expected[ids].flip(0)
    assert torch.equal(on_device.records.cpu(), expected)
    mapping = store.records
    store.close()
    assert not mapping.is_pinned()

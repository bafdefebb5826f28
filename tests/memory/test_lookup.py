"""Read-only tables give what a resident one gives, from wherever their rows lie."""

import threading

import pytest
import torch
from torch import Tensor

from engram_lab.memory.host import HostStore
from engram_lab.memory.hot_rows import HotRows, hottest
from engram_lab.memory.layout import RecordLayout
from engram_lab.memory.lookup import ServingTable
from engram_lab.memory.resident import ResidentTable
from engram_lab.memory.stores import DeviceStore, RowStore

ROWS, CPU = 301, torch.device("cpu")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
STORAGES = ["float32", "bfloat16", "float8", "float8_row"]


def filled(storage: str, row_dim: int, device: str = "cpu") -> tuple[ResidentTable, RecordLayout, Tensor]:
    """A resident table, the layout of its rows as records, and the records."""
    table = ResidentTable(ROWS, row_dim, storage=storage)
    torch.nn.init.normal_(table.weight, generator=torch.Generator().manual_seed(1))
    layout = RecordLayout(row_dim=row_dim, weights=storage, rule=None, alignment=4)
    records = torch.empty(ROWS, layout.record_bytes, dtype=torch.uint8)
    layout.encode(table.weight.detach(), records)
    return table.to(device), layout, records


def stored(records: Tensor, host: bool = True, device: str = "cpu") -> RowStore:
    rows, record_bytes = records.shape
    store = HostStore(rows, record_bytes, threads=2) if host else DeviceStore(rows, record_bytes, device)
    store.write(torch.arange(rows, device=store.device), records.to(store.device))
    return store


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("row_dim", [16, 40])
@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_a_reading_equals_the_resident_one(storage: str, row_dim: int, host: bool, kind: torch.dtype) -> None:
    resident, layout, records = filled(storage, row_dim)
    table = ServingTable(stored(records, host), layout, device=CPU)
    addresses = torch.randint(ROWS, (3, 7, 4), dtype=kind)
    reading = table.begin(addresses)()
    assert reading.shape == (3, 7, 4 * row_dim)
    assert torch.equal(reading, resident(addresses).detach())
    assert ServingTable(table.store, layout, device=CPU, dtype=torch.bfloat16).begin(addresses)().dtype == (
        torch.bfloat16
    )
    table.close()
    table.store.close()


def test_nothing_is_read_of_nothing() -> None:
    _, layout, records = filled("float32", 8)
    table = ServingTable(stored(records), layout, device=CPU)
    assert table.begin(torch.empty(2, 0, 4, dtype=torch.int32))().shape == (2, 0, 32)


class SlowStore(DeviceStore):
    """Reads only when told to."""

    def __init__(self, rows: int, record_bytes: int) -> None:
        super().__init__(rows, record_bytes)
        self.gate = threading.Event()

    def read(self, ids: Tensor, out: Tensor) -> None:
        assert self.gate.wait(10)
        super().read(ids, out)


def test_begin_does_not_wait_for_the_rows_and_readings_keep_their_order() -> None:
    resident, layout, records = filled("float32", 8)
    store = SlowStore(*records.shape)
    store.write(torch.arange(ROWS), records)
    table = ServingTable(store, layout, device=CPU)
    addresses = torch.randint(ROWS, (5, 2, 3, 4))
    joins = [table.begin(batch) for batch in addresses]
    store.gate.set()
    for batch, join in reversed(list(zip(addresses, joins, strict=True))):
        assert torch.equal(join(), resident(batch).detach())


def test_row_numbers_may_be_found_on_the_tables_threads() -> None:
    resident, layout, records = filled("float8", 40)
    table = ServingTable(stored(records), layout, device=CPU)
    batches, found, gate = torch.randint(ROWS, (3, 2, 5, 4), dtype=torch.int32), [], threading.Event()

    def find(batch: int) -> Tensor:
        assert gate.wait(10)
        found.append(threading.current_thread())
        return batches[batch]

    joins = [table.begin_found(lambda b=b: find(b), (2, 5, 4)) for b in range(3)]
    gate.set()
    for batch, join in zip(batches, joins, strict=True):
        assert torch.equal(join(), resident(batch).detach())
    assert len(found) == 3
    assert threading.current_thread() not in found


def test_rows_are_found_while_those_of_another_look_up_are_read() -> None:
    resident, layout, records = filled("float32", 8)
    store = SlowStore(*records.shape)
    store.write(torch.arange(ROWS), records)
    table = ServingTable(store, layout, device=CPU)
    first, second = torch.randint(ROWS, (2, 2, 3, 4))

    def find() -> Tensor:
        store.gate.set()  # the first look-up is read only then
        return second

    joins = [table.begin(first), table.begin_found(find, second.shape)]
    for addresses, join in zip((first, second), joins, strict=True):
        assert torch.equal(join(), resident(addresses).detach())


def test_an_error_in_finding_row_numbers_is_raised_at_the_join() -> None:
    _, layout, records = filled("float32", 8)

    def find() -> Tensor:
        raise ValueError("no such token")

    join = ServingTable(stored(records), layout, device=CPU).begin_found(find, (1, 1, 4))
    with pytest.raises(ValueError, match="no such token"):
        join()


def test_a_row_that_does_not_exist_is_an_error_at_the_join() -> None:
    _, layout, records = filled("float32", 8)
    join = ServingTable(stored(records), layout, device=CPU).begin(torch.full((1, 1, 2), ROWS))
    with pytest.raises(IndexError, match="does not exist"):
        join()


def test_the_hottest_rows_are_those_counted_over_all_batches() -> None:
    batches = [torch.tensor([[5, 5, 9], [1, 9, 5]]), torch.tensor([1, 1, 7, 9]), torch.tensor([7, 3])]
    assert hottest(batches, 4).tolist() == [1, 5, 9, 7]  # three each, the lower number first, then two
    assert hottest(batches, 100).tolist() == [1, 5, 9, 7, 3]


@pytest.mark.parametrize("count", [1, 5, 300, 20_000])
def test_every_kept_row_is_found_and_no_other(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    rows = torch.unique(torch.randint(1 << 33, (count,), generator=generator))
    kept = rows[torch.randperm(len(rows), generator=generator)]
    store = DeviceStore(1, 4)
    store.read = lambda ids, out: out.view(torch.int32).copy_(ids.to(torch.int32)[:, None])  # type: ignore[method-assign]
    hot = HotRows.load(store, kept, CPU)
    assert hot.find(kept).tolist() == list(range(len(kept)))
    others = kept + 1
    others = others[~torch.isin(others, kept)]
    assert (hot.find(others) == -1).all()
    assert hot.probes <= 16
    assert torch.equal(hot.records.view(torch.int32)[:, 0], kept.to(torch.int32))


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("row_dim", [16, 80])
@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("few", [0, 10**9])
@pytest.mark.parametrize("keep", [0, 50])
def test_on_a_gpu_every_path_reads_the_same(
    storage: str, row_dim: int, host: bool, few: int, keep: int
) -> None:
    resident, layout, records = filled(storage, row_dim, "cuda")
    store, device = stored(records, host, "cuda"), torch.device("cuda", 0)
    hot = HotRows.load(store, torch.randperm(ROWS)[:keep], device) if keep else None
    table = ServingTable(store, layout, device=device, hot=hot, few=few)
    for shape in ((1, 1, 4), (3, 700, 4), (2, 5, 4), (2, 900, 4), (1, 1, 4)):
        addresses = torch.randint(ROWS, shape, device=device, dtype=torch.int32)
        joins = [table.begin(addresses), table.begin(addresses.cpu())]
        if host:
            joins.append(table.begin_found(addresses.cpu, shape))
        for join in joins:
            assert torch.equal(join(), resident(addresses).detach())
    table.close()
    store.close()


@pytest.mark.gpu
@GPU
def test_a_cuda_graph_reads_new_addresses_at_every_replay() -> None:
    resident, layout, records = filled("float8", 80, "cuda")
    store, device = stored(records), torch.device("cuda", 0)
    table = ServingTable(store, layout, device=device, few=0)
    addresses = torch.zeros(4, 1, 16, dtype=torch.int32, device=device)
    table.few = 10**9
    table.begin(addresses)()
    table.few = 0
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        reading = table.begin(addresses)()
    for seed in range(3):
        torch.manual_seed(seed)
        addresses.copy_(torch.randint(ROWS, addresses.shape, device=device))
        graph.replay()
        assert torch.equal(reading, resident(addresses).detach())
    store.close()


@pytest.mark.gpu
@GPU
def test_a_slow_look_up_holds_up_none_that_follow() -> None:
    """One of many rows may still be read while many steps' are asked for, read and joined."""
    resident, layout, records = filled("float32", 8, "cuda")
    store = HostStore(*records.shape, threads=2)
    store.write(torch.arange(ROWS), records)
    gate, read = threading.Event(), store.read

    def gated(ids: Tensor, out: Tensor) -> None:
        assert len(ids) < 1000 or gate.wait(30)
        read(ids, out)

    store.read = gated  # type: ignore[method-assign]
    table = ServingTable(store, layout, device=torch.device("cuda", 0), few=0)
    many = torch.randint(ROWS, (3, 700, 4), device="cuda")
    slow = table.begin(many)
    for _ in range(20):
        few = torch.randint(ROWS, (2, 5, 4), device="cuda")
        assert torch.equal(table.begin(few)(), resident(few).detach())
    gate.set()
    assert torch.equal(slow(), resident(many).detach())
    table.close()
    store.close()

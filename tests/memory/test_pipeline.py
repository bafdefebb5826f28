"""Rows on their way are never stale, whatever comes late; failures stop the run and nothing hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from engram_lab.memory.host import HostStore
from engram_lab.memory.layout import RecordLayout, RowRule
from engram_lab.memory.ledger import Ledger, Returning
from engram_lab.memory.pipeline import LAG, RowPipeline
from engram_lab.memory.row_optimizer import RowOptimizer
from engram_lab.memory.stores import DeviceStore, RowStore

CPU = torch.device("cpu")
ROWS, U, H = 60, 4, 3


class Slow(HostStore):
    """A host store whose writes, and reads, take their time, so that steps overtake them."""

    def __init__(self, rows: int, record_bytes: int, *, write: float = 0.0, read: float = 0.0) -> None:
        super().__init__(rows, record_bytes, threads=1, registered=False)
        self.write_takes, self.read_takes = write, read

    def write(self, ids: Tensor, records: Tensor) -> None:
        time.sleep(self.write_takes)
        super().write(ids, records)

    def read(self, ids: Tensor, out: Tensor) -> None:
        half = len(ids) // 2
        super().read(ids[:half], out[:half])
        time.sleep(self.read_takes)
        super().read(ids[half:], out[half:])


def optimizer(layout: RecordLayout) -> RowOptimizer:
    return RowOptimizer(
        layout, betas=(0.9, 0.95), eps=1e-8, momentum=0.9, rates=lambda step: 0.05 / step**0.5, seed=3
    )


def fresh(store: RowStore, layout: RecordLayout) -> None:
    records = torch.empty(ROWS, layout.record_bytes, dtype=torch.uint8)
    layout.encode(torch.randn(ROWS, U, generator=torch.Generator().manual_seed(1)), records)
    store.write(torch.arange(ROWS), records)


def steps(count: int, micro_batches: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(2)
    heads = torch.arange(H) * (ROWS // H)
    return [
        [
            (torch.randint(ROWS // H, (1, 2, 5, H), generator=generator) + heads).int()
            for _ in range(micro_batches)
        ]
        for _ in range(count)
    ]


def train(
    store: RowStore,
    layout: RecordLayout,
    *,
    depth: int,
    micro_batches: int = 1,
    count: int = 25,
    evaluate_every: int | None = None,
    between: Callable[[], None] = lambda: None,
) -> tuple[list[float], Tensor]:
    """Train on a loss that every row and its position enter; return the losses and the final records."""
    fresh(store, layout)
    pipeline = RowPipeline(store, layout, optimizer(layout) if layout.rule else None, (0,), device=CPU)
    batches, losses = steps(count, micro_batches), []
    announced = 0
    try:
        for number in range(1, count + 1):
            while announced < min(count, number + depth):
                announced += 1
                pipeline.announce(announced, batches[announced - 1])
            pipeline.begin(number)
            for place in range(micro_batches):
                reading = pipeline.reading(place)
                loss = (reading * torch.arange(1.0, H * U + 1)).sum(-1).sin().mean()
                losses.append(loss.item())
                if layout.rule:
                    loss.backward()
            pipeline.commit(0.5)
            between()
            if evaluate_every and number % evaluate_every == 0:
                losses.append(pipeline.read(0, batches[number - 1][0][0]).sum().item())
        pipeline.flush()
        records = torch.empty(ROWS, layout.record_bytes, dtype=torch.uint8)
        store.read(torch.arange(ROWS), records)
        return losses, records
    finally:
        pipeline.close()


@pytest.mark.parametrize("rule", ["adam", "adagrad", "sinkhorn"])
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_no_stale_row_is_read_however_late_writes_land(rule: RowRule, weights: str, depth: int) -> None:
    layout = RecordLayout(row_dim=U, rule=rule, weights=weights)  # type: ignore[arg-type]
    options = {"depth": depth, "micro_batches": 2, "evaluate_every": 7}
    in_place = train(DeviceStore(ROWS, layout.record_bytes), layout, **options)  # type: ignore[arg-type]
    late = Slow(ROWS, layout.record_bytes, write=0.004, read=0.001)
    travelled = train(late, layout, **options)  # type: ignore[arg-type]
    assert travelled[0] == in_place[0]
    assert torch.equal(travelled[1], in_place[1])


def test_without_patches_the_late_writes_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = RecordLayout(row_dim=U)
    in_place = train(DeviceStore(ROWS, layout.record_bytes), layout, depth=2)
    monkeypatch.setattr(Ledger, "enter", lambda *_: Returning(0, {}))
    travelled = train(Slow(ROWS, layout.record_bytes, write=0.004), layout, depth=2)
    assert travelled[0] != in_place[0]


def test_rows_without_a_rule_are_only_read() -> None:
    layout = RecordLayout(row_dim=U, rule=None)
    store = Slow(ROWS, layout.record_bytes)
    losses, records = train(store, layout, depth=2, count=3)
    before = DeviceStore(ROWS, layout.record_bytes)
    fresh(before, layout)
    assert torch.equal(records, before.records)
    assert len(losses) == 3


def test_steps_do_not_run_far_ahead_of_the_writes() -> None:
    layout = RecordLayout(row_dim=U)
    store = Slow(ROWS, layout.record_bytes, write=0.01)
    lags: list[int] = []
    fresh(store, layout)
    pipeline = RowPipeline(store, layout, optimizer(layout), (0,), device=CPU)
    for number, addresses in enumerate(steps(12, 1), start=1):
        pipeline.announce(number, addresses)
        pipeline.begin(number)
        pipeline.reading(0).sum().backward()
        pipeline.commit()
        lags.append(pipeline.committed - pipeline.landed)
    assert max(lags) <= LAG
    economy = pipeline.take_economy()
    assert (economy.steps, economy.reads) == (12, 12 * 2 * 5 * H)
    assert 0 < economy.repeated < economy.unique <= economy.reads
    assert economy.bytes_moved == 2 * economy.unique * layout.record_bytes
    assert economy.waited > 0
    assert pipeline.take_economy().steps == 0
    pipeline.close()


class Broken(HostStore):
    """A host store of which one method fails from the third call on."""

    def __init__(self, rows: int, record_bytes: int, method: str) -> None:
        super().__init__(rows, record_bytes, threads=1, registered=False)
        self.failing, self.calls = method, 0

    def _tick(self, method: str) -> None:
        if method == self.failing:
            self.calls += 1
            if self.calls > 3:
                raise OSError(28, "No space left on device")

    def read(self, ids: Tensor, out: Tensor) -> None:
        self._tick("read")
        super().read(ids, out)

    def write(self, ids: Tensor, records: Tensor) -> None:
        self._tick("write")
        super().write(ids, records)


@pytest.fixture
def alarm() -> Iterator[None]:
    """Fail rather than hang."""
    before = threading.active_count()
    yield
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before, "threads are left behind"


@pytest.mark.usefixtures("alarm")
@pytest.mark.parametrize("method", ["read", "write"])
def test_a_failure_in_the_background_stops_the_step(method: str) -> None:
    layout = RecordLayout(row_dim=U)
    with pytest.raises(OSError, match="No space left"):
        train(Broken(ROWS, layout.record_bytes, method), layout, depth=2)


@pytest.mark.usefixtures("alarm")
def test_interruption_lets_writes_under_way_land() -> None:
    layout = RecordLayout(row_dim=U)
    store = Slow(ROWS, layout.record_bytes, write=0.02)
    committed = 0

    def interrupt() -> None:
        nonlocal committed
        committed += 1
        if committed == 3:
            raise KeyboardInterrupt

    written: list[Tensor] = []
    close = store.close
    store.close = lambda: (written.append(store.records.clone()), close())[1]  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        train(store, layout, depth=2, between=interrupt)
    reference = DeviceStore(ROWS, layout.record_bytes)
    _, records = train(reference, layout, depth=0, count=3)
    assert torch.equal(written[0], records)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("host", [True, False])
def test_a_step_is_launched_while_the_device_is_busy(host: bool) -> None:
    """Rows that threads gather are waited for, but never what the device has still to do."""
    layout, device = RecordLayout(row_dim=16), torch.device("cuda", 0)
    size = (ROWS, layout.record_bytes)
    store: RowStore = HostStore(*size, threads=1) if host else DeviceStore(*size, device)
    records = torch.empty(size, dtype=torch.uint8)
    layout.encode(torch.randn(ROWS, 16), records)
    store.write(torch.arange(ROWS, device=store.device), records.to(store.device))
    pipeline, batches = RowPipeline(store, layout, optimizer(layout), (0,), device=device), steps(LAG + 4, 1)
    scale = torch.ones((), device=device)

    def step(number: int) -> None:
        pipeline.announce(number, batches[number - 1])
        pipeline.begin(number)
        pipeline.reading(0).sum().backward()
        pipeline.commit(scale)

    for number in range(1, LAG + 4):
        step(number)
    pipeline.flush()
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # cycles: about a second
    busy = torch.cuda.current_stream().record_event()
    step(LAG + 4)
    assert not busy.query()
    pipeline.flush()
    assert busy.query() or not host  # rows in place have landed once they are launched
    pipeline.close()

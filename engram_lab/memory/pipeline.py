"""Rows on their way: gathered ahead of the step, made current, trained, and written back in order.

    announce(3) ──plan, gather──> copy ──┐                            (thread "gather", copy stream)
    begin(2) <── wait, patch, catch up ──┘   forward, backward        (the step)
    commit(1) ── update ──> copy back ── write to the store           (thread "write", copy stream)

Rows for step s are gathered while earlier steps still train. A row they change is stale in what was gathered
unless their update had landed in the store before the gather began; how far updates had landed is noted with
every gather, and `begin` copies the rows of every later update over the stale ones, on the device, in order.

Shapes: A micro-batches of a step, M memories, B batch, T length, H hash heads, n unique rows, U row width.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engram_lab.memory.buffers import Buffers, Slot
from engram_lab.memory.layout import RecordLayout
from engram_lab.memory.ledger import Ledger
from engram_lab.memory.plan import Plan, deduplicate
from engram_lab.memory.resident import RowStorage
from engram_lab.memory.row_copy import Workers
from engram_lab.memory.row_optimizer import RowOptimizer
from engram_lab.memory.service import (
    Economy,
    Value,
    as_one_batch,
    current_weights,
    evaluated_reading,
    trained_reading,
)
from engram_lab.memory.stores import DeviceStore, RowStore
from engram_lab.memory.touched import TouchedRows

LAG = 4  # steps whose updates may be on their way to the store before the step waits for them


@dataclass(eq=False)
class Gathered:
    """The rows of one step, between their gather and the landing of their update.

    Attributes:
        step: optimizer step, counted from 1.
        plan: which rows, and where positions find them.
        slot: the records, here or on their way.
        ids: `plan.ids` on the device.
        positions: `plan.positions` on the device.
        stale: for each step whose update may be missing in the records, in order: places of its rows in its
            own records and in these.
        repeated: rows that the step before had too.
        rows: current weights [n, U] while the step computes: a leaf that collects the gradient.
    """

    step: int
    plan: Plan
    slot: Slot
    ids: Tensor
    positions: Tensor
    stale: dict[int, tuple[Tensor, Tensor]]
    repeated: int
    rows: Tensor | None = None

    @property
    def records(self) -> Tensor:
        """The records on the device, [n, record_bytes]."""
        return self.slot.records[: len(self.ids)]


class RowPipeline:
    """Serve the rows of coming steps from a store, and take their updates back: a `RowService` of one rank.

    Args:
        store: where the rows live; a `DeviceStore` is read and written in place, nothing is gathered ahead.
        layout: what a record holds.
        optimizer: catches rows up and updates them; None for rows that are only read.
        first_row: global number of each memory's first row, [M].
        device: where the network computes.
        storage: format that rows are rounded to where they are read; gradients pass it unchanged.
        committed: steps already trained, for a run that is resumed.
        threads: that plan a step; None takes one per processor.
    """

    def __init__(
        self,
        store: RowStore,
        layout: RecordLayout,
        optimizer: RowOptimizer | None,
        first_row: Sequence[int],
        *,
        device: torch.device,
        storage: RowStorage = "float32",
        committed: int = 0,
        threads: int | None = None,
    ) -> None:
        self.store, self.layout, self.optimizer = store, layout, optimizer
        self.first_row, self.device, self.storage = tuple(first_row), device, storage
        self.committed = self.landed = committed
        self.touched = TouchedRows(store.rows)
        self._economy = Economy()
        self._in_place = isinstance(store, DeviceStore)
        self._buffers = Buffers(layout.record_bytes, device)
        on_device: dict[str, Any] = {}
        if device.index:  # a new thread is on the first GPU
            on_device = {"initializer": torch.cuda.set_device, "initargs": (device,)}
        self._gathering = ThreadPoolExecutor(1, thread_name_prefix="gather", **on_device)
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="write", **on_device)
        self._planners, self._ledger = Workers(threads), Ledger(store.rows)
        self._announced: dict[int, Future[Gathered]] = {}
        self._open: Gathered | None = None
        # Shared with the background threads:
        self._changed = threading.Condition()
        self._gathered_at: dict[int, int] = {}  # for each gathered step, `landed` at its gather
        self._updated: dict[int, Gathered] = {}  # trained steps that others may have to be patched from
        self._failure: BaseException | None = None

    def announce(self, step: int, addresses: Sequence[Tensor]) -> None:
        """Begin to fetch the rows of a step: `addresses` [M, B, T, H] on the CPU, one a micro-batch."""
        self._announced[step] = self._gathering.submit(self._gather, step, addresses)

    def begin(self, step: int) -> None:
        """Wait for the rows of the step, make them current, and open them for reading and gradients."""
        started = time.perf_counter()
        gathered = self._announced.pop(step).result()
        self._economy.waited += time.perf_counter() - started
        self._raise_failure()
        gathered.slot.arrive()
        if self._in_place:
            self.store.read(gathered.ids, gathered.records)
        for earlier in sorted(gathered.stale):
            source, target = gathered.stale[earlier]
            patch = _words(self._updated[earlier].records).index_select(0, source)
            _words(gathered.records).index_copy_(0, target, patch)
        with self._changed:
            del self._gathered_at[step]
        self._release()
        rows = current_weights(self.layout, self.optimizer, gathered.records, step - 1)
        gathered.rows = rows.requires_grad_(self.optimizer is not None)
        self._open = gathered

    def reading(self, micro_batch: int) -> Tensor:
        """Return what each memory reads in a micro-batch of the open step, [M, B, T, H * U]."""
        rows, positions = self._opened()
        return trained_reading(rows, positions[micro_batch], self.storage)

    def gradients(self) -> Tensor:
        """Return the gradient [n, U] of the open step's rows."""
        rows, _ = self._opened()
        return torch.zeros_like(rows) if rows.grad is None else rows.grad

    def gradient_norm(self) -> Tensor:
        """Return the norm of the gradient of the open step's rows, to be counted in clipping."""
        return self.gradients().norm()

    def commit(self, scale: Tensor | float = 1.0) -> None:
        """Update the rows of the open step with `scale` times their gradient, and send them back."""
        self._raise_failure()
        gathered = self._open
        assert gathered is not None
        if self.optimizer is not None:
            self.optimizer.update(gathered.records, gathered.ids, self.gradients(), gathered.step, scale)
        gathered.rows = self._open = None
        self.committed = gathered.step
        moved = 0 if self._in_place else 2 * len(gathered.ids) * self.layout.record_bytes
        self._economy.count(len(gathered.ids), gathered.plan.reads, gathered.repeated, moved)
        if self._in_place or self.optimizer is None:
            if self.optimizer is not None:
                self.store.write(gathered.ids, gathered.records)
            self._landed(gathered)
            self._buffers.give(gathered.slot)
            return
        gathered.slot.download(len(gathered.ids))
        with self._changed:
            self._updated[gathered.step] = gathered
        self._writing.submit(self._land, gathered)
        started = time.perf_counter()
        self._wait(lambda: self.committed - self.landed <= LAG)
        self._economy.waited += time.perf_counter() - started

    def read(self, memory: int, addresses: Tensor) -> Tensor:
        """Return the reading [..., H * U] at `addresses` [..., H] of one memory, as of the last commit.

        For evaluation: it waits for all updates, and changes nothing.
        """
        self.flush()
        plan = deduplicate([as_one_batch(addresses)], self.first_row[memory : memory + 1], self._planners)
        records = torch.empty((len(plan.ids), self.layout.record_bytes), dtype=torch.uint8)
        if self._in_place:
            records = records.to(self.device)
            self.store.read(plan.ids.to(self.device), records)
        else:
            self._gathering.submit(self.store.read, plan.ids, records).result()
        rows = self.weights(records.to(self.device))
        positions = plan.positions.to(self.device)
        return evaluated_reading(rows, positions, addresses, self.storage)

    def weights(self, records: Tensor) -> Tensor:
        """Return the float32 weights [n, U] of `records` (uint8 [n, record_bytes]) as of the last commit."""
        return current_weights(self.layout, self.optimizer, records, self.committed)

    def flush(self) -> None:
        """Wait until every update is in the store."""
        self._wait(lambda: self.landed == self.committed)

    def of_all_ranks(self, value: Value) -> list[Value]:
        """Return `value`, given by the only rank."""
        return [value]

    @contextmanager
    def whole(self) -> Iterator[RowStore]:
        """Give the store, from which all rows can be read."""
        self.flush()
        yield self.store

    def close(self) -> None:
        """End the threads, letting updates under way land, and close the store."""
        self._gathering.shutdown(cancel_futures=True)
        self._writing.shutdown()
        self._planners.close()
        self.store.close()

    def take_economy(self) -> Economy:
        """Return the sums since the last call, and start anew."""
        taken, self._economy = self._economy, Economy()
        return taken

    def _gather(self, step: int, addresses: Sequence[Tensor]) -> Gathered:
        plan = deduplicate(addresses, self.first_row, self._planners)
        n = len(plan.ids)
        with self._changed:
            # Noted before the first row is read: an update that lands meanwhile is patched all the same.
            self._gathered_at[step] = landed = self.landed
        slot = self._buffers.take(n)
        if not self._in_place:
            self.store.read(plan.ids, slot.host[:n])
        changing = not self._in_place and self.optimizer is not None
        returning = self._ledger.enter(step, plan.ids, landed if changing else step - 1, self._planners)
        places = [place for pair in returning.stale.values() for place in pair]
        moved = slot.upload(0 if self._in_place else n, plan.ids, plan.positions, *places)
        pairs = zip(moved[2::2], moved[3::2], strict=True)
        return Gathered(
            step=step,
            plan=plan,
            slot=slot,
            ids=moved[0],
            positions=moved[1],
            stale=dict(zip(returning.stale, pairs, strict=True)),
            repeated=returning.repeated,
        )

    def _land(self, gathered: Gathered) -> None:
        try:
            if self._failure is None:  # behind a failed write nothing may land
                gathered.slot.downloaded()
                self.store.write(gathered.plan.ids, gathered.slot.host[: len(gathered.plan.ids)])
                self._landed(gathered)
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _landed(self, gathered: Gathered) -> None:
        self.touched.mark(gathered.plan.ids)
        with self._changed:
            self.landed = gathered.step
            self._changed.notify_all()

    def _opened(self) -> tuple[Tensor, Tensor]:
        """Return rows [n, U] and positions [A, M, H, B, T] of the open step."""
        assert self._open is not None, "no step has begun"
        assert self._open.rows is not None
        return self._open.rows, self._open.positions

    def _release(self) -> None:
        """Give back the buffers of updates that landed before every gather that is still to be used."""
        with self._changed:
            safe = min([self.landed, *self._gathered_at.values()])
            done = [self._updated.pop(step) for step in [*self._updated] if step <= safe]
        for gathered in done:
            self._buffers.give(gathered.slot)

    def _wait(self, reached: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: reached() or self._failure is not None)
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


def _words(records: Tensor) -> Tensor:
    """View `records` [n, record_bytes] as larger elements, which copies fast."""
    return records.view(torch.int64 if records.shape[1] % 8 == 0 else torch.int32)

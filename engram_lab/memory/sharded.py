"""The sharded tier: rows on the device of the rank that owns them, fetched by all ranks together.

    announce(3) ── plan, sort by owner, tell the owners, plan what to hand out    (thread "gather", CPU group)
    begin(2) ───── owner: read in place, catch up ── rows to those who asked      (the step, training group)
                   forward, backward
    gradients(2) ─ row gradients to their owners ── summed over ranks
    commit(2) ──── owner: update in place

Who needs what is settled ahead of the step, sizes included, so that the step waits for no device. A row is
sent to a rank once however often that rank reads it, and only its owner has its optimizer state. A rank's
loss is the mean over its share of the batch; gradients of rows are averaged over ranks, as DDP does with
those of parameters, and added up rank by rank, so that a run repeats itself bit for bit.

Shapes: A micro-batches of a step, M memories, B batch, T length, H hash heads, U row width, W ranks; n unique
rows that this rank reads, q rows that it hands out (a row once for every rank that reads it), k of them
distinct.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numba import njit
from torch import Tensor

from engram_lab.memory.buffers import Buffers, Slot
from engram_lab.memory.layout import RecordLayout
from engram_lab.memory.ledger import Ledger
from engram_lab.memory.peers import Peers, total
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
from engram_lab.memory.shard import AllShards, Shard
from engram_lab.memory.stores import RowStore
from engram_lab.memory.touched import TouchedRows


@dataclass(eq=False)
class Routed:
    """The rows of one step and their ways between ranks.

    Attributes:
        plan: which rows this rank reads; their places here are those in the order of their owners.
        wanted: rows that this rank gets from each rank, [W], n together.
        served: which rows this rank hands out, k, and which of them each of the q is.
        given: rows that it hands to each rank, [W], q together.
        slot: brings the following to the device.
        positions: place among the n rows of every row that is read, [A, M, H, B, T].
        ids: `served.ids` on the device, [k].
        places: which of the k rows each of the q is, int64 [q].
        repeated: how many of the k rows it handed out in the step before, too.
        records: the k records, once the step has begun.
        rows: weights [n, U] while the step computes: a leaf that collects the gradient.
        gradients: sums [k, U] over the ranks, once they were asked for.
    """

    plan: Plan
    wanted: list[int]
    served: Plan
    given: list[int]
    slot: Slot
    positions: Tensor
    ids: Tensor
    places: Tensor
    repeated: int = 0
    records: Tensor | None = None
    rows: Tensor | None = None
    gradients: Tensor | None = None


class ShardedPipeline:
    """Serve the rows of coming steps from the ranks that own them: a `RowService`.

    Args:
        store: this rank's rows.
        peers: the other ranks.
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
        store: Shard,
        peers: Peers,
        layout: RecordLayout,
        optimizer: RowOptimizer | None,
        first_row: Sequence[int],
        *,
        device: torch.device,
        storage: RowStorage = "float32",
        committed: int = 0,
        threads: int | None = None,
    ) -> None:
        self.store, self.peers, self.layout, self.optimizer = store, peers, layout, optimizer
        self.first_row, self.device, self.storage = tuple(first_row), device, storage
        self.committed = committed
        self.touched = TouchedRows(store.rows)
        self._economy = Economy()
        self._buffers = Buffers(layout.record_bytes, device)
        self._planners, self._ledger = Workers(threads), Ledger(store.held.rows)
        self._announced: dict[int, Future[Routed]] = {}
        self._open: Routed | None = None
        self._step = 0

    def announce(self, step: int, addresses: Sequence[Tensor]) -> None:
        """Begin to settle who needs which rows in a step: `addresses` [M, B, T, H], one a micro-batch."""
        self._announced[step] = self.peers.submit(self._route_step, step, addresses)

    def begin(self, step: int) -> None:
        """Fetch the rows of the step from their owners, and open them for reading and gradients."""
        started = time.perf_counter()
        routed = self._announced.pop(step).result()
        self._economy.waited += time.perf_counter() - started
        self._fetch(routed, step - 1)
        assert routed.rows is not None
        routed.rows.requires_grad_(self.optimizer is not None)
        self._open, self._step = routed, step

    def reading(self, micro_batch: int) -> Tensor:
        """Return what each memory reads in a micro-batch of the open step, [M, B, T, H * U]."""
        routed = self._opened()
        assert routed.rows is not None
        return trained_reading(routed.rows, routed.positions[micro_batch], self.storage)

    def gradients(self) -> Tensor:
        """Return the gradient [k, U], over all ranks, of the rows this one hands out in the open step."""
        routed = self._opened()
        if routed.gradients is None:
            assert routed.rows is not None
            sums = routed.rows.new_zeros((len(routed.ids), self.layout.row_dim))
            if self.optimizer is not None:
                arrived = sums.new_empty((len(routed.places), self.layout.row_dim))
                grad = routed.rows.grad
                sent = torch.zeros_like(routed.rows) if grad is None else grad.contiguous()
                dist.all_to_all_single(arrived, sent, routed.given, routed.wanted)
                # A rank's rows are distinct: no two sums meet, and the order is that of the ranks.
                parts = zip(arrived.split(routed.given), routed.places.split(routed.given), strict=True)
                for part, places in parts:
                    sums.index_copy_(0, places, sums.index_select(0, places) + part)
                sums /= self.peers.ranks
            routed.gradients = sums
        return routed.gradients

    def gradient_norm(self) -> Tensor:
        """Return the norm of the gradient of all rows, each counted once, the same on all ranks."""
        return total(self.gradients().norm().square()).sqrt()

    def commit(self, scale: Tensor | float = 1.0) -> None:
        """Update the rows that this rank handed out in the open step with `scale` times their gradient."""
        routed = self._opened()
        assert routed.records is not None
        if self.optimizer is not None:
            self.optimizer.update(routed.records, routed.ids, self.gradients(), self._step, scale)
            self.store.held.write(self.store.local(routed.ids), routed.records)
        self._open = None
        self.committed = self._step
        self.touched.mark(routed.served.ids)
        self._economy.count(len(routed.ids), routed.plan.reads, routed.repeated, self._bytes_moved(routed))
        self._buffers.give(routed.slot)

    def read(self, memory: int, addresses: Tensor) -> Tensor:
        """Return the reading [..., H * U] at `addresses` [..., H] of one memory, as of the last commit.

        For evaluation. All ranks must call it equally often, be it with no addresses.
        """
        given = [as_one_batch(addresses)], self.first_row[memory : memory + 1]
        routed = self.peers.submit(self._route, *given).result()
        self._fetch(routed, self.committed)
        assert routed.rows is not None
        reading = evaluated_reading(routed.rows, routed.positions, addresses, self.storage)
        self._buffers.give(routed.slot)
        return reading

    def weights(self, records: Tensor) -> Tensor:
        """Return the float32 weights [n, U] of `records` (uint8 [n, record_bytes]) as of the last commit."""
        return current_weights(self.layout, self.optimizer, records, self.committed)

    def flush(self) -> None:
        """Nothing is on its way between steps."""

    def of_all_ranks(self, value: Value) -> list[Value]:
        """Return the `value`, plain, that each rank gave; none returns before all have given theirs."""
        return self.peers.gather(value)

    @contextmanager
    def whole(self) -> Iterator[RowStore | None]:
        """Give the first rank a store from which it reads all rows, the other ranks None when it is done."""
        shards = AllShards(self.store, self.peers)
        if self.peers.rank:
            shards.serve()
            yield None
            return
        try:
            yield shards
        finally:
            shards.close()

    def take_economy(self) -> Economy:
        """Return the sums since the last call, and start anew."""
        taken, self._economy = self._economy, Economy()
        return taken

    def close(self) -> None:
        """End the threads, and close the store."""
        self.peers.close()
        self._planners.close()
        self.store.close()

    def _route_step(self, step: int, addresses: Sequence[Tensor]) -> Routed:
        routed = self._route(addresses, self.first_row)
        local = self.store.local(routed.served.ids)
        routed.repeated = self._ledger.enter(step, local, step - 1, self._planners).repeated
        return routed

    def _route(self, addresses: Sequence[Tensor], first_row: Sequence[int]) -> Routed:
        """Settle who needs which rows; collective, on the peers' thread."""
        plan = deduplicate(addresses, first_row, self._planners)
        ids, places, wanted = _by_owner(plan.ids.numpy(), self.peers.ranks)
        positions = torch.empty_like(plan.positions)
        flat, target = plan.positions.view(-1).numpy(), positions.view(-1).numpy()
        self._planners.share(len(flat), lambda a, b: _follow(places, flat[a:b], target[a:b]))
        asked, given = self.peers.exchange(torch.from_numpy(ids), wanted.tolist())
        served = deduplicate([asked.view(1, 1, -1, 1)], (0,), self._planners)
        slot = self._buffers.take(0)
        moved = slot.upload(0, positions, served.ids, served.positions.view(-1).long())
        return Routed(plan, wanted.tolist(), served, given, slot, moved[0], moved[1], moved[2])

    def _fetch(self, routed: Routed, step: int) -> None:
        """Hand out this rank's rows, as after `step` steps, and take in those of the others; collective."""
        routed.slot.arrive()
        size = len(routed.ids), self.layout.record_bytes
        routed.records = torch.empty(size, dtype=torch.uint8, device=self.device)
        self.store.held.read(self.store.local(routed.ids), routed.records)
        weights = current_weights(self.layout, self.optimizer, routed.records, step)
        routed.rows = weights.new_empty((len(routed.plan.ids), self.layout.row_dim))
        handed = weights.index_select(0, routed.places)
        dist.all_to_all_single(routed.rows, handed, routed.wanted, routed.given)

    def _bytes_moved(self, routed: Routed) -> int:
        """Bytes of rows, and as many of gradients, sent to other ranks and received from them."""
        own = routed.wanted[self.peers.rank]
        crossing = len(routed.plan.ids) + len(routed.places) - 2 * own
        return (1 if self.optimizer is None else 2) * crossing * 4 * self.layout.row_dim

    def _opened(self) -> Routed:
        assert self._open is not None, "no step has begun"
        return self._open


@njit(nogil=True, cache=True)
def _by_owner(ids: np.ndarray, ranks: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return `ids` [n] in the order of their owners, the place of each in it, and how many each rank owns."""
    counts = np.zeros(ranks, dtype=np.int64)
    for row in ids:
        counts[row % ranks] += 1
    free = np.cumsum(counts) - counts
    ordered, places = np.empty_like(ids), np.empty(len(ids), dtype=np.int32)
    for i, row in enumerate(ids):
        place = free[row % ranks]
        free[row % ranks] += 1
        ordered[place], places[i] = row, place
    return ordered, places, counts


@njit(nogil=True, cache=True)
def _follow(places: np.ndarray, positions: np.ndarray, out: np.ndarray) -> None:
    """Write where `places` send each of `positions`."""
    for i in range(len(positions)):
        out[i] = places[positions[i]]

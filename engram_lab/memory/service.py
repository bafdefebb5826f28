"""What serves a network its rows while it trains: the same calls wherever rows live, and what these share.

Shapes: A micro-batches of a step, M memories, B batch, T length, H hash heads, n unique rows, U row width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from engram_lab.memory.layout import RecordLayout
from engram_lab.memory.resident import RowStorage, look_up, round_rows
from engram_lab.memory.row_optimizer import RowOptimizer
from engram_lab.memory.stores import RowStore
from engram_lab.memory.touched import TouchedRows

Value = TypeVar("Value")


@dataclass
class Economy:
    """What the rows' travel cost this rank; sums over the steps since the last look.

    Where rows are spread over ranks, unique rows are those of all ranks' batches that this one owns, so that
    all ranks together have as many as one rank alone.

    Attributes:
        steps: steps trained.
        unique: unique rows.
        reads: rows read, repetitions counted.
        repeated: unique rows that the step before had too.
        bytes_moved: bytes gathered from the store and written back, or sent to other ranks and received.
        waited: seconds the step waited for rows to arrive, or for updates to land.
    """

    steps: int = 0
    unique: int = 0
    reads: int = 0
    repeated: int = 0
    bytes_moved: int = 0
    waited: float = 0.0

    def count(self, unique: int, reads: int, repeated: int, bytes_moved: int) -> None:
        """Add one step."""
        self.steps += 1
        self.unique += unique
        self.reads += reads
        self.repeated += repeated
        self.bytes_moved += bytes_moved


class RowService(Protocol):
    """Rows of coming steps out of a store, and their updates back.

    Calls come from one thread. For each step in order: `announce`, as many steps ahead as is wanted; `begin`;
    `reading` of each micro-batch; and after the backward passes `gradients` and `commit`. What fails in a
    background thread is raised by the next call.

    Where the rows are spread over ranks, every call but `weights`, `take_economy` and `close` is collective:
    all ranks make the same calls in the same order, or all of them wait for each other.
    """

    @property
    def store(self) -> RowStore:
        """Where this rank's rows live, by their global numbers."""

    @property
    def touched(self) -> TouchedRows:
        """Which of this rank's rows were trained."""

    def announce(self, step: int, addresses: Sequence[Tensor]) -> None:
        """Begin to fetch the rows of a step: `addresses` [M, B, T, H] on the CPU, one a micro-batch."""

    def begin(self, step: int) -> None:
        """Wait for the rows of the step, make them current, and open them for reading and gradients."""

    def reading(self, micro_batch: int) -> Tensor:
        """Return what each memory reads in a micro-batch of the open step, [M, B, T, H * U]."""

    def gradient_norm(self) -> Tensor:
        """Return the norm, over all ranks, of the open step's row gradients, to be counted in clipping."""

    def commit(self, scale: Tensor | float = 1.0) -> None:
        """Update the rows of the open step with `scale` times their gradient, and send them back."""

    def read(self, memory: int, addresses: Tensor) -> Tensor:
        """Return the reading [..., H * U] at `addresses` [..., H] of one memory, as of the last commit.

        For evaluation: it waits for all updates, and changes nothing.
        """

    def weights(self, records: Tensor) -> Tensor:
        """Return the float32 weights [n, U] of `records` (uint8 [n, record_bytes]) as of the last commit."""

    def flush(self) -> None:
        """Wait until every update is in the store."""

    def of_all_ranks(self, value: Value) -> list[Value]:
        """Return the `value`, plain, that each rank gave; none returns before all have given theirs."""

    def whole(self) -> AbstractContextManager[RowStore | None]:
        """Give the first rank a store from which it reads all rows, the other ranks None when it is done."""

    def take_economy(self) -> Economy:
        """Return the sums since the last call, and start anew."""

    def close(self) -> None:
        """End the threads, letting updates under way land, and close the store."""


def current_weights(
    layout: RecordLayout, optimizer: RowOptimizer | None, records: Tensor, step: int
) -> Tensor:
    """Return the float32 weights [n, U] of `records` as they are after `step` steps."""
    return layout.decode(records) if optimizer is None else optimizer.weights(records, step)


def trained_reading(rows: Tensor, positions: Tensor, storage: RowStorage) -> Tensor:
    """Return what a step reads, [M, B, T, H * U]: `rows` [n, U] at `positions` [M, H, B, T].

    Rows are rounded to `storage`; gradients pass that unchanged.
    """
    if storage != "float32":
        rows = rows + (round_rows(rows.detach(), storage) - rows).detach()
    return look_up(positions.permute(0, 2, 3, 1), rows).flatten(-2)


def evaluated_reading(rows: Tensor, positions: Tensor, addresses: Tensor, storage: RowStorage) -> Tensor:
    """Return what one memory reads at `addresses` [..., H]: `rows` [n, U] at `positions` [1, 1, H, 1, N]."""
    if storage != "float32":
        rows = round_rows(rows, storage)
    places = positions.view(addresses.shape[-1], addresses[..., 0].numel()).mT
    return look_up(places, rows).flatten(-2).view(*addresses.shape[:-1], places.shape[1] * rows.shape[1])


def as_one_batch(addresses: Tensor) -> Tensor:
    """Return `addresses` [..., H] of one memory as those of a micro-batch on the CPU, [1, 1, N, H]."""
    return addresses.detach().cpu().reshape(1, 1, addresses[..., 0].numel(), addresses.shape[-1])

"""The sharded tier's stores: the rows of one rank, and on the first rank a view of the rows of all.

Row i belongs to rank i modulo the number of ranks. Every hash head, and so every rank's share of a step, is
spread evenly, whatever the heads' sizes and however often they repeat; blocks would put whole heads on one
rank, of which those of short n-grams read few distinct rows.

Shapes: n records moved, W ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engram_lab.memory.peers import Peers
from engram_lab.memory.stores import DeviceStore

END = -1
"""Asked for in place of a row when no more rows are wanted."""


class Shard:
    """The rows of one rank, on its device, by their global numbers: a `RowStore`.

    Args:
        rows: R, of all ranks together.
        record_bytes: of a record.
        device: where this rank computes.
        rank: number of this rank.
        ranks: W.

    Attributes:
        held: this rank's records, in which row i has number i // W.

    Raises:
        UserError: the device has not enough memory for its share of the records.
    """

    def __init__(self, rows: int, record_bytes: int, device: torch.device, *, rank: int, ranks: int) -> None:
        self.rows, self.record_bytes, self.device = rows, record_bytes, device
        self.rank, self.ranks = rank, ranks
        self.held = DeviceStore(len(range(rank, rows, ranks)), record_bytes, device)

    def owns(self, ids: Tensor) -> Tensor:
        """Return which of rows `ids` [n] are this rank's, bool [n]."""
        return ids % self.ranks == self.rank

    def local(self, ids: Tensor) -> Tensor:
        """Return the numbers in `held` of rows `ids` [n], all of them this rank's."""
        return ids.div(self.ranks, rounding_mode="floor")

    def read(self, ids: Tensor, out: Tensor) -> None:
        """Copy records `ids` [n], all of them this rank's, to the first n of `out`."""
        self.held.read(self.local(ids), out)

    def write(self, ids: Tensor, records: Tensor) -> None:
        """Replace those of records `ids` [n], distinct, that are this rank's.

        So what fills a store with all rows fills every rank's share with its own.
        """
        mine = self.owns(ids)
        self.held.write(self.local(ids[mine]), records[: len(ids)][mine])

    def sync(self) -> None:
        """Return when the device has done all that it was told."""
        self.held.sync()

    def close(self) -> None:
        """Free the memory."""
        self.held.close()


class AllShards:
    """The rows of all ranks, read by the first while the others `serve`: a `RowStore` that cannot be written.

    Rows travel through the CPU's memory, as many at a time as are read at once.
    """

    def __init__(self, shard: Shard, peers: Peers) -> None:
        self.rows, self.record_bytes, self.device = shard.rows, shard.record_bytes, shard.device
        self._shard, self._peers = shard, peers

    def read(self, ids: Tensor, out: Tensor) -> None:
        """Copy records `ids` [n] to the first n of `out`; for the first rank."""
        ids = ids.cpu()
        owners = ids % self._peers.ranks
        order = owners.argsort(stable=True)
        counts = owners.bincount(minlength=self._peers.ranks).tolist()
        records = self._peers.submit(self._turn, ids[order], counts).result()
        assert records is not None
        out[order.to(self.device)] = records.to(self.device)

    def write(self, ids: Tensor, records: Tensor) -> None:
        """Not possible."""
        raise NotImplementedError("rows of other ranks are only read")

    def serve(self) -> None:
        """Hand out this rank's rows until the first rank has called `close`; for the other ranks."""
        asked = torch.empty(0, dtype=torch.int64)
        while self._peers.submit(self._turn, asked, [0] * self._peers.ranks).result() is not None:
            pass

    def sync(self) -> None:
        """Nothing is written."""

    def close(self) -> None:
        """Let the others go on."""
        ranks = self._peers.ranks
        self._peers.submit(self._turn, torch.full((ranks,), END), [1] * ranks).result()

    def _turn(self, asked: Tensor, counts: list[int]) -> Tensor | None:
        """Ask every rank for its rows and answer in turn; None when the first rank has had enough."""
        wanted, given = self._peers.exchange(asked, counts)
        if len(wanted) == 1 and wanted[0] == END:
            return None
        records = torch.empty((len(wanted), self.record_bytes), dtype=torch.uint8, device=self.device)
        self._shard.read(wanted.to(self.device), records)
        return self._peers.exchange(records.cpu(), given)[0]

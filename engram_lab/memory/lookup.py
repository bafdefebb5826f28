"""Tables that are only read: a look-up begins with the forward pass and is joined where the module needs it.

    few rows:   hash ─> kernel reads the rows over the bus ─> decode ──┐     side stream, no host; CUDA graphs
    many rows:  hash ─> addresses to the host ─> threads gather into
                pinned memory ─> copy engine ─> decode ────────────────┤     side streams and threads
    block 0 ───────────────────────────────────────────────────────────┴─> join ─> the module

Rows are not made unique first: on text a third to a half of them repeat, but finding out which takes longer
than the threads need to copy them all from the processor's cache.

Shapes: B batch, T length, H hash heads, U row width, n = B T H rows, S bytes of one record.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from engram_lab.memory.deep_reads import AT_ONCE
from engram_lab.memory.disk import DiskStore
from engram_lab.memory.hot_rows import HotRows
from engram_lab.memory.layout import RecordLayout
from engram_lab.memory.stores import RowStore

try:
    from engram_lab.memory import gather_triton
except ImportError:  # triton comes with torch's builds for CUDA only
    gather_triton = None  # type: ignore[assignment]

FEW_ROWS = 8192
"""Up to so many rows a kernel reads them over the bus; above, threads gather. Alone on an H100 the kernel is
no slower up to 160,000 rows, but it takes processors that other work needs; what serving costs was measured
with this limit (benchmarks/results/serving.md)."""
THREADS = 2
"""Look-ups that threads work on at once: one is read while another finds its rows. Each is read by several
threads already, and more might compete with the launches for the interpreter."""
DISK_THREADS = AT_ONCE + 1
"""The same for a disk. With as many as may read, two that began together would also end together, and the
disk wait for both to find their next."""


class ServingTable(nn.Module):
    """One memory's rows, in a store, read by a network on `device`.

    Args:
        store: R records, written to no more: a `DeviceStore` on `device`, or one whose `device` is the CPU.
        layout: what a record holds; its rule is None.
        device: where the network computes.
        dtype: of the reading.
        hot: rows kept on the device, asked by the path for few rows.
        few: how many rows the kernel reads itself when it may.
    """

    def __init__(
        self,
        store: RowStore,
        layout: RecordLayout,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        hot: HotRows | None = None,
        few: int = FEW_ROWS,
    ) -> None:
        super().__init__()
        assert layout.rule is None, layout.rule
        assert layout.record_bytes == store.record_bytes, (layout.record_bytes, store.record_bytes)
        self.store, self.layout, self.device, self.dtype = store, layout, device, dtype
        self.hot, self.few = hot, few
        threads = DISK_THREADS if isinstance(store, DiskStore) else THREADS
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="look-up")
        records = getattr(store, "records", None)
        self._records: Tensor | None = None
        """The records where a kernel can read them itself."""
        if device.type == "cuda":
            self._stream, self._back = torch.cuda.Stream(device, priority=-1), torch.cuda.Stream(device)
            self._pinned: list[_Pinned] = []
            if records is not None and gather_triton is not None and (records.is_cuda or records.is_pinned()):
                self._records = records

    def begin(self, addresses: Tensor) -> Callable[[], Tensor]:
        """Begin to read the rows [B, T, H] (any integer type); the result waits for them.

        Addresses on the CPU, hashed there, spare many rows the way back from the device: their gather waits
        for nothing that the device still has to do.

        What it returns gives [B, T, H * U] in `dtype` on `device`, ready for the current stream. It must be
        called, on the stream that began.
        """
        flat = addresses.reshape(-1)
        if self.device.type != "cuda" or not self._by_kernel(len(flat)):
            on_device = flat if flat.is_cuda else None
            return self._begin_threads(lambda: flat.to("cpu", torch.int64), addresses.shape, on_device)
        ids = flat.to(self.device)
        records, out = self._room(len(flat))
        return self._joining(self._begin_kernel(ids, records, out), out, (ids, records), addresses.shape)

    def begin_found(self, find: Callable[[], Tensor], shape: Sequence[int]) -> Callable[[], Tensor]:
        """As `begin`, for row numbers of a `shape` that are still to be found.

        `find` gives them on the CPU; it is called on a thread of the table's, so that hashing many ids there
        does not keep the network waiting. For rows that do not lie on the device.
        """
        return self._begin_threads(lambda: find().reshape(-1).long(), shape, None)

    @property
    def captures(self) -> bool:
        """Whether a CUDA graph can hold a look-up: a kernel can read the rows, without the host."""
        return self._records is not None

    def close(self) -> None:
        """End the threads; the store is its owner's to close."""
        self._threads.shutdown()

    def _by_kernel(self, n: int) -> bool:
        if self._records is None:
            assert not torch.cuda.is_current_stream_capturing(), "a CUDA graph cannot wait for the host"
            return False
        return self._records.is_cuda or n <= self.few or torch.cuda.is_current_stream_capturing()

    def _read(self, ids: Tensor) -> Tensor:
        """Return rows [n, U] where the network computes on the CPU."""
        records = torch.empty((len(ids), self.layout.record_bytes), dtype=torch.uint8)
        self.store.read(ids, records)
        return self.layout.decode(records).to(self.dtype)

    def _room(self, n: int) -> tuple[Tensor, Tensor]:
        """Return space on the device for n records and what they decode to."""
        records = torch.empty((n, self.layout.record_bytes), dtype=torch.uint8, device=self.device)
        return records, torch.empty((n, self.layout.row_dim), dtype=self.dtype, device=self.device)

    def _joining(
        self,
        arrived: Callable[[], torch.cuda.Event],
        out: Tensor,
        used: tuple[Tensor | None, ...],
        shape: Sequence[int],
    ) -> Callable[[], Tensor]:
        def join(used: tuple[Tensor | None, ...] = used) -> Tensor:  # holds what side streams use until then
            torch.cuda.current_stream(self.device).wait_event(arrived())
            return out.view(*shape[:-1], shape[-1] * self.layout.row_dim)

        return join

    def _begin_kernel(self, ids: Tensor, records: Tensor, out: Tensor) -> Callable[[], torch.cuda.Event]:
        assert self._records is not None
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        arrived = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            gather_triton.gather(self._records, ids, records, self.hot)
            self._decode(records, out)
            arrived.record()
        return lambda: arrived

    def _begin_threads(
        self, find: Callable[[], Tensor], shape: Sequence[int], ids: Tensor | None
    ) -> Callable[[], Tensor]:
        """Read rows that `find` gives on the CPU (int64 [n]), or `ids` [n] where CUDA has them."""
        n = math.prod(shape)
        if self.device.type != "cuda":
            reading = self._threads.submit(lambda: self._read(find()))
            width = shape[-1] * self.layout.row_dim
            return lambda: reading.result().to(self.device).reshape(*shape[:-1], width)
        slot = self._free_pinned()
        slot.reserve(n, self.layout.record_bytes)
        records, out = self._room(n)
        told, arrived = torch.cuda.Event(), torch.cuda.Event()
        ready = torch.cuda.current_stream(self.device).record_event()  # room and row numbers
        if ids is not None:
            self._back.wait_event(ready)
            with torch.cuda.stream(self._back):
                slot.ids[:n].copy_(ids, non_blocking=True)
                told.record()

        def fetch() -> torch.cuda.Event:
            if ids is not None:
                told.synchronize()
            self.store.read(find() if ids is None else slot.ids[:n], slot.records)
            with torch.cuda.stream(slot.stream):
                slot.stream.wait_event(ready)
                records.copy_(slot.records[:n], non_blocking=True)
                slot.copied.record()
                self._decode(records, out)
                arrived.record()
            return arrived

        slot.fetching = self._threads.submit(fetch)
        return self._joining(slot.fetching.result, out, (ids, records), shape)

    def _free_pinned(self) -> _Pinned:
        """Return the largest that no look-up uses; another one where all are in use.

        Not the next in turn: many rows from a disk take longer than the few of steps asked for after them.
        """
        free = [pinned for pinned in self._pinned if pinned.free]
        if not free:
            free = [_Pinned(self.device)]
            self._pinned += free
        return max(free, key=lambda pinned: len(pinned.ids))

    def _decode(self, records: Tensor, out: Tensor) -> None:
        if "codes" in self.layout.places and gather_triton is not None:
            gather_triton.decode_float8(self.layout, records, out)
        else:
            out.copy_(self.layout.decode(records))


class _Pinned:
    """Pinned memory for one gather, grown as needed and used again by another.

    Its copies have a stream of their own: a gather that is ready does not wait for what another waits for.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device, priority=-1)
        self.ids = torch.empty(0, dtype=torch.int64)
        self.records = torch.empty(0, 0, dtype=torch.uint8)
        self.copied = torch.cuda.Event()
        self.fetching: Future[torch.cuda.Event] | None = None

    @property
    def free(self) -> bool:
        """Whether its look-up has ended and its records have left."""
        return self.fetching is None or (self.fetching.done() and self.copied.query())

    def reserve(self, n: int, record_bytes: int) -> None:
        """Make room for `n` records."""
        if len(self.ids) < n:
            self.ids = torch.empty(n, dtype=torch.int64, pin_memory=True)
            self.records = torch.empty((n, record_bytes), dtype=torch.uint8, pin_memory=True)

"""Buffers that records travel in: pinned memory beside device memory, or plain memory where the CPU computes.

Copies run on streams of their own, one each way, and wait for nothing but what they need; no call here waits
for the device as a whole. Shapes: n records.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

SMALLEST = 1024  # records; below, sizes are not worth telling apart


def capacity(records: int) -> int:
    """Return `records` rounded up by less than an eighth, so that buffers of a few sizes serve all steps."""
    step = max(SMALLEST, 1 << max(0, records.bit_length() - 4))
    return -(-records // step) * step


class Slot:
    """Room for the records of one step.

    Attributes:
        host: uint8 [capacity, record_bytes] where the store's threads read and write.
        records: the same on the computing device; `host` itself where that is the CPU.
    """

    def __init__(self, size: int, record_bytes: int, device: torch.device, streams: Streams | None) -> None:
        self.host = torch.empty((size, record_bytes), dtype=torch.uint8, pin_memory=streams is not None)
        self.records = self.host
        self._streams = streams
        if streams is not None:
            self.records = torch.empty((size, record_bytes), dtype=torch.uint8, device=device)
            self._uploaded, self._downloaded, self._unused = (torch.cuda.Event() for _ in range(3))

    def reclaim(self) -> None:
        """Wait, on a background thread, until the last upload has left `host`."""
        if self._streams is not None:
            self._uploaded.synchronize()

    def upload(self, n: int, *others: Tensor) -> list[Tensor]:
        """Begin to copy the first `n` records, and `others`, to the device; returns the latter there."""
        if self._streams is None:
            return list(others)
        with torch.cuda.stream(self._streams.up):
            self._streams.up.wait_event(self._unused)
            self.records[:n].copy_(self.host[:n], non_blocking=True)
            moved = [t.pin_memory().to(self.records.device, non_blocking=True) for t in others]
            self._uploaded.record()
        return moved

    def arrive(self, *moved: Tensor) -> None:
        """Let the step's stream wait for the upload, and keep what was `moved` until it is done with it."""
        if self._streams is not None:
            stream = torch.cuda.current_stream(self.records.device)
            stream.wait_event(self._uploaded)
            for tensor in moved:
                tensor.record_stream(stream)

    def download(self, n: int) -> None:
        """Begin to copy the first `n` records back, behind what the step's stream does to them."""
        if self._streams is not None:
            self._streams.down.wait_stream(torch.cuda.current_stream(self.records.device))
            with torch.cuda.stream(self._streams.down):
                self.host[:n].copy_(self.records[:n], non_blocking=True)
                self._downloaded.record()

    def downloaded(self) -> None:
        """Wait, on a background thread, until the records are back in `host`."""
        if self._streams is not None:
            self._downloaded.synchronize()

    def release(self) -> None:
        """Note that the step's stream needs the records no more after what it was given so far."""
        if self._streams is not None:
            self._unused.record(torch.cuda.current_stream(self.records.device))


class Streams:
    """One stream each way."""

    def __init__(self, device: torch.device) -> None:
        self.up, self.down = torch.cuda.Stream(device), torch.cuda.Stream(device)


class Buffers:
    """Slots for records of `record_bytes` bytes, made when none of that size is free, and used again."""

    def __init__(self, record_bytes: int, device: torch.device) -> None:
        self.record_bytes, self.device = record_bytes, device
        self._streams = Streams(device) if device.type == "cuda" else None
        self._free: list[Slot] = []
        self._lock = threading.Lock()

    def take(self, n: int) -> Slot:
        """Return a slot for `n` records; for background threads."""
        wanted = capacity(n)
        with self._lock:
            fitting = [slot for slot in self._free if len(slot.host) == wanted]
            if fitting:
                self._free.remove(fitting[0])
            elif len(self._free) > 2:
                self._free.pop(0)  # sizes have moved on
        slot = fitting[0] if fitting else Slot(wanted, self.record_bytes, self.device, self._streams)
        slot.reclaim()
        return slot

    def give(self, slot: Slot) -> None:
        """Take back a slot from the step's thread."""
        slot.release()
        with self._lock:
            self._free.append(slot)

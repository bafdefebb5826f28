"""Buffers that records travel in: pinned memory beside device memory, or plain memory where the CPU computes.

Copies run on streams of their own, one each way, and wait for nothing but what they need; no call here waits
for the device as a whole. Shapes: n records.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

SMALLEST = 1024  # below, sizes are not worth telling apart
ALIGNMENT = 16


def capacity(size: int) -> int:
    """Return `size` rounded up by less than an eighth, so that buffers of a few sizes serve all steps."""
    step = max(SMALLEST, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step


class Slot:
    """Room for the records of one step, and for numbers that travel with them.

    Attributes:
        host: uint8 [capacity, record_bytes] where the store's threads read and write.
        records: the same on the computing device; `host` itself where that is the CPU.
    """

    def __init__(self, size: int, record_bytes: int, device: torch.device, streams: Streams | None) -> None:
        self.host = torch.empty((size, record_bytes), dtype=torch.uint8, pin_memory=streams is not None)
        self.records = self.host
        self._streams = streams
        if streams is not None:
            with torch.cuda.stream(streams.up):  # memory that other streams may still use is not taken
                self.records = torch.empty((size, record_bytes), dtype=torch.uint8, device=device)
            self._uploaded, self._downloaded, self._unused = (torch.cuda.Event() for _ in range(3))
            self._parcel = self._unpacked = torch.empty(0, dtype=torch.uint8)

    def reclaim(self) -> None:
        """Wait, on a background thread, until the last upload has left `host`."""
        if self._streams is not None:
            self._uploaded.synchronize()

    def upload(self, n: int, *others: Tensor) -> list[Tensor]:
        """Begin to copy the first `n` records, and `others`, to the device; returns the latter there.

        What is returned lives as long as the slot is not taken again. All others travel as one parcel: every
        call to CUDA holds up the thread that computes.
        """
        if self._streams is None:
            return list(others)
        self.retire()
        sizes = [-(-other.nbytes // ALIGNMENT) * ALIGNMENT for other in others]
        if sum(sizes) > len(self._parcel):
            room = capacity(sum(sizes))
            self._parcel = torch.empty(room, dtype=torch.uint8, pin_memory=True)
            with torch.cuda.stream(self._streams.up):
                self._unpacked = torch.empty(room, dtype=torch.uint8, device=self.records.device)
        start, moved = 0, []
        for other, size in zip(others, sizes, strict=True):
            here, there = (p[start : start + other.nbytes] for p in (self._parcel, self._unpacked))
            here.view(other.dtype).copy_(other.reshape(-1))
            moved.append(there.view(other.dtype).view(other.shape))
            start += size
        with torch.cuda.stream(self._streams.up):
            self.records[:n].copy_(self.host[:n], non_blocking=True)
            self._unpacked[:start].copy_(self._parcel[:start], non_blocking=True)
            self._uploaded.record()
        return moved

    def arrive(self) -> None:
        """Let the step's stream wait for the upload."""
        if self._streams is not None:
            torch.cuda.current_stream(self.records.device).wait_event(self._uploaded)

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
        """Note that the step's stream needs the slot no more after what it was given so far."""
        if self._streams is not None:
            self._unused.record(torch.cuda.current_stream(self.records.device))

    def retire(self) -> None:
        """Let uploads, and so whatever takes the slot's memory next, wait until the step is done with it."""
        if self._streams is not None:
            self._streams.up.wait_event(self._unused)


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
                self._free.pop(0).retire()  # sizes have moved on
        slot = fitting[0] if fitting else Slot(wanted, self.record_bytes, self.device, self._streams)
        slot.reclaim()
        return slot

    def give(self, slot: Slot) -> None:
        """Take back a slot from the step's thread."""
        slot.release()
        with self._lock:
            self._free.append(slot)

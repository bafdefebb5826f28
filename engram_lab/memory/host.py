"""The host tier: records in the host's memory, a mapping of exactly their size in huge pages.

Pinned allocations of torch round up to a power of two, which a table of half the host's memory cannot afford;
here the mapping itself is registered with CUDA, so that kernels may read it and copies run at full speed.
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

from engram_lab.errors import UserError
from engram_lab.memory.room import GIB, require_memory
from engram_lab.memory.row_copy import Workers
from engram_lab.memory.stores import SMALLER_TABLE

PORTABLE_AND_MAPPED = 1 | 2  # cudaHostRegisterPortable, cudaHostRegisterMapped
TOUCHED_AT_ONCE = 1 << 26


class HostStore:
    """Records in the host's memory, copied by a pool of threads.

    Args:
        rows: R.
        record_bytes: S.
        threads: of the pool; None takes one per processor, at most 8.
        registered: register the mapping with CUDA; None where there is a GPU. Registering faults all pages
            in, so they are touched in parallel first.

    Raises:
        UserError: not enough memory, said before any is taken, or CUDA cannot register it.
    """

    device = torch.device("cpu")

    def __init__(
        self, rows: int, record_bytes: int, *, threads: int | None = None, registered: bool | None = None
    ) -> None:
        self.rows, self.record_bytes = rows, record_bytes
        require_memory(
            rows * record_bytes, "The table's rows", f"set memory.tier to disk, or {SMALLER_TABLE}"
        )
        self._workers = Workers(threads)
        self._registered = torch.cuda.is_available() if registered is None else registered
        self.records = map_records(rows, record_bytes)
        if self._registered:
            flat = self.records.view(-1)
            touching = Workers()
            touching.share(len(flat), lambda a, b: flat[a:b].zero_(), TOUCHED_AT_ONCE)
            touching.close()
            torch.cuda.init()
            runtime = torch.cuda.cudart()
            try:
                torch.cuda.check_error(
                    runtime.cudaHostRegister(flat.data_ptr(), len(flat), PORTABLE_AND_MAPPED)
                )
            except torch.cuda.CudaError as error:
                self._workers.close()
                raise UserError(
                    f"CUDA cannot take the {len(flat) / GIB:.1f} GiB of the table's rows ({error}); raise "
                    "the limit on locked memory (ulimit -l), or set memory.tier to disk."
                ) from error

    def read(self, ids: Tensor, out: Tensor) -> None:
        """Copy records `ids` [n] to the first n of `out`."""
        self._workers.copy(self.records, ids, out, None)

    def write(self, ids: Tensor, records: Tensor) -> None:
        """Replace records `ids` [n] by the first n of `records`."""
        self._workers.copy(records, None, self.records, ids)

    def sync(self) -> None:
        """Nothing to do: memory does not survive the process."""

    def close(self) -> None:
        """End the threads, take the mapping back from CUDA and free it."""
        self._workers.close()
        if self._registered:
            self._registered = False
            torch.cuda.synchronize()
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self.records.data_ptr()))
        self.records = torch.empty(0, self.record_bytes, dtype=torch.uint8)


def map_records(rows: int, record_bytes: int) -> Tensor:
    """Return zeros [rows, record_bytes] (uint8) in a private mapping of exactly that size, in huge pages.

    No memory is taken before it is written to; all is given back with the last view.
    """
    mapping = mmap.mmap(-1, rows * record_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages: slower, not wrong
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=torch.uint8).view(rows, record_bytes)

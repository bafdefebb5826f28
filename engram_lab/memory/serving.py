"""A saved network's table, put where it is to be read from: host memory or a file.

Rows are read through `weights`, a few megabytes at a time, so that a table never lies in memory twice, and
rounded once to the format they are served in; a reading is then what the resident table gives.

Shapes: R rows, U row width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from engram_lab.errors import UserError
from engram_lab.memory.config import MemoryConfig
from engram_lab.memory.disk import DiskStore
from engram_lab.memory.host import HostStore
from engram_lab.memory.layout import RecordLayout
from engram_lab.memory.lookup import ServingTable
from engram_lab.memory.resident import RowStorage
from engram_lab.memory.saved_rows import stored_layout
from engram_lab.memory.stores import DeviceStore, RowStore, fill
from engram_lab.memory.table_file import ELSEWHERE

FILLED = "filled"
GATHERERS = 2
"""Threads that gather rows from the host's memory, unless told. Look-ups begin ahead of where they are
needed, and take milliseconds. Sixteen threads and three look-ups at once cost a server 0.8 % of its prefill;
two and two, most of them begun later, nothing to be seen (benchmarks/results/serving.md, runs 5 and 6)."""
Weights = Callable[[int, int], Tensor]
"""Gives rows first, ..., first + count - 1 [count, U] on the CPU; called from several threads at once."""


def serving_table(
    weights: Weights,
    rows: int,
    row_dim: int,
    *,
    storage: RowStorage,
    memory: MemoryConfig,
    fingerprint: str,
    device: torch.device,
    dtype: torch.dtype,
) -> ServingTable:
    """Return one memory's table on the tier of `memory`.

    A table on disk is written once, into `memory.directory`, and found again by `fingerprint`, which says
    what the weights are.

    Raises:
        UserError: a tier that serves no single process, no folder for its file, or no room on it.
    """
    if memory.tier == "sharded":
        raise UserError("memory.tier is 'sharded', which trains; serve from resident, host or disk.")
    layout = stored_layout(row_dim, storage)

    def initial(first: int, count: int, out: Tensor) -> None:
        layout.encode(weights(first, count), out)

    store: RowStore
    if memory.tier == "disk":
        if memory.directory is None:
            raise UserError("memory.directory is not set, but a table on disk needs a folder for its file.")
        store = _on_disk(Path(memory.directory), rows, layout, fingerprint, initial, memory)
    else:
        if memory.tier == "host":
            store = HostStore(rows, layout.record_bytes, threads=memory.threads or GATHERERS)
        else:
            store = DeviceStore(rows, layout.record_bytes, device)
        fill(store, initial, threads=memory.threads)
    return ServingTable(store, layout, device=device, dtype=dtype)


def _on_disk(
    folder: Path,
    rows: int,
    layout: RecordLayout,
    fingerprint: str,
    initial: Callable[[int, int, Tensor], None],
    memory: MemoryConfig,
) -> DiskStore:
    """Return the table's file, opened to be read only; written first where it is not there yet.

    A file is whole once it has been marked, so a killed process leaves none that looks finished. Of several
    processes one writes it while the others wait.
    """
    path = folder / f"{hashlib.sha256(f'{fingerprint} {layout.describe()}'.encode()).hexdigest()[:16]}.table"

    def filled() -> bool:
        return path.exists() and any(folder.glob(f"{path.name}.written-*"))

    if not filled():
        with _alone_at(path):
            if not filled():
                filling = DiskStore(path, layout, rows, fingerprint, cache_rows=0)
                try:
                    fill(filling, initial, threads=memory.threads)
                    filling.sync()
                    filling.mark(FILLED)
                finally:
                    filling.close()
    return DiskStore(
        path,
        layout,
        rows,
        fingerprint,
        writable=False,
        cache_rows=memory.cache_rows,
        threads=memory.threads,
    )


@contextmanager
def _alone_at(path: Path) -> Iterator[None]:
    """Wait until no other process makes the file at `path`, and keep them waiting."""
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise UserError(
            f"The table's file {path} cannot be made: {error.strerror or error}; {ELSEWHERE}."
        ) from error
    try:
        yield
    finally:
        lock.release()

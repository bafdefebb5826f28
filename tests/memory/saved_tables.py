"""Tables small enough to be saved and restored many times in a test, and what is done with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from engram_lab.memory.disk import DiskStore
from engram_lab.memory.host import HostStore
from engram_lab.memory.layout import RecordLayout
from engram_lab.memory.row_checkpoint import RowCheckpoints
from engram_lab.memory.stores import DeviceStore, RowStore

LAYOUT = RecordLayout(row_dim=3, alignment=16)
ROWS = 1000
FINGERPRINT = "hash 1, table abc, seed 0"


def initial(first: int, count: int, out: Tensor) -> None:
    """Different for every row, and expensive to get wrong: depends on the row's number alone."""
    weights = torch.arange(first, first + count).float()[:, None] * torch.tensor([1.0, -0.5, 0.25])
    LAYOUT_OF[out.shape[1]].encode(weights, out)


LAYOUT_OF = {
    layout.record_bytes: layout for layout in (replace(LAYOUT, alignment=a) for a in (4, 16, 64, 256))
}


def new_store(layout: RecordLayout = LAYOUT) -> DeviceStore:
    store = DeviceStore(ROWS, layout.record_bytes)
    store.records.random_(0, 256)
    return store


def open_store(tier: str, folder: Path, layout: RecordLayout = LAYOUT) -> RowStore:
    if tier == "disk":
        return DiskStore(folder / "table", layout, ROWS, FINGERPRINT, cache_rows=50, threads=2)
    return HostStore(ROWS, layout.record_bytes, threads=2) if tier == "host" else new_store(layout)


def checkpoints(
    folder: Path, layout: RecordLayout = LAYOUT, fingerprint: str = FINGERPRINT
) -> RowCheckpoints:
    return RowCheckpoints(folder, layout, fingerprint)


def started(folder: Path, store: RowStore) -> RowCheckpoints:
    rows = checkpoints(folder)
    rows.restore([], store, initial)
    return rows


def touch(store: RowStore, ids: Tensor, seed: int, layout: RecordLayout = LAYOUT) -> None:
    """Fill all fields with values that depend on row and seed; padding stays zero, as in training."""
    records = torch.zeros(len(ids), store.record_bytes, dtype=torch.uint8)
    for number, part in enumerate(layout.fields(records).values()):
        words = (ids[:, None] * 31 + torch.arange(part.shape[1]) * 7 + seed * 101 + number) % 1021
        part.copy_(words.to(part.dtype))
    store.write(ids, records)


def content(store: RowStore) -> Tensor:
    out = torch.empty(store.rows, store.record_bytes, dtype=torch.uint8)
    store.read(torch.arange(store.rows), out)
    return out


def row_files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if "rows" in p.name and p.is_file())


def some_rows(seed: int, count: int = 100) -> Tensor:
    chosen = torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed))[:count]
    return chosen.sort().values

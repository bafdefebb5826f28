"""Tables written as shards (memory/saved_rows.py): what a finished run leaves, from whichever tier.

Shapes: n rows, U row width.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from engram_lab.errors import UserError
from engram_lab.files import share_as_folder, write_atomically
from engram_lab.memory.layout import RecordLayout
from engram_lab.memory.room import require_disk
from engram_lab.memory.row_copy import alone
from engram_lab.memory.row_file import CHUNK
from engram_lab.memory.saved_rows import FORMAT, INDEX, Part, Shard, checked, first_rows, key, stored_layout

if TYPE_CHECKING:
    from engram_lab.memory.resident import RowStorage
    from engram_lab.memory.stores import RowStore

SHARD_BYTES = 1 << 28
"""Bytes of rows in one shard; each writer takes up to three times that in memory."""
WRITERS = 4
"""Shards that are written at once."""


def export_rows(
    store: RowStore,
    folder: Path,
    tables: Mapping[str, int],
    weights: Callable[[Tensor], Tensor],
    *,
    row_dim: int,
    storage: RowStorage = "float32",
    max_shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write all rows of `store` into `folder`; what was exported there before stays until all is written.

    Args:
        store: where the rows are; all updates have landed.
        folder: made if missing.
        tables: name and number of rows of each table, in the order of their rows in the store.
        weights: gives for records (uint8 [n, record_bytes], on the store's device) the weights a reader sees
            after the last step, float32 [n, U]; called from several threads at once.
        row_dim: U.
        storage: format they are rounded to.
        max_shard_bytes: of rows in one shard.
        progress: told (rows done, rows) after each shard.

    Raises:
        UserError: no room on the disk, or it cannot be written.
    """
    stored = stored_layout(row_dim, storage)
    first_row = first_rows(tables)
    plan = _plan(tables, max(1, max_shard_bytes // stored.record_bytes))
    names = [f"rows-{i:05}-of-{len(plan):05}.safetensors" for i in range(1, len(plan) + 1)]
    partial = [folder / f".{name}.partial" for name in names]
    total, done, lock, stop = sum(tables.values()), 0, Lock(), Event()

    def written(name: str, aside: Path, parts: tuple[Part, ...]) -> Shard:
        nonlocal done
        tensors: dict[str, Tensor] = {}
        for part in parts:
            start = first_row[part.table]
            records = _encoded(store, start + part.first, start + part.last, weights, stored, lock, stop)
            for kind, values in stored.fields(records).items():
                tensors[key(part.table, kind)] = values.contiguous()
        save_file(tensors, aside)
        share_as_folder(aside)
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        shard = Shard(name, *checked(aside), parts)
        with lock:
            done += sum(part.last - part.first for part in parts)
            if progress is not None:
                progress(done, total)
        return shard

    try:
        folder.mkdir(parents=True, exist_ok=True)
        require_disk(
            total * stored.record_bytes, folder, "make room there", what=f"Exporting {total:,} table rows"
        )
        with alone():
            writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="export")
            try:
                shards = list(writers.map(written, names, partial, plan))
            finally:
                stop.set()  # after an error or an interrupt of this thread
                writers.shutdown(cancel_futures=True)
        for name, aside in zip(names, partial, strict=True):
            os.replace(aside, folder / name)
        index = {
            "format": FORMAT,
            "row_dim": row_dim,
            "storage": storage,
            "tables": dict(tables),
            "shards": [asdict(shard) for shard in shards],
        }
        write_atomically(folder / INDEX, json.dumps(index, indent=1) + "\n")
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"The table rows cannot be exported to {folder}: {reason}; mend that, or make room there."
        ) from error
    finally:
        for aside in partial:
            aside.unlink(missing_ok=True)
    _remove_shards(folder, keep=names)


def remove_rows(folder: Path) -> None:
    """Remove the rows exported to `folder`, if there are any."""
    (folder / INDEX).unlink(missing_ok=True)
    _remove_shards(folder, keep=[])


def _plan(tables: Mapping[str, int], most: int) -> list[tuple[Part, ...]]:
    """Return the parts in each shard, which has at most `most` rows."""
    shards: list[list[Part]] = []
    room = 0
    for table, rows in tables.items():
        first = 0
        while first < rows:
            if not room:
                shards.append([])
                room = most
            last = min(rows, first + room)
            shards[-1].append(Part(table, first, last))
            room -= last - first
            first = last
    return [tuple(parts) for parts in shards]


def _encoded(
    store: RowStore,
    first: int,
    last: int,
    weights: Callable[[Tensor], Tensor],
    stored: RecordLayout,
    reading: Lock,
    stop: Event,
) -> Tensor:
    """Return rows `first` to `last` of the store as records [n, record_bytes] of `stored`, on the CPU.

    CancelledError once `stop` is set.
    """
    out = torch.empty((last - first, stored.record_bytes), dtype=torch.uint8)
    count = max(1, CHUNK // store.record_bytes)
    records = torch.empty((min(count, len(out)), store.record_bytes), dtype=torch.uint8, device=store.device)
    with torch.cuda.device_of(records):
        for start in range(first, last, count):
            if stop.is_set():
                raise CancelledError
            ids = torch.arange(start, min(start + count, last), device=store.device)
            with reading:  # a store may be read by one thread at a time
                store.read(ids, records[: len(ids)])
            stored.encode(weights(records[: len(ids)]).cpu(), out[start - first : start - first + len(ids)])
    return out


def _remove_shards(folder: Path, keep: list[str]) -> None:
    for path in (*folder.glob("rows-*-of-*.safetensors"), *folder.glob(".rows-*-of-*.safetensors.partial")):
        if path.name not in keep:
            path.unlink()

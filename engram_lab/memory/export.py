"""Tables as safetensors shards: what a finished run leaves, from whichever tier, for whichever tier.

    rows-00001-of-00003.safetensors, ...    rows of one table or several, as they are read after the last step
    rows.index.json                         which rows of which table lie in which shard, and its checksum

A shard holds, for each table `name` it has rows of, `name` [n, U] in float32 or bfloat16, or `name.codes`
[n, U] (e4m3) and `name.scales` [n, blocks] (int8, powers of two). The index is written last.

Shapes: n rows, U row width.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engram_lab.errors import UserError
from engram_lab.files import share_as_folder, write_atomically
from engram_lab.memory.layout import RecordLayout
from engram_lab.memory.room import require_disk
from engram_lab.memory.row_copy import alone
from engram_lab.memory.row_file import CHUNK, make_durable

if TYPE_CHECKING:
    from engram_lab.memory.resident import RowStorage
    from engram_lab.memory.stores import Initial, RowStore

INDEX = "rows.index.json"
FORMAT = 1
SHARD_BYTES = 1 << 28
"""Bytes of rows in one shard; each writer takes up to three times that in memory."""
WRITERS = 4
"""Shards that are written at once."""


@dataclass(frozen=True)
class Part:
    """Rows `first` to `last`, that one not included, of a table, in one shard."""

    table: str
    first: int
    last: int


@dataclass(frozen=True)
class Shard:
    """A file of the index: its size, the CRC-32 of its bytes, and what it holds."""

    file: str
    bytes: int
    checksum: int
    parts: tuple[Part, ...]


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
    stored = _stored_layout(row_dim, storage)
    first_row = _first_rows(tables)
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
                tensors[_key(part.table, kind)] = values.contiguous()
        save_file(tensors, aside)
        share_as_folder(aside)
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        shard = Shard(name, *_checked(aside), parts)
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
        make_durable(folder)
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


class SavedRows:
    """The rows exported to a folder.

    Attributes:
        layout: of the records as stored, which hold the rows and nothing else.
        tables: number of rows of each table.
        digest: SHA-256 of the index, which names the checksums of all shards.

    Raises:
        UserError: there are none, or their index is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock, self._whole = Lock(), set[str]()  # shards whose checksums were found right
        path = folder / INDEX
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            raise UserError(f"{folder} holds no exported table rows: there is no {INDEX} in it.") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
        self.digest = hashlib.sha256(text).hexdigest()
        try:
            index = json.loads(text)
            version = index["format"]
            if version == FORMAT:
                self.layout = _stored_layout(index["row_dim"], index["storage"])
                self.tables: dict[str, int] = index["tables"]
                self._shards = [
                    Shard(s["file"], s["bytes"], s["checksum"], tuple(Part(**part) for part in s["parts"]))
                    for s in index["shards"]
                ]
                if not _tile([part for shard in self._shards for part in shard.parts], self.tables):
                    raise ValueError("rows are missing or double")
        except (UserError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged: put a whole copy back, or export the rows again.") from error
        if version != FORMAT:
            raise UserError(f"{path} has format {version!r}, but this version reads format {FORMAT} only.")

    def initial(self, layout: RecordLayout, tables: Mapping[str, int]) -> Initial:
        """Return what writes these rows into a store of `layout`, as rows that no optimizer has touched yet.

        `stores.fill` takes it, for any tier. Rows stored in the format of `layout` arrive bit for bit, others
        are rounded to the nearest value.

        Raises:
            UserError: `tables`, names and numbers of rows in the order of the store, or their width differ
                from what was exported.
        """
        self.require(tables, layout.row_dim)
        first_row = _first_rows(tables)

        def initial(first: int, count: int, out: Tensor) -> None:
            out.zero_()
            for table, start in first_row.items():
                low, high = max(first, start), min(first + count, start + tables[table])
                if low < high:
                    records = self.records(table, low - start, high - low)
                    part = out[low - first : high - first]
                    if layout.weights == self.layout.weights:
                        fields = layout.fields(part)
                        for kind, values in self.layout.fields(records).items():
                            fields[kind].copy_(values)
                    else:
                        layout.encode(self.layout.decode(records), part)

        return initial

    def require(self, tables: Mapping[str, int], row_dim: int) -> None:
        """Raise UserError unless the rows are those of `tables`, by name and number of rows, and U wide."""
        if (dict(tables), row_dim) != (self.tables, self.layout.row_dim):
            raise UserError(
                f"The table rows in {self.folder} are {_spell(self.tables, self.layout.row_dim)}, but the "
                f"network's are {_spell(tables, row_dim)}: use the network they were trained in."
            )

    def weights(self, table: str, first: int, count: int) -> Tensor:
        """Return the weights [count, U] (float32) of the rows that `records` would give."""
        return self.layout.decode(self.records(table, first, count))

    def records(self, table: str, first: int, count: int) -> Tensor:
        """Return the records [count, record_bytes] of rows `first`, `first` + 1, ... of a table.

        May be called from several threads at once. UserError when a shard is missing or damaged; each is read
        whole, and checked, before any of it is given.
        """
        out = torch.zeros((count, self.layout.record_bytes), dtype=torch.uint8)
        for shard in self._shards:
            for part in shard.parts:
                low, high = max(first, part.first), min(first + count, part.last)
                if part.table == table and low < high:
                    fields = self.layout.fields(out[low - first : high - first])
                    at = slice(low - part.first, high - part.first)
                    with self._opened(shard) as file:
                        for kind, values in fields.items():
                            values.copy_(file.get_slice(_key(table, kind))[at])
        return out

    @contextmanager
    def _opened(self, shard: Shard) -> Iterator[Any]:
        path = self.folder / shard.file
        try:
            with self._lock:
                if shard.file not in self._whole:
                    if _checked(path) != (shard.bytes, shard.checksum):
                        raise UserError(
                            f"{path} is damaged: put a whole copy back, or export the rows again."
                        )
                    self._whole.add(shard.file)
            with safe_open(path, framework="pt") as file:
                yield file
        except FileNotFoundError:
            raise UserError(f"{path} is missing: put a copy back, or export the rows again.") from None
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read: {error}.") from error


def _stored_layout(row_dim: int, storage: RowStorage) -> RecordLayout:
    return RecordLayout(row_dim=row_dim, weights=storage, rule=None, alignment=4)


def _first_rows(tables: Mapping[str, int]) -> dict[str, int]:
    return dict(zip(tables, accumulate(tables.values(), initial=0), strict=False))


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


def _tile(parts: list[Part], tables: Mapping[str, int]) -> bool:
    """Return whether `parts` are all rows of all tables, each once."""
    ends = dict.fromkeys(tables, 0)
    for part in parts:
        if ends.get(part.table) != part.first:
            return False
        ends[part.table] = part.last
    return ends == tables


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


def _key(table: str, kind: str) -> str:
    """Name of a field's tensor; a table in one piece is found under its own name."""
    return table if kind == "weight" else f"{table}.{kind}"


def _checked(path: Path) -> tuple[int, int]:
    """Return size and CRC-32 of a file."""
    checksum = size = 0
    with open(path, "rb") as file:
        while data := file.read(1 << 22):
            checksum, size = zlib.crc32(data, checksum), size + len(data)
    return size, checksum


def _remove_shards(folder: Path, keep: list[str]) -> None:
    for path in (*folder.glob("rows-*-of-*.safetensors"), *folder.glob(".rows-*-of-*.safetensors.partial")):
        if path.name not in keep:
            path.unlink()


def _spell(tables: Mapping[str, int], row_dim: int) -> str:
    return ", ".join(f"{name} [{rows:,}, {row_dim}]" for name, rows in tables.items())

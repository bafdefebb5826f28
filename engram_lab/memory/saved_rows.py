"""Rows that a finished network has left: in shards (memory/export.py), or as whole tables among its weights.

    rows-00001-of-00003.safetensors, ...    rows of one table or several, as they are read after the last step
    rows.index.json                         which rows of which table lie in which shard, and its checksum

A shard holds, for each table `name` it has rows of, `name` [n, U] in float32 or bfloat16, or `name.codes`
[n, U] (e4m3) and `name.scales` [n, blocks] (int8, powers of two). The index is written last.

Shapes: n rows, U row width.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engram_lab.errors import UserError
from engram_lab.memory.layout import RecordLayout

if TYPE_CHECKING:
    from engram_lab.memory.resident import RowStorage
    from engram_lab.memory.stores import Initial

INDEX = "rows.index.json"
FORMAT = 1
_REMEDY = "put a whole copy back, or remove the run's folder and train it again"


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


class GivenRows(ABC):
    """Rows of a network's tables, from which a store can be filled.

    Attributes:
        folder: where they lie.
        layout: of the records that `records` gives, which hold the rows and nothing else.
        tables: number of rows of each table.
    """

    folder: Path
    layout: RecordLayout
    tables: dict[str, int]

    @property
    @abstractmethod
    def digest(self) -> str:
        """What tells these rows from others, wherever they lie."""

    @abstractmethod
    def records(self, table: str, first: int, count: int) -> Tensor:
        """Return the records [count, record_bytes] of rows `first`, `first` + 1, ... of a table.

        May be called from several threads at once.
        """

    def initial(self, layout: RecordLayout, tables: Mapping[str, int]) -> Initial:
        """Return what writes these rows into a store of `layout`, as rows that no optimizer has touched yet.

        `stores.fill` takes it, for any tier. Rows stored in the format of `layout` arrive bit for bit, others
        are rounded to the nearest value.

        Raises:
            UserError: `tables`, names and numbers of rows in the order of the store, or their width differ
                from what was exported.
        """
        self.require(tables, layout.row_dim)
        first_row = first_rows(tables)

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


class SavedRows(GivenRows):
    """The rows exported to a folder.

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
            raise UserError(
                f"{folder} holds no exported table rows: there is no {INDEX} in it; {_REMEDY}."
            ) from None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
        self._digest = hashlib.sha256(text).hexdigest()
        try:
            index = json.loads(text)
            version = index["format"]
            if version == FORMAT:
                self.layout = stored_layout(index["row_dim"], index["storage"])
                self.tables: dict[str, int] = index["tables"]
                self._shards = [
                    Shard(s["file"], s["bytes"], s["checksum"], tuple(Part(**part) for part in s["parts"]))
                    for s in index["shards"]
                ]
                if not _tile([part for shard in self._shards for part in shard.parts], self.tables):
                    raise ValueError("rows are missing or double")
        except (UserError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged: {_REMEDY}.") from error
        if version != FORMAT:
            raise UserError(f"{path} has format {version!r}, but this version reads format {FORMAT} only.")

    @property
    def digest(self) -> str:
        """SHA-256 of the index, which names the checksums of all shards."""
        return self._digest

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
                            values.copy_(file.get_slice(key(table, kind))[at])
        return out

    @contextmanager
    def _opened(self, shard: Shard) -> Iterator[Any]:
        path = self.folder / shard.file
        try:
            with self._lock:
                if shard.file not in self._whole:
                    if checked(path) != (shard.bytes, shard.checksum):
                        raise UserError(f"{path} is damaged: {_REMEDY}.")
                    self._whole.add(shard.file)
            with safe_open(path, framework="pt") as file:
                yield file
        except FileNotFoundError:
            raise UserError(f"{path} is missing: {_REMEDY}.") from None
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read: {error}.") from error


class DenseRows(GivenRows):
    """The rows of tables that are dense parameters, each a tensor [rows, U] in a file of weights.

    Args:
        path: the safetensors file.
        tables: name and number of rows of each.
        row_dim: U.
    """

    def __init__(self, path: Path, tables: Mapping[str, int], row_dim: int) -> None:
        self.folder, self.path = path.parent, path
        self.tables, self.layout = dict(tables), stored_layout(row_dim, "float32")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file."""
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror or error}.") from error

    def records(self, table: str, first: int, count: int) -> Tensor:
        """Return the records [count, record_bytes] of rows `first`, `first` + 1, ... of a table."""
        out = torch.empty((count, self.layout.record_bytes), dtype=torch.uint8)
        try:
            with safe_open(self.path, framework="pt") as file:
                rows = file.get_slice(table)[first : first + count]
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.path} cannot be read: {error}.") from error
        self.layout.encode(rows.float(), out)
        return out


def stored_layout(row_dim: int, storage: RowStorage) -> RecordLayout:
    """Return the layout of rows that are saved or served in a format.

    Nothing lies beside them, and they are as narrow as records can be: wider ones were not read faster
    (benchmarks/results/gather_rows.md), and what serving costs was measured with these.
    """
    return RecordLayout(row_dim=row_dim, weights=storage, rule=None, alignment=4)


def first_rows(tables: Mapping[str, int]) -> dict[str, int]:
    """Return the number of each table's first row where tables follow each other."""
    return dict(zip(tables, accumulate(tables.values(), initial=0), strict=False))


def _tile(parts: list[Part], tables: Mapping[str, int]) -> bool:
    """Return whether `parts` are all rows of all tables, each once."""
    ends = dict.fromkeys(tables, 0)
    for part in parts:
        if ends.get(part.table) != part.first:
            return False
        ends[part.table] = part.last
    return ends == tables


def key(table: str, kind: str) -> str:
    """Name of a field's tensor; a table in one piece is found under its own name."""
    return table if kind == "weight" else f"{table}.{kind}"


def checked(path: Path) -> tuple[int, int]:
    """Return size and CRC-32 of a file."""
    checksum = size = 0
    with open(path, "rb") as file:
        while data := file.read(1 << 22):
            checksum, size = zlib.crc32(data, checksum), size + len(data)
    return size, checksum


def _spell(tables: Mapping[str, int], row_dim: int) -> str:
    return ", ".join(f"{name} [{rows:,}, {row_dim}]" for name, rows in tables.items())

"""A file of records: the rows that changed between two checkpoints, checksummed, the same for all tiers.

    magic, length of header | header, JSON | ids, int64 [k] ascending | records [k] | C CRC-32s, uint32 | C

Records are packed: what a store adds to align them is left out, so that a table loads where another alignment
pays. There is a CRC-32 of everything before the ids, of the ids, and of every chunk of records; the checksum
by which a file is known is that of those. Numbers are little-endian. Shapes: k rows.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from engram_lab.errors import UserError
from engram_lab.files import written_aside
from engram_lab.memory.layout import RecordLayout

MAGIC, VERSION = b"ENGRROWS", 1
CHUNK = 64 << 20
"""Bytes of records read or written at once, and under one CRC-32."""


@dataclass(frozen=True, kw_only=True)
class RowFile:
    """What a checkpoint says about a file of its rows.

    Attributes:
        name: in the folder of the checkpoints.
        step: last optimizer step that the records include.
        rows: how many.
        bytes: size of the file.
        checksum: CRC-32 of the file's own CRC-32s.
    """

    name: str
    step: int
    rows: int
    bytes: int
    checksum: int


def packed(layout: RecordLayout) -> RecordLayout:
    """Return the layout of records in files: fields at the same places, as little behind them as can be."""
    return replace(layout, alignment=4)


def identity(layout: RecordLayout, fingerprint: str) -> dict[str, Any]:
    """Return what must be equal where records are written and where they are read."""
    described = packed(layout).describe()
    del described["alignment"], described["record_bytes"]
    return {"fingerprint": fingerprint, "layout": described}


def file_bytes(layout: RecordLayout, rows: int) -> int:
    """Return about what a file of `rows` rows takes, by less than a hundredth of a chunk too much."""
    record = packed(layout).record_bytes
    return rows * (8 + record) + 4 * (rows * record // CHUNK) + 4096


def chunk_rows(layout: RecordLayout) -> int:
    """Return how many records make a chunk."""
    return max(1, CHUNK // packed(layout).record_bytes)


def write(
    path: Path, step: int, ids: Tensor, records: Iterable[Tensor], *, layout: RecordLayout, fingerprint: str
) -> RowFile:
    """Write a file aside, make it durable and rename it; on any failure nothing of it stays.

    Args:
        path: where it goes.
        step: last optimizer step that the records include.
        ids: row numbers, int64 [k] on the CPU, ascending.
        records: packed records, uint8 [chunk_rows, packed record bytes] on the CPU; the last chunk
            is shorter.
        layout: layout of the records; its alignment does not matter.
        fingerprint: what else must be equal where the rows are used.

    Raises:
        OSError: the file cannot be written.
    """
    known_by = identity(layout, fingerprint)
    chunk = chunk_rows(layout)
    header = json.dumps(
        {"version": VERSION, "step": step, "rows": len(ids), "chunk": chunk, **known_by}
    ).encode()
    start = MAGIC + len(header).to_bytes(8, "little") + header
    numbers = ids.numpy().astype("<i8", copy=False)
    sums = [zlib.crc32(start), zlib.crc32(numbers.data)]
    with written_aside(path) as file:
        file.write(start)
        file.write(numbers.data)
        for part in records:
            data = part.numpy().reshape(-1).data
            sums.append(zlib.crc32(data))
            file.write(data)
        end = np.array(sums, dtype="<u4").tobytes()
        file.write(end + len(sums).to_bytes(8, "little"))
        size = file.tell()
    return RowFile(name=path.name, step=step, rows=len(ids), bytes=size, checksum=zlib.crc32(end))


class RowReader:
    """Read a file of records, checking every byte that is used.

    Args:
        folder: where the file lies.
        file: what the checkpoint says about it.
        layout: layout of the records wanted; its alignment does not matter.
        fingerprint: of the rows wanted.

    Raises:
        UserError: the file is missing, truncated, damaged, or of other rows; also by the methods.
    """

    def __init__(self, folder: Path, file: RowFile, layout: RecordLayout, fingerprint: str) -> None:
        self.path, self.file = folder / file.name, file
        with self._opened(0) as opened:
            size = os.fstat(opened.fileno()).st_size
            if size != file.bytes:
                raise self._damaged(f"it holds {size:,} bytes instead of {file.bytes:,}")
            header = json.loads(self._checked_header(opened, size))
            self._ids_at = opened.tell()
        self._require(identity(layout, fingerprint), header)
        self._chunk, self._record = header["chunk"], packed(layout).record_bytes

    def ids(self) -> Tensor:
        """Return the row numbers, int64 [k] ascending."""
        numbers = np.empty(self.file.rows, dtype="<i8")
        with self._opened(self._ids_at) as opened:
            self._read(opened, numbers.view(np.uint8), 1)
        return torch.from_numpy(numbers.astype(np.int64, copy=False))

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield which rows, and their packed records, uint8 [n, packed record bytes], in one buffer."""
        rows = self.file.rows
        buffer = np.empty((min(self._chunk, rows), self._record), dtype=np.uint8)
        with self._opened(self._ids_at + 8 * rows) as opened:
            for number, first in enumerate(range(0, rows, self._chunk)):
                records = buffer[: rows - first]
                self._read(opened, records.reshape(-1), 2 + number)
                yield slice(first, first + len(records)), torch.from_numpy(records)

    @contextmanager
    def _opened(self, offset: int) -> Iterator[BinaryIO]:
        try:
            with open(self.path, "rb") as opened:
                opened.seek(offset)
                yield opened
        except FileNotFoundError:
            raise UserError(
                f"The row file {self.path} of step {self.file.step} is missing; {self._remedy}."
            ) from None
        except OSError as error:
            raise UserError(
                f"The row file {self.path} cannot be read: {error.strerror or error}; {self._remedy}."
            ) from error

    def _read(self, opened: BinaryIO, data: np.ndarray, number: int) -> None:
        """Fill `data`, bytes, and check them against the CRC-32 with that number."""
        opened.readinto(data.data)  # type: ignore[attr-defined]
        if zlib.crc32(data.data) != self._sums[number]:
            raise self._damaged("its checksum differs")

    def _checked_header(self, opened: BinaryIO, size: int) -> bytes:
        opened.seek(size - 8)
        sums_bytes = 4 * int.from_bytes(opened.read(8), "little")
        if not 8 <= sums_bytes <= size - 8:
            raise self._damaged("its checksum differs")
        opened.seek(size - 8 - sums_bytes)
        end = opened.read(sums_bytes)
        self._sums = np.frombuffer(end, dtype="<u4")
        opened.seek(0)
        start = opened.read(len(MAGIC) + 8)
        header = opened.read(min(size, int.from_bytes(start[len(MAGIC) :], "little")))
        if zlib.crc32(end) != self.file.checksum or zlib.crc32(start + header) != self._sums[0]:
            raise self._damaged("its checksum differs")
        return header

    def _require(self, wanted: Mapping[str, Any], header: Mapping[str, Any]) -> None:
        if header["version"] != VERSION:
            raise UserError(
                f"The row file {self.path} has version {header['version']!r}, but this program reads version "
                f"{VERSION} only; go back to the program that wrote it, or {self._anew}."
            )
        for name, value in wanted["layout"].items():
            if (found := header["layout"].get(name)) != value:
                raise UserError(
                    f"The row file {self.path} holds records with {name} {found!r}, but the run has "
                    f"{value!r}; set it back, or {self._anew}."
                )
        if (found := header["fingerprint"]) != wanted["fingerprint"]:
            raise UserError(
                f"The row file {self.path} belongs to other rows than the run's: hash version, tables or "
                f"seed differ ({found} instead of {wanted['fingerprint']}); set them back, or {self._anew}."
            )

    @property
    def _anew(self) -> str:
        return "delete the run's folder to train it anew"

    @property
    def _remedy(self) -> str:
        return f"put a whole copy back, or {self._anew}"

    def _damaged(self, how: str) -> UserError:
        return UserError(f"The row file {self.path} is damaged: {how}; {self._remedy}.")

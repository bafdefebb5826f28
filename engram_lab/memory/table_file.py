"""The file that the disk tier keeps a table in: found whole and of the expected rows, or refused.

    block 0: magic, CRC-32 and length of the header; header (JSON) | records [R] | zeros to a whole block

Shapes: R rows, S bytes of one record.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram_lab.errors import UserError
from engram_lab.memory.disk_copy import BLOCK
from engram_lab.memory.layout import RecordLayout
from engram_lab.memory.room import require_disk

MAGIC, VERSION = b"ENGRDISK", 1
ELSEWHERE = "keep the table elsewhere (a recipe's memory.directory or memory.tier, generate's --memory)"
"""What helps whoever asked for the file, a run or a trained network that is served."""


@dataclass(frozen=True)
class TableFile:
    """Where a table's file is and what it holds; its records begin at byte BLOCK.

    Args:
        path: of the file.
        layout: of the records.
        rows: R.
        fingerprint: of all else that decides what a row means (hash version, tables, seed).
    """

    path: Path
    layout: RecordLayout
    rows: int
    fingerprint: str

    def create(self) -> None:
        """Make a file of zeros with its header, all bytes reserved, under its name only when it is whole.

        Raises:
            UserError: no room on the disk, or a disk that fails.
        """
        path = self.path
        partial = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.unlink(missing_ok=True)
            require_disk(self._size, path.parent, ELSEWHERE)
            for log in path.parent.glob(f"{path.name}.written-*"):  # of a file that is gone
                log.unlink()
            text = json.dumps(self._header).encode()
            start = MAGIC + zlib.crc32(text).to_bytes(4, "little") + len(text).to_bytes(4, "little") + text
            assert len(start) <= BLOCK, "the fingerprint is too long"
            with partial.open("xb") as file:
                os.posix_fallocate(file.fileno(), 0, self._size)
                file.write(start)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            raise UserError(
                f"The table's file {path} cannot be made: {error.strerror or error}; {ELSEWHERE}."
            ) from error

    def open(self, *, writable: bool) -> tuple[int, bool]:
        """Return a locked descriptor and whether its reads go around the page cache.

        A writer has the file alone, readers share it.

        Raises:
            UserError: a file that is missing, in use, cut short, damaged, or of other rows.
        """
        file, direct = _open(self.path, writable)
        try:
            self._check(file)
        except BaseException:
            os.close(file)
            raise
        return file, direct

    @property
    def _header(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "layout": self.layout.describe(),
            "rows": self.rows,
            "fingerprint": self.fingerprint,
        }

    @property
    def _size(self) -> int:
        return BLOCK + -(-self.rows * self.layout.record_bytes // BLOCK) * BLOCK

    def _check(self, file: int) -> None:
        path, size, expected = self.path, self._size, self._header
        remedy = f"remove {path}* to build the table anew, or {ELSEWHERE}"
        with path.open("rb") as whole:  # `file` may take reads of whole blocks only
            block = whole.read(BLOCK)
        found = os.fstat(file).st_size
        if block[:8] != MAGIC:
            raise UserError(f"{path} is not a table of rows, or its beginning is damaged; {remedy}.")
        checksum, length = (int.from_bytes(block[a : a + 4], "little") for a in (8, 12))
        text = block[16 : 16 + length]
        if len(text) != length or zlib.crc32(text) != checksum:
            raise UserError(f"The header of the table's file {path} is damaged; {remedy}.")
        header = json.loads(text)
        if header["version"] != VERSION:
            raise UserError(
                f"{path} has format {header['version']}, and this version reads {VERSION}; {remedy}."
            )
        for name, value in (*expected["layout"].items(), ("rows", self.rows)):
            theirs = header["rows"] if name == "rows" else header["layout"].get(name)
            if theirs != value:
                raise UserError(
                    f"{path} holds rows of {name} {theirs!r}, and this run needs {value!r}; {remedy}."
                )
        if header["fingerprint"] != self.fingerprint:
            raise UserError(
                f"{path} holds rows of another table, hash version or seed ({header['fingerprint']!r}, and "
                f"this run needs {self.fingerprint!r}); {remedy}."
            )
        if found < size:
            raise UserError(f"{path} was cut short: it has {found:,} of {size:,} bytes; {remedy}.")


def _open(path: Path, writable: bool) -> tuple[int, bool]:
    direct = not writable
    try:
        try:
            file = os.open(path, os.O_RDWR if writable else os.O_RDONLY | os.O_DIRECT)
        except OSError as error:
            if writable or error.errno != errno.EINVAL:
                raise
            file, direct = os.open(path, os.O_RDONLY), False  # a file system without direct reads
    except OSError as error:
        raise UserError(
            f"The table's file {path} cannot be opened: {error.strerror}; {ELSEWHERE}."
        ) from error
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if writable else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError as error:
        os.close(file)
        raise UserError(
            f"The table's file {path} is in use by another process; end it, or {ELSEWHERE}."
        ) from error
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
    return file, direct

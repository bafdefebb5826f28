"""Files of tables: made whole or not at all, and refused when they are not what is needed."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from failures import refusal

from engram_lab.memory import table_file
from engram_lab.memory.disk_copy import BLOCK
from engram_lab.memory.layout import RecordLayout
from engram_lab.memory.table_file import TableFile

LAYOUT = RecordLayout(row_dim=16, rule="adagrad", alignment=4)  # 68 bytes: no whole number of blocks
ROWS = 3000


def made(folder: Path) -> TableFile:
    table = TableFile(folder / "t.rows", LAYOUT, ROWS, "hash 1")
    table.create()
    return table


def refused(table: TableFile) -> str:
    """The sentence with which a writer and a reader are refused; nothing stays open."""
    before = len(os.listdir("/proc/self/fd"))
    writers, readers = (refusal(lambda w=w: table.open(writable=w)) for w in (True, False))  # type: ignore[misc]
    assert writers == readers
    assert len(os.listdir("/proc/self/fd")) == before
    return writers


def test_a_file_has_its_header_and_zeros_to_a_whole_block(tmp_path: Path) -> None:
    table = made(tmp_path)
    content = table.path.read_bytes()
    assert content.startswith(b"ENGRDISK")
    assert b'"fingerprint": "hash 1"}\0' in content[:BLOCK]
    assert content[BLOCK:] == bytes(50 * BLOCK)  # 3000 * 68 bytes are 49.8 blocks
    assert os.listdir(tmp_path) == ["t.rows"]


@pytest.mark.parametrize(
    ("layout", "rows", "fingerprint", "says"),
    [
        (
            RecordLayout(row_dim=8, rule="adagrad", alignment=4),
            ROWS,
            "hash 1",
            "row_dim 16, and this run needs 8",
        ),
        (RecordLayout(row_dim=16, rule="adagrad", alignment=64), ROWS, "hash 1", "alignment 4"),
        (LAYOUT, 2999, "hash 1", "rows 3000, and this run needs 2999"),
        (LAYOUT, ROWS, "hash 2", "'hash 1', and this run needs 'hash 2'"),
    ],
)
def test_a_file_of_another_table_is_refused(
    tmp_path: Path, layout: RecordLayout, rows: int, fingerprint: str, says: str
) -> None:
    message = refused(TableFile(made(tmp_path).path, layout, rows, fingerprint))
    assert says in message
    assert message.endswith(f"to build the table anew, or {table_file.ELSEWHERE}.")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: b"", "is not a table of rows"),
        (lambda data: b"PK" + data[2:], "is not a table of rows"),
        (lambda data: data[:20] + b"?" + data[21:], "header .* is damaged"),
        (lambda data: data[:12] + b"\xff\xff\xff\xff" + data[16:], "header .* is damaged"),
        (lambda data: data[:100], "header .* is damaged"),
        (lambda data: data[:-BLOCK], "was cut short"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes], says: str) -> None:
    table = made(tmp_path)
    table.path.write_bytes(damage(table.path.read_bytes()))
    message = refused(table)
    assert re.search(says, message)
    assert f"remove {table.path}* to build the table anew" in message  # not a run's folder


def test_a_file_of_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = made(tmp_path)
    monkeypatch.setattr(table_file, "VERSION", 2)
    assert "has format 1, and this version reads 2" in refused(table)


def test_a_file_that_is_not_there_is_not_made_by_opening_it(tmp_path: Path) -> None:
    table = TableFile(tmp_path / "t.rows", LAYOUT, ROWS, "hash 1")
    assert refused(table) == (
        f"The table's file {table.path} cannot be opened: No such file or directory; {table_file.ELSEWHERE}."
    )
    assert os.listdir(tmp_path) == []


def test_a_reader_goes_through_the_page_cache_where_the_file_system_has_no_direct_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, system = made(tmp_path), os.open

    def without(path: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return system(path, flags)

    monkeypatch.setattr(os, "open", without)
    file, direct = table.open(writable=False)
    assert not direct
    assert os.pread(file, 8, 0) == b"ENGRDISK"  # not a whole block: what direct reads refuse
    os.close(file)


def test_room_is_asked_for_before_anything_is_made(tmp_path: Path) -> None:
    message = refusal(TableFile(tmp_path / "t.rows", LAYOUT, 10**13, "hash 1").create)
    assert re.search(r"needs .* GiB, but .* GiB free; keep the table elsewhere", message)
    (tmp_path / "file").touch()
    assert "cannot be made: " in refusal(
        TableFile(tmp_path / "file" / "t.rows", LAYOUT, ROWS, "hash 1").create
    )
    assert os.listdir(tmp_path) == ["file"]


def test_a_disk_that_fills_up_while_the_file_is_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert "cannot be made: No space left on device; keep the table elsewhere" in refusal(
        lambda: made(tmp_path)
    )
    assert os.listdir(tmp_path) == []

"""Checkpoints of tables too large to be written whole: each adds a file with the rows changed since the last.

A checkpoint is a list of files, kept in the training checkpoint and therefore committed with it. A row is as
in the newest file that has it; a row in no file is as it was given or drawn from the seed. When the files
hold more than twice the distinct rows, the next checkpoint writes all of these into one file instead, and the
older files go once it is committed. So all files together stay below three times the rows ever touched.

Stores in memory are filled anew when a run continues. A table file outlives the process and has been updated
in place since the checkpoint: it keeps a log of the rows written since then, and only these are put back.

Shapes: k rows of a checkpoint, n rows of a chunk.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from engram_lab.errors import UserError
from engram_lab.files import PARTIAL
from engram_lab.memory.layout import RecordLayout
from engram_lab.memory.room import require_disk
from engram_lab.memory.row_file import (
    RowFile,
    RowReader,
    chunk_rows,
    file_bytes,
    packed,
    write,
)
from engram_lab.memory.stores import DRAWN, Initial, RowStore, fill

SUFFIX = ".rows"
Manifest = dict[str, Any]
"""What a training checkpoint keeps of the rows, one of each rank: plain values."""


@runtime_checkable
class LastingStore(RowStore, Protocol):
    """A store whose rows outlive the process."""

    def mark(self, checkpoint: str) -> None:
        """Note in the log that the store is now as in `checkpoint`."""

    def start_log(self, checkpoint: str | None) -> None:
        """Begin the log anew: the store is now as in `checkpoint`, or, with None, in no known state."""

    def written_since(self, checkpoints: Collection[str]) -> Tensor | None:
        """Return at least the rows written since one of these was marked, int64 [k] ascending.

        None when none of them is in the log: the store may be in any state.
        """


class RowCheckpoints:
    """The files of one rank's rows in the folder of a run's checkpoints.

    Args:
        directory: the folder.
        layout: of the store's records; a table loads where only its alignment differs.
        fingerprint: of all else that decides what a row means: hash version, tables and seed.
    """

    def __init__(self, directory: Path, layout: RecordLayout, fingerprint: str) -> None:
        self.directory, self.layout, self.fingerprint = directory, layout, fingerprint
        self._files: list[RowFile] = []  # oldest first
        self._covered = np.zeros(0, dtype=bool)  # by row, whether a file has it

    @staticmethod
    def memory_bytes(rows: int) -> int:
        """Bytes of memory kept between checkpoints of a table of `rows` rows."""
        return rows

    def save(self, step: int, store: RowStore, ids: Tensor, rank: int = 0) -> Manifest:
        """Write the rows changed since the last call, and return what the training checkpoint must keep.

        Nothing that an earlier checkpoint needs is changed. Memory needed is that of a chunk and 9 bytes a
        row.

        Args:
            step: last optimizer step that the rows include; all its updates are in the store.
            store: where the rows are.
            ids: their numbers over all tables, int64 [k] ascending, on the CPU.
            rank: of this process.

        Raises:
            UserError: the disk has no room, or cannot be written; nothing stays of what was begun.
        """
        if len(ids):
            self._cover(ids)
            files = self._files
            if sum(file.rows for file in files) + len(ids) > 2 * np.count_nonzero(self._covered):
                files, ids = [], torch.from_numpy(np.flatnonzero(self._covered))
            self._files = [*files, self._write(step, store, ids, rank)]
        name = uuid.uuid4().hex
        if isinstance(store, LastingStore):
            store.mark(name)
        return {"id": name, "step": step, "files": [asdict(file) for file in self._files]}

    def committed(self, manifests: Sequence[Manifest], store: RowStore) -> None:
        """Delete what no checkpoint needs any more, now that the training checkpoint is in place.

        `manifests` are those it holds, of all ranks. A lasting store begins its log anew.
        """
        self._begin_log(manifests, store)
        self._delete_others(manifests)

    def restore(
        self,
        manifests: Sequence[Manifest],
        store: RowStore,
        initial: Initial,
        owns: Callable[[Tensor], Tensor] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Bring `store` to the checkpoint with `manifests`, bit for bit, and delete files it does not list.

        Args:
            manifests: of all ranks that saved it, in whatever number; none to begin a run.
            store: its rows are in any state.
            initial: writes records of rows never touched.
            owns: says which of given row numbers [n] are this rank's, bool [n]; None: all.
            progress: told (rows done, rows) while a store is filled anew.

        Returns:
            The rows this rank owns that were touched until then, int64 [k] ascending.

        Raises:
            UserError: a file is missing, damaged, or of other rows. A lasting store remembers what is still
                to be put back, so that `restore` can be called again when the file has been mended.
        """
        listed = _files(manifests)
        readers = [RowReader(self.directory, file, self.layout, self.fingerprint) for file in listed]
        self._files, self._covered = [], np.zeros(0, dtype=bool)
        mine: list[tuple[RowReader, Tensor]] = []
        for reader in readers:
            ids = reader.ids()
            kept = ids if owns is None else ids[owns(ids)]
            if len(kept):
                self._files.append(reader.file)
                self._cover(kept)
                mine.append((reader, ids))
        written = None
        if isinstance(store, LastingStore):
            written = store.written_since(self._ids(manifests))
            if written is None:
                store.start_log(None)
        if written is None:
            fill(store, initial, progress)
        else:
            self._reset(store, written, initial)
        for reader, ids in mine:
            self._apply(reader, ids, store, written, owns)
        self._begin_log(manifests, store)
        self._delete_others(manifests)
        return torch.from_numpy(np.flatnonzero(self._covered))

    def _ids(self, manifests: Sequence[Manifest]) -> list[str]:
        """Return what names a checkpoint in logs; without manifests it is the run's beginning."""
        return [manifest["id"] for manifest in manifests] or [f"initial {self.fingerprint}"]

    def _begin_log(self, manifests: Sequence[Manifest], store: RowStore) -> None:
        if isinstance(store, LastingStore):
            store.sync()
            store.start_log(self._ids(manifests)[0])

    def _cover(self, ids: Tensor) -> None:
        missing = int(ids[-1]) + 1 - len(self._covered)
        if missing > 0:
            self._covered = np.concatenate([self._covered, np.zeros(missing, dtype=bool)])
        self._covered[ids.numpy()] = True

    def _write(self, step: int, store: RowStore, ids: Tensor, rank: int) -> RowFile:
        path = self.directory / f"step={step}.rank={rank}{SUFFIX}"
        assert path.name not in [file.name for file in self._files], (
            f"rows changed after step {step} was saved"
        )
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            require_disk(
                file_bytes(self.layout, len(ids)),
                self.directory,
                "make room there; the checkpoint before is intact",
                what=f"Saving {len(ids):,} table rows of step {step}",
            )
            records = _chunks(store, self.layout, ids)
            return write(path, step, ids, records, layout=self.layout, fingerprint=self.fingerprint)
        except OSError as error:
            raise UserError(
                f"The table rows of step {step} cannot be saved in {self.directory}: "
                f"{error.strerror or error}; mend that or make room; the checkpoint before is intact."
            ) from error

    def _reset(self, store: RowStore, written: Tensor, initial: Initial) -> None:
        """Write the initial records of those rows that no file has."""
        covered = np.zeros(len(written), dtype=bool)
        inside = written.numpy() < len(self._covered)
        covered[inside] = self._covered[written.numpy()[inside]]
        ids = written[~torch.from_numpy(covered)]
        if not len(ids):
            return
        block = torch.empty((DRAWN, store.record_bytes), dtype=torch.uint8)
        _, counts = torch.unique_consecutive(ids // DRAWN, return_counts=True)
        for group in ids.split(counts.tolist()):
            first, count = int(group[0]), int(group[-1] - group[0]) + 1
            initial(first, count, block[:count])
            store.write(group.to(store.device), block[group - first].to(store.device))

    def _apply(
        self,
        reader: RowReader,
        ids: Tensor,
        store: RowStore,
        written: Tensor | None,
        owns: Callable[[Tensor], Tensor] | None,
    ) -> None:
        """Write the file's rows over those of the store, or over those of `written` only."""
        whole = torch.zeros((0, store.record_bytes), dtype=torch.uint8)
        for place, records in reader.chunks():
            numbers = ids[place]
            keep = torch.ones(len(numbers), dtype=torch.bool) if owns is None else owns(numbers)
            if written is not None:
                keep = keep & _among(numbers, written)
            chosen = numbers[keep]
            if len(whole) < len(records):
                whole = torch.zeros((len(records), store.record_bytes), dtype=torch.uint8)
            _words(whole)[: len(chosen), : records.shape[1] // 4] = _words(records)[keep]
            store.write(chosen.to(store.device), whole[: len(chosen)].to(store.device))

    def _delete_others(self, manifests: Sequence[Manifest]) -> None:
        listed = {file.name for file in _files(manifests)}
        for pattern in (f"step=*{SUFFIX}", f".step=*{SUFFIX}.*{PARTIAL}"):
            for path in self.directory.glob(pattern):
                if path.name not in listed:
                    path.unlink(missing_ok=True)


def _files(manifests: Sequence[Manifest]) -> list[RowFile]:
    """Return the files of a checkpoint, each once, oldest first; those of one step hold different rows."""
    files = {entry["name"]: RowFile(**entry) for manifest in manifests for entry in manifest["files"]}
    return sorted(files.values(), key=lambda file: file.step)


def _chunks(store: RowStore, layout: RecordLayout, ids: Tensor) -> Iterator[Tensor]:
    """Yield the packed records of `ids`, as `row_file.write` takes them."""
    count = min(chunk_rows(layout), len(ids))
    records = torch.empty((count, store.record_bytes), dtype=torch.uint8, device=store.device)
    for part in ids.split(count):
        store.read(part.to(store.device), records[: len(part)])
        parts = _words(records)[: len(part), : packed(layout).record_bytes // 4]
        yield parts.contiguous().cpu().view(torch.uint8)


def _among(numbers: Tensor, chosen: Tensor) -> Tensor:
    """Return which of `numbers` [n] are in `chosen` [k], both ascending."""
    if not len(chosen):
        return torch.zeros(len(numbers), dtype=torch.bool)
    places = torch.searchsorted(chosen, numbers).clamp_(max=len(chosen) - 1)
    return chosen[places] == numbers


def _words(records: Tensor) -> Tensor:
    """View records as 4-byte words, of which all consist: copies byte by byte are several times as slow."""
    return records.view(torch.int32)

"""Records a second from and to a file: by threads, around the page cache and through it, and from the cache.

    python benchmarks/disk_rows.py DIRECTORY [--gib 4] [--row-bytes 208] [--out FILE]

The page cache is emptied of the file before every cold figure. Figures are medians of turns, in each of
which every method is timed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from engram_lab.memory.disk import DiskStore
from engram_lab.memory.disk_copy import BLOCK, find_runs, write_runs
from engram_lab.memory.layout import RecordLayout

THREADS = (1, 4, 16, 64, 128)


def forget_pages(path: Path) -> None:
    file = os.open(path, os.O_RDWR)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.path = options.directory / "disk_rows.bench"
        self.layout = RecordLayout(row_dim=options.row_bytes // 4, rule=None, alignment=4)
        self.rows = int(options.gib * 2**30) // self.layout.record_bytes
        self.buffer = torch.ones(options.most, self.layout.record_bytes, dtype=torch.uint8)
        self.most = options.most
        self.speeds: dict[str, list[float]] = {}

    def open(self, **options: object) -> DiskStore:
        return DiskStore(self.path, self.layout, self.rows, "bench", **options)  # type: ignore[arg-type]

    def make(self) -> None:
        store = self.open(cache_rows=0)
        step = 1 << 16
        data = torch.randint(0, 256, (step, self.layout.record_bytes), dtype=torch.uint8)
        for first in range(0, self.rows, step):
            store.write(torch.arange(first, min(self.rows, first + step)), data)
        store.start_log("bench")
        store.close()

    def time(self, name: str, n: int, call: Callable[[torch.Tensor], object], ids: torch.Tensor) -> None:
        start = time.perf_counter()
        call(ids)
        self.speeds.setdefault(name, []).append(n / (time.perf_counter() - start))

    def some(self, n: int) -> torch.Tensor:
        return torch.randperm(self.rows)[:n].sort().values

    def turn(self) -> None:
        ways = [(f"page cache, {threads} threads", True, threads) for threads in THREADS]
        for way, writable, threads in (*ways, ("around the page cache", False, None)):
            n = min(self.most, 1000 * (threads or THREADS[-1]))
            store = self.open(writable=writable, cache_rows=0, threads=threads)
            forget_pages(self.path)
            read = lambda ids, store=store: store.read(ids, self.buffer)  # noqa: E731
            self.time(f"cold read, {way}", n, read, self.some(n))
            store.close()
        store = self.open(cache_rows=0)
        ids, n = self.some(self.most), self.most
        for name, call in (
            ("cold write, pages brought in by the kernel's write", lambda ids: self.plain_write(store, ids)),
            ("cold write, DiskStore.write", lambda ids: store.write(ids, self.buffer)),
        ):
            forget_pages(self.path)
            self.time(name, n, call, self.some(n))
        store.read(ids, self.buffer)
        self.time("write of rows read before, DiskStore.write", n, lambda i: store.write(i, self.buffer), ids)
        store.close()
        store = self.open(writable=False, cache_rows=8 * self.most)
        store.read(ids, self.buffer)
        self.time("read of rows in the cache", n, lambda ids: store.read(ids, self.buffer), ids)
        store.close()

    def plain_write(self, store: DiskStore, ids: torch.Tensor) -> None:
        numbers = ids.numpy()
        assert not write_runs(
            store._file,
            BLOCK,
            numbers,
            find_runs(numbers, 1 << 16),
            self.buffer.data_ptr(),
            self.layout.record_bytes,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--row-bytes", type=int, default=208)
    parser.add_argument("--most", type=int, default=20_000, help="rows moved at a time")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(options)
    try:
        bench.make()
        for _ in range(options.turns + 1):  # the first compiles
            bench.turn()
    finally:
        for file in options.directory.glob("disk_rows.bench*"):
            file.unlink()
    lines = [
        f"{len(os.sched_getaffinity(0))} cores, rows of {bench.layout.record_bytes} bytes, {options.gib} GiB",
        "",
    ]
    lines += ["| method | thousand rows/s (least-most) |", "|---|---:|"]
    for name, speeds in bench.speeds.items():
        kept = np.array(speeds[1:]) / 1e3
        lines.append(f"| {name} | {statistics.median(kept):.1f} ({kept.min():.1f}-{kept.max():.1f}) |")
    print("\n".join(lines))
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""Rows a second by method and row size, against the machine's copy bandwidth and plain `index_select`.

    python benchmarks/gather_rows.py [--quick] [--out FILE]      FILE ends in .json or .md
    python benchmarks/gather_rows.py --alignments 4 16 64        float8 rows of 80 values, aligned so

Everything is timed in turn, repeatedly, on fresh random rows; a ratio is that of two timings of one turn.
Without a GPU the host's part alone is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engram_lab.memory.host import HostStore
from engram_lab.memory.layout import RecordLayout
from engram_lab.memory.room import GIB, available_memory
from engram_lab.memory.stores import DeviceStore

PIECES = 4  # of a gather that is copied while the next is gathered
Call = Callable[[Tensor], object]


def seconds(call: Call, ids: Tensor, cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call(ids)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def methods(store: HostStore, n: int, cuda: bool) -> Iterator[tuple[str, Call, Tensor | None, bool]]:
    """Yield name, call, the buffer that then holds the rows (None: not to be compared), ids on the device."""
    S = store.record_bytes
    table, words = store.records, store.records.view(torch.int64)
    near = torch.zeros(n, S, dtype=torch.uint8, pin_memory=cuda)
    other = torch.zeros(n, S, dtype=torch.uint8)
    yield "host: copy of as many bytes", lambda ids: near.copy_(other), None, False
    select = lambda ids: torch.index_select(words, 0, ids, out=near.view(torch.int64))  # noqa: E731
    yield "host: index_select", select, near, False
    yield "host: HostStore.read", lambda ids: store.read(ids, near), near, False
    yield "host: index_copy_", lambda ids: words.index_copy_(0, ids, written(near, ids)), None, False
    yield (
        "host: HostStore.write",
        lambda ids: store.write(ids, written(near, ids).view(torch.uint8)),
        None,
        False,
    )
    if not cuda:
        return
    far = torch.zeros(n, S, dtype=torch.uint8, device="cuda")

    def gather_and_copy(ids: Tensor) -> None:
        size = -(-n // PIECES)
        for first in range(0, n, size):
            part = slice(first, min(n, first + size))
            store.read(ids[part], near[part])
            far[part].copy_(near[part], non_blocking=True)

    def select_and_copy(ids: Tensor) -> None:
        select(ids)
        far.copy_(near, non_blocking=True)

    resident = DeviceStore(store.rows, S, "cuda")
    resident.records.copy_(table)
    twin = torch.empty_like(far)
    yield "bus: pinned copy of as many bytes", lambda ids: far.copy_(near, non_blocking=True), None, False
    yield "to the device: HostStore.read + copy", gather_and_copy, far, False
    yield "to the device: index_select + copy", select_and_copy, far, False
    from zero_copy import gather  # needs Triton

    yield "to the device: zero-copy kernel", lambda ids: gather(table, ids, far), far, True
    yield "device: copy of as many bytes", lambda ids: twin.copy_(far), None, True
    yield "device: DeviceStore.read", lambda ids: resident.read(ids, far), far, True
    yield "device: DeviceStore.write", lambda ids: resident.write(ids, far), None, True


def written(buffer: Tensor, ids: Tensor) -> Tensor:
    """What is written to rows: their own numbers, so that the table stays as it is."""
    words = buffer.view(torch.int64)
    words[:, 0] = ids
    return words


def measure(S: int, options: argparse.Namespace, cuda: bool) -> list[dict[str, Any]]:
    n = int(options.mib * 2**20) // S
    store = HostStore(int(options.gib * GIB) // S, S, threads=options.threads)
    words = store.records.view(torch.int64)
    words.zero_()  # pages that were never written would all be one
    words[:, 0] = torch.arange(store.rows)
    found = list(methods(store, n, cuda))
    times: dict[str, list[float]] = {name: [] for name, *_ in found}
    failed: dict[str, str] = {}
    for turn in range(options.turns + 1):
        for name, call, result, on_device in found:
            if name in failed:
                continue
            ids = torch.randint(store.rows, (n,))
            ids = ids.sort().values if options.ascending else ids
            there = ids.cuda() if on_device else ids
            try:
                spent = seconds(call, there, cuda)
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            if turn:  # the first compiles
                times[name].append(spent)
            elif result is not None:
                assert torch.equal(result.view(torch.int64)[:, 0].cpu(), ids), f"{name} gathered other rows"
    store.close()
    rows = []
    copy, plain = times["host: copy of as many bytes"], times["host: index_select"]
    for name, *_ in found:
        if name in failed:
            rows.append({"row_bytes": S, "method": name, "failed": failed[name]})
            continue
        ours = times[name]
        rows.append(
            {
                "row_bytes": S,
                "method": name,
                "rows_per_second": spread([n / t for t in ours]),
                "bytes_per_second": spread([n * S / t for t in ours]),
                "over_index_select": spread([a / b for a, b in zip(plain, ours, strict=True)]),
                "over_host_copy": spread([a / b for a, b in zip(copy, ours, strict=True)]),
            }
        )
    return rows


def measure_alignments(options: argparse.Namespace, cuda: bool) -> list[dict[str, Any]]:
    """Time reads and writes of as many rows out of as many, float8 of 80 values, by their alignment."""
    layouts = [RecordLayout(row_dim=80, weights="float8", rule=None, alignment=a) for a in options.alignments]
    rows = int(options.gib * GIB) // sum(layout.record_bytes for layout in layouts)
    n = int(options.mib * 2**20) // max(layout.record_bytes for layout in layouts)
    calls: list[tuple[str, int, Call, bool]] = []
    for layout in layouts:
        S = layout.record_bytes
        stores: list[HostStore | DeviceStore] = [HostStore(rows, S, threads=options.threads)]
        stores += [DeviceStore(rows, S, "cuda")] if cuda else []
        for store in stores:
            store.records.fill_(1)  # pages that were never written would all be one
            buffer = torch.ones(n, S, dtype=torch.uint8, device=store.device)
            kind, there = type(store).__name__, store.device.type == "cuda"
            calls.append((f"{kind}.read", S, lambda ids, s=store, b=buffer: s.read(ids, b), there))
            calls.append((f"{kind}.write", S, lambda ids, s=store, b=buffer: s.write(ids, b), there))
    calls.sort(key=lambda call: call[0])
    times: dict[tuple[str, int], list[float]] = {call[:2]: [] for call in calls}
    for turn in range(options.turns + 1):
        for name, S, call, there in calls:
            ids = torch.randint(rows, (n,)).unique()  # writes are of distinct rows
            ids = ids[torch.randperm(len(ids))]
            spent = seconds(call, ids.cuda() if there else ids, cuda) / len(ids)
            if turn:
                times[name, S].append(spent)
    first = layouts[0].record_bytes
    return [
        {
            "row_bytes": S,
            "method": name,
            "rows_per_second": spread([1 / t for t in spent]),
            "over_first": spread([t / f for t, f in zip(spent, times[name, first], strict=True)]),
        }
        for (name, S), spent in times.items()
    ]


def table_of_alignments(result: dict[str, Any]) -> str:
    first = result["rows"][0]["row_bytes"]
    lines = [f"{result['machine']}", "", f"`{result['command']}`", ""]
    lines += [
        f"| row, bytes | method | million rows/s (10-90 %) | x time of {first} bytes (10-90 %) |",
        "|---:|---|---:|---:|",
    ]
    for row in result["rows"]:
        low, middle, high = (value / 1e6 for value in row["rows_per_second"])
        a, m, b = row["over_first"]
        lines.append(
            f"| {row['row_bytes']} | {row['method']} | {middle:.1f} ({low:.1f}-{high:.1f}) "
            f"| {m:.2f} ({a:.2f}-{b:.2f}) |"
        )
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> list[float]:
    """Return the 10th, 50th and 90th percentile."""
    if len(values) < 3:
        return [min(values), statistics.median(values), max(values)]
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return [deciles[0], deciles[4], deciles[8]]


def table(result: dict[str, Any]) -> str:
    lines = [f"{result['machine']}", "", f"`{result['command']}`", ""]
    lines += [
        "| row, bytes | method | million rows/s (10-90 %) | GB/s | x host's index_select | x host's copy |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        start = f"| {row['row_bytes']} | {row['method']} |"
        if "failed" in row:
            lines.append(f"{start} failed: {row['failed']} | | | |")
            continue
        low, middle, high = (value / 1e6 for value in row["rows_per_second"])
        ratios = (row[name] for name in ("over_index_select", "over_host_copy"))
        cells = " | ".join(f"{m:.2f} ({a:.2f}-{b:.2f})" for a, m, b in ratios)
        speed = row["bytes_per_second"][1] / 1e9
        lines.append(f"{start} {middle:.1f} ({low:.1f}-{high:.1f}) | {speed:.1f} | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small table and few turns: does it run?")
    parser.add_argument("--row-bytes", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--alignments", type=int, nargs="+", help="compare these instead of methods")
    parser.add_argument("--gib", type=float, help="size of the table; 8, or a quarter of the memory")
    parser.add_argument("--mib", type=float, help="bytes gathered at a time; 64")
    parser.add_argument("--turns", type=int)
    parser.add_argument("--threads", type=int, help="of the host; all cores")
    parser.add_argument("--ascending", action="store_true", help="rows in ascending order")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.gib = options.gib or min(0.25 if options.quick else 8.0, available_memory() / GIB / 4)
    options.mib = options.mib or (4 if options.quick else 64)
    options.turns = options.turns or (3 if options.quick else 15)
    cuda = torch.cuda.is_available()
    cores = len(os.sched_getaffinity(0))
    options.threads = options.threads or cores
    torch.set_num_threads(options.threads)
    machine = f"{platform.machine()}, {cores} cores, {torch.cuda.get_device_name() if cuda else 'no GPU'}"
    chosen = (f"--{name} {getattr(options, name):.4g}" for name in ("gib", "mib", "turns", "threads"))
    command = f"python benchmarks/gather_rows.py {' '.join(chosen)}{' --ascending' * options.ascending}"
    if options.alignments:
        command += f" --alignments {' '.join(map(str, options.alignments))}"
    result = {"machine": f"{machine}, torch {torch.__version__}", "command": command, "rows": []}
    if options.alignments:
        result["rows"] = measure_alignments(options, cuda)
    for S in () if options.alignments else options.row_bytes:
        start = time.perf_counter()
        result["rows"] += measure(S, options, cuda)
        print(f"{S} bytes: {time.perf_counter() - start:.1f} s", flush=True)
    text = table_of_alignments(result) if options.alignments else table(result)
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) if options.out.suffix == ".json" else text)


if __name__ == "__main__":
    main()

"""Where a served step's time goes: by how the kernel reads over the bus, and kernel by kernel."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from serving_backbone import Backbone, Batch, Lane, Memory
from serving_measure import finish
from torch.profiler import ProfilerActivity, profile

try:
    from engram_lab.memory import gather_triton
except ImportError:  # triton comes with torch's builds for CUDA only
    gather_triton = None  # type: ignore[assignment]

SETTINGS = [(128, 32), (512, 32), (1024, 32), (2048, 32), (2048, 16), (2048, 64)]
"""Rows worth a program, and rows it has under way at once."""
SHOWN = 40
IDLE = 50.0  # microseconds


def settings() -> str:
    """Say how the kernel reads now."""
    if gather_triton is None:
        return "no kernel"
    return f"rows a program {gather_triton.SHARE}, under way {gather_triton.ROWS}"


def _use(setting: tuple[int, int]) -> None:
    if gather_triton is not None:
        gather_triton.SHARE, gather_triton.ROWS = setting


def sweep(
    backbone: Backbone, batch: Batch, memories: dict[str, Memory | None], rounds: int, steps: int
) -> list[dict[str, Any]]:
    """Time decoding by the kernel's settings, in turn, and leave the fastest set.

    Returns milliseconds a step with each; with a table on the device, with a module that asks none, and
    without a module; and of the gather alone.
    """
    memory = memories["host"]
    assert memory is not None
    steps_of: dict[str, Callable[[], None]] = {}
    chosen: dict[str, tuple[int, int]] = {}
    for way in ("none", "small"):
        steps_of[way] = Lane(backbone, batch, memories[way], ahead=False).step
    steps_of["module, its rows given"] = Lane(backbone, batch, memory, ahead=True).compute
    if backbone.device.type == "cuda":
        usual, memory.table._stream = memory.table._stream, torch.cuda.Stream(priority=0)
        steps_of["on a stream of usual priority"] = Lane(backbone, batch, memory, ahead=False).step
        memory.table._stream = usual
    for setting in SETTINGS if gather_triton is not None else SETTINGS[:2]:
        _use(setting)
        name = f"{setting[0]} rows a program, {setting[1]} under way"
        steps_of[name] = Lane(backbone, batch, memory, ahead=False).step
        chosen[name] = setting
    start = batch.lengths.clone()
    times: dict[str, list[float]] = {name: [] for name in steps_of}
    coming = torch.randint(1, backbone.shape.vocab, (steps + 1, len(start)), device=backbone.device)
    for turn in range(rounds + 1):
        for name in np.roll(list(steps_of), turn):
            batch.lengths.copy_(start)
            batch.feed(coming)
            finish(backbone.device)
            began = time.perf_counter()
            for _ in range(steps):
                steps_of[name]()
            finish(backbone.device)
            if turn:  # the first warms
                times[name].append(1e3 * (time.perf_counter() - began) / steps)
    batch.lengths.copy_(start)
    found = []
    for name, taken in times.items():
        row = {"way": name, "ms": float(np.median(taken)), "least": min(taken), "most": max(taken)}
        if name in chosen and backbone.device.type == "cuda":
            _use(chosen[name])
            row["gather_us"] = _alone(memory, batch)
        found.append(row)
        print(
            "  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()),
            flush=True,
        )
    best = min((row for row in found if row["way"] in chosen), key=lambda row: row["ms"])
    _use(chosen[best["way"]])
    print(f"fastest: {best['way']}", flush=True)
    return found


def _alone(memory: Memory, batch: Batch, times: int = 50) -> float:
    """Return the microseconds of one gather of a step's rows with nothing beside it."""
    records = memory.table._records
    assert records is not None
    ids = torch.randint(0, len(records), (times, batch.addresses.numel()), device=batch.addresses.device)
    out = torch.empty((ids.shape[1], records.shape[1]), dtype=torch.uint8, device=ids.device)
    gather_triton.gather(records, ids[0], out)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for row in ids:
            gather_triton.gather(records, row, out)
    begin.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * begin.elapsed_time(end) / times


def print_step(name: str, step: Callable[[], None]) -> None:
    """Print the first kernels of the second of two steps, by the time they begin."""
    events = _events(lambda: _twice(step))
    starts = np.array([event["ts"] for event in events])
    gaps = np.flatnonzero(np.diff(starts) > 5000)
    events = events[int(gaps[-1]) + 1 :] if len(gaps) else events
    print(f"{name}: {len(events)} kernels, microseconds", flush=True)
    if not events:
        return
    first, last = events[0]["ts"], max(event["ts"] + event["dur"] for event in events)
    print(f"  from first to last {last - first:.0f}, busy {_busy(events):.0f}")
    looked = [event for event in events if "_gather" in event["name"] or "_float8" in event["name"]]
    for event in events[:SHOWN] + [event for event in looked if event not in events[:SHOWN]]:
        print(f"  {_line(event, first)}")


def print_idle(name: str, work: Callable[[], Any]) -> None:
    """Print where the device waits while `work` is done."""
    events = _events(work)
    print(f"{name}: {len(events)} kernels, busy {_busy(events) / 1e3:.2f} ms", flush=True)
    if not events:
        return
    first, until = events[0]["ts"], events[0]["ts"]
    print(f"  lasts {(max(e['ts'] + e['dur'] for e in events) - first) / 1e3:.2f} ms; idle, ms at ms:")
    idle = []
    for event in events:
        if event["ts"] - until > IDLE:
            idle.append(f"{(event['ts'] - until) / 1e3:.2f} at {(until - first) / 1e3:.2f}")
        until = max(until, event["ts"] + event["dur"])
    print("  " + "; ".join(idle[:30]))
    copies = [e for e in events if e.get("cat") == "gpu_memcpy" and e["dur"] > IDLE]
    for event in copies[:6] + [e for e in events if "_float8" in e["name"]][:6]:
        print(f"  {_line(event, first)}")


def _twice(step: Callable[[], None]) -> None:
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    time.sleep(0.01)
    step()


def _line(event: dict[str, Any], first: float) -> str:
    more = event["args"]
    return (
        f"{event['ts'] - first:9.1f} +{event['dur']:8.1f}  stream {more.get('stream')}  "
        f"grid {more.get('grid', '')} x {more.get('block', '')}, registers "
        f"{more.get('registers per thread', '')}, shared {more.get('shared memory', '')}  "
        f"{event['name'][:64]}"
    )


def _busy(events: list[dict[str, Any]]) -> float:
    """Return how long something was running."""
    total, until = 0.0, 0.0
    for event in events:
        total += max(0.0, event["ts"] + event["dur"] - max(until, event["ts"]))
        until = max(until, event["ts"] + event["dur"])
    return total


def _events(work: Callable[[], Any]) -> list[dict[str, Any]]:
    """Return what ran on the device, by when it began; times in microseconds."""
    if not torch.cuda.is_available():
        work()
        return []
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        work()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    ran = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    return sorted(ran, key=lambda event: event["ts"])

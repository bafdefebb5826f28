"""What a 100 B-parameter table in host memory costs a server: throughput with and without, interleaved.

    python benchmarks/serving.py --out serving.json

512 sequences of 100 to 1,024 random tokens are prefilled in chunks of 16 equally long ones and decoded 128 at
a time, from a CUDA graph, by dense backbones of 4 B and 8 B parameters with random weights. Three ways take
turns on every group of 128: no module; the module in the second block with a small table on the device; the
same with the large FP8 table in host memory. The first ratio is the module's own arithmetic (its hash
included), the second the look-up. Random tokens have no locality: every row is read from anywhere.

A pair serves one group there and back (small, host, host, small; the next pair host, small, small, host), so
that a drift of the clock falls on both ways alike. Losses are medians over pairs. Before the first of them,
every shape is prefilled with a module: the first to meet a shape loads its kernels.

Results are written after every group; `--rehearse` runs everything in seconds on a CPU, at toy sizes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import serving_profile
import torch
from serving_backbone import SHAPES, Backbone, Batch, Memory, Prompt, Shape
from serving_measure import AHEAD, BOTH, Runner, check, finish, losses
from serving_tables import SMALL, add_table_options, build_memory, engram, fill, layout_of

from engram_lab.files import write_atomically
from engram_lab.memory.host import HostStore
from engram_lab.memory.layout import RecordLayout
from engram_lab.memory.lookup import FEW_ROWS, ServingTable
from engram_lab.memory.serving import GATHERERS
from engram_lab.memory.stores import DeviceStore, RowStore
from engram_lab.model.engram import EngramConfig
from engram_lab.model.hashing import table_rows

WAYS = ("none", "small", "host")
TURNS = 2
"""Times that a pair serves its group each way: there and back."""
SPARE = 8
"""Tokens that sequences may have beyond the longest: what captures and checks decode."""


def summarise(pairs: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    names = {"module": ("none", "small"), "look_up": ("small", "host"), "all": ("none", "host")}
    found: dict[str, Any] = {
        name: {
            "together": losses(pairs, *ends, BOTH),
            **{part: losses(pairs, *ends, (part,)) for part in BOTH},
        }
        for name, ends in names.items()
    }
    for way in WAYS:
        mine = [pair for pair in pairs if way in pair]
        prefill, decode = (sum(sum(pair[way][part]) for pair in mine) for part in BOTH)
        new = options.new * options.batch * TURNS * len(mine)
        found[f"tokens_per_second_{way}"] = {
            "prefill": sum(pair["prompt_tokens"] for pair in mine) * TURNS / prefill,
            "decode": new / decode,
            "new_tokens_overall": new / (prefill + decode),
        }
    return found


def groups(options: argparse.Namespace, shape: Shape, device: torch.device) -> list[list[Prompt]]:
    """Return the prompts: groups of chunks of equally long sequences."""
    generator = np.random.default_rng(0)
    chunks = options.sequences // options.chunk
    lengths = generator.integers(options.shortest, options.longest + 1, chunks)
    per_group = options.batch // options.chunk
    texts = [generator.integers(1, shape.vocab, (options.chunk, int(length))) for length in lengths]
    prompts = [Prompt(torch.from_numpy(text).to(device), text) for text in texts]
    return [prompts[first : first + per_group] for first in range(0, chunks, per_group)]


def crossing(
    store: RowStore, layout: RecordLayout, options: argparse.Namespace, device: torch.device
) -> list[dict[str, float]]:
    """Time both paths alone, begin to join, by rows: where they cross is what `few` should be."""
    ways = {"kernel": 1 << 60, "threads": 0}
    tables = {
        name: ServingTable(store, layout, device=device, dtype=torch.bfloat16, few=few)
        for name, few in ways.items()
    }
    found = []
    for n in options.crossing:
        row: dict[str, float] = {"rows": n}
        for name, table in tables.items():
            times = []
            for _ in range(25):
                addresses = torch.randint(0, store.rows, (1, n // 16, 16), device=device)
                finish(device)
                started = time.perf_counter()
                table.begin(addresses)()
                finish(device)
                times.append(time.perf_counter() - started)
            row[f"{name}_ms"] = 1e3 * float(np.median(times[5:]))
        found.append(row)
        print("  ".join(f"{name} {value:,.3f}" for name, value in row.items()), flush=True)
    for table in tables.values():
        table.close()
    return found


class Bench:
    """Everything measured with one backbone; `result` grows and is saved as it does."""

    def __init__(
        self,
        name: str,
        options: argparse.Namespace,
        device: torch.device,
        tables: dict[str, tuple[EngramConfig, RowStore]],
        save: Callable[[dict[str, Any]], None],
    ) -> None:
        self.options, self.tables, self.layout = options, tables, layout_of(options)
        shape, dtype = SHAPES[name], torch.bfloat16 if device.type == "cuda" else torch.float32
        longest = options.longest + options.new + SPARE
        self.backbone = Backbone(shape, longest, device, dtype)
        self.batch = Batch(
            self.backbone, options.batch, longest, options.new + SPARE, 2 * options.heads, options.row_dim
        )
        self.prompts = groups(options, shape, device)
        self.coming = torch.randint(1, shape.vocab, (options.new + 1, options.batch), device=device)
        self.result: dict[str, Any] = {"parameters": shape.parameters}
        self._save = save

    def save(self, **found: Any) -> None:
        self.result |= found
        self._save(self.result)

    def memories(self, few: int) -> dict[str, Memory | None]:
        """Return each way's module, whose kernel reads up to `few` rows over the bus."""
        made: dict[str, Memory | None] = {"none": None}
        for way, (config, store) in self.tables.items():
            made[way] = build_memory(config, store, self.layout, self.backbone, far=way == "host", few=few)
        return made

    def run(self) -> None:
        """Measure one part after the other; one that fails is reported and leaves the others alone."""
        parts: dict[str, Callable[[], None]] = {
            "check": self.check,
            "sweep": self.sweep,
            "pairs": self.pairs,
            "timelines": self.timelines,
        }
        for name in self.options.parts:
            began = time.perf_counter()
            try:
                parts[name]()
            except Exception as error:  # the others may still succeed
                traceback.print_exc()
                self.save(failed={**self.result.get("failed", {}), name: repr(error)})
            print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)
            gc.collect()
            if self.backbone.device.type == "cuda":
                torch.cuda.empty_cache()

    def check(self) -> None:
        """Decoding must give what taking the tokens in at once gives."""
        errors = {
            way: check(self.backbone, self.batch, memory, self.options.shortest, ahead=False)
            for way, memory in self.memories(self.options.few).items()
        }
        print(f"decoding equals prefill to {errors}", flush=True)
        self.save(decode_error=errors)

    def start_batch(self) -> None:
        """Give the batch lengths of the middle, at which it can be decoded and captured."""
        self.batch.lengths.fill_((self.options.shortest + self.options.longest) // 2)
        self.batch.step.zero_()

    def sweep(self) -> None:
        """Time decoding steps by how the kernel reads, and go on with what is fastest."""
        memories = self.memories(self.options.few)
        self.start_batch()
        found = serving_profile.sweep(
            self.backbone, self.batch, memories, self.options.sweep_rounds, self.options.sweep_steps
        )
        self.save(sweep=found)

    def pairs(self) -> None:
        """Prefill and decode groups of one batch each way."""
        options, began = self.options, time.perf_counter()
        self.start_batch()
        runner = Runner(self.backbone, self.memories(options.few), [self.batch])
        for group in self.prompts:
            runner.prefill("small", [group])
        longest = max((p for group in self.prompts for p in group), key=lambda prompt: prompt.text.size)
        for way in WAYS:  # pinned memory grows to the longest
            runner.prefill(way, [[longest] * min(1 + AHEAD, len(self.prompts[0]))])
            runner.decode(way, [self.coming], options.new, self.prompts[0])
        pairs: list[dict[str, Any]] = []
        while len(pairs) < options.pairs:
            if time.perf_counter() - began > options.seconds and len(pairs) > 1:
                print(f"stopped after {len(pairs)} pairs: {options.seconds:.0f} s are over", flush=True)
                break
            number = len(pairs)
            group, after = (self.prompts[n % len(self.prompts)] for n in (number, number + 1))
            ways = ["small", "host"] if number % 2 == 0 else ["host", "small"]
            if number % options.none_every == 0:
                ways.insert(0, "none")
            pair: dict[str, Any] = {"prompt_tokens": sum(prompt.text.size for prompt in group)}
            pair |= {way: {part: [] for part in BOTH} for way in ways}
            for turn, way in enumerate(ways + ways[::-1]):
                following = group if turn < len(ways) else after
                pair[way]["prefill"].append(runner.prefill(way, [group]))
                pair[way]["decode"].append(runner.decode(way, [self.coming], options.new, following))
            pairs.append(pair)
            self.save(pairs=pairs, **summarise(pairs, options))
        runner.close()
        for part, found in summarise(pairs, options).items():
            print(f"{part}: {json.dumps(found)}", flush=True)

    def timelines(self) -> None:
        """Print what the device does in a step, and where prefill leaves it idle."""
        memories = self.memories(self.options.few)
        self.start_batch()
        runner = Runner(self.backbone, memories, [self.batch])
        print(serving_profile.settings(), flush=True)
        for way in WAYS[1:]:
            self.start_batch()
            runner.decode(way, [self.coming], 2)
            lane = runner.lanes[way][0]
            serving_profile.print_step(f"decode, {way}", lane.step)
        for way in WAYS[1:]:
            serving_profile.print_idle(
                f"prefill, {way}", lambda way=way: runner.prefill(way, [self.prompts[0]])
            )
        runner.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("serving.json"))
    parser.add_argument("--backbones", nargs="+", default=["4B", "8B"], choices=list(SHAPES))
    add_table_options(parser, 100e9)
    parser.add_argument("--few", type=int, default=FEW_ROWS, help="rows up to which the kernel reads them")
    parser.add_argument(
        "--parts",
        nargs="+",
        default=["check", "pairs"],
        choices=["check", "sweep", "pairs", "timelines"],
        help="what is measured; sweep: how the kernel reads; timelines: kernels of a step",
    )
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument(
        "--none-every", type=int, default=1, help="pairs from one without a module to the next"
    )
    parser.add_argument("--seconds", type=float, default=170, help="for the pairs of each backbone")
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--batch", type=int, default=128, help="sequences decoded at once")
    parser.add_argument("--chunk", type=int, default=16, help="sequences prefilled at once")
    parser.add_argument("--shortest", type=int, default=100)
    parser.add_argument("--longest", type=int, default=1024)
    parser.add_argument("--new", type=int, default=128, help="tokens decoded per sequence")
    parser.add_argument("--sweep-rounds", type=int, default=5)
    parser.add_argument("--sweep-steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=GATHERERS, help="that gather rows")
    parser.add_argument("--crossing", type=int, nargs="*", default=[1 << k for k in range(10, 21)])
    parser.add_argument("--rehearse", action="store_true", help="toy sizes, on a CPU, in seconds")
    options = parser.parse_args()
    if options.rehearse:
        options.backbones, options.parameters, options.pairs = ["tiny"], 40_000, 3
        options.sequences, options.batch, options.chunk, options.new = 16, 8, 4, 5
        options.shortest, options.longest, options.threads = 6, 20, 2
        options.crossing, options.sweep_rounds, options.sweep_steps = [64, 256], 2, 2
    torch.set_num_threads(1)  # the table's threads are its own
    device = torch.device("cpu" if options.rehearse or not torch.cuda.is_available() else "cuda:0")
    layout = layout_of(options)
    configs = {
        "small": engram(options, min(options.parameters / 2, SMALL)),
        "host": engram(options, options.parameters),
    }
    rows = {way: table_rows(config)[0] for way, config in configs.items()}
    started = time.perf_counter()
    small = DeviceStore(rows["small"], layout.record_bytes, device)
    fill(small, layout, 1)
    host = HostStore(rows["host"], layout.record_bytes, threads=options.threads)
    mapped = time.perf_counter()
    fill(host, layout, len(os.sched_getaffinity(0)))
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    results: dict[str, Any] = {
        "machine": machine,
        "torch": torch.__version__,
        "options": {name: str(value) for name, value in vars(options).items()},
        "record_bytes": layout.record_bytes,
        "table_rows": rows,
        "table_parameters": rows["host"] * options.row_dim,
        "table_bytes": rows["host"] * layout.record_bytes,
        "seconds_to_map_and_register": mapped - started,
        "seconds_to_fill": time.perf_counter() - mapped,
        "backbones": {},
    }

    def save(name: str | None = None, result: Any = None) -> None:
        if name is not None:
            results["backbones"][name] = result
        write_atomically(options.out, json.dumps(results, indent=1) + "\n")

    save()
    print(json.dumps({name: results[name] for name in list(results)[:-1]}, indent=1), flush=True)
    with torch.no_grad():
        results["crossing"] = crossing(host, layout, options, device)
        save()
        tables = {"small": (configs["small"], small), "host": (configs["host"], host)}
        for name in options.backbones:
            bench = Bench(name, options, device, tables, lambda result, name=name: save(name, result))
            bench.run()
            del bench
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    host.close()


if __name__ == "__main__":
    main()

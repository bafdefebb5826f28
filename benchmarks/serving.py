"""What a 100 B-parameter table in host memory costs a server: throughput with and without, interleaved.

    python benchmarks/serving.py --out serving.json

512 sequences of 100 to 1,024 random tokens are prefilled in chunks of 16 equally long ones and decoded 128 at
a time, from a CUDA graph, by dense backbones of 4 B and 8 B parameters with random weights. Three ways take
turns on every group of 128: no module; the module in the second block with a small table on the device; the
same with the large FP8 table in host memory. The first ratio is the module's own arithmetic (its hash
included), the second the look-up. Random tokens have no locality: every row is read from anywhere.

Results are written after every group; `--rehearse` runs everything in seconds on a CPU, at toy sizes.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from serving_backbone import SHAPES, Backbone, Memory, Prompt, Shape

from engram_lab.files import write_atomically
from engram_lab.memory.host import HostStore
from engram_lab.memory.layout import RecordLayout
from engram_lab.memory.lookup import SLOTS, ServingTable
from engram_lab.memory.stores import DeviceStore, RowStore
from engram_lab.model.engram import Engram, EngramConfig
from engram_lab.model.hashing import NgramHash, table_rows
from engram_lab.model.torch_hash import TorchNgramHash

WAYS = ("none", "small", "host")
CHUNK_SEQUENCES = 16
FILL_BYTES = 64 << 20


def engram(options: argparse.Namespace, parameters: float) -> EngramConfig:
    """Return the module whose table has about so many parameters."""
    heads = 2 * options.heads
    return EngramConfig(
        layers=(1,),
        orders=(2, 3),
        heads=options.heads,
        row_dim=options.row_dim,
        rows_per_head=int(parameters / options.row_dim / heads),
        canonical=False,
        row_storage="float8",
    )


def random_records(layout: RecordLayout, rows: int) -> torch.Tensor:
    """Return valid float8 records: codes that are numbers, scales near 2^-6."""
    records = torch.randint(0, 256, (rows, layout.record_bytes), dtype=torch.uint8)
    records &= 0xBF  # no code with all exponent bits set, which would not be a number
    layout.fields(records)["scales"].fill_(-6)
    return records


def fill(store: HostStore | DeviceStore, layout: RecordLayout, threads: int) -> None:
    """Repeat a block of random records over the whole store."""
    rows = min(store.rows, FILL_BYTES // layout.record_bytes)
    block = random_records(layout, rows).to(store.device)

    def copy(first: int) -> None:
        part = store.records[first : first + rows]
        part.copy_(block[: len(part)])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(copy, range(0, store.rows, rows)))


def build_memory(
    options: argparse.Namespace,
    config: EngramConfig,
    store: RowStore,
    layout: RecordLayout,
    backbone: Backbone,
    host_hash: bool,
) -> Memory:
    shape, device = backbone.shape, backbone.device
    rule = NgramHash.build(config, None, shape.vocab, eos_id=0)
    torch.manual_seed(0)
    module = Engram(config, shape.width)
    assert module.conv is not None
    torch.nn.init.normal_(module.conv.weight, std=0.1)  # so that `check` sees its state
    return Memory(
        rule=rule,
        hash=TorchNgramHash(rule).to(device),
        table=ServingTable(store, layout, device=device, dtype=backbone.dtype, few=options.few),
        module=module.to(device, backbone.dtype).eval(),
        host_hash=host_hash,
    )


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def check(backbone: Backbone, memory: Memory | None, tokens: int) -> float:
    """Return how far decoding one token at a time is from taking them in at once, relative to the logits.

    AssertionError where it is not rounding.
    """
    count = min(4, len(backbone.lengths))
    ids = torch.randint(1, backbone.shape.vocab, (count, tokens + 3), device=backbone.device)
    backbone.prefill(Prompt(ids, ids.cpu().numpy()), 0, memory)
    expected = backbone.logits[:count].float().clone()
    backbone.lengths.zero_()
    begun = ids[:, :tokens].contiguous()
    backbone.prefill(Prompt(begun, begun.cpu().numpy()), 0, memory)
    backbone.ids[:count] = ids[:, tokens : tokens + 1]
    backbone.coming = torch.zeros(4, len(backbone.lengths), dtype=torch.int64, device=backbone.device)
    backbone.coming[:3, :count] = ids[:, [tokens + 1, tokens + 2, 0]].T
    backbone.step.zero_()
    for _ in range(3):
        backbone.decode(memory)
    error = float((backbone.logits[:count].float() - expected).abs().max() / expected.abs().max())
    assert error < (0.2 if backbone.dtype == torch.bfloat16 else 1e-3), error
    return error


def decoder(backbone: Backbone, memory: Memory | None) -> Callable[[], None]:
    """Return one decoding step: the replay of a graph where there is a GPU."""
    if backbone.device.type != "cuda":
        return lambda: backbone.decode(memory)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            backbone.decode(memory)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backbone.decode(memory)
    return graph.replay


class Runner:
    """Prefills and decodes groups of sequences on one backbone, each way."""

    def __init__(self, options: argparse.Namespace, backbone: Backbone, memories: dict[str, Any]) -> None:
        self.options, self.backbone, self.memories = options, backbone, memories
        self.coming = torch.randint(
            1, backbone.shape.vocab, (options.new + 8, options.batch), device=backbone.device
        )
        backbone.coming, self.steps = self.coming, {}
        backbone.lengths.fill_(options.shortest)
        for way in WAYS:
            backbone.step.zero_()
            self.steps[way] = decoder(backbone, memories[way])

    def warm(self, prompts: list[list[Prompt]]) -> None:
        """Meet every shape, and let buffers grow to the largest, before anything is timed."""
        chunks = [prompt for group in prompts for prompt in group]
        longest = max(chunks, key=lambda prompt: prompt.text.size)
        for prompt in chunks:
            self.backbone.prefill(prompt, 0, None)
        for way in WAYS:
            for _ in range(SLOTS + 1):
                self.backbone.prefill(longest, 0, self.memories[way])
            self.measure(way, prompts[0])

    def measure(self, way: str, prompts: list[Prompt]) -> tuple[float, float]:
        """Return seconds of prefill and of decoding one group."""
        backbone = self.backbone
        finish(backbone.device)
        started = time.perf_counter()
        memory, joins = self.memories[way], dict[int, Any]()
        for number, prompt in enumerate(prompts):
            if memory is not None and self.options.ahead:
                for begun in range(number, min(number + 2, len(prompts))):
                    if begun not in joins:
                        joins[begun] = memory.begin(prompts[begun])
            backbone.prefill(prompt, number * len(prompt.ids), memory, joins.get(number))
        finish(backbone.device)
        taken_in = time.perf_counter()
        backbone.step.zero_()
        backbone.ids.copy_(self.coming[-1:].T)
        finish(backbone.device)
        decoding = time.perf_counter()
        for _ in range(self.options.new):
            self.steps[way]()
        finish(backbone.device)
        return taken_in - started, time.perf_counter() - decoding


def losses(pairs: list[dict[str, Any]], base: str, way: str, parts: tuple[str, ...]) -> dict[str, Any]:
    """Return the mean loss of throughput in percent, and its 95 % bootstrap interval over pairs."""
    times = {
        name: np.array([sum(pair[name][part] for part in parts) for pair in pairs]) for name in (base, way)
    }
    loss = 100 * (1 - times[base] / times[way])
    draws = np.random.default_rng(0).integers(0, len(loss), (10_000, len(loss)))
    low, high = np.quantile(loss[draws].mean(1), [0.025, 0.975])
    return {
        "loss_percent": float(loss.mean()),
        "low": float(low),
        "high": float(high),
        "pairs": len(loss),
        "spread": float(loss.std(ddof=1)) if len(loss) > 1 else None,
    }


def summarise(pairs: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    both = ("prefill", "decode")
    names = {"module": ("none", "small"), "look_up": ("small", "host"), "all": ("none", "host")}
    found: dict[str, Any] = {
        name: {
            "together": losses(pairs, *ends, both),
            **{part: losses(pairs, *ends, (part,)) for part in both},
        }
        for name, ends in names.items()
    }
    prompt = sum(pair["prompt_tokens"] for pair in pairs)
    new = options.new * options.batch * len(pairs)
    for way in WAYS:
        prefill, decode = (sum(pair[way][part] for pair in pairs) for part in both)
        found[f"tokens_per_second_{way}"] = {
            "prefill": prompt / prefill,
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


def run_backbone(
    name: str,
    options: argparse.Namespace,
    device: torch.device,
    tables: dict[str, tuple[EngramConfig, RowStore]],
    layout: RecordLayout,
    save: Callable[[dict[str, Any]], None],
) -> None:
    began = time.perf_counter()
    shape = SHAPES[name]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    backbone = Backbone(shape, options.batch, options.longest + options.new + 8, device, dtype)
    memories: dict[str, Memory | None] = {"none": None}
    for way, (config, store) in tables.items():
        host_hash = way == "host" and options.prefill_hash == "host"
        memories[way] = build_memory(options, config, store, layout, backbone, host_hash)
    errors = {way: check(backbone, memories[way], options.shortest) for way in WAYS}
    print(
        f"{name}: {shape.parameters / 1e9:.2f} B parameters; decoding equals prefill to {errors}", flush=True
    )
    runner = Runner(options, backbone, memories)
    prompts = groups(options, shape, device)
    runner.warm(prompts)
    pairs: list[dict[str, Any]] = []
    while len(pairs) < options.pairs:
        if time.perf_counter() - began > options.seconds and len(pairs) > 1:
            print(f"stopped after {len(pairs)} pairs: {options.seconds:.0f} s are over", flush=True)
            break
        number = len(pairs)
        group = prompts[number % len(prompts)]
        pair: dict[str, Any] = {"prompt_tokens": sum(prompt.text.size for prompt in group)}
        for turn in range(len(WAYS)):
            way = WAYS[(number + turn) % len(WAYS)]
            prefill, decode = runner.measure(way, group)
            pair[way] = {"prefill": prefill, "decode": decode}
        pairs.append(pair)
        result = {"parameters": shape.parameters, "decode_error": errors, "pairs": pairs}
        save({**result, **summarise(pairs, options)})
    for memory in memories.values():
        if memory is not None:
            memory.table.close()
    for part, found in summarise(pairs, options).items():
        print(f"{name} {part}: {json.dumps(found)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("serving.json"))
    parser.add_argument("--backbones", nargs="+", default=["4B", "8B"], choices=list(SHAPES))
    parser.add_argument("--parameters", type=float, default=100e9, help="of the table in host memory")
    parser.add_argument("--heads", type=int, default=8, help="per order")
    parser.add_argument("--row-dim", type=int, default=80)
    parser.add_argument("--alignment", type=int, default=4, help="of records, bytes")
    parser.add_argument("--few", type=int, default=8192, help="rows up to which the kernel reads them")
    parser.add_argument(
        "--prefill-hash", choices=("host", "device"), default="host", help="of the large table"
    )
    parser.add_argument(
        "--ahead", action="store_true", help="begin a chunk's look-up before the chunk that precedes it"
    )
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=170, help="for each backbone")
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--batch", type=int, default=128, help="sequences decoded at once")
    parser.add_argument("--chunk", type=int, default=CHUNK_SEQUENCES, help="sequences prefilled at once")
    parser.add_argument("--shortest", type=int, default=100)
    parser.add_argument("--longest", type=int, default=1024)
    parser.add_argument("--new", type=int, default=128, help="tokens decoded per sequence")
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--crossing", type=int, nargs="*", default=[1 << k for k in range(10, 21)])
    parser.add_argument("--rehearse", action="store_true", help="toy sizes, on a CPU, in seconds")
    options = parser.parse_args()
    if options.rehearse:
        options.backbones, options.parameters, options.pairs = ["tiny"], 40_000, 3
        options.sequences, options.batch, options.chunk, options.new = 16, 8, 4, 5
        options.shortest, options.longest, options.threads = 6, 20, 2
        options.crossing = [64, 256]
    torch.set_num_threads(1)  # the table's threads are its own
    device = torch.device("cpu" if options.rehearse or not torch.cuda.is_available() else "cuda:0")
    layout = RecordLayout(row_dim=options.row_dim, weights="float8", rule=None, alignment=options.alignment)
    configs = {
        "small": engram(options, min(options.parameters / 2, 1.3e8)),
        "host": engram(options, options.parameters),
    }
    rows = {way: table_rows(config)[0] for way, config in configs.items()}
    started = time.perf_counter()
    small = DeviceStore(rows["small"], layout.record_bytes, device)
    fill(small, layout, 1)
    host = HostStore(rows["host"], layout.record_bytes, threads=options.threads)
    mapped = time.perf_counter()
    fill(host, layout, options.threads)
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
        for name in options.backbones:
            tables = {"small": (configs["small"], small), "host": (configs["host"], host)}
            run_backbone(name, options, device, tables, layout, lambda result, name=name: save(name, result))
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    host.close()


if __name__ == "__main__":
    main()

"""What a table in the host's memory adds to a training step: the same network, tables taking turns.

    python benchmarks/tier_step.py --tokens train.npy --out tier_step.md

Whole steps (look-up, forward, backward, clip, optimizer of network and rows) in bfloat16 autocast, blocks
compiled, forward and backward pass replayed as one CUDA graph. One network is compiled once; its readings
come in turn from

    dense     one float32 parameter on the device, with fused Adam over all of its rows
    resident  records on the device, lazy Adam on the rows of the step
    host      the same records in the host's memory, gathered ahead, written back behind
    large     for the larger network: a table of 10 B parameters in the host's memory, bfloat16 rows and state

Blocks of steps alternate; every ratio is of neighbouring blocks, with a bootstrap interval of its median.
Token ids are those of a file (a corpus's train.npy) or, without, drawn from Zipf's law.
`--rehearse` runs everything in seconds on a CPU, at toy sizes.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from engram_lab.memory.host import HostStore
from engram_lab.memory.layout import RecordLayout
from engram_lab.memory.pipeline import RowPipeline
from engram_lab.memory.row_optimizer import RowOptimizer
from engram_lab.memory.stores import DeviceStore, RowStore, fill
from engram_lab.model.attention import AttentionConfig
from engram_lab.model.config import ModelConfig
from engram_lab.model.engram import EngramConfig
from engram_lab.model.experts import FeedForwardConfig
from engram_lab.model.hashing import NgramHash, table_rows
from engram_lab.model.initialise import initialise
from engram_lab.model.transformer import Transformer
from engram_lab.training.captured import CapturedStep
from engram_lab.training.execution import ExecutionConfig, prepare
from engram_lab.training.optimizer import OptimizerConfig, build_optimizer

DEPTH = 2
RATE = 1e-4


def networks(rehearse: bool) -> dict[str, ModelConfig]:
    """The study's network, and one of about 0.35 B active parameters."""
    if rehearse:
        tiny = ModelConfig(
            vocab_size=1000,
            d_model=32,
            n_layers=2,
            attention=AttentionConfig(n_heads=2, n_kv_heads=1),
            ffn=FeedForwardConfig(experts=4, top_k=2, expert_hidden=16, shared_experts=1),
            engram=EngramConfig(rows_per_head=500, heads=2, canonical=False),
        )
        return {"study": tiny, "0.35B": tiny}
    study = ModelConfig(
        vocab_size=16384,
        attention=AttentionConfig(n_heads=4, n_kv_heads=2),
        ffn=FeedForwardConfig(experts=102, top_k=6, expert_hidden=128, shared_experts=2),
        engram=EngramConfig(rows_per_head=100_000, canonical=False),
    )
    larger = ModelConfig(
        vocab_size=16384,
        d_model=1024,
        n_layers=24,
        attention=AttentionConfig(n_heads=16, n_kv_heads=4),
        ffn=FeedForwardConfig(experts=16, top_k=2, expert_hidden=1024, shared_experts=1),
        engram=EngramConfig(rows_per_head=100_000, row_dim=64, canonical=False),
    )
    return {"study": study, "0.35B": larger}


class Batches:
    """Token ids and addresses of a few batches, in turn."""

    def __init__(
        self, config: ModelConfig, text: np.ndarray, sequences: int, length: int, device: torch.device
    ):
        assert config.engram is not None
        hash = NgramHash.build(config.engram, None, config.vocab_size, 0)
        windows = len(text) // (length + 1)
        count = min(24, windows // sequences)
        cut = text[: count * sequences * (length + 1)].reshape(count, sequences, length + 1).astype(np.int64)
        self.ids = [torch.from_numpy(c[:, :-1].copy()).to(device) for c in cut]
        self.targets = [torch.from_numpy(c[:, 1:].copy()).to(device) for c in cut]
        addresses = [torch.from_numpy(hash.addresses(np.ascontiguousarray(c[:, :-1]))) for c in cut]
        self.addresses = [a.pin_memory() if device.type == "cuda" else a for a in addresses]

    def __len__(self) -> int:
        return len(self.ids)


class Dense:
    """One parameter on the device."""

    def __init__(self, engram: EngramConfig, device: torch.device):
        self.weights = nn.ParameterList(
            nn.Parameter(0.02 * torch.randn(rows, engram.row_dim, device=device))
            for rows in table_rows(engram)
        )
        self.adam = torch.optim.Adam(self.weights, lr=RATE, betas=(0.9, 0.95), fused=True)

    def announce(self, step: int, addresses: Tensor) -> None:
        pass

    def reading(self, step: int, addresses: Tensor) -> Tensor:
        here = addresses.to(self.weights[0].device, non_blocking=True)
        pairs = zip(here, self.weights, strict=True)
        return torch.stack([nn.functional.embedding(a, w).flatten(-2) for a, w in pairs])

    def gradients(self) -> list[Tensor]:
        return [w.grad for w in self.weights if w.grad is not None]

    def commit(self, scale: Tensor) -> None:
        torch._foreach_mul_(self.gradients(), scale)
        self.adam.step()
        self.adam.zero_grad()

    def close(self) -> None:
        pass


class Records:
    """Rows of a store, through the pipeline."""

    def __init__(self, engram: EngramConfig, layout: RecordLayout, store: RowStore, device: torch.device):
        rows = table_rows(engram)
        optimizer = RowOptimizer(
            layout, betas=(0.9, 0.95), eps=1e-8, momentum=0.95, rates=lambda step: RATE, seed=0
        )
        first_row = np.concatenate([[0], np.cumsum(rows)[:-1]]).tolist()
        self.pipeline = RowPipeline(store, layout, optimizer, first_row, device=device)

    def announce(self, step: int, addresses: Tensor) -> None:
        self.pipeline.announce(step, [addresses])

    def reading(self, step: int, addresses: Tensor) -> Tensor:
        self.pipeline.begin(step)
        return self.pipeline.reading(0)

    def gradients(self) -> list[Tensor]:
        return [self.pipeline.gradients()]

    def commit(self, scale: Tensor) -> None:
        self.pipeline.commit(scale)

    def close(self) -> None:
        self.pipeline.close()


def filled(store: RowStore, layout: RecordLayout) -> RowStore:
    """Fill a store with records that are alike in every chunk: the time is that of the copies."""
    chunk = torch.empty(1 << 16, layout.record_bytes, dtype=torch.uint8)
    layout.encode(0.02 * torch.randn(len(chunk), layout.row_dim), chunk)
    fill(store, lambda first, count, out: out.copy_(chunk[:count]))
    return store


class Way:
    """Steps of the network with rows from one source."""

    def __init__(self, source: Dense | Records, batches: Batches):
        self.source, self.batches, self.step, self.announced = source, batches, 0, 0

    def run(self, steps: int, train: Callable[[Way, int], None], device: torch.device) -> float:
        """Seconds a step, over `steps`."""
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(steps):
            self.step += 1
            while self.announced < self.step + DEPTH:
                self.announced += 1
                chosen = self.batches.addresses[self.announced % len(self.batches)]
                self.source.announce(self.announced, chosen)
            train(self, self.step % len(self.batches))
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / steps


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Median of the ratios and its 95 % bootstrap interval."""
    values = np.asarray(ratios)
    draws = np.random.default_rng(0).choice(values, (4000, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return float(np.median(values)), float(low), float(high)


def measure(
    name: str, config: ModelConfig, options: argparse.Namespace, text: np.ndarray
) -> dict[str, object]:
    """Time every way of one network."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert config.engram is not None
    network = Transformer(config, tables=nn.ModuleList())
    initialise(network, 0)
    network.to(device).train()
    optimizer = build_optimizer(
        network.named_parameters(), network.parameter_roles(), OptimizerConfig(learning_rate=RATE)
    )
    prepare(network, ExecutionConfig(), device)
    shape = (2, 16) if options.rehearse else (32, 1024) if name == "study" else (16, 1024)

    captured = CapturedStep(network, network.loss, optimizer) if device.type == "cuda" else None

    def train(way: Way, batch: int) -> None:
        inputs = {"ids": way.batches.ids[batch], "targets": way.batches.targets[batch]}
        inputs["readings"] = way.source.reading(way.step, way.batches.addresses[batch])
        with torch.autocast(device.type, torch.bfloat16):
            loss = (captured or network.loss)(**inputs)
        if captured is None:
            optimizer.zero_grad()
            loss.backward()
        rows = get_total_norm(way.source.gradients())
        optimizer.clip(1.0, elsewhere=rows, own=None if captured is None else captured.norm)
        optimizer.step()
        assert optimizer.gradient_scale is not None
        way.source.commit(optimizer.gradient_scale)

    engram = config.engram
    layout = RecordLayout(row_dim=engram.row_dim)
    rows = sum(table_rows(engram))
    batches = Batches(config, text, *shape, device)
    ways = {
        "dense": Way(Dense(engram, device), batches),
        "resident": Way(
            Records(engram, layout, filled(DeviceStore(rows, layout.record_bytes, device), layout), device),
            batches,
        ),
        "host": Way(
            Records(engram, layout, filled(HostStore(rows, layout.record_bytes), layout), device), batches
        ),
    }
    sizes = dict.fromkeys(ways, rows * engram.row_dim)
    if name == "0.35B":
        heads = len(engram.orders) * engram.heads
        wanted = options.large / engram.row_dim / heads
        wide = replace(engram, rows_per_head=int(wanted))
        small_records = RecordLayout(row_dim=engram.row_dim, weights="bfloat16", state="bfloat16")
        began = time.perf_counter()
        store = filled(HostStore(sum(table_rows(wide)), small_records.record_bytes), small_records)
        print(
            f"filled {store.rows * store.record_bytes / 2**30:.1f} GiB in {time.perf_counter() - began:.0f} s"
        )
        ways["large"] = Way(
            Records(wide, small_records, store, device),
            Batches(replace(config, engram=wide), text, *shape, device),
        )
        sizes["large"] = store.rows * engram.row_dim
    compiling = time.perf_counter()
    for way in ways.values():
        way.run(3 if not options.rehearse else 1, train, device)
    print(f"{name}: first steps of all ways took {time.perf_counter() - compiling:.0f} s", flush=True)
    for way in ways.values():  # warms up what the first steps have not
        way.run(options.steps, train, device)
        if isinstance(way.source, Records):
            way.source.pipeline.take_economy()
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(options.rounds):
        order = list(ways) if turn % 2 == 0 else list(reversed(ways))
        for way in order:
            seconds[way].append(ways[way].run(options.steps, train, device))
    result: dict[str, object] = {"network": name, "active_tokens": shape[0] * shape[1]}
    for way, times in seconds.items():
        entry: dict[str, object] = {
            "table_parameters": sizes[way],
            "milliseconds": [1000 * t for t in times],
            "median": 1000 * float(np.median(times)),
        }
        for other in ("dense", "resident"):
            entry[f"over_{other}"] = interval([a / b for a, b in zip(times, seconds[other], strict=True)])
        source = ways[way].source
        if isinstance(source, Records):
            e = source.pipeline.take_economy()
            entry |= {
                "unique": e.unique / e.steps,
                "repeated": e.repeated / e.unique,
                "megabytes": e.bytes_moved / e.steps / 1e6,
                "waited_ms": 1000 * e.waited / e.steps,
            }
        result[way] = entry
        print(name, way, {k: v for k, v in entry.items() if k != "milliseconds"}, flush=True)
    for way in ways.values():
        way.source.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=Path, help="token ids, .npy")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--large", type=float, default=10e9, help="parameters of the large table")
    parser.add_argument("--networks", nargs="+", default=["study", "0.35B"])
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    if options.rehearse:
        options.rounds, options.steps, options.large = 3, 2, 1e5
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    print(f"{machine}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    results = []
    for name in options.networks:
        config = networks(options.rehearse)[name]
        if options.tokens:
            text = np.load(options.tokens, mmap_mode="r")[: 24 * 32 * 1025]
        else:
            draws = np.random.default_rng(0).zipf(1.2, 24 * 32 * 1025)
            text = np.minimum(draws, config.vocab_size - 1)
        results.append(measure(name, config, options, np.asarray(text) % config.vocab_size))
        if options.out:
            options.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()

"""The sharded tier on the GPUs of one host: does it train what a resident table trains, and at what cost.

    python benchmarks/sharded_gpus.py --out sharded_gpus.json      one process a GPU, NCCL
    python benchmarks/sharded_gpus.py --rehearse                   two processes on a CPU, gloo, toy sizes

Equality: all ranks train on their shares of a batch with the rows spread over them; then every rank trains
alone on the whole batches with all rows on its own GPU. The latter is done twice, and once more with the
batch cut into as many micro-batches as there are ranks, so that the difference can be held against those that
another order of summation makes anyhow. Nothing is compiled here.

Step time: the same network under DistributedDataParallel, with readings in turn from rows spread over the
ranks ("sharded") and from rows of which every rank has all ("resident": nothing is exchanged, so that it is
what a step would cost if tables came for free; its ranks' tables drift apart). Blocks of steps alternate.

Each part has processes of its own and a time limit: when one fails, the other is measured all the same.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from engram_lab.memory.layout import RecordLayout
from engram_lab.memory.peers import Peers, total
from engram_lab.memory.pipeline import RowPipeline
from engram_lab.memory.row_optimizer import RowOptimizer
from engram_lab.memory.service import RowService
from engram_lab.memory.shard import Shard
from engram_lab.memory.sharded import ShardedPipeline
from engram_lab.memory.stores import DeviceStore, fill
from engram_lab.model.attention import AttentionConfig
from engram_lab.model.config import ModelConfig
from engram_lab.model.engram import EngramConfig
from engram_lab.model.experts import FeedForwardConfig
from engram_lab.model.hashing import NgramHash, table_rows
from engram_lab.model.initialise import initial_rows, initialise
from engram_lab.model.transformer import Transformer
from engram_lab.training.execution import ExecutionConfig, prepare

DEPTH, RATE, SEED = 2, 1e-3, 0


def network(rehearse: bool) -> ModelConfig:
    """The study's network, with a larger table."""
    if rehearse:
        return ModelConfig(
            vocab_size=1000,
            d_model=32,
            n_layers=2,
            attention=AttentionConfig(n_heads=2, n_kv_heads=1),
            ffn=FeedForwardConfig(experts=4, top_k=2, expert_hidden=16, shared_experts=1),
            engram=EngramConfig(rows_per_head=500, heads=2, canonical=False),
        )
    return ModelConfig(
        vocab_size=16384,
        attention=AttentionConfig(n_heads=4, n_kv_heads=2),
        ffn=FeedForwardConfig(experts=102, top_k=6, expert_hidden=128, shared_experts=2),
        engram=EngramConfig(rows_per_head=400_000, canonical=False),
    )


class Place:
    """Who this process is, where it computes, and the table that all of it is about."""

    def __init__(self, rank: int, ranks: int, options: argparse.Namespace) -> None:
        self.rank, self.ranks = rank, ranks
        self.device = torch.device("cpu") if options.rehearse else torch.device("cuda", rank)
        self.config = network(options.rehearse)
        assert self.config.engram is not None
        self.engram = self.config.engram
        self.rows = table_rows(self.engram)
        self.first_row = np.concatenate([[0], np.cumsum(self.rows)[:-1]]).tolist()
        self.layout = RecordLayout(row_dim=self.engram.row_dim)

    def initial(self, first: int, count: int, out: Tensor) -> None:
        for memory, (start, rows) in enumerate(zip(self.first_row, self.rows, strict=True)):
            low, high = max(first, start), min(first + count, start + rows)
            if low < high:
                weights = torch.empty(high - low, self.engram.row_dim)
                initial_rows(SEED, memory, low - start, weights)
                self.layout.encode(weights, out[low - first : high - first])

    def service(self, sharded: bool) -> RowService:
        """Fresh rows, spread over ranks or all of them here."""
        rates: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8, "momentum": 0.95, "seed": SEED}
        rows, size = sum(self.rows), self.layout.record_bytes
        common: dict[str, Any] = {"device": self.device, "threads": self.threads}
        if not sharded:
            whole = DeviceStore(rows, size, self.device)
            fill(whole, self.initial)
            rule = RowOptimizer(self.layout, rates=lambda step: RATE, **rates)
            return RowPipeline(whole, self.layout, rule, self.first_row, **common)
        store = Shard(rows, size, self.device, rank=self.rank, ranks=self.ranks)
        fill(store, self.initial)
        rule = RowOptimizer(self.layout, rates=lambda step: RATE, total=total, **rates)
        return ShardedPipeline(store, Peers(self.device), self.layout, rule, self.first_row, **common)

    @property
    def threads(self) -> int:
        return max(1, min(8, len(os.sched_getaffinity(0)) // self.ranks))


class Batches:
    """Windows of token ids, drawn from Zipf's law, and their addresses; the same on all ranks."""

    def __init__(self, place: Place, count: int, windows: int, length: int) -> None:
        vocabulary = place.config.vocab_size
        hash = NgramHash.build(place.engram, None, vocabulary, 0)
        draws = np.random.default_rng(SEED).zipf(1.2, (count, windows, length + 1))
        tokens = np.minimum(draws, vocabulary - 1).astype(np.int64)
        ids = [np.ascontiguousarray(batch[:, :-1]) for batch in tokens]
        self.ids = [torch.from_numpy(batch).to(place.device) for batch in ids]
        self.targets = [torch.from_numpy(batch[:, 1:].copy()).to(place.device) for batch in tokens]
        self.addresses = [torch.from_numpy(hash.addresses(batch)) for batch in ids]
        self.windows = windows

    def __len__(self) -> int:
        return len(self.ids)


class Loss(nn.Module):
    """The network's loss as a forward pass, which is what DistributedDataParallel wraps."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.net = Transformer(place.config, tables=nn.ModuleList())
        initialise(self.net, SEED)
        self.to(place.device).train()

    def forward(self, ids: Tensor, targets: Tensor, readings: Tensor) -> Tensor:
        with torch.autocast(ids.device.type, torch.bfloat16):
            return self.net.loss(ids, targets, readings=readings)


class Training:
    """A network in training on some windows of every batch.

    Args:
        place: of this process.
        service: of the rows.
        loss: the network, wrapped where its gradients are averaged over ranks.
        batches: windows of all ranks.
        shares: windows of each micro-batch.
        last: steps in all.
    """

    def __init__(
        self,
        place: Place,
        service: RowService,
        loss: nn.Module,
        batches: Batches,
        shares: list[slice],
        last: int,
    ) -> None:
        self.service, self.loss, self.batches, self.shares = service, loss, batches, shares
        self.last = last
        fused = place.device.type == "cuda"
        self.adam = torch.optim.AdamW(loss.parameters(), lr=RATE, betas=(0.9, 0.95), fused=fused)
        self.step = self.announced = 0

    def run(self, steps: int) -> Tensor:
        """Train so many steps and return their losses, a mean over the micro-batches, on the device."""
        losses = []
        for _ in range(steps):
            self.step += 1
            while self.announced < min(self.step + DEPTH, self.last):
                self.announced += 1
                addresses = self.batches.addresses[self.announced % len(self.batches)]
                self.service.announce(self.announced, [addresses[:, s].contiguous() for s in self.shares])
            losses.append(self._train(self.step % len(self.batches)))
        return torch.stack(losses)

    def _train(self, batch: int) -> Tensor:
        self.service.begin(self.step)
        parts = []
        for number, share in enumerate(self.shares):
            last = number == len(self.shares) - 1
            wrapped = isinstance(self.loss, DistributedDataParallel)
            with nullcontext() if last or not wrapped else self.loss.no_sync():
                ids, targets = self.batches.ids[batch][share], self.batches.targets[batch][share]
                loss = self.loss(ids, targets, self.service.reading(number))
                (loss / len(self.shares)).backward()
            parts.append(loss.detach())
        gradients = [p.grad for p in self.loss.parameters() if p.grad is not None]
        norms = torch.stack([torch.nn.utils.get_total_norm(gradients), self.service.gradient_norm()])
        norm = norms.norm()
        torch.nn.utils.clip_grads_with_norm_(self.loss.parameters(), 1.0, norm)
        self.adam.step()
        self.adam.zero_grad()
        self.service.commit(torch.clamp(1.0 / (norm + 1e-6), max=1.0))
        return torch.stack(parts).mean()


def together(place: Place, loss: Loss) -> DistributedDataParallel:
    return DistributedDataParallel(loss, device_ids=None if place.device.type == "cpu" else [place.rank])


def own(place: Place, windows: int) -> slice:
    each = windows // place.ranks
    return slice(place.rank * each, (place.rank + 1) * each)


def equality(place: Place, options: argparse.Namespace) -> dict[str, Any]:
    """Losses of all steps by where the rows are, and how far they are from those of a resident table."""
    windows, length = (4, 16) if options.rehearse else (32, 1024)
    batches, drawn = Batches(place, 8, windows, length), Loss(place)

    def losses(sharded: bool, shares: list[slice]) -> Tensor:
        loss, service = copy.deepcopy(drawn), place.service(sharded)
        wrapped = together(place, loss) if sharded else loss
        found = Training(place, service, wrapped, batches, shares, options.compared).run(options.compared)
        if sharded:
            found = total(found) / place.ranks
        service.close()
        return found.double().cpu()

    whole = slice(0, windows)
    each = windows // place.ranks
    pieces = [slice(rank * each, (rank + 1) * each) for rank in range(place.ranks)]
    reference = losses(False, [whole])
    found = {
        "sharded": losses(True, [own(place, windows)]),
        "resident, again": losses(False, [whole]),
        "resident, in micro-batches": losses(False, pieces),
    }
    difference = {name: float((values - reference).abs().max()) for name, values in found.items()}
    return {
        "steps": options.compared,
        "first_loss": float(reference[0]),
        "last_loss": float(reference[-1]),
        "largest_difference_from_resident": difference,
    }


def step_time(place: Place, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds a step by where the rows are, in blocks that alternate."""
    each, length = (2, 16) if options.rehearse else (32, 1024)
    windows = each * place.ranks
    batches = Batches(place, 8, windows, length)
    network = Loss(place)
    torch._dynamo.config.optimize_ddp = False  # a block is one graph, whatever DDP's buckets are
    prepare(network.net, ExecutionConfig(), place.device)
    loss, share, last = together(place, network), [own(place, windows)], options.steps * (options.rounds + 1)
    ways = {
        name: Training(place, place.service(name == "sharded"), loss, batches, share, last)
        for name in ("resident", "sharded")
    }

    def seconds(call: Callable[[], object]) -> float:
        if place.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        started = time.perf_counter()
        call()
        if place.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    for way in ways.values():
        way.run(options.steps)
        way.service.take_economy()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(options.rounds):
        for name in list(ways)[:: 1 if turn % 2 == 0 else -1]:
            taken = torch.tensor(seconds(lambda name=name: ways[name].run(options.steps)) / options.steps)
            taken = taken.to(place.device)
            dist.all_reduce(taken, op=dist.ReduceOp.MAX)
            times[name].append(1000 * taken.item())
    ratios = np.divide(times["sharded"], times["resident"])
    draws = np.random.default_rng(0).choice(ratios, (4000, len(ratios)))
    result: dict[str, Any] = {
        "tokens_per_gpu": each * length,
        "table_parameters": sum(place.rows) * place.engram.row_dim,
        "milliseconds": times,
        "median": {name: float(np.median(values)) for name, values in times.items()},
        "sharded_over_resident": [
            float(np.median(ratios)),
            *np.quantile(np.median(draws, axis=1), [0.025, 0.975]).tolist(),
        ],
    }
    for name, way in ways.items():
        e = way.service.take_economy()
        result[name] = {
            "unique_per_rank": e.unique / e.steps,
            "megabytes_per_step": e.bytes_moved / e.steps / 1e6,
            "waited_ms": 1000 * e.waited / e.steps,
        }
        way.service.close()
    return result


PARTS: dict[str, Callable[[Place, argparse.Namespace], dict[str, Any]]] = {
    "equality": equality,
    "step_time": step_time,
}


def work(rank: int, ranks: int, part: str, folder: Path, options: argparse.Namespace) -> None:
    """One rank of a part; the first one leaves what it found."""
    meeting = {"init_method": f"file://{folder}/meeting", "rank": rank, "world_size": ranks}
    if options.rehearse:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", **meeting)
    else:
        torch.cuda.set_device(rank)
        device = torch.device("cuda", rank)  # bound to the group, as Lightning does
        dist.init_process_group("nccl", device_id=device, timeout=timedelta(seconds=90), **meeting)
    found = PARTS[part](Place(rank, ranks, options), options)
    if rank == 0:
        (folder / "found").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def run(part: str, ranks: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run one part in as many processes as there are ranks, and end them when one fails or time is up."""
    context, ends = multiprocessing.get_context("spawn"), time.monotonic() + options.limit
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = ranks, part, folder, options
        processes = [context.Process(target=work, args=(rank, *given)) for rank in range(ranks)]
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            time.sleep(0.1)
            if any(process.exitcode for process in processes) or time.monotonic() > ends:
                for process in processes:
                    process.kill()
        if (folder / "found").exists():
            return json.loads((folder / "found").read_text())
        return {"failed": [process.exitcode for process in processes]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, help="default: one for each GPU")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--compared", type=int, default=100, help="steps whose losses are compared")
    parser.add_argument("--steps", type=int, default=20, help="of a block that is timed")
    parser.add_argument("--rounds", type=int, default=12, help="blocks of either kind")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds that a part may take")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, in seconds")
    options = parser.parse_args()
    if options.rehearse:
        options.compared, options.steps, options.rounds = 10, 2, 3
    ranks = options.ranks or (2 if options.rehearse else torch.cuda.device_count())
    machine = platform.processor() if options.rehearse else torch.cuda.get_device_name()
    result: dict[str, Any] = {"machine": f"{ranks} x {machine}, torch {torch.__version__}"}
    for part in options.parts:
        result[part] = run(part, ranks, options)
        print(part, {k: v for k, v in result[part].items() if k != "milliseconds"}, flush=True)
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    raise SystemExit(any("failed" in result[part] for part in options.parts))


if __name__ == "__main__":
    main()

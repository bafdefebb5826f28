"""Tokens a second of `generate`, its table on the device, in the host's memory and in a file, taking turns.

    python benchmarks/generate_tiers.py --model mlruns/runs/IDENTITY/model --tokens validation.npy

What a user of `engram_lab.model.generation.generate` gets, prefill and decoding together. Without `--model` a
network of random weights is made (as in tier_step.py, by `--network`): it draws tokens that no text has, so
that nearly no row is read twice, which is the worst that can happen to a disk. Without `--tokens` prompts are
drawn by Zipf's law. Prompts are different in every turn and the same on every tier. Ratios are of one turn's
times, medians with 95 % bootstrap intervals; the first turn of a file is `cold` and not among them.

`alike` says how many continuations are the same as the resident table's: all on a CPU. A GPU's decoding
steps do not repeat themselves to the last bit (docs/inspect.md), so there two resident runs are compared,
too. `--plain-attention` takes the attention that does repeat itself.
`--rehearse` runs everything in seconds on a CPU, at toy sizes.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tier_step import networks
from torch.nn.attention import SDPBackend, sdpa_kernel

from engram_lab.files import write_atomically
from engram_lab.memory.config import MemoryConfig
from engram_lab.model.checkpoint import load, save
from engram_lab.model.generation import Sampling, generate
from engram_lab.model.initialise import initialise
from engram_lab.model.transformer import Transformer

TIERS = ("resident", "host", "disk")
Prompts = list[list[int]]


def ratio(times: list[dict[str, float]], tier: str) -> dict[str, float]:
    """Return the median of a tier's time per token over the resident one's, and its interval."""
    each = {name: [turn[name] / turn[f"{name}_tokens"] for turn in times] for name in (tier, "resident")}
    ratios = np.array(each[tier]) / np.array(each["resident"])
    draws = np.random.default_rng(0).integers(0, len(ratios), (10_000, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975])
    return {"median": float(np.median(ratios)), "low": float(low), "high": float(high)}


class Text:
    """Prompts that follow each other in a text, of unequal lengths."""

    def __init__(self, options: argparse.Namespace, vocab: int) -> None:
        self.options, self.draw, self.at = options, np.random.default_rng(0), 0
        if options.tokens is not None:
            self.ids = np.load(options.tokens, mmap_mode="r")
        else:
            weights = 1.0 / np.arange(1, vocab)
            self.ids = 1 + self.draw.choice(vocab - 1, 1_000_000, p=weights / weights.sum())

    def next(self) -> Prompts:
        """Return the prompts of one turn."""
        options, prompts = self.options, []
        for length in self.draw.integers(options.shortest, options.longest + 1, options.sequences):
            if self.at + length > len(self.ids):
                raise SystemExit("the text is over: give a longer one, or fewer --turns")
            prompts.append(self.ids[self.at : self.at + length].tolist())
            self.at += int(length)
        return prompts


def timed(network: Transformer, prompts: Prompts, options: argparse.Namespace) -> tuple[float, Prompts]:
    """Return the seconds of continuing the prompts, and the continuations."""
    began = time.perf_counter()
    sampling = Sampling(temperature=options.temperature, seed=len(prompts[0]))
    with sdpa_kernel(SDPBackend.MATH) if options.plain_attention else nullcontext():
        found = generate(network, prompts, options.new, sampling, options.batch)
    return time.perf_counter() - began, found


def alike(one: Prompts, other: Prompts) -> float:
    """Return the share of continuations that are the same."""
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("generate_tiers.json"))
    parser.add_argument("--model", type=Path, help="a saved network; without, one of random weights")
    parser.add_argument("--network", default="study", choices=["study", "0.35B"], help="without --model")
    parser.add_argument("--tokens", type=Path, help="ids of a text, one-dimensional, as numpy saves them")
    parser.add_argument("--cache-rows", type=int, help="of the file kept in memory; a sixteenth if not given")
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--shortest", type=int, default=100)
    parser.add_argument("--longest", type=int, default=256)
    parser.add_argument("--new", type=int, default=64, help="tokens to draw per sequence, at most")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--plain-attention", action="store_true", help="by products, which repeat themselves")
    parser.add_argument("--turns", type=int, default=10, help="the cold one included")
    parser.add_argument("--seconds", type=float, default=120, help="after which no turn is begun")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes, on a CPU, in seconds")
    options = parser.parse_args()
    if options.rehearse:
        options.sequences, options.batch, options.shortest, options.longest = 12, 2, 3, 8
        options.new, options.turns = 5, 3
    device = torch.device("cpu" if options.rehearse or not torch.cuda.is_available() else "cuda:0")
    with tempfile.TemporaryDirectory(dir=options.out.parent) as scratch:
        model = options.model
        if model is None:
            torch.manual_seed(0)
            network = Transformer(networks(options.rehearse)[options.network])
            initialise(network, 0)
            model = Path(scratch) / "model"
            save(network, model, tokenizer_hash="random")
        configs = {
            "resident": None,
            "host": MemoryConfig(tier="host"),
            "disk": MemoryConfig(tier="disk", directory=scratch, cache_rows=options.cache_rows),
        }
        loaded = {tier: load(model, device=device, tables=configs[tier]) for tier in TIERS}
        text = Text(options, loaded["resident"].config.vocab_size)
        results: dict[str, Any] = {
            "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
            "torch": torch.__version__,
            "options": {name: str(value) for name, value in vars(options).items()},
            "rows": [table.store.rows for table in loaded["host"].tables],
        }
        warm = text.next()
        again = [timed(loaded[tier], warm, options)[1] for tier in ("resident", "host", "resident")]
        results["alike_resident"] = alike(again[0], again[2])
        turns: list[dict[str, float]] = []
        began = time.perf_counter()
        while len(turns) < options.turns and (
            len(turns) < 2 or time.perf_counter() - began < options.seconds
        ):
            prompts, found, turn = text.next(), {}, {}
            for tier in np.roll(TIERS, len(turns)).tolist():
                stores = [table.store for table in loaded["disk"].tables]
                before = [(store.reads, store.hits) for store in stores]
                turn[tier], found[tier] = timed(loaded[tier], prompts, options)
                if tier == "disk":
                    pairs = list(zip(stores, before, strict=True))
                    reads = sum(store.reads - reads for store, (reads, _) in pairs)
                    turn["hits"] = sum(store.hits - hits for store, (_, hits) in pairs) / reads
            turn |= {f"{tier}_tokens": sum(map(len, found[tier])) for tier in TIERS}
            for tier in TIERS[1:]:
                turn[f"{tier}_alike"] = alike(found["resident"], found[tier])
            turns.append(turn)
            line = ", ".join(f"{tier} {turn[f'{tier}_tokens'] / turn[tier]:,.0f}" for tier in TIERS)
            same = ", ".join(f"{tier} {turn[f'{tier}_alike']:.3f}" for tier in TIERS[1:])
            print(
                f"turn {len(turns)}: tokens/s {line}; hits {turn['hits']:.2f}; alike {same}, "
                f"two resident runs {results['alike_resident']:.3f}",
                flush=True,
            )
            results |= {"turns": turns, "ratios": {t: ratio(turns[1:] or turns, t) for t in TIERS[1:]}}
            write_atomically(options.out, json.dumps(results, indent=1) + "\n")
        for name, found in results["ratios"].items():
            print(f"{name} over resident: {found['median']:.3f} ({found['low']:.3f} to {found['high']:.3f})")
        for tier in TIERS[1:]:
            for table in loaded[tier].tables:
                table.close()
                table.store.close()


if __name__ == "__main__":
    main()

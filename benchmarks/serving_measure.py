"""Timing of prefill and decoding, way by way, and what a way loses against another."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from serving_backbone import Backbone, Batch, Lane, Memory, Prompt
from torch import Tensor

Prompts = Sequence[Prompt]
"""Chunks that fill one batch, each of equally long sequences."""
BOTH = ("prefill", "decode")
AHEAD = 4
"""Chunks whose look-ups are under way behind the one that is computed."""
STEPS_BEFORE = 4
"""Steps of decoding during which the look-up of the next prompts is under way: enough for it to end there."""


def finish(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


class Runner:
    """Prefills and decodes batches that take turns on one backbone, each way.

    `ahead` names the ways whose decoding reads rows by threads, a step ahead.
    """

    def __init__(
        self,
        backbone: Backbone,
        memories: dict[str, Memory | None],
        batches: Sequence[Batch],
        ahead: Sequence[str] = (),
    ) -> None:
        self.backbone, self.memories, self.batches = backbone, memories, batches
        self.lanes = {
            way: [Lane(backbone, batch, memory, ahead=way in ahead) for batch in batches]
            for way, memory in memories.items()
        }
        self._begun: dict[str, list[Any]] = {}

    def begin(self, way: str, prompts: Prompts) -> None:
        """Begin the look-up of the first of the prompts that `prefill` takes in next."""
        memory = self.memories[way]
        if memory is not None:
            self._begun[way] = [memory.begin(prompts[0])]

    def prefill(self, way: str, prompts: Sequence[Prompts]) -> float:
        """Return the seconds of taking in the prompts of every batch; look-ups begin some chunks ahead.

        All but the next one begin when a chunk has been launched: before, their threads would compete with
        the launches for the interpreter while the device has nothing else to do.
        """
        memory = self.memories[way]
        jobs = [
            (batch, prompt, number * len(prompt.ids))
            for batch, chunks in zip(self.batches, prompts, strict=True)
            for number, prompt in enumerate(chunks)
        ]
        joins = self._begun.pop(way, [])

        def ask(until: int) -> None:
            if memory is not None:
                joins.extend(memory.begin(prompt) for _, prompt, _ in jobs[len(joins) : until])

        finish(self.backbone.device)
        started = time.perf_counter()
        for number, (batch, prompt, first) in enumerate(jobs):
            ask(number + 2)
            self.backbone.prefill(batch, prompt, first, memory, joins[number] if joins else None)
            if joins:
                joins[number] = None
            ask(number + 1 + AHEAD)
        finish(self.backbone.device)
        return time.perf_counter() - started

    def decode(
        self, way: str, coming: Sequence[Tensor], steps: int, following: Prompts | None = None
    ) -> float:
        """Return the seconds of decoding `steps` tokens of every sequence, given as [steps + 1, B].

        The look-up of the prompts that follow begins a few steps before the end: a server knows what waits.
        """
        lanes = self.lanes[way]
        for batch, ids in zip(self.batches, coming, strict=True):
            batch.feed(ids)
        finish(self.backbone.device)
        started = time.perf_counter()
        for lane in lanes:
            lane.start()
        for left in reversed(range(steps)):
            if left == min(steps, STEPS_BEFORE) - 1 and following is not None:
                self.begin(way, following)
            for lane in lanes:
                lane.step(more=left > 0)
        finish(self.backbone.device)
        return time.perf_counter() - started

    def close(self) -> None:
        """Take what was begun, and end the threads of the tables."""
        for joins in self._begun.values():
            for join in joins:
                join()
        for memory in self.memories.values():
            if memory is not None:
                memory.table.close()


def check(backbone: Backbone, batch: Batch, memory: Memory | None, tokens: int, *, ahead: bool) -> float:
    """Return how far decoding one token at a time is from taking them in at once, relative to the logits.

    AssertionError where it is not rounding.
    """
    count = min(4, len(batch.lengths))
    ids = torch.randint(1, backbone.shape.vocab, (count, tokens + 3), device=backbone.device)
    backbone.prefill(batch, Prompt(ids, ids.cpu().numpy()), 0, memory)
    expected = batch.logits[:count].float().clone()
    batch.lengths.zero_()
    lane = Lane(backbone, batch, memory, ahead=ahead)
    batch.lengths.zero_()
    begun = ids[:, :tokens].contiguous()
    backbone.prefill(batch, Prompt(begun, begun.cpu().numpy()), 0, memory)
    coming = torch.zeros(4, len(batch.lengths), dtype=torch.int64, device=backbone.device)
    coming[:3, :count] = ids[:, tokens:].T
    batch.feed(coming)
    lane.start()
    for left in reversed(range(3)):
        lane.step(more=left > 0)
    error = float((batch.logits[:count].float() - expected).abs().max() / expected.abs().max())
    assert error < (0.2 if backbone.dtype == torch.bfloat16 else 1e-3), error
    return error


def losses(
    pairs: Sequence[dict[str, Any]], base: str, way: str, parts: Sequence[str]
) -> dict[str, Any] | None:
    """Return the loss of throughput in percent over pairs that have both ways; None without any.

    The median with its 95 % bootstrap interval, and the mean beside it: a machine that pauses for some tenths
    of a second, whatever it is doing, would decide a mean of a dozen.
    """
    pairs = [pair for pair in pairs if base in pair and way in pair]
    if not pairs:
        return None
    times = {
        name: np.array([sum(np.sum(pair[name][part]) for part in parts) for pair in pairs])
        for name in (base, way)
    }
    loss = 100 * (1 - times[base] / times[way])
    draws = np.random.default_rng(0).integers(0, len(loss), (10_000, len(loss)))
    low, high = np.quantile(np.median(loss[draws], axis=1), [0.025, 0.975])
    return {
        "loss_percent": float(np.median(loss)),
        "low": float(low),
        "high": float(high),
        "mean": float(loss.mean()),
        "pairs": len(loss),
        "spread": float(loss.std(ddof=1)) if len(loss) > 1 else None,
    }

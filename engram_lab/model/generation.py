"""Continue prompts token by token, from a cache: batches of unequal prompts, greedy or sampled.

Shapes: B batch, T length, V vocabulary, M memories, H hash heads, U row width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from engram_lab.errors import UserError
from engram_lab.memory.lookup import ServingTable
from engram_lab.model.cache import Cache
from engram_lab.model.experts import Experts
from engram_lab.model.graphs import captured
from engram_lab.model.transformer import Transformer

WORTH_A_GRAPH = 16
"""Steps from which on a graph is captured: that takes about as long as a few steps without it."""
IN_TURN = 2
"""Batches that take turns."""
IN_TURN_BY_THREADS = 8
"""Batches that take turns where threads read rows. A disk pauses now and then for several steps; rows asked
for seven steps before they are needed come in time all the same (benchmarks/results/serving.md)."""
COLDEST = 1e-30
"""The least temperature that logits are divided by: below it float32 would not hold the quotients, and the
likeliest token has had all the probability for long."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn from the network's distribution."""

    temperature: float = 1.0
    """Logits are divided by it; 0, and whatever is below 1e-30, always takes the likeliest token."""
    top_k: int | None = None
    """Draw among this many likeliest tokens only."""
    top_p: float | None = None
    """Draw among the fewest tokens that together have at least this probability (after top_k)."""
    seed: int = 0
    """Start of the random numbers; the same seed and batch give the same tokens on a CPU. On a GPU the fused
    attention of single tokens is not the same to the last bit each time (docs/inspect.md)."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature is {self.temperature}, but must be at least 0, which is greedy.")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}, but must be at least 1, which is greedy.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(
                f"top_p is {self.top_p}, but must be above 0 and at most 1, which keeps every token."
            )

    def distribution(self, logits: Tensor) -> Tensor:
        """Return the probabilities [B, V] that tokens are drawn from, at a temperature from `COLDEST` on."""
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            places = logits.topk(self.top_k, dim=-1).indices
            kept = torch.full_like(logits, -torch.inf)
            logits = kept.scatter(-1, places, logits.gather(-1, places))
        probabilities = logits.softmax(dim=-1)
        if self.top_p is not None:
            ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
            unneeded = ordered.cumsum(dim=-1) - ordered >= self.top_p
            probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered.masked_fill(unneeded, 0.0))
            probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
        return probabilities

    def draw(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Return one token id for each row of logits [B, V]."""
        if self.temperature < COLDEST:
            return logits.argmax(dim=-1)
        return torch.multinomial(self.distribution(logits), 1, generator=generator).squeeze(1)


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids [B, T] of the prompts, flush right, and the number of padding ids before each, [B]."""
    longest = max(map(len, prompts), default=0)
    if not prompts or min(map(len, prompts)) == 0:
        raise UserError("A prompt is empty, but needs at least one token, for example the end-of-text id.")
    rows = [[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    padding = [longest - len(prompt) for prompt in prompts]
    return torch.tensor(rows, device=device), torch.tensor(padding, device=device)


def _read_by_threads(network: Transformer) -> bool:
    """Whether a graph cannot read the rows of some table."""
    return any(isinstance(table, ServingTable) and not table.captures for table in network.tables)


class Decoder:
    """One batch on its way: `take` gives what was drawn last, `advance` computes the next.

    `advance` returns before the device is done, so that batches may take turns: while one is computed, rows
    of the others' tables are read. On a GPU a step is one CUDA graph, in which tables are read that a
    graph can read; the others are asked as soon as the ids are known, and joined before the step. A few steps
    are not worth the capture, and experts that a kernel cannot take ask the host for their loads. A GPU works
    as it does in training: in bfloat16 where the weights are in float32. The network is put into evaluation
    mode, in which it stays.

    Attributes:
        over: whether what was taken last ended every row, or was the last of `length`.

    Args:
        network: that continues the prompts.
        prompts: token ids, B of them, none empty.
        length: most tokens to draw for each, at least 1.
        sampling: how.
    """

    @torch.no_grad()
    def __init__(
        self, network: Transformer, prompts: Sequence[Sequence[int]], length: int, sampling: Sampling
    ) -> None:
        network.eval()
        self.over = False
        self._network, self._sampling, self._left = network, sampling, length
        device = network.embedding.weight.device
        self._mixed = device.type == "cuda" and network.embedding.weight.dtype == torch.float32
        ids, padding = pad_left(prompts, network.eos_id, device)
        room = ids.shape[1] + max(length, WORTH_A_GRAPH)
        self._cache = Cache.start(network.config.n_layers, padding, room, network.eos_id)
        self._generator = torch.Generator(device).manual_seed(sampling.seed)
        self._ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        self._ids = ids[:, :1].clone()
        self._ahead = network.hash is not None and (network.hash.salted or _read_by_threads(network))
        self._joins: list[Callable[[], Tensor]] = []
        self._readings: Tensor | None = None
        captures = length >= WORTH_A_GRAPH and not self._asks_the_host()
        self._step: Callable[[], None] | None = None if captures else self._compute
        self._told: torch.cuda.Event | None = None
        self._logits = self._predict(ids)
        self._draw()

    def take(self) -> list[int | None]:
        """Return the token drawn last for every row, None for rows that had ended before; waits for it."""
        if self._told is not None:
            self._told.synchronize()
        ended, drawn = self._drawn.tolist()
        tokens = [None if done else token for done, token in zip(ended, drawn, strict=True)]
        self._left -= 1
        self.over = self._left == 0 or all(token in (None, self._network.eos_id) for token in tokens)
        if self.over:
            self.close()
        return tokens

    @torch.no_grad()
    def advance(self) -> None:
        """Compute the next position of every row and draw from it."""
        if self._ahead:
            readings = torch.stack([join() for join in self._joins])  # [M, B, 1, H * U]
            self._joins = []
            self._readings = readings if self._readings is None else self._readings.copy_(readings)
        if self._step is None:
            self._step = self._capture()
        self._step()
        self._draw()

    def close(self) -> None:
        """Wait for rows that nobody will take: memory that is still written to may not be given back."""
        joins, self._joins = self._joins, []
        for join in joins:
            with suppress(Exception):  # of rows that are not needed; what ended the batch is told
                join()

    def _draw(self) -> None:
        """Draw the next ids, and ask the tables for them that a graph cannot read."""
        network = self._network
        logits = self._logits.to(torch.promote_types(self._logits.dtype, torch.float32))
        drawn = self._sampling.draw(logits, self._generator).masked_fill(self._ended, network.eos_id)
        # On the way now: asking for it later would wait for all that the device has to do by then.
        self._drawn = torch.stack((self._ended.long(), drawn)).to("cpu", non_blocking=drawn.is_cuda)
        if drawn.is_cuda:
            self._told = torch.cuda.current_stream(drawn.device).record_event()
        self._ended = self._ended | (drawn == network.eos_id)
        self._ids.copy_(drawn.unsqueeze(1))
        if self._ahead and self._left > 1:
            assert network.hash is not None
            addresses = self._cache.addresses(network.hash, self._ids)
            tables: Iterable[Any] = network.tables
            self._joins = [table.begin(a) for table, a in zip(tables, addresses, strict=True)]

    def _compute(self) -> None:
        self._logits.copy_(self._predict(self._ids))

    def _predict(self, ids: Tensor) -> Tensor:
        """Return the logits [B, V] after the next `ids` [B, T]."""
        network, weight = self._network, self._network.head.weight
        with torch.autocast("cuda", torch.bfloat16, self._mixed, cache_enabled=False):
            hidden = network.hidden(ids, cache=self._cache, readings=self._readings)[:, -1]
        return network.head(hidden.to(weight.dtype))

    def _asks_the_host(self) -> bool:
        """Whether a step waits for the device somewhere."""
        dtype = torch.bfloat16 if self._mixed else self._network.embedding.weight.dtype
        experts = [block.ffn for block in self._network.blocks if isinstance(block.ffn, Experts)]
        return any(layer.asks_the_host(dtype) for layer in experts)

    def _capture(self) -> Callable[[], None]:
        """Capture a step, and forget what that has changed."""
        changing = self._cache.changing()
        before = [tensor.clone() for tensor in changing]
        step = captured(self._compute, self._ids.device)
        for tensor, value in zip(changing, before, strict=True):
            tensor.copy_(value)
        return step


def stream(
    network: Transformer, prompts: Sequence[Sequence[int]], length: int, sampling: Sampling | None = None
) -> Iterator[list[int | None]]:
    """Yield the next token id of every prompt, up to `length` times, at least once.

    A row is over, and yields None, once it has yielded the network's end-of-text id. The network is put into
    evaluation mode, in which it stays.
    """
    with closing(Decoder(network, prompts, length, sampling or Sampling())) as decoder:
        while True:
            yield decoder.take()
            if decoder.over:
                return
            decoder.advance()


def generate(
    network: Transformer,
    prompts: Sequence[Sequence[int]],
    length: int,
    sampling: Sampling | None = None,
    batch: int | None = None,
) -> list[list[int]]:
    """Return up to `length` new token ids for every prompt; one that ended keeps its end-of-text id.

    Prompts are taken `batch` at a time, those of like length together, or all at once; two batches take
    turns, eight where threads read rows (see `Decoder`). Each batch draws from a seed of its own.
    """
    sampling = sampling or Sampling()
    in_turn = IN_TURN_BY_THREADS if _read_by_threads(network) else IN_TURN
    by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    size = batch or max(1, len(prompts))
    groups = [sorted(by_length[first : first + size]) for first in range(0, len(prompts), size)]
    waiting = deque(enumerate(groups))
    lanes: list[tuple[list[int], Decoder]] = []
    continuations: list[list[int]] = [[] for _ in prompts]
    try:
        while waiting or lanes:
            while waiting and len(lanes) < in_turn:
                number, group = waiting.popleft()
                seeded = replace(sampling, seed=sampling.seed + number)
                lanes.append((group, Decoder(network, [prompts[n] for n in group], length, seeded)))
            for group, decoder in list(lanes):
                for n, token in zip(group, decoder.take(), strict=True):
                    if token is not None:
                        continuations[n].append(token)
                if decoder.over:
                    lanes.remove((group, decoder))
                else:
                    decoder.advance()
    finally:
        for _, decoder in lanes:
            decoder.close()
    return continuations

"""A dense decoder with random weights, fast enough that a look-up's cost would show: fused projections,
grouped attention, a cache of fixed size, and a decoding step that a CUDA graph can hold.

The second block may have an Engram module before it, whose table is begun before the first block.

Shapes: B batch, T length, D width, K key-value heads, W head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engram_lab.memory.lookup import ServingTable
from engram_lab.model.engram import Engram
from engram_lab.model.graphs import captured
from engram_lab.model.hashing import NgramHash
from engram_lab.model.rope import frequencies, rope_tables, rotate
from engram_lab.model.torch_hash import TorchNgramHash

try:
    from decode_attention import decode_attention
except ImportError:  # no triton: plain attention with a mask
    decode_attention = None

MODULE_BLOCK = 1
EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a backbone; both large ones are those of published Qwen3 models."""

    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    head_width: int
    vocab: int
    tied: bool

    @property
    def parameters(self) -> int:
        attention = (2 * self.heads + 2 * self.kv_heads) * self.head_width * self.width
        return (
            self.layers * (attention + 3 * self.width * self.hidden)
            + (1 if self.tied else 2) * self.vocab * self.width
        )


SHAPES = {
    "4B": Shape(
        layers=36, width=2560, hidden=9728, heads=32, kv_heads=8, head_width=128, vocab=151_936, tied=True
    ),
    "8B": Shape(
        layers=36, width=4096, hidden=12_288, heads=32, kv_heads=8, head_width=128, vocab=151_936, tied=False
    ),
    "tiny": Shape(layers=3, width=64, hidden=96, heads=4, kv_heads=2, head_width=16, vocab=500, tied=True),
}


class Prompt(NamedTuple):
    """Sequences of equal length, [B, T], where the network computes and where the text came from."""

    ids: Tensor
    text: np.ndarray


@dataclass(frozen=True, eq=False)
class Memory:
    """The module in the second block, and what finds its rows."""

    rule: NgramHash
    hash: TorchNgramHash
    table: ServingTable
    module: Engram
    far: bool
    """The rows lie where the device does not: prompts are hashed on the CPU, so that their rows are on the
    way before the device gets to them."""

    def begin(self, prompt: Prompt) -> Callable[[], Tensor]:
        """Begin the look-up of a prompt."""
        if self.far:
            shape = (*prompt.text.shape, self.rule.primes.shape[1])
            return self.table.begin_found(
                lambda: torch.from_numpy(self.rule.addresses(prompt.text)[0]), shape
            )
        return self.table.begin(self.hash(prompt.ids)[0])

    def addresses(self, batch: Batch) -> Tensor:
        """Return the row numbers [B, 1, H] that the batch's next ids read."""
        rows: Tensor = self.hash(batch.ids, batch.history)[0]
        return rows


class Batch:
    """What decoding `size` sequences carries from step to step, for at most `steps` steps.

    They may have `longest` tokens; their memory reads `heads` rows of `row_dim` values for each.
    """

    def __init__(
        self, backbone: Backbone, size: int, longest: int, steps: int, heads: int, row_dim: int
    ) -> None:
        shape, device, dtype = backbone.shape, backbone.device, backbone.dtype
        self.keys, self.values = (
            torch.zeros(
                shape.layers, size, shape.kv_heads, longest, shape.head_width, device=device, dtype=dtype
            )
            for _ in range(2)
        )
        self.rows = torch.arange(size, device=device)
        self.ids = torch.zeros(size, 1, dtype=torch.int64, device=device)
        self.history = torch.zeros(size, 2, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(size, dtype=torch.int64, device=device)
        self.state = torch.zeros(size, 9, 1, shape.width, device=device, dtype=dtype)
        self.logits = torch.zeros(size, shape.vocab, device=device, dtype=dtype)
        self.chosen = torch.zeros(size, dtype=torch.int64, device=device)
        self.coming = torch.zeros(steps, size, dtype=torch.int64, device=device)
        """Ids that continue the sequences, [steps, B]: given ones rather than chosen ones, since random
        weights would repeat a few, and so their rows."""
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.addresses = torch.zeros(size, 1, heads, dtype=torch.int32, device=device)
        self.reading = torch.zeros(size, 1, heads * row_dim, device=device, dtype=dtype)

    def feed(self, coming: Tensor) -> None:
        """Take the ids [n, B] that continue the prompts taken in, for n - 1 steps."""
        self.ids.copy_(coming[:1].T)
        self.coming[: len(coming) - 1] = coming[1:]
        self.step.zero_()


class Backbone:
    """Weights of one decoder."""

    def __init__(self, shape: Shape, longest: int, device: torch.device, dtype: torch.dtype) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        D, W, K = shape.width, shape.head_width, shape.kv_heads
        heads = shape.heads + 2 * K

        def matrix(rows: int, columns: int) -> Tensor:
            return torch.empty(rows, columns, device=device, dtype=dtype).normal_(std=columns**-0.5)

        self.embedding = matrix(shape.vocab, D)
        self.head = self.embedding if shape.tied else matrix(shape.vocab, D)
        self.qkv = [matrix(heads * W, D) for _ in range(shape.layers)]
        self.out = [matrix(D, shape.heads * W) for _ in range(shape.layers)]
        self.up = [matrix(2 * shape.hidden, D) for _ in range(shape.layers)]
        self.down = [matrix(D, shape.hidden) for _ in range(shape.layers)]
        self.norm = torch.ones(D, device=device, dtype=dtype)
        positions = torch.arange(longest, device=device)
        self.cos, self.sin = rope_tables(positions, frequencies(W, 1e6, None, device), dtype)

    def prefill(
        self,
        batch: Batch,
        prompt: Prompt,
        first: int,
        memory: Memory | None,
        join: Callable[[], Tensor] | None = None,
    ) -> None:
        """Take in sequences of equal length as numbers first, ..., first + B - 1 of the batch.

        Their look-up begins here, unless it has begun before and `join` waits for it.
        """
        ids = prompt.ids
        B, T = ids.shape
        mine = slice(first, first + B)
        if memory is not None and join is None:
            join = memory.begin(prompt)
        rope = self.cos[:T], self.sin[:T]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            batch.keys[layer, mine, :, :T], batch.values[layer, mine, :, :T] = k, v
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        h, state = self._blocks(F.embedding(ids, self.embedding), rope, attend, memory, join, None)
        if state is not None:
            batch.state[mine] = state
        batch.logits[mine] = self._predict(h[:, -1:])
        batch.lengths[mine] = T
        batch.history[mine] = ids[:, -2:]

    def decode(self, batch: Batch, memory: Memory | None, *, ahead: bool = False) -> None:
        """Compute the next position of every sequence in place; nothing here asks the host.

        The look-up begins here, or, `ahead`, has ended before, in `batch.reading`; then `batch.addresses`
        are in the end those of the next step.
        """
        join: Callable[[], Tensor] | None = None
        if memory is not None:
            join = (lambda: batch.reading) if ahead else memory.table.begin(memory.addresses(batch))
        rope = self.cos[batch.lengths][:, None, None], self.sin[batch.lengths][:, None, None]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = batch.keys[layer], batch.values[layer]
            keys[batch.rows, :, batch.lengths] = k[:, :, 0]
            values[batch.rows, :, batch.lengths] = v[:, :, 0]
            if q.is_cuda and decode_attention is not None:
                return decode_attention(q, keys, values, batch.lengths)
            mask = torch.arange(keys.shape[2], device=q.device) <= batch.lengths[:, None]
            return F.scaled_dot_product_attention(q, keys, values, mask[:, None, None], enable_gqa=True)

        h, state = self._blocks(
            F.embedding(batch.ids, self.embedding), rope, attend, memory, join, batch.state
        )
        if memory is not None:
            batch.state.copy_(state)
        batch.logits.copy_(self._predict(h))
        batch.chosen.copy_(batch.logits.argmax(-1))
        batch.history.copy_(torch.cat([batch.history[:, 1:], batch.ids], dim=1))
        batch.ids.copy_(batch.coming.index_select(0, batch.step).T)
        batch.lengths += 1
        batch.step += 1
        if memory is not None and ahead:
            batch.addresses.copy_(memory.addresses(batch))

    def _predict(self, h: Tensor) -> Tensor:
        return F.linear(F.rms_norm(h[:, 0], self.norm.shape, self.norm, EPS), self.head)

    def _blocks(
        self,
        h: Tensor,
        rope: tuple[Tensor, Tensor],
        attend: Callable[[int, Tensor, Tensor, Tensor], Tensor],
        memory: Memory | None,
        join: Callable[[], Tensor] | None,
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        shape = self.shape
        for layer in range(shape.layers):
            if layer == MODULE_BLOCK and memory is not None and join is not None:
                update, state = memory.module.step(h, join(), state)
                h = h + update
            x = F.rms_norm(h, self.norm.shape, self.norm, EPS)
            heads = F.linear(x, self.qkv[layer]).unflatten(-1, (-1, shape.head_width)).transpose(1, 2)
            q, k, v = heads.split((shape.heads, shape.kv_heads, shape.kv_heads), dim=1)
            y = attend(layer, rotate(q, *rope), rotate(k, *rope), v)
            h = h + F.linear(y.transpose(1, 2).flatten(2), self.out[layer])
            gate, up = F.linear(F.rms_norm(h, self.norm.shape, self.norm, EPS), self.up[layer]).chunk(
                2, dim=-1
            )
            h = h + F.linear(F.silu(gate) * up, self.down[layer])
        return h, state


class Lane:
    """One batch on its way: decodes a step at a time, from a CUDA graph where there is a GPU.

    Where the rows are read by threads (`ahead`), those of the next step are asked for as soon as a step's ids
    are known, and taken when the step begins. Lanes that take turns so have the others' steps for it.
    """

    def __init__(self, backbone: Backbone, batch: Batch, memory: Memory | None, *, ahead: bool) -> None:
        self.batch, self.memory, self.ahead = batch, memory, ahead and memory is not None
        self._join: Callable[[], Tensor] | None = None
        self.compute = captured(lambda: backbone.decode(batch, memory, ahead=self.ahead), backbone.device)

    def start(self) -> None:
        """Ask for the rows of the first step."""
        if self.ahead:
            assert self.memory is not None
            self.batch.addresses.copy_(self.memory.addresses(self.batch))
            self._ask()

    def step(self, *, more: bool = True) -> None:
        """Decode one token of every sequence; `more` asks for the rows of a next step."""
        if self._join is not None:
            self.batch.reading.copy_(self._join())
            self._join = None
        self.compute()
        if self.ahead and more:
            self._ask()

    def _ask(self) -> None:
        assert self.memory is not None
        self._join = self.memory.table.begin(self.batch.addresses)

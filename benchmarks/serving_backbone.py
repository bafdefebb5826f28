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
    host_hash: bool
    """Hash prompts on the CPU, so that their rows are on the way before the device gets to them."""

    def begin(self, prompt: Prompt) -> Callable[[], Tensor]:
        """Begin the look-up of a prompt."""
        if self.host_hash:
            return self.table.begin(torch.from_numpy(self.rule.addresses(prompt.text)[0]))
        return self.table.begin(self.hash(prompt.ids)[0])

    def begin_next(self, ids: Tensor, history: Tensor) -> Callable[[], Tensor]:
        """Begin the look-up of the next ids [B, 1] after `history` [B, 2]."""
        return self.table.begin(self.hash(ids, history)[0])


class Backbone:
    """Weights and cache of one decoder; `batch` sequences of at most `longest` tokens are decoded at once."""

    def __init__(
        self, shape: Shape, batch: int, longest: int, device: torch.device, dtype: torch.dtype
    ) -> None:
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
        self.keys, self.values = (
            torch.zeros(shape.layers, batch, K, longest, W, device=device, dtype=dtype) for _ in range(2)
        )
        positions = torch.arange(longest, device=device)
        self.cos, self.sin = rope_tables(positions, frequencies(W, 1e6, None, device), dtype)
        self.rows = torch.arange(batch, device=device)

        # What decoding carries from step to step.
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.history = torch.zeros(batch, 2, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.state = torch.zeros(batch, 9, 1, D, device=device, dtype=dtype)
        self.logits = torch.zeros(batch, shape.vocab, device=device, dtype=dtype)
        self.chosen = torch.zeros(batch, dtype=torch.int64, device=device)
        self.coming = torch.zeros(1, batch, dtype=torch.int64, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)

    def prefill(
        self, prompt: Prompt, first: int, memory: Memory | None, join: Callable[[], Tensor] | None = None
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
            self.keys[layer, mine, :, :T], self.values[layer, mine, :, :T] = k, v
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        h = self._blocks(F.embedding(ids, self.embedding), rope, attend, memory, join, None, mine)
        self.logits[mine] = self._predict(h[:, -1:])
        self.lengths[mine] = T
        self.history[mine] = ids[:, -2:]

    def decode(self, memory: Memory | None) -> None:
        """Compute the next position of every sequence in place; nothing here asks the host."""
        join = None if memory is None else memory.begin_next(self.ids, self.history)
        rope = self.cos[self.lengths][:, None, None], self.sin[self.lengths][:, None, None]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            keys[self.rows, :, self.lengths] = k[:, :, 0]
            values[self.rows, :, self.lengths] = v[:, :, 0]
            if q.is_cuda and decode_attention is not None:
                return decode_attention(q, keys, values, self.lengths)
            mask = torch.arange(keys.shape[2], device=q.device) <= self.lengths[:, None]
            return F.scaled_dot_product_attention(q, keys, values, mask[:, None, None], enable_gqa=True)

        h = self._blocks(
            F.embedding(self.ids, self.embedding), rope, attend, memory, join, self.state, slice(None)
        )
        self.logits.copy_(self._predict(h))
        self.chosen.copy_(self.logits.argmax(-1))
        self.history.copy_(torch.cat([self.history[:, 1:], self.ids], dim=1))
        # Drawn tokens rather than chosen ones: random weights would repeat a few, and so their rows.
        self.ids.copy_(self.coming.index_select(0, self.step).T)
        self.lengths += 1
        self.step += 1

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
        mine: slice,
    ) -> Tensor:
        shape = self.shape
        for layer in range(shape.layers):
            if layer == MODULE_BLOCK and memory is not None and join is not None:
                update, state = memory.module.step(h, join(), state)
                h = h + update
                self.state[mine] = state
            x = F.rms_norm(h, self.norm.shape, self.norm, EPS)
            heads = F.linear(x, self.qkv[layer]).unflatten(-1, (-1, shape.head_width)).transpose(1, 2)
            q, k, v = heads.split((shape.heads, shape.kv_heads, shape.kv_heads), dim=1)
            y = attend(layer, rotate(q, *rope), rotate(k, *rope), v)
            h = h + F.linear(y.transpose(1, 2).flatten(2), self.out[layer])
            gate, up = F.linear(F.rms_norm(h, self.norm.shape, self.norm, EPS), self.up[layer]).chunk(
                2, dim=-1
            )
            h = h + F.linear(F.silu(gate) * up, self.down[layer])
        return h

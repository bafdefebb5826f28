"""The network: token embedding, blocks of (memory, attention, feed-forward), head.

Shapes: B batch, T length, D width, V vocabulary, M memories, H hash heads, n residual streams. "h [B, T,
D]" of a block stands for [B, T, n, D] in a network with several streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engram_lab.memory.resident import look_up
from engram_lab.model.attention import Attention
from engram_lab.model.cache import Cache, LayerCache
from engram_lab.model.config import ModelConfig
from engram_lab.model.experts import Experts, Router, feed_forward, update_biases
from engram_lab.model.hashing import NgramHash
from engram_lab.model.latent import LatentAttention
from engram_lab.model.loss import linear_cross_entropy
from engram_lab.model.memories import build_memory, build_tables
from engram_lab.model.residual import residual
from engram_lab.model.rope import frequencies, rope_tables
from engram_lab.model.torch_hash import TorchNgramHash

Role = Literal["matrix", "vector", "embedding", "table"]


class Block(nn.Module):
    """Memory, attention and feed-forward, each added to the residual; the last two read it normalised."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        D, eps, memory = config.d_model, config.norm_eps, config.engram
        attention = Attention if config.attention.kind == "grouped" else LatentAttention
        self.engram: Any = None
        if memory is not None and layer in memory.layers:
            self.engram = build_memory(memory, D, norm_eps=eps, streams=config.streams)
        self.attention_residual = residual(D, config.streams, eps)
        self.attention_norm = nn.RMSNorm(D, eps=eps)
        self.attention = attention(config.attention, D, eps)
        self.ffn_residual = residual(D, config.streams, eps)
        self.ffn_norm = nn.RMSNorm(D, eps=eps)
        self.ffn = feed_forward(D, config.ffn, layer)

    def forward(
        self,
        h: Tensor,
        rope: tuple[Tensor, Tensor],
        e: Tensor | None = None,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Map h [B, T, D] to [B, T, D]; e [B, T, H * row_dim] is what a block with a memory reads."""
        if self.engram is not None:
            h = self.recall(h, e, cache)
        return self.compute(h, rope, mask, cache)

    def recall(self, h: Tensor, e: Tensor | None, cache: LayerCache | None = None) -> Tensor:
        """Add what the memory makes of its reading."""
        if cache is None:
            return h + self.engram(h, e)
        update, cache.convolution = self.engram.step(h, e, cache.convolution)
        return h + update

    def compute(
        self,
        h: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Add attention and feed-forward."""
        h = self.attention_residual(h, lambda x: self.attention(self.attention_norm(x), rope, mask, cache))
        return self.ffn_residual(h, lambda x: self.ffn(self.ffn_norm(x)))


class Transformer(nn.Module):
    """A decoder-only language model with optional routed experts and n-gram memory.

    `canonical` [V] maps token ids to the ids that are hashed (None: hash token ids themselves) and `eos_id`
    ends a document and pads on the left. `tables`, one a memory layer, are those of `build_tables` unless
    given: rows may live elsewhere than in this module (memory/). Weights are not set before
    `model.initialise.initialise` or a checkpoint sets them.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        canonical: Tensor | None = None,
        eos_id: int = 0,
        tables: nn.ModuleList | None = None,
    ) -> None:
        super().__init__()
        self.config, self.eos_id = config, eos_id
        self.recomputes = False  # whether training keeps only what enters a block, and computes it again
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.hash: TorchNgramHash | None = None
        self.tables = nn.ModuleList()
        if config.engram is not None:
            known = None if canonical is None else canonical.cpu().numpy()
            self.hash = TorchNgramHash(NgramHash.build(config.engram, known, config.vocab_size, eos_id))
            self.tables = build_tables(config.engram) if tables is None else tables

    def forward(self, ids: Tensor, addresses: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Return logits [B, T, V] for ids [B, T]; `addresses` [M, B, T, H] spares hashing them again."""
        return self.head(self.hidden(ids, addresses, cache))

    def loss(
        self,
        ids: Tensor,
        targets: Tensor,
        addresses: Tensor | None = None,
        *,
        readings: Tensor | None = None,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> Tensor:
        """Return the cross-entropy in nats of `targets` [B, T]; "none" gives one value a token, [B, T].

        `readings` [M, B, T, H * row_dim] stand in for what the tables hold at the addresses. In training,
        "mean" adds the experts' balance loss, if the configuration asks for one.
        """
        h = self.hidden(ids, addresses, readings=readings).flatten(0, 1)
        loss = linear_cross_entropy(h, self.head.weight, targets.flatten(), reduction=reduction)
        if reduction == "none":
            return loss.view_as(targets)
        if reduction == "mean" and self.training and self.config.ffn.balance_loss:
            loss = loss + self.config.ffn.balance_loss * sum(router.imbalance for router in self.routers())
        return loss

    def hidden(
        self,
        ids: Tensor,
        addresses: Tensor | None = None,
        cache: Cache | None = None,
        *,
        readings: Tensor | None = None,
    ) -> Tensor:
        """Return the normalised last hidden states [B, T, D].

        With a `cache`, `ids` continue those of earlier calls, and only the new positions are computed. Tables
        begin to fetch before the first block computes; each memory waits for its own reading only.
        """
        pending: list[Callable[[], Tensor]] = []
        if readings is not None:
            pending = [partial(readings.__getitem__, m) for m in range(len(readings))]
        elif self.hash is not None:
            if addresses is None:
                addresses = self.hash(ids) if cache is None else cache.addresses(self.hash, ids)
            tables: Iterable[Any] = self.tables
            pending = [table.begin(a) for table, a in zip(tables, addresses, strict=True)]
        h = look_up(ids, self.embedding.weight)
        mask = real = None
        positions = torch.arange(ids.shape[1], device=ids.device)
        if cache is not None:
            positions, mask, real = cache.advance(ids)
        rope = self._rope(positions, torch.promote_types(h.dtype, torch.float32))
        if self.config.streams > 1:
            h = h.unsqueeze(-2).expand(-1, -1, self.config.streams, -1)
        arriving = iter(pending)
        for layer, block in enumerate(self.blocks):
            e = None
            if block.engram is not None:
                e = next(arriving)()
                if real is not None:
                    e = e * real.unsqueeze(-1)
            if self.recomputes and self.training and cache is None:
                h = checkpoint(
                    block,
                    h,
                    rope,
                    e,
                    use_reentrant=False,
                    context_fn=self._recomputing,
                    preserve_rng_state=False,
                )
            else:
                h = block(h, rope, e, mask, None if cache is None else cache.layers[layer])
        return self.finish(h)

    def finish(self, h: Tensor) -> Tensor:
        """Normalise what the last block returned, [B, T, D]; rounded to what autocast multiplies in."""
        h = self.norm(h if self.config.streams == 1 else h.mean(dim=-2))
        device = h.device.type
        return h.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else h

    def _recomputing(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return what surrounds a block's forward pass and its repetition, whose load does not count."""

        @contextmanager
        def uncounted() -> Iterator[None]:
            for router in self.routers():
                router.counting = False
            try:
                yield
            finally:
                for router in self.routers():
                    router.counting = True

        return nullcontext(), uncounted()

    def _rope(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the rotation tables of `positions`."""
        attention = self.config.attention
        width = attention.rope_width(self.config.d_model)
        frequency = frequencies(width, attention.rope_theta, attention.yarn, positions.device)
        return rope_tables(positions, frequency, dtype)

    def routers(self) -> list[Router]:
        """Return the routers from the lowest block up; none in a dense network."""
        return [block.ffn.router for block in self.blocks if isinstance(block.ffn, Experts)]

    def router_counts(self) -> list[Tensor]:
        """Return each router's load since its last bias update, int64 [E]; add up processes in place."""
        return [router.counts for router in self.routers()]

    def update_router_bias(self) -> None:
        """Balance the experts by one step, from the loads of the training forwards since the last call."""
        update_biases(self.routers())

    def parameter_roles(self) -> dict[str, Role]:
        """Say for every parameter how it is to be trained.

        "table": memory rows, wherever a module keeps them; "embedding": token embedding and head; "matrix":
        anything that multiplies, stacks of experts [E, in, out] included; "vector": norms, biases and
        depthwise convolutions.
        """
        return {name: _role(name, parameter) for name, parameter in self.named_parameters()}


def _role(name: str, parameter: Tensor) -> Role:
    parts = name.split(".")
    if "tables" in parts or "table" in parts:
        return "table"
    if parts[0] in ("embedding", "head"):
        return "embedding"
    depthwise = parameter.ndim == 3 and parameter.shape[1] == 1
    return "vector" if parameter.ndim < 2 or depthwise else "matrix"

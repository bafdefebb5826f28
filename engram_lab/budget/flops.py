"""Floating-point operations per token, from the configuration alone.

Conventions: a multiply-add is two operations; element-wise work, norms and look-ups count nothing; attention
scores are counted over the whole sequence, not the causal half, as torch's FlopCounterMode does; the backward
pass costs twice the forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from engram_lab.budget.count import attention_parameters, count, hyper_connection_parameters
from engram_lab.model.config import ModelConfig
from engram_lab.model.memories import memory_size

BACKWARD = 2
"""Operations of a backward pass, in forward passes."""


@dataclass(frozen=True, kw_only=True)
class FlopCount:
    """Forward operations per token by component."""

    attention: int
    """Projections of queries, keys, values and output."""
    scores: int
    """Queries times keys and weights times values."""
    hyper_connections: int
    """Reading, mixing and weighing several residual streams."""
    dense: int
    shared_experts: int
    experts: int
    router: int
    memory: int
    """The memory's projections and short convolutions; torch's counter does not see the latter."""
    head: int

    @property
    def forward(self) -> int:
        """Operations of one forward pass per token."""
        return sum(getattr(self, name) for name in self.__dataclass_fields__)

    @property
    def training(self) -> int:
        """Operations of one forward and backward pass per token."""
        return (1 + BACKWARD) * self.forward


def flops_per_token(network: ModelConfig, sequence_length: int) -> FlopCount:
    """Count the operations per token of `network` at a sequence length in tokens."""
    parameters = count(network)
    attention, memory = network.attention, network.engram
    D, n = network.d_model, network.streams
    width = attention.head_width(D)
    scored = width + attention.rope_width(D) if attention.kind == "latent" else width
    mixing = hyper_connection_parameters(network)[0] + n * (n + 1) * D if n > 1 else 0
    return FlopCount(
        attention=2 * network.n_layers * attention_parameters(network)[0],
        scores=2 * network.n_layers * attention.n_heads * (scored + width) * sequence_length,
        hyper_connections=4 * network.n_layers * mixing,
        dense=2 * parameters.dense,
        shared_experts=2 * parameters.shared_experts,
        experts=2 * parameters.experts_active,
        router=2 * parameters.router,
        memory=2 * len(memory.layers) * memory_size(memory, D, n).products if memory else 0,
        head=2 * network.vocab_size * D,
    )

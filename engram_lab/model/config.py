"""The configuration of one network: plain values, validated when built."""

from __future__ import annotations

from dataclasses import dataclass, field

from engram_lab.errors import UserError
from engram_lab.model.attention import AttentionConfig
from engram_lab.model.engram import EngramConfig
from engram_lab.model.experts import FeedForwardConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only Transformer with routed experts and, where `engram` is given, n-gram memory."""

    vocab_size: int = 8192
    """Number of token ids, as the tokenizer counts them."""
    d_model: int = 256
    """Width D of the residual stream."""
    n_layers: int = 8
    """Number of blocks; each is attention followed by a feed-forward layer."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    ffn: FeedForwardConfig = field(default_factory=FeedForwardConfig)
    engram: EngramConfig | None = None
    """The n-gram memory; None builds a network without one."""
    streams: int = 1
    """Residual streams; more than one are joined by hyper-connections (model/residual.py)."""
    tie_embeddings: bool = False
    """Use the token embedding as the output head's weight as well."""
    norm_eps: float = 1e-6
    """Added to the mean square in every RMS norm."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "streams"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}, but must be at least 1.")
        if self.norm_eps <= 0:
            raise UserError(f"model.norm_eps is {self.norm_eps}, but must be positive, for example 1e-6.")
        self.attention.head_width(self.d_model)
        for layer in range(self.n_layers):
            self.ffn.shared_width(layer)
        if self.ffn.leading_dense_layers > self.n_layers:
            raise UserError(
                f"ffn.leading_dense_layers is {self.ffn.leading_dense_layers}, but the model has n_layers = "
                f"{self.n_layers}; use at most that many."
            )
        if self.engram is not None:
            last = self.n_layers - 1
            for layer in self.engram.layers:
                if layer > last:
                    raise UserError(
                        f"engram.layers names block {layer}, but blocks are numbered 0 to {last}; "
                        f"the nearest is {last}."
                    )

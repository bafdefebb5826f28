"""Causal self-attention with grouped key-value heads, rotary positions, normalised queries and keys.

Attention runs across the documents packed into one sequence: a token sees everything before it in its row
of the batch. Masking documents apart would cost the fused kernels their causal fast path, and every cell of
a study pays the same for leaving it out; the n-gram memory, where foreign context changes an address, has
its own boundary rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram_lab.errors import UserError
from engram_lab.model.cache import LayerCache
from engram_lab.model.rope import YarnConfig, rotate


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Heads and positions of every block's attention."""

    kind: Literal["grouped", "latent"] = "grouped"
    """Grouped-query attention, or multi-head latent attention (model/latent.py)."""
    n_heads: int = 4
    """Query heads."""
    n_kv_heads: int | None = None
    """Grouped: key-value heads, each shared by n_heads / n_kv_heads query heads; None means n_heads."""
    head_dim: int | None = None
    """Width of one head (latent: of its part without position, and of its value); None means d_model /
    n_heads."""
    qk_norm: bool = True
    """RMS-normalise queries and keys per head before rotating them, which bounds the scores at high
    learning rates; latent attention normalises its latents instead, whatever this says."""
    latent_dim: int | None = None
    """Latent: width of the latent that keys and values are made from; None means 4 heads' width."""
    query_latent_dim: int | None = None
    """Latent: width of the latent that queries are made from; None makes them from the hidden state
    directly."""
    rope_dim: int | None = None
    """Latent: width of each head's rotary part; None means half a head's width."""
    rope_theta: float = 1e4
    """Base of the rotary frequencies (RoFormer, arXiv 2104.09864)."""
    yarn: YarnConfig | None = None
    """Extension to a longer context than was trained on."""

    def __post_init__(self) -> None:
        if self.kind not in ("grouped", "latent"):
            raise UserError(f"attention.kind is {self.kind!r}, but must be 'grouped' or 'latent'.")
        if self.n_heads < 1:
            raise UserError(f"attention.n_heads is {self.n_heads}, but must be at least 1.")
        if self.kv_heads < 1 or self.n_heads % self.kv_heads:
            divisors = [n for n in range(1, self.n_heads + 1) if self.n_heads % n == 0]
            raise UserError(
                f"attention.n_kv_heads is {self.kv_heads}, but must divide n_heads = {self.n_heads}; "
                f"the nearest is {min(divisors, key=lambda n: abs(n - self.kv_heads))}."
            )
        for name in ("head_dim", "rope_dim"):
            width = getattr(self, name)
            if width is not None and (width < 2 or width % 2):
                raise UserError(
                    f"attention.{name} is {width}, but rotary positions need an even width; "
                    f"the nearest is {max(2, width + 1)}."
                )
        for name in ("latent_dim", "query_latent_dim"):
            width = getattr(self, name)
            if width is not None and width < 1:
                raise UserError(f"attention.{name} is {width}, but must be at least 1.")
        if self.rope_theta <= 1:
            raise UserError(f"attention.rope_theta is {self.rope_theta}, but must exceed 1, for example 1e4.")

    @property
    def kv_heads(self) -> int:
        """Key-value heads with the default filled in."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    def head_width(self, d_model: int) -> int:
        """Return the width of one head in a model of width `d_model`; UserError where none fits."""
        if self.head_dim is not None:
            return self.head_dim
        unit = 2 * self.n_heads if self.kind == "grouped" or self.rope_dim is not None else 4 * self.n_heads
        if d_model % unit:
            raise UserError(
                f"model.d_model is {d_model}, but must be a multiple of {unit} for {self.n_heads} heads "
                f"unless attention.head_dim is given; the nearest is {max(1, round(d_model / unit)) * unit}."
            )
        return d_model // self.n_heads

    def rope_width(self, d_model: int) -> int:
        """Return how many channels of a head are rotated."""
        if self.kind == "grouped":
            return self.head_width(d_model)
        return self.head_width(d_model) // 2 if self.rope_dim is None else self.rope_dim

    def latent_width(self, d_model: int) -> int:
        """Return the width of the key-value latent."""
        return 4 * self.head_width(d_model) if self.latent_dim is None else self.latent_dim

    def score_scale(self, width: int) -> float:
        """Return what the product of a query and a key of `width` channels is multiplied by."""
        return width**-0.5 * (1.0 if self.yarn is None else self.yarn.score_factor)


class Norm(nn.RMSNorm):
    """RMS norm in the precision of its weight, whatever autocast has made of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x over its last dimension."""
        return super().forward(x.to(self.weight.dtype))


class Attention(nn.Module):
    """Grouped-query attention over h [B, T, D]."""

    def __init__(self, config: AttentionConfig, d_model: int, norm_eps: float) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = config.n_heads, config.kv_heads, config.head_width(d_model)
        self.scale = config.score_scale(self.width)
        self.query = nn.Linear(d_model, self.heads * self.width, bias=False)
        self.key = nn.Linear(d_model, self.kv_heads * self.width, bias=False)
        self.value = nn.Linear(d_model, self.kv_heads * self.width, bias=False)
        self.out = nn.Linear(self.heads * self.width, d_model, bias=False)
        self.query_norm = Norm(self.width, eps=norm_eps) if config.qk_norm else nn.Identity()
        self.key_norm = Norm(self.width, eps=norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        h: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Attend from the T positions of h; `rope` holds their tables. See `attend` for the mask."""
        weight = torch.cat((self.query.weight, self.key.weight, self.value.weight))
        qkv = F.linear(h, weight).unflatten(-1, (-1, self.width))
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=-2)
        # Heads stay innermost but one: the fused kernels answer in the layout of q, which is then that of h.
        cos, sin = (t.unsqueeze(-2) if t.ndim == 2 else t.transpose(1, 2) for t in rope)
        q, k = rotate(self.query_norm(q), cos, sin), rotate(self.key_norm(k), cos, sin)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if cache is not None:
            k, v = cache.append(k, v)
        return self.out(attend(q, k, v, self.scale, mask))


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Return softmax(scale q k^T) v, heads side by side: [B, T, heads * width] from [B, heads, T, width].

    `mask` [B, 1, T, S] is true where a query may look; None means causal, S = T. Queries and keys come out
    of the rotation in float32. A GPU takes them to the precision of v; on a CPU v joins them instead,
    because the backward pass of its fused kernel is several times slower in bfloat16.
    """
    grouped, dtype = q.shape[1] != k.shape[1], v.dtype
    with torch.autocast(q.device.type, enabled=False):
        if q.is_cuda:
            q, k = q.to(dtype), k.to(dtype)
        else:
            v = v.to(q.dtype)
        y = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
        )
    return y.to(dtype).transpose(1, 2).flatten(2)

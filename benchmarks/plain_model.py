"""The network of a `ModelConfig` as a competent first version writes it: the baseline of step_gpu.py.

Autocast, SDPA, `grouped_mm` for the experts, one `torch.compile` around the whole model, all logits at once,
`torch.optim.AdamW`. It takes the parameters of `Transformer` by name, so both can start equal, and serves
what the study model has: grouped-query attention, sigmoid routing with a balancing bias, shared experts, one
residual stream and Engram memories.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram_lab.model.config import ModelConfig
from engram_lab.model.rope import frequencies


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, self.width = config.d_model, config.attention.head_width(config.d_model)
        self.query = nn.Linear(D, config.attention.n_heads * self.width, bias=False)
        self.key = nn.Linear(D, config.attention.kv_heads * self.width, bias=False)
        self.value = nn.Linear(D, config.attention.kv_heads * self.width, bias=False)
        self.out = nn.Linear(config.attention.n_heads * self.width, D, bias=False)
        self.query_norm = nn.RMSNorm(self.width, eps=config.norm_eps)
        self.key_norm = nn.RMSNorm(self.width, eps=config.norm_eps)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        def rotate(x: Tensor) -> Tensor:
            first, second = x.float().chunk(2, dim=-1)
            return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)

        q, k, v = (f(h).unflatten(-1, (-1, self.width)) for f in (self.query, self.key, self.value))
        q, k = rotate(self.query_norm(q).transpose(1, 2)), rotate(self.key_norm(k).transpose(1, 2))
        v = v.transpose(1, 2)
        y = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, D: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(D, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * up)


class Router(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.ffn.experts, config.d_model))
        self.register_buffer("bias", torch.zeros(config.ffn.experts))
        self.register_buffer("counts", torch.zeros(config.ffn.experts), persistent=False)


class Experts(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        D, E, H, self.K = config.d_model, config.ffn.experts, config.ffn.expert_hidden, config.ffn.top_k
        self.router = Router(config)
        self.gate_up = nn.Parameter(torch.empty(E, D, 2 * H))
        self.out = nn.Parameter(torch.empty(E, H, D))
        self.shared = SwiGLU(D, config.ffn.shared_width(layer))

    def forward(self, h: Tensor) -> Tensor:
        x = h.flatten(0, 1)
        with torch.autocast(h.device.type, enabled=False):
            scores = F.linear(x.float(), self.router.weight).sigmoid()
        chosen = (scores.detach() + self.router.bias).topk(self.K).indices
        weights = scores.gather(-1, chosen)
        weights = weights / weights.sum(-1, keepdim=True)
        flat = chosen.flatten()
        counts = torch.zeros_like(self.router.counts).scatter_add_(
            0, flat, torch.ones_like(weights.flatten())
        )
        if self.training:
            self.router.counts += counts
        order = flat.argsort(stable=True)
        tokens, offsets = order // self.K, counts.cumsum(0).to(torch.int32)
        rows = x.bfloat16()[tokens]
        gate, up = F.grouped_mm(rows, self.gate_up.bfloat16(), offs=offsets).chunk(2, dim=-1)
        y = F.grouped_mm(F.silu(gate) * up, self.out.bfloat16(), offs=offsets)
        y = y * weights.flatten()[order, None].to(y.dtype)
        return torch.zeros_like(y[: len(x)]).index_add(0, tokens, y).view_as(h) + self.shared(h)


class Memory(nn.Module):
    """Engram with a signed-root gate and a short convolution."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, memory = config.d_model, config.engram
        self.value = nn.Linear(memory.reading_dim, D, bias=False)
        self.key = nn.Linear(memory.reading_dim, D, bias=False)
        self.gate = nn.Module()
        self.gate.query_norms = nn.ModuleList([nn.RMSNorm(D, config.norm_eps)])
        self.gate.key_norms = nn.ModuleList([nn.RMSNorm(D, config.norm_eps)])
        self.conv = nn.Module()
        self.conv.norms = nn.ModuleList([nn.RMSNorm(D, config.norm_eps)])
        self.conv.weight = nn.Parameter(torch.zeros(D, 1, memory.conv_kernel))
        self.dilation = max(memory.orders)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        query, key = self.gate.query_norms[0](h), self.gate.key_norms[0](self.key(e).float())
        score = (query * key).sum(-1, keepdim=True) / h.shape[-1] ** 0.5
        u = (score.sign() * score.abs().clamp_min(1e-6).sqrt()).sigmoid() * self.value(e)
        x = self.conv.norms[0](u.float()).mT
        x = F.pad(x, ((self.conv.weight.shape[-1] - 1) * self.dilation, 0))
        with torch.autocast(h.device.type, enabled=False):
            y = F.conv1d(x, self.conv.weight, dilation=self.dilation, groups=x.shape[1])
        return u + F.silu(y.mT)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        D, memory = config.d_model, config.engram
        self.engram = Memory(config) if memory is not None and layer in memory.layers else None
        self.attention_norm = nn.RMSNorm(D, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(D, eps=config.norm_eps)
        dense = config.ffn.is_dense(layer)
        self.ffn = SwiGLU(D, config.ffn.dense_width()) if dense else Experts(config, layer)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor, e: Tensor | None) -> Tensor:
        if self.engram is not None:
            h = h + self.engram(h, e)
        h = h + self.attention(self.attention_norm(h), cos, sin)
        return h + self.ffn(self.ffn_norm(h))


class PlainModel(nn.Module):
    """`forward(ids, targets, addresses)` is the mean cross-entropy."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def take(self, network: nn.Module) -> PlainModel:
        """Copy the parameters of the `Transformer`; its tables become this module's."""
        tables = [
            nn.Embedding.from_pretrained(t.weight.detach().clone(), freeze=False) for t in network.tables
        ]
        self.tables = nn.ModuleList(tables)
        self.load_state_dict(network.state_dict(), strict=False)
        return self

    def forward(self, ids: Tensor, targets: Tensor, addresses: Tensor | None) -> Tensor:
        width = self.config.attention.head_width(self.config.d_model)
        frequency = frequencies(width, self.config.attention.rope_theta, None, ids.device)
        angle = torch.arange(ids.shape[1], device=ids.device).double().unsqueeze(-1) * frequency
        cos, sin = angle.cos().float(), angle.sin().float()
        h = self.embedding(ids)
        memories = iter(range(len(self.tables)))
        for block in self.blocks:
            e = None
            if block.engram is not None:
                m = next(memories)
                e = self.tables[m](addresses[m]).flatten(-2)
            h = block(h, cos, sin, e)
        return F.cross_entropy(self.head(self.norm(h)).flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def update_router_bias(self) -> None:
        for block in self.blocks:
            if isinstance(block.ffn, Experts):
                router = block.ffn.router
                router.bias += self.config.ffn.bias_step * (router.counts.mean() - router.counts).sign()
                router.counts.zero_()

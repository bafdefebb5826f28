"""Feed-forward layers: a dense SwiGLU, and routed experts beside shared ones.

Routing drops no token. A token's K experts are chosen by score plus a bias that no gradient touches; after
each optimizer step the bias of an overused expert goes down by a fixed step and that of an underused one
up, which balances the load without a term in the loss (arXiv 2408.15664). The mixing weights come from the
scores alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram_lab.errors import UserError
from engram_lab.model.grouped import gather_choices, grouped_matmul, load, spread, stays_on_device

try:
    from engram_lab.model import experts_triton as kernels
except ImportError:  # torch for CPUs comes without triton
    kernels = None  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class FeedForwardConfig:
    """Experts of every block; `experts = 0` makes all blocks dense."""

    experts: int = 32
    """Routed experts E a block holds; 0 for a dense network."""
    top_k: int = 4
    """Routed experts K each token is sent to."""
    shared_experts: int = 1
    """Experts every token passes through; built as one SwiGLU of their joint width."""
    expert_hidden: int = 64
    """Hidden width of one expert."""
    shared_hidden: int | tuple[int, ...] | None = None
    """Joint hidden width of the shared experts, for all blocks or one a block; None means shared_experts *
    expert_hidden. A budget solver sets it where a cell without memory has to make up for the memory's
    projections."""
    leading_dense_layers: int = 0
    """Blocks at the bottom that are dense, where routing is known to balance badly."""
    dense_hidden: int | None = None
    """Hidden width of dense blocks; None means (top_k + shared_experts) * expert_hidden, as many active
    parameters as a block of experts has."""
    router: Literal["sigmoid", "softmax"] = "sigmoid"
    """How scores come from router logits; both are computed in float32 and renormalised over the K chosen."""
    bias_step: float = 1e-3
    """Change of a balancing bias per optimizer step; 0 switches balancing off."""
    balance_loss: float = 0.0
    """Weight of the sequence-wise balance loss (DeepSeek-V3, arXiv 2412.19437), added to a training loss of
    reduction "mean"; 0 leaves it out."""

    def __post_init__(self) -> None:
        for name in ("experts", "shared_experts", "leading_dense_layers", "bias_step", "balance_loss"):
            if getattr(self, name) < 0:
                raise UserError(f"ffn.{name} is {getattr(self, name)}, but must be at least 0.")
        shared = self.shared_hidden if isinstance(self.shared_hidden, tuple) else (self.shared_hidden or 0,)
        if min(shared, default=0) < 0:
            raise UserError(f"ffn.shared_hidden is {self.shared_hidden}, but no width may be negative.")
        if self.dense_hidden is not None and self.dense_hidden < 1:
            raise UserError(f"ffn.dense_hidden is {self.dense_hidden}, but must be at least 1.")
        if self.expert_hidden < 1:
            raise UserError(f"ffn.expert_hidden is {self.expert_hidden}, but must be at least 1.")
        if self.experts and not 1 <= self.top_k <= self.experts:
            raise UserError(
                f"ffn.top_k is {self.top_k}, but must lie between 1 and experts = {self.experts}; "
                f"the nearest is {min(max(self.top_k, 1), self.experts)}."
            )
        if self.router not in ("sigmoid", "softmax"):
            raise UserError(f"ffn.router is {self.router!r}, but must be 'sigmoid' or 'softmax'.")

    def shared_width(self, layer: int) -> int:
        """Return the joint hidden width of block `layer`'s shared experts; 0 means there are none."""
        if self.shared_hidden is None:
            return self.shared_experts * self.expert_hidden
        if isinstance(self.shared_hidden, int):
            return self.shared_hidden
        if layer >= len(self.shared_hidden):
            raise UserError(
                f"ffn.shared_hidden has {len(self.shared_hidden)} widths, but block {layer} needs one too; "
                "give one for each of n_layers, or a single number for all."
            )
        return self.shared_hidden[layer]

    def dense_width(self) -> int:
        """Return the hidden width of a dense block."""
        if self.dense_hidden is not None:
            return self.dense_hidden
        return (self.top_k + self.shared_experts) * self.expert_hidden

    def is_dense(self, layer: int) -> bool:
        """Whether block `layer` has a dense feed-forward layer instead of experts."""
        return self.experts == 0 or layer < self.leading_dense_layers


def _precision(x: Tensor) -> torch.dtype:
    """Return the dtype in which x [...] meets the experts; a CPU's is its own (see `Experts.routed`)."""
    on = x.is_cuda and torch.is_autocast_enabled("cuda")
    return torch.get_autocast_dtype("cuda") if on else x.dtype


class SwiGLU(nn.Module):
    """out(silu(gate(x)) * up(x)) with gate and up in one matrix (arXiv 2002.05202)."""

    def __init__(self, d_model: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(d_model, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., D] to [..., D]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * up)


class Router(nn.Module):
    """Scores, choice and load of the routed experts; float32 whatever the rest runs in."""

    bias: Tensor
    counts: Tensor

    def __init__(self, d_model: int, config: FeedForwardConfig) -> None:
        super().__init__()
        self.top_k, self.kind, self.bias_step = config.top_k, config.router, config.bias_step
        self.penalised = config.balance_loss > 0
        self.imbalance = torch.zeros(())
        self.counting = True
        self.weight = nn.Parameter(torch.empty(config.experts, d_model))
        self.register_buffer("bias", torch.zeros(config.experts))
        self.register_buffer("counts", torch.zeros(config.experts, dtype=torch.int64), persistent=False)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return mixing weights and expert numbers, both [B, T, K], for h [B, T, D].

        In training `imbalance` is renewed if it is part of the loss.
        """
        with torch.autocast(h.device.type, enabled=False):
            scores = self.scores(h)
            chosen = (scores.detach() + self.bias).topk(self.top_k, dim=-1, sorted=False).indices
            weights = scores.gather(-1, chosen)
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
            if self.training and self.penalised:
                self.imbalance = sequence_imbalance(scores, chosen)
        return weights, chosen

    def scores(self, h: Tensor) -> Tensor:
        """Return [..., E] for h [..., D], in float32 or better."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        logits = F.linear(h.to(dtype), self.weight.to(dtype))
        return logits.sigmoid() if self.kind == "sigmoid" else logits.softmax(dim=-1)

    def count(self, load: Tensor) -> None:
        """In training, add a forward pass's load [E] to `counts`, unless it only repeats one."""
        if self.training and self.counting:
            self.counts += load

    def update_bias(self) -> None:
        """Move each bias one step against the sign of its expert's excess load, then forget the load."""
        update_biases([self])


@torch.no_grad()
def update_biases(routers: list[Router]) -> None:
    """Update the biases of equally wide routers together."""
    if routers:
        counts = torch.stack([router.counts for router in routers]).to(routers[0].bias.dtype)
        steps = routers[0].bias_step * (counts.mean(dim=1, keepdim=True) - counts).sign()
        torch._foreach_add_([router.bias for router in routers], list(steps.unbind()))
        torch._foreach_zero_([router.counts for router in routers])


def sequence_imbalance(scores: Tensor, chosen: Tensor) -> Tensor:
    """Return the mean over sequences of sum_e f_e p_e; 1 where load or scores are even, E / K at worst.

    f_e is expert e's share of the sequence's choices times E, p_e its mean share of the scores [B, T, E].
    """
    E = scores.shape[-1]
    picked = torch.zeros_like(scores).scatter_(-1, chosen, E / chosen.shape[-1])
    shares = scores / scores.sum(dim=-1, keepdim=True)
    return (picked.mean(dim=-2) * shares.mean(dim=-2)).sum(dim=-1).mean()


class Experts(nn.Module):
    """K of E routed SwiGLU experts per token, plus the shared ones."""

    def __init__(self, d_model: int, config: FeedForwardConfig, shared_width: int) -> None:
        super().__init__()
        self.router = Router(d_model, config)
        self.gate_up = nn.Parameter(torch.empty(config.experts, d_model, 2 * config.expert_hidden))
        self.out = nn.Parameter(torch.empty(config.experts, config.expert_hidden, d_model))
        self.shared = SwiGLU(d_model, shared_width) if shared_width else None
        # bfloat16 copies of gate_up and out, where training keeps them equal (training/captured.py)
        self.narrow: tuple[Tensor, Tensor] | None = None

    def forward(self, h: Tensor) -> Tensor:
        """Map h [B, T, D] to [B, T, D]."""
        shared = None if self.shared is None else self.shared(h)
        if h.is_cuda and self.has_kernels(_precision(h)):
            return self.fused(h, shared)
        weights, chosen = self.router(h)
        routed = self.routed(h.flatten(0, -2), weights.flatten(0, -2), chosen.flatten(0, -2)).view_as(h)
        return routed if shared is None else routed + shared

    def by_expert(self) -> tuple[Tensor, ...]:
        """Return the parameters and buffers whose first dimension is E."""
        return self.gate_up, self.out, self.router.weight, self.router.bias, self.router.counts

    def has_kernels(self, dtype: torch.dtype) -> bool:
        """Whether `fused` takes the layer, on a GPU, in `dtype`."""
        return kernels is not None and kernels.fits(dtype, self.out.shape)

    def asks_the_host(self, dtype: torch.dtype) -> bool:
        """Whether in `dtype` a GPU's products wait until the host knows the loads."""
        return not all(stays_on_device(dtype, weight.shape) for weight in (self.gate_up, self.out))

    def fused(self, h: Tensor, shared: Tensor | None) -> Tensor:
        """Return what the router and `routed` make of h [B, T, D], plus `shared`, in a GPU's kernels."""
        router = self.router
        y, load, chosen = kernels.routed_experts(
            h.flatten(0, -2).to(_precision(h)),
            router.weight,
            router.bias,
            self.gate_up,
            self.out,
            router.top_k,
            softmax=router.kind == "softmax",
            narrow=self.narrow if self.training else None,  # a callback may evaluate other weights
            more=None if shared is None else shared.flatten(0, -2),
        )
        router.count(load)
        if router.training and router.penalised:
            with torch.autocast(h.device.type, enabled=False):
                chosen = chosen.unflatten(0, h.shape[:-1]).long()
                router.imbalance = sequence_imbalance(router.scores(h), chosen)
        return y.view_as(h)

    def routed(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Return the weighted sum [tokens, D] of what each token's chosen experts make of it.

        In training the load is added to the router's `counts`. A CPU stays in the precision of x: under
        autocast its bfloat16 products would be compiled for each number of rows an expert happens to get.
        """
        dtype = _precision(x)
        x, gate_up, out = x.to(dtype), self.gate_up.to(dtype), self.out.to(dtype)
        order = chosen.flatten().argsort(stable=True)
        places = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        counts = load(chosen, len(gate_up))
        self.router.count(counts)
        with torch.autocast(x.device.type, enabled=False):
            rows = spread(x, order, places)
            gate, up = grouped_matmul(rows, gate_up, counts).chunk(2, dim=-1)
            # Weighing the hidden values instead of the results is the same sum over fewer channels.
            share = weights.flatten().index_select(0, order).to(dtype).unsqueeze(1)
            y = grouped_matmul(F.silu(gate) * up * share, out, counts)
            return gather_choices(y, order, places, chosen.shape[1])


def feed_forward(d_model: int, config: FeedForwardConfig, layer: int) -> SwiGLU | Experts:
    """Build block `layer`'s feed-forward layer."""
    if config.is_dense(layer):
        return SwiGLU(d_model, config.dense_width())
    return Experts(d_model, config, config.shared_width(layer))

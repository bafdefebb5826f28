"""The address function as a torch module: same results on CPU and GPU, no host synchronisation.

On CUDA tensors it is one fused kernel where triton is installed, and plain operators everywhere else.

Shapes: B batch, T length, P history length, M memories, N largest order, H heads of all orders.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram_lab.model.hashing import INT64_MAX, SALT, NgramHash

try:
    from engram_lab.model import hash_triton
except ImportError:  # triton comes with torch's builds for CUDA only
    hash_triton = None  # type: ignore[assignment]


class TorchNgramHash(nn.Module):
    """`NgramHash.addresses` on tensors; its tables are buffers, saved with the network."""

    canonical: Tensor
    edge: Tensor
    primes: Tensor
    multipliers: Tensor
    offsets: Tensor
    pad: Tensor

    def __init__(self, rule: NgramHash):
        super().__init__()
        self.orders, self.heads, self.boundary = rule.orders, rule.heads, rule.boundary
        self.salted, self.constant = rule.salted, rule.constant
        self.history_length = rule.history_length
        self.smallest_prime, self.largest_prime = (
            int(rule.primes.min(initial=INT64_MAX)),
            int(rule.primes.max(initial=0)),
        )
        self.dtype = torch.int32 if rule.dtype().itemsize == 4 else torch.int64
        for name in ("canonical", "edge", "primes", "multipliers", "offsets"):
            self.register_buffer(name, torch.tensor(getattr(rule, name)))
        self.register_buffer("pad", torch.tensor(rule.pad))

    def forward(self, ids: Tensor, history: Tensor | None = None, position: int | None = None) -> Tensor:
        """Return the row numbers [M, B, T, H] of token ids [B, T]; arguments as in `NgramHash.addresses`."""
        past = 0 if history is None else history.shape[1]
        joined = ids if history is None else torch.cat([history, ids], dim=1)
        B, T = ids.shape
        M, H = self.primes.shape
        if self.constant:
            return self.offsets.to(self.dtype)[:, None, None, :].expand(M, B, T, H)
        start = past if position is None else position
        if ids.is_cuda and hash_triton is not None:
            return self._fused(joined, past, start)
        mix = torch.zeros(M, B, T, dtype=torch.int64, device=ids.device)
        if self.salted:
            mix = mix ^ ((torch.arange(start, start + T, device=ids.device) * SALT) & INT64_MAX)
        mixes = []
        for k, seen in enumerate(self._windows(joined, past)):
            mix = mix ^ (seen * self.multipliers[:, k, None, None])
            if k + 1 in self.orders:
                mixes.append(mix)
        spread = torch.stack(mixes, dim=-1).repeat_interleave(self.heads, dim=-1)
        rows = spread % self.primes[:, None, None, :] + self.offsets[:, None, None, :]
        return rows.to(self.dtype)

    def _fused(self, ids: Tensor, past: int, position: int) -> Tensor:
        """Return the row numbers of ids [B, P + T] from `past` = P on, in one pass."""
        return hash_triton.ngram_addresses(
            ids,
            self.primes,
            past,
            self.dtype,
            position,
            self.canonical,
            self.edge,
            self.pad,
            self.multipliers,
            self.offsets,
            list(self.orders),
            self.heads,
            self.boundary == "reset_at_eos",
            SALT if self.salted else 0,
            self.smallest_prime <= hash_triton.SMALL_PRIME,
            self.largest_prime >= hash_triton.WIDE_PRIME,
        )

    def _windows(self, ids: Tensor, past: int) -> list[Tensor]:
        """Return, for each k < N, the canonical id seen k positions back [B, T] (int64), edges padded."""
        length, N = ids.shape[1], max(self.orders)
        ids = ids.long()
        before = self.pad.expand(ids.shape[0], N - 1)
        canonical = torch.cat([before, self.canonical[ids].long()], dim=1)
        edge = F.pad(self.edge[ids], (N - 1, 0), value=False)
        shift = 0 if self.boundary == "reset_at_eos" else 1
        hidden = torch.zeros_like(ids[:, past:], dtype=torch.bool)
        seen = []
        for k in range(N):
            first, last = N - 1 + past - k, N - 1 + length - k
            if k:
                hidden = hidden | edge[:, first + shift : last + shift]
            seen.append(torch.where(hidden, self.pad, canonical[:, first:last]))
        return seen

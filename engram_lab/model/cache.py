"""What decoding remembers between calls, so that each token is computed once.

It has room for all tokens from the start, and is changed in place: a step then always reads and writes the
same memory, which is what a CUDA graph can repeat.

Shapes: B batch, T length of one call, S tokens there is room for, P history length, H hash heads, M memories.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from engram_lab.model.torch_hash import TorchNgramHash


@dataclass
class LayerCache:
    """One block's past: keys and values, or what makes them, and the state of the memory's convolution."""

    room: int
    kept: tuple[Tensor, ...] = ()
    places: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """Where this call's positions go, [T]."""
    _convolution: Tensor | None = None

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Add this call's [..., T, width] tensors; return all that there is room for, [..., S, width]."""
        if not self.kept:
            self.kept = tuple(x.new_zeros(*x.shape[:-2], self.room, x.shape[-1]) for x in new)
        for kept, x in zip(self.kept, new, strict=True):
            kept.index_copy_(-2, self.places, x)
        return self.kept

    @property
    def convolution(self) -> Tensor | None:
        """State of the memory's convolution; None before the first call, or without one."""
        return self._convolution

    @convolution.setter
    def convolution(self, state: Tensor | None) -> None:
        if self._convolution is None or state is None:
            self._convolution = state
        else:
            self._convolution.copy_(state)


@dataclass
class Cache:
    """The state of decoding a batch whose rows are padded on the left with the end-of-text id."""

    layers: list[LayerCache]
    padding: Tensor
    """Number of padding ids at the start of each row, [B]."""
    pad_id: int
    length: Tensor
    """Number of tokens so far, padding included, int64 [] on the device."""
    history: Tensor | None = None
    """The ids that the next n-grams begin with, [B, P]."""
    hashed: int = 0
    """Number of tokens whose addresses were asked for."""

    @classmethod
    def start(cls, n_layers: int, padding: Tensor, room: int, pad_id: int) -> Cache:
        """Return the state before the first call, for at most `room` tokens a row."""
        return cls(
            layers=[LayerCache(room) for _ in range(n_layers)],
            padding=padding,
            pad_id=pad_id,
            length=torch.zeros((), dtype=torch.int64, device=padding.device),
        )

    def addresses(self, rule: TorchNgramHash, ids: Tensor) -> Tensor:
        """Return the row numbers [M, B, T, H] for the next `ids` [B, T], whose n-grams begin in the past.

        To be called once for all ids, in order. Before the first there is what is also padding.
        """
        if self.history is None:
            self.history = ids.new_full((len(ids), max(1, rule.history_length)), self.pad_id)
        history, past = self.history.clone(), self.hashed
        self.history.copy_(torch.cat((history, ids), dim=1)[:, -history.shape[1] :])
        self.hashed += ids.shape[1]
        if not rule.salted:
            return rule(ids, history)
        rows = [
            rule(ids[b : b + 1], history[b : b + 1], past - pads)
            for b, pads in enumerate(self.padding.tolist())
        ]
        return torch.cat(rows, dim=1)

    def advance(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take in the next `ids` [B, T].

        Returns their positions [B, 1, T] counted without padding, the mask [B, 1, T, S] of what each may
        attend to, and which of them are no padding [B, T]. Padding sees itself, so that no row of the mask
        is empty.
        """
        places = torch.arange(self.layers[0].room, device=ids.device)
        queries = self.length + places[: ids.shape[1]]
        self.length += ids.shape[1]
        for layer in self.layers:
            layer.places = queries
        real = places >= self.padding.unsqueeze(1)
        causal = places <= queries.unsqueeze(1)
        mask = causal & real.unsqueeze(1) | (places == queries.unsqueeze(1))
        positions = queries - self.padding.unsqueeze(1)
        return positions.clamp_min(0).unsqueeze(1), mask.unsqueeze(1), positions >= 0

    def changing(self) -> list[Tensor]:
        """Return what a call changes and a later one does not write anew: all but keys and values."""
        states = [layer.convolution for layer in self.layers]
        return [tensor for tensor in (self.length, self.history, *states) if tensor is not None]

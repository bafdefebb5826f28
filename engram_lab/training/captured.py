"""Forward and backward pass of a training step as one CUDA graph.

A small network's kernels take the device less time than the host needs to launch them one by one, more so
while other threads of the process gather table rows. Captured once, a step is one launch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engram_lab.model.graphs import captured
from engram_lab.model.transformer import Transformer


class CapturedStep:
    """Gives the loss of a micro-batch and leaves the gradients in the parameters' `grad`.

    The first call captures; each call overwrites the gradients of the one before, so they cannot be added up
    over micro-batches, and nobody may set them to None. All calls take inputs of the same shapes; what does
    not depend on them must be on the device already.

    Args:
        network: whose parameters get gradients; its routers count each call once.
        loss: maps inputs, given by name, to the loss; called to be captured only. It may not wait for the
            device, and changes no state but the routers' counts in a way that repeating would spoil.
    """

    def __init__(self, network: Transformer, loss: Callable[..., Tensor]) -> None:
        self.network, self._loss = network, loss
        self._replay: Callable[[], None] | None = None
        self._inputs: dict[str, Tensor] = {}
        self._output = torch.empty(0)

    def __call__(self, **inputs: Tensor) -> Tensor:
        """Return the loss, no part of an autograd graph; inputs that require a gradient receive theirs."""
        if self._replay is None:
            self._replay = self._captured(inputs)
        for name, here in self._inputs.items():
            here.detach().copy_(inputs[name].detach(), non_blocking=True)
        self._replay()
        for name, here in self._inputs.items():
            if here.requires_grad:
                inputs[name].backward(here.grad)
        return self._output

    def _captured(self, inputs: dict[str, Tensor]) -> Callable[[], None]:
        self._inputs = {
            name: given.detach().clone().requires_grad_(given.requires_grad) for name, given in inputs.items()
        }
        counts = self.network.router_counts()
        before = [count.clone() for count in counts]
        replay = captured(self._compute, inputs["ids"].device)
        for count, value in zip(counts, before, strict=True):
            count.copy_(value)
        return replay

    def _compute(self) -> None:
        # Gradients made while capturing live in the graph's memory, and every replay writes them.
        for tensor in (*self.network.parameters(), *self._inputs.values()):
            tensor.grad = None
        # Autocast would keep converted weights from one call to the next, and a replay use old ones.
        on, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        with torch.enable_grad(), torch.autocast("cuda", dtype, enabled=on, cache_enabled=False):
            loss = self._loss(**self._inputs)
        loss.backward()
        self._output = loss.detach()

"""A training step up to its gradients as one CUDA graph.

A small network's kernels take the device less time than the host needs to launch them one by one, more so
while other threads of the process gather table rows. Captured once, a step is one launch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from engram_lab.model.graphs import captured
from engram_lab.model.transformer import Transformer


class CapturedStep:
    """Gives the loss of a batch, leaves the gradients in the parameters' `grad`, and balances the experts.

    The first call captures; each call overwrites the gradients of the one before, so they cannot be added up
    over micro-batches, and nobody may set them to None. All calls take inputs of the same shapes; what does
    not depend on them must be on the device already.

    Attributes:
        norm: of the parameters' gradients, after the first call; each call overwrites it.

    Args:
        network: whose parameters get gradients.
        loss: maps inputs, given by name, to the loss; called to be captured only. It may not wait for the
            device, and changes no state, the routers' loads aside, in a way that repeating would spoil.
    """

    def __init__(self, network: Transformer, loss: Callable[..., Tensor]) -> None:
        self.network, self._loss = network, loss
        self.norm = self._output = torch.empty(0)
        self._replay: Callable[[], None] | None = None
        self._inputs: dict[str, Tensor] = {}

    def __call__(self, **inputs: Tensor) -> Tensor:
        """Return the loss, no part of an autograd graph; inputs that require a gradient receive theirs."""
        if self._replay is None:
            self._replay = self._capture(inputs)
        for name, here in self._inputs.items():
            here.detach().copy_(inputs[name].detach(), non_blocking=True)
        self._replay()
        for name, here in self._inputs.items():
            if here.requires_grad:
                inputs[name].backward(here.grad)
        return self._output

    def _capture(self, inputs: dict[str, Tensor]) -> Callable[[], None]:
        self._inputs = {
            name: given.detach().clone().requires_grad_(given.requires_grad) for name, given in inputs.items()
        }
        routers = self.network.routers()
        state = [router.counts for router in routers] + [router.bias for router in routers]
        before = [tensor.clone() for tensor in state]
        replay = captured(self._compute, inputs["ids"].device)
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)
        return replay

    def _compute(self) -> None:
        # Gradients made while capturing live in the graph's memory, and every replay writes them.
        for tensor in (*self.network.parameters(), *self._inputs.values()):
            tensor.grad = None
        device = self._inputs["ids"].device.type
        on, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        # Autocast would keep converted weights from one call to the next, and a replay use old ones.
        with torch.enable_grad(), torch.autocast(device, dtype, enabled=on, cache_enabled=False):
            loss = self._loss(**self._inputs)
        # It would also narrow products that were made in float32 on purpose.
        with torch.autocast(device, enabled=False):
            loss.backward()
        self._output = loss.detach()
        self.norm = get_total_norm([p.grad for p in self.network.parameters() if p.grad is not None])
        self.network.update_router_bias()

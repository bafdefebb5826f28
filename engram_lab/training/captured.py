"""A training step up to its gradients as one CUDA graph.

A small network's kernels take the device less time than the host needs to launch them one by one, more so
while other threads of the process gather table rows. Captured once, a step is one launch, or two with the
exchange of gradients between them where processes train together. Its routed experts read bfloat16 copies of
their matrices that the optimizer writes while it has them at hand.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import get_total_norm

from engram_lab.model.experts import Experts
from engram_lab.model.graphs import captured
from engram_lab.model.transformer import Transformer
from engram_lab.training.optimizer import CompositeOptimizer


class CapturedStep:
    """Gives the loss of a batch, leaves the gradients in the parameters' `grad`, and balances the experts.

    The first call captures; each call overwrites the gradients of the one before, so they cannot be added up
    over micro-batches, and nobody may set them to None. All calls take inputs of the same shapes; what does
    not depend on them must be on the device already.

    Attributes:
        norm: of the parameters' gradients, over all processes, after the first call; each call overwrites it.

    Args:
        network: whose parameters get gradients. They may be changed in place between two calls, though not
            through `.data`, which nobody can see.
        loss: maps inputs, given by name, to the loss; called to be captured only. It may not wait for the
            device, and changes no state, the routers' loads aside, in a way that repeating would spoil.
        optimizer: of the network; it is told to capture its update too.
        processes: that train together, in torch's default group; each gives a loss of its own, all get the
            mean of the gradients. Nobody else may exchange them.
    """

    def __init__(
        self,
        network: Transformer,
        loss: Callable[..., Tensor],
        optimizer: CompositeOptimizer,
        *,
        processes: int = 1,
    ) -> None:
        self.processes = processes
        self.network, self._loss, self._optimizer = network, loss, optimizer
        optimizer.captures = True
        self.norm = self._output = torch.empty(0)
        self._replay: Callable[[], None] | None = None
        self._conclude: Callable[[], None] | None = None  # what follows the exchange
        self._gradients = self._loads = torch.empty(0)  # all of them in one tensor each, to be exchanged
        self._inputs: dict[str, Tensor] = {}
        self._versions: list[int] = []  # of the parameters that are copied

    def __call__(self, **inputs: Tensor) -> Tensor:
        """Return the loss, no part of an autograd graph; inputs that require a gradient receive theirs."""
        if self._replay is None:
            self._keep_copies()
        self._renew_copies()
        if self._replay is None:
            self._replay = self._capture(inputs)
        for name, here in self._inputs.items():
            here.detach().copy_(inputs[name].detach(), non_blocking=True)
        self._replay()
        if self._conclude is not None:
            self._exchange()
            self._conclude()
        for name, here in self._inputs.items():
            if here.requires_grad:
                inputs[name].backward(here.grad)
        return self._output

    def release(self) -> None:
        """Let go of what was captured, of the gradients and of the copies; there is no call after it."""
        self._replay = self._conclude = None
        self._gradients = self._loads = torch.empty(0)
        self._optimizer.release()
        for layer in self._experts():
            layer.narrow = None
        self.network.zero_grad()

    def _experts(self) -> list[Experts]:
        return [block.ffn for block in self.network.blocks if isinstance(block.ffn, Experts)]

    def _keep_copies(self) -> None:
        """Give routed experts room for the copies, where they multiply in bfloat16."""
        copies = self._optimizer.copies
        device = next(self.network.parameters()).device.type
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16:
            for layer in self._experts():
                if layer.has_kernels(torch.bfloat16):
                    for parameter in (layer.gate_up, layer.out):
                        copy = torch.empty_like(parameter, dtype=torch.bfloat16, requires_grad=False)
                        torch._dynamo.maybe_mark_dynamic(copy, 0)  # as the parameter is (execution.prepare)
                        copies[parameter] = copy
                    layer.narrow = copies[layer.gate_up], copies[layer.out]

    def _renew_copies(self) -> None:
        """Copy again what others than the captured update have changed, say a loaded state."""
        copies = self._optimizer.copies
        versions = [parameter._version for parameter in copies]
        if versions != self._versions:
            with torch.no_grad():
                for parameter, copy in copies.items():
                    copy.copy_(parameter)
            self._versions = versions

    def _capture(self, inputs: dict[str, Tensor]) -> Callable[[], None]:
        self._inputs = {
            name: given.detach().clone().requires_grad_(given.requires_grad) for name, given in inputs.items()
        }
        routers = self.network.routers()
        state = [router.counts for router in routers] + [router.bias for router in routers]
        before = [tensor.clone() for tensor in state]
        device, alone = inputs["ids"].device, self.processes == 1
        then = self._finish if alone else self._join

        def compute() -> None:
            self._differentiate()
            then()

        replay = captured(compute, device)
        if not alone:
            self._conclude = captured(self._finish, device)
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)
        return replay

    def _differentiate(self) -> None:
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

    def _join(self) -> None:
        """Put the gradients into one tensor, and the experts' loads into another."""
        if counts := self.network.router_counts():
            self._loads = torch.stack(counts)
        trained = [p for p in self.network.parameters() if p.grad is not None]
        self._gradients = torch.cat([p.grad.flatten() for p in trained])  # type: ignore[union-attr]
        parts = self._gradients.split([p.numel() for p in trained])
        for parameter, part in zip(trained, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def _exchange(self) -> None:
        if dist.get_backend() == "nccl":
            dist.all_reduce(self._gradients, op=dist.ReduceOp.AVG)
        else:
            dist.all_reduce(self._gradients)
            self._gradients /= self.processes
        if len(self._loads):
            dist.all_reduce(self._loads)

    def _finish(self) -> None:
        for counts, loads in zip(self.network.router_counts(), self._loads, strict=False):
            counts.copy_(loads)
        self.norm = get_total_norm([p.grad for p in self.network.parameters() if p.grad is not None])
        self.network.update_router_bias()

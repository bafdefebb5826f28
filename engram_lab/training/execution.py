"""How a step is carried out and over which devices: its speed and memory change, not what it computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from engram_lab.errors import UserError
from engram_lab.model.experts import Experts
from engram_lab.model.transformer import Block, Transformer


@dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """Choices of execution; no part of a run's identity, since they change a loss by rounding only.

    Args:
        compile: compile the blocks, and replay forward and backward pass as a CUDA graph where GPUs, each
            with all parameters, train without accumulating and no layer waits for them
            (training/captured.py); null does so on a GPU. A CPU gains nothing.
        activation_checkpointing: keep only what enters a block and compute the rest again in the backward
            pass: a third more work for a fraction of the activations' memory.
    """

    compile: bool | None = None
    activation_checkpointing: bool = False

    def compiles(self, device: torch.device) -> bool:
        """Whether blocks are compiled for `device`."""
        return device.type == "cuda" if self.compile is None else self.compile


def prepare(network: Transformer, config: ExecutionConfig, device: torch.device) -> None:
    """Make `network` run on `device` as `config` says.

    Blocks are compiled one by one: they share their code, so that two compilations serve a network of any
    depth, and tables, whose size differs from cell to cell, stay outside. Nor is the number of experts fixed
    in what is compiled, which then serves all cells of a study from the compiler's cache.
    """
    network.recomputes = config.activation_checkpointing
    if not config.compiles(device):
        return
    # Variants of a block: by kind, for training and for evaluation, for each network that the process trains.
    torch._dynamo.config.recompile_limit = max(128, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.force_parameter_static_shapes = False
    torch._dynamo.config.optimize_ddp = False  # blocks are smaller than what it would cut
    network.finish = torch.compile(network.finish, dynamic=False)  # type: ignore[method-assign]
    for block in network.blocks:
        assert isinstance(block, Block)
        if device.type == "cuda" and isinstance(block.ffn, Experts):
            for tensor in block.ffn.by_expert():
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        block.compute = torch.compile(block.compute, dynamic=False)  # type: ignore[method-assign]
        if block.engram is not None:
            block.recall = torch.compile(block.recall, dynamic=False)  # type: ignore[method-assign]


def shard(network: Transformer, mesh: DeviceMesh) -> None:
    """Spread parameters, gradients and optimizer state over the processes of `mesh` (FSDP2), once.

    Each block gathers its own parameters while it computes; embedding, head and tables gather together.

    Raises:
        UserError: `mesh`, with the dimensions that Lightning's ModelParallelStrategy names, splits tensors.
    """
    if mesh["tensor_parallel"].size() > 1:
        raise UserError(
            f"trainer.strategy splits tensors over {mesh['tensor_parallel'].size()} devices, Lightning's "
            f"default; set its init_args to data_parallel_size {mesh.size()} and tensor_parallel_size 1."
        )
    if any(isinstance(p, DTensor) for p in network.parameters()):
        return
    for block in network.blocks:
        fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(network, mesh=mesh["data_parallel"])
    register_fsdp_forward_method(network, "loss")


@torch.no_grad()
def gather(network: Transformer) -> None:
    """Give every process the whole of all parameters again, after training; all must call it."""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, DTensor):
                whole = nn.Parameter(parameter.full_tensor(), requires_grad=parameter.requires_grad)
                module.register_parameter(name, whole)

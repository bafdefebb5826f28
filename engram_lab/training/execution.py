"""How a step is carried out, which changes its speed and its memory but not what it computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from engram_lab.model.transformer import Block, Transformer


@dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """Choices of execution; no part of a run's identity, since they change a loss by rounding only.

    Args:
        compile: compile the blocks; null does so on a GPU. A CPU gains nothing.
        activation_checkpointing: keep only what enters a block and compute the rest again in the backward
            pass: a third more work for a fraction of the activations' memory.
    """

    compile: bool | None = None
    activation_checkpointing: bool = False


def prepare(network: Transformer, config: ExecutionConfig, device: torch.device, *, graphs: bool) -> None:
    """Make `network` run on `device` as `config` says.

    Blocks are compiled one by one: they share their code, so that two compilations serve a network of any
    depth, and tables, whose size differs from cell to cell, stay outside. `graphs` replays the kernels of
    attention and feed-forward as CUDA graphs, which spares the host their launches; gradients then live in
    memory that the next step writes again, so that they cannot be accumulated over micro-batches.
    """
    network.recomputes = config.activation_checkpointing
    wanted = device.type == "cuda" if config.compile is None else config.compile
    if not wanted:
        return
    # One variant a block kind, for training and for evaluation each.
    torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
    options: dict[str, str | int | bool | Callable[..., Any]] = {"triton.cudagraphs": graphs}
    for block in network.blocks:
        assert isinstance(block, Block)
        block.compute = torch.compile(block.compute, dynamic=False, options=options)  # type: ignore[method-assign]
        if block.engram is not None:
            block.recall = torch.compile(block.recall, dynamic=False)  # type: ignore[method-assign]

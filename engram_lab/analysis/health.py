"""Is a memory alive: how far its gates open, how much it adds, how large its rows are.

Published null results share signs of illness: gates stuck near 1, contributions below a hundredth of the
residual stream. These numbers show them while a run is still going.

Shapes: B batch, T length, S streams, M memories, H hash heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from engram_lab.memory.resident import Table
from engram_lab.model.transformer import Block, Transformer

QUANTILES = (0.1, 0.5, 0.9)


@contextmanager
def recorded(module: nn.Module, store: list[tuple[Any, Any]]) -> Iterator[None]:
    """Append (inputs, output) of every call of `module` to `store` while the context is open."""
    handle = module.register_forward_hook(lambda _, inputs, output: store.append((inputs, output)))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def memory_health(network: Transformer, ids: Tensor, addresses: Tensor) -> dict[str, float]:
    """Health numbers of every memory over one batch.

    Args:
        network: put into evaluation mode by the caller, so that no router counts change.
        ids: tokens [B, T].
        addresses: row numbers [M, B, T, H].

    Returns:
        For each block with a memory, under `memory/layer<block>/`: mean and quantiles of the gate (absent
        where the gate is switched off), `contribution_ratio` (RMS of what the memory adds over RMS of the
        residual stream it is added to) and `row_norm` (mean L2 norm of the rows that were read).
        Nothing where parameters are sharded over processes, which are whole only inside a step.
    """
    if any(isinstance(p, DTensor) for p in network.parameters()):
        return {}
    assert network.config.engram is not None
    layers = network.config.engram.layers
    added: dict[int, list[tuple[Any, Any]]] = {layer: [] for layer in layers}
    gates: dict[int, list[tuple[Any, Any]]] = {layer: [] for layer in layers}
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code calls no hooks
        for layer in layers:
            engram = cast(Block, network.blocks[layer]).engram
            assert engram is not None
            stack.enter_context(recorded(engram, added[layer]))
            if engram.gate is not None:
                stack.enter_context(recorded(engram.gate, gates[layer]))
        network.hidden(ids, addresses)
    numbers: dict[str, float] = {}
    for index, layer in enumerate(layers):
        name = f"memory/layer{layer}"
        (inputs, output) = added[layer][0]
        numbers[f"{name}/contribution_ratio"] = (_rms(output) / _rms(inputs[0])).item()
        if network.config.engram.n_heads:  # rivals that hash nothing read no rows
            table = cast(Table, network.tables[index])
            rows = table.begin(addresses[index])().unflatten(-1, (network.config.engram.n_heads, -1))
            numbers[f"{name}/row_norm"] = rows.float().norm(dim=-1).mean().item()
        for _, alpha in gates[layer]:
            values = alpha.float().flatten()
            numbers[f"{name}/gate_mean"] = values.mean().item()
            ordered = values.sort().values
            for q in QUANTILES:
                numbers[f"{name}/gate_p{round(100 * q)}"] = ordered[int(q * (len(ordered) - 1))].item()
    return numbers


def _rms(x: Tensor) -> Tensor:
    return x.float().square().mean().sqrt()

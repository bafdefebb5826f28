"""From a base network and a budget to the cell of a study: how many experts, how many rows.

`E(rho) = k + rho (E_1 - k)` experts, rounded, with k those a token is sent to and E_1 those at rho = 1; rows
take exactly the parameters that the missing experts leave. Source: arXiv 2601.07372, section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from engram_lab.budget.config import BudgetConfig
from engram_lab.budget.count import count
from engram_lab.budget.flops import flops_per_token
from engram_lab.budget.rows import Tolerance, fit_memory
from engram_lab.errors import UserError
from engram_lab.model.config import ModelConfig
from engram_lab.model.engram import EngramConfig, MemorySize
from engram_lab.model.memories import memory_rows, memory_size

TOLERANCE = {"published": Tolerance(2.5e-4, 1e-3), "strict": Tolerance(1e-4, 1e-4)}
FLOPS_TOLERANCE = 5e-3
"""Relative difference of FLOPs per token, the router's left out, that `strict` mode holds."""
WIDTH_STEP = 8
"""Step of the widths that pay: 16 bytes of bfloat16, which fast matrix products want rows aligned to."""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """A solved cell; parameters leave out the token embedding and the head."""

    network: ModelConfig
    mode: str
    rho_nominal: float | None
    rho: float | None
    """Realised: (E - k) / (E_1 - k), to be used in every fit; None for a network taken as written."""
    experts: int
    top_k: int
    slots: int
    """Memory rows over all tables."""
    memory_parameters: int
    """Memory rows, in parameters."""
    memory_projections: int
    """The memory's other parameters; in `published` mode they come on top of the budget."""
    total_parameters: int
    active_parameters: int
    sparse_parameters: int
    flops_per_token: int
    """Training operations per token, forward and backward, the head included."""
    router_flops_per_token: int
    """The router's share of them: the only one that varies with rho among cells with memory."""
    total_mismatch: float
    """Relative difference of the total from the cell at rho = 1; in `published` mode projections left out."""
    flops_mismatch: float
    """Relative difference of FLOPs per token from the cell at rho = 1; in `strict` mode the router left
    out."""


def solve(network: ModelConfig, budget: BudgetConfig, *, sequence_length: int = 1024) -> Allocation:
    """Return the cell of `network` at the budget's rho.

    `network.ffn.experts` is E_1 and `network.engram` says what the memory looks like but for its size; both
    give way to the solution. `sequence_length`, in tokens, enters FLOPs only. A rho that rounds to all E_1
    experts gives the network without memory. Raises UserError where the budget cannot be met.
    """
    if budget.rho is None:
        return _allocation(network, network, budget, None, sequence_length)
    base = _at_rho_one(network, budget)
    k, most = base.ffn.top_k, base.ffn.experts
    experts = k + math.floor(budget.rho * (most - k) + 0.5)
    realised = (experts - k) / (most - k)
    if experts == most:
        return _allocation(base, base, budget, realised, sequence_length)
    assert network.engram is not None
    pay, tolerance = budget.mode == "strict", TOLERANCE[budget.mode]
    total = count(base).total
    cell = replace(network, ffn=replace(network.ffn, experts=experts))
    if pay:
        cell = _paying(cell, network.engram, _reference(network).products - _products(network), total)
    spare = total - count(replace(cell, engram=None)).total
    memory = fit_memory(network, spare, total, tolerance, pay=pay, step=budget.rows_step)
    cell = replace(cell, engram=memory)
    if pay and memory.module == "product_key":  # whose rows come in squares: the shared experts take the rest
        cell = _paying(cell, memory, (total - count(cell).total) / len(memory.layers))
    return _allocation(cell, base, budget, realised, sequence_length)


def _at_rho_one(network: ModelConfig, budget: BudgetConfig) -> ModelConfig:
    """Return the network without memory that every other cell must equal."""
    ffn, memory = network.ffn, network.engram
    if not ffn.experts:
        raise UserError(
            f"budget.rho is {budget.rho}, but the network has no routed experts: set ffn.experts."
        )
    if memory is None and (budget.rho != 1 or budget.mode == "strict"):
        raise UserError(
            f"budget.rho is {budget.rho} in {budget.mode} mode, but the network has no engram section to say "
            "what its memory looks like."
        )
    base = replace(network, engram=None)
    if budget.mode == "strict" and memory is not None:
        total = budget.total_parameters or count(base).total
        base = _paying(base, memory, _reference(network).parameters, total)
    if budget.total_parameters is not None:
        one = count(replace(base, ffn=replace(base.ffn, experts=ffn.top_k + 1))).total
        least = count(replace(base, ffn=replace(base.ffn, experts=ffn.top_k))).total
        most = ffn.top_k + round((budget.total_parameters - least) / (one - least))
        if most < ffn.top_k:
            raise UserError(
                f"budget.total_parameters is {budget.total_parameters:,}, but the network with the "
                f"ffn.top_k = {ffn.top_k} experts that a token is sent to already has {least:,}."
            )
        base = replace(base, ffn=replace(base.ffn, experts=most))
    if base.ffn.experts == ffn.top_k:
        raise UserError(
            f"the budget holds {base.ffn.experts} experts and a token is sent to ffn.top_k = {ffn.top_k}: "
            f"there is nothing to allocate; at least {ffn.top_k + 1} experts are needed at rho = 1."
        )
    return base


def _reference(network: ModelConfig) -> MemorySize:
    """Return what strict cells have beside rows and routed experts: the Engram module of the memory's shape.

    Rivals and controls of that shape are measured by it too, so that they compare with each other.
    """
    assert network.engram is not None
    plain = EngramConfig()
    module = replace(network.engram, module="engram", gate=plain.gate, conv_kernel=plain.conv_kernel)
    return memory_size(module, network.d_model, network.streams)


def _products(network: ModelConfig) -> int:
    """Return the products of the network's own memory, or of the reference where its size is solved for."""
    assert network.engram is not None
    if network.engram.module in ("mlp", "product_key"):
        return _reference(network).products
    return memory_size(network.engram, network.d_model, network.streams).products


def _paying(
    network: ModelConfig, memory: EngramConfig, parameters: float, total: int | None = None
) -> ModelConfig:
    """Return `network` with shared experts wider by so many parameters where the `memory` is read.

    A dense block has no shared expert to widen: the next block with experts pays. With a `total`, the changed
    widths are rounded to multiples of `WIDTH_STEP` where that moves less than the tolerance's share of it, as
    in all but very small networks; rows, sized after it, make up for what it moves.
    """
    extra = round(parameters / (3 * network.d_model))
    if not extra:
        return network
    dense = network.ffn.leading_dense_layers
    if dense == network.n_layers:
        raise UserError(
            f"budget.mode is 'strict', but no block with experts is left to pay for the memory: lower "
            f"ffn.leading_dense_layers, {dense}, below n_layers."
        )
    payers = [max(layer, dense) for layer in memory.layers]
    widths = tuple(
        max(0, network.ffn.shared_width(layer) + extra * payers.count(layer))
        for layer in range(network.n_layers)
    )
    if total is not None:
        rounded = tuple(
            width if width == network.ffn.shared_width(layer) else WIDTH_STEP * round(width / WIDTH_STEP)
            for layer, width in enumerate(widths)
        )
        moved = 3 * network.d_model * abs(sum(rounded) - sum(widths))
        widths = rounded if moved <= TOLERANCE["strict"].near * total else widths
    return replace(network, ffn=replace(network.ffn, shared_hidden=widths))


def _allocation(
    cell: ModelConfig, base: ModelConfig, budget: BudgetConfig, rho: float | None, sequence_length: int
) -> Allocation:
    parameters, reference = count(cell), count(base)
    flops, base_flops = flops_per_token(cell, sequence_length), flops_per_token(base, sequence_length)
    strict = budget.mode == "strict"
    paid = strict or cell is base or (cell.engram is not None and cell.engram.module == "mlp")
    matched = parameters.total - (0 if paid else parameters.memory_projections)
    spent = flops.training - (3 * flops.router if strict else 0)
    base_spent = base_flops.training - (3 * base_flops.router if strict else 0)
    return Allocation(
        network=cell,
        mode=budget.mode,
        rho_nominal=budget.rho,
        rho=rho,
        experts=cell.ffn.experts,
        top_k=cell.ffn.top_k,
        slots=sum(memory_rows(cell.engram)) if cell.engram else 0,
        memory_parameters=parameters.rows,
        memory_projections=parameters.memory_projections,
        total_parameters=parameters.total,
        active_parameters=parameters.active,
        sparse_parameters=parameters.sparse,
        flops_per_token=flops.training,
        router_flops_per_token=3 * flops.router,
        total_mismatch=matched / reference.total - 1,
        flops_mismatch=spent / base_spent - 1,
    )

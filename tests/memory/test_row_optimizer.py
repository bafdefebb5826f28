from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engram_lab.errors import UserError
from engram_lab.memory.catch_up import adam_constants, nodes_for
from engram_lab.memory.layout import RecordLayout
from engram_lab.memory.row_optimizer import RowOptimizer
from engram_lab.training.schedule import wsd_multiplier

STEPS = 500


def rates(step: int) -> float:
    """Warm-up, stable, decay."""
    return 0.015 * wsd_multiplier(step - 1, STEPS, 40, 150, 0.1)


def make(rule: str = "adam", row_dim: int = 16, **given: Any) -> RowOptimizer:
    formats = {name: given.pop(name) for name in ("weights", "state") if name in given}
    layout = RecordLayout(row_dim=row_dim, rule=rule, **formats)
    settings = {"betas": (0.9, 0.95), "eps": 1e-8, "momentum": 0.95, "rates": rates, "seed": 7}
    return RowOptimizer(layout, **{**settings, **given})


def start(optimizer: RowOptimizer, weights: Tensor) -> Tensor:
    records = torch.empty(len(weights), optimizer.layout.record_bytes, dtype=torch.uint8)
    optimizer.fresh(weights, records)
    return records


def reads(rows: int, seed: int = 0) -> Callable[[int], Tensor]:
    """Rows read at a step: the first in every one, the last ones once in a run or never."""
    odds = torch.logspace(0, -3.3, rows, dtype=torch.float64)

    def at(step: int) -> Tensor:
        draw = torch.rand(rows, generator=torch.Generator().manual_seed(1000 * seed + step))
        return (draw < odds).nonzero()[:, 0]

    return at


def gradients_at(step: int, count: int, row_dim: int = 16, size: float = 1.0) -> Tensor:
    return size * torch.randn(count, row_dim, generator=torch.Generator().manual_seed(step))


def lazily(
    optimizer: RowOptimizer, records: Tensor, at: Callable[[int], Tensor], size: float, steps: int = STEPS
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Train `records` on the rows read; yield (step, rows read, their weights before)."""
    for step in range(1, steps + 1):
        ids = at(step)
        buffer = records[ids]
        opened = optimizer.open(buffer, step)
        gradients = gradients_at(step, len(ids), optimizer.layout.row_dim, size)
        optimizer.update(buffer, ids, gradients, step)
        records[ids] = buffer
        yield step, ids, opened


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.0, 0.95), (0.95, 0.95)])
@pytest.mark.parametrize(
    "size", [1.0, 1e-6, 1e-8]
)  # eps is 1e-8: nothing, a hundredth, all of the denominator
def test_lazy_adam_is_dense_adam(betas: tuple[float, float], size: float) -> None:
    rows = 120
    weights = 0.1 * torch.randn(rows, 16, generator=torch.Generator().manual_seed(0))
    optimizer, at = make(betas=betas), reads(rows)
    records = start(optimizer, weights)

    dense = torch.nn.Parameter(weights.double())  # the truth, without float32's own error
    adam = torch.optim.Adam([dense], lr=1.0, betas=betas, eps=1e-8)
    first, missed = torch.zeros(rows, dtype=torch.long), torch.zeros(rows, dtype=torch.long)
    longest = 0
    for step, ids, opened in lazily(optimizer, records, at, size):
        assert (opened - dense[ids]).abs().max() < 1e-6, step  # every reader on the way
        longest = max(longest, int(missed[ids].max()))
        missed += 1
        missed[ids] = 0
        first[ids[first[ids] == 0]] = step
        adam.param_groups[0]["lr"] = rates(step)
        dense.grad = torch.zeros_like(dense)
        dense.grad[ids] = gradients_at(step, len(ids), size=size).double()
        adam.step()
        if step in (3, 50, 351, STEPS):
            assert (optimizer.weights(records, step) - dense).abs().max() < 1e-6, step
    assert first.max() > 400  # rows first read late
    assert (first == 0).any()  # and never
    assert longest > 200

"""Unique rows of a step, against numpy's set operations."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram_lab.memory.plan import deduplicate
from engram_lab.memory.row_copy import Workers

PER_HEAD = 12
WORKERS = Workers(2)


def draw_addresses(seed: int, micro_batches: int, shape: tuple[int, int, int, int]) -> list[torch.Tensor]:
    """Addresses as the hash gives them: every head within rows of its own."""
    generator = torch.Generator().manual_seed(seed)
    heads = torch.arange(shape[-1]) * PER_HEAD
    return [(torch.randint(PER_HEAD, shape, generator=generator) + heads).int() for _ in range(micro_batches)]


shapes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 4))


@given(seed=st.integers(0, 2**31), micro_batches=st.integers(1, 3), shape=shapes)
def test_positions_lead_to_the_rows_and_no_row_comes_twice(
    seed: int, micro_batches: int, shape: tuple[int, int, int, int]
) -> None:
    addresses = draw_addresses(seed, micro_batches, shape)
    first_row = [1000 * m for m in range(shape[0])]
    plan = deduplicate(addresses, first_row, WORKERS)
    wanted = torch.stack(addresses).long() + torch.tensor(first_row).view(1, -1, 1, 1, 1)
    assert torch.equal(plan.ids[plan.positions.long()].permute(0, 1, 3, 4, 2), wanted)
    assert np.array_equal(np.unique(wanted), np.sort(plan.ids))
    assert plan.reads == wanted.numel()


def test_row_numbers_beyond_32_bits() -> None:
    addresses = torch.tensor([[[[2**40, 2**41 + 5], [2**40, 7 + 2**41]]]])
    plan = deduplicate([addresses], [2**42], WORKERS)
    assert plan.ids.tolist() == [2**42 + 2**40, 2**42 + 2**41 + 5, 2**42 + 2**41 + 7]

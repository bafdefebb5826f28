"""Random rounding to bfloat16: fair, uniform, repeatable, unrelated between rows, steps, columns, fields."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engram_lab.memory import row_kernels_cpu
from engram_lab.memory.layout import RecordLayout
from engram_lab.memory.row_optimizer import RowOptimizer, rounding_start

LAYOUT = RecordLayout(row_dim=64, weights="bfloat16", rule="adagrad")


def optimizer(layout: RecordLayout = LAYOUT, seed: int = 3, **given: Any) -> RowOptimizer:
    settings = {"betas": (0.9, 0.95), "eps": 1e-8, "momentum": 0.95, "rates": lambda step: 1e-3}
    return RowOptimizer(layout, seed=seed, **{**settings, **given})


def rounded(values: Tensor, ids: Tensor, start: int) -> Tensor:
    """Return what is stored of `values` [n, 64]."""
    records = torch.zeros(len(values), LAYOUT.record_bytes, dtype=torch.uint8)
    row_kernels_cpu.move(LAYOUT, records, ids, values, 1.0, start)
    return LAYOUT.fields(records)["weight"].float()


def ups(rows: int = 4000, start: int = 1, first: int = 0, share: float = 0.5) -> Tensor:
    """Which of equal numbers, `share` of the way from 1 to its neighbour in bfloat16, are rounded up."""
    values = torch.full((rows, 64), 1 + share * 2.0**-7)
    return (rounded(values, first + torch.arange(rows), start) > 1).float()


@pytest.mark.parametrize("share", [1 / 128, 0.1, 0.25, 0.5, 0.77, 127 / 128])
def test_the_odds_are_the_share_of_the_way(share: float) -> None:
    up = ups(share=share)
    sigma = (share * (1 - share) / up.numel()) ** 0.5
    assert abs(up.mean() - share) < 4 * sigma + 2.0**-16
    # and in every column, whatever the row
    assert ((up.mean(0) - share).abs() < 4.5 * sigma * 8 + 2.0**-16).all()


def test_numbers_that_bfloat16_holds_are_kept_and_signs_are_treated_alike() -> None:
    ids = torch.arange(100)
    exact = torch.randn(100, 64).bfloat16().float()
    exact[0, :4] = torch.tensor([float("inf"), -float("inf"), 0.0, 1e-40])
    exact[0, 3] = exact[0, 3].bfloat16().float()
    assert torch.equal(rounded(exact, ids, 5), exact)
    values = torch.randn(100, 64)
    assert torch.equal(rounded(-values, ids, 5), -rounded(values, ids, 5))
    below = values.view(torch.int32).bitwise_and(-65536).view(torch.float32)
    error = (rounded(values, ids, 5) - values).abs() / below.abs()
    assert error.max() < 2.0**-7
    values[3, 5] = float("nan")
    assert rounded(values, ids, 5)[3, 5].isnan()


def test_random_bits_are_uniform() -> None:
    """How far up a number must be to be rounded up is uniform, by the chi-square of 64 bins."""
    shares = (torch.arange(4096) + 0.5) / 4096
    values = 1 + shares[:, None] * 2.0**-7 * torch.ones(64)
    counts = torch.zeros(64)
    for start in range(16):
        up = (rounded(values, torch.arange(4096), start) > 1).double().mean(1)
        counts += up.view(64, 64).mean(1).float() / 16
    expected = (torch.arange(64) + 0.5) / 64
    sigma = (expected * (1 - expected) / (64 * 64 * 16)).sqrt()
    assert (((counts - expected) / sigma) ** 2).sum() < 64 + 5 * 128**0.5


def related(a: Tensor, b: Tensor) -> float:
    """Return the correlation in standard deviations of what independent bits would show."""
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).mean() / (a.std() * b.std()) * a.numel() ** 0.5)


def test_rows_columns_and_steps_are_unrelated() -> None:
    up = ups()
    pairs = [
        (up[1:], up[:-1]),
        (up[2:], up[:-2]),
        (up[64:], up[:-64]),
        (up[:, 1:], up[:, :-1]),
        (up[:, 4:], up[:, :-4]),
        (up[1:, 1:], up[:-1, :-1]),
    ]
    seen = ups(start=rounding_start(3, 1))
    for seed, step in ((3, 2), (3, 3), (3, 65), (3, 1025), (4, 1), (3 + 2**32, 1)):
        pairs.append((seen, ups(start=rounding_start(seed, step))))
    pairs += [(up, ups(first=1 << bit)) for bit in (13, 20, 31, 32, 33)]
    assert max(abs(related(a, b)) for a, b in pairs) < 4.5


def test_fields_of_a_record_are_unrelated() -> None:
    layout = RecordLayout(row_dim=64, weights="bfloat16", state="bfloat16")
    rows = optimizer(layout)
    records = torch.zeros(4000, layout.record_bytes, dtype=torch.uint8)
    gradients = torch.ones(4000, 64)  # every field gets one number everywhere
    rows.update(records, torch.arange(4000), gradients, 1)
    ups = [field.float() for name, field in layout.fields(records).items() if name != "last"]
    assert all(len(up.unique()) == 2 for up in ups)
    assert max(abs(related(ups[a], ups[b])) for a, b in ((0, 1), (0, 2), (1, 2))) < 4.5


def test_bfloat16_rows_do_not_stall() -> None:
    """1 plus a thousand steps of 1e-3 is 2, in the mean over rows and nearly in each; plainly it stays 1."""
    layout = RecordLayout(row_dim=64, weights="bfloat16")
    rows = optimizer(layout, betas=(0.0, 0.95), eps=1e-20)
    records, ids = torch.empty(50, layout.record_bytes, dtype=torch.uint8), torch.arange(50)
    rows.fresh(torch.ones(50, 64), records)
    plain = torch.ones((), dtype=torch.bfloat16)
    for step in range(1, 1001):
        rows.update(records, ids, -torch.ones(50, 64), step)
        plain += 1e-3
    weights = layout.fields(records)["weight"].float()
    assert plain == 1
    assert weights.mean() == pytest.approx(2.0, abs=0.01)
    assert (weights - 2).abs().max() < 0.5  # 1,000 roundings of 2^-7 wander by 0.08


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_averages_in_bfloat16_follow_those_in_float32(beta2: float) -> None:
    """Rounded to the nearest, an average with beta2 = .999 stops where a step is half a unit."""
    found = {}
    for state in ("float32", "bfloat16"):
        layout = RecordLayout(row_dim=64, state=state)
        rows = optimizer(layout, betas=(0.9, beta2))
        records, ids = torch.zeros(100, layout.record_bytes, dtype=torch.uint8), torch.arange(100)
        for step in range(1, 1201):
            rows.update(records, ids, torch.full((100, 64), 1.0 if step < 200 else 0.1), step)
        found[state] = layout.fields(records)["exp_avg_sq"].float().mean()
    assert found["bfloat16"] / found["float32"] == pytest.approx(1, abs=0.02)
    nearest, truth = torch.zeros((), dtype=torch.bfloat16), 0.0
    for step in range(1, 1201):
        square = 1.0 if step < 200 else 0.01
        nearest = (beta2 * nearest.float() + (1 - beta2) * square).bfloat16()
        truth = beta2 * truth + (1 - beta2) * square
    assert (abs(float(nearest) / truth - 1) > 0.1) == (beta2 == 0.999)


def test_rounding_repeats_and_hangs_on_seed_step_and_row_alone() -> None:
    values = torch.from_numpy(np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32))
    ids = torch.arange(50)
    once = rounded(values, ids, 9)
    order = torch.randperm(50)
    assert torch.equal(rounded(values[order], ids[order], 9), once[order])
    assert not torch.equal(rounded(values, ids, 10), once)
    assert not torch.equal(rounded(values, ids + 1, 9), once)

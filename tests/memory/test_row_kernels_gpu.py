"""The row optimizers on a GPU against those on the CPU: same numbers, same random bits, no waiting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engram_lab.memory import row_kernels_cpu
from engram_lab.memory.layout import RecordLayout
from engram_lab.memory.row_optimizer import RowOptimizer

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and triton"),
]
ROWS = 500
FAR = 1 << 33  # row numbers beyond 32 bits


def build(layout: RecordLayout, betas: tuple[float, float] = (0.9, 0.95)) -> RowOptimizer:
    return RowOptimizer(
        layout,
        betas=betas,
        eps=1e-8,
        momentum=0.95,
        rates=lambda step: 0.015 * min(step / 20, 1.0),
        seed=12345678901234,
        first_row=(0, FAR + 200),
    )


def train(optimizer: RowOptimizer, device: str) -> tuple[Tensor, list[Tensor]]:
    """Return the records, and the weights that the steps read, of a run with gaps of 0 to 1,000 steps."""
    layout, g = optimizer.layout, torch.Generator().manual_seed(0)
    records = torch.empty(ROWS, layout.record_bytes, dtype=torch.uint8)
    optimizer.fresh(torch.randn(ROWS, layout.row_dim, generator=g), records)
    records, opened = records.to(device), []
    for step in (*range(1, 30), 45, 46, 47, 300, 1300):
        ids = (torch.rand(ROWS, generator=g) < 0.4).nonzero()[:, 0]
        gradients = 1e-6 * torch.randn(len(ids), layout.row_dim, generator=g)
        ids, gradients = ids.to(device), gradients.to(device)
        buffer = records[ids]
        opened.append(optimizer.open(buffer, step))
        optimizer.update(buffer, ids + FAR, gradients, step, scale=torch.tensor(0.5, device=device))
        records[ids] = buffer
    opened.append(optimizer.weights(records, 1400))
    return records.cpu(), [each.cpu() for each in opened]


@pytest.mark.parametrize("rule", ["adam", "adagrad", "sinkhorn"])
@pytest.mark.parametrize(("row_dim", "betas"), [(5, (0.9, 0.95)), (64, (0.9, 0.999)), (160, (0.0, 0.95))])
def test_the_gpu_computes_what_the_cpu_does(rule: Any, row_dim: int, betas: tuple[float, float]) -> None:
    layout = RecordLayout(row_dim=row_dim, rule=rule)
    cpu, read = train(build(layout, betas), "cpu")
    gpu, read_there = train(build(layout, betas), "cuda")
    for name, field in layout.fields(cpu).items():
        there = layout.fields(gpu)[name]
        # float32 but for fused operations and the order of sums
        torch.testing.assert_close(there, field, rtol=1e-4, atol=1e-5 * float(field.abs().max()))
    for here, there in zip(read, read_there, strict=True):
        torch.testing.assert_close(there, here, rtol=0, atol=2e-5)


def test_random_bits_are_those_of_the_cpu() -> None:
    from engram_lab.memory import row_kernels_triton

    layout = RecordLayout(row_dim=48, weights="bfloat16", rule="adagrad")
    values = torch.randn(20_000, 48, generator=torch.Generator().manual_seed(0))
    values[0, :3] = torch.tensor([float("inf"), -float("inf"), float("nan")])
    ids = torch.arange(20_000) * 1_000_003
    for start in (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF):
        records = torch.zeros(len(values), layout.record_bytes, dtype=torch.uint8)
        there = records.cuda()
        row_kernels_cpu.move(layout, records, ids, values, 1.0, start)
        row_kernels_triton.move(layout, there, ids.cuda(), values.cuda(), 1.0, start)
        here, far = layout.fields(records)["weight"], layout.fields(there.cpu())["weight"]
        assert torch.equal(here.isnan(), far.isnan())  # a NaN has many spellings
        assert torch.equal(here.nan_to_num(), far.nan_to_num())


@pytest.mark.parametrize("rule", ["adam", "adagrad", "sinkhorn"])
def test_bfloat16_records_are_rounded_as_on_the_cpu(rule: Any) -> None:
    """A fused operation moves a number by 1e-7 and so its rounding in a few of 10,000 cases, never more."""
    layout = RecordLayout(row_dim=64, weights="bfloat16", rule=rule, state="bfloat16")
    g, ids = torch.Generator().manual_seed(0), torch.arange(20_000)
    here = torch.empty(20_000, layout.record_bytes, dtype=torch.uint8)
    build(layout).fresh(torch.randn(20_000, 64, generator=g), here)
    there, gradients = here.cuda(), torch.randn(20_000, 64, generator=g)
    build(layout).update(here, ids, gradients, 1)
    build(layout).update(there, ids.cuda(), gradients.cuda(), 1)
    for name, field in layout.fields(here).items():
        other = layout.fields(there.cpu())[name]
        torch.testing.assert_close(other.float(), field.float(), rtol=2.0**-7, atol=1e-6)
        if name != "sum_sq":
            assert (other != field).float().mean() < 2e-3, name


@pytest.mark.parametrize("rule", ["adam", "adagrad", "sinkhorn"])
def test_a_step_never_waits_for_the_device(rule: Any) -> None:
    layout = RecordLayout(row_dim=64, rule=rule)
    optimizer, ids = build(layout), torch.arange(1000, device="cuda")
    records = torch.zeros(1000, layout.record_bytes, dtype=torch.uint8, device="cuda")
    gradients, scale = torch.randn(1000, 64, device="cuda"), torch.tensor(0.5, device="cuda")
    for step in range(1, 4):  # compile
        optimizer.open(records, step)
        optimizer.update(records, ids, gradients, step, scale)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(4, 1300):  # the constants grow twice
            optimizer.open(records, step)
            optimizer.update(records, ids, gradients, step, scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_records_is_no_work() -> None:
    layout = RecordLayout(row_dim=8)
    records = torch.empty(0, layout.record_bytes, dtype=torch.uint8, device="cuda")
    none = torch.empty(0, 8, device="cuda")
    build(layout).update(records, torch.empty(0, dtype=torch.int64, device="cuda"), none, 1)
    assert build(layout).open(records, 2).shape == (0, 8)

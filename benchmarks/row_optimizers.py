"""A step of a table's optimizer by number of rows: lazy rules on records against torch's Adam and SparseAdam.

    python benchmarks/row_optimizers.py [--rows 1 4 16] [--touched 300000] [--row-dim 16] [--device cpu]

`--rows` counts millions. Every step touches as many rows at random; on records, the time covers gathering
them, bringing them up to date for the forward pass, the step and writing them back; elsewhere, filling the
gradient and the step. Rows were last touched 200 steps ago, the dearest case of the lazy rules. On a CPU the
figure is the processor time of one thread, on a GPU the time between two events; the fastest of `--repeats`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from engram_lab.memory.layout import RecordLayout
from engram_lab.memory.row_optimizer import RowOptimizer
from engram_lab.memory.sinkhorn import MOMENTUM

BETAS, EPS, RATE = (0.9, 0.95), 1e-8, 0.015
BEHIND = 200
Step = Callable[[Tensor, Tensor, int], None]


def dense(rows: int, row_dim: int, device: str) -> Step:
    """torch.optim.Adam over the whole table, in its fused kernel."""
    table = torch.nn.Parameter(torch.zeros(rows, row_dim, device=device))
    adam = torch.optim.Adam([table], lr=RATE, betas=BETAS, eps=EPS, fused=True)
    table.grad = torch.zeros_like(table)

    def step(ids: Tensor, gradients: Tensor, _: int) -> None:
        assert table.grad is not None
        table.grad.zero_()
        table.grad.index_copy_(0, ids, gradients)
        adam.step()

    return step


def sparse(rows: int, row_dim: int, device: str) -> Step:
    """torch.optim.SparseAdam, which computes something else than Adam."""
    table = torch.nn.Parameter(torch.zeros(rows, row_dim, device=device))
    adam = torch.optim.SparseAdam([table], lr=RATE, betas=BETAS, eps=EPS)

    def step(ids: Tensor, gradients: Tensor, _: int) -> None:
        table.grad = torch.sparse_coo_tensor(
            ids[None], gradients, table.shape, is_coalesced=True, check_invariants=False
        )
        adam.step()

    return step


def records(layout: RecordLayout) -> Callable[[int, int, str], Step]:
    """The row optimizer of `layout` over a table of records in memory."""

    def build(rows: int, row_dim: int, device: str) -> Step:
        rules = {"betas": BETAS, "eps": EPS, "momentum": MOMENTUM}
        optimizer = RowOptimizer(layout, **rules, rates=lambda _: RATE, seed=0)  # type: ignore[arg-type]
        table = torch.zeros(rows, layout.record_bytes, dtype=torch.uint8, device=device)
        for first in range(0, rows, 1 << 20):
            part = table[first : first + (1 << 20)]
            ids = torch.arange(first, first + len(part), device=device)
            optimizer.update(part, ids, torch.ones(len(part), row_dim, device=device), 1)

        wide, buffer = table.view(torch.int64), table[:0].view(torch.int64)  # torch copies bytes singly

        def step(ids: Tensor, gradients: Tensor, number: int) -> None:
            nonlocal buffer
            if len(buffer) != len(ids):
                buffer = wide.new_empty(len(ids), wide.shape[1])  # kept: fresh pages cost as much as the copy
            torch.index_select(wide, 0, ids, out=buffer)
            optimizer.open(buffer.view(torch.uint8), number)
            optimizer.update(buffer.view(torch.uint8), ids, gradients, number)
            wide.index_copy_(0, ids, buffer)

        return step

    return build


def milliseconds(step: Step, rows: int, touched: int, row_dim: int, device: str, repeats: int) -> float:
    """Time of the fastest of `repeats` steps after one that warms up."""
    g = torch.Generator().manual_seed(0)
    times = []
    for number in range(BEHIND, BEHIND + repeats + 1):
        # one row out of each of `touched` equal stretches: distinct, ascending, all over the table
        stretch = rows // touched
        ids = torch.arange(touched) * stretch + torch.randint(stretch, (touched,), generator=g)
        ids, gradients = ids.to(device), torch.randn(touched, row_dim, generator=g).to(device)
        if device == "cpu":
            start = time.process_time()
            step(ids, gradients, number)
            times.append(1e3 * (time.process_time() - start))
        else:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            step(ids, gradients, number)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
    return min(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16], help="in millions")
    parser.add_argument("--touched", type=int, default=300_000)
    parser.add_argument("--row-dim", type=int, default=16)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)

    U = given.row_dim
    ways: dict[str, Callable[[int, int, str], Step]] = {
        "dense Adam": dense,
        "SparseAdam": sparse,
        "lazy Adam": records(RecordLayout(row_dim=U)),
        "lazy Adam, bfloat16": records(RecordLayout(row_dim=U, weights="bfloat16", state="bfloat16")),
        "row-wise Adagrad": records(RecordLayout(row_dim=U, rule="adagrad")),
        "balanced momentum": records(RecordLayout(row_dim=U, rule="sinkhorn")),
    }
    print(f"{given.touched:,} rows of {U} touched; ms a step, and the multiple of lazy Adam's\n")
    print("| rows | " + " | ".join(ways) + " |\n|---|" + "---|" * len(ways))
    for millions in given.rows:
        rows, times = millions * 1_000_000, {}
        for name, build in ways.items():
            step = build(rows, U, given.device)
            times[name] = milliseconds(step, rows, given.touched, U, given.device, given.repeats)
            del step
        base = times["lazy Adam"]
        print(f"| {millions} M | " + " | ".join(f"{t:.1f} ({t / base:.2f}x)" for t in times.values()) + " |")


if __name__ == "__main__":
    main()

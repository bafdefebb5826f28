"""The balanced momentum over all rows (dense) and over the rows of a step (on records), on a small problem.

    python benchmarks/balanced_momentum.py

Rows are to become random targets; 200 reads a step fall on 2,000 rows by Zipf's odds, and what is read is
noisy. Prints the mean squared error of what a read finds at the end, by learning rate, and how many rows move
for each one read. Three seeds; 1,500 steps of warm-up, stable and decay.
"""

from __future__ import annotations

import torch

from engram_lab.memory.layout import RecordLayout, RowRule
from engram_lab.memory.row_optimizer import RowOptimizer
from engram_lab.memory.sinkhorn import MOMENTUM, sinkhorn_step
from engram_lab.training.schedule import wsd_multiplier

ROWS, ROW_DIM, READS, STEPS, SEEDS = 2_000, 16, 200, 1_500, 3


def train(rule: RowRule | None, peak: float, seed: int) -> tuple[float, float]:
    """Return the error and the rows moved for each one read; `rule` None is the dense balanced momentum."""
    g = torch.Generator().manual_seed(seed)
    targets = torch.randn(ROWS, ROW_DIM, generator=g)
    odds = 1 / torch.arange(1, ROWS + 1, dtype=torch.float64)
    odds /= odds.sum()

    def rates(step: int) -> float:
        return peak * wsd_multiplier(step - 1, STEPS, 30, 300, 0.1)

    layout = RecordLayout(row_dim=ROW_DIM, rule=rule or "sinkhorn")
    optimizer = RowOptimizer(layout, betas=(0.9, 0.95), eps=1e-8, momentum=MOMENTUM, rates=rates, seed=0)
    records = torch.zeros(ROWS, layout.record_bytes, dtype=torch.uint8)
    table, average = torch.zeros(ROWS, ROW_DIM), torch.zeros(ROWS, ROW_DIM)
    moved = read = 0
    for step in range(1, STEPS + 1):
        ids, counts = torch.multinomial(odds, READS, True, generator=g).unique(return_counts=True)
        noise = 0.5 * torch.randn(len(ids), ROW_DIM, generator=g)
        read += len(ids)
        buffer = records[ids]
        weights = optimizer.open(buffer, step) if rule else table[ids]
        gradients = (weights - targets[ids] + noise) * counts[:, None] / READS
        if rule:
            optimizer.update(buffer, ids, gradients, step)
            records[ids] = buffer
            moved += len(ids)
        else:
            before, whole = table.clone(), torch.zeros_like(table)
            whole[ids] = gradients
            sinkhorn_step([table], [whole], [average], lr=rates(step), momentum=MOMENTUM)
            moved += int((table != before).any(1).sum())
    final = optimizer.weights(records, STEPS) if rule else table
    return float((final - targets).square().mean(1).double() @ odds), moved / read


def main() -> None:
    torch.set_num_threads(1)
    peaks = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    print("| rule | rows moved per row read | " + " | ".join(map(str, peaks)) + " |\n" + "|---" * 8 + "|")
    rules: dict[str, RowRule | None] = {"dense": None, "rows of the step": "sinkhorn", "lazy Adam": "adam"}
    for name, rule in rules.items():
        found = [[train(rule, peak, seed) for seed in range(SEEDS)] for peak in peaks]
        errors = [f"{sum(error for error, _ in runs) / SEEDS:.4f}" for runs in found]
        moved = sum(each for runs in found for _, each in runs) / SEEDS / len(peaks)
        print(f"| {name} | {moved:.1f} | " + " | ".join(errors) + " |", flush=True)


if __name__ == "__main__":
    main()

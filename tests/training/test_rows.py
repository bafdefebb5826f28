"""What a run logs of its rows' travel is what was read, counted here one by one."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import Tensor

from engram_lab.memory.disk import DiskStore
from engram_lab.memory.host import HostStore
from engram_lab.memory.pipeline import RowPipeline
from engram_lab.memory.service import Economy
from engram_lab.recipe import Recipe
from engram_lab.training.run import train

STEPS, EVERY = 24, 8
RECORD_BYTES = 64
"""Four weights and two averages of four, float32, and the last step: 52 bytes, aligned to 16."""
STORES: dict[str, type[HostStore] | type[DiskStore]] = {"host": HostStore, "disk": DiskStore}


def trained(tiny: dict[str, Any], memory: dict[str, Any]) -> dict[str, dict[int, float]]:
    """Train, and return what the run logged of its rows, by name and step."""
    values = {**tiny, "memory": memory}
    values["trainer"] = {**tiny["trainer"], "log_every_n_steps": EVERY}
    recipe = Recipe.from_dict(values)
    train(recipe, progress_bar=False)
    client = MlflowClient(recipe.tracking.uri)
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return {
        name.removeprefix("rows/"): {
            m.step: m.value for m in client.get_metric_history(run.info.run_id, name)
        }
        for name in run.data.metrics
        if name.startswith("rows/")
    }


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_a_run_logs_what_the_travel_of_its_rows_cost(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tier: str
) -> None:
    """A step in two parts; the first rows come 50 ms after the step began to wait for them."""
    tiny["trainer"] = {**tiny["trainer"], "accumulate_grad_batches": 2}
    announced: dict[int, list[int]] = {}
    begun, late = threading.Event(), 0.05
    asked: list[int] = []  # rows, of each read of the store
    counts = [(0, 0)]  # hits of the store, and rows it was asked for, at every line
    announce, begin, read = RowPipeline.announce, RowPipeline.begin, STORES[tier].read
    take = RowPipeline.take_economy

    def watched(self: RowPipeline, step: int, addresses: Sequence[Tensor]) -> None:
        announced[step] = torch.cat([a.flatten() for a in addresses]).tolist()
        announce(self, step, addresses)

    def beginning(self: RowPipeline, step: int) -> None:
        begun.set()
        begin(self, step)

    def delayed(self: Any, ids: Tensor, out: Tensor) -> None:
        if not asked:
            assert begun.wait(60)
            time.sleep(late)
        asked.append(len(ids))
        read(self, ids, out)

    def settled(self: RowPipeline) -> Economy:
        self._gathering.submit(lambda: None).result()  # behind what is announced: no read is under way
        if isinstance(self.store, DiskStore):
            counts.append((self.store.hits, sum(asked)))
        return take(self)

    monkeypatch.setattr(RowPipeline, "announce", watched)
    monkeypatch.setattr(RowPipeline, "begin", beginning)
    monkeypatch.setattr(RowPipeline, "take_economy", settled)
    monkeypatch.setattr(STORES[tier], "read", delayed)
    started = time.perf_counter()
    logged = trained(tiny, {"tier": tier, "cache_rows": 100})
    whole = time.perf_counter() - started

    assert sorted(announced) == list(range(1, STEPS + 1))
    rows = {step: set(addresses) for step, addresses in announced.items()}
    repeated = {step: len(rows[step] & rows.get(step - 1, set())) for step in rows}
    lines = [0, 8, 16, 24]
    for last, line in pairwise(lines):
        steps = range(last + 1, line + 1)
        unique, reads = sum(len(rows[s]) for s in steps), sum(len(announced[s]) for s in steps)
        assert reads == EVERY * 4 * 32 * 4, "windows, tokens and hash heads of a step"
        again = sum(repeated[s] for s in steps)
        assert 0 < again < unique < reads
        assert logged["unique"][line] == unique / EVERY
        assert logged["unique_share"][line] == pytest.approx(unique / reads)
        assert logged["repeated_share"][line] == pytest.approx(again / unique)
        assert logged["bytes_moved"][line] == unique / EVERY * RECORD_BYTES * 2, "there and back"
        assert logged["wait_seconds"][line] > 0
    assert logged["wait_seconds"][8] >= late / EVERY
    assert EVERY * sum(logged["wait_seconds"].values()) < whole
    shares = {"unique", "unique_share", "repeated_share", "bytes_moved", "wait_seconds"}
    assert logged.keys() == shares | ({"cache_hit_share"} if tier == "disk" else set())
    for curve in logged.values():
        assert sorted(curve) == lines[1:]
    for line, (before, now) in zip(lines[1:], pairwise(counts), strict=tier == "disk"):
        hits, reads = now[0] - before[0], now[1] - before[1]
        assert 0 < hits < reads
        assert logged["cache_hit_share"][line] == pytest.approx(hits / reads), "since the line before"

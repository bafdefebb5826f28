"""What a run's rows take of the host's memory is known before any of it is taken."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

from engram_lab.budget import count
from engram_lab.errors import UserError
from engram_lab.memory import room
from engram_lab.memory.config import MemoryConfig
from engram_lab.memory.disk import DiskStore
from engram_lab.memory.host import HostStore
from engram_lab.memory.layout import RecordLayout
from engram_lab.memory.pipeline import RowPipeline
from engram_lab.memory.row_checkpoint import RowCheckpoints
from engram_lab.memory.shard import Shard
from engram_lab.memory.sharded import ShardedPipeline
from engram_lab.memory.stores import DeviceStore, RowStore
from engram_lab.recipe import Recipe, resolve
from engram_lab.text import prepare
from engram_lab.training.preflight import bytes_beside_records, preflight

CPU = torch.device("cpu")
LAYOUT = RecordLayout(row_dim=1, rule=None, alignment=4)


@pytest.mark.parametrize(
    ("memory", "bytes_a_row"),
    [
        ({"tier": "host"}, 64 + 9.25),
        ({"unique_rows": True}, 64 + 9.25),
        ({"tier": "disk", "cache_rows": 0}, 9.375),
        ({"tier": "disk", "cache_rows": 30_000}, 9.375 + 30_000 / 100_000 * (64 + 25)),
    ],
    ids=["host", "resident", "disk", "cached"],
)
def test_what_is_kept_beside_the_records_counts(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch, memory: dict[str, Any], bytes_a_row: float
) -> None:
    """A machine with room for the records only was filled with them, and failed as the run read rows."""
    recipe = Recipe.from_dict({**tiny, "memory": memory}).override(
        {"model.engram.rows_per_head": 25_000, "budget.rho": None}
    )
    corpus = prepare(recipe.text)
    run = resolve(recipe, corpus)
    slots = run.allocation.slots
    network = 4 * (count(run.network).everything - 4 * slots)
    needed = network + bytes_a_row * slots
    limits: list[int] = []
    monkeypatch.setattr(room, "_left_by_control_groups", lambda: limits)
    for slack, enough in ((1.01, True), (0.99, False)):
        limits[:] = [int(needed * slack)]
        if enough:
            preflight(run, corpus)
            continue
        says = r"rows of memory among them.* need 0\.0 GiB of memory, but 0\.0 GiB are available; lower"
        with pytest.raises(UserError, match=says):
            preflight(run, corpus)


@pytest.mark.parametrize("tier", ["resident", "host", "disk", "sharded"])
def test_as_much_is_counted_as_is_taken(tmp_path: Path, tier: Any) -> None:
    ranks = 2 if tier == "sharded" else 1

    def taken(rows: int) -> int:
        """Bytes that numpy, which holds all but the records, has taken when the last rows were saved."""
        gc.collect()
        tracemalloc.start()
        kept = []
        for rank in range(ranks):
            folder = tmp_path / f"{rows}.{rank}"
            store: RowStore
            if tier == "sharded":
                store = Shard(rows, LAYOUT.record_bytes, CPU, rank=rank, ranks=ranks)
                # Without the other ranks, who are only met as steps are announced.
                pipeline: Any = ShardedPipeline(store, None, LAYOUT, None, (0,), device=CPU)  # type: ignore[arg-type]
            else:
                if tier == "disk":
                    store = DiskStore(folder / "table", LAYOUT, rows, "test", cache_rows=0)
                elif tier == "host":
                    store = HostStore(rows, LAYOUT.record_bytes, registered=False)
                else:
                    store = DeviceStore(rows, LAYOUT.record_bytes)
                pipeline = RowPipeline(store, LAYOUT, None, (0,), device=CPU)
            checkpoints = RowCheckpoints(folder, LAYOUT, "test")
            checkpoints.save(1, store, torch.tensor([rows - ranks + rank]), rank)
            kept.append((pipeline, checkpoints))
        gc.collect()
        now = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        for pipeline, _ in kept:
            (pipeline.store if tier == "sharded" else pipeline).close()
        return now

    taken(1000)  # what is compiled and imported once
    rows = 4_000_000
    counted = bytes_beside_records(MemoryConfig(tier=tier), rows, ranks, ranks)
    assert taken(rows) == pytest.approx(counted, rel=0.005)

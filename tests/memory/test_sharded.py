"""Rows split over ranks train as rows in one place do; a rank that fails ends all of them."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from engram_lab.memory.layout import RecordLayout, RowRule
from engram_lab.memory.peers import Peers, total
from engram_lab.memory.pipeline import RowPipeline
from engram_lab.memory.row_optimizer import RowOptimizer
from engram_lab.memory.service import RowService
from engram_lab.memory.shard import Shard
from engram_lab.memory.sharded import ShardedPipeline
from engram_lab.memory.stores import DeviceStore, RowStore

CPU = torch.device("cpu")
ROWS, U, H, RANKS, STEPS, MICRO_BATCHES = 63, 4, 3, 3, 12, 2
RULES: tuple[RowRule, ...] = ("adam", "adagrad", "sinkhorn")
TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}
"""Gradients are sums in another order, of float32 that Adam and the balancing divide by its own size."""


def batches() -> list[list[Tensor]]:
    """Addresses [1, B = 6, T = 5, H] of every micro-batch.

    In some steps a rank reads rows of one owner only, and an owner is asked for nothing.
    """
    generator = torch.Generator().manual_seed(2)
    heads = torch.arange(H) * (ROWS // H)
    found = []
    for step in range(STEPS):
        drawn = torch.randint(ROWS // H, (MICRO_BATCHES, 1, 2 * RANKS, 5, H), generator=generator) + heads
        if step % 4 == 1:
            drawn[:, :, :2] = drawn[:, :, :2] // RANKS * RANKS  # what the first rank reads is its own
        if step % 4 == 2:
            drawn = drawn - drawn % RANKS  # all of it is the first rank's
        if step % 4 == 3:
            drawn[:, :, 2:] = heads + 7  # a row a head, for two ranks
        found.append(list(drawn.int()))
    return found


def optimizer(layout: RecordLayout, **options: Any) -> RowOptimizer:
    rates = {"betas": (0.9, 0.95), "eps": 1e-8, "momentum": 0.9, "rates": lambda step: 0.05 / step**0.5}
    return RowOptimizer(layout, seed=3, first_row=(0, 21, 42), **rates, **options)


def fresh(store: RowStore, layout: RecordLayout) -> None:
    records = torch.empty(ROWS, layout.record_bytes, dtype=torch.uint8)
    layout.encode(torch.randn(ROWS, U, generator=torch.Generator().manual_seed(1)), records)
    store.write(torch.arange(ROWS), records)


def train(service: RowService, rank: int, ranks: int, *, ahead: int = 2) -> dict[str, Any]:
    """Train on this rank's windows of every batch, on a loss that all rows and their positions enter."""
    per_rank = 2 * RANKS // ranks
    share = slice(rank * per_rank, (rank + 1) * per_rank)
    steps, announced = batches(), 0
    losses, norms, read = [], [], []
    for number in range(1, STEPS + 1):
        while announced < min(STEPS, number + ahead):
            announced += 1
            service.announce(announced, [a[:, share].contiguous() for a in steps[announced - 1]])
        service.begin(number)
        for place in range(MICRO_BATCHES):
            loss = (service.reading(place) * torch.arange(1.0, H * U + 1)).sum(-1).sin().mean()
            losses.append(loss.item())
            (loss / MICRO_BATCHES).backward()
        norms.append(service.gradient_norm().item())
        service.commit(0.5)
        if number % 5 == 0:  # windows enough for some of the ranks only
            windows = steps[number - 1][0][0, :1] if rank == 0 else steps[0][0][0, :0]
            read.append(service.read(0, windows))
    return {"losses": losses, "norms": norms, "read": torch.stack(read)}


def resident(layout: RecordLayout) -> dict[str, Any]:
    store = DeviceStore(ROWS, layout.record_bytes)
    fresh(store, layout)
    pipeline = RowPipeline(store, layout, optimizer(layout), (0,), device=CPU)
    result = train(pipeline, 0, 1)
    weights = pipeline.weights(store.records)
    touched, economy = pipeline.touched.take_recent(), pipeline.take_economy()
    pipeline.close()
    return {**result, "weights": weights, "touched": touched, "economy": economy}


def started(rank: int, ranks: int, folder: Path, layout: RecordLayout) -> ShardedPipeline:
    peers = Peers(CPU)
    store = Shard(ROWS, layout.record_bytes, CPU, rank=rank, ranks=ranks)
    fresh(store, layout)
    rules = optimizer(layout, total=total)
    return ShardedPipeline(store, peers, layout, rules, (0,), device=CPU, threads=1)


def join(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)


def share_of_a_rank(rank: int, ranks: int, folder: Path) -> None:
    join(rank, ranks, folder)
    results = {}
    for rule in RULES:
        layout = RecordLayout(row_dim=U, rule=rule)
        pipeline = started(rank, ranks, folder, layout)
        result = train(pipeline, rank, ranks)
        with pipeline.whole() as store:
            assert (store is None) == (rank > 0)
            if store is not None:
                ids = torch.randperm(ROWS, generator=torch.Generator().manual_seed(5))
                records = torch.empty(ROWS + 2, layout.record_bytes, dtype=torch.uint8)
                store.read(ids, records)
                result["weights"] = pipeline.weights(records[: len(ids)])[ids.argsort()]
        result["touched"] = pipeline.touched.take_recent()
        result["ranks"] = pipeline.of_all_ranks({"rank": rank})
        result["economy"] = pipeline.take_economy()
        pipeline.close()
        results[rule] = result
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def failing(rank: int, ranks: int, folder: Path) -> None:
    join(rank, ranks, folder)
    pipeline = started(rank, ranks, folder, RecordLayout(row_dim=U))
    try:
        if rank == 0:
            train(pipeline, rank, ranks, ahead=0)
        else:
            for number in range(1, 6):  # the last of these wait for a rank that has not come so far
                pipeline.announce(number, [a[:, :2].contiguous() for a in batches()[number - 1]])
            pipeline.begin(1)
            time.sleep(0.2)
            raise ValueError("a failure of one rank")
    except Exception as error:
        (folder / f"rank{rank}.txt").write_text(f"{type(error).__name__}: {error}")
        raise
    finally:
        pipeline.close()


def run(target: Any, ranks: int, folder: Path) -> list[int | None]:
    """Run `target` as so many processes and return how they ended; None: not within two minutes."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=target, args=(rank, ranks, folder)) for rank in range(ranks)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 120
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    assert run(share_of_a_rank, RANKS, folder) == [0] * RANKS
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.mark.parametrize("rule", RULES)
def test_three_ranks_train_what_one_does(ranks: list[dict[str, Any]], rule: RowRule) -> None:
    alone, parts = resident(RecordLayout(row_dim=U, rule=rule)), [result[rule] for result in ranks]
    losses = torch.tensor([part["losses"] for part in parts]).mean(0)
    torch.testing.assert_close(losses, torch.tensor(alone["losses"]), **TOLERANCE)
    for part in parts:
        assert part["norms"] == parts[0]["norms"], "all ranks clip alike"
    torch.testing.assert_close(torch.tensor(parts[0]["norms"]), torch.tensor(alone["norms"]), **TOLERANCE)
    torch.testing.assert_close(parts[0]["read"], alone["read"], **TOLERANCE)
    assert parts[1]["read"].shape == (2, 0, 5, H * U)
    torch.testing.assert_close(parts[0]["weights"], alone["weights"], **TOLERANCE)


def test_ranks_know_their_own_rows_and_what_moved(ranks: list[dict[str, Any]]) -> None:
    alone = resident(RecordLayout(row_dim=U))
    for rank, result in enumerate(ranks):
        mine = result["adam"]
        assert torch.equal(mine["touched"], alone["touched"][alone["touched"] % RANKS == rank])
        assert mine["ranks"] == [{"rank": number} for number in range(RANKS)]
        economy = mine["economy"]
        assert (economy.steps, economy.reads) == (STEPS, STEPS * MICRO_BATCHES * 2 * 5 * H)
    for name in ("unique", "reads", "repeated"):
        together = sum(getattr(result["adam"]["economy"], name) for result in ranks)
        assert together == getattr(alone["economy"], name) > 0
    sent = sum(result["adam"]["economy"].bytes_moved for result in ranks)
    crossing = 0
    for step in batches():
        read = [torch.cat([a[:, 2 * r : 2 * r + 2].flatten() for a in step]).unique() for r in range(RANKS)]
        crossing += sum(int((ids % RANKS != rank).sum()) for rank, ids in enumerate(read))
    assert sent == crossing * U * 4 * 2 * 2, "a row and its gradient, each sent once and received once"


def test_a_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    codes = run(failing, 2, tmp_path)
    assert codes == [1, 1], "None is a process that hung"
    assert (tmp_path / "rank1.txt").read_text() == "ValueError: a failure of one rank"
    assert (tmp_path / "rank0.txt").exists()

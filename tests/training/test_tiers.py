"""A run trains the same wherever its table rows live, through evaluations, accumulation, stops and kills."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.tracking import MlflowClient

from engram_lab.errors import UserError
from engram_lab.model.checkpoint import load
from engram_lab.recipe import Recipe, resolve
from engram_lab.text import prepare
from engram_lab.training.callbacks import Progress, StopRequest
from engram_lab.training.run import train

RESIDENT: dict[str, Any] = {"unique_rows": True}
HOST: dict[str, Any] = {"tier": "host"}
DISK: dict[str, Any] = {"tier": "disk", "cache_rows": 100}


def recipe(tiny: dict[str, Any], folder: Path, memory: dict[str, Any], **overrides: Any) -> Recipe:
    tracking = {"uri": f"sqlite:///{folder}/mlflow.db", "directory": str(folder)}
    values = {**tiny, "memory": memory, "tracking": tracking}
    return Recipe.from_dict(values).override(overrides)


def losses(recipe: Recipe, stop: StopRequest | None = None, stop_at: int | None = None) -> list[float]:
    """The training loss of every step."""
    seen: list[float] = []

    def observe(progress: Progress) -> None:
        if progress.loss == progress.loss:
            seen.append(progress.loss)
        if stop is not None and progress.step == stop_at:
            stop.reason = "the test"

    result = train(recipe, observer=observe, stop=stop, progress_bar=False)
    return [*seen, result.loss]


def logged(recipe: Recipe, metric: str) -> dict[int, float]:
    """What the recipe's only run recorded, by step."""
    client = MlflowClient(recipe.tracking.uri)
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return {m.step: m.value for m in client.get_metric_history(run.info.run_id, metric)}


@pytest.mark.parametrize(("rule", "steps"), [("adam", 300), ("adagrad", 24), ("sinkhorn", 24)])
def test_tiers_are_equal_bit_for_bit(tiny: dict[str, Any], tmp_path: Path, rule: str, steps: int) -> None:
    """Also over some hundred steps: a row that is stale once in a while makes all later losses differ."""
    options = {
        "optimizer.table_optimizer": rule,
        "trainer.accumulate_grad_batches": 2,
        "data.tokens": 32 * 4 * steps,
        "data.repeat": True,
        "data.evaluations": 3,
        "checkpoint_every_n_steps": steps // 8,
    }
    dense = recipe(tiny, tmp_path / "resident", RESIDENT, **options)
    resident = losses(dense)
    assert len(resident) == steps + 1
    evaluations = logged(dense, "val/loss")
    assert sorted(evaluations) == [steps // 4, steps // 2, 3 * steps // 4, steps]
    for tier in (HOST, DISK):
        far = recipe(tiny, tmp_path / tier["tier"], {**tier, "depth": 3}, **options)
        assert losses(far) == resident
        assert logged(far, "val/loss") == evaluations
        (folder,) = (tmp_path / tier["tier"] / "runs").iterdir()
        left = [
            file for file in folder.rglob("*") if file.suffix in (".ckpt", ".rows") or ".table" in file.name
        ]
        assert not left
        saved = load(folder / "model")
        corpus = prepare(far.text)
        ids = torch.tensor(corpus.validation[:64].astype("int64"))[None]
        expected = load(next((tmp_path / "resident" / "runs").iterdir()) / "model")
        assert torch.equal(saved(ids), expected(ids))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("rule", "matrices"), [("adam", "adamw"), ("adagrad", "adamw"), ("sinkhorn", "muon")]
)
def test_tiers_differ_on_a_gpu_no_more_than_two_runs_do(
    tiny: dict[str, Any], tmp_path: Path, rule: str, matrices: str
) -> None:
    options = {
        "trainer.accelerator": "gpu",
        "optimizer.table_optimizer": rule,
        "optimizer.matrix_optimizer": matrices,
    }
    tiers = {"resident": RESIDENT, "again": RESIDENT, "host": HOST, "disk": DISK}
    found = {
        name: torch.tensor(losses(recipe(tiny, tmp_path / name, memory, **options)))
        for name, memory in tiers.items()
    }
    assert found["resident"][-1] < found["resident"][0]
    off = {name: (losses - found["resident"]).abs().max().item() for name, losses in found.items()}
    assert max(off["host"], off["disk"]) <= max(3 * off["again"], 2e-3), off


def test_unique_rows_train_as_the_dense_table_does(tiny: dict[str, Any], tmp_path: Path) -> None:
    # Without experts: gradients are added up in another order, and one token's other choice is no rounding.
    values = {**tiny, "budget": {}, "model": {**tiny["model"], "ffn": {"experts": 0}}}
    dense = losses(recipe(values, tmp_path / "dense", {}))
    rows = losses(recipe(values, tmp_path / "rows", RESIDENT))
    assert rows == pytest.approx(dense, abs=1e-4)


@pytest.mark.parametrize("memory", [RESIDENT, HOST, DISK], ids=["resident", "host", "disk"])
def test_a_stopped_run_goes_on_exactly(tiny: dict[str, Any], tmp_path: Path, memory: dict[str, Any]) -> None:
    whole = losses(recipe(tiny, tmp_path / "whole", RESIDENT))
    again = recipe(tiny, tmp_path / "again", memory)
    for stop_at in (4, 11, 17):
        stop = StopRequest()
        with pytest.raises(KeyboardInterrupt):
            losses(again, stop, stop_at)
    seen = losses(again)
    assert seen == whole[-len(seen) :]
    assert len(seen) == 8


def test_a_table_file_that_was_removed_is_made_anew_from_the_checkpoint(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    whole = losses(recipe(tiny, tmp_path / "whole", RESIDENT))
    stop = StopRequest()
    with pytest.raises(KeyboardInterrupt):
        losses(recipe(tiny, tmp_path / "run", DISK), stop, 10)
    files = list((tmp_path / "run" / "runs").glob("*/*.table*"))
    assert len(files) >= 2  # with its log
    for file in files:
        file.unlink()
    seen = losses(recipe(tiny, tmp_path / "run", DISK))
    assert seen == whole[-len(seen) :]
    assert 0 < len(seen) < len(whole)


def test_a_run_may_move_to_another_tier(tiny: dict[str, Any], tmp_path: Path) -> None:
    whole = losses(recipe(tiny, tmp_path / "whole", RESIDENT))
    stop = StopRequest()
    with pytest.raises(KeyboardInterrupt):
        losses(recipe(tiny, tmp_path / "run", {"tier": "host"}), stop, 10)
    seen = losses(recipe(tiny, tmp_path / "run", RESIDENT))
    assert seen == whole[-len(seen) :]


def test_formats_are_part_of_the_run_and_tiers_are_not(tiny: dict[str, Any], tmp_path: Path) -> None:
    base = Recipe.from_dict(tiny)
    corpus = prepare(base.text)

    def identity(**memory: Any) -> str:
        return resolve(replace(base, memory=replace(base.memory, **memory)), corpus).identity

    assert identity(tier="host", depth=5, threads=1) == identity(unique_rows=True) != identity()
    assert identity(tier="host", rows="bfloat16") != identity()
    assert identity(tier="host", state="bfloat16") != identity(tier="host", rows="bfloat16")


def test_what_a_tier_cannot_do_is_said_before_the_run(tiny: dict[str, Any], tmp_path: Path) -> None:
    content = recipe(tiny, tmp_path, HOST, **{"model.engram.module": "product_key", "budget.rho": None})
    with pytest.raises(UserError, match=r"memory\.tier is host.*product_key.*leave the section memory out"):
        train(content, progress_bar=False)
    huge = {"model.engram.rows_per_head": 10**9, "budget.rho": None, "memory.rows": "bfloat16"}
    with pytest.raises(UserError, match=r"GiB.*lower model\.engram\.rows_per_head.*memory\.tier to disk"):
        train(recipe(tiny, tmp_path, HOST, **huge), progress_bar=False)
    assert not (tmp_path / "runs").exists()


def test_a_disk_that_cannot_take_the_table_is_told_before_the_run(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    blocked = recipe(tiny, tmp_path, {**DISK, "directory": str(tmp_path / "file" / "tables")})
    says = (
        r"memory\.directory is '.*/file/tables', but '.*/file' is no folder; choose another memory\.directory"
    )
    with pytest.raises(UserError, match=says):
        train(blocked, progress_bar=False)
    huge = {"model.engram.rows_per_head": 10**10, "budget.rho": None}
    for memory in (DISK, {**DISK, "directory": str(tmp_path / "tables")}):
        with pytest.raises(
            UserError, match=r"needs .* GiB, but .* GiB free; choose another memory\.directory"
        ):
            train(recipe(tiny, tmp_path, memory, **huge), progress_bar=False)
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "tables").exists()

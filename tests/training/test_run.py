"""A run that was stopped ends like one that was not; what else a whole run keeps to."""

from __future__ import annotations

import json
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock
from lightning.pytorch.callbacks import RichProgressBar
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file
from whole_runs import curves, moved, start, status

from engram_lab.errors import UserError
from engram_lab.recipe import Recipe, resolve, run_directory
from engram_lab.text import prepare
from engram_lab.training.callbacks import Progress, StopRequest
from engram_lab.training.fit import RunResult, _seconds_so_far
from engram_lab.training.module import Diverged, EngramModule
from engram_lab.training.run import _claimed, columns, read_result, train


@pytest.fixture
def recipe(tiny: dict[str, Any]) -> Recipe:
    return Recipe.from_dict(tiny)


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    """Losses of the uninterrupted run, filled by the first test that needs them."""
    return {}


def uninterrupted(
    recipe: Recipe, tmp_path: Path, reference: dict[str, Any]
) -> tuple[RunResult, dict[int, float]]:
    if not reference:
        elsewhere = moved(recipe, tmp_path / "reference")
        reference["result"] = train(elsewhere, progress_bar=False)
        reference["losses"] = curves(elsewhere, "train/loss")
        reference["validation"] = curves(elsewhere, "val/loss")
    return reference["result"], reference["losses"]


def test_a_run_learns_and_leaves_its_result(
    recipe: Recipe, tmp_path: Path, reference: dict[str, Any]
) -> None:
    result, losses = uninterrupted(recipe, tmp_path, reference)
    assert sorted(losses) == list(range(1, 25)), "every step was logged"
    assert losses[24] < losses[1]
    assert sorted(reference["validation"]) == [8, 16, 24]
    assert result.loss == pytest.approx(reference["validation"][24], abs=0)
    elsewhere = moved(recipe, tmp_path / "reference")
    if run_directory(elsewhere, result.identity).exists():
        assert not list(run_directory(elsewhere, result.identity).glob("checkpoints/*"))


@pytest.mark.parametrize("stop_at", [1, 7, 8, 16, 23])
def test_stopped_at_any_step_and_resumed_it_ends_the_same(
    recipe: Recipe, tmp_path: Path, reference: dict[str, Any], stop_at: int
) -> None:
    expected, losses = uninterrupted(recipe, tmp_path, reference)
    stop = StopRequest()

    def observer(progress: Progress) -> None:
        if progress.step == stop_at:
            stop.reason = "a test"

    with pytest.raises(KeyboardInterrupt):
        train(recipe, observer=observer, stop=stop, progress_bar=False)
    assert status(recipe) == ("KILLED", f"stopped by a test at step {stop_at}")
    result = train(recipe, progress_bar=False)
    assert (result.loss, result.reused) == (expected.loss, False)
    assert curves(recipe, "train/loss") == losses
    assert curves(recipe, "val/loss") == reference["validation"]
    assert status(recipe) == ("FINISHED", None)


@pytest.mark.parametrize("where", ["validation_step", "training_step"])
def test_sigterm_in_the_midst_of_a_step_or_an_evaluation_saves_it_first(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Lightning by itself would end the process there, with status 0 and without a checkpoint."""
    tiny["trainer"] = {**tiny["trainer"], "accumulate_grad_batches": 2}
    recipe = Recipe.from_dict(tiny)
    elsewhere = moved(recipe, tmp_path / "elsewhere")
    expected = train(elsewhere, progress_bar=False)
    calls, step = 0, getattr(EngramModule, where)

    def terminated(self: EngramModule, batch: Any, batch_idx: int) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:  # neither the last batch of an evaluation nor the last of a step
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(EngramModule, where, terminated)
        with pytest.raises(KeyboardInterrupt, match="stopped by SIGTERM at step"):
            train(recipe, progress_bar=False)
    assert status(recipe)[0] == "KILLED"
    directory = run_directory(recipe, expected.identity)
    assert len(list(directory.glob("checkpoints/step=*.ckpt"))) == 1
    assert train(recipe, progress_bar=False).loss == expected.loss
    assert curves(recipe, "val/loss") == curves(elsewhere, "val/loss")


@pytest.mark.parametrize(("stop_at", "micro_batches"), [(8, 1), (23, 2)])
def test_the_bar_of_a_resumed_run_counts_all_its_batches(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch, stop_at: int, micro_batches: int
) -> None:
    recipe = Recipe.from_dict(tiny).override({"trainer.accumulate_grad_batches": micro_batches})
    seen: list[tuple[float, float | None]] = []
    update = RichProgressBar._update

    def spy(bar: RichProgressBar, task: Any, current: int, *rest: Any, **options: Any) -> None:
        update(bar, task, current, *rest, **options)
        if task is not None and task == bar.train_progress_bar_id:
            seen.append((bar.train_progress_bar.completed, bar.train_progress_bar.total))

    monkeypatch.setattr(RichProgressBar, "_update", spy)
    monkeypatch.setattr("engram_lab.training.progress.has_bars", lambda: True)
    stop = StopRequest()

    def observer(progress: Progress) -> None:
        if progress.step == stop_at:
            stop.reason = "a test"

    with pytest.raises(KeyboardInterrupt):
        train(recipe, observer=observer, stop=stop)
    before = len(seen)
    train(recipe)
    batches = 24 * micro_batches
    assert {total for _, total in seen} == {batches}
    assert [done for done, _ in seen[before:]] == list(range(stop_at * micro_batches + 1, batches + 1))


def test_a_finished_run_is_reused(recipe: Recipe, tmp_path: Path, reference: dict[str, Any]) -> None:
    first = train(recipe, progress_bar=False)
    file = run_directory(recipe, first.identity) / "result.json"
    before = file.stat().st_mtime_ns
    again = train(recipe, progress_bar=False)
    assert again == replace(first, reused=True)
    assert file.stat().st_mtime_ns == before


def test_a_damaged_result_is_refused_until_it_is_removed(recipe: Recipe) -> None:
    expected = train(recipe, progress_bar=False)
    file = run_directory(recipe, expected.identity) / "result.json"
    for content in (b"", b'{"loss": 3.', b"\xff\0", b"[]", b"{}"):
        file.write_bytes(content)
        with pytest.raises(UserError) as caught:
            train(recipe, progress_bar=False)
        assert str(caught.value) == (
            f"{file} is damaged; put back what was saved, or remove the file to train the run on from its "
            "last checkpoint, or anew where it has none."
        )
        assert file.read_bytes() == content
    file.unlink()
    result = train(recipe, progress_bar=False)
    assert (result.loss, result.reused) == (expected.loss, False)


@pytest.mark.parametrize("content", [b"", b"12.", b"12.5\n", b"\xff\0", b"a while"])
def test_time_that_cannot_be_read_counts_as_none(tmp_path: Path, content: bytes) -> None:
    assert _seconds_so_far(tmp_path) == 0
    (tmp_path / "seconds").write_bytes(content)
    assert _seconds_so_far(tmp_path) == {b"12.": 12, b"12.5\n": 12.5}.get(content, 0)


def params(recipe: Recipe) -> dict[str, str]:
    client = MlflowClient(recipe.tracking.uri)
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    listed: dict[str, str] = run.data.params
    return listed


def test_a_run_lists_its_recipe_and_its_allocation(recipe: Recipe, tmp_path: Path) -> None:
    stop = StopRequest()
    stop.reason = "a test"
    with pytest.raises(KeyboardInterrupt):
        train(recipe, stop=stop, progress_bar=False)
    first = params(recipe)
    solved = resolve(recipe, prepare(recipe.text))
    assert solved.network.engram is not None
    expected = {
        "seed": 0,
        "model.ffn.experts": 12,
        "model.vocab_size": 400,
        "model.engram.orders": [2, 3],
        "optimizer.learning_rate": 0.01,
        "trainer.devices": 1,
        "allocation.experts": solved.allocation.experts,
        "allocation.rows_per_head": solved.network.engram.rows_per_head,
        "allocation.slots": solved.allocation.slots,
    }
    assert solved.allocation.experts < 12
    assert {name: first.get(name) for name in expected} == {n: str(value) for n, value in expected.items()}
    assert not [name for name in first if name.startswith("tracking")], "an address may hold a password"
    # Two settings that are no part of its identity: the same run, which MLflow would refuse new values of.
    changed = recipe.override({"checkpoint_every_n_steps": 5, "execution.activation_checkpointing": True})
    train(changed, progress_bar=False)
    assert status(recipe) == ("FINISHED", None)
    assert params(recipe) == first
    # Recorded in another store, a run that is reused says the same.
    elsewhere = replace(recipe.tracking, uri=f"sqlite:///{tmp_path}/elsewhere.db")
    assert train(replace(recipe, tracking=elsewhere), progress_bar=False).reused
    assert params(replace(recipe, tracking=elsewhere)) == first


def test_accumulated_micro_batches_train_the_same_batch(
    recipe: Recipe, tmp_path: Path, reference: dict[str, Any]
) -> None:
    expected, _losses = uninterrupted(recipe, tmp_path, reference)
    # Routers balance on the counts of whole steps, so only rounding differs.
    parts = replace(recipe, trainer={**recipe.trainer, "accumulate_grad_batches": 2})
    result = train(parts, progress_bar=False)
    assert result.identity == expected.identity
    assert result.loss == pytest.approx(expected.loss, rel=1e-4)


def test_a_diverged_run_is_failed_with_its_reason(recipe: Recipe) -> None:
    wild = replace(recipe, optimizer=replace(recipe.optimizer, learning_rate=1e30, gradient_clip=0.0))
    with pytest.raises(Diverged, match="loss was"):
        train(wild, progress_bar=False)
    state, reason = status(wild)
    assert state == "FAILED"
    assert reason is not None
    assert reason.startswith("diverged: the training loss was nan at step")


def test_the_columns_of_a_run_are_those_of_the_schema(recipe: Recipe) -> None:
    from scaling.schema import BY_NAME

    written = columns(resolve(recipe, prepare(recipe.text)), {})
    needed = set(BY_NAME) & {
        "study run sweep control budget rho rho_nominal slots memory_parameters total_parameters "
        "active_parameters sparse_parameters experts top_k tokens seed"
    }
    assert needed <= set(written)
    assert len(set(BY_NAME) & set(written)) >= 16


def test_devices_that_do_not_exist_are_named(recipe: Recipe) -> None:
    asked = replace(recipe, trainer={"accelerator": "gpu", "devices": 31})
    with pytest.raises(UserError, match=r"'accelerator': 'gpu', 'devices': 31"):
        train(asked, progress_bar=False)


def test_batch_must_divide_over_micro_batches(recipe: Recipe) -> None:
    asked = replace(recipe, trainer={**recipe.trainer, "accumulate_grad_batches": 3})
    with pytest.raises(UserError, match=r"batch_size is 4; it must be a multiple.*1 x 3"):
        train(asked, progress_bar=False)


def test_settings_that_follow_from_others_are_refused(recipe: Recipe) -> None:
    with pytest.raises(UserError, match=r"trainer\.max_steps cannot be set: it follows from data\.tokens"):
        train(replace(recipe, trainer={**recipe.trainer, "max_steps": 3}), progress_bar=False)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_a_precision_that_training_has_not_is_refused(tiny: dict[str, Any], precision: str) -> None:
    tiny["trainer"] = {**tiny["trainer"], "precision": precision}
    sentence = rf"trainer\.precision is {precision}; it must be 32-true or bf16-mixed"
    with pytest.raises(UserError, match=sentence):
        train(Recipe.from_dict(tiny), progress_bar=False)


def router_biases(directory: Path) -> torch.Tensor:
    weights = load_file(directory / "model" / "model.safetensors")
    return torch.cat([weight for name, weight in weights.items() if name.endswith("router.bias")])


@pytest.mark.slow
def test_two_cpu_processes_train_what_one_does(tiny: dict[str, Any], tmp_path: Path) -> None:
    """Also where each takes its share in two parts, all of which the routers' loads count."""
    recipe = Recipe.from_dict(tiny)
    alone = train(moved(recipe, tmp_path / "alone"), progress_bar=False)
    tiny["trainer"] = {**tiny["trainer"], "devices": 2, "strategy": "ddp", "accumulate_grad_batches": 2}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(tiny))
    process = start(file)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()
    assert b"Traceback" not in errors, errors.decode()
    together = read_result(run_directory(recipe, alone.identity))
    assert together is not None
    assert together.loss == pytest.approx(alone.loss, rel=1e-4)
    both, one = curves(recipe, "train/loss"), curves(moved(recipe, tmp_path / "alone"), "train/loss")
    assert both == pytest.approx(one, rel=1e-3)
    biases = [
        router_biases(run_directory(r, alone.identity)) for r in (recipe, moved(recipe, tmp_path / "alone"))
    ]
    # A step moves a bias by 1e-3 up or down; a token near the border may choose another expert.
    assert ((biases[0] - biases[1]).abs() < 5e-4).float().mean() > 0.9


@pytest.mark.slow
def test_two_cpu_processes_with_sharded_parameters_train_what_one_does(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    """Also where they compute every block twice."""
    # With a smaller eps Adam makes whole steps of gradients that are nothing but rounding.
    tiny["optimizer"] = {**tiny["optimizer"], "eps": 1e-3}
    recipe = Recipe.from_dict(tiny)
    alone = train(moved(recipe, tmp_path / "alone"), progress_bar=False)
    strategy = {
        "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
        "init_args": {
            "data_parallel_size": 2,
            "tensor_parallel_size": 1,
            "save_distributed_checkpoint": False,
        },
    }
    tiny["trainer"] = {**tiny["trainer"], "devices": 2, "strategy": strategy}
    tiny["execution"] = {"activation_checkpointing": True}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(tiny))
    process = start(file)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()
    together = read_result(run_directory(recipe, alone.identity))
    assert together is not None
    assert together.loss == pytest.approx(alone.loss, rel=1e-4)
    both, one = curves(recipe, "train/loss"), curves(moved(recipe, tmp_path / "alone"), "train/loss")
    assert both == pytest.approx(one, rel=1e-3)
    weights = [load_file(run_directory(r, alone.identity) / "model" / "model.safetensors")
               for r in (recipe, moved(recipe, tmp_path / "alone"))]  # fmt: skip
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        other = weights[1][name].double()
        assert (weight.double() - other).norm() <= 1e-3 * other.norm(), name


def test_a_listing_does_not_keep_a_run_from_starting(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "lock", thread_local=False)
    lock.acquire()
    threading.Timer(0.2, lock.release).start()
    with _claimed(tmp_path):
        pass


def test_a_run_that_is_being_trained_is_not_trained_twice(recipe: Recipe, tmp_path: Path) -> None:
    stop, messages = StopRequest(), []

    def observer(progress: Progress) -> None:
        if progress.step == 2:
            with pytest.raises(UserError, match="being trained by another process") as caught:
                train(recipe, progress_bar=False)
            messages.append(str(caught.value))
            stop.reason = "a test"

    with pytest.raises(KeyboardInterrupt):
        train(recipe, observer=observer, stop=stop, progress_bar=False)
    assert len(messages) == 1
    assert json.dumps(messages[0])

"""A table spread over processes trains as on one, through kills and other numbers of processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mlflow.tracking import MlflowClient

from engram_lab.errors import UserError
from engram_lab.model.checkpoint import load
from engram_lab.recipe import Recipe, resolve, run_directory
from engram_lab.text import prepare
from engram_lab.training.run import read_result, train

SHARDED: dict[str, Any] = {"tier": "sharded"}
RESIDENT: dict[str, Any] = {"unique_rows": True}
TOLERANCE = 1e-3
"""Relative, of losses: gradients are sums in another order, and Adam divides by their size."""


def recipe(tiny: dict[str, Any], folder: Path, memory: dict[str, Any], processes: int = 1) -> Recipe:
    """A run whose batch two and three processes can share, and whose evaluation is less than a batch."""
    return Recipe.from_dict(
        {
            **tiny,
            "memory": memory,
            "data": {**tiny["data"], "batch_size": 6, "tokens": 32 * 6 * 24, "validation_tokens": 32 * 2},
            "trainer": {
                **tiny["trainer"],
                "devices": processes,
                **({"strategy": "ddp"} if processes > 1 else {}),
            },
            "tracking": {"uri": f"sqlite:///{folder}/mlflow.db", "directory": str(folder)},
        }
    )


IMPATIENT = """
import os, sys
from engram_lab import cli
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver

_ChildProcessObserver.__init__.__defaults__ = (0.02,)  # kills the first process when another one fails
{failure}
sys.exit(cli.main())
"""

FULL_DISK = """
from engram_lab.memory import row_checkpoint

def write(path, step, *given, write=row_checkpoint.write, **options):
    if path.name == "step=6.rank={rank}.rows":
        raise OSError(28, "No space left on device")
    return write(path, step, *given, **options)

row_checkpoint.write = write
"""

BROKEN = """
from engram_lab.memory.sharded import ShardedPipeline

def begin(self, step, begin=ShardedPipeline.begin):
    if step == 7 and self.peers.rank == {rank}:
        raise ValueError("nobody expected this")
    begin(self, step)

ShardedPipeline.begin = begin
"""


def start(wanted: Recipe, folder: Path, script: str | None = None) -> subprocess.Popen[bytes]:
    """Run it from the command line, or by a script in place of that, in a session of its own."""
    folder.mkdir(exist_ok=True)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(wanted.to_dict()))
    command = ["-m", "engram_lab.cli"]
    if script is not None:
        (folder / "script.py").write_text(script)
        command = [str(folder / "script.py")]
    return subprocess.Popen(
        [sys.executable, *command, "run", str(file)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def finish(process: subprocess.Popen[bytes]) -> str:
    try:
        _, errors = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return errors.decode()


def kill_after(process: subprocess.Popen[bytes], directory: Path, step: int) -> None:
    """SIGKILL all processes once the checkpoint of `step`, or a later one, is there."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        found = [int(re.findall(r"\d+", f.name)[0]) for f in directory.glob("checkpoints/step=*.ckpt")]
        if any(number >= step for number in found):
            break
        time.sleep(0.01)
    ended = process.poll()
    os.killpg(process.pid, signal.SIGKILL)
    _, errors = process.communicate()
    assert ended is None, errors.decode()


def curve(wanted: Recipe, metric: str) -> dict[int, float]:
    client = MlflowClient(wanted.tracking.uri)
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return {m.step: m.value for m in client.get_metric_history(run.info.run_id, metric)}


def test_one_process_trains_as_a_resident_table_does(tiny: dict[str, Any], tmp_path: Path) -> None:
    losses = [
        train(recipe(tiny, tmp_path / name, memory), progress_bar=False).loss
        for name, memory in (("resident", RESIDENT), ("sharded", SHARDED))
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("memory", [RESIDENT, {"tier": "host"}, {"tier": "disk"}])
def test_other_tiers_refuse_several_processes(
    tiny: dict[str, Any], tmp_path: Path, memory: dict[str, Any]
) -> None:
    with pytest.raises(
        UserError, match=r"one process trains, but there are to be 2; set memory\.tier to sharded"
    ):
        train(recipe(tiny, tmp_path / "run", memory, processes=2), progress_bar=False)
    assert not (tmp_path / "run").exists()


def test_sharded_parameters_are_refused_with_sharded_rows(tiny: dict[str, Any], tmp_path: Path) -> None:
    strategy = {
        "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
        "init_args": {
            "data_parallel_size": 2,
            "tensor_parallel_size": 1,
            "save_distributed_checkpoint": False,
        },
    }
    both = recipe(tiny, tmp_path / "run", SHARDED, processes=2)
    both = replace(both, trainer={**both.trainer, "strategy": strategy})
    with pytest.raises(UserError, match=r"sharded, which does not yet work with ModelParallel.*to ddp"):
        train(both, progress_bar=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_killed_go_on_as_three_and_end_as_one(tiny: dict[str, Any], tmp_path: Path) -> None:
    alone = train(recipe(tiny, tmp_path / "alone", RESIDENT), progress_bar=False)
    folder = tmp_path / "run"
    directory = run_directory(recipe(tiny, folder, SHARDED), alone.identity)
    kill_after(start(recipe(tiny, folder, SHARDED, 2), folder), directory, 6)
    assert {f.name.split(".")[1] for f in (directory / "rows").glob("step=*.rows")} == {"rank=0", "rank=1"}
    kill_after(start(recipe(tiny, folder, SHARDED, 3), folder), directory, 15)
    process = start(recipe(tiny, folder, SHARDED, 2), folder)
    errors = finish(process)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors, errors
    together = read_result(directory)
    assert together is not None
    assert together.loss == pytest.approx(alone.loss, rel=TOLERANCE)
    for metric in ("train/loss", "val/loss", "memory/layer1/row_norm", "memory/layer1/populated_rows"):
        expected = curve(recipe(tiny, tmp_path / "alone", RESIDENT), metric)
        assert curve(recipe(tiny, folder, SHARDED), metric) == pytest.approx(expected, rel=TOLERANCE), metric
    assert not [file for file in directory.rglob("*") if file.suffix in (".ckpt", ".rows")]
    ids = torch.arange(64)[None]
    saved = load(directory / "model")
    expected_rows = load(run_directory(recipe(tiny, tmp_path / "alone", RESIDENT), alone.identity) / "model")
    torch.testing.assert_close(saved(ids), expected_rows(ids), rtol=0.02, atol=0.02)


@pytest.mark.slow
def test_two_processes_end_as_one(tiny: dict[str, Any], tmp_path: Path) -> None:
    """A sharded checkpoint goes on in one process, on another tier."""
    alone = train(recipe(tiny, tmp_path / "alone", RESIDENT), progress_bar=False)
    folder = tmp_path / "run"
    directory = run_directory(recipe(tiny, folder, SHARDED), alone.identity)
    kill_after(start(recipe(tiny, folder, SHARDED, 2), folder), directory, 9)
    result = train(recipe(tiny, folder, {"tier": "host"}), progress_bar=False)
    assert result.loss == pytest.approx(alone.loss, rel=TOLERANCE)
    expected = curve(recipe(tiny, tmp_path / "alone", RESIDENT), "train/loss")
    assert curve(recipe(tiny, folder, SHARDED), "train/loss") == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failure", "rank", "says"),
    [
        (FULL_DISK, 1, "error: The table rows of step 6 cannot be saved in "),
        (FULL_DISK, 0, "error: The table rows of step 6 cannot be saved in "),
        (BROKEN, 1, "error: process 1 of the run failed with ValueError: nobody expected this"),
    ],
    ids=["second", "first", "unexpected"],
)
def test_a_process_that_fails_ends_the_run_with_its_own_words(
    tiny: dict[str, Any], tmp_path: Path, failure: str, rank: int, says: str
) -> None:
    wanted = recipe(tiny, tmp_path / "run", SHARDED, 2)
    directory = run_directory(wanted, resolve(wanted, prepare(wanted.text)).identity)
    process = start(wanted, tmp_path / "run", IMPATIENT.format(failure=failure.format(rank=rank)))
    errors = finish(process)
    assert process.returncode == 2, errors
    told = [line for line in errors.splitlines() if "rror: " in line and not line.startswith("ValueError")]
    assert len(told) == 1, errors
    assert told[0].startswith(says)
    assert errors.count("Traceback") == (failure is BROKEN), errors
    assert [f.name for f in directory.glob("checkpoints/*.ckpt")] == [
        "step=6.ckpt" if failure is BROKEN else "step=3.ckpt"
    ]
    assert json.loads((directory / "seconds").read_text()) > 0
    client = MlflowClient(wanted.tracking.uri)
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.info.status == "FAILED"
    assert says.removeprefix("error: ") in run.data.tags["reason"]

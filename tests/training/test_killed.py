"""A run that was killed or asked to stop, whenever and on whichever tier, ends like one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from whole_runs import curves, moved, start, status, to_the_end

from engram_lab.recipe import Recipe, resolve, run_directory
from engram_lab.text import prepare
from engram_lab.training.run import read_result

KILL, ASK = signal.SIGKILL, signal.SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize(
    ("memory", "reference", "signals"),
    [
        ({}, {}, ((KILL, 0.0), (KILL, 0.5))),
        ({"unique_rows": True}, {"unique_rows": True}, ((KILL, 0.2), (KILL, 0.7))),
        ({"tier": "host", "depth": 3}, {"unique_rows": True}, ((KILL, 0.4), (KILL, 0.9))),
        ({"tier": "disk", "cache_rows": 50}, {"unique_rows": True}, ((KILL, 0.3), (KILL, 0.8))),
        ({"tier": "sharded"}, {"tier": "sharded"}, ((ASK, 0.6), (KILL, 0.1))),
    ],
    ids=["dense", "device", "host", "disk", "sharded"],
)
def test_killed_at_random_moments_it_ends_the_same(
    tiny: dict[str, Any],
    tmp_path: Path,
    memory: dict[str, Any],
    reference: dict[str, Any],
    signals: tuple[tuple[signal.Signals, float], ...],
) -> None:
    """SIGKILL, wherever it hits: a step, an evaluation, a checkpoint or row being written.

    Each comes after a share of the time between two checkpoints, so that together they are spread over it.
    Two processes hold the sharded table; ranks add up in one order, so that as many repeat a run exactly.
    SIGTERM to the first of them ends both at the same step, with a checkpoint of it.
    """
    tiny["data"] = {**tiny["data"], "tokens": 32 * 4 * 150, "repeat": True}
    if memory.get("tier") == "sharded":
        tiny["trainer"] = {**tiny["trainer"], "devices": 2, "strategy": "ddp"}
    elsewhere = moved(Recipe.from_dict({**tiny, "memory": reference}), tmp_path / "reference")
    tiny["memory"] = memory
    recipe = Recipe.from_dict(tiny)
    to_the_end(elsewhere, tmp_path / "reference")
    directory = run_directory(recipe, resolve(recipe, prepare(recipe.text)).identity)
    expected = read_result(run_directory(elsewhere, directory.name))
    assert expected is not None
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(tiny))
    for number, share in signals:
        seen = set(directory.glob("checkpoints/*.ckpt"))
        process = start(file)
        first, second = (next_checkpoint(directory, seen, process) for _ in range(2))
        time.sleep(share * (second - first))
        ended = process.poll()
        if number == KILL:
            os.killpg(process.pid, KILL)
        else:
            os.kill(process.pid, number)
        _, errors = process.communicate()
        assert ended is None, errors.decode()
        assert read_result(directory) is None, "the run was over before it was killed"
        if number == KILL:
            assert status(recipe)[0] == "RUNNING"
        else:
            assert process.returncode == 143, errors.decode()
            (saved,) = directory.glob("checkpoints/*.ckpt")
            assert status(recipe) == ("KILLED", f"stopped by SIGTERM at step {saved.stem.split('=')[1]}")
    to_the_end(recipe, tmp_path)
    result = read_result(directory)
    assert result is not None
    assert result.loss == expected.loss
    assert curves(recipe, "train/loss") == curves(elsewhere, "train/loss")
    assert curves(recipe, "val/loss") == curves(elsewhere, "val/loss")
    assert status(recipe) == ("FINISHED", None)


def next_checkpoint(directory: Path, seen: set[Path], process: subprocess.Popen[bytes]) -> float:
    """Wait for one that was not `seen`, or the end of the process, and return the time in seconds."""
    while process.poll() is None:
        there = set(directory.glob("checkpoints/*.ckpt"))
        if not there <= seen:
            seen |= there
            break
        time.sleep(0.002)
    return time.perf_counter()

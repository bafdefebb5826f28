"""Options of the commands themselves: what they print, and what they hand on."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from engram_lab.cli import main


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert not ended.value.code
    assert capsys.readouterr().out == f"engram-lab {metadata.version('engram-lab')}\n"


@pytest.mark.parametrize(
    ("words", "served"),
    [
        ([], ("127.0.0.1", 5000)),
        (["--host", "0.0.0.0", "--port", "5001"], ("0.0.0.0", 5001)),
    ],
)
def test_the_pages_are_served_where_asked(
    monkeypatch: pytest.MonkeyPatch, words: list[str], served: tuple[str, int]
) -> None:
    asked: list[tuple[str, int]] = []

    def serve(uri: str, **where: Any) -> int:
        asked.append((where["host"], where["port"]))
        return 0

    monkeypatch.setattr("engram_lab.tracking.serve", serve)
    assert main(["ui", *words]) == 0
    assert asked == [served]


@pytest.mark.parametrize(
    ("process", "printed"),
    [
        ({}, "loss 3\n"),
        ({"RANK": "0", "LOCAL_RANK": "0"}, "loss 3\n"),
        ({"LOCAL_RANK": "1"}, ""),
        ({"RANK": "8", "LOCAL_RANK": "0"}, ""),  # the first of a second machine
    ],
)
def test_only_the_first_process_of_a_run_prints(
    monkeypatch: pytest.MonkeyPatch,
    in_tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    process: dict[str, str],
    printed: str,
) -> None:
    def run(file: Path, overrides: list[str]) -> int:
        print("loss 3")
        print("error: the disk is full.", file=sys.stderr)
        return 1

    Path("recipe.yaml").touch()
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in process.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("engram_lab.commands.run", run)
    assert main(["run", "recipe.yaml"]) == 1
    told = capsys.readouterr()
    assert (told.out, told.err) == (printed, "error: the disk is full.\n")


@pytest.mark.slow
def test_two_processes_tell_how_far_they_are_and_their_result_once(
    tiny: dict[str, Any], in_tmp_path: Path
) -> None:
    Path("tiny.yaml").write_text(yaml.safe_dump(tiny))
    command = [sys.executable, "-m", "engram_lab.cli", "run", "tiny.yaml"]
    done = subprocess.run(
        [*command, "--trainer.devices=2", "--trainer.strategy=ddp"],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    for line in ("training:", "step 8 of 24", "\nvalidation loss", "weights:", "runs:"):
        assert done.stdout.count(line) == 1, done.stdout

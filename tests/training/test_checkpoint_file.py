"""A training checkpoint is whole or absent, and one that has changed is refused in a sentence."""

from __future__ import annotations

import errno
import random
import resource
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engram_lab.errors import UserError
from engram_lab.recipe import Recipe
from engram_lab.training.callbacks import Progress
from engram_lab.training.checkpoint_file import WholeFile, require_whole
from engram_lab.training.run import train

CONTENT = {"weights": torch.arange(20_000.0), "step": 3, "inner": {"rows": torch.arange(5)}}

KILLED = """
import resource, signal, sys, torch
from engram_lab.training.checkpoint_file import WholeFile
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel ends the process where the file would grow beyond
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
WholeFile().save_checkpoint({"weights": torch.arange(20_000.0)}, sys.argv[1])
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_reads_back_and_nothing_of_it_was_written_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    file = tmp_path / "run" / "step=3.ckpt"
    WholeFile().save_checkpoint(CONTENT, file)
    require_whole(file)
    found = WholeFile().load_checkpoint(file, weights_only=True)
    assert torch.equal(found["weights"], CONTENT["weights"])
    assert names(file.parent) == ["step=3.ckpt"]


def test_a_process_killed_in_the_midst_of_writing_leaves_the_file_of_before(tmp_path: Path) -> None:
    file = tmp_path / "step=3.ckpt"
    WholeFile().save_checkpoint({"step": 3}, file)
    before = file.read_bytes()
    ended = subprocess.run([sys.executable, "-c", KILLED, str(file)], check=False)
    assert ended.returncode == -signal.SIGXFSZ
    assert len(names(tmp_path)) == 2, "it should have been killed while it wrote"
    assert file.read_bytes() == before


def test_no_room_is_an_error_of_the_system_and_leaves_nothing(tmp_path: Path) -> None:
    file, limits = tmp_path / "step=3.ckpt", resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
        with pytest.raises(OSError, match="File too large") as caught:
            WholeFile().save_checkpoint(CONTENT, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert names(tmp_path) == []


def test_a_file_that_is_cut_short_or_gone_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "step=3.ckpt"
    WholeFile().save_checkpoint(CONTENT, file)
    content = file.read_bytes()
    for length in (0, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"step=3\.ckpt is damaged") as caught:
            require_whole(file)
        assert "\n" not in str(caught.value)
    file.unlink()
    with pytest.raises(UserError, match="cannot be read: No such file"):
        require_whole(file)


def test_no_changed_byte_is_trained_on(tmp_path: Path) -> None:
    """It is refused, or lies where nothing is kept."""
    file, draw, refused = tmp_path / "step=3.ckpt", random.Random(0), 0
    WholeFile().save_checkpoint(CONTENT, file)
    content = file.read_bytes()
    for _ in range(150):
        changed = bytearray(content)
        changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(changed)
        try:
            require_whole(file)
        except UserError:
            refused += 1
        else:
            found = torch.load(file, weights_only=True)
            assert torch.equal(found["weights"], CONTENT["weights"])
            assert (found["step"], found["inner"]["rows"].tolist()) == (3, [0, 1, 2, 3, 4])
    assert refused > 100


def test_a_run_does_not_go_on_from_a_damaged_checkpoint(tiny: dict[str, Any], tmp_path: Path) -> None:
    tracking = {"uri": f"sqlite:///{tmp_path}/mlflow.db", "directory": str(tmp_path)}
    recipe = Recipe.from_dict({**tiny, "tracking": tracking})

    def stop(progress: Progress) -> None:
        if progress.step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, observer=stop, progress_bar=False)
    (file,) = tmp_path.glob("runs/*/checkpoints/*.ckpt")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is damaged"):
        train(recipe, progress_bar=False)
    file.write_bytes(whole)
    other = replace(
        recipe.tracking, uri=f"sqlite:///{tmp_path}/other/mlflow.db", directory=f"{tmp_path}/other"
    )
    expected = train(replace(recipe, tracking=other), progress_bar=False)
    assert train(recipe, progress_bar=False).loss == expected.loss

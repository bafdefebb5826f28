"""A file system that is really full ends a run in one sentence; once there is room it goes on exactly."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from engram_lab import cli, commands
from engram_lab.recipe import Recipe
from engram_lab.tracking import initialise_store
from engram_lab.training.run import train

STEPS = 60
CASES: dict[str, tuple[dict[str, Any], int, str]] = {  # memory, bytes left, and what the sentence is
    # There is room for the rows of the next checkpoint, and then for a part of what Lightning saves.
    "host": ({"tier": "host"}, 90_000, r"error: The checkpoint of step .* intact\."),
    "disk": (
        {"tier": "disk", "cache_rows": 8},
        0,
        r"error: (Rows cannot be|Saving .* table rows) .* intact\.",
    ),
}
REFUSED = (
    r"metrics wait: run \w+ of sqlite:///\S+ does not take them \(.*disk is full\)",
    r"\d+ metric values could not be written to run \w+ of sqlite:///\S+: .*disk is full\.",
    r"how run \w+ ended was not recorded: The store \S+ refused: .*disk is full\.",  # or it had room again
)

MOUNT = 'mount -t tmpfs -o size=16m none "$0" && echo mounted && exec sleep 600'
# To see file systems of one's own, and to see them in another process: as root, or as anybody.
WAYS = {
    ("unshare", "--mount"): ("--mount",),
    ("unshare", "--user", "--map-root-user", "--mount"): ("--user", "--preserve-credentials", "--mount"),
}


class SmallDisk:
    """A file system of sixteen megabytes, which only the processes started on it see.

    It goes with the process that holds it, so that nothing has to be unmounted.

    Args:
        folder: where those processes see it; made.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        refused = []
        for way in WAYS:
            command = [*way, "sh", "-c", MOUNT, str(folder)]
            try:
                holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            except OSError as error:
                pytest.skip(f"no file system can be mounted here: {error}")
            assert holder.stdout is not None
            if holder.stdout.readline():
                break
            refused.append(holder.communicate()[1].strip())
        else:
            pytest.skip(f"no file system can be mounted here: {'; '.join(refused)}")
        self._holder = holder
        self._inside = ["nsenter", f"--target={holder.pid}", *WAYS[way], "sh", "-c", 'cd "$0" && exec "$@"']
        self._inside.append(str(folder))
        self.path = Path(f"/proc/{holder.pid}/root{folder}")
        """Where everybody else sees it."""

    def python(self, *arguments: str) -> subprocess.Popen[str]:
        """Start Python with the file system for its working directory, in a session of its own."""
        return subprocess.Popen(
            [*self._inside, sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def fill(self, leaving: int) -> None:
        """Leave so many bytes."""
        with open(self.path / "filler", "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                file.truncate(file.tell() - leaving)

    def make_room(self) -> None:
        """Take away what filled it."""
        (self.path / "filler").unlink()

    def close(self) -> None:
        """End what holds it."""
        self._holder.terminate()
        self._holder.communicate()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store, to be copied: making one takes seconds."""
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    initialise_store(f"sqlite:///{file}")
    return file


@pytest.fixture
def small_disk(tmp_path: Path, store: Path) -> Iterator[SmallDisk]:
    disk = SmallDisk(tmp_path / "small")
    try:
        (disk.path / "mlruns").mkdir()
        shutil.copy(store, disk.path / "mlruns")
        yield disk
    finally:
        disk.close()


@pytest.fixture(scope="module")
def reference() -> list[float]:
    """The loss of the run that nothing happened to, once it has been trained."""
    return []


def undisturbed(values: dict[str, Any], folder: Path, store: Path, reference: list[float]) -> float:
    if not reference:
        folder.mkdir()
        shutil.copy(store, folder)
        tracking = {"uri": f"sqlite:///{folder}/mlflow.db", "directory": str(folder)}
        content = Recipe.from_dict({**values, "memory": {"unique_rows": True}, "tracking": tracking})
        reference.append(train(content, progress_bar=False).loss)
    return reference[0]


def checkpoints(disk: SmallDisk) -> list[Path]:
    return list(disk.path.glob("mlruns/runs/*/checkpoints/*.ckpt"))


def recorded_steps(disk: SmallDisk, folder: Path) -> list[int]:
    """Read for which steps the store has a loss, from a copy: SQLite writes beside what it reads."""
    for file in disk.path.glob("mlruns/mlflow.db*"):
        shutil.copy(file, folder)
    with closing(sqlite3.connect(folder / "mlflow.db")) as store:
        rows = store.execute("SELECT DISTINCT step FROM metrics WHERE key = 'train/loss' ORDER BY step")
        return [step for (step,) in rows]


@pytest.mark.slow
@pytest.mark.parametrize(("memory", "leaving", "says"), CASES.values(), ids=CASES)
def test_a_full_disk_ends_the_run_in_one_sentence_and_with_room_it_goes_on_exactly(
    tiny: dict[str, Any],
    tmp_path: Path,
    store: Path,
    reference: list[float],
    small_disk: SmallDisk,
    memory: dict[str, Any],
    leaving: int,
    says: str,
) -> None:
    """In the default layout, where the store is on the full disk as well."""
    del tiny["tracking"]
    tiny["data"] = {**tiny["data"], "tokens": 32 * 4 * STEPS, "repeat": True}
    expected = undisturbed(tiny, tmp_path / "reference", store, reference)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**tiny, "memory": memory}))

    process = small_disk.python("-m", "engram_lab.cli", "run", str(file))
    while process.poll() is None and not checkpoints(small_disk):
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()
    # It stands still meanwhile, or it would be over before its disk is full.
    os.killpg(process.pid, signal.SIGSTOP)
    small_disk.fill(leaving)
    os.killpg(process.pid, signal.SIGCONT)
    full = time.monotonic()
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 2, errors
    assert time.monotonic() - full < 30, errors
    *others, sentence = errors.splitlines()
    assert re.fullmatch(says, sentence), errors
    # What the store does not take is told before, in a line each.
    for line, pattern in zip(others, REFUSED, strict=False):
        assert re.fullmatch(pattern, line), errors
    assert len(others) in (2, 3), errors

    (checkpoint,) = checkpoints(small_disk)
    small_disk.make_room()
    process = small_disk.python("-m", "engram_lab.cli", "run", str(file))
    said, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert f"from {checkpoint.stem.replace('=', ' ')} on" in said
    (result,) = small_disk.path.glob("mlruns/runs/*/result.json")
    assert json.loads(result.read_text())["loss"] == expected
    assert recorded_steps(small_disk, tmp_path) == list(range(1, STEPS + 1))


def test_no_room_for_any_other_file_is_one_sentence_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(commands, "run", full)
    (tmp_path / "recipe.yaml").touch()
    assert cli.main(["run", str(tmp_path / "recipe.yaml")]) == 2
    assert capsys.readouterr().err == (
        "error: A file of the run cannot be written: No space left on device; make room, then the same "
        "command goes on from the last checkpoint.\n"
    )


def test_a_store_without_room_beside_it_is_told_as_such(small_disk: SmallDisk) -> None:
    small_disk.fill(0)
    code = "from engram_lab.tracking import store; store._check_sqlite(store.Path('mlruns/mlflow.db'))"
    _, errors = small_disk.python("-c", code).communicate(timeout=200)
    assert "UserError: The store 'mlruns/mlflow.db' cannot be written (" in errors
    assert errors.endswith("its disk may be full: make room there.\n"), errors

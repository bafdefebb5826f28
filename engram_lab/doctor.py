"""What is installed here, what it runs on, and who answers to the name `lightning`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engram_lab.errors import UserError

PACKAGES = ("torch", "lightning", "torchmetrics", "mlflow", "optuna", "polars", "tokenizers", "numba")
# Older ones run code that is hidden in a checkpoint, or were malicious releases.
OLDEST_LIGHTNING = (2, 6, 6)


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report; `fine` is False for what has to be mended."""

    name: str
    fine: bool
    finding: str


def doctor(uri: str = "sqlite:///mlruns/mlflow.db") -> int:
    """Print the findings, one a line, and return 0 when nothing has to be mended, else 1."""
    worst = 0
    for check in examine(uri):
        worst |= not check.fine
        print(f"{'ok  ' if check.fine else 'MEND'}  {check.name:<12} {check.finding}")
    return int(worst)


def examine(uri: str) -> Iterator[Check]:
    """Look at Python, the packages, the devices, the owner of `lightning` and the store at `uri`."""
    yield Check("python", sys.version_info >= (3, 11), f"{platform.python_version()} at {sys.executable}")
    for package in PACKAGES:
        yield _lightning() if package == "lightning" else _package(package)
    yield _devices()
    yield _store(uri)


def _lightning() -> Check:
    """The package, and the command of the same name, in one line."""
    package, command = _package("lightning"), lightning_owner()
    finding = f"{package.finding}; the command: {command.finding}"
    return Check("lightning", package.fine and command.fine, finding)


def lightning_owner(path: str | None = None) -> Check:
    """Say which package the first `lightning` on the search path belongs to."""
    command = shutil.which("lightning", path=path)
    if command is None:
        return Check("lightning", True, "not on PATH; use engram-lab run RECIPE, or activate the environment")
    try:
        text = Path(command).read_text(errors="replace")
    except OSError as error:
        return Check("lightning", False, f"{command} cannot be read ({error}); use engram-lab run RECIPE")
    if "engram_lab" in text:
        return Check("lightning", True, f"{command} is engram-lab's")
    whose = "lightning-sdk's" if "lightning_sdk" in text else "another package's"
    return Check("lightning", False, f"{command} is {whose}; use engram-lab run RECIPE, which is the same")


def _package(name: str) -> Check:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, False, "not installed")
    if name == "lightning":
        numbers = tuple(int(piece) for piece in version.split(".")[:3] if piece.isdecimal())
        if numbers < OLDEST_LIGHTNING:
            return Check(name, False, f"{version}; checkpoints are safe to load from 2.6.6 on")
    return Check(name, True, version)


def _devices() -> Check:
    try:
        import torch
    except ImportError as error:
        return Check("devices", False, f"torch does not import ({error})")
    cores = f"{torch.get_num_threads()} CPU threads"
    if not torch.cuda.is_available():
        return Check("devices", True, f"{cores}, no GPU that torch {torch.__version__} can use")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Check("devices", True, f"{cores}, {len(names)} x {names[0]}")


def _store(uri: str) -> Check:
    from engram_lab.tracking import initialise_store, resolve
    from engram_lab.tracking.client import database_path

    try:
        path = database_path(resolve(uri))
        if path is None or path.exists():
            return Check("store", True, f"{initialise_store(uri)} can be written")
    except UserError as error:
        return Check("store", False, str(error))
    folder = next(parent for parent in path.parents if parent.exists())
    if folder.is_dir() and os.access(folder, os.W_OK):
        return Check("store", True, f"{path} will be created by the first run")
    return Check("store", False, f"{path} cannot be created: {folder} is not a folder that can be written")

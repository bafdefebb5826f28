"""Which code made a run, on which machine."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from engram_lab.tracking import names

_PACKAGE = Path(__file__).resolve().parents[1]


@lru_cache(maxsize=1)
def code_version() -> dict[str, str]:
    """Return the tags that name this code: `code_version`, and MLflow's own commit tag when git knows it.

    "git:COMMIT" or "git:COMMIT+changes" when a git repository tracks the package (being installed inside one
    does not count), else "engram-lab VERSION".
    """
    if _git("ls-files", "--error-unmatch", "__init__.py") is not None and (
        commit := _git("rev-parse", "HEAD")
    ):
        changed = _git("status", "--porcelain", "--untracked-files=no")
        return {
            names.CODE_VERSION: f"git:{commit}" + ("+changes" if changed else ""),
            names.GIT_COMMIT: commit,
        }
    return {names.CODE_VERSION: release()}


def release() -> str:
    """Return "engram-lab VERSION" of the installed package; "unknown" where it is not installed."""
    try:
        return f"engram-lab {metadata.version('engram-lab')}"
    except metadata.PackageNotFoundError:
        return "unknown"


@lru_cache(maxsize=1)
def machine() -> dict[str, str]:
    """Return the tag that names this machine: its processor, its cores, and the first GPU if there is one."""
    import torch

    said = f"{platform.machine()}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        said += f", {torch.cuda.get_device_name(0)}"
    return {names.MACHINE: f"{said}, torch {torch.__version__}"}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(_PACKAGE), *arguments], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

"""Whether memory and disk have room, asked before anything is mapped or filled."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from engram_lab.errors import UserError

GIB = 2**30
CONTROL_GROUPS = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Return the bytes this process can still take: the machine's, or what its control groups leave."""
    return min([_field(Path("/proc/meminfo"), "MemAvailable:") * 1024, *_left_by_control_groups()])


def require_memory(needed: int, what: str, remedy: str) -> None:
    """Raise a UserError when `what` need more bytes than are available; `remedy` says what to lower."""
    available = available_memory()
    if needed > available:
        raise UserError(
            f"{what} need {needed / GIB:.1f} GiB of memory, but {available / GIB:.1f} GiB are available; "
            f"{remedy}."
        )


def require_disk(needed: int, directory: Path, remedy: str, what: str = "The table's file") -> None:
    """Raise a UserError when `what` needs more bytes than the file system of `directory` has free."""
    free = os.statvfs(directory)
    available = free.f_bavail * free.f_frsize
    if needed > available:
        raise UserError(
            f"{what} needs {needed / GIB:.1f} GiB, but {directory} has {available / GIB:.1f} GiB free; "
            f"{remedy}."
        )


def _left_by_control_groups() -> Iterator[int]:
    """Yield limit minus use for every control group that this process is in and that has a limit."""
    for membership in _memberships():
        _, controllers, path = membership.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = CONTROL_GROUPS / controllers
        limit, used = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes")
            if controllers
            else ("memory.max", "memory.current")
        )
        # A container often sees its own group as the top, whatever the path says.
        inside = top / path.lstrip("/")
        for group in {top, inside, *(p for p in inside.parents if top in p.parents)}:
            try:
                most, now = (group / limit).read_text().strip(), int((group / used).read_text())
                caches = _field(group / "memory.stat", "inactive_file")
            except OSError:
                continue
            if most != "max":
                yield max(0, int(most) - now + caches)


def _memberships() -> list[str]:
    """The lines "number:controllers:path"; version 2 has number 0 and no controllers."""
    try:
        return Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []


def _field(file: Path, name: str) -> int:
    """The number behind `name` in a file of lines "name number"."""
    for line in file.read_text().splitlines():
        words = line.split()
        if words and words[0] == name:
            return int(words[1])
    return 0

"""Which of a run's processes this is, by the variables that torchrun, Slurm and Lightning set."""

from __future__ import annotations

import os
from collections.abc import Mapping

from engram_lab.errors import UserError

NUMBERS = {
    "RANK": 0,
    "LOCAL_RANK": 0,
    "SLURM_PROCID": 0,
    "JSM_NAMESPACE_RANK": 0,
    "NODE_RANK": 0,
    "GROUP_RANK": 0,
    "WORLD_SIZE": 1,
    "LOCAL_WORLD_SIZE": 1,
}
"""The variables that this package or Lightning reads, the first four at import, and the least each can be."""


def check_processes(environment: Mapping[str, str] = os.environ) -> None:
    """Raise UserError for one of them that is set to something that is no such number."""
    for name, least in NUMBERS.items():
        value = environment.get(name)
        if value is not None and not (value.isdecimal() and int(value) >= least):
            raise UserError(
                f"the environment variable {name} is {value!r}; it must be a whole number from {least} on, "
                "or not be set."
            )


def process_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Return this process's number among those of a run on all machines; 0 where it is alone."""
    return int(environment.get("RANK", environment.get("LOCAL_RANK", "0")))

"""The recipe's section `memory`: where table rows live and in which format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from engram_lab.errors import UserError, nearest
from engram_lab.memory.layout import StateStorage

Tier = Literal["resident", "host", "disk", "sharded"]
TrainedStorage = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Where table rows live while a network trains or generates, and in which format they are trained.

    A run's losses, and so its identity, depend on `rows`, on `state`, on what `initial_rows` holds, and on
    whether its rows train as records or as one dense parameter; on nothing else here. How rows are read is
    engram.row_storage; their rule is optimizer.table_optimizer.

    Attributes:
        tier: "resident" on the device, "host" in the host's memory, "disk" in a file, "sharded" over ranks.
        unique_rows: with the resident tier, move the rows of a step as the other tiers do, instead of
            training one dense parameter. Tiers then agree bit for bit on a CPU.
        rows: format in which rows are trained; bfloat16 rows are rounded stochastically.
        state: format of the row optimizer's averages.
        initial_rows: folder of a saved network, trained on any tier, whose memories have the same addresses:
            rows begin as they are there, with no optimizer state. It must stay until the run has finished.
            None draws rows from the seed.
        directory: with the disk tier, the folder of the table's file, best on a fast disk; None takes the
            run's own.
        depth: steps that rows are gathered ahead.
        threads: that plan, copy and read rows; None takes one per processor, at most 8; two to serve from the
            host's memory; 64 to read a file through the page cache, as training on disk does.
        cache_rows: with the disk tier, rows kept in memory; None takes a sixteenth of all rows, or what fits
            a quarter of the available memory if that is less.

    Raises:
        UserError: a value outside its range, or a combination that would be ignored.
    """

    tier: Tier = "resident"
    unique_rows: bool = False
    rows: TrainedStorage = "float32"
    state: StateStorage = "float32"
    initial_rows: str | None = None
    directory: str | None = None
    depth: int = 2
    threads: int | None = None
    cache_rows: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("tier", get_args(Tier)),
            ("rows", get_args(TrainedStorage)),
            ("state", get_args(StateStorage)),
        ):
            if (given := getattr(self, name)) not in allowed:
                raise UserError(
                    f"memory.{name} is {given!r}; it must be one of {', '.join(allowed)}."
                    + nearest(str(given), allowed)
                )
        if self.depth < 1:
            raise UserError(f"memory.depth is {self.depth}; it must be at least 1.")
        if self.threads is not None and self.threads < 1:
            raise UserError(f"memory.threads is {self.threads}; it must be at least 1, or null.")
        if self.cache_rows is not None and self.cache_rows < 0:
            raise UserError(f"memory.cache_rows is {self.cache_rows}; it must be 0 or more, or null.")
        if self.directory is not None and self.tier != "disk":
            raise UserError(
                f"memory.directory is {self.directory!r}, but memory.tier is {self.tier}, which has no file; "
                "set memory.tier to disk, or leave memory.directory out."
            )
        if not self.by_record:
            for name, dense in (("rows", "float32"), ("state", "float32"), ("initial_rows", None)):
                if getattr(self, name) != dense:
                    raise UserError(
                        f"memory.{name} is {getattr(self, name)!r}, but a resident table trains as one "
                        f"float32 parameter; set memory.unique_rows to true, or memory.tier to host."
                    )

    @property
    def by_record(self) -> bool:
        """Whether rows move as records, rather than being one dense parameter."""
        return self.tier != "resident" or self.unique_rows

    @property
    def initial_folder(self) -> Path | None:
        """`initial_rows`, with `~` written out."""
        return None if self.initial_rows is None else Path(self.initial_rows).expanduser()

"""A table whose rows live in a store: what a network reads from while it is evaluated.

In training the step hands the network its readings (`RowService.reading`); everything else that runs the
network, evaluation and analysis, asks its tables, and is served here. With rows spread over ranks that takes
all ranks: one that asks alone waits for the others.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from engram_lab.memory.service import RowService


class FarTable(nn.Module):
    """The rows of one memory, read through the service that `connect` gives it; it has no parameters."""

    def __init__(self, memory: int) -> None:
        super().__init__()
        self.memory = memory
        self._service: RowService | None = None

    def connect(self, service: RowService) -> None:
        """Read through `service` from now on."""
        self._service = service

    def begin(self, addresses: Tensor) -> Callable[[], Tensor]:
        """Return what reads the rows at `addresses` [..., H] as of the last step, [..., H * U]."""
        assert self._service is not None, "rows are read before the run has opened its store"
        return partial(self._service.read, self.memory, addresses)

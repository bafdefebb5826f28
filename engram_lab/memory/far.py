"""A table whose rows live in a store: what a network reads from while it is evaluated.

In training the step hands the network its readings (`RowPipeline.reading`); everything else that runs the
network, evaluation and analysis, asks its tables, and is served here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from engram_lab.memory.pipeline import RowPipeline


class FarTable(nn.Module):
    """The rows of one memory, read through the pipeline that `connect` gives it; it has no parameters."""

    def __init__(self, memory: int) -> None:
        super().__init__()
        self.memory = memory
        self._pipeline: RowPipeline | None = None

    def connect(self, pipeline: RowPipeline) -> None:
        """Read through `pipeline` from now on."""
        self._pipeline = pipeline

    def begin(self, addresses: Tensor) -> Callable[[], Tensor]:
        """Return what reads the rows at `addresses` [..., H] as of the last step, [..., H * U]."""
        assert self._pipeline is not None, "rows are read before the run has opened its store"
        return partial(self._pipeline.read, self.memory, addresses)

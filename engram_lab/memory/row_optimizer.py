"""Row optimizers: the tables' rules over the records of the rows that a step reads.

The rules touch only these rows, so a step costs the same whatever the size of the table:

- adam: equals dense Adam without weight decay. A row that went unread is brought up to date when it is read
  next (memory/catch_up.py); dense Adam does that to all rows in every step.
- adagrad: row-wise Adagrad, one sum a row (memory/adagrad.py). A row without a gradient rests in the dense
  rule too, so both are the same.
- sinkhorn: momentum with balanced rows and columns (memory/sinkhorn.py), where the matrix is that of the
  rows of a table that this step reads. This is another rule than the dense one. There, a row that was read
  once has a share in the next hundred steps' matrices and moves on at full size with its old momentum, since
  balancing undoes the momentum's decay; here it rests until it is read again, its momentum decayed by the
  steps missed. And a row is idle here when its norm is small against the rows of the step, not of the table.

All arithmetic is float32. Numbers kept as bfloat16 are rounded once in a step, at random, seeded by (seed,
step, row, column).

Shapes: n records, U row width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from engram_lab.memory import row_kernels_cpu
from engram_lab.memory.catch_up import adam_constants, nodes_for
from engram_lab.memory.layout import RecordLayout
from engram_lab.memory.sinkhorn import STEP_SIZE, balance

CHUNK = 64
"""Steps whose constants are made at once: a few milliseconds."""


class RowOptimizer:
    """The rule `layout.rule` on records in memory or on a GPU; all state is in the records.

    On a CPU, records may be given in parts to several threads (but for sinkhorn's `update`, whose rows depend
    on each other); the bits do not depend on the parts. On a GPU nothing here waits for the device, and all
    calls belong on one stream.

    Args:
        layout: what the records hold.
        betas: Adam's averages of the gradient and of its square.
        eps: addition to the denominator of Adam and Adagrad.
        momentum: averaging of the gradient in the sinkhorn rule.
        rates: learning rate of the tables at any optimizer step from 1 on, also beyond the end of the run.
        seed: of the random rounding to bfloat16.
        first_row: row number at which each table begins, ascending from 0; sinkhorn balances within a table.
        total: adds up a tensor over all ranks, where each updates some of a step's rows.

    Raises:
        ValueError: the layout has no rule.
        UserError: betas with which Adam's catch-up would not end.
    """

    def __init__(
        self,
        layout: RecordLayout,
        *,
        betas: tuple[float, float],
        eps: float,
        momentum: float,
        rates: Callable[[int], float],
        seed: int,
        first_row: Sequence[int] = (0,),
        total: Callable[[Tensor], Tensor] = lambda part: part,
    ) -> None:
        if layout.rule is None:
            raise ValueError("rows without a rule are read only; RecordLayout.decode reads them")
        self.layout, self.betas, self.eps, self.momentum = layout, betas, eps, momentum
        self.rates, self.seed, self.first_row = rates, seed, tuple(first_row)
        self._total = total
        self._nodes = nodes_for(betas) if layout.rule == "adam" else 0
        self._table, self._filled = torch.empty(0, 0), 0
        self._growing = Lock()

    def open(self, records: Tensor, step: int) -> Tensor:
        """Return the weights [n, U] (float32) that `step` computes with: those after the step before it.

        The records stay as they are; `update` catches them up together with its own step, so that bfloat16
        rows are rounded once.
        """
        return self.weights(records, step - 1)

    def weights(self, records: Tensor, step: int) -> Tensor:
        """Return the weights [n, U] (float32) as they are after `step` steps; the records stay as they are.

        Raises ValueError, on a CPU, when a record holds a later step.
        """
        if self.layout.rule != "adam":
            return self.layout.decode(records)
        out = records.new_empty((len(records), self.layout.row_dim), dtype=torch.float32)
        table = self._constants(step, records.device)
        _kernels(records).adam_read(self.layout, records, step, table, self.eps, out)
        return out

    def update(
        self, records: Tensor, ids: Tensor, gradients: Tensor, step: int, scale: Tensor | float = 1.0
    ) -> None:
        """Take `step` in place, on contiguous records (uint8 [n, record_bytes]) of distinct rows.

        `ids` [n] (int64) are the rows' numbers over all tables; `gradients` [n, U] (float32) are multiplied
        by `scale`, a number or a tensor of no dimension on the records' device. Records of zeros with
        gradients of zero may follow the rows; they keep weights of zero and change no other row.

        Raises ValueError, on a CPU, when a record holds this step or a later one.
        """
        layout, kernels = self.layout, _kernels(records)
        start = rounding_start(self.seed, step)
        gradients = gradients.contiguous()
        given = layout, records, ids, gradients, scale
        if layout.rule == "adam":
            table = self._constants(step, records.device)
            kernels.adam_update(*given, step, table, self.betas, self.eps, start)
        elif layout.rule == "adagrad":
            kernels.adagrad_update(*given, self.rates(step), self.eps, start)
        else:
            table = self._constants(step, records.device)
            update = torch.empty_like(gradients)
            kernels.average(*given, step, table, self.momentum, start, update)
            beyond = torch.stack([ids >= first for first in (*self.first_row, torch.iinfo(ids.dtype).max)], 1)
            change = balance(update, beyond[:, :-1].to(update) - beyond[:, 1:].to(update), self._total)
            kernels.move(layout, records, ids, change, -STEP_SIZE * self.rates(step), start)

    def fresh(self, weights: Tensor, out: Tensor) -> None:
        """Write into `out` [n, record_bytes] the records of rows never touched, from `weights` [n, U]."""
        self.layout.encode(weights, out)

    def _constants(self, step: int, device: torch.device) -> Tensor:
        """Return a table of constants with lines for all steps up to `step`, on `device`."""
        with self._growing:
            if self._table.device != device:
                self._table = self._table.to(device)
            while self._filled <= step:
                lines = torch.from_numpy(self._lines(self._filled))
                if self._filled + CHUNK > len(self._table):
                    grown = torch.empty(max(2 * len(self._table), 16 * CHUNK), lines.shape[1], device=device)
                    if self._filled:
                        grown[: self._filled] = self._table[: self._filled]
                    self._table = grown
                if device.type == "cuda":
                    lines = lines.pin_memory()
                self._table[self._filled : self._filled + CHUNK].copy_(lines, non_blocking=True)
                self._filled += CHUNK
            return self._table

    def _lines(self, first: int) -> np.ndarray:
        if self.layout.rule == "adam":
            return adam_constants(
                first, CHUNK, betas=self.betas, eps=self.eps, nodes=self._nodes, rates=self.rates
            )
        powers = np.power(self.momentum, np.arange(first, first + CHUNK), dtype=np.float64)
        return powers.astype(np.float32)[:, None]


def _kernels(records: Tensor) -> ModuleType:
    if records.device.type == "cpu":
        return row_kernels_cpu
    from engram_lab.memory import row_kernels_triton

    return row_kernels_triton


def rounding_start(seed: int, step: int) -> int:
    """Return the 32 bits that stand for seed and step in the random rounding."""
    mixed = 0
    for word in (seed, seed >> 32, step):
        mixed = int(row_kernels_cpu.mix(np.uint32((mixed ^ word) & 0xFFFFFFFF)))
    return mixed

"""The bytes of a record: one table row with everything that belongs to it.

Weights, optimizer state and the step the row was last brought to lie side by side, so that one random access
reads or writes all of it. Stores (memory/stores.py) move records and know nothing of what is inside; this
file is the only one that does.

Shapes: n records, U row width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from engram_lab.errors import UserError, nearest
from engram_lab.memory.resident import FLOAT8_BLOCK, RowStorage, dequantise_float8, quantise_float8

RowRule = Literal["adam", "adagrad", "sinkhorn"]
StateStorage = Literal["float32", "bfloat16"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Field:
    """Where one field lies in a record: `width` elements of `dtype` from byte `offset` on."""

    offset: int
    width: int
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class RecordLayout:
    """Which fields a record has, and where.

    The weights come first, so that a reader of weights alone finds them aligned; every field starts at a
    multiple of its element's size.

    Attributes:
        row_dim: U, width of one row.
        weights: format of the row; the float8 formats are for rows that are read only.
        rule: rule of the row optimizer, whose state the record holds; None for rows that are read only.
        state: format of averages that are as wide as the row. Adagrad's sum is one float32 a row.
        alignment: `record_bytes` is rounded up to a multiple of this, a power of two from 4 (the largest
            element) to 4096. A GPU's widest loads are of 16 bytes; what they gain here was not measured on
            one. On a CPU, float8 rows of 80 values were read in 0.99 times as long with 16 as with 4, and in
            1.09 times as long with 64, all within the spread (benchmarks/results/gather_rows.md).

    Raises:
        UserError: a value outside its range, or float8 rows with a rule.
    """

    row_dim: int
    weights: RowStorage = "float32"
    rule: RowRule | None = "adam"
    state: StateStorage = "float32"
    alignment: int = 16

    def __post_init__(self) -> None:
        for name, allowed in (
            ("weights", get_args(RowStorage)),
            ("rule", (*get_args(RowRule), None)),
            ("state", get_args(StateStorage)),
        ):
            if (given := getattr(self, name)) not in allowed:
                choices = ", ".join(map(str, allowed))
                near = nearest(str(given), [a for a in allowed if a])
                raise UserError(f"The record's {name} is {given!r}; it must be one of {choices}.{near}")
        if self.row_dim < 1:
            raise UserError(f"The record's row_dim is {self.row_dim}; it must be at least 1.")
        if self.alignment not in (4 << i for i in range(11)):
            raise UserError(
                f"The record's alignment is {self.alignment}; it must be a power of two from 4 to 4096."
            )
        if self.rule is not None and self.weights in ("float8", "float8_row"):
            raise UserError(
                f"Rows stored as {self.weights} cannot be trained: steps would be lost in the rounding; "
                f"use float32 or bfloat16 rows, or no rule to read them only."
            )

    @cached_property
    def places(self) -> Mapping[str, Field]:
        """Name, place and type of every field, in the order of their bytes."""
        U, wide = self.row_dim, _DTYPES[self.state]
        fields: list[tuple[str, int, torch.dtype]] = []
        if self.weights in ("float8", "float8_row"):
            blocks = 1 if self.weights == "float8_row" else -(-U // FLOAT8_BLOCK)
            fields += [("codes", U, torch.float8_e4m3fn), ("scales", blocks, torch.int8)]
        else:
            fields += [("weight", U, _DTYPES[self.weights])]
        if self.rule == "adam":
            fields += [("exp_avg", U, wide), ("exp_avg_sq", U, wide)]
        elif self.rule == "sinkhorn":
            fields += [("momentum", U, wide)]
        elif self.rule == "adagrad":
            fields += [("sum_sq", 1, torch.float32)]
        if self.rule in ("adam", "sinkhorn"):  # without a gradient Adagrad does nothing: nothing to catch up
            fields += [("last", 1, torch.int32)]
        places, end = {}, 0
        for name, width, dtype in fields:
            offset = _round_up(end, dtype.itemsize)
            places[name] = Field(offset, width, dtype)
            end = offset + width * dtype.itemsize
        return places

    @cached_property
    def record_bytes(self) -> int:
        """Bytes of one record, padding included."""
        final = list(self.places.values())[-1]
        return _round_up(final.offset + final.width * final.dtype.itemsize, self.alignment)

    def fields(self, records: Tensor) -> dict[str, Tensor]:
        """Return typed views [n, width] of `records`, uint8 [n, record_bytes] on any device.

        "weight" [n, U], or "codes" [n, U] (e4m3) and "scales" [n, blocks] (int8 exponents of two); by rule
        "exp_avg" and "exp_avg_sq" [n, U], "momentum" [n, U] or "sum_sq" [n, 1] (float32); "last" [n, 1]
        (int32), the number of the last step the state includes, for rules that catch up.
        """
        assert records.dtype == torch.uint8, records.dtype
        assert records.shape[1:] == (self.record_bytes,), (tuple(records.shape), self.record_bytes)
        return {
            name: records[:, at.offset : at.offset + at.width * at.dtype.itemsize].view(at.dtype)
            for name, at in self.places.items()
        }

    def encode(self, weights: Tensor, out: Tensor) -> None:
        """Write into `out` [n, record_bytes] the records of rows never touched: `weights` [n, U], zero state.

        Weights are rounded to the nearest value of the stored format.
        """
        out.zero_()
        fields = self.fields(out)
        if "weight" in fields:
            fields["weight"].copy_(weights)
        else:
            codes, exponents = quantise_float8(weights, self._block)
            fields["codes"].copy_(codes.flatten(-2)[:, : self.row_dim])
            fields["scales"].copy_(exponents.squeeze(-1))

    def decode(self, records: Tensor) -> Tensor:
        """Return the weights [n, U] that `records` hold, in float32, without any catching up."""
        fields = self.fields(records)
        if "weight" in fields:
            return fields["weight"].float()
        blocks, U = fields["scales"].shape[1], self.row_dim
        codes = torch.nn.functional.pad(fields["codes"].float(), (0, blocks * self._block - U))
        exponents = fields["scales"].unsqueeze(-1)
        return dequantise_float8(codes.unflatten(-1, (blocks, self._block)), exponents, U)

    @property
    def _block(self) -> int:
        return self.row_dim if self.weights == "float8_row" else FLOAT8_BLOCK

    def describe(self) -> dict[str, Any]:
        """Return plain values that identify the format, for the headers of files."""
        return {**asdict(self), "record_bytes": self.record_bytes}


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple

"""The resident tier: the whole table as one parameter on the device that computes.

Shapes: R rows, H hash heads, U row width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from engram_lab.memory import look_up_triton as kernels
except ImportError:  # torch for CPUs comes without triton
    kernels = None  # type: ignore[assignment]

RowStorage = Literal["float32", "bfloat16", "float8", "float8_row"]
"""How rows are stored for serving; the float8 formats are e4m3 with a power-of-two scale byte per block of 32
values (DeepSeek-V4.1's 256 + 8 bytes) or per row."""
FLOAT8_BLOCK = 32


class Table(Protocol):
    """What a network asks of a table, wherever its rows live."""

    def begin(self, addresses: Tensor) -> Callable[[], Tensor]:
        """Begin to fetch the rows [..., H]; the result waits for them and gives the reading [..., H * U]."""


class ResidentTable(nn.Module):
    """R rows of a given width; calling it with addresses gives the concatenated rows.

    Rows are trained in float32 whatever `storage` says (bfloat16 rows without a master copy stall: 1.0 plus
    a thousand steps of 1e-3 stays 1.0). `storage` rounds what is read, so that a model trains with the rows
    it will be served with; gradients pass the rounding unchanged.
    """

    def __init__(
        self,
        rows: int,
        row_dim: int,
        *,
        storage: RowStorage = "float32",
        trainable: bool = True,
    ):
        super().__init__()
        self.storage = storage
        self.weight = nn.Parameter(torch.empty(rows, row_dim), requires_grad=trainable)
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, addresses: Tensor) -> Tensor:
        """Return [..., H * row_dim] for row numbers [..., H] of any integer type."""
        rows = look_up(addresses, self.weight)
        if self.storage != "float32":
            rows = rows + (round_rows(rows, self.storage) - rows).detach()
        return rows.flatten(-2)

    def begin(self, addresses: Tensor) -> Callable[[], Tensor]:
        """Return what gives `self(addresses)`: nothing has to be fetched ahead from a resident table."""
        return partial(self, addresses)

    @property
    def bytes_per_row(self) -> int:
        """Bytes one row takes as stored for serving, scales included."""
        return stored_bytes(self.weight.shape[1], self.storage)


def look_up(ids: Tensor, weight: Tensor) -> Tensor:
    """Return rows [..., U] of weight [R, U] for ids [...] below R, of any integer type."""
    if weight.is_cuda and kernels is not None:
        return kernels.look_up(weight, ids)
    return F.embedding(ids, weight)


def stored_bytes(row_dim: int, storage: RowStorage) -> int:
    """Bytes of one stored row: 4 or 2 a value, or 1 a value plus the scales."""
    if storage in ("float8", "float8_row"):
        return row_dim + -(-row_dim // _block(row_dim, storage))
    return row_dim * (4 if storage == "float32" else 2)


def _block(row_dim: int, storage: RowStorage) -> int:
    return row_dim if storage == "float8_row" else FLOAT8_BLOCK


def round_rows(rows: Tensor, storage: RowStorage) -> Tensor:
    """Return `rows` rounded to the stored format, in their own dtype."""
    if storage == "bfloat16":
        return rows.to(torch.bfloat16).to(rows.dtype)
    codes, scales = quantise_float8(rows, _block(rows.shape[-1], storage))
    return dequantise_float8(codes, scales, rows.shape[-1]).to(rows.dtype)


def quantise_float8(rows: Tensor, block: int = FLOAT8_BLOCK) -> tuple[Tensor, Tensor]:
    """Return e4m3 codes [..., blocks, block] and power-of-two exponents [..., blocks, 1] (int8) for `rows`.

    The scale of a block is the smallest power of two that brings its largest value below e4m3's 448.
    """
    blocks = -(-rows.shape[-1] // block)
    padded = F.pad(rows.float(), (0, blocks * block - rows.shape[-1])).unflatten(-1, (blocks, block))
    largest = padded.abs().amax(-1, keepdim=True).clamp_min(2.0**-100)
    exponents = torch.ceil(torch.log2(largest / 448.0))
    codes = (padded * torch.exp2(-exponents)).to(torch.float8_e4m3fn)
    return codes, exponents.to(torch.int8)


def dequantise_float8(codes: Tensor, exponents: Tensor, row_dim: int) -> Tensor:
    """Return the float32 rows that `codes` and `exponents` stand for."""
    return (codes.float() * torch.exp2(exponents.float())).flatten(-2)[..., :row_dim]

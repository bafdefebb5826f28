"""Tables of random rows and the modules that read them, for the serving benchmarks."""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor

import torch
from serving_backbone import Backbone, Memory

from engram_lab.memory.host import HostStore
from engram_lab.memory.layout import RecordLayout
from engram_lab.memory.lookup import ServingTable
from engram_lab.memory.stores import DeviceStore, RowStore
from engram_lab.model.engram import Engram, EngramConfig
from engram_lab.model.hashing import NgramHash
from engram_lab.model.torch_hash import TorchNgramHash

FILL_BYTES = 64 << 20
SMALL = 1.3e8
"""Parameters of the table that stays on the device."""


def add_table_options(parser: argparse.ArgumentParser, parameters: float) -> None:
    """Add what describes a table of so many parameters."""
    parser.add_argument("--parameters", type=float, default=parameters, help="of the large table")
    parser.add_argument("--heads", type=int, default=8, help="per order")
    parser.add_argument("--row-dim", type=int, default=80)
    parser.add_argument("--alignment", type=int, default=4, help="of records, bytes")


def layout_of(options: argparse.Namespace) -> RecordLayout:
    """Return the layout of a served float8 row."""
    return RecordLayout(row_dim=options.row_dim, weights="float8", rule=None, alignment=options.alignment)


def engram(options: argparse.Namespace, parameters: float) -> EngramConfig:
    """Return the module whose table has about so many parameters."""
    heads = 2 * options.heads
    return EngramConfig(
        layers=(1,),
        orders=(2, 3),
        heads=options.heads,
        row_dim=options.row_dim,
        rows_per_head=int(parameters / options.row_dim / heads),
        canonical=False,
        row_storage="float8",
    )


def random_records(layout: RecordLayout, rows: int) -> torch.Tensor:
    """Return valid float8 records: codes that are numbers, scales near 2^-6."""
    records = torch.randint(0, 256, (rows, layout.record_bytes), dtype=torch.uint8)
    records &= 0xBF  # no code with all exponent bits set, which would not be a number
    layout.fields(records)["scales"].fill_(-6)
    return records


def fill(store: HostStore | DeviceStore, layout: RecordLayout, threads: int) -> None:
    """Repeat a block of random records over the whole store."""
    rows = min(store.rows, FILL_BYTES // layout.record_bytes)
    block = random_records(layout, rows).to(store.device)

    def copy(first: int) -> None:
        part = store.records[first : first + rows]
        part.copy_(block[: len(part)])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(copy, range(0, store.rows, rows)))


def build_memory(
    config: EngramConfig,
    store: RowStore,
    layout: RecordLayout,
    backbone: Backbone,
    *,
    far: bool,
    few: int,
) -> Memory:
    """Return a module with random weights that reads `store`."""
    shape, device = backbone.shape, backbone.device
    rule = NgramHash.build(config, None, shape.vocab, eos_id=0)
    torch.manual_seed(0)
    module = Engram(config, shape.width)
    assert module.conv is not None
    torch.nn.init.normal_(module.conv.weight, std=0.1)  # so that `check` sees its state
    return Memory(
        rule=rule,
        hash=TorchNgramHash(rule).to(device),
        table=ServingTable(store, layout, device=device, dtype=backbone.dtype, few=few),
        module=module.to(device, backbone.dtype).eval(),
        far=far,
    )

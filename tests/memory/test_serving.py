"""A saved network reads the same rows from every tier."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_networks import save_run

from engram_lab.errors import UserError
from engram_lab.memory import serving
from engram_lab.memory.config import MemoryConfig
from engram_lab.memory.hot_rows import HotRows, hottest
from engram_lab.model.checkpoint import load, save
from engram_lab.model.config import ModelConfig
from engram_lab.model.engram import EngramConfig
from engram_lab.model.initialise import initialise
from engram_lab.model.transformer import Transformer


def close(network: Transformer) -> None:
    for table in network.tables:
        table.close()
        table.store.close()


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float8", "float8_row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_equal_on_every_tier(tmp_path: Path, storage: str, dtype: torch.dtype) -> None:
    engram = EngramConfig(layers=(0, 1), heads=2, row_dim=40, rows_per_head=(50, 300), row_storage=storage)
    network = Transformer(ModelConfig(vocab_size=97, d_model=32, n_layers=2, engram=engram))
    initialise(network, 3)
    save(network.to(dtype), tmp_path / "model", tokenizer_hash="x")
    ids = torch.randint(97, (2, 30))
    expected = load(tmp_path / "model")(ids)
    for memory in (
        MemoryConfig(tier="host"),
        MemoryConfig(tier="disk", directory=str(tmp_path), cache_rows=20),
        MemoryConfig(tier="disk", directory=str(tmp_path), cache_rows=0),
    ):
        served = load(tmp_path / "model", tables=memory)
        assert not any("tables" in name for name, _ in served.named_parameters())
        assert torch.equal(served(ids), expected)
        close(served)
    assert len(list(tmp_path.glob("*.table"))) == 2


@pytest.mark.parametrize(("storage", "taken"), [("float8", 84), ("float8_row", 84), ("bfloat16", 160)])
def test_rows_take_no_more_than_their_values_and_scales(tmp_path: Path, storage: str, taken: int) -> None:
    """100 billion parameters make 84 bytes of a row of 80 matter (docs/serving.md)."""
    engram = EngramConfig(heads=2, row_dim=80, rows_per_head=50, row_storage=storage)
    network = Transformer(ModelConfig(vocab_size=97, d_model=32, n_layers=2, engram=engram))
    initialise(network, 3)
    save(network, tmp_path / "model", tokenizer_hash="x")
    for memory in (MemoryConfig(tier="host"), MemoryConfig(tier="disk", directory=str(tmp_path))):
        served = load(tmp_path / "model", tables=memory)
        assert [table.store.record_bytes for table in served.tables] == [taken]
        close(served)


def test_a_table_on_disk_needs_a_folder(tmp_path: Path) -> None:
    save_run(tmp_path)
    with pytest.raises(UserError, match=r"memory\.directory is not set"):
        load(tmp_path / "model", tables=MemoryConfig(tier="disk"))


def test_a_file_that_was_not_finished_is_written_anew(tmp_path: Path) -> None:
    network, _ = save_run(tmp_path)
    memory = MemoryConfig(tier="disk", directory=str(tmp_path / "rows"))
    close(load(tmp_path / "model", tables=memory))
    (file,) = (tmp_path / "rows").glob("*.table")
    whole = file.read_bytes()
    file.with_name(f"{file.name}.written-1").unlink()  # the mark of a file that is whole
    file.write_bytes(whole[:4096] + bytes(len(whole) - 4096))
    served = load(tmp_path / "model", tables=memory)
    assert file.read_bytes() == whole
    ids = torch.arange(20).unsqueeze(0)
    assert torch.equal(served(ids), network(ids))


def test_logs_of_a_file_that_was_removed_do_not_pass_for_it(tmp_path: Path) -> None:
    network, _ = save_run(tmp_path)
    memory = MemoryConfig(tier="disk", directory=str(tmp_path / "rows"))
    close(load(tmp_path / "model", tables=memory))
    (file,) = (tmp_path / "rows").glob("*.table")
    file.unlink()
    served = load(tmp_path / "model", tables=memory)
    ids = torch.arange(20).unsqueeze(0)
    assert torch.equal(served(ids), network(ids))
    close(served)


def test_of_two_that_want_a_file_one_writes_it_while_the_other_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, _ = save_run(tmp_path)
    memory = MemoryConfig(tier="disk", directory=str(tmp_path / "rows"))
    fill, fills = serving.fill, []

    def slow(*given: Any, **named: Any) -> None:
        fills.append(given)
        time.sleep(0.3)
        fill(*given, **named)

    monkeypatch.setattr(serving, "fill", slow)
    with ThreadPoolExecutor(2) as processes:
        both = [processes.submit(load, tmp_path / "model", tables=memory) for _ in range(2)]
        served = [network.result() for network in both]
    assert len(fills) == len(network.tables)
    ids = torch.arange(20).unsqueeze(0)
    for one in served:
        assert torch.equal(one(ids), network(ids))
        close(one)


def test_other_weights_are_another_file(tmp_path: Path) -> None:
    memory = MemoryConfig(tier="disk", directory=str(tmp_path))
    network, _ = save_run(tmp_path)
    load(tmp_path / "model", tables=memory)
    with torch.no_grad():
        network.tables[0].weight.add_(1)
    save(network, tmp_path / "model", tokenizer_hash="x")
    ids = torch.arange(20).unsqueeze(0)
    assert torch.equal(load(tmp_path / "model", tables=memory)(ids), network(ids))


def test_sharded_tables_do_not_serve(tmp_path: Path) -> None:
    save_run(tmp_path)
    with pytest.raises(UserError, match="sharded"):
        load(tmp_path / "model", tables=MemoryConfig(tier="sharded"))


def test_rows_kept_by_calibration_are_those_the_text_reads_most(tmp_path: Path) -> None:
    save_run(tmp_path)
    network = load(tmp_path / "model", tables=MemoryConfig(tier="host"))
    assert network.hash is not None
    calibration = [torch.full((1, 50), 7), torch.arange(30).unsqueeze(0)]
    table = network.tables[0]
    rows = hottest((network.hash(ids)[0] for ids in calibration), 4)
    assert rows.sort().values.tolist() == network.hash(calibration[0])[0, 0, -1].sort().values.tolist()
    hot = HotRows.load(table.store, rows, table.device)
    expected = torch.empty(4, table.layout.record_bytes, dtype=torch.uint8)
    table.store.read(rows, expected)
    assert torch.equal(hot.records, expected)
    close(network)

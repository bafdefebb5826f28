"""What would stop a run, found before anything of it is written."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from engram_lab.budget import count
from engram_lab.errors import UserError
from engram_lab.memory.config import MemoryConfig
from engram_lab.memory.disk import rows_in_memory
from engram_lab.memory.ledger import Ledger
from engram_lab.memory.room import GIB, available_memory, require_disk
from engram_lab.memory.row_cache import RowCache
from engram_lab.memory.row_checkpoint import RowCheckpoints
from engram_lab.memory.saved_rows import SavedRows
from engram_lab.memory.touched import TouchedRows
from engram_lab.memory.written_log import WrittenLog
from engram_lab.model.checkpoint import canonical_hash, given_rows, read_record, table_sizes
from engram_lab.model.hashing import ADDRESS_FIELDS, HASH_VERSION, NgramHash
from engram_lab.recipe import ResolvedRun, run_directory
from engram_lab.text import TokenCorpus
from engram_lab.training.data import EngramDataModule
from engram_lab.training.rows import moves_records, record_layout
from engram_lab.training.trainer import build_trainer, quiet


def preflight(run: ResolvedRun, corpus: TokenCorpus) -> None:
    """Find what would stop the run before anything of it is written.

    Raises:
        UserError: too few tokens, too little memory or disk, devices that do not exist, settings that
            contradict each other.
    """
    recipe = run.recipe
    EngramDataModule(recipe.data, corpus, None, seed=recipe.seed)
    _check_rows(run)
    _check_initial_rows(run, corpus)
    with quiet():
        trainer = build_trainer(
            recipe.trainer, steps=1, evaluate_every=None, callbacks=(), logger=None, progress_bar=None
        )
    _require_disk(run)
    _require_memory(run, trainer)
    _check_processes(run, trainer)
    micro_batches = trainer.world_size * trainer.accumulate_grad_batches
    if recipe.data.batch_size % micro_batches:
        raise UserError(
            f"data.batch_size is {recipe.data.batch_size}; it must be a multiple of devices x accumulated "
            f"micro-batches, {trainer.world_size} x {trainer.accumulate_grad_batches}."
        )


def _check_rows(run: ResolvedRun) -> None:
    engram, memory = run.network.engram, run.recipe.memory
    if memory.by_record and engram is not None and engram.module == "product_key":
        raise UserError(
            f"memory.tier is {memory.tier}, but model.engram.module product_key finds its rows by content, "
            "which only a resident table can; leave the section memory out."
        )


def _check_initial_rows(run: ResolvedRun, corpus: TokenCorpus) -> None:
    """Refuse rows that were trained for other n-grams: they would be read for the wrong ones, silently."""
    given, engram = run.recipe.memory.initial_folder, run.network.engram
    if given is None:
        return
    if engram is None or not engram.n_heads:
        raise UserError(
            f"memory.initial_rows is '{given}', but the network reads no table by n-gram; leave it out."
        )
    saved, record = given_rows(given), read_record(given)
    try:
        saved.require(table_sizes(engram), engram.row_dim)
    except UserError as error:
        fields = "model.engram's tables (layers, orders, heads, row_dim, rows_per_head; budget.rho, if given)"
        raise UserError(f"memory.initial_rows needs {fields} as in that network. {error}") from error
    if isinstance(saved, SavedRows) and saved.digest != record.rows_digest:
        raise UserError(
            f"memory.initial_rows is '{given}', whose table rows are not those of the network saved there; "
            "restore what was saved."
        )
    if record.hash_version != HASH_VERSION:
        raise UserError(
            f"memory.initial_rows is '{given}', trained with hash version {record.hash_version}, but this is "
            f"version {HASH_VERSION}, which reads other rows; use the version it was trained with."
        )
    hash = NgramHash.build(engram, corpus.canonical, corpus.vocab_size, corpus.eos_id)
    here = replace(
        record,
        network=run.network,
        eos_id=corpus.eos_id,
        tokenizer_hash=corpus.tokenizer_hash,
        canonical_hash=canonical_hash(hash.canonical),
    )
    if record.address_digest != here.digest():
        raise UserError(
            f"memory.initial_rows is '{given}', whose rows were trained for other n-grams; the tokenizer and "
            f"model.engram's {', '.join(ADDRESS_FIELDS)} must be those of that network."
        )


def _check_processes(run: ResolvedRun, trainer: Trainer) -> None:
    memory = run.recipe.memory
    if trainer.world_size == 1 or not moves_records(run):
        return
    if memory.tier != "sharded":
        asked = "memory.unique_rows is true" if memory.unique_rows else f"memory.tier is {memory.tier}"
        raise UserError(
            f"{asked}, whose rows one process trains, but there are to be {trainer.world_size}; set "
            "memory.tier to sharded, or trainer.devices to 1."
        )
    if isinstance(trainer.strategy, ModelParallelStrategy):
        raise UserError(
            "memory.tier is sharded, which does not yet work with ModelParallelStrategy; set "
            "trainer.strategy to ddp."
        )


def _require_memory(run: ResolvedRun, trainer: Trainer) -> None:
    parameters, slots = count(run.network).everything, run.allocation.slots
    needed, elsewhere = 4 * parameters, ""
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if moves_records(run):
        engram, memory = run.network.engram, run.recipe.memory
        assert engram is not None
        record = record_layout(memory, engram, run.recipe.optimizer).record_bytes
        here, of = trainer.num_devices, trainer.world_size  # processes of this machine, and of all
        needed += bytes_beside_records(memory, slots, here, of) - 4 * slots * engram.row_dim
        available = available_memory()
        if memory.tier == "disk":
            if kept := rows_in_memory(slots, record, memory.cache_rows):
                needed += RowCache.memory_bytes(kept, record)
            elsewhere = ", or lower memory.cache_rows"
        elif memory.tier == "host" or trainer.strategy.root_device.type == "cpu":
            needed += -(-slots * here // of) * record
            elsewhere = ", or set memory.tier to disk"
    if needed > available:
        raise UserError(
            f"the network has {parameters:,} parameters, {slots:,} rows of memory among them, which with all "
            f"that is kept of a row need {needed / GIB:,.1f} GiB of memory, but {available / GIB:,.1f} GiB "
            f"are available; lower model.engram.rows_per_head or model.ffn.experts{elsewhere}."
        )


def bytes_beside_records(memory: MemoryConfig, rows: int, here: int, processes: int) -> int:
    """Return the bytes of the host's memory that a run comes to keep of its rows beside their records.

    They are taken as rows are read, most of them after the records have been filled, wherever those are.

    Args:
        memory: says the tier.
        rows: of all tables.
        here: processes on this machine.
        processes: on all machines, over which the rows are spread.
    """
    each = TouchedRows.memory_bytes(rows) + RowCheckpoints.memory_bytes(rows)
    if memory.tier == "disk":
        each += WrittenLog.memory_bytes(rows)
    return here * (each + Ledger.memory_bytes(-(-rows // processes)))


def _require_disk(run: ResolvedRun) -> None:
    """Refuse a table's file that its folder has no room for, or a folder that cannot be one."""
    memory, engram = run.recipe.memory, run.network.engram
    if memory.tier != "disk" or engram is None:
        return
    folder = Path(memory.directory or run_directory(run.recipe, run.identity))
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        raise UserError(
            f"memory.directory is '{memory.directory}', but '{there}' is no folder; choose another "
            "memory.directory."
        )
    if not (folder / f"{run.identity}.table").exists():  # else it has its room
        needed = run.allocation.slots * record_layout(memory, engram, run.recipe.optimizer).record_bytes
        require_disk(needed, there, "choose another memory.directory, or lower model.engram.rows_per_head")

"""Fitting one run: what is built, from where it continues, and what is kept."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from engram_lab.budget import count
from engram_lab.errors import UserError
from engram_lab.files import write_atomically
from engram_lab.model.checkpoint import save
from engram_lab.model.hashing import NgramHash
from engram_lab.recipe import ResolvedRun
from engram_lab.text import TokenCorpus
from engram_lab.text.shards import TOKENIZER
from engram_lab.tracking import RunRecord
from engram_lab.training.callbacks import (
    Checkpoints,
    FlushBeforeCheckpoint,
    MemoryHealth,
    Progress,
    StepLog,
    StopRequest,
)
from engram_lab.training.data import EngramDataModule
from engram_lab.training.execution import gather
from engram_lab.training.module import EngramModule
from engram_lab.training.rows import TableRows, record_layout
from engram_lab.training.trainer import build_trainer


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a finished run leaves behind.

    Args:
        identity: the run's identity.
        loss: final validation loss, nats a token.
        bits_per_byte: the same in bits a byte of text.
        steps: optimizer steps.
        tokens: training tokens.
        seconds: time spent training and evaluating, over all its sittings.
        reused: it was finished before, and nothing was trained.
    """

    identity: str
    loss: float
    bits_per_byte: float
    steps: int
    tokens: int
    seconds: float
    reused: bool = False


def preflight(run: ResolvedRun, corpus: TokenCorpus) -> None:
    """Find what would stop the run before anything of it is written.

    Raises:
        UserError: too few tokens, devices that do not exist, settings that contradict each other.
    """
    recipe = run.recipe
    EngramDataModule(recipe.data, corpus, None, seed=recipe.seed)
    _require_memory(run)
    with _quiet():
        trainer = build_trainer(
            recipe.trainer, steps=1, evaluate_every=None, callbacks=(), logger=None, progress_bar=False
        )
    if trainer.world_size > 1 and moves_records(run) and recipe.memory.tier != "sharded":
        unique = recipe.memory.unique_rows
        asked = "memory.unique_rows is true" if unique else f"memory.tier is {recipe.memory.tier}"
        raise UserError(
            f"{asked}, whose rows one process trains, but there are to be {trainer.world_size}; set "
            "memory.tier to sharded, or trainer.devices to 1."
        )
    micro_batches = trainer.world_size * trainer.accumulate_grad_batches
    if recipe.data.batch_size % micro_batches:
        raise UserError(
            f"data.batch_size is {recipe.data.batch_size}; it must be a multiple of devices x accumulated "
            f"micro-batches, {trainer.world_size} x {trainer.accumulate_grad_batches}."
        )


def fit(
    run: ResolvedRun,
    corpus: TokenCorpus,
    directory: Path,
    record: RunRecord | None,
    observer: Callable[[Progress], None] | None,
    stop: StopRequest | None,
    progress_bar: bool,
) -> RunResult:
    """Train the run from its last checkpoint on, evaluate it, and keep weights and result in its folder.

    Args:
        run: what to train.
        corpus: the text it is trained on.
        directory: the run's folder.
        record: where metrics go; None on all processes but the first.
        observer: called with the run's progress.
        stop: asked between steps.
        progress_bar: show Lightning's bar.

    Raises:
        Diverged: the loss became NaN or infinite.
        Interrupted: stopped on request, after saving a checkpoint where one process trains.
        UserError: the checkpoint does not fit this version of the code.
    """
    recipe, network, config = run.recipe, run.network, run.recipe.data
    stop = stop or StopRequest()
    checkpoints = directory / "checkpoints"
    engram = network.engram
    hash = None
    if engram is not None:
        hash = NgramHash.build(engram, corpus.canonical, corpus.vocab_size, corpus.eos_id)
    log_every = recipe.trainer.get("log_every_n_steps") or 10
    rows = _table_rows(run, directory, log_every)
    with contextlib.nullcontext() if rows is None else contextlib.closing(rows):
        module = EngramModule(
            network,
            recipe.optimizer,
            corpus,
            total_steps=config.steps,
            seed=recipe.seed,
            rows=rows,
            execution=recipe.execution,
        )
        data = EngramDataModule(config, corpus, hash, seed=recipe.seed, rows=rows)
        interval = -(-config.steps // (config.evaluations + 1)) if config.evaluations else None
        before = _seconds_so_far(directory)
        started = time.perf_counter()
        with stop.listening(), _quiet():
            trainer = build_trainer(
                recipe.trainer,
                steps=config.steps,
                evaluate_every=interval,
                callbacks=[
                    StepLog(
                        every=log_every,
                        steps=config.steps,
                        tokens_per_step=config.tokens_per_step,
                        observer=observer,
                    ),
                    *([] if rows is None else [rows]),
                    MemoryHealth(),
                    FlushBeforeCheckpoint(),
                    Checkpoints(
                        checkpoints,
                        every=recipe.checkpoint_every_n_steps,
                        evaluate_every=interval,
                        request=stop,
                        committed=None if rows is None else rows.committed,
                    ),
                ],
                logger=record.logger() if record is not None else None,
                progress_bar=progress_bar,
            )
            try:
                checkpoint = latest_checkpoint(directory)
                try:
                    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
                except RuntimeError as error:
                    if checkpoint is not None and "loading state_dict" in str(error):
                        raise UserError(
                            f"{checkpoint} was written by another version of the code and does not fit this "
                            "one; go back to that version, or delete the file to train the run anew."
                        ) from error
                    raise
                if module.evaluated is None or module.evaluated[0] != config.steps:
                    trainer.validate(module, data, verbose=False)
            finally:
                seconds = before + time.perf_counter() - started
                if trainer.is_global_zero:
                    write_atomically(directory / "seconds", f"{seconds:.3f}\n")
        gather(module.net)
        assert module.evaluated is not None
        numbers = module.evaluated[1]
        result = RunResult(
            identity=run.identity,
            loss=numbers["val/loss"],
            bits_per_byte=numbers["val/bits_per_byte"],
            steps=config.steps,
            tokens=run.tokens,
            seconds=seconds,
        )
        if trainer.is_global_zero:
            save(
                module.net,
                directory / "model",
                tokenizer_hash=corpus.tokenizer_hash,
                rows=None if rows is None else rows.export,
            )
            shutil.copyfile(corpus.path / TOKENIZER, directory / "model" / TOKENIZER)
            write_atomically(directory / "result.json", json.dumps(asdict(result), indent=1))
            for file in checkpoints.glob("*.ckpt"):
                file.unlink()
            if rows is not None:
                rows.discard()
        elif rows is not None:
            rows.export(directory / "model")  # hands this rank's rows to the first one's `save`
        return result


def latest_checkpoint(directory: Path) -> Path | None:
    """The checkpoint with the most steps; all are whole, since they are written aside and renamed."""
    files = list((directory / "checkpoints").glob("step=*.ckpt"))
    return max(files, key=lambda f: int(f.stem.split("=")[1]), default=None)


def _require_memory(run: ResolvedRun) -> None:
    parameters, slots = count(run.network).everything, run.allocation.slots
    needed, elsewhere = 4 * parameters, ""
    if moves_records(run):
        engram, memory = run.network.engram, run.recipe.memory
        assert engram is not None
        record = record_layout(memory, engram, run.recipe.optimizer).record_bytes
        needed -= 4 * slots * engram.row_dim
        if memory.tier != "disk":
            needed += slots * record
            elsewhere = ", or set memory.tier to disk"
    present = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > present:
        raise UserError(
            f"the network has {parameters:,} parameters, {slots:,} rows of memory among them, which take "
            f"{needed / 2**30:,.0f} GiB, and this machine has {present / 2**30:,.0f} GiB; lower "
            f"model.engram.rows_per_head or model.ffn.experts{elsewhere}."
        )


def _table_rows(run: ResolvedRun, directory: Path, log_every: int) -> TableRows | None:
    """The run's rows, where they move as records."""
    if not moves_records(run):
        return None
    recipe, engram = run.recipe, run.network.engram
    assert engram is not None
    return TableRows(
        recipe.memory,
        engram,
        recipe.optimizer,
        total_steps=recipe.data.steps,
        seed=recipe.seed,
        directory=directory,
        identity=run.identity,
        every=log_every,
    )


def moves_records(run: ResolvedRun) -> bool:
    """Whether the run has table rows that move as records."""
    engram = run.network.engram
    if engram is not None and engram.module == "product_key" and run.recipe.memory.by_record:
        raise UserError(
            f"memory.tier is {run.recipe.memory.tier}, but model.engram.module product_key finds its rows by "
            "content, which only a resident table can; leave the section memory out."
        )
    return engram is not None and engram.n_heads > 0 and run.recipe.memory.by_record


def _seconds_so_far(directory: Path) -> float:
    file = directory / "seconds"
    return float(file.read_text()) if file.exists() else 0.0


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence Lightning's banners and tips, and those warnings, named one by one, that are wrong here."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        # Addresses are computed in the loader on purpose, and on two cores more loader processes cost speed.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        # StepLog has an interval of its own and logs the last step always.
        warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # of torch's own, below Lightning
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)

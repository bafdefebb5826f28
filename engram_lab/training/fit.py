"""Fitting one run: what is built, from where it continues, and what is kept."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from engram_lab.errors import UserError
from engram_lab.files import write_atomically
from engram_lab.model.checkpoint import save
from engram_lab.model.hashing import NgramHash
from engram_lab.recipe import ResolvedRun
from engram_lab.text import TokenCorpus
from engram_lab.text.shards import TOKENIZER
from engram_lab.tracking import RunRecord
from engram_lab.training.callbacks import (
    FlushBeforeCheckpoint,
    MemoryHealth,
    Progress,
    StepLog,
    StopRequest,
)
from engram_lab.training.checkpoint_file import require_whole
from engram_lab.training.checkpoints import Checkpoints
from engram_lab.training.data import EngramDataModule
from engram_lab.training.execution import gather
from engram_lab.training.module import EngramModule
from engram_lab.training.progress import progress_bar
from engram_lab.training.rows import TableRows, moves_records
from engram_lab.training.trainer import build_trainer, quiet


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


def fit(
    run: ResolvedRun,
    corpus: TokenCorpus,
    directory: Path,
    record: RunRecord | None,
    observer: Callable[[Progress], None] | None,
    stop: StopRequest | None,
    show_progress: bool,
) -> RunResult:
    """Train the run from its last checkpoint on, evaluate it, and keep weights and result in its folder.

    Args:
        run: what to train.
        corpus: the text it is trained on.
        directory: the run's folder.
        record: where metrics go; None on all processes but the first.
        observer: called with the run's progress.
        stop: asked between steps.
        show_progress: print how far the run is, as a bar or in lines.

    Raises:
        Diverged: the loss became NaN or infinite.
        Interrupted: stopped on request, after saving a checkpoint.
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
        log = StepLog(
            every=log_every,
            steps=config.steps,
            tokens_per_step=config.tokens_per_step,
            observer=observer,
        )
        with stop.listening(), quiet():
            trainer = build_trainer(
                recipe.trainer,
                steps=config.steps,
                evaluate_every=interval,
                callbacks=[
                    log,
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
                progress_bar=progress_bar(log, interval) if show_progress else None,
            )
            try:
                checkpoint = latest_checkpoint(directory)
                if checkpoint is not None:
                    require_whole(checkpoint)
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
                    # On a full disk the clock stands still; why the run ends is what must be told.
                    with contextlib.suppress(OSError):
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
    """The checkpoint with the most steps; all were whole once they had their names (see `WholeFile`)."""
    files = list((directory / "checkpoints").glob("step=*.ckpt"))
    return max(files, key=lambda f: int(f.stem.split("=")[1]), default=None)


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


def _seconds_so_far(directory: Path) -> float:
    try:
        return float((directory / "seconds").read_text())
    except (OSError, ValueError):  # no run begun here, or a damaged file: a statistic is not worth the run
        return 0.0

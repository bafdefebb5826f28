"""One training run from recipe to recorded result: prepare, resume, fit, evaluate, keep.

A run lives in `<tracking.directory>/runs/<identity>/`: its recipe, its checkpoints while it trains, its
weights and result once it has finished. The identity decides what is resumed and what is reused.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from lightning.pytorch.utilities.exceptions import SIGTERMException

from engram_lab import tracking
from engram_lab.errors import UserError
from engram_lab.files import write_atomically
from engram_lab.processes import process_rank
from engram_lab.recipe import Recipe, ResolvedRun, resolve, run_directory
from engram_lab.text import TokenCorpus, prepare
from engram_lab.training.callbacks import Interrupted, Progress, StopRequest
from engram_lab.training.fit import RunResult, fit
from engram_lab.training.module import Diverged
from engram_lab.training.preflight import preflight
from engram_lab.training.together import following, leading


def columns(run: ResolvedRun, extra: Mapping[str, Any]) -> dict[str, Any]:
    """What is recorded of a run beside its loss, by the names of `scaling.schema`; nulls are left out."""
    a = run.allocation
    values = {
        "run": run.identity,
        "study": run.recipe.name,
        "sweep": "",
        "control": "",
        "budget": a.flops_per_token * run.tokens,
        "rho": a.rho,
        "rho_nominal": a.rho_nominal,
        "slots": a.slots,
        "memory_parameters": a.memory_parameters,
        "total_parameters": a.total_parameters,
        "active_parameters": a.active_parameters,
        "sparse_parameters": a.sparse_parameters,
        "experts": a.experts,
        "top_k": a.top_k,
        "tokens": run.tokens,
        "seed": run.recipe.seed,
        "flops_per_token": a.flops_per_token,
        "total_mismatch": a.total_mismatch,
        "flops_mismatch": a.flops_mismatch,
        "budget_mode": run.recipe.budget.mode,
        **extra,
    }
    return {name: value for name, value in values.items() if value is not None}


def parameters(run: ResolvedRun) -> dict[str, Any]:
    """What MLflow lists as a run's parameters: the recipe's fields, and below `allocation` the solved cell.

    `model.ffn.experts` is the recipe's count, at rho = 1; `allocation.experts` is the network's. Where the
    run is recorded is left out: it says nothing about the run, and an address may hold a password.
    """
    a, engram = run.allocation, run.network.engram
    fields = {name: value for name, value in run.recipe.to_dict().items() if name != "tracking"}
    fields["allocation"] = {
        "rho": a.rho,
        "experts": a.experts,
        "rows_per_head": engram.rows_per_head if engram is not None and engram.n_heads else 0,
        "slots": a.slots,
        "memory_parameters": a.memory_parameters,
        "sparse_parameters": a.sparse_parameters,
        "active_parameters": a.active_parameters,
        "total_parameters": a.total_parameters,
        "flops_per_token": a.flops_per_token,
    }
    return fields


def train(
    recipe: Recipe,
    *,
    corpus: TokenCorpus | None = None,
    label: str | None = None,
    tags: Mapping[str, Any] | None = None,
    parent_run: str | None = None,
    observer: Callable[[Progress], None] | None = None,
    stop: StopRequest | None = None,
    progress_bar: bool = True,
) -> RunResult:
    """Run the recipe once, or continue it, or return its result if it has one.

    Args:
        recipe: a recipe of kind `train`.
        corpus: the opened token shards, when the caller has them.
        label: the run's name in MLflow; for people only.
        tags: columns that replace or extend those of the recipe (study, sweep, control).
        parent_run: MLflow run of the study this is a trial of.
        observer: called with the run's progress, at its start and whenever a step is logged.
        stop: asked between steps; signals set it too.
        progress_bar: print how far the run is: Lightning's bar on a terminal, else a line now and then.

    Raises:
        Diverged: the loss became NaN or infinite; the run is marked failed.
        KeyboardInterrupt: stopped on request; the next call continues from the checkpoint.
        UserError: what the recipe asks for cannot be done here.
    """
    corpus = corpus or prepare(recipe.text)
    run = resolve(recipe, corpus)
    preflight(run, corpus)
    directory = run_directory(recipe, run.identity)
    rank = process_rank()
    described = columns(run, {"data_hash": corpus.data_hash, **(tags or {})})
    if rank:
        with following(directory, rank):
            return fit(run, corpus, directory, None, observer, stop, progress_bar)
    with _claimed(directory):
        known = read_result(directory)
        record = tracking.open_run(
            recipe.tracking.uri,
            str(described["study"]),
            run.identity,
            name=label or recipe.name,
            tags=described,
            parent=parent_run,
            artifact_root=Path(recipe.tracking.directory) / "artifacts",
        )
        if known is not None:
            _record_result(record, known)
            record.log_params(parameters(run))
            return known
        resolved = yaml.safe_dump(run.recipe.to_dict(), sort_keys=False)
        write_atomically(directory / "recipe.yaml", resolved)
        try:
            record.log_params(parameters(run))
            record.log_text(resolved, "recipe.yaml")
            with leading(directory, record.fail):
                result = fit(run, corpus, directory, record, observer, stop, progress_bar)
        except Diverged as error:
            record.fail(f"diverged: {error}")
            raise
        except SIGTERMException:  # before training began; it would end the process with status 0
            record.interrupt("stopped by SIGTERM")
            raise KeyboardInterrupt("stopped by SIGTERM") from None
        except (Interrupted, KeyboardInterrupt) as error:
            record.interrupt(str(error) or "interrupted")
            raise KeyboardInterrupt(str(error)) from None
        except BaseException as error:
            if isinstance(
                error.__context__, KeyboardInterrupt
            ):  # a second Ctrl-C, which Lightning makes an exit
                record.interrupt("interrupted at once")
                raise KeyboardInterrupt from None
            record.fail(f"{type(error).__name__}: {error}".splitlines()[0])
            raise
        _record_result(record, result)
        return result


def _record_result(record: tracking.RunRecord, result: RunResult) -> None:
    record.log_values({"final/bits_per_byte": result.bits_per_byte, "final/seconds": result.seconds})
    record.finish(result.loss)


def read_result(directory: Path) -> RunResult | None:
    """The result of a finished run, marked as reused, or None; UserError where it cannot be read."""
    file = directory / "result.json"
    try:
        return RunResult(**(json.loads(file.read_text(encoding="utf-8")) | {"reused": True}))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}.") from error
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{file} is damaged; put back what was saved, or remove the file to train the run on from its "
            "last checkpoint, or anew where it has none."
        ) from error


@contextlib.contextmanager
def _claimed(directory: Path) -> Iterator[None]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the run's folder {directory} cannot be made: {error.strerror}.") from error
    try:
        with FileLock(directory / "lock", timeout=1):  # a listing holds it for an instant
            yield
    except Timeout:
        raise UserError(
            f"this run is being trained by another process, which holds {directory / 'lock'}; "
            "wait for it, or end it."
        ) from None

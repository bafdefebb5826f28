"""Lightning's Trainer from the plain values of a recipe."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import StrategyRegistry

from engram_lab.errors import UserError, nearest
from engram_lab.launcher import refuse_lone_processes
from engram_lab.training.checkpoint_file import WholeFile

# Settings that follow from other fields of the recipe; the sentence says from which.
DERIVED = {
    "max_steps": "it follows from data.tokens",
    "max_epochs": "it follows from data.tokens",
    "min_steps": "it follows from data.tokens",
    "min_epochs": "it follows from data.tokens",
    "max_time": "a run is as long as data.tokens says",
    "val_check_interval": "it follows from data.evaluations",
    "check_val_every_n_epoch": "it follows from data.evaluations",
    "limit_val_batches": "it follows from data.validation_tokens",
    "limit_train_batches": "it follows from data.tokens",
    "fast_dev_run": "give a trial fewer data.tokens",
    "overfit_batches": "set data.tokens and data.repeat",
    "gradient_clip_val": "set optimizer.gradient_clip",
    "gradient_clip_algorithm": "optimizer.gradient_clip clips by norm",
    "logger": "set tracking.uri",
    "reload_dataloaders_every_n_epochs": "the data module keeps its own place",
}

PRECISIONS = ("32-true", "bf16-mixed")
"""Weights and table rows are float32. Float16 would need scaled losses, which rows do not know of."""


@functools.cache
def _parser() -> LightningArgumentParser:
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(Trainer, "trainer")
    return parser


def build_trainer(
    settings: Mapping[str, Any],
    *,
    steps: int,
    evaluate_every: int | None,
    callbacks: Sequence[Callback],
    logger: Logger | None,
    progress_bar: ProgressBar | None,
) -> Trainer:
    """Build the Trainer of one run.

    Args:
        settings: plain values, classes as `{class_path, init_args}` as LightningCLI spells them.
        steps: optimizer steps.
        evaluate_every: optimizer steps between evaluations, or None for none during training.
        callbacks: come before those of `settings`.
        logger: where metrics go.
        progress_bar: what shows how far the run is, unless `settings` have such a callback; or None.

    Raises:
        UserError: a setting that follows from another field, devices or a strategy that do not exist, a
            precision that training has not, or processes started by a launcher that would each train alone.
    """
    for name, value in settings.items():
        if name in DERIVED and value is not None:
            raise UserError(f"trainer.{name} cannot be set: {DERIVED[name]}.")
    parser = _parser()
    given = {name: value for name, value in settings.items() if value is not None}
    parsed = parser.instantiate(parser.parse_object({"trainer": given})).trainer
    # Only what was given: the launcher's PL_TRAINER_* variables are defaults for the rest.
    values = {name: parsed[name] for name in given}
    _check_strategy(values.get("strategy"))
    _check_devices(values.get("devices"), on_cpu=values.get("accelerator") == "cpu")
    accumulated = values.get("accumulate_grad_batches", 1)
    if "precision" not in values and "PL_TRAINER_PRECISION" not in os.environ:
        accelerator = values.get("accelerator", os.environ.get("PL_TRAINER_ACCELERATOR", "auto"))
        on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        values["precision"] = "bf16-mixed" if on_gpu else "32-true"
    own = [*callbacks, *(values.get("callbacks") or [])]
    plugins = values.get("plugins") or []
    plugins = [*plugins] if isinstance(plugins, (list, tuple)) else [plugins]
    if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        plugins.append(WholeFile())
    shown = progress_bar is not None and values.get("enable_progress_bar") is not False
    if progress_bar is not None and shown and not any(isinstance(c, ProgressBar) for c in own):
        own.append(progress_bar)
    values |= {
        "max_steps": steps,
        "max_epochs": -1,
        "val_check_interval": evaluate_every * accumulated if evaluate_every else None,
        "check_val_every_n_epoch": None if evaluate_every else 1_000_000_000,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "enable_checkpointing": True,
        "enable_model_summary": False,
        "enable_progress_bar": shown,
        "logger": logger if logger is not None else False,
        "callbacks": own,
        "plugins": plugins,
    }
    try:
        trainer = Trainer(**values)
    except (MisconfigurationException, TypeError, ValueError, RuntimeError, ImportError) as error:
        asked = {
            k: settings[k] for k in ("accelerator", "devices", "strategy", "num_nodes") if settings.get(k)
        }
        raise UserError(f"the trainer cannot be set up with {asked}: {str(error).splitlines()[0]}") from error
    if trainer.precision not in PRECISIONS:
        raise UserError(
            f"trainer.precision is {trainer.precision}; it must be {' or '.join(PRECISIONS)}: weights and "
            "table rows are float32, and losses are not scaled." + nearest(trainer.precision, PRECISIONS)
        )
    if getattr(trainer.strategy, "_save_distributed_checkpoint", False):
        raise UserError(
            "trainer.strategy would write every checkpoint as a folder of shards; set its "
            "init_args.save_distributed_checkpoint to false."
        )
    refuse_lone_processes(trainer.world_size)
    return trainer


def _check_strategy(name: Any) -> None:
    """Refuse a name that Lightning does not know; a class is for the parser to judge."""
    known = ["auto", *StrategyRegistry.available_strategies()]
    if not isinstance(name, str) or name.lower() in known:
        return
    # Of ddp, ddp_spawn, ddp_fork, ... the first says enough.
    families = [one for one in known if not any(one.startswith(f"{other}_") for other in known)]
    raise UserError(
        f"trainer.strategy is {name!r}; it must be one of {', '.join(families)}, a variant like ddp_spawn, "
        "or a class as {class_path: ...}." + nearest(name.lower(), known)
    )


def _check_devices(devices: Any, *, on_cpu: bool) -> None:
    """Refuse what is no number of devices; of GPUs also a list of their numbers, or -1, is one."""
    listed = isinstance(devices, list) or "," in str(devices)
    numbers = devices if isinstance(devices, list) else [n for n in str(devices).split(",") if n]
    if numbers and all(str(number).strip().isdecimal() for number in numbers):
        right = not on_cpu if listed else int(numbers[0]) > 0
    else:
        right = devices in (None, "auto") or (str(devices) == "-1" and not on_cpu)
    if right:
        return
    allowed = (
        "auto or a number above 0" if on_cpu else "auto, a number above 0, -1 for all, or a list like [0, 3]"
    )
    raise UserError(
        f"trainer.devices is {devices}; it must be {allowed}."
        + (nearest(str(devices), ["auto"]) or f" Did you mean {max(1, len(numbers))}?")
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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

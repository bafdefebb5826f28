"""What happens beside the step: logging, memory health, progress, and being asked to stop."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from engram_lab.analysis.health import memory_health
from engram_lab.tracking.logger import BufferedMLFlowLogger
from engram_lab.training.data import never_empty
from engram_lab.training.module import EngramModule


class Interrupted(Exception):
    """The run was asked to stop; it can be resumed from its last checkpoint."""


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Args:
        step: optimizer steps done.
        steps: optimizer steps of the run.
        tokens_per_second: training speed since the last report, evaluations left out; 0 before the first.
        loss: training loss of the last logged batch in nats, or nan.
    """

    step: int
    steps: int
    tokens_per_second: float
    loss: float


@dataclass(frozen=True)
class _Reading:
    """Numbers of one step on their way from the device.

    Args:
        step: optimizer steps done.
        numbers: training loss and gradient norm, [2] on the CPU.
        arrived: happens when they are there; None if they are.
        rates: learning rates by metric.
    """

    step: int
    numbers: torch.Tensor
    arrived: torch.cuda.Event | None
    rates: dict[str, float]


class StepLog(Callback):
    """Log loss, learning rate, gradient norm and speed every `every` steps, and report progress.

    A GPU's numbers are read while it computes the step that follows, so that it never waits for the host;
    before an evaluation, a checkpoint and the end they are read at once.
    """

    def __init__(
        self,
        *,
        every: int,
        steps: int,
        tokens_per_step: int,
        observer: Callable[[Progress], None] | None = None,
    ) -> None:
        self.every, self.steps, self.tokens_per_step, self.observer = every, steps, tokens_per_step, observer
        self._since = 0.0
        self._first = 0
        self._batch_loss = torch.tensor(0.0)
        self._reading: _Reading | None = None
        self.latest: Progress | None = None  # as last reported of a step of this sitting

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock and say where the run stands."""
        self._since, self._first = time.perf_counter(), trainer.global_step
        if self.observer:
            self.observer(Progress(trainer.global_step, self.steps, 0.0, float("nan")))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what is on its way."""
        self._log(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the evaluation out of the speed."""
        self._since, self._first = time.perf_counter(), trainer.global_step

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Log what is on its way: a run that continues from here will not."""
        self._log(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read at every `every`-th optimizer step and at the last."""
        self._log(trainer, pl_module)
        step = trainer.global_step
        micro_batch = batch_idx % trainer.accumulate_grad_batches
        part = outputs["loss"].detach()  # Lightning has divided it by the number of micro-batches
        self._batch_loss = part if micro_batch == 0 else self._batch_loss + part
        stepped = micro_batch == trainer.accumulate_grad_batches - 1
        if not stepped or (step % self.every and step != self.steps):
            return
        assert isinstance(pl_module, EngramModule)
        loss = trainer.strategy.reduce(self._batch_loss, reduce_op="mean")
        numbers = torch.stack([loss, pl_module.gradient_norm.to(loss.device)]).to("cpu", non_blocking=True)
        arrived = None
        if loss.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        rates = {f"train/lr_{g['name']}": g["lr"] for g in trainer.optimizers[0].param_groups}
        self._reading = _Reading(step, numbers, arrived, rates)
        if arrived is None or step == self.steps:
            self._log(trainer, pl_module)

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reading, self._reading = self._reading, None
        if reading is None:
            return
        if reading.arrived is not None:
            reading.arrived.synchronize()
        assert isinstance(pl_module, EngramModule)
        step = reading.step
        loss = pl_module.check_finite(reading.numbers[0], step)
        now = time.perf_counter()
        speed = (step - self._first) * self.tokens_per_step / max(now - self._since, 1e-9)
        self._since, self._first = now, step
        if trainer.logger is not None:
            metrics = {
                "train/loss": loss,
                "train/gradient_norm": reading.numbers[1].item(),
                "train/tokens_per_second": speed,
                "tokens": step * self.tokens_per_step,
                **reading.rates,
            }
            trainer.logger.log_metrics(metrics, step=step)
        self.latest = Progress(step, self.steps, speed, loss)
        if self.observer:
            self.observer(self.latest)


class FlushBeforeCheckpoint(Callback):
    """Write waiting metrics before a checkpoint, so that a run killed after it has no gap in its curves."""

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Lightning calls this while it assembles a checkpoint."""
        for logger in trainer.loggers:
            if isinstance(logger, BufferedMLFlowLogger):
                logger.flush()


class MemoryHealth(Callback):
    """Log the health numbers of every memory after each evaluation, from its first batch."""

    def __init__(self) -> None:
        self._batch: dict[str, torch.Tensor] | None = None

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first batch."""
        if batch_idx == 0:
            self._batch = batch

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the network once more over that batch with its gates observed.

        On all ranks, whichever logs: rows that are spread over ranks are read by all of them together, and
        one that did so alone would wait for ever.
        """
        assert isinstance(pl_module, EngramModule)
        batch, self._batch = self._batch, None
        alone = trainer.world_size == 1
        if batch is None or not len(pl_module.net.tables) or (alone and trainer.logger is None):
            return
        batch = never_empty(batch)
        numbers = memory_health(pl_module.net, batch["ids"], batch["addresses"])
        for index, layer in enumerate(pl_module.net.config.engram.layers):  # type: ignore[union-attr]
            populated = pl_module.populated_rows(index)
            if populated is not None:
                numbers[f"memory/layer{layer}/populated_rows"] = populated
        if trainer.logger is not None:
            trainer.logger.log_metrics(numbers, step=trainer.global_step)


class StopRequest:
    """Whether somebody asked the process to stop (Ctrl-C, SIGTERM, or a parent that is gone)."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._ask: Callable[[int, Any], None] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Turn the first SIGINT or SIGTERM into a request; a second one interrupts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: Any) -> None:
            self.reason = signal.Signals(number).name
            signal.signal(number, previous[number])

        signals = (signal.SIGINT, signal.SIGTERM)
        previous: dict[int, Any] = {number: signal.signal(number, ask) for number in signals}
        self._ask = ask
        try:
            yield
        finally:
            self._ask = None
            for number, handler in previous.items():
                signal.signal(number, handler)

    def listen_alone(self) -> None:
        """Take SIGTERM from Lightning, whose handler came after `listening`.

        It would end a process in an evaluation, or in the midst of an accumulated step, with status 0 and
        without a checkpoint.
        """
        if self._ask is not None and self.reason is None:
            signal.signal(signal.SIGTERM, self._ask)

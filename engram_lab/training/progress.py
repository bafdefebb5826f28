"""How a single run shows how far it is: a bar on a terminal, a line now and then in a file or a pipe."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console

from engram_lab.training.callbacks import Progress, StepLog
from engram_lab.training.module import EngramModule
from engram_lab.wording import duration


def progress_bar(log: StepLog, evaluate_every: int | None) -> ProgressBar:
    """Return what suits standard output.

    Args:
        log: knows how long the run is, and its last numbers.
        evaluate_every: optimizer steps between evaluations, or None.
    """
    return Bar() if has_bars() else Lines(log, evaluate_every)


def has_bars() -> bool:
    """Whether standard output can take a line back."""
    console = Console()
    return console.is_interactive or console.is_jupyter


class Bar(RichProgressBar):
    """Lightning's bar, for a run that is one pass of a known number of steps: no epochs to number, and the
    batches of a resumed run count from its beginning, where Lightning sets them against those that are left.
    """

    @property
    def total_train_batches(self) -> int:
        """Micro-batches of the whole run."""
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training".ljust(len(self.validation_description))


class Lines(ProgressBar):
    """A line at the beginning, after every evaluation but the last, and when there was none for long.

    Lightning disables it on all processes but the first.

    Args:
        log: as for `progress_bar`.
        evaluate_every: as for `progress_bar`.
    """

    EVERY_SECONDS = 30.0
    MEASURED_SECONDS = 10.0
    """Of training, before what is left is told."""

    def __init__(self, log: StepLog, evaluate_every: int | None) -> None:
        super().__init__()
        self._log, self._evaluate_every, self._enabled = log, evaluate_every, True
        self._last = 0.0  # when a line was printed
        self._seen = 0  # steps done when last looked
        # Time and step from which the speed is measured; the time moves by those that evaluations take.
        self._begin: tuple[float, int] | None = None
        self._evaluation: float | None = None  # seconds of the last
        self._evaluation_began = 0.0
        self._told: Progress | None = None  # whose loss and speed were printed

    def disable(self) -> None:
        """Print nothing."""
        self._enabled = False

    def enable(self) -> None:
        """Print again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what there is to do."""
        log, step = self._log, trainer.global_step
        self._seen, self._begin = step, None
        rest = f", from step {step:,} on" if step else ""
        self._say(f"training: {log.steps:,} steps, {log.steps * log.tokens_per_step:,} tokens{rest}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell how far the run is, if that was long ago and no evaluation is about to."""
        step, now = trainer.global_step, time.perf_counter()
        if step == self._seen:
            return  # a micro-batch that is not its step's last
        self._seen = step
        if self._begin is None:
            self._begin = now, step  # compiling, in the first step, says nothing about what is left
        due = self._evaluate_every is not None and step % self._evaluate_every == 0
        if now - self._last >= self.EVERY_SECONDS and not due and step < self._log.steps:
            self._tell(step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time."""
        self._evaluation_began = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell its loss; the last one's is told with the run's result."""
        assert isinstance(pl_module, EngramModule)
        if trainer.state.fn != TrainerFn.FITTING or pl_module.evaluated is None:
            return
        self._evaluation = time.perf_counter() - self._evaluation_began
        if self._begin is not None:
            self._begin = self._begin[0] + self._evaluation, self._begin[1]
        if trainer.global_step < self._log.steps:
            self._tell(trainer.global_step, f", validation loss {pl_module.evaluated[1]['val/loss']:.4f}")

    def _tell(self, step: int, evaluated: str = "") -> None:
        latest, tokens = self._log.latest, step * self._log.tokens_per_step
        if latest is self._told:
            latest = None  # nothing new was logged: an old loss beside a new step would mislead
        else:
            self._told = latest
        loss = "" if latest is None else f", training loss {latest.loss:.4f}"
        speed = "" if latest is None else f", {latest.tokens_per_second:,.0f} tokens/s"
        done = f"step {step:,} of {self._log.steps:,}, {tokens:,} tokens"
        self._say(f"{done}{loss}{evaluated}{speed}{self._left(step)}")

    def _left(self, step: int) -> str:
        """Say about how long the steps still take, with all evaluations once one has been timed.

        Exporting the weights is left out: nothing of this run says how long that takes.
        """
        if self._begin is None or step == self._begin[1]:
            return ""
        passed = time.perf_counter() - self._begin[0]
        if passed < self.MEASURED_SECONDS:
            return ""
        training = passed / (step - self._begin[1]) * (self._log.steps - step)
        if self._evaluation is None:
            return f", about {duration(training)} of training left"
        every = self._evaluate_every or self._log.steps
        evaluations = -(-self._log.steps // every) - step // every  # one at the end in any case
        both = training + evaluations * self._evaluation
        return f", about {duration(both)} of training and evaluation left"

    def _say(self, line: str) -> None:
        self._last = time.perf_counter()
        if self._enabled:
            self.print(line, flush=True)

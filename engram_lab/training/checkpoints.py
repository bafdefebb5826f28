"""Checkpoints between steps, and ending a run there when somebody asks: all processes at the same step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from engram_lab.errors import UserError
from engram_lab.files import PARTIAL
from engram_lab.training.callbacks import Interrupted, StopRequest

REASON_BYTES = 64
"""Of a reason to stop, as other processes are told it."""


class Votes:
    """Tells every process at the same step that one of them was asked to stop, and why.

    Each answers after every step, over a group on the CPU, and hears the others a step later, so that nothing
    waits for a device. All processes make one at the same time.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")
        self._under_way: tuple[dist.Work, torch.Tensor] | None = None

    def cast(self, reason: str | None) -> str | None:
        """Give this process's reason to stop, if it has one; return the first that any gave a step ago."""
        mine = torch.zeros(REASON_BYTES, dtype=torch.uint8)
        said = (reason or "").encode()[:REASON_BYTES]
        mine[: len(said)] = torch.tensor(list(said), dtype=torch.uint8)
        heard = torch.empty(dist.get_world_size(), REASON_BYTES, dtype=torch.uint8)
        before = self._under_way
        work = dist.all_gather(list(heard), mine, group=self._group, async_op=True)
        self._under_way = work, heard
        if before is None:
            return None
        before[0].wait()
        reasons = [bytes(row.tolist()).rstrip(b"\0").decode(errors="ignore") for row in before[1]]
        return next(filter(None, reasons), None)


class Checkpoints(Checkpoint):
    """Keep the newest checkpoint, one every `every` steps, and end the run between two steps when asked to.

    Where an evaluation is due the checkpoint waits for it: Lightning would not make it up for a run that
    continues from before it, and its curve would have a hole. Of several processes any may be asked.

    Args:
        directory: where `step=<n>.ckpt` goes.
        every: optimizer steps between checkpoints.
        evaluate_every: optimizer steps between evaluations, or None.
        request: says when to stop.
        committed: called once a checkpoint is in place of the one before.
    """

    def __init__(
        self,
        directory: Path,
        *,
        every: int,
        evaluate_every: int | None,
        request: StopRequest,
        committed: Callable[[], None] | None = None,
    ) -> None:
        self.directory, self.request, self.committed = directory, request, committed
        self.every, self.evaluate_every = every, evaluate_every
        self._votes: Votes | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let nothing but a checkpoint end the run."""
        self.request.listen_alone()
        if trainer.world_size > 1:
            self._votes = Votes()
            # It tells all of a SIGTERM after every step, on the device, and waits for it:
            # https://github.com/Lightning-AI/pytorch-lightning/issues/21487
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same, for the evaluation after training."""
        self.request.listen_alone()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After every whole optimizer step without an evaluation."""
        whole = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if whole and not (self.evaluate_every and trainer.global_step % self.evaluate_every == 0):
            self._look(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After an evaluation during training."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        step, reason = trainer.global_step, self.request.reason
        if self._votes is not None:
            reason = self._votes.cast(reason)
        if reason is not None:
            self._save(trainer)
            raise Interrupted(f"stopped by {reason} at step {step}")
        if step % self.every == 0:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        newest = self.directory / f"step={trainer.global_step}.ckpt"
        try:
            trainer.save_checkpoint(newest)
        except OSError as error:
            raise UserError(
                f"The checkpoint of step {trainer.global_step} cannot be saved in {self.directory}: "
                f"{error.strerror or error}; mend that or make room; the checkpoint before is intact."
            ) from error
        if trainer.is_global_zero:
            for file in (*self.directory.glob("*.ckpt"), *self.directory.glob(f".*.ckpt.*{PARTIAL}")):
                if file != newest:
                    file.unlink()
        if self.committed is not None:
            self.committed()

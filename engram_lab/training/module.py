"""The LightningModule: a network, its loss, its optimizer, and the check that the loss is a number."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import MeanMetric

from engram_lab.model.experts import Experts
from engram_lab.model.initialise import initialise
from engram_lab.model.transformer import Transformer
from engram_lab.training.captured import CapturedStep
from engram_lab.training.data import never_empty
from engram_lab.training.execution import ExecutionConfig, prepare, shard
from engram_lab.training.optimizer import CompositeOptimizer, OptimizerConfig, build_optimizer, lr_multiplier

if TYPE_CHECKING:
    from engram_lab.model.config import ModelConfig
    from engram_lab.text import TokenCorpus
    from engram_lab.training.data import Batch
    from engram_lab.training.rows import TableRows


class Diverged(Exception):
    """The loss stopped being a finite number: the run is marked failed and left out of fits."""


class EngramModule(LightningModule):
    """Train a `Transformer` with routed experts and n-gram memories.

    Args:
        network: the resolved architecture (experts and rows already solved from the budget).
        optimizer: see `OptimizerConfig`.
        corpus: gives the canonical ids the hash needs and the bytes a token.
        total_steps: optimizer steps of the run; the schedule ends there.
        seed: fixes the initial weights; parameters of equal name and shape start equal in every cell of a
            study.
        rows: the tables' rows, where they live in a store rather than in this module.
        execution: whether blocks are compiled and activations recomputed.
    """

    def __init__(
        self,
        network: ModelConfig,
        optimizer: OptimizerConfig,
        corpus: TokenCorpus,
        *,
        total_steps: int,
        seed: int,
        rows: TableRows | None = None,
        execution: ExecutionConfig | None = None,
    ) -> None:
        super().__init__()
        self.network, self.optimizer_config, self.total_steps, self.seed = (
            network,
            optimizer,
            total_steps,
            seed,
        )
        self.nats_per_bit_of_text = math.log(2) * corpus.validation_bytes_per_token
        self.rows = rows
        self.execution = execution or ExecutionConfig()
        self.net = Transformer(
            network,
            canonical=torch.tensor(corpus.canonical),
            eos_id=corpus.eos_id,
            tables=None if rows is None else rows.tables,
        )
        initialise(self.net, seed)
        if rows is None:
            for index, table in enumerate(self.net.tables):
                read = torch.zeros(len(cast(Tensor, table.weight)), dtype=torch.bool)
                self.register_buffer(f"touched_{index}", read)  # rows read in training
        # Equal everywhere, or what this process has seen itself: DDP need not send them before every step.
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]
        self.val_loss = MeanMetric().set_dtype(torch.float64)
        self.gradient_norm = torch.tensor(0.0)
        self.evaluated: tuple[int, dict[str, float]] | None = None  # step and numbers of the last evaluation
        self._captured: CapturedStep | None = None

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        """One composite optimizer and the warm-up, stable, decay schedule, stepped every optimizer step."""
        optimizer = build_optimizer(
            self.net.named_parameters(), self.net.parameter_roles(), self.optimizer_config
        )
        multiplier = lr_multiplier(self.optimizer_config, self.total_steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, multiplier)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_model(self) -> None:
        """Shard the parameters where the strategy has a mesh of processes (ModelParallelStrategy)."""
        if self.device_mesh is not None:
            shard(self.net, self.device_mesh)

    def on_fit_start(self) -> None:
        """Compile, on the device that the network has been moved to."""
        prepare(self.net, self.execution, self.device)

    @property
    def _optimizer(self) -> CompositeOptimizer:
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, CompositeOptimizer)
        return optimizer

    def on_train_start(self) -> None:
        """Capture the step where that can be, and tell the optimizer that gradients stay where they are."""
        if self._can_be_captured():
            processes = self.trainer.world_size
            self._captured = CapturedStep(self.net, self._loss, self._optimizer, processes=processes)
            if processes > 1:
                wrapper = self.trainer.strategy.model
                assert isinstance(wrapper, DistributedDataParallel)
                wrapper.require_backward_grad_sync = False  # the captured step exchanges the gradients

    def _can_be_captured(self) -> bool:
        """Whether GPUs take a step with every batch, each all of it, and nothing in it waits for them."""
        trainer = self.trainer
        strategy = type(trainer.strategy)  # those derived from it may exchange or hold parameters otherwise
        dtype = torch.bfloat16 if trainer.precision == "bf16-mixed" else torch.float32
        experts = [block.ffn for block in self.net.blocks if isinstance(block.ffn, Experts)]
        return (
            self.device.type == "cuda"
            and self.execution.compiles(self.device)
            and strategy in (SingleDeviceStrategy, DDPStrategy)
            and trainer.accumulate_grad_batches == 1
            and not torch.is_anomaly_enabled()  # which looks at every gradient
            and not any(layer.asks_the_host(dtype) for layer in experts)
        )

    def on_fit_end(self) -> None:
        """Give the graph's memory back, gradients included."""
        if self._captured is not None:
            self._captured.release()
            self._captured = None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean next-token cross-entropy of the micro-batch, in nats."""
        inputs: dict[str, Tensor] = {"ids": batch["ids"], "targets": batch["targets"]}
        if "addresses" in batch:
            inputs["addresses"] = batch["addresses"]
        if self.rows is not None:
            inputs["readings"] = self.rows.reading(batch)
        return (self._captured or self._loss)(**inputs)

    def _loss(
        self, ids: Tensor, targets: Tensor, addresses: Tensor | None = None, readings: Tensor | None = None
    ) -> Tensor:
        if addresses is not None:
            for index in range(len(self.net.tables)):
                self.get_buffer(f"touched_{index}").index_fill_(0, addresses[index].flatten().long(), True)
        return self.net.loss(ids, targets, addresses, readings=readings)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run the backward pass, unless a captured step has done so."""
        if self._captured is None:
            loss.backward(*args, **kwargs)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Forget the gradients, unless a captured step overwrites them."""
        if self._captured is None:
            optimizer.zero_grad()

    def configure_gradient_clipping(  # type: ignore[override]
        self,
        optimizer: CompositeOptimizer,
        gradient_clip_val: Any = None,
        gradient_clip_algorithm: Any = None,
    ) -> None:
        """Clip the norm over all parameters, tables included, and keep it for the log."""
        rows, captured = self.rows, self._captured
        self.gradient_norm = optimizer.clip(
            self.optimizer_config.gradient_clip or math.inf,
            elsewhere=None if rows is None else rows.pipeline.gradient_norm(),
            own=None if captured is None else captured.norm,
        )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then balance the experts by the tokens they received since the last step on all devices."""
        super().optimizer_step(*args, **kwargs)
        if self.rows is not None:
            scale = self._optimizer.gradient_scale
            self.rows.pipeline.commit(1.0 if scale is None else scale)
        if self._captured is not None:
            return  # has balanced them
        if self.trainer.world_size > 1:
            for counts in self.net.router_counts():
                torch.distributed.all_reduce(counts)
        self.net.update_router_bias()

    def populated_rows(self, memory: int) -> float | None:
        """Share of a memory's rows that training has read; None where it has none. Called by all ranks."""
        if self.rows is not None:
            return self.rows.populated(memory)
        touched = self.get_buffer(f"touched_{memory}")
        return touched.float().mean().item() if len(touched) else None

    def check_finite(self, loss: Tensor, step: int) -> float:
        """Return the loss as a number, or raise `Diverged`."""
        value = loss.item()
        if not math.isfinite(value):
            raise Diverged(f"the training loss was {value} at step {step}")
        return value

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the mean cross-entropy of a batch to the evaluation, weighted by its tokens."""
        tokens, batch = batch["ids"].numel(), never_empty(batch)
        loss = self.net.loss(batch["ids"], batch["targets"], batch.get("addresses"))
        self.val_loss.update(loss, tokens)

    def on_validation_epoch_end(self) -> None:
        """Log the loss in nats a token, the perplexity and the bits a byte of validation text, by step."""
        loss = float(self.val_loss.compute())
        self.val_loss.reset()
        step = self.trainer.global_step
        if not math.isfinite(loss):
            raise Diverged(f"the validation loss was {loss} at step {step}")
        numbers = {
            "val/loss": loss,
            "val/perplexity": math.exp(min(loss, 700.0)),
            "val/bits_per_byte": loss / self.nats_per_bit_of_text,
        }
        self.evaluated = step, numbers
        if self.trainer.logger is not None:
            # self.log would count steps from 0 and only those of this sitting
            self.trainer.logger.log_metrics(numbers, step=step)

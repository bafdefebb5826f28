"""Tokens per second of the study model on several GPUs of one host, each with a batch of its own.

    python benchmarks/scaling_gpus.py --devices 1
    python benchmarks/scaling_gpus.py --devices 2 --strategy ddp        # or: sharded
    python benchmarks/scaling_gpus.py --devices 2 --strategy sharded --rehearse    # tiny, two CPU processes

Scaling efficiency is the speed of n devices over n times that of one.
"""

from __future__ import annotations

import argparse
import time
from types import SimpleNamespace
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from step_gpu import study_model, synchronise, text, tiny_model
from torch.utils.data import DataLoader

from engram_lab.model.transformer import Transformer
from engram_lab.training.module import EngramModule
from engram_lab.training.optimizer import OptimizerConfig


class Clock(Callback):
    """Times the second half of the steps."""

    def __init__(self, steps: int) -> None:
        self.steps, self.started, self.seconds = steps, 0.0, 0.0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        if index == self.steps // 2 - 1:
            synchronise(module.device.type)
            self.started = time.perf_counter()

    def on_train_end(self, trainer: Any, module: Any) -> None:
        synchronise(module.device.type)
        self.seconds = time.perf_counter() - self.started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--strategy", choices=("ddp", "sharded"), default="ddp")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    config, shape = (tiny_model(), (2, 32)) if options.rehearse else (study_model(), (32, 1024))
    steps = 6 if options.rehearse else options.steps
    corpus: Any = SimpleNamespace(
        validation_bytes_per_token=4.0, canonical=list(range(config.vocab_size)), eos_id=0
    )
    batches = text(Transformer(config), *shape, 8, "cpu")
    named = [dict(zip(("ids", "targets", "addresses"), batch, strict=True)) for batch in batches]
    data: Any = DataLoader(
        [named[i % 8] for i in range(steps)], batch_size=None, pin_memory=not options.rehearse
    )  # type: ignore[arg-type]
    strategy: Any = "auto"
    if options.devices > 1:
        sharded = ModelParallelStrategy(data_parallel_size=options.devices, tensor_parallel_size=1)
        strategy = sharded if options.strategy == "sharded" else "ddp"
    clock = Clock(steps)
    trainer = Trainer(
        accelerator="cpu" if options.rehearse else "gpu",
        devices=options.devices,
        strategy=strategy,
        max_steps=steps,
        precision="32-true" if options.rehearse else "bf16-mixed",
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(EngramModule(config, OptimizerConfig(), corpus, total_steps=steps, seed=0), data)
    if trainer.is_global_zero:
        tokens = shape[0] * shape[1] * options.devices * (steps - steps // 2)
        print(f"{options.devices} x {options.strategy}: {tokens / clock.seconds:,.0f} tokens/s")


if __name__ == "__main__":
    main()

"""Tokens per second of one model on several GPUs of one host, each with a batch of its own.

    python benchmarks/scaling_gpus.py --devices 1 --out scaling_gpus.json
    python benchmarks/scaling_gpus.py --devices 2 --strategy ddp --out scaling_gpus.json    # or: sharded
    python benchmarks/scaling_gpus.py --model 0.35B --devices 2 --out scaling_gpus.json
    python benchmarks/scaling_gpus.py --devices 2 --strategy sharded --rehearse    # tiny, two CPU processes

Scaling efficiency is the speed of n devices over n times that of one. One device replays its step as a CUDA
graph, several under DDP as two with the exchange of gradients between them; with sharded parameters they
launch theirs from the host: what that costs is part of the efficiency. The first half of the steps compiles
and warms up; the other is timed in blocks, whose median counts. Every call adds an entry to the JSON file.
Weights are drawn on the device, as `step_gpu.py` draws them: the host would take longer for those of a run
than the steps take. Processes learn that they are to stop as those of a run do, or, with `--stop lightning`,
by a broadcast on the device that every step waits for.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from step_gpu import build, large_model, study_model, synchronise, text, tiny_model
from torch.utils.data import DataLoader

from engram_lab.training import module as training_module
from engram_lab.training.callbacks import StopRequest
from engram_lab.training.checkpoints import Checkpoints
from engram_lab.training.module import EngramModule
from engram_lab.training.optimizer import OptimizerConfig

MODELS = {"study": (study_model, (32, 1024), 200), "0.35B": (large_model, (16, 2048), 48)}
BLOCKS = 5


class Clock(Callback):
    """Times the second half of the steps, in blocks."""

    def __init__(self, steps: int) -> None:
        self.first, self.block = steps // 2, max(1, steps // 2 // BLOCKS)
        self.seconds: list[float] = []  # a step
        self._began = 0.0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        done = index + 1 - self.first
        if done < 0 or done % self.block:
            return
        synchronise(module.device.type)
        now = time.perf_counter()
        if done:
            self.seconds.append((now - self._began) / self.block)
        self._began = now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(MODELS), default="study")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--strategy", choices=("ddp", "sharded"), default="ddp")
    parser.add_argument("--stop", choices=("run", "lightning"), default="run")
    parser.add_argument("--steps", type=int, help="half of which are timed")
    parser.add_argument("--out", type=Path, help="JSON file that the result is added to")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    make, shape, steps = (tiny_model, (2, 32), 20) if options.rehearse else MODELS[options.model]
    config, steps = make(), options.steps or steps
    device = "cpu" if options.rehearse else f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    corpus: Any = SimpleNamespace(
        validation_bytes_per_token=4.0, canonical=list(range(config.vocab_size)), eos_id=0
    )
    training_module.initialise = lambda network, seed: network.load_state_dict(
        build(network.config, device).state_dict(), strict=False
    )
    torch._dynamo.config.optimize_ddp = False  # a block is one graph, whatever DDP's buckets are
    with torch.device(device):
        module = EngramModule(config, OptimizerConfig(), corpus, total_steps=steps, seed=0)
    batches = [[t.cpu() for t in batch] for batch in text(module.net, *shape, 8, device)]
    named = [dict(zip(("ids", "targets", "addresses"), batch, strict=True)) for batch in batches]
    data: Any = DataLoader(
        [named[i % 8] for i in range(steps)], batch_size=None, pin_memory=not options.rehearse
    )  # type: ignore[arg-type]
    strategy: Any = "auto"
    if options.devices > 1:
        sharded = ModelParallelStrategy(data_parallel_size=options.devices, tensor_parallel_size=1)
        strategy = sharded if options.strategy == "sharded" else "ddp"
    clock = Clock(steps)
    callbacks: list[Callback] = [clock]
    if options.stop == "run":
        request = StopRequest()
        callbacks.append(Checkpoints(Path(), every=steps + 1, evaluate_every=None, request=request))
    trainer = Trainer(
        accelerator="cpu" if options.rehearse else "gpu",
        devices=options.devices,
        strategy=strategy,
        max_steps=steps,
        precision="32-true" if options.rehearse else "bf16-mixed",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=options.stop == "run",
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    began = time.perf_counter()
    trainer.fit(module, data)
    if not trainer.is_global_zero:
        return
    tokens = shape[0] * shape[1] * options.devices
    result = {
        "model": options.model,
        "devices": options.devices,
        "strategy": options.strategy if options.devices > 1 else None,
        "stop": options.stop,
        "machine": "a CPU" if options.rehearse else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "tokens_per_second": tokens / statistics.median(clock.seconds),
        "milliseconds": [1e3 * s for s in clock.seconds],
        "peak_GiB": 0.0 if options.rehearse else torch.cuda.max_memory_allocated() / 2**30,
        "seconds_of_fit": time.perf_counter() - began,
    }
    print(json.dumps(result), flush=True)
    if options.out:
        known = json.loads(options.out.read_text()) if options.out.exists() else []
        options.out.write_text(json.dumps([*known, result], indent=1) + "\n")


if __name__ == "__main__":
    main()

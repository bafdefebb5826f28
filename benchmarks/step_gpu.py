"""A whole training step (forward, backward, clip, optimizer, balance) on one GPU beside a plain one.

    python benchmarks/step_gpu.py              # writes benchmarks/results/step_gpu.{json,md}
    python benchmarks/step_gpu.py --only large # one part, as one line of JSON
    python benchmarks/step_gpu.py --rehearse   # a tiny model on the CPU: whether everything runs

Parts, in this order, each written down when it is done: losses of both over some hundred steps from equal
weights; time a step, the two taking turns; Lightning's loop beside a bare one; kernels by component; compile
time of a second cell, with other experts and a filled cache; models of 0.34 and 1.03 B active parameters
beside dense ones of equal FLOPs, which fill an 80 GB GPU. The text is synthetic (a hidden successor for each
token, with noise), so that routers see structure. FLOPs are 6 x active matrix parameters + causal attention,
a forward product counted once and a backward one twice, one repeated by activation checkpointing not at all;
MFU is their rate over the H100's 989 TFLOP/s.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from plain_model import PlainModel
from torch import Tensor

from engram_lab.model.attention import AttentionConfig
from engram_lab.model.config import ModelConfig
from engram_lab.model.engram import EngramConfig
from engram_lab.model.experts import FeedForwardConfig
from engram_lab.model.transformer import Transformer
from engram_lab.training.captured import CapturedStep
from engram_lab.training.execution import ExecutionConfig, prepare
from engram_lab.training.optimizer import OptimizerConfig, build_optimizer

PEAK = 989e12
Batch = tuple[Tensor, Tensor, Tensor | None]
COMPONENTS = {  # the first that has a word of the kernel's name
    "optimizer and clip": ("multi_tensor_apply", "_update"),
    "experts: products": (
        "_up",
        "_down_backward",
        "_product",
        "_weight_gradient",
        "GroupProblemShape",
        "grouped",
    ),
    "experts: sums of choices": ("_sum_choices",),
    "experts: choose and sort": ("_choose", "_accumulate", "_arrange", "_differentiate"),
    "attention": ("cudnn", "flash", "fmha"),
    "loss: softmax": ("_softmax",),
    "matrix products, head included": ("nvjet", "gemm", "cublas", "cutlass"),
    "embeddings and tables": ("embedding", "compute_grad_weight", "RadixSort", "_read", "_slices"),
    "norms, residuals, activations, casts": ("triton_", "layer_norm", "GammaBeta"),
}


def study_model(experts: int = 102) -> ModelConfig:
    return ModelConfig(
        vocab_size=16384,
        attention=AttentionConfig(n_heads=4, n_kv_heads=2),
        ffn=FeedForwardConfig(experts=experts, top_k=6, expert_hidden=128, shared_experts=2),
        engram=EngramConfig(rows_per_head=20_000),
    )


def tiny_model(experts: int = 12) -> ModelConfig:
    return ModelConfig(
        vocab_size=256,
        d_model=64,
        n_layers=2,
        ffn=FeedForwardConfig(experts=experts, top_k=2, expert_hidden=32, shared_experts=1),
        engram=EngramConfig(rows_per_head=100, heads=2),
    )


def large_model() -> ModelConfig:
    """0.34 B active parameters, 2.1 B in all."""
    return ModelConfig(
        vocab_size=32768,
        d_model=1024,
        n_layers=20,
        attention=AttentionConfig(n_heads=16, n_kv_heads=4),
        ffn=FeedForwardConfig(experts=64, top_k=6, expert_hidden=512, shared_experts=2),
    )


def billion_model() -> ModelConfig:
    """1.03 B active parameters, 3.6 B in all: float32 weights, moments and gradients take 53 GiB."""
    return ModelConfig(
        vocab_size=32768,
        d_model=2048,
        n_layers=20,
        attention=AttentionConfig(n_heads=16, n_kv_heads=4),
        ffn=FeedForwardConfig(experts=32, top_k=6, expert_hidden=768, shared_experts=2),
    )


def active_parameters(config: ModelConfig) -> int:
    """Those a token is multiplied with: the embedding and rows of tables are read, not multiplied."""
    D, attention, ffn = config.d_model, config.attention, config.ffn
    width = attention.head_width(D)
    block = D * width * 2 * (attention.n_heads + attention.kv_heads)
    block += 3 * D * ffn.dense_width() + (D * ffn.experts if ffn.experts else 0)
    active = config.n_layers * block + config.vocab_size * D
    if config.engram is not None:
        active += 2 * config.engram.reading_dim * D * len(config.engram.layers)
    return active


def flops_per_token(config: ModelConfig, length: int) -> float:
    width = config.attention.head_width(config.d_model)
    attention = 6 * config.n_layers * config.attention.n_heads * width * length
    return 6 * active_parameters(config) + attention


def build(config: ModelConfig, device: str) -> Transformer:
    """The usual initial values, drawn at once."""
    torch.manual_seed(0)
    with torch.device(device):
        network = Transformer(config)
        roles = network.parameter_roles()
        with torch.no_grad():
            for name, p in network.named_parameters():
                if roles[name] in ("embedding", "table"):
                    p.normal_(std=0.5 if name == "embedding.weight" else 0.02)
                elif roles[name] == "matrix":
                    p.normal_(std=p.shape[-2 if p.ndim == 3 else -1] ** -0.5)
    return network.to(device)


def text(network: Transformer, sequences: int, length: int, batches: int, device: str) -> list[Batch]:
    V, generator = network.config.vocab_size, torch.Generator(device).manual_seed(1)
    successor = torch.randperm(V, device=device, generator=generator)
    made: list[Batch] = []
    for _ in range(batches):
        noise = torch.rand(sequences, length + 1, device=device, generator=generator)
        ids = ((V**noise) - 1).long().clamp(0, V - 1)  # log-uniform: few common tokens, many rare
        follows = torch.rand(sequences, length + 1, device=device, generator=generator) < 0.6
        follows[:, 0] = False
        following = torch.where(follows[:, 1:], successor[ids[:, :-1]], ids[:, 1:])
        while not torch.equal(following, ids[:, 1:]):  # once for each token of the longest chain
            ids[:, 1:] = following
            following = torch.where(follows[:, 1:], successor[ids[:, :-1]], ids[:, 1:])
        inputs = ids[:, :-1].contiguous()
        made.append((inputs, ids[:, 1:].contiguous(), None if network.hash is None else network.hash(inputs)))
    return made


class Step:
    """One training step of either model; `loss` of the last one stays on the device."""

    def __init__(
        self, network: Transformer, plain: bool, batches: list[Batch], device: str, graph: bool = True
    ) -> None:
        self.batches, self.device, self.done = batches, device, 0
        self.captured: CapturedStep | None = None
        config, roles = OptimizerConfig(), network.parameter_roles()
        if plain:
            self.model: Any = PlainModel(network.config).to(device).take(network)
            self.run: Callable[..., Tensor] = torch.compile(self.model) if device == "cuda" else self.model
            decayed = [p for n, p in self.model.named_parameters() if roles.get(n) == "matrix"]
            tables = list(self.model.tables.parameters())
            known = {id(p) for p in (*decayed, *tables)}
            rest = [p for p in self.model.parameters() if id(p) not in known]
            rate = config.learning_rate
            groups = [
                {"params": decayed, "weight_decay": config.weight_decay},
                {"params": rest},
                {"params": tables, "lr": rate * config.table_lr_multiplier},
            ]
            groups = [group for group in groups if group["params"]]
            self.optimizer: Any = torch.optim.AdamW(groups, lr=rate, betas=config.betas, weight_decay=0.0)
        else:
            self.model = network
            self.run = network.loss
            self.optimizer = build_optimizer(network.named_parameters(), roles, config)
            if graph and device == "cuda":
                self.captured = CapturedStep(network, network.loss, self.optimizer)
        self.parameters = list(self.model.parameters())

    def __call__(self) -> Tensor:
        batch = self.batches[self.done % len(self.batches)]
        self.done += 1
        names = zip(("ids", "targets", "addresses"), batch, strict=True)
        inputs = {name: values for name, values in names if values is not None}
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            self.loss = (self.captured or self.run)(**inputs)
        if self.captured is None:
            self.optimizer.zero_grad(set_to_none=True)
            self.loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        else:
            self.optimizer.clip(1.0, own=self.captured.norm)
        self.optimizer.step()
        if self.captured is None:
            self.model.update_router_bias()
        return self.loss


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def time_steps(step: Callable[[], Any], count: int, device: str) -> float:
    """Milliseconds a step, the host logging the loss once in ten."""
    synchronise(device)
    start = time.perf_counter()
    for number in range(count):
        loss = step()
        if number % 10 == 9:
            loss.item()
    synchronise(device)
    return 1e3 * (time.perf_counter() - start) / count


def first_step(step: Step, device: str) -> float:
    start = time.perf_counter()
    for _ in range(2):
        step()
    synchronise(device)
    return time.perf_counter() - start


def compare_losses(ours: Step, plain: Step, steps: int) -> dict[str, Any]:
    pairs = [(ours().detach().clone(), plain().detach().clone()) for _ in range(steps)]
    a, b = (torch.stack(column).double().cpu() for column in zip(*pairs, strict=True))
    tail = max(1, steps // 4)
    return {
        "steps": steps,
        "first": [a[0].item(), b[0].item()],
        "last_quarter_mean": [a[-tail:].mean().item(), b[-tail:].mean().item()],
        "largest_difference": (a - b).abs().max().item(),
        "mean_difference": (a - b).abs().mean().item(),
    }


def take_turns(ways: dict[str, Step], rounds: int, count: int, device: str) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, step in ways.items():
            times[name].append(time_steps(step, count, device))
    return times


def components(step: Step) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    spent: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    for event in profiler.events():
        if event.name.startswith(("Optimizer", "Memcpy", "ProfilerStep")):
            continue
        found = next((c for c, words in COMPONENTS.items() if any(w in event.name for w in words)), "other")
        spent[found] += event.device_time_total / 3e3
        kernels[event.name[:120]] += event.device_time_total / 3e3
    return {"milliseconds": dict(spent.most_common()), "kernels": dict(kernels.most_common(40))}


def lightning_step(network: Transformer, batches: list[Batch], steps: int, device: str) -> float:
    """Milliseconds a step of `EngramModule` under Lightning's Trainer, logging once in ten."""
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.loggers.logger import DummyLogger
    from torch.utils.data import DataLoader

    from engram_lab.training.callbacks import StepLog
    from engram_lab.training.module import EngramModule

    class Clock(Callback):
        started = ended = 0.0

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            if index == steps // 2 - 1:
                synchronise(device)
                self.started = time.perf_counter()

        def on_train_end(self, trainer: Any, module: Any) -> None:
            synchronise(device)
            self.ended = time.perf_counter()

    corpus: Any = SimpleNamespace(
        validation_bytes_per_token=4.0, canonical=list(range(network.config.vocab_size)), eos_id=0
    )
    module = EngramModule(network.config, OptimizerConfig(), corpus, total_steps=steps, seed=0)
    module.net.load_state_dict(network.state_dict())
    named = [dict(zip(("ids", "targets", "addresses"), batch, strict=True)) for batch in batches]
    named = [{k: v for k, v in batch.items() if v is not None} for batch in named]
    data: Any = DataLoader([named[i % len(named)] for i in range(steps)], batch_size=None)  # type: ignore[arg-type]
    clock = Clock()
    trainer = Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        max_steps=steps,
        precision="bf16-mixed" if device == "cuda" else "32-true",
        logger=DummyLogger(),
        callbacks=[StepLog(every=10, steps=steps, tokens_per_step=batches[0][0].numel()), clock],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, data)
    return 1e3 * (clock.ended - clock.started) / (steps - steps // 2)


def compare_loops(
    network: Transformer, batches: list[Batch], steps: int, device: str
) -> dict[str, list[float]]:
    """Milliseconds a step of a bare loop and of Lightning's, in turns, from the same balanced network.

    What is captured before Lightning's teardown, which takes the libraries' workspace, is captured anew.
    """
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    times: dict[str, list[float]] = {"bare": [], "lightning": []}
    for _ in range(3):
        network.load_state_dict(weights)
        step = Step(network, False, batches, device)
        time_steps(step, steps // 2, device)
        times["bare"].append(time_steps(step, steps - steps // 2, device))
        if step.captured is not None:
            step.captured.release()
        del step
        network.load_state_dict(weights)
        times["lightning"].append(lightning_step(network, batches, steps, device))
    return times


class Part(NamedTuple):
    """A model too large to train beside another."""

    model: Callable[[], ModelConfig]
    dense: bool
    sequences: int  # of 2,048 tokens
    steps: int  # three times as many balance the experts, and as many again are timed
    execution: ExecutionConfig


RECOMPUTE = ExecutionConfig(activation_checkpointing=True)
PARTS = {
    "large": Part(large_model, False, 16, 8, ExecutionConfig()),
    "dense": Part(large_model, True, 16, 8, ExecutionConfig()),
    "billion": Part(billion_model, False, 16, 3, RECOMPUTE),
    "billion_dense": Part(billion_model, True, 16, 3, RECOMPUTE),
}


def measure(part: Part, device: str) -> dict[str, Any]:
    config, sequences, length = part.model(), part.sequences, 2048
    if device == "cpu":
        config, sequences, length = tiny_model(), 2, 64
    if part.dense:
        config = replace(config, ffn=replace(config.ffn, experts=0))
    network = build(config, device)
    prepare(network, part.execution, torch.device(device))
    for router in network.routers():
        router.bias_step = 0.02  # so that some steps balance what many would
    step = Step(network, False, text(network, sequences, length, 2, device), device)
    for group in step.optimizer.param_groups:
        group["lr"] *= 0.1  # the study's rate is for a narrow model
    compiling = first_step(step, device)
    time_steps(step, 3 * part.steps, device)
    spent = [time_steps(step, part.steps, device) for _ in range(3)]
    rate = flops_per_token(config, length) * sequences * length / (1e-3 * statistics.median(spent))
    total, active = sum(p.numel() for p in network.parameters()), active_parameters(config)
    return {
        "milliseconds": spent,
        "mfu": rate / PEAK,
        "tokens_a_step": sequences * length,
        "activation_checkpointing": part.execution.activation_checkpointing,
        "parameters": total,
        "active_parameters": active,
        "sparsity": total / active,
        "first_two_steps_seconds": compiling,
        "loss": step.loss.item(),
        "peak_GiB": torch.cuda.max_memory_reserved() / 2**30 if device == "cuda" else 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--steps", type=int, default=200, help="steps over which losses are compared")
    parser.add_argument("--no-graphs", action="store_true", help="launch every kernel from the host")
    parser.add_argument("--small", action="store_true", help="leave the larger models out")
    parser.add_argument("--only", choices=("plain", "second", *PARTS), help="one part, as a line of JSON")
    parser.add_argument("--sequences", type=int, help="a step's sequences, where --only is a larger model")
    options = parser.parse_args()
    device = "cpu" if options.rehearse else "cuda"
    model, shape = (tiny_model, (2, 32)) if options.rehearse else (study_model, (32, 1024))
    if options.only:
        if options.only in PARTS:
            part = PARTS[options.only]
            if options.sequences:
                part = part._replace(sequences=options.sequences)
            print(json.dumps(measure(part, device)))
            return
        network = build(
            model() if options.rehearse else model(97 if options.only == "second" else 102), device
        )
        if options.only == "second":
            prepare(network, ExecutionConfig(), torch.device(device))
        batches = text(network, *shape, 1, device)
        step = Step(network, options.only == "plain", batches, device, not options.no_graphs)
        print(json.dumps({"seconds": first_step(step, device)}))
        return

    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"torch": torch.__version__, "command": "python benchmarks/step_gpu.py"}
    results["machine"] = torch.cuda.get_device_name() if device == "cuda" else "rehearsal on a CPU"

    def keep(name: str, value: Any) -> None:
        results[name] = value
        (options.out / "step_gpu.json").write_text(json.dumps(results, indent=1) + "\n")
        print(name, json.dumps(value)[:400], flush=True)

    def other(part: str) -> Any:
        command = [sys.executable, __file__, "--only", part]
        done = subprocess.run(
            command + (["--rehearse"] if options.rehearse else []), capture_output=True, text=True
        )
        if done.returncode:
            return {"failed": done.stderr.strip().splitlines()[-1]}
        return json.loads(done.stdout.strip().splitlines()[-1])

    # The baseline's compilation fills the cache meanwhile; it takes longer than ours.
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    filling = subprocess.Popen([sys.executable, __file__, "--only", "plain"], env=os.environ, **quiet)  # type: ignore[call-overload]
    network = build(model(), device)
    batches = text(network, *shape, 32 if device == "cuda" else 4, device)
    plain = Step(network, True, batches, device)  # takes the initial weights
    prepare(network, ExecutionConfig(), torch.device(device))
    ours = Step(network, False, batches, device, not options.no_graphs)
    keep("first_cell_seconds_beside_the_baselines_compilation", first_step(ours, device))
    filling.wait()
    keep("baseline_first_step_seconds_cache_filled", first_step(plain, device))
    keep("losses", compare_losses(ours, plain, options.steps if device == "cuda" else 4))
    times = take_turns({"plain": plain, "ours": ours}, 6, 20 if device == "cuda" else 2, device)
    keep("milliseconds", times)
    middle = {name: statistics.median(values) for name, values in times.items()}
    keep("speedup", middle["plain"] / middle["ours"])
    keep("mfu", flops_per_token(network.config, shape[1]) * shape[0] * shape[1] / middle["ours"] * 1e3 / PEAK)
    if device == "cuda":
        keep("components", components(ours))
    if ours.captured is not None:
        ours.captured.release()
    del plain, ours
    loops = compare_loops(network, batches, 120 if device == "cuda" else 4, device)
    bare, lightning = (statistics.median(loops[name]) for name in ("bare", "lightning"))
    keep("lightning", {"milliseconds": loops, "overhead": lightning / bare - 1})
    del network, batches
    if device == "cuda":
        torch.cuda.empty_cache()
    keep("second_cell", other("second"))
    for part in () if options.small else PARTS:
        keep(part, other(part))


if __name__ == "__main__":
    main()

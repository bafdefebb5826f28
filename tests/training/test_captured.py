"""What a captured step rests on, without a GPU: that nothing in it asks the host, and that it is the step.

The capture itself is tested on a GPU (test_captured_parity.py).
"""

from __future__ import annotations

import copy
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from engram_lab.model import experts
from engram_lab.model.attention import AttentionConfig
from engram_lab.model.config import ModelConfig
from engram_lab.model.engram import EngramConfig
from engram_lab.model.experts import Experts, FeedForwardConfig
from engram_lab.model.initialise import initialise
from engram_lab.model.transformer import Transformer
from engram_lab.training.captured import CapturedStep
from engram_lab.training.execution import ExecutionConfig, prepare
from engram_lab.training.optimizer import OptimizerConfig, build_optimizer

FFN = FeedForwardConfig(experts=4, top_k=2, expert_hidden=32)


def network(**settings: Any) -> Transformer:
    memory = {"layers": (1,), "heads": 2, "row_dim": 8, "rows_per_head": 31} | settings.pop("engram", {})
    values: dict[str, Any] = {"attention": AttentionConfig(n_heads=2, n_kv_heads=1), "ffn": FFN} | settings
    return Transformer(
        ModelConfig(vocab_size=64, d_model=64, n_layers=2, engram=EngramConfig(**memory), **values)
    )


def step(net: Transformer) -> None:
    """Take a step on tensors without values, so that asking for one fails."""
    ids = torch.zeros(2, 16, dtype=torch.int64)
    heads = net.config.engram.n_heads  # type: ignore[union-attr]
    net.loss(ids, ids, torch.zeros(1, 2, 16, heads, dtype=torch.int32)).backward()
    net.update_router_bias()


def product_of_its_shape(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return torch.bmm(x.unsqueeze(1), weight[:1].expand(len(x), -1, -1)).squeeze(1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"engram": {"module": "product_key"}},
        {"engram": {"module": "mlp"}},
        {"engram": {"module": "per_layer"}},
        {"engram": {"module": "over_encoding", "layers": (0,)}},
        {"engram": {"module": "amplified", "layers": (0,)}},
        {"engram": {"frozen_table": True, "row_storage": "float8"}},
        {"engram": {"gate": "none", "conv_kernel": 0, "fused_projection": True}},
        {"streams": 2},
        {"attention": AttentionConfig(kind="latent", n_heads=2, n_kv_heads=2)},
        {"ffn": FeedForwardConfig(experts=4, top_k=2, expert_hidden=32, balance_loss=0.1)},
        {"ffn": FeedForwardConfig(experts=0)},
    ],
    ids=str,
)
@pytest.mark.parametrize("recomputing", [False, True])
def test_only_the_experts_loop_asks_the_host(
    settings: dict[str, Any], recomputing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeTensorMode():
        net = network(**settings)
        prepare(net, ExecutionConfig(activation_checkpointing=recomputing), torch.device("cpu"))
        if net.config.ffn.experts:
            with pytest.raises(DataDependentOutputException):
                step(net)
        monkeypatch.setattr(experts, "grouped_matmul", product_of_its_shape)
        step(net)


@pytest.mark.parametrize(("hidden", "width", "asks"), [(32, 64, False), (12, 64, True), (32, 36, True)])
def test_experts_say_whether_they_ask_the_host(hidden: int, width: int, asks: bool) -> None:
    layer = Experts(width, FeedForwardConfig(experts=4, top_k=2, expert_hidden=hidden), 0)
    assert layer.asks_the_host(torch.bfloat16) == asks
    assert layer.asks_the_host(torch.float32)


def test_a_captured_step_leaves_losses_gradients_and_balance_of_a_launched_one() -> None:
    launched = network().double()
    initialise(launched, 0)
    net = copy.deepcopy(launched)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 32, generator=generator, dtype=torch.float64)
    optimizer = build_optimizer(net.named_parameters(), net.parameter_roles(), OptimizerConfig())
    captured = CapturedStep(net, net.loss, optimizer)
    for _ in range(3):
        ids = torch.randint(64, (2, 16), generator=generator)
        leaves = [rows.clone().requires_grad_() for _ in range(2)]
        readings = [leaf[ids].unsqueeze(0) for leaf in leaves]
        launched.zero_grad()
        loss = launched.loss(ids, ids.roll(1, 1), readings=readings[0])
        loss.backward()
        launched.update_router_bias()
        assert torch.equal(captured(ids=ids, targets=ids.roll(1, 1), readings=readings[1]), loss.detach())
        assert torch.equal(leaves[1].grad, leaves[0].grad)  # type: ignore[arg-type]
        for ours, theirs in zip(net.parameters(), launched.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None)
            assert theirs.grad is None or torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]
        grads = [p.grad for p in launched.parameters() if p.grad is not None]
        assert torch.equal(captured.norm, torch.nn.utils.get_total_norm(grads))
        for ours, theirs in zip(net.routers(), launched.routers(), strict=True):
            assert torch.equal(ours.bias, theirs.bias)
            assert ours.bias.abs().sum() > 0
            assert torch.equal(ours.counts, theirs.counts)


def test_copies_that_experts_read_follow_their_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    initialise(net, 0)
    layers = [block.ffn for block in net.blocks if isinstance(block.ffn, Experts)]
    monkeypatch.setattr(Experts, "has_kernels", lambda layer, dtype: dtype == torch.bfloat16)
    optimizer = build_optimizer(net.named_parameters(), net.parameter_roles(), OptimizerConfig())
    captured = CapturedStep(net, net.loss, optimizer)

    def step() -> None:
        ids = torch.randint(64, (2, 16))
        with torch.autocast("cpu", torch.bfloat16):
            captured(ids=ids, targets=ids)
        optimizer.clip(1.0, own=captured.norm)

    def follow() -> None:
        for layer in layers:
            assert layer.narrow is not None
            for copied, matrix in zip(layer.narrow, (layer.gate_up, layer.out), strict=True):
                assert torch.equal(copied, matrix.bfloat16())

    assert optimizer.captures
    for _ in range(3):
        step()
        before = layers[0].gate_up.detach().clone()
        optimizer.step()
        assert not torch.equal(before, layers[0].gate_up)
        follow()
    net.load_state_dict({name: 0.5 * value for name, value in net.state_dict().items()})
    step()
    follow()
    captured.release()
    assert all(layer.narrow is None and layer.out.grad is None for layer in layers)
    assert not optimizer.copies
    assert not optimizer.captures


class Wrapped(nn.Module):
    """What Lightning gives to DistributedDataParallel: its forward pass takes the captured step."""

    def __init__(self, net: Transformer, captured: CapturedStep) -> None:
        super().__init__()
        self.net, self.captured = net, captured

    def forward(self, ids: Tensor) -> Tensor:
        return self.captured(ids=ids, targets=ids.roll(1, 1))


def steps(net: Transformer, rank: int, ranks: int) -> dict[str, Any]:
    """Train on a rank's share of every batch; returns losses, norms and what became of the network."""
    optimizer = build_optimizer(net.named_parameters(), net.parameter_roles(), OptimizerConfig())
    captured = CapturedStep(net, net.loss, optimizer, processes=ranks)
    wrapped: nn.Module = Wrapped(net, captured)
    if ranks > 1:
        wrapped = nn.parallel.DistributedDataParallel(wrapped)
        wrapped.require_backward_grad_sync = False
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {"losses": [], "norms": []}
    for _ in range(4):
        ids = torch.randint(64, (4, 16), generator=generator).chunk(ranks)[rank]
        found["losses"].append(wrapped(ids).clone())
        found["norms"].append(optimizer.clip(0.1, own=captured.norm).clone())
        optimizer.step()
    return found | {"net": net.state_dict()}


def beginner() -> Transformer:
    net = network().double()
    initialise(net, 0)
    return net


def share_of_a_rank(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    torch.save(steps(beginner(), rank, ranks), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_processes_that_capture_train_together(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=share_of_a_rank, args=(rank, 2, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    alone = steps(beginner(), 0, 1)
    for process in processes:
        process.join(120)
        process.kill()
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for number, loss in enumerate(alone["losses"]):
        torch.testing.assert_close((both[0]["losses"][number] + both[1]["losses"][number]) / 2, loss)
        assert both[0]["norms"][number] == both[1]["norms"][number]
        torch.testing.assert_close(both[0]["norms"][number], alone["norms"][number])
    for name, value in alone["net"].items():
        torch.testing.assert_close(both[0]["net"][name], value)
        assert torch.equal(both[0]["net"][name], both[1]["net"][name])

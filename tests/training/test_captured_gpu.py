"""A captured step computes what launching every kernel from the host computes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from engram_lab.model.attention import AttentionConfig
from engram_lab.model.config import ModelConfig
from engram_lab.model.engram import EngramConfig
from engram_lab.model.experts import FeedForwardConfig
from engram_lab.model.initialise import initialise
from engram_lab.model.transformer import Transformer
from engram_lab.training.captured import CapturedStep
from engram_lab.training.execution import ExecutionConfig, prepare
from engram_lab.training.optimizer import OptimizerConfig, build_optimizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS = 12


def network(own_tables: bool) -> Transformer:
    config = ModelConfig(
        vocab_size=512,
        d_model=128,
        n_layers=3,
        attention=AttentionConfig(n_heads=2, n_kv_heads=1),
        ffn=FeedForwardConfig(experts=8, top_k=2, expert_hidden=64, shared_experts=1),
        engram=EngramConfig(layers=(1,), heads=2, row_dim=16, rows_per_head=200),
    )
    made = Transformer(config, tables=None if own_tables else nn.ModuleList())
    initialise(made, 0)
    return made.cuda().train()


def train(net: Transformer, captured: bool, own_tables: bool, compiled: bool) -> tuple[Tensor, Tensor]:
    """Losses [STEPS] and, with readings from outside, the gradients of what they are read from."""
    prepare(net, ExecutionConfig(compile=compiled), torch.device("cuda"))
    optimizer = build_optimizer(net.named_parameters(), net.parameter_roles(), OptimizerConfig())
    optimizer.captures = captured
    step = CapturedStep(net, net.loss) if captured else None
    generator = torch.Generator("cuda").manual_seed(0)
    assert net.hash is not None
    rows = torch.randn(200, net.config.engram.reading_dim, device="cuda", generator=generator)  # type: ignore[union-attr]
    ids = torch.randint(512, (4, 65), device="cuda", generator=generator)
    losses, row_gradients = [], []
    for number in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 2**-10 * min(1.0, (number + 1) / 4)  # no rounding where a graph keeps it in float32
        ids = ids.roll(1, 0)  # the same text, so that it is learnt, in other places
        inputs = {"ids": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}
        leaf = rows.clone().requires_grad_()
        if own_tables:
            inputs["addresses"] = net.hash(inputs["ids"])
        else:
            inputs["readings"] = leaf[inputs["ids"] % len(rows)].unsqueeze(0)
        # The fused kernels of attention add up in no fixed order.
        with torch.autocast("cuda", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            loss = (step or net.loss)(**inputs)
        if step is None:
            optimizer.zero_grad()
            loss.backward()
        losses.append(loss.detach().clone())
        row_gradients.append(torch.zeros(()) if leaf.grad is None else leaf.grad)
        optimizer.clip(0.5, own=None if step is None else step.norm)
        optimizer.step()
        if step is None:
            net.update_router_bias()
    return torch.stack(losses), torch.stack(row_gradients)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("own_tables", [True, False])
def test_a_captured_step_trains_as_a_launched_one(own_tables: bool, compiled: bool) -> None:
    first = network(own_tables)
    second = copy.deepcopy(first)
    launched = train(first, False, own_tables, compiled)
    captured = train(second, True, own_tables, compiled)
    assert launched[0][-1] < launched[0][0]
    torch.testing.assert_close(captured, launched, rtol=1e-5, atol=1e-6)
    for a, b in zip(first.routers(), second.routers(), strict=True):
        assert torch.equal(a.bias, b.bias)  # the loads were counted once a step, warm-up left out

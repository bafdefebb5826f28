"""What changes how a step is carried out changes nothing that it computes."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from engram_lab.model.attention import AttentionConfig
from engram_lab.model.config import ModelConfig
from engram_lab.model.engram import EngramConfig
from engram_lab.model.experts import FeedForwardConfig
from engram_lab.model.initialise import initialise
from engram_lab.model.transformer import Transformer
from engram_lab.training.execution import ExecutionConfig, prepare

IDS = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(3))


def network(**settings: Any) -> Transformer:
    config = ModelConfig(
        vocab_size=50,
        d_model=16,
        n_layers=3,
        attention=AttentionConfig(n_heads=4, n_kv_heads=2),
        ffn=FeedForwardConfig(experts=6, top_k=2, expert_hidden=8, leading_dense_layers=1, balance_loss=0.01),
        engram=EngramConfig(layers=(1, 2), heads=2, row_dim=4, rows_per_head=31),
    )
    made = Transformer(replace(config, **settings)).double()
    initialise(made, 0)
    return made


def gradients(net: Transformer) -> dict[str, Tensor]:
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def test_recomputed_activations_change_neither_gradients_nor_loads() -> None:
    usual = network()
    recomputing = copy.deepcopy(usual)
    prepare(recomputing, ExecutionConfig(activation_checkpointing=True), torch.device("cpu"))
    kept: dict[bool, int] = {}
    for net, again in ((usual, False), (recomputing, True)):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t
        ):
            loss = net.loss(IDS, IDS.roll(-1, 1))
        kept[again] = sum(sizes)
        loss.backward()
    assert kept[True] < 0.5 * kept[False]
    ours, theirs = gradients(recomputing), gradients(usual)
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-12, atol=1e-14, msg=name)
    for a, b in zip(recomputing.router_counts(), usual.router_counts(), strict=True):
        assert torch.equal(a, b)
        assert a.sum() == IDS.numel() * 2


def test_a_cpu_is_not_compiled_for_unless_asked() -> None:
    net = network()
    prepare(net, ExecutionConfig(), torch.device("cpu"))
    assert net.blocks[0].compute.__func__ is type(net.blocks[0]).compute


@pytest.mark.slow
def test_compiled_blocks_compute_the_same() -> None:
    usual = network(ffn=FeedForwardConfig(experts=6, top_k=2, expert_hidden=8)).float()
    compiled = copy.deepcopy(usual)
    prepare(compiled, ExecutionConfig(compile=True), torch.device("cpu"))
    for net in (usual, compiled):
        net.loss(IDS, IDS.roll(-1, 1)).backward()
    ours = gradients(compiled)
    for name, grad in gradients(usual).items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_nothing_is_compiled_again_when_training_and_evaluation_take_turns() -> None:
    net = network(ffn=FeedForwardConfig(experts=6, top_k=2, expert_hidden=8)).float()
    prepare(net, ExecutionConfig(compile=True), torch.device("cpu"))
    compiled = []
    for _ in range(3):
        net.train().loss(IDS, IDS.roll(-1, 1)).backward()
        with torch.no_grad():
            net.eval().loss(IDS, IDS.roll(-1, 1), reduction="none")
        compiled.append(counters["stats"]["unique_graphs"])
    assert compiled[0] > 0
    assert compiled[1:] == compiled[:1] * 2

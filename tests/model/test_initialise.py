import dataclasses

import pytest
import torch

from engram_lab.memory.stores import DRAWN
from engram_lab.model.attention import AttentionConfig
from engram_lab.model.config import ModelConfig
from engram_lab.model.engram import EngramConfig
from engram_lab.model.experts import FeedForwardConfig
from engram_lab.model.initialise import draw, initial_rows, initialise
from engram_lab.model.transformer import Transformer


def weights(seed: int, experts: int, rows: int | None) -> dict[str, torch.Tensor]:
    memory = None if rows is None else EngramConfig(layers=(1,), heads=2, row_dim=4, rows_per_head=rows)
    config = ModelConfig(
        vocab_size=300,
        d_model=32,
        n_layers=2,
        attention=AttentionConfig(n_heads=2),
        ffn=FeedForwardConfig(experts=experts, top_k=2, expert_hidden=8),
        engram=memory,
    )
    model = Transformer(config)
    initialise(model, seed)
    return {name: p.detach() for name, p in model.named_parameters()}


def test_cells_of_a_study_share_what_their_shapes_share():
    large, small, bare = weights(0, 12, 31), weights(0, 5, 211), weights(0, 12, None)
    assert large["blocks.0.ffn.gate_up"].shape[0] == 12
    for name, values in small.items():
        other = large[name]
        n = min(len(values), len(other))
        assert torch.equal(values[:n], other[:n]), name
    for name, values in bare.items():
        assert torch.equal(values, large[name]), name


def test_seeds_and_names_differ():
    a, b = weights(0, 4, 31), weights(1, 4, 31)
    for name in a:
        if a[name].std() > 0:
            assert not torch.equal(a[name], b[name]), name
    assert not torch.equal(a["blocks.0.attention.query.weight"], a["blocks.1.attention.query.weight"])
    assert not torch.equal(a["blocks.0.ffn.out"][0], a["blocks.0.ffn.out"][1])


def test_same_seed_same_weights_whatever_ran_before():
    a = weights(7, 4, 31)
    torch.manual_seed(123)
    torch.randn(5)
    b = weights(7, 4, 31)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("embedding.weight", 0.5),
        ("head.weight", 0.02),
        ("tables.0.weight", 0.02),
        ("blocks.0.attention.query.weight", 32**-0.5),
        ("blocks.0.attention.out.weight", 32**-0.5 / 2),
        ("blocks.0.ffn.gate_up", 32**-0.5),
        ("blocks.0.ffn.out", 8**-0.5 / 2),
        ("blocks.0.ffn.router.weight", 32**-0.5),
    ],
)
def test_scales(name, std):
    values = weights(0, 64, 500)[name]
    assert values.std().item() == pytest.approx(std, rel=0.05)
    assert abs(values.mean().item()) < 0.1 * std


def test_norms_start_at_one_and_convolutions_at_zero():
    drawn = weights(0, 4, 31)
    assert (drawn["blocks.1.attention_norm.weight"] == 1).all()
    assert (drawn["blocks.1.engram.conv.weight"] == 0).all()


def test_any_block_can_be_drawn_alone():
    whole = torch.empty(1000, 3)
    draw(whole, "0/x", 1.0, 256)
    prefix = torch.empty(300, 3)
    draw(prefix, "0/x", 1.0, 256)
    assert torch.equal(whole[:300], prefix)


def test_configuration_round_trips_through_plain_values():
    config = ModelConfig(engram=EngramConfig())
    plain = dataclasses.asdict(config)
    rebuilt = ModelConfig(
        **{
            **plain,
            "attention": AttentionConfig(**plain["attention"]),
            "ffn": FeedForwardConfig(**plain["ffn"]),
            "engram": EngramConfig(**plain["engram"]),
        }
    )
    assert rebuilt == config


@pytest.mark.parametrize("memory", [0, 1])
def test_rows_of_a_table_are_drawn_without_those_before_them(memory: int):
    config = ModelConfig(
        vocab_size=300,
        d_model=32,
        n_layers=2,
        attention=AttentionConfig(n_heads=2),
        ffn=FeedForwardConfig(experts=5, top_k=2, expert_hidden=8),
        engram=EngramConfig(layers=(0, 1), heads=2, row_dim=4, rows_per_head=DRAWN),
    )
    model = Transformer(config)
    initialise(model, 3)
    table = model.get_parameter(f"tables.{memory}.weight").detach()
    assert len(table) > 3 * DRAWN
    for first, last in (
        (0, len(table)),
        (0, 1),
        (DRAWN - 1, DRAWN + 1),
        (DRAWN + 44, DRAWN + 45),
        (DRAWN, 2 * DRAWN),
        (17, 3 * DRAWN + 32),
        (7, 7),
    ):
        out = torch.full((last - first, 4), float("nan"))
        initial_rows(3, memory, first, out)
        assert torch.equal(out, table[first:last])

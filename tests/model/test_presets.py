"""The presets against published sizes, and Qwen's module against the one in transformers."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engram_lab.memory.resident import stored_bytes
from engram_lab.model.config import ModelConfig
from engram_lab.model.engram import Engram
from engram_lab.model.experts import FeedForwardConfig
from engram_lab.model.hashing import NgramHash, table_rows
from engram_lab.model.initialise import initialise
from engram_lab.model.presets import PAPER, PRESETS, QWEN_PLE, V4_1
from engram_lab.model.transformer import Transformer


def test_published_table_sizes():
    assert table_rows(V4_1.engram) == (384_006_168, 384_016_682)
    assert table_rows(QWEN_PLE.engram) == (320_001_536,)
    rows = sum(table_rows(PAPER.engram))
    assert rows * PAPER.engram.row_dim == pytest.approx(5.79e9, rel=1e-3)
    larger = sum(table_rows(replace(PAPER.engram, rows_per_head=7_239_680)))
    assert larger * PAPER.engram.row_dim == pytest.approx(18.5e9, rel=3e-3)


def test_published_row_sizes():
    sizes = {name: stored_bytes(p.engram.row_dim, p.engram.row_storage) for name, p in PRESETS.items()}
    assert sizes == {"paper": 160, "v4_1": 264, "qwen_ple": 161}
    assert PAPER.engram.reading_dim == 1280


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("streams", [1, 4])
def test_every_preset_learns(name, streams):
    engram = replace(PRESETS[name].engram, layers=(1,), row_dim=8, heads=2, rows_per_head=200)
    config = ModelConfig(
        vocab_size=50, d_model=32, n_layers=2, ffn=FeedForwardConfig(experts=4, top_k=2), engram=engram
    )
    torch.manual_seed(0)
    network = Transformer(replace(config, streams=streams))
    initialise(network, 0)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    ids = torch.randint(50, (4, 17))
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = network.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert network.tables[0].weight.grad.abs().sum() > 0
    assert losses[-1] < losses[0] - 0.5


def _qwen(streams=3):
    from transformers.models.qwen4_exp import modeling_qwen4_exp as modeling  # takes seconds to import

    settings = SimpleNamespace(
        hidden_size=24,
        hc_count=streams,
        ple_embed_dim=32,
        ple_conv_kernel_size=4,
        ngram_size=3,
        heads_per_ngram=4,
        ngram_vocab_size_base=500,
        make_ngram_vocab_size_divisible_by=128,
        seed=1234,
        eos_token_id=7,
        vocab_size=60,
        rms_norm_eps=1e-6,
    )
    torch.manual_seed(1)
    return [modeling.Qwen4ExpTextPLELayer(settings, layer, n).double() for n, layer in enumerate((0, 2))]


def test_parity_with_transformers_addresses_and_module():
    """Copied weights, every stream, addresses included."""
    streams = 3
    theirs = _qwen(streams)
    config = replace(QWEN_PLE.engram, layers=(0, 2), heads=4, row_dim=4, rows_per_head=500)
    rule = NgramHash.build(config, None, 60, 7)
    ids = torch.randint(60, (2, 40))
    ids[:, [3, 4, 17, 30]] = 7
    addresses = rule.addresses(ids.numpy())
    for m, other in enumerate(theirs):
        embedding = other.ple_embedding
        assert rule.rows[m] == embedding.ngram_embedding.weight.shape[0]
        assert rule.multipliers[m].tolist() == embedding.layer_multipliers.tolist()
        assert rule.primes[m].tolist() == embedding.head_vocab_sizes
        for p in other.parameters():
            torch.nn.init.normal_(p, std=0.4)
        reading = embedding(ids, None)
        rows = embedding.ngram_embedding.weight[torch.from_numpy(addresses[m].astype(np.int64))]
        torch.testing.assert_close(rows.flatten(-2), reading, rtol=0, atol=0)

        ours = Engram(config, 24, norm_eps=1e-6, streams=streams).double()
        state = {
            "value.weight": other.value_proj.weight,
            "key.weight": other.key_proj.weight,
            "conv.weight": other.conv1d.weight,
        }
        for s in range(streams):
            part = slice(24 * s, 24 * (s + 1))
            state[f"gate.query_norms.{s}.weight"] = 1 + other.norm_query.weight[part]
            state[f"gate.key_norms.{s}.weight"] = 1 + other.norm_key.weight[part]
            state[f"conv.norms.{s}.weight"] = 1 + other.norm_conv.weight[part]
        ours.load_state_dict(state)
        h = torch.randn(2, 40, streams, 24, dtype=torch.float64)
        expected = other(h.flatten(-2), ids, None).unflatten(-1, (streams, 24))
        # transformers' norms round to float32 inside, so the comparison ends there
        torch.testing.assert_close(ours(h, reading), expected, rtol=1e-5, atol=1e-5)

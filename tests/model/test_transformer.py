import dataclasses

import pytest
import torch
import torch.nn.functional as F

from engram_lab.errors import UserError
from engram_lab.model.attention import AttentionConfig
from engram_lab.model.config import ModelConfig
from engram_lab.model.engram import EngramConfig
from engram_lab.model.experts import FeedForwardConfig
from engram_lab.model.initialise import initialise
from engram_lab.model.transformer import Transformer

MEMORY = EngramConfig(layers=(1, 2), heads=2, row_dim=4, rows_per_head=31)


def config(**settings) -> ModelConfig:
    base = {
        "vocab_size": 50,
        "d_model": 16,
        "n_layers": 3,
        "attention": AttentionConfig(n_heads=4, n_kv_heads=2),
        "ffn": FeedForwardConfig(experts=6, top_k=2, expert_hidden=8, leading_dense_layers=1),
        "engram": MEMORY,
    }
    return ModelConfig(**{**base, **settings})


def network(seed: int = 0, **settings) -> Transformer:
    model = Transformer(config(**settings)).double()
    initialise(model, seed)
    return model


IDS = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(3))


def test_memory_comes_before_attention_and_reads_its_own_table():
    model = network()
    addresses = model.hash(IDS)
    h = model.embedding(IDS)
    rope = None
    seen = {}
    for layer, block in enumerate(model.blocks):
        block.attention.register_forward_pre_hook(lambda _m, args, layer=layer: seen.__setitem__(layer, args))
    logits = model(IDS)
    rope = seen[0][1]
    memories = iter(range(2))
    for layer, block in enumerate(model.blocks):
        if layer in MEMORY.layers:
            m = next(memories)
            h = h + block.engram(h, model.tables[m].weight[addresses[m].long()].flatten(-2))
        torch.testing.assert_close(seen[layer][0], block.attention_norm(h))
        h = h + block.attention(block.attention_norm(h), rope)
        h = h + block.ffn(block.ffn_norm(h))
    torch.testing.assert_close(logits, model.norm(h) @ model.head.weight.t())


def test_a_network_lies_wholly_on_the_device_it_is_made_on():
    """The hash's tables come from numpy, which knows no device; "meta" stands for a GPU."""
    with torch.device("meta"):
        model = Transformer(config())
    there = {name: tensor.device.type for name, tensor in model.state_dict().items()}
    assert any(name.startswith("hash.") for name in there)
    assert set(there.values()) == {"meta"}, there


def test_given_addresses_replace_hashing():
    model = network()
    addresses = model.hash(IDS)
    assert addresses.shape == (2, 2, 12, 4)
    assert torch.equal(model(IDS, addresses), model(IDS))
    assert not torch.allclose(model(IDS, torch.zeros_like(addresses)), model(IDS))


@pytest.mark.parametrize("settings", [{}, {"engram": None}, {"ffn": FeedForwardConfig(experts=0)}])
def test_later_tokens_never_change_earlier_logits(settings):
    model = network(**settings)
    for parameter in model.parameters():
        if parameter.ndim == 3 and parameter.shape[1] == 1:
            torch.nn.init.normal_(parameter)
    logits = model(IDS)
    for t in range(1, 12):
        changed = IDS.clone()
        changed[:, t:] = (changed[:, t:] + 1) % 50
        after = model(changed)
        torch.testing.assert_close(after[:, :t], logits[:, :t], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(after[:, t], logits[:, t])


def test_loss_is_the_cross_entropy_of_the_logits():
    model, targets = network(), IDS.roll(-1, 1)
    expected = F.cross_entropy(model(IDS).flatten(0, 1), targets.flatten(), reduction="none").view(2, 12)
    torch.testing.assert_close(model.loss(IDS, targets, reduction="none"), expected)
    torch.testing.assert_close(model.loss(IDS, targets), expected.mean())
    torch.testing.assert_close(model.loss(IDS, targets, model.hash(IDS), reduction="sum"), expected.sum())


@pytest.mark.parametrize("settings", [{}, {"tie_embeddings": True}, {"ffn": FeedForwardConfig(experts=0)}])
def test_every_parameter_receives_a_gradient_and_one_role(settings):
    model = network(**settings)
    ids = torch.randint(50, (4, 64), generator=torch.Generator().manual_seed(0))
    model.loss(ids, ids.roll(-1, 1)).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # Zero convolution weights pass nothing on to the norm before them.
    assert all("conv.norms" in name for name in without), without
    roles = model.parameter_roles()
    assert list(roles) == [name for name, _ in model.named_parameters()]
    assert roles["tables.0.weight"] == "table"
    assert roles["embedding.weight"] == "embedding"
    assert roles["blocks.0.attention.query.weight"] == "matrix"
    assert roles["blocks.1.engram.value.weight"] == "matrix"
    assert roles["blocks.1.engram.conv.weight"] == "vector"
    assert roles["blocks.1.attention_norm.weight"] == "vector"
    if model.routers():
        assert roles["blocks.1.ffn.gate_up"] == roles["blocks.1.ffn.router.weight"] == "matrix"


def test_router_counts_are_kept_for_every_block_of_experts():
    model = network()
    model.loss(IDS, IDS)
    counts = model.router_counts()
    assert [c.sum().item() for c in counts] == [IDS.numel() * 2] * 2
    counts[0].fill_(0)[0] = 5
    model.update_router_bias()
    first = model.routers()[0].bias
    assert first[0] < 0 < first[1]
    assert all(c.sum() == 0 for c in model.router_counts())


def test_balance_loss_joins_the_mean_loss_in_training_only():
    ffn = FeedForwardConfig(experts=6, top_k=2, expert_hidden=8, balance_loss=0.1)
    model = network(ffn=ffn)
    trained, plain = model.loss(IDS, IDS), model.loss(IDS, IDS, reduction="sum") / IDS.numel()
    imbalance = sum(router.imbalance for router in model.routers())
    assert imbalance > 3
    torch.testing.assert_close(trained, plain + 0.1 * imbalance)
    torch.testing.assert_close(model.eval().loss(IDS, IDS), plain)


def test_a_frozen_table_takes_no_gradient():
    model = network(engram=dataclasses.replace(MEMORY, frozen_table=True))
    model.loss(IDS, IDS).backward()
    assert model.tables[0].weight.grad is None
    assert model.parameter_roles()["tables.0.weight"] == "table"


def test_rows_kept_inside_a_module_are_a_table_too():
    memory = EngramConfig(
        layers=(1,), module="product_key", heads=2, row_dim=4, product_keys=5, product_top_k=2
    )
    roles = network(engram=memory).parameter_roles()
    assert roles["blocks.1.engram.table.weight"] == "table"
    assert roles["blocks.1.engram.half_keys"] == "matrix"


def test_autocast_stays_close_to_float32():
    model = network().float()
    exact = model.loss(IDS, IDS)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.loss(IDS, IDS)
    rough.backward()
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"d_model": 18}, r"d_model is 18.*multiple of 8.*nearest is 16"),
        ({"n_layers": 2}, "engram.layers names block 2.*nearest is 1"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0"),
        ({"ffn": FeedForwardConfig(leading_dense_layers=4)}, "leading_dense_layers is 4.*n_layers = 3"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(UserError, match=words):
        config(**settings)

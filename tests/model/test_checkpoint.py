import dataclasses
import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from engram_lab.errors import UserError
from engram_lab.memory.config import MemoryConfig
from engram_lab.memory.export import export_rows
from engram_lab.memory.far import FarTable
from engram_lab.memory.layout import RecordLayout
from engram_lab.memory.stores import DeviceStore
from engram_lab.model import checkpoint
from engram_lab.model.attention import AttentionConfig
from engram_lab.model.checkpoint import load, read_record, save, table_sizes
from engram_lab.model.config import ModelConfig
from engram_lab.model.engram import EngramConfig
from engram_lab.model.experts import FeedForwardConfig
from engram_lab.model.hashing import ADDRESS_FIELDS, NgramHash
from engram_lab.model.initialise import initialise
from engram_lab.model.rope import YarnConfig
from engram_lab.model.transformer import Transformer
from engram_lab.plain import from_plain, to_plain

CANONICAL = np.arange(40, dtype=np.int32) // 2
IDS = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(0))
FULL = ModelConfig(
    vocab_size=40,
    d_model=16,
    n_layers=2,
    streams=2,
    attention=AttentionConfig(kind="latent", n_heads=2, yarn=YarnConfig()),
    ffn=FeedForwardConfig(experts=4, top_k=2, expert_hidden=8, shared_hidden=(4, 12)),
    engram=EngramConfig(layers=(1,), heads=2, row_dim=4, rows_per_head=(31, 41)),
)


def network(config: ModelConfig = FULL) -> Transformer:
    model = Transformer(config, canonical=torch.from_numpy(CANONICAL), eos_id=5)
    initialise(model, 0)
    for router in model.routers():
        router.bias.normal_()
    return model.eval()


@pytest.mark.parametrize(
    "config",
    [
        FULL,
        dataclasses.replace(FULL, tie_embeddings=True, streams=1),
        dataclasses.replace(FULL, engram=None, attention=AttentionConfig(n_heads=2)),
        dataclasses.replace(FULL, engram=dataclasses.replace(FULL.engram, canonical=False)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip_is_exact(tmp_path, config, dtype):
    model = network(config).to(dtype)
    save(model, tmp_path / "new" / "folder", tokenizer_hash="abc")
    again = load(tmp_path / "new" / "folder", tokenizer_hash="abc", canonical=CANONICAL)
    assert again.config == model.config
    assert again.eos_id == 5
    assert not again.training
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert torch.equal(again(IDS), model(IDS))
    assert (again.head.weight is again.embedding.weight) == config.tie_embeddings
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        "model.json",
        "model.safetensors",
    ]


def refusal(folder, **arguments) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, **arguments)
    message = str(caught.value)
    assert message.endswith((".", "?"))
    assert "\n" not in message
    return message


def edit(folder, **changes) -> None:
    path = folder / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_who_may_read_the_folder_may_read_the_weights(tmp_path):
    tmp_path.chmod(0o755)
    save(network(), tmp_path, tokenizer_hash="t")
    assert {file.stat().st_mode & 0o777 for file in tmp_path.glob("*.safetensors")} == {0o644}


def test_another_tokenizer_is_refused(tmp_path):
    save(network(), tmp_path, tokenizer_hash="a" * 64)
    assert "trained with tokenizer aaaaaaaaaaaa, but the text comes from bbbbbbbbbbbb" in refusal(
        tmp_path, tokenizer_hash="b" * 64
    )


def test_another_canonical_map_is_refused_where_it_matters(tmp_path):
    save(network(), tmp_path / "memory", tokenizer_hash="a")
    assert "trained with canonical map" in refusal(tmp_path / "memory", canonical=CANONICAL + 1)
    save(network(dataclasses.replace(FULL, engram=None)), tmp_path / "bare", tokenizer_hash="a")
    load(tmp_path / "bare", canonical=CANONICAL + 1)


def test_another_hash_version_is_refused_where_it_matters(tmp_path, monkeypatch):
    save(network(), tmp_path / "memory", tokenizer_hash="a")
    save(network(dataclasses.replace(FULL, engram=None)), tmp_path / "bare", tokenizer_hash="a")
    monkeypatch.setattr(checkpoint, "HASH_VERSION", checkpoint.HASH_VERSION + 1)
    assert "hash version" in refusal(tmp_path / "memory")
    load(tmp_path / "bare")


def test_a_hash_computed_otherwise_is_refused(tmp_path):
    model = network()
    model.hash.multipliers += 2
    save(model, tmp_path, tokenizer_hash="a")
    assert "hash.multipliers differs from what this version computes" in refusal(tmp_path)


OTHER = {
    "module": "over_encoding",
    "layers": [0],
    "orders": [2, 4],
    "heads": 4,
    "rows_per_head": [31, 37],
    "hash_seed": 7,
    "boundary": "sequence_start",
    "dead_tokens": [3],
    "canonical": False,
    "multipliers": "splitmix",
    "pad_rows_to": 2,
    "addresses": "shuffled",
}
"""Another value for each field that addresses depend on."""


@pytest.mark.parametrize("field", ADDRESS_FIELDS)
def test_an_edited_address_field_is_refused(tmp_path, field):
    save(network(), tmp_path, tokenizer_hash="a")
    plain = json.loads((tmp_path / "model.json").read_text())["network"]
    assert plain["engram"][field] != OTHER[field]
    plain["engram"][field] = OTHER[field]
    if field == "module":
        plain["engram"]["layers"] = [0]
    edit(tmp_path, network=plain)
    message = refusal(tmp_path, tokenizer_hash="a")
    assert "was changed in a field that decides which rows are read" in message
    assert field in message


@pytest.mark.parametrize("change", [{"eos_id": 6}, {"tokenizer_hash": "b"}])
def test_an_edited_record_is_refused(tmp_path, change):
    save(network(), tmp_path, tokenizer_hash="a")
    edit(tmp_path, **change)
    assert "decides which rows are read" in refusal(tmp_path, **change if "tokenizer_hash" in change else {})


def test_fields_left_out_of_the_digest_change_no_address():
    """So that none is forgotten: every other field may differ and the rule stays what it is."""
    values = {
        "row_dim": 8,
        "conv_kernel": 0,
        "gate": "none",
        "fused_projection": True,
        "frozen_table": True,
        "row_storage": "bfloat16",
        "product_keys": 99,
        "product_top_k": 3,
        "mlp_hidden": 5,
    }
    assert {*values, *ADDRESS_FIELDS} == {field.name for field in dataclasses.fields(EngramConfig)}
    for name, value in values.items():
        changed = dataclasses.replace(FULL.engram, **{name: value})
        assert changed != FULL.engram
        rule, same = (NgramHash.build(memory, CANONICAL, 40, 5) for memory in (changed, FULL.engram))
        assert np.array_equal(rule.addresses(IDS.numpy()), same.addresses(IDS.numpy()))


def test_a_checkpoint_of_format_1_is_still_loaded(tmp_path):
    model = network()
    save(model, tmp_path, tokenizer_hash="a")
    plain = json.loads((tmp_path / "model.json").read_text())
    del plain["address_digest"]
    (tmp_path / "model.json").write_text(json.dumps(plain | {"format": 1}))
    assert torch.equal(load(tmp_path, tokenizer_hash="a", canonical=CANONICAL)(IDS), model(IDS))
    (tmp_path / "model.json").write_text(json.dumps(plain))
    assert "decides which rows are read" in refusal(tmp_path)


def test_damage_is_named(tmp_path):
    assert "no checkpoint: it holds no model.json" in refusal(tmp_path)
    save(network(), tmp_path, tokenizer_hash="a")
    edit(tmp_path, canonical_hash="0" * 64)
    assert "decides which rows are read" in refusal(tmp_path)
    save(network(), tmp_path, tokenizer_hash="a")
    edit(tmp_path, network=dataclasses.asdict(dataclasses.replace(FULL, d_model=32)))
    assert "damaged: its weights" in refusal(tmp_path)
    edit(tmp_path, eos="5")
    assert "is damaged: unknown model.json field 'eos'. Did you mean 'eos_id'?" in refusal(tmp_path)
    save(network(), tmp_path, tokenizer_hash="a")
    (tmp_path / "model.json").write_text('{"format": 2}')
    assert "is damaged" in refusal(tmp_path)
    edit(tmp_path, format=99)
    assert "format 99, but this version reads formats 1, 2 and 3" in refusal(tmp_path)
    save(network(), tmp_path, tokenizer_hash="a")
    whole = (tmp_path / "model.safetensors").read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    for changed in (whole[: len(whole) // 2], bytes(flipped)):
        (tmp_path / "model.safetensors").write_bytes(changed)
        assert "model.safetensors is damaged" in refusal(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole)
    edit(tmp_path, format=2, weights_checksum=None)  # as an older version saved it: loaded on trust
    load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors cannot be read" in refusal(tmp_path)
    (tmp_path / "model.json").write_text("{")
    assert "cannot be read as JSON" in refusal(tmp_path)


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path):
    """A file that may not grow fails as on a full disk: in safetensors, which has errors of its own."""
    old, limits = network(), resource.getrlimit(resource.RLIMIT_FSIZE)
    save(old, tmp_path, tokenizer_hash="a")
    size = (tmp_path / "model.safetensors").stat().st_size
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
        with pytest.raises(UserError, match=r"cannot be written: .*File too large") as caught:
            save(network(), tmp_path, tokenizer_hash="b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert read_record(tmp_path).tokenizer_hash == "a"
    assert torch.equal(load(tmp_path)(IDS), old(IDS))


def test_configurations_survive_json():
    plain = json.loads(json.dumps(to_plain(FULL)))
    assert from_plain(ModelConfig, plain, "model") == FULL
    plain["attention"]["n_head"] = 3
    with pytest.raises(UserError, match=r"unknown model field 'attention.n_head'. Did you mean 'n_heads'\?"):
        from_plain(ModelConfig, plain, "model")


def save_in_shards(model: Transformer, folder: Path, **options) -> None:
    """As a run does whose rows live in a store: the network itself has none."""
    memory = model.config.engram
    layout = RecordLayout(row_dim=memory.row_dim, rule="adam")
    sizes = table_sizes(memory)
    store = DeviceStore(sum(sizes.values()), layout.record_bytes)
    layout.encode(torch.cat([model.get_parameter(name).detach() for name in sizes]), store.records)
    layout.fields(store.records)["exp_avg"].normal_()
    far = nn.ModuleList(FarTable(m) for m in range(len(memory.layers)))
    bare = Transformer(model.config, canonical=torch.from_numpy(CANONICAL), eos_id=5, tables=far)
    bare.load_state_dict(model.state_dict(), strict=False)

    def rows(where: Path) -> None:
        export_rows(store, where, sizes, layout.decode, row_dim=memory.row_dim, **options)

    save(bare, folder, tokenizer_hash="a", rows=rows)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert not [name for name in file.keys() if name.startswith("tables.")]  # noqa: SIM118


@pytest.mark.parametrize("max_shard_bytes", [200, 1 << 20])
def test_tables_in_shards_give_the_same_network(tmp_path, max_shard_bytes):
    model = network()
    save_in_shards(model, tmp_path, max_shard_bytes=max_shard_bytes)
    again = load(tmp_path, tokenizer_hash="a", canonical=CANONICAL)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())
    assert torch.equal(again(IDS), model(IDS))
    for place in (MemoryConfig(tier="host"), MemoryConfig(tier="disk", directory=str(tmp_path / "tables"))):
        assert torch.equal(load(tmp_path, tables=place)(IDS), model(IDS)), place.tier
    # Saved whole in their place, the shards are gone.
    save(model, tmp_path, tokenizer_hash="a")
    assert not list(tmp_path.glob("rows*"))
    assert torch.equal(load(tmp_path)(IDS), model(IDS))


@pytest.mark.parametrize("storage", ["bfloat16", "float8"])
def test_shards_hold_rows_as_they_are_served(tmp_path, storage):
    memory = dataclasses.replace(FULL.engram, row_storage=storage)
    model = network(dataclasses.replace(FULL, engram=memory))
    save_in_shards(model, tmp_path, storage=storage)
    again = load(tmp_path)
    assert torch.equal(again(IDS), model(IDS)), "rows are rounded once, whether before or after saving"
    assert not torch.equal(again.tables[0].weight, model.tables[0].weight)


def test_damage_to_shards_is_named(tmp_path):
    save_in_shards(network(), tmp_path, max_shard_bytes=500)
    shard = sorted(tmp_path.glob("rows-00002*"))[0]
    whole, index = shard.read_bytes(), (tmp_path / "rows.index.json").read_bytes()
    shard.write_bytes(whole[:-1])
    assert f"{shard} is damaged" in refusal(tmp_path)
    shard.unlink()
    assert f"{shard} is missing" in refusal(tmp_path)
    shard.write_bytes(whole)
    load(tmp_path)
    other = network()
    torch.nn.init.ones_(other.tables[0].weight)
    save_in_shards(other, tmp_path, max_shard_bytes=500)
    (tmp_path / "rows.index.json").write_bytes(index)
    assert "its table rows are not those that model.json names" in refusal(tmp_path)
    (tmp_path / "rows.index.json").unlink()
    assert "there is no rows.index.json" in refusal(tmp_path)


def test_rows_that_cannot_be_exported_leave_the_old_checkpoint(tmp_path):
    old = network()
    save_in_shards(old, tmp_path)

    def full_disk(_folder):
        raise UserError("no room.")

    with pytest.raises(UserError, match="no room"):
        save(network(), tmp_path, tokenizer_hash="b", rows=full_disk)
    assert read_record(tmp_path).tokenizer_hash == "a"
    assert torch.equal(load(tmp_path)(IDS), old(IDS))

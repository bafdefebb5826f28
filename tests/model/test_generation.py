import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_lab.errors import UserError
from engram_lab.memory.config import MemoryConfig
from engram_lab.memory.lookup import ServingTable
from engram_lab.model.attention import AttentionConfig
from engram_lab.model.cache import Cache
from engram_lab.model.checkpoint import load, save
from engram_lab.model.config import ModelConfig
from engram_lab.model.engram import EngramConfig
from engram_lab.model.experts import FeedForwardConfig
from engram_lab.model.generation import IN_TURN_BY_THREADS, Decoder, Sampling, generate, pad_left, stream
from engram_lab.model.graphs import captured
from engram_lab.model.initialise import initialise
from engram_lab.model.presets import PRESETS
from engram_lab.model.rope import YarnConfig
from engram_lab.model.transformer import Transformer

EOS, V = 3, 40
YARN = YarnConfig(factor=4.0, original_length=8)
MEMORY = EngramConfig(layers=(0, 2), orders=(2, 3), heads=2, row_dim=4, rows_per_head=31)
GROUPED = AttentionConfig(n_heads=4, n_kv_heads=2)
LATENT = AttentionConfig(kind="latent", n_heads=2, latent_dim=10, query_latent_dim=6, rope_dim=4, yarn=YARN)


def network(
    attention: AttentionConfig = GROUPED, streams: int = 1, d_model: int = 16, **memory
) -> Transformer:
    config = ModelConfig(
        vocab_size=V,
        d_model=d_model,
        n_layers=3,
        attention=attention,
        ffn=FeedForwardConfig(experts=4, top_k=2, expert_hidden=d_model // 2),
        engram=dataclasses.replace(MEMORY, **memory),
        streams=streams,
    )
    canonical = torch.arange(V, dtype=torch.int32) // 2
    model = Transformer(config, canonical=canonical, eos_id=EOS).double().eval()
    initialise(model, 0)
    for name, parameter in model.named_parameters():
        if "conv.weight" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
        elif name.startswith(("head", "tables")):
            parameter.data.mul_(20)  # logits of the order of one, and a memory that matters
    return model


def some_ids(*lengths: int) -> list[list[int]]:
    """Prompts that hold end-of-text ids in places where boundary rules differ."""
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(V, (n,), generator=generator).tolist() for n in lengths]
    for prompt in prompts:
        for place in (2, 5, 6):
            if place < len(prompt):
                prompt[place] = EOS
    return prompts


VARIANTS = {
    "sequence_start": {"boundary": "sequence_start"},
    "dead_tokens": {"boundary": "dead_tokens", "dead_tokens": (EOS, 7)},
    "reset_at_eos": {"boundary": "reset_at_eos"},
    "yarn": {"attention": dataclasses.replace(GROUPED, yarn=YARN)},
    "latent": {"attention": LATENT},
    "streams": {"streams": 2},
    "everything": {"attention": LATENT, "streams": 2, "boundary": "dead_tokens"},
    "orders 2-4, no conv": {"orders": (2, 3, 4), "conv_kernel": 0, "fused_projection": True},
    "raw ids, one order": {"orders": (3,), "canonical": False},
    "shuffled": {"addresses": "shuffled"},
    "constant": {"addresses": "constant"},
    "no gate, float8 rows": {"gate": "none", "row_storage": "float8"},
    "over_encoding": {"module": "over_encoding", "layers": (0,)},
    "amplified": {"module": "amplified", "layers": (0,), "streams": 2},
    "per_layer": {"module": "per_layer"},
    "product_key": {"module": "product_key", "product_keys": 5, "product_top_k": 2},
    "mlp": {"module": "mlp"},
}
SMALL = {"layers": (0, 2), "row_dim": 4, "rows_per_head": 31}
VARIANTS |= {
    name: {
        f.name: getattr(preset.engram, f.name)
        for f in dataclasses.fields(preset.engram)
        if f.name not in SMALL
    }
    | SMALL
    for name, preset in PRESETS.items()
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
@torch.no_grad()
def test_cached_logits_equal_the_full_forward(settings):
    """Unequal prompts in one batch, first in one call, then in calls of one, two and three tokens."""
    model = network(**settings)
    sequences = some_ids(17, 12, 14)
    tail = 9
    ids, padding = pad_left([s[:-tail] for s in sequences], EOS, torch.device("cpu"))
    rest = torch.tensor([s[-tail:] for s in sequences])
    cache = Cache.start(3, padding, 26, EOS)
    pieces = [model(ids, cache=cache)]
    for a, b in ((0, 1), (1, 3), (3, 6), (6, 7), (7, 8), (8, 9)):
        pieces.append(model(rest[:, a:b], cache=cache))
    cached = torch.cat(pieces, dim=1)
    for b, sequence in enumerate(sequences):
        full = model(torch.tensor([sequence]))[0]
        got = cached[b, padding[b] :]
        assert got.shape == full.shape
        torch.testing.assert_close(got, full, rtol=0, atol=1e-9)


@torch.no_grad()
def test_the_state_matters():
    """The test above would see it if keys, the n-gram history or the convolution's state were forgotten."""
    model = network()
    (sequence,) = some_ids(14)
    ids = torch.tensor([sequence])
    full = model(ids)[:, -1]

    def last(forget) -> torch.Tensor:
        cache = Cache.start(3, torch.zeros(1, dtype=torch.int64), 20, EOS)
        model(ids[:, :-1], cache=cache)
        forget(cache)
        return model(ids[:, -1:], cache=cache)[:, -1]

    def history(cache: Cache) -> None:
        cache.history.fill_(EOS)

    def convolution(cache: Cache) -> None:
        cache.layers[0].convolution.zero_()

    def keys(cache: Cache) -> None:
        cache.layers[1].kept[0].zero_()

    torch.testing.assert_close(last(lambda cache: None), full, rtol=0, atol=1e-9)
    for forget in (history, convolution, keys):
        assert (last(forget) - full).abs().max() > 1e-6, forget.__name__


def test_latent_attention_keeps_latents_only():
    model = network(attention=LATENT)
    cache = Cache.start(3, torch.zeros(1, dtype=torch.int64), 20, EOS)
    model(torch.tensor(some_ids(7)), cache=cache)
    assert [tuple(t.shape) for t in cache.layers[0].kept] == [(1, 20, 10), (1, 1, 20, 4)]


def test_greedy_is_the_same_alone_and_in_a_batch_and_equals_repeated_full_forwards():
    model = network()
    prompts = some_ids(3, 8, 5)
    greedy = Sampling(temperature=0)
    together = generate(model, prompts, 10, greedy)
    assert together == [generate(model, [prompt], 10, greedy)[0] for prompt in prompts]
    for prompt, continuation in zip(prompts, together, strict=True):
        ids = list(prompt)
        for token in continuation:
            assert token == model(torch.tensor([ids]))[0, -1].argmax().item()
            ids.append(token)


@pytest.mark.parametrize("batch", [1, 2, 4, 9])
def test_batches_in_turn_continue_every_prompt_as_one_batch_does(batch):
    model, greedy = network(), Sampling(temperature=0)
    prompts = some_ids(9, 3, 8, 5, 12)
    assert generate(model, prompts, 20, greedy, batch) == generate(model, prompts, 20, greedy)


def test_batches_draw_from_seeds_of_their_own():
    model = network()
    (prompt,) = some_ids(6)
    first, second = generate(model, [prompt, prompt], 12, Sampling(seed=3), 1)
    assert first != second
    assert generate(model, [prompt, prompt], 12, Sampling(seed=3), 1) == [first, second]


def test_rows_of_one_batch_are_asked_for_before_the_other_is_computed(monkeypatch):
    """Otherwise their reading would wait for nothing, and the device for it."""
    model, waiting, seen = network(addresses="shuffled"), 0, []
    compute, draw = Decoder._compute, Decoder._draw

    def counted_draw(decoder):
        nonlocal waiting
        draw(decoder)
        waiting += len(decoder._joins) > 0

    def counted_compute(decoder):
        nonlocal waiting
        seen.append(waiting)
        waiting -= 1
        compute(decoder)

    monkeypatch.setattr(Decoder, "_compute", counted_compute)
    monkeypatch.setattr(Decoder, "_draw", counted_draw)
    generate(model, some_ids(5, 5), 8, Sampling(temperature=0), 1)
    assert seen == [2] * 13 + [1]


def test_a_row_ends_at_end_of_text_and_the_others_go_on():
    model, hot = network(), Sampling(seed=2, temperature=5.0)
    prompts = some_ids(3, 8, 5, 9)
    rows = list(zip(*stream(model, prompts, 40, hot), strict=True))
    tokens = [[t for t in row if t is not None] for row in rows]
    for row, kept in zip(rows, tokens, strict=True):
        assert EOS not in kept[:-1]
        assert row[: len(kept)] == tuple(kept)
    assert len({len(kept) for kept in tokens}) > 1, "the seed should end rows at different steps"
    assert generate(model, prompts, 40, hot) == tokens


def test_seeds_decide_samples():
    model = network()
    draws = [generate(model, some_ids(4), 12, Sampling(seed=seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=9),
    temperature=st.floats(0.2, 3.0),
    top_k=st.none() | st.integers(1, 12),
    top_p=st.none() | st.floats(0.01, 1.0),
)
def test_distribution_is_the_definition(logits, temperature, top_k, top_p):
    row = torch.tensor([logits], dtype=torch.float64)
    got = Sampling(temperature=temperature, top_k=top_k, top_p=top_p).distribution(row)[0]
    assert got.sum().item() == pytest.approx(1)
    full = (row[0] / temperature).softmax(0)
    order = sorted(range(len(logits)), key=lambda i: -full[i].item())[: top_k or len(logits)]
    if top_p is not None:
        mass, kept, total = 0.0, [], sum(full[i].item() for i in order)
        for i in order:
            if mass / total >= top_p - 1e-9:
                break
            kept.append(i)
            mass += full[i].item()
        if mass / total < top_p + 1e-9:  # on the edge either answer is right
            return
        order = kept
    kept_mass = sum(full[i].item() for i in order)
    assert sorted(got[got > 0].tolist()) == pytest.approx(sorted(full[i].item() / kept_mass for i in order))


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(20_000, -1)
    sampling = Sampling(top_k=3, temperature=0.7)
    drawn = sampling.draw(logits, torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=4) / 20_000
    torch.testing.assert_close(share, sampling.distribution(logits[:1])[0], atol=0.015, rtol=0)


@pytest.mark.parametrize("temperature", [1e-30, 1e-39, 1e-45, 1e-320])
@pytest.mark.parametrize("limits", [{}, {"top_k": 4, "top_p": 0.5}], ids=["all", "limited"])
def test_a_tiny_temperature_is_greedy(temperature, limits):
    """Also where float32 holds neither it nor what it makes of the logits."""
    generator = torch.Generator().manual_seed(0)
    logits = 30 * torch.randn(50, 9, generator=generator)
    drawn = Sampling(temperature=temperature, **limits).draw(logits, generator)
    assert torch.equal(drawn, logits.argmax(dim=-1))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -1.0}, "temperature is -1"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(UserError, match=words):
        Sampling(**settings)


def test_an_empty_prompt_is_refused():
    with pytest.raises(UserError, match="prompt is empty"):
        generate(network(), [[1], []], 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_continues_as_the_cpu_does():
    prompts, greedy = some_ids(3, 8, 5), Sampling(temperature=0)
    model = network(attention=LATENT, streams=2)
    expected = generate(model, prompts, 10, greedy)
    assert generate(model.cuda(), prompts, 10, greedy) == expected
    assert len(generate(model.bfloat16(), prompts, 10, Sampling(top_k=5, top_p=0.9))) == 3


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_as_many_batches_take_turns_as_threads_look_up_for(monkeypatch, tmp_path, tier):
    """More batches than there are turns, ending at different times, continue as on the device."""
    save(network(), tmp_path, tokenizer_hash="x")
    prompts = some_ids(9, 3, 8, 5, 12, 4, 7, 6, 10, 5, 8)
    assert len(prompts) > IN_TURN_BY_THREADS
    expected = generate(load(tmp_path), prompts, 20, Sampling(seed=2), 1)
    model = load(
        tmp_path, tables=MemoryConfig(tier=tier, directory=str(tmp_path) if tier == "disk" else None)
    )
    waiting, most, draw, take = set(), 0, Decoder._draw, Decoder.take

    def counted_draw(decoder):
        nonlocal most
        draw(decoder)
        waiting.update([decoder] if decoder._joins else [])
        most = max(most, len(waiting))

    def counted_take(decoder):
        waiting.discard(decoder)
        return take(decoder)

    monkeypatch.setattr(Decoder, "_draw", counted_draw)
    monkeypatch.setattr(Decoder, "take", counted_take)
    assert generate(model, prompts, 20, Sampling(seed=2), 1) == expected
    assert most == IN_TURN_BY_THREADS
    for table in model.tables:
        table.close()
        table.store.close()


@pytest.mark.parametrize("ends", ["in order", "left by its reader", "with an error"])
def test_every_look_up_that_began_is_waited_for(monkeypatch, tmp_path, ends):
    """Memory that a look-up still writes to must not be given back, however generation ends."""
    save(network(), tmp_path, tokenizer_hash="x")
    model = load(tmp_path, tables=MemoryConfig(tier="host"))
    begin, open_look_ups = ServingTable.begin, []

    def counted(table, addresses):
        join = begin(table, addresses)
        open_look_ups.append(join)

        def counted_join():
            open_look_ups.remove(join)
            return join()

        return counted_join

    monkeypatch.setattr(ServingTable, "begin", counted)
    prompts, greedy = some_ids(9, 3, 8, 5, 12, 4), Sampling(temperature=0)
    if ends == "in order":
        generate(model, prompts, 20, greedy, 2)
    elif ends == "left by its reader":
        reader = stream(model, prompts, 20, greedy)
        next(reader)
        assert open_look_ups
        reader.close()
    else:
        predict, calls = Decoder._predict, itertools.count()

        def failing(decoder, ids):
            if next(calls) == 7:
                assert open_look_ups
                raise MemoryError
            return predict(decoder, ids)

        monkeypatch.setattr(Decoder, "_predict", failing)
        with pytest.raises(MemoryError):
            generate(model, prompts, 20, greedy, 2)
    assert not open_look_ups


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("tier", ["resident", "host", "disk"])
@pytest.mark.parametrize("attention", [GROUPED, LATENT], ids=["grouped", "latent"])
@pytest.mark.parametrize("kind", [{}, {"addresses": "shuffled"}, {"streams": 2}], ids=str)
def test_a_graph_decodes_what_launches_one_by_one_do(monkeypatch, tmp_path, tier, attention, kind):
    save(network(attention, d_model=64, **kind).float(), tmp_path, tokenizer_hash="x")
    tables = MemoryConfig(tier=tier, directory=str(tmp_path) if tier == "disk" else None)
    model = load(tmp_path, device="cuda", tables=tables)
    captures = []
    monkeypatch.setattr(
        "engram_lab.model.generation.captured",
        lambda step, device: captures.append(step) or captured(step, device),
    )
    prompts = some_ids(9, 3, 8, 5, 7, 6, 4, 10, 5, 8, 3, 6, 4, 11, 7, 2, 9, 6, 5)
    batches = -(-len(prompts) // 2)
    assert batches > IN_TURN_BY_THREADS
    for sampling in (Sampling(temperature=0), Sampling(seed=4, top_k=20)):
        with monkeypatch.context() as patched:
            patched.setattr(Decoder, "_asks_the_host", lambda _: True)
            expected = generate(model, prompts, 24, sampling, 2)
            assert not captures
        assert generate(model, prompts, 24, sampling, 2) == expected
        assert 1 < len(captures) <= batches  # a batch whose rows end at once needs none
        captures.clear()
    for table in model.tables:
        if tier != "resident":
            table.close()
            table.store.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_experts_that_ask_the_host_are_not_captured():
    """Experts of this width have no kernel: the capture would fail."""
    model = network().float().cuda()
    (row,) = generate(model, some_ids(6), 20, Sampling(temperature=0))
    assert row

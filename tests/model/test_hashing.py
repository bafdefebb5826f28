"""Addresses against an independent scalar oracle, committed golden vectors, and each other."""

import json
import pickle
from dataclasses import replace
from importlib import resources
from itertools import chain

import numpy as np
import pytest
import scalar_hash
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_lab.errors import UserError
from engram_lab.model import hash_kernel
from engram_lab.model.engram import EngramConfig
from engram_lab.model.hashing import HASH_VERSION, NgramHash, head_primes, multipliers, table_rows
from engram_lab.model.primes import is_prime, next_prime
from engram_lab.model.torch_hash import TorchNgramHash
from engram_lab.model.toy_hash import ROWS, toy_reading, toy_row

GOLDEN = json.loads(resources.files("engram_lab.model").joinpath("data/hash_vectors.json").read_text())
RULES = ("sequence_start", "dead_tokens", "reset_at_eos")


def _oracle(config, ids, canonical, eos):
    tables = scalar_hash.layout(config.layers, config.orders, config.heads, config.rows_by_order)
    n_canonical = max(canonical) + 1
    marks = set(config.dead_tokens or (eos,)) if config.boundary == "dead_tokens" else {eos}
    if config.boundary == "sequence_start":
        marks = set()
    layers = [
        (scalar_hash.draw(layer, config.hash_seed, n_canonical, max(config.orders)), table)
        for layer, table in zip(config.layers, tables, strict=True)
    ]
    return np.array(
        [
            [
                [
                    [
                        scalar_hash.address(row, t, layer, h, canonical, config.boundary, marks, eos)
                        for h in range(config.n_heads)
                    ]
                    for t in range(len(row))
                ]
                for row in ids
            ]
            for layer in layers
        ]
    )


def test_golden_sizes_and_multipliers():
    config = EngramConfig(layers=(1, 14), orders=(2, 3, 4), rows_per_head=16_000_000)
    assert table_rows(config) == (384_006_168, 384_016_682)
    expected = [76632096046245, 4839876093313, 35959672319349, 73987337458391]
    assert multipliers(config, 99_092)[0].tolist() == expected


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_golden_vectors(case):
    """A change here is a change of every trained table: raise HASH_VERSION and write the vectors anew."""
    assert GOLDEN["hash_version"] == HASH_VERSION
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in case["engram"].items()}
    config = EngramConfig(**fields)
    canonical = None if case["canonical"] is None else np.array(case["canonical"], dtype=np.int32)
    rule = NgramHash.build(config, canonical, case["vocab_size"], case["eos_id"])
    assert list(rule.rows) == case["rows"]
    assert rule.multipliers.tolist() == case["multipliers"]
    assert rule.primes.tolist() == case["primes"]
    ids = np.array(case["ids"])
    assert rule.addresses(ids).tolist() == case["addresses"]
    assert TorchNgramHash(rule)(torch.from_numpy(ids)).tolist() == case["addresses"]


def test_the_teaching_hash():
    assert toy_row((42, 108, 256, 512), 2, 0) == 292
    assert toy_reading((42, 108, 256), (2, 3), 4, np.zeros((ROWS, 32))).shape == (256,)


configs = st.builds(
    EngramConfig,
    layers=st.sampled_from([(0,), (1,), (1, 3), (0, 2, 5)]),
    orders=st.sampled_from([(2,), (3,), (2, 3), (2, 3, 4), (2, 5), (1, 2), (2, 3, 4, 5)]),
    heads=st.integers(1, 5),
    rows_per_head=st.sampled_from([2, 3, 30, 400, 5000, 70_001]),
    hash_seed=st.integers(0, 10),
    boundary=st.sampled_from(RULES),
    dead_tokens=st.sampled_from([(), (1,), (0, 3)]),
)


@st.composite
def batches(draw):
    vocabulary = draw(st.integers(4, 30))
    length = draw(st.integers(1, 20))
    row = st.lists(st.integers(0, vocabulary - 1), min_size=length, max_size=length)
    ids = draw(st.lists(row, min_size=1, max_size=3))
    canonical = draw(st.lists(st.integers(0, 9), min_size=vocabulary, max_size=vocabulary))
    return vocabulary, ids, canonical, draw(st.integers(0, vocabulary - 1))


@settings(max_examples=150, deadline=None)
@given(config=configs, batch=batches())
def test_every_way_equals_the_scalar_oracle(config, batch):
    vocabulary, ids, canonical, eos = batch
    expected = _oracle(config, ids, canonical, eos)
    rule = NgramHash.build(config, np.array(canonical), vocabulary, eos)
    array = np.array(ids, dtype=np.uint16)
    assert (rule.addresses(array) == expected).all()
    assert (rule._numpy_addresses(array, 0, 0) == expected).all()
    assert (TorchNgramHash(rule)(torch.tensor(ids)).numpy() == expected).all()
    assert expected.max() < min(rule.rows) or len(rule.rows) > 1
    for m, rows in enumerate(rule.rows):
        assert expected[m].max() < rows


@settings(max_examples=60, deadline=None)
@given(
    config=configs,
    batch=batches(),
    control=st.sampled_from(["hashed", "shuffled", "constant"]),
    cut=st.integers(0, 20),
    kept=st.integers(0, 3),
)
def test_decoding_with_history_equals_one_pass(config, batch, control, cut, kept):
    vocabulary, ids, canonical, eos = batch
    rule = NgramHash.build(replace(config, addresses=control), np.array(canonical), vocabulary, eos)
    ids = np.array(ids)
    cut = min(cut, ids.shape[1] - 1)
    kept = min(cut, rule.history_length + kept)
    history = ids[:, cut - kept : cut]
    whole = rule.addresses(ids)
    assert (rule.addresses(ids[:, cut:], history, cut) == whole[:, :, cut:]).all()
    step = TorchNgramHash(rule)(torch.tensor(ids[:, cut:]), torch.tensor(history), cut)
    assert (step.numpy() == whole[:, :, cut:]).all()
    assert step.dtype == torch.int32


@settings(max_examples=60, deadline=None)
@given(config=configs, batch=batches(), padding=st.integers(1, 6))
def test_padding_on_the_left_changes_nothing(config, batch, padding):
    vocabulary, ids, canonical, eos = batch
    ids = np.array(ids)
    for pad_id in (None, (eos + 1) % vocabulary):
        rule = NgramHash.build(config, np.array(canonical), vocabulary, eos, pad_id=pad_id)
        pad = eos if pad_id is None else pad_id
        padded = np.pad(ids, ((0, 0), (padding, 0)), constant_values=pad)
        assert (rule.addresses(padded)[:, :, padding:] == rule.addresses(ids)).all()


@settings(max_examples=60, deadline=None)
@given(config=configs, batch=batches())
def test_packed_documents_are_addressed_as_if_alone(config, batch):
    """`reset_at_eos`: a document and its end-of-text id; `dead_tokens`: a document and the dead token
    before it.
    """
    vocabulary, ids, canonical, eos = batch
    for boundary in ("reset_at_eos", "dead_tokens"):
        rule = NgramHash.build(
            replace(config, boundary=boundary, dead_tokens=()), np.array(canonical), vocabulary, eos
        )
        documents = [[token for token in row if token != eos] for row in ids]
        ended = [[*d, eos] if boundary == "reset_at_eos" else [eos, *d] for d in documents]
        packed = rule.addresses(np.array([list(chain(*ended))]))
        alone = np.concatenate([rule.addresses(np.array([d])) for d in ended], axis=2)
        assert (packed == alone).all()


def test_the_paper_s_rule_looks_across_documents():
    config = EngramConfig(boundary="sequence_start")
    rule = NgramHash.build(config, None, 50, 0)
    packed = rule.addresses(np.array([[5, 6, 0, 7, 8]]))
    assert (packed[:, :, 3:] != rule.addresses(np.array([[7, 8]]))).any()


def test_the_end_of_text_id_belongs_to_what_it_ends_and_a_dead_token_to_what_follows():
    ids = np.array([[5, 6, 0, 7]])
    for boundary, same in (("reset_at_eos", False), ("dead_tokens", True)):
        rule = NgramHash.build(EngramConfig(boundary=boundary), None, 50, 0)
        alone = rule.addresses(np.array([[0, 7]]))
        assert bool((rule.addresses(ids)[:, :, 2] == alone[:, :, 0]).all()) is same
        assert (rule.addresses(ids)[:, :, 3] == alone[:, :, 1]).all()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=64),
    st.sampled_from([2, 3, 5, 61, 2039, 4093, 4099, 8191, 65_537, 2_262_403, 16_000_057, 2**30 - 35])
    | st.integers(2, 2**30 - 100).map(next_prime),
)
def test_remainders_are_exact_at_the_extremes(mixes, p):
    extremes = [0, 1, p - 1, p, p + 1, 2**63 - 1, 2**63 - 2, (2**63 - 1) // p * p, (2**63 - 1) // p * p - 1]
    mix = np.array(mixes + extremes, dtype=np.int64)
    n = len(mix)
    arguments = (mix, np.full(n, p, np.int32), np.full(n, 1.0 / p), np.full(n, 7, np.int32))
    rows = np.empty(n, np.int32)
    hash_kernel._reduce_twice(*arguments, rows)
    assert (rows == mix % p + 7).all()
    if p > hash_kernel.SMALL_PRIME:
        hash_kernel._reduce(*arguments, rows)
        assert (rows == mix % p + 7).all()


@pytest.mark.parametrize("rows", [2, 4000, 2_262_400])
def test_ids_that_reach_the_largest_mixes(rows):
    """With one canonical id in use of two, multipliers reach 2^62; every way must agree bit for bit."""
    config = EngramConfig(orders=(2, 3, 4, 5), heads=3, rows_per_head=rows, boundary="sequence_start")
    for canonical in ([0, 1], [1, 0], [0, 0]):
        rule = NgramHash.build(config, np.array(canonical), 2, 0)
        assert rule.multipliers.min() > 0
        ids = np.random.default_rng(0).integers(0, 2, (4, 300))
        assert (rule.addresses(ids) == rule._numpy_addresses(ids, 0, 0)).all()
        assert (TorchNgramHash(rule)(torch.from_numpy(ids)).numpy() == rule.addresses(ids)).all()


def test_it_compiles_without_breaks():
    rule = NgramHash.build(EngramConfig(layers=(0, 1)), None, 50, 0)
    compiled = torch.compile(TorchNgramHash(rule), fullgraph=True, backend="eager")
    ids = np.random.default_rng(0).integers(0, 50, (2, 30))
    assert (compiled(torch.from_numpy(ids)).numpy() == rule.addresses(ids)).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("boundary", RULES)
@pytest.mark.parametrize("rows", [5, 2_262_400, 140_000_000])
def test_a_gpu_gives_the_same_addresses(boundary, rows):
    config = EngramConfig(layers=(0, 1), orders=(2, 3, 4), rows_per_head=rows, boundary=boundary)
    rule = NgramHash.build(config, None, 50, 0)
    ids = np.random.default_rng(0).integers(0, 50, (4, 300))
    on_gpu = TorchNgramHash(rule).cuda()
    assert (on_gpu(torch.from_numpy(ids).cuda()).cpu().numpy() == rule.addresses(ids)).all()
    last = on_gpu(torch.from_numpy(ids[:, 9:]).cuda(), torch.from_numpy(ids[:, :9]).cuda())
    assert (last.cpu().numpy() == rule.addresses(ids)[:, :, 9:]).all()


def test_it_survives_pickling_for_loader_workers():
    rule = NgramHash.build(EngramConfig(), None, 50, 0)
    ids = np.arange(40).reshape(2, 20)
    expected = rule.addresses(ids)
    assert (pickle.loads(pickle.dumps(rule)).addresses(ids) == expected).all()


def test_primes_are_distinct_and_rows_padded():
    config = EngramConfig(layers=(0, 1, 2), orders=(2, 3), rows_per_head=(100, 90), pad_rows_to=128)
    primes = head_primes(config)
    assert len(set(primes.ravel().tolist())) == primes.size
    assert all(is_prime(int(p)) for p in primes.ravel())
    assert [rows % 128 for rows in table_rows(config)] == [0, 0, 0]
    assert all(0 <= rows - total < 128 for rows, total in zip(table_rows(config), primes.sum(1), strict=True))


def test_is_prime_against_trial_division_and_known_liars():
    assert [n for n in range(100) if is_prime(n)] == scalar_hash.primes(2, 25, set())
    assert is_prime(2**61 - 1)
    assert not any(is_prime(n) for n in (561, 3_215_031_751, 3_825_123_056_546_413_051))


def test_addresses_take_int64_only_where_they_must():
    small = NgramHash.build(EngramConfig(rows_per_head=1000), None, 50, 0)
    ids = np.arange(12).reshape(1, 12)
    assert small.addresses(ids).dtype == np.int32
    large = NgramHash.build(EngramConfig(rows_per_head=140_000_000), None, 50, 0)
    assert large.addresses(ids).dtype == np.int64
    assert TorchNgramHash(large)(torch.from_numpy(ids)).dtype == torch.int64
    assert (TorchNgramHash(large)(torch.from_numpy(ids)).numpy() == large.addresses(ids)).all()


def test_controls():
    ids = np.array([[4, 5, 6, 4, 5, 6]])
    constant = NgramHash.build(EngramConfig(addresses="constant"), None, 50, 0).addresses(ids)
    assert (constant == constant[:, :, :1]).all()
    assert len(set(constant[0, 0, 0].tolist())) == 16
    shuffled = NgramHash.build(EngramConfig(addresses="shuffled"), None, 50, 0)
    plain = NgramHash.build(EngramConfig(), None, 50, 0).addresses(ids)
    assert (plain[:, :, 2] == plain[:, :, 5]).all()
    assert (shuffled.addresses(ids)[:, :, 2] != shuffled.addresses(ids)[:, :, 5]).all()
    assert (shuffled.addresses(ids) == shuffled._numpy_addresses(ids, 0, 0)).all()


def test_the_module_s_tables_travel_in_its_state():
    rule = NgramHash.build(EngramConfig(), np.arange(50)[::-1].copy(), 50, 0)
    other = TorchNgramHash(NgramHash.build(EngramConfig(hash_seed=9), None, 50, 0))
    ids = torch.arange(12).view(1, 12)
    assert not torch.equal(other(ids), TorchNgramHash(rule)(ids))
    other.load_state_dict(TorchNgramHash(rule).state_dict())
    assert (other(ids).numpy() == rule.addresses(ids.numpy())).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"eos_id": 50}, "eos_id"),
        ({"pad_id": -1}, "pad_id"),
        ({"canonical": np.arange(49)}, "another tokenizer"),
        ({"engram": EngramConfig(boundary="dead_tokens", dead_tokens=(99,))}, "dead_tokens"),
    ],
)
def test_wrong_vocabularies_are_refused(arguments, words):
    given = {"engram": EngramConfig(), "canonical": None, "vocab_size": 50, "eos_id": 0} | arguments
    with pytest.raises(UserError, match=words):
        NgramHash.build(**given)


def test_ids_outside_the_vocabulary_are_refused():
    rule = NgramHash.build(EngramConfig(), None, 50, 0)
    for ids in ([[3, 50]], [[-1, 3]]):
        with pytest.raises(UserError, match="another tokenizer"):
            rule.addresses(np.array(ids))

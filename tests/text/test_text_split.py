from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_lab.errors import UserError
from engram_lab.text.split import document_hash, split_documents

hashes = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=60)
fractions = st.floats(0.001, 0.999)


def as_array(values):
    return np.array(values, dtype=np.uint64)


def chosen_hashes(values, side):
    return [values[i] for i in side]


def test_the_hash_of_a_text_never_changes():
    # BLAKE2b of the UTF-8 with 8 bytes, read little-endian; computed with b2sum -l 64.
    assert document_hash("") == int.from_bytes(bytes.fromhex("e4a6a0577479b2b4"), "little")
    assert document_hash("É") != document_hash("E\u0301")


@settings(deadline=None)
@given(hashes, fractions)
def test_every_different_document_is_on_one_side_once(values, fraction):
    if len(set(values)) < 2:
        with pytest.raises(UserError, match="at least 2"):
            split_documents(as_array(values), fraction)
        return
    train, validation = split_documents(as_array(values), fraction)
    both = chosen_hashes(values, train) + chosen_hashes(values, validation)
    assert sorted(both) == sorted(set(values))
    assert len(train)
    assert len(validation)


@given(hashes)
def test_a_fraction_of_0_holds_none_out(values):
    train, validation = split_documents(as_array(values), 0.0)
    assert chosen_hashes(values, train) == sorted(set(values))
    assert len(validation) == 0


def test_nothing_cannot_be_split():
    with pytest.raises(UserError, match="no text"):
        split_documents(as_array([]), 0.0)


@settings(deadline=None)
@given(hashes.filter(lambda values: len(set(values)) >= 2), fractions)
def test_without_strata_the_threshold_decides(values, fraction):
    _, validation = split_documents(as_array(values), fraction)
    below = {value for value in values if value < int(Fraction(fraction) * 2**64)}
    if 0 < len(below) < len(set(values)):
        assert set(chosen_hashes(values, validation)) == below
    elif not below:
        assert chosen_hashes(values, validation) == [min(values)]
    else:
        assert set(values) - set(chosen_hashes(values, validation)) == {max(values)}


@settings(deadline=None)
@given(
    hashes.filter(lambda values: len(set(values)) >= 2),
    fractions,
    st.randoms(use_true_random=False),
    st.booleans(),
)
def test_the_order_of_the_source_does_not_matter(values, fraction, random, grouped):
    shuffled = random.sample(values, len(values))

    def sides(these):
        strata = [str(value % 7) for value in these] if grouped else None
        return [chosen_hashes(these, side) for side in split_documents(as_array(these), fraction, strata)]

    assert sides(values) == sides(shuffled)


@settings(deadline=None)
@given(hashes.filter(lambda values: len(set(values)) >= 2), fractions)
def test_a_side_lies_in_the_order_of_its_hashes(values, fraction):
    for strata in (None, [str(value % 3) for value in values]):
        for side in split_documents(as_array(values), fraction, strata):
            found = chosen_hashes(values, side)
            assert found == sorted(found)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=200, unique=True),
    fractions,
    st.integers(1, 9),
)
def test_strata_are_spanned_evenly(values, fraction, groups):
    strata = [str(value % groups) for value in values]
    _, validation = split_documents(as_array(values), fraction, strata)
    count = len(values)
    assert len(validation) == min(max(round(fraction * count), 1), count - 1)
    line = sorted(range(count), key=lambda i: (strata[i], values[i]))
    places = np.array(sorted(line.index(i) for i in validation))
    step = count / len(validation)
    gaps = np.diff(np.concatenate([[-1], places, [count]]))
    assert gaps.max() <= np.ceil(step) + 1

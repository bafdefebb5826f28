"""Stack distances against a cache that is simulated entry by entry."""

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_lab.caching.distances import reuse_distances


def simulated(ids: np.ndarray, size: int, start: int) -> int:
    """Hits after `start` of a least-recently-used cache of `size` rows."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for t, row in enumerate(ids.tolist()):
        if row in cache:
            hits += t >= start
            cache.move_to_end(row)
        else:
            cache[row] = None
            if len(cache) > size:
                cache.popitem(last=False)
    return hits


@settings(deadline=None, max_examples=60)
@given(
    ids=st.lists(st.integers(0, 40), min_size=1, max_size=400),
    start=st.integers(0, 200),
    size=st.integers(1, 45),
)
def test_every_cache_size_equals_its_simulation(ids: list[int], start: int, size: int) -> None:
    rows = np.array(ids)
    found = reuse_distances(rows, 41, start)
    assert found.hits(np.array([size]))[0] == simulated(rows, size, start)
    assert found.look_ups == max(0, len(ids) - start)


@pytest.mark.parametrize("distinct", [3, 700, 6000])
def test_a_skewed_stream_longer_than_many_words(distinct: int) -> None:
    rows = np.minimum(np.random.default_rng(distinct).zipf(1.2, 9000) - 1, distinct - 1)
    found = reuse_distances(rows, distinct, 4000)
    sizes = np.array([1, 2, 63, 64, 65, 500, distinct])
    assert found.hits(sizes).tolist() == [simulated(rows, int(c), 4000) for c in sizes]


def test_a_cyclic_stream_hits_only_when_it_fits() -> None:
    rows = np.tile(np.arange(100), 50)
    found = reuse_distances(rows, 100, 100)
    assert found.hits(np.array([0, 99, 100, 1000])).tolist() == [0, 0, 4900, 4900]
    assert found.first == 0


def test_the_chunks_of_a_long_stream_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).integers(0, 300, 5000)
    whole = reuse_distances(rows, 300, 1234)
    done: list[int] = []
    monkeypatch.setattr("engram_lab.caching.distances.CHUNK", 333)
    chunked = reuse_distances(rows, 300, 1234, done.append)
    assert np.array_equal(whole.counts, chunked.counts)
    assert whole.first == chunked.first
    assert sum(done) == 5000

"""Hit rates against caches written out, and against what must hold for any text."""

from collections import Counter

import numpy as np
import pytest

from engram_lab.caching.curves import by_frequency, cache_sizes, hit_rates
from engram_lab.caching.stream import LookUps


def skewed(n: int = 20_000, distinct: int = 3000, seed: int = 0) -> LookUps:
    weights = 1.0 / np.arange(1, distinct + 1)
    ids = np.random.default_rng(seed).choice(distinct, n, p=weights / weights.sum())
    return LookUps(ids.astype(np.int32), distinct)


def test_the_static_cache_is_filled_by_the_first_half_and_measured_on_the_second() -> None:
    stream = skewed(2000, 200)
    first, second = stream.ids[:1000].tolist(), stream.ids[1000:].tolist()
    common = [row for row, _ in sorted(Counter(first).items(), key=lambda item: (-item[1], item[0]))]
    found = hit_rates(stream)
    for size, rate in zip(found.sizes, found.static, strict=True):
        kept = set(common[:size])
        assert rate == pytest.approx(sum(row in kept for row in second) / 1000, abs=1e-12)
    assert found.seen == pytest.approx(sum(row in set(first) for row in second) / 1000, abs=1e-12)


def test_curves_rise_and_end_where_every_row_fits() -> None:
    stream = skewed()
    found = hit_rates(stream)
    assert (np.diff(found.lru) >= 0).all()
    assert (np.diff(found.static) >= 0).all()
    new = len(np.unique(stream.ids)) - len(np.unique(stream.ids[:10_000]))
    assert found.lru[-1] == pytest.approx(1 - new / 10_000, abs=1e-12)
    assert found.static[-1] == pytest.approx(found.seen, abs=1e-12)
    assert found.rows == found.sizes[-1] == len(np.unique(stream.ids))


def test_independent_look_ups_favour_the_static_cache_and_bursts_the_recent_one() -> None:
    independent = skewed()
    place = np.flatnonzero(hit_rates(independent).sizes == 100)[0]
    found = hit_rates(independent)
    assert found.static[place] > found.lru[place]
    bursts = np.repeat(np.random.default_rng(1).integers(0, 3000, 2000), 10).astype(np.int32)
    found = hit_rates(LookUps(bursts, 3000))
    assert found.lru[place] > found.static[place]


def test_a_sampled_curve_lies_within_its_stated_error_of_the_exact_one() -> None:
    stream = skewed(400_000, 100_000, seed=3)
    sizes = np.array([800, 1000, 5000, 20_000, 60_000])
    exact = hit_rates(stream, sizes)
    sampled = hit_rates(stream, sizes, sample=0.2)
    assert exact.lru_error is None
    assert sampled.lru_error is not None
    assert np.isfinite(sampled.lru).tolist() == [True] * 5
    assert (sampled.lru_error < 0.05).all()
    assert (np.abs(sampled.lru - exact.lru) <= 4 * sampled.lru_error).all()
    assert np.isnan(hit_rates(stream, np.array([799]), sample=0.2).lru).all()
    assert np.array_equal(sampled.static, exact.static)


def test_sizes_and_ranks() -> None:
    assert cache_sizes(73).tolist() == [1, 2, 5, 10, 20, 50, 73]
    assert cache_sizes(10).tolist() == [1, 2, 5, 10]
    assert by_frequency(np.array([2, 0, 5, 2])).tolist() == [2, 0, 3]

"""Laws are found again in streams drawn from them."""

import numpy as np
import pytest

from engram_lab.caching.laws import BLOCKS, _mean_log, fit_heaps, fit_zipf
from engram_lab.caching.stream import LookUps


def zipf_stream(exponent: float, distinct: int, n: int) -> LookUps:
    weights = np.arange(1, distinct + 1) ** -exponent
    generator = np.random.default_rng(5)
    ids = generator.permutation(distinct)[generator.choice(distinct, n, p=weights / weights.sum())]
    return LookUps(ids.astype(np.int32), distinct)


@pytest.mark.parametrize("exponent", [0.6, 1.0, 1.3])
def test_a_zipf_stream_gives_its_exponent_back(exponent: float) -> None:
    whole, *decades = fit_zipf(zipf_stream(exponent, 5000, 2_000_000))
    assert whole.exponent == pytest.approx(exponent, abs=0.02)
    assert whole.low <= whole.exponent <= whole.high
    assert whole.high - whole.low < 0.05
    assert [(law.first, law.last) for law in decades][:2] == [(10, 100), (100, 1000)]
    assert all(law.exponent == pytest.approx(exponent, abs=0.05) for law in decades[:2])


@pytest.mark.parametrize("exponent", [0.0, 0.7, 1.0, 1.5])
@pytest.mark.parametrize("ends", [(10, 50), (10, 200_000), (5000, 300_000)])
def test_the_mean_log_rank_equals_the_plain_sum(exponent: float, ends: tuple[int, int]) -> None:
    ranks = np.arange(ends[0], ends[1] + 1, dtype=np.float64)
    weights = ranks**-exponent
    plain = (weights * np.log(ranks)).sum() / weights.sum()
    assert _mean_log(exponent, *ends) == pytest.approx(plain, abs=1e-7)


def test_bursty_text_widens_the_interval() -> None:
    stream = zipf_stream(1.0, 2000, 200_000)
    even, *_ = fit_zipf(stream)
    bursty = np.concatenate([np.sort(part) for part in np.array_split(stream.ids, 2)]).astype(np.int32)
    uneven, *_ = fit_zipf(LookUps(bursty, 2000))
    assert uneven.high - uneven.low > 3 * (even.high - even.low)


def test_distinct_rows_grow_as_counted() -> None:
    stream = zipf_stream(1.0, 20_000, BLOCKS * 1000)
    law = fit_heaps(stream)
    assert law is not None
    assert law.distinct[-1] == len(np.unique(stream.ids))
    assert law.look_ups[-1] == BLOCKS * 1000
    assert 0 < law.low <= law.exponent <= law.high < 1
    fresh = fit_heaps(LookUps(np.arange(3200, dtype=np.int32), 3200))
    assert fresh is not None
    assert fresh.exponent == pytest.approx(1.0, abs=1e-9)


def test_a_short_text_has_no_law() -> None:
    assert fit_zipf(LookUps(np.zeros(50, dtype=np.int32), 1)) == ()
    assert fit_heaps(LookUps(np.zeros(5, dtype=np.int32), 1)) is None


def test_halves_of_other_words_are_no_error() -> None:
    """A decade that the second half never reads, and one it reads backwards."""
    words = zipf_stream(1.0, 3000, 400_000).ids
    elsewhere = LookUps(np.concatenate([words, words + 3000]), 6000)
    assert fit_zipf(elsewhere) == ()
    backwards = fit_zipf(LookUps(np.concatenate([words, 2999 - words]), 3000))
    assert all(-5 <= law.low <= law.exponent <= law.high <= 8 for law in backwards)
    assert min(law.exponent for law in backwards) < 0

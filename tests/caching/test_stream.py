"""The rows a text reads, against n-grams written out as tuples."""

import numpy as np
import pytest
from caching_texts import EOS, some_text

from engram_lab.caching import stream
from engram_lab.caching.stream import Text, interleave, ngrams, table_rows_read


def written_out(text: Text, n: int) -> list[tuple[int, ...]]:
    """The n-gram of every position, the latest token first."""
    found = []
    for t in range(len(text.ids)):
        gram, hidden = [], False
        for k in range(n):
            inside = t - k >= 0
            if k and inside and text.engram.boundary == "reset_at_eos":
                hidden = hidden or int(text.ids[t - k]) == EOS
            token = int(text.ids[t - k]) if inside and not hidden else EOS
            gram.append(int(text.canonical[token]))
        found.append(tuple(gram))
    return found


@pytest.mark.parametrize("boundary", ["reset_at_eos", "sequence_start"])
@pytest.mark.parametrize("chunk", [1 << 20, 64])
def test_two_positions_share_a_row_if_and_only_if_their_ngrams_are_equal(
    boundary: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "CHUNK", chunk)
    text = some_text(boundary)
    found = dict(ngrams(text, 4))
    for n in (1, 2, 3, 4):
        numbers: dict[tuple[int, ...], int] = {}
        expected = [numbers.setdefault(gram, len(numbers)) for gram in written_out(text, n)]
        assert found[n].ids.tolist() == expected
        assert found[n].distinct == len(numbers)


def test_rows_of_a_table_are_those_of_the_address_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "CHUNK", 100)
    text = some_text()
    found = table_rows_read(text, 3, 50)
    whole = text.rule((3,), 50).addresses(text.ids[None].astype(np.int64))[0, 0, :, 0]
    assert np.array_equal(found.ids, whole)
    assert found.distinct == 53  # the first prime from 50 on
    assert len(np.unique(found.ids)) > 40


def test_a_batch_reads_its_sequences_position_by_position() -> None:
    assert interleave(np.arange(11), 3).tolist() == [0, 3, 6, 1, 4, 7, 2, 5, 8]
    assert interleave(np.arange(5), 1).tolist() == [0, 1, 2, 3, 4]


def test_many_keys_keep_their_numbers_when_the_slots_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "CHUNK", 64)
    numbering = stream._Numbering()
    keys = np.random.default_rng(0).integers(0, 2**62, 64 * 40)
    first = np.concatenate([numbering.number(part) for part in np.split(keys, 40)])
    assert np.array_equal(first, np.arange(len(keys)))
    again = np.concatenate([numbering.number(part) for part in np.split(keys, 40)])
    assert np.array_equal(first, again)

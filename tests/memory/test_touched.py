"""Sets of rows, against Python's."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from engram_lab.memory.touched import TouchedRows

ROWS = 77
rows = st.sets(st.integers(0, ROWS - 1))


@given(before=rows, after=rows, span=st.tuples(st.integers(0, ROWS), st.integers(0, ROWS)))
def test_what_was_marked_is_found(before: set[int], after: set[int], span: tuple[int, int]) -> None:
    touched = TouchedRows(ROWS)
    touched.mark(torch.tensor(sorted(before), dtype=torch.int64))
    assert touched.take_recent().tolist() == sorted(before)
    touched.mark(torch.tensor(sorted(after, reverse=True), dtype=torch.int64))
    assert touched.take_recent().tolist() == sorted(after)
    assert touched.take_recent().tolist() == []
    first, last = min(span), max(span)
    ever = [row for row in before | after if first <= row < last]
    assert touched.share(first, last) == len(ever) / max(last - first, 1)

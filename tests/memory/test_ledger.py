"""Who had a row last, against sets."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from engram_lab.memory.ledger import Ledger
from engram_lab.memory.row_copy import Workers

ROWS = 20
WORKERS = Workers(2)


@given(
    steps=st.lists(st.tuples(st.permutations(range(ROWS)), st.integers(0, ROWS)), min_size=1, max_size=8),
    lags=st.lists(st.integers(0, 5), min_size=8, max_size=8),
)
def test_every_stale_row_is_found_where_it_was_last(
    steps: list[tuple[list[int], int]], lags: list[int]
) -> None:
    ledger, had, landed = Ledger(ROWS), dict[int, tuple[int, int]](), 0
    for step, ((order, count), lag) in enumerate(zip(steps, lags, strict=False), start=1):
        ids = order[:count]
        landed = max(landed, step - 1 - lag)
        returning = ledger.enter(step, torch.tensor(ids, dtype=torch.int64), landed, WORKERS)
        found = {
            int(here): (earlier, int(there))
            for earlier, (places, mine) in returning.stale.items()
            for there, here in zip(places, mine, strict=True)
        }
        expected = {i: had[row] for i, row in enumerate(ids) if row in had and had[row][0] > landed}
        assert found == expected
        assert returning.repeated == sum(1 for row in ids if row in had and had[row][0] == step - 1)
        had |= {row: (step, i) for i, row in enumerate(ids)}


def test_a_resumed_run_begins_with_nothing_stale() -> None:
    returning = Ledger(ROWS).enter(1001, torch.arange(5), 1000, WORKERS)
    assert (returning.repeated, returning.stale) == (0, {})

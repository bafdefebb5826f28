"""The line that tells how far a study is."""

from __future__ import annotations

from dataclasses import replace

from engram_lab.commands import describe
from engram_lab.studies.progress import StudyProgress

HALF = StudyProgress(
    finished=1,
    failed=0,
    cells=2,
    tokens_done=150.0,
    tokens=200.0,
    tokens_per_second=1234.0,
    seconds_left=61.0,
)


def test_a_study_under_way_tells_its_speed_and_what_is_left() -> None:
    assert describe(HALF) == "1/2 cells, 75% of the tokens, 1,234 tokens/s, about 1 min 1 s left"
    early = replace(HALF, finished=0, failed=1, tokens_done=2.0, seconds_left=None)
    assert describe(early) == "0/2 cells, 1 failed, 1% of the tokens, 1,234 tokens/s"


def test_a_study_that_is_through_tells_neither() -> None:
    through = replace(HALF, finished=2, tokens_done=200.0, tokens_per_second=0.0, seconds_left=0.0)
    assert describe(through) == "2/2 cells, 100% of the tokens"
    none_left = replace(HALF, finished=0, failed=2, tokens_done=0.0, tokens=0.0, seconds_left=None)
    assert describe(none_left) == "0/2 cells, 2 failed, 100% of the tokens"

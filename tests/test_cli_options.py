"""Options of the commands themselves: what they print, and what they hand on."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import pytest

from engram_lab.cli import main


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert not ended.value.code
    assert capsys.readouterr().out == f"engram-lab {metadata.version('engram-lab')}\n"


@pytest.mark.parametrize(
    ("words", "served"),
    [
        ([], ("127.0.0.1", 5000)),
        (["--host", "0.0.0.0", "--port", "5001"], ("0.0.0.0", 5001)),
    ],
)
def test_the_pages_are_served_where_asked(
    monkeypatch: pytest.MonkeyPatch, words: list[str], served: tuple[str, int]
) -> None:
    asked: list[tuple[str, int]] = []

    def serve(uri: str, **where: Any) -> int:
        asked.append((where["host"], where["port"]))
        return 0

    monkeypatch.setattr("engram_lab.tracking.serve", serve)
    assert main(["ui", *words]) == 0
    assert asked == [served]

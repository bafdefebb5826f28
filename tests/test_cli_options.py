"""Options of the commands themselves: what they print, and what they hand on."""

from __future__ import annotations

from importlib import metadata

import pytest

from engram_lab.cli import main


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert not ended.value.code
    assert capsys.readouterr().out == f"engram-lab {metadata.version('engram-lab')}\n"

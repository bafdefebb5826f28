"""What tests of failures share."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from engram_lab.errors import UserError


def refusal(action: Callable[[], object]) -> str:
    """The one sentence with which `action` fails."""
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the system refuse to write more: the nearest to a full disk that needs no disk of one's own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

"""The one kind of error a user of this package is meant to read."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping


class ScalingError(Exception):
    """Data or options that cannot be used as they are.

    The message is one sentence that names the column (and row), the value and what would be right. Data
    that can be read but do not decide a question never raise: the result says so in its status.
    """

    def __init__(self, message: str, *, shell: str | None = None) -> None:
        """`shell` is the message for a reader at a command line, where the way out is one of its options."""
        super().__init__(message)
        self._shell = message if shell is None else shell

    def in_shell(self, options: Mapping[str, str]) -> str:
        """Return the message with keywords of functions (`budget=`) written as options (`--budget`)."""
        said = self._shell
        for name, flag in options.items():
            said = re.sub(rf"(?<![\w-]){name}=", f"{flag} ", said)
            said = re.sub(rf"(^|\band ){name} (?=is |must )", rf"\g<1>{flag} ", said)
        return said


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest of `allowed`, or an empty string when nothing is close."""
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""

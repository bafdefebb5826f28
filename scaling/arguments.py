"""Mistakes on a command line, told in one sentence with the nearest right word."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

from scaling.errors import ScalingError, nearest


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `mistake` where argparse would print its usage and exit."""

    mistake: ClassVar[type[Exception]] = ScalingError

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Refuse what is unknown here, where the command's own options are known, and not in its parent."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].partition("=")[0]
            hint = nearest(word, self._option_string_actions) or self._options_if(word.startswith("-"))
            raise self.mistake(f"{self.prog} takes no {word!r}.{hint}")
        return parsed, unknown

    def _options_if(self, asked: bool) -> str:
        """Return where to look, and where an option was `asked` for the names of all that there are.

        One of another name that means the same, as `--length` for `--tokens`, is found among them.
        """
        names = [name for action in self._actions for name in action.option_strings[:1]]
        known = [name for name in names if name != "-h"]
        listed = f" Its options are {', '.join(known)}." if asked and known else ""
        return f"{listed} See {self.prog} --help."

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        allowed = None if action.choices is None else [str(choice) for choice in action.choices]
        if allowed is not None and str(value) not in allowed:
            what = "/".join(action.option_strings) or action.metavar or action.dest
            raise self.mistake(
                f"{self.prog}: {what} is {value!r}; it must be one of {', '.join(allowed)}."
                + nearest(str(value), allowed)
            )

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found wrong as one sentence."""
        raise self.mistake(f"{self.prog}: {message}; see {self.prog} --help.")

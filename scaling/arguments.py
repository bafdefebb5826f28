"""Mistakes on a command line, told in one sentence with the nearest right word."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any, ClassVar, NoReturn

from scaling.errors import ScalingError, nearest


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `mistake` where argparse would print its usage and exit.

    Options are written out: one that is shortened is refused, with those that it begins, since it would mean
    another once a longer one like it comes.
    """

    mistake: ClassVar[type[Exception]] = ScalingError

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **{**named, "allow_abbrev": False})

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Refuse what is unknown here, where the command's own options are known, and not in its parent.

        Options come first: of a required one that is misspelled argparse would say that it is missing.
        """
        words = list(sys.argv[1:] if args is None else args)
        self._refuse(word for word in self._own(words) if _name(word) not in self._option_string_actions)
        parsed, unknown = super().parse_known_args(words, namespace)
        self._refuse(unknown)
        return parsed, unknown

    def _own(self, words: Iterable[str]) -> list[str]:
        """Return the long options among `words` that are for this parser and not for a command of it."""
        words = takewhile(lambda word: word != "--", words)
        if self._subparsers is not None:
            words = takewhile(lambda word: word.startswith("-"), words)
        return [word for word in words if word.startswith("--") and " " not in _name(word)]

    def _refuse(self, unknown: Iterable[str]) -> None:
        for word in unknown:
            name = _name(word)
            hint = self._near(name) or self._options_if(name.startswith("-"))
            raise self.mistake(f"{self.prog} takes no {name!r}.{hint}")

    def _near(self, name: str) -> str:
        """Return " Did you mean ...?" with the options that `name` begins, else the nearest one, if any."""
        known = self._known()
        begun = [option for option in known if option.startswith(name)]
        if name.startswith("--") and begun:
            return f" Did you mean {' or '.join(map(repr, begun))}?"
        return nearest(name, known)

    def _known(self) -> list[str]:
        return list(self._option_string_actions)

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


def _name(word: str) -> str:
    """Return an option's name, which ends where its value begins."""
    return word.partition("=")[0]

"""What the commands' parsers share: mistakes are UserErrors, and numbers lie within bounds."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from engram_lab.errors import UserError, nearest
from scaling.arguments import Parser


class CommandParser(Parser):
    """A parser of a command's line; what an option of type `Numbers` does not take is told by its name."""

    mistake = UserError

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        if not isinstance(action.type, Numbers):
            return super()._get_value(action, arg_string)
        try:
            return action.type(arg_string)
        except ValueError as error:
            name = "/".join(action.option_strings)
            raise UserError(f"{name} is {arg_string}, but must be {error}.") from None


class OverridesParser(CommandParser):
    """Reads a command's own options from among overrides of a recipe's fields, and leaves those over.

    Args:
        prog: what the command is called in messages.
        fields: dotted names of the recipe's fields.
        beside: further options of the command, which another reads before.
    """

    def __init__(self, *, prog: str, fields: Iterable[str], beside: Iterable[str] = ()) -> None:
        super().__init__(prog=prog, add_help=False)
        self._fields, self._beside = set(fields), tuple(beside)

    def _known(self) -> list[str]:
        return [*super()._known(), *self._beside]

    def _refuse(self, unknown: Iterable[str]) -> None:
        """Refuse what must be a shortened or misspelled option of the command, and no field of a recipe."""
        options = (word for word in unknown if word.startswith("--"))
        super()._refuse(word for word in options if self._is_meant(word.partition("=")[0][2:]))

    def _is_meant(self, name: str) -> bool:
        own = [option.removeprefix("--") for option in self._known()]
        if name in self._fields or "." in name:
            return False
        if any(option.startswith(name) for option in own):
            return True
        close = nearest(name, own)
        return close != "" and close == nearest(name, [*own, *self._fields])


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """The finite numbers that an option takes; called with a word, reads one.

    What is wrong by itself is told here, at once, before torch is imported and a text is read; where a
    configuration has the same bound, it is for callers from Python.
    """

    kind: type[int] | type[float]
    least: float = -math.inf
    """The smallest one."""
    above: float = -math.inf
    """A bound below them, where there is no smallest one."""
    most: float = math.inf
    """The largest one."""

    def __call__(self, word: str) -> float:
        """Return the number, or raise ValueError with what it must be."""
        try:
            number = self.kind(word)
        except ValueError:
            raise ValueError("a whole number" if self.kind is int else "a number") from None
        if not -math.inf < number < math.inf:
            raise ValueError("a finite number")
        if not (self.least <= number <= self.most and number > self.above):
            raise ValueError(self._bounds())
        return number

    def _bounds(self) -> str:
        bounds = {"at least": self.least, "above": self.above, "at most": self.most}
        return " and ".join(f"{words} {bound}" for words, bound in bounds.items() if math.isfinite(bound))


def whole(least: int, most: float = math.inf) -> Numbers:
    """Whole numbers from `least` to `most`."""
    return Numbers(kind=int, least=least, most=most)


def real(*, least: float = -math.inf, above: float = -math.inf, most: float = math.inf) -> Numbers:
    """Numbers within the bounds that are given."""
    return Numbers(kind=float, least=least, above=above, most=most)

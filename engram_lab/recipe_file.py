"""Recipes as files: YAML with overrides from the command line, as LightningCLI spells them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentError
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from engram_lab.errors import UserError, nearest
from engram_lab.plain import check_names, check_value, field_names
from engram_lab.recipe import Recipe


def read_recipe(file: Path, overrides: list[str]) -> Recipe:
    """Read a YAML recipe and apply overrides such as `--model.d_model=128`.

    `--help` and `--print_config` in `overrides` print and exit.

    Raises:
        UserError: no such file, not YAML, an unknown field, or a value that does not fit.
    """
    if not file.is_file():
        others = sorted(str(f) for f in file.parent.glob("*.y*ml")) if file.parent.is_dir() else []
        raise UserError(f"there is no recipe {str(file)!r}.{nearest(str(file), others)}")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where else ""
        raise UserError(
            f"{str(file)!r} is no YAML{line}: {getattr(error, 'problem', None) or error}."
        ) from error
    if not values:
        raise UserError(f"{str(file)!r} is empty; a recipe is a mapping of fields, see recipes/tiny.yaml.")
    if not isinstance(values, dict):
        raise UserError(f"{str(file)!r} holds a {type(values).__name__}; a recipe is a mapping of fields.")
    check_names(Recipe, values, "recipe")
    _check_trainer(values.get("trainer") or {})
    for argument in overrides:
        if argument.startswith("--"):
            _check_override(argument.removeprefix("--").split("=")[0])
    parser = _recipe_parser()
    try:
        parsed = parser.parse_args(["--config", str(file), *overrides])
    except (ArgumentError, TypeError, ValueError) as error:
        _check_values(overrides)
        Recipe.from_dict(values)
        raise UserError(" ".join(str(error).split()) + ".") from None
    kept = {key: value for key, value in parsed.as_dict().items() if key != "config"}
    given = {**(values.get("trainer") or {}), **_named(overrides, "trainer", kept["trainer"])}
    return Recipe.from_dict({**kept, "trainer": given})


def _check_override(name: str) -> None:
    """Refuse a name that is neither a field nor inside one that holds a mapping or an object."""
    known = field_names(Recipe) | {f"trainer.{setting}" for setting in inspect.signature(Trainer).parameters}
    known |= {"help", "config", "print_config"}
    name = name.rstrip("+")
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in known:
            holds_fields = any(other.startswith(f"{prefix}.") for other in known)
            if length == len(parts) or not holds_fields:
                return
            break
    raise UserError(f"unknown recipe field {name!r}.{nearest(name, known)}")


def _check_values(overrides: list[str]) -> None:
    """Refuse the first override whose value its field cannot hold, in a sentence of ours."""
    known, words = field_names(Recipe), iter(overrides)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and name in known:
            check_value(Recipe, name, _loaded(value if equals else next(words, "")))


def _loaded(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _check_trainer(settings: Mapping[str, Any]) -> None:
    known = inspect.signature(Trainer).parameters
    for name in settings:
        if name not in known:
            raise UserError(f"unknown recipe field 'trainer.{name}'.{nearest(str(name), known)}")


def _named(overrides: Iterable[str], section: str, parsed: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a section that the command line names, with their parsed values."""
    names = {
        o.removeprefix(f"--{section}.").split("=")[0].split(".")[0].rstrip("+")
        for o in overrides
        if o.startswith(f"--{section}.")
    }
    return {name: parsed[name] for name in names}


def _recipe_parser() -> LightningArgumentParser:
    parser = LightningArgumentParser(
        prog="lightning run RECIPE",
        description="Every field of a recipe can be overridden: --model.d_model=128 --budget.rho=0.8",
        exit_on_error=False,
    )
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="a further recipe file, read on top")
    parser.add_class_arguments(Recipe, skip={"trainer"})
    parser.add_lightning_class_args(Trainer, "trainer")
    return parser

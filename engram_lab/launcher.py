"""The `lightning` command: `lightning run RECIPE` for recipes in YAML and in Python, one launcher vocabulary.

The lightning package no longer installs a command of this name, and the one of lightning-sdk cannot run a
local script; whatever is not `run PATH` is handed to lightning-sdk where that is installed. Nothing here
imports torch.
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engram_lab.doctor import doctor
from engram_lab.errors import UserError, nearest
from engram_lab.processes import check_processes

__all__ = ["Launch", "doctor", "launch", "main", "parse", "refuse_lone_processes"]

# Options of the launcher, and the Trainer's and Fabric's argument that each one is.
OPTIONS = {
    "--devices": "devices",
    "--accelerator": "accelerator",
    "--strategy": "strategy",
    "--precision": "precision",
    "--num-nodes": "num_nodes",
}
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps", "tpu")

HELP = """\
usage: lightning run RECIPE [launcher options] [overrides]

Run a recipe: a YAML file (trains a model or runs a study, by its kind) or a Python script.

launcher options, the same for both kinds of recipe:
  --devices N|LIST|auto   processes on this machine, one a device ("2", "0,3")
  --accelerator NAME      auto, cpu, gpu, cuda, mps or tpu
  --strategy NAME         ddp, fsdp, ... (default: what Lightning chooses)
  --precision NAME        32-true, bf16-mixed, ...
  --num-nodes N           machines; start the command on each of them

overrides: for YAML, --field.name=value of any field (lightning run RECIPE --help lists them,
  --print_config prints the result); for a script, its own arguments. After "--" nothing is read
  as a launcher option. A script sees the options as defaults of Trainer() and Fabric(): an
  argument written out in the script wins.

exit status: that of the recipe; 2 for a mistake in what was asked, 130 after Ctrl-C,
  143 after SIGTERM.
engram-lab run RECIPE is the same command under a name that nothing else uses.
"""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What was asked for: a recipe, launcher options by the Trainer's names, what the recipe itself gets."""

    recipe: Path
    options: Mapping[str, str] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script `lightning`; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if arguments[0] != "run":
        return _other(arguments)
    if len(arguments) == 1 or arguments[1] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if len(arguments) > 1 else 2
    try:
        return launch(arguments[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        from engram_lab.tracking.signals import stopped_by

        print("interrupted; the same command continues where this stopped", file=sys.stderr)
        return 128 + stopped_by(stop)


def launch(arguments: Sequence[str]) -> int:
    """Run what follows `lightning run` (recipe, launcher options, overrides) and return the exit status.

    Raises UserError for a recipe that is not there, options that make no sense, or processes that are
    numbered by no numbers.
    """
    check_processes()
    asked = parse(arguments, os.environ)
    if asked.recipe.suffix == ".py":
        return _run_script(asked)
    from engram_lab.cli import run_recipe

    mapped = [f"--trainer.{name}={value}" for name, value in asked.options.items()]
    return run_recipe([str(asked.recipe), *mapped, *asked.overrides])


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> Launch:
    """Tell recipe, launcher options and overrides apart.

    Launcher options may stand before and after the recipe, as `--name value` or `--name=value`. Processes
    that torchrun started get devices and num_nodes from `environment`, since a plain Trainer would otherwise
    train alone in each of them.

    Raises:
        UserError: no recipe, one of an unknown kind, or an option without a sensible value.
    """
    rest = list(arguments)
    if rest[:1] == ["model"] and len(rest) > 1 and not Path("model").is_file():
        rest = rest[1:]  # `lightning run model SCRIPT`, the spelling of old
    recipe: Path | None = None
    options: dict[str, str] = {}
    overrides: list[str] = []
    while rest:
        word = rest.pop(0)
        if word == "--" and recipe is not None:
            overrides += rest
            break
        name, equals, value = word.partition("=")
        if name in OPTIONS:
            if not equals:
                if not rest or rest[0].startswith("--"):
                    raise UserError(f"{name} needs a value, for example {name}={_example(name)}.")
                value = rest.pop(0)
            options[OPTIONS[name]] = _checked(name, value)
        elif recipe is not None:
            overrides.append(word)
        elif word.startswith("-"):
            raise UserError(
                f"{name} stands before the recipe, where only {', '.join(OPTIONS)} may; overrides follow it."
                + nearest(name, OPTIONS)
            )
        else:
            recipe = _existing(word)
    if recipe is None:
        raise UserError("there is no recipe to run; the command is lightning run RECIPE [options].")
    return Launch(recipe=recipe, options=_under_torchrun(options, environment), overrides=tuple(overrides))


def refuse_lone_processes(trainer_world_size: int, environment: Mapping[str, str] = os.environ) -> None:
    """Raise UserError when several processes were started but the Trainer in this one would train alone.

    `fabric run --devices=2` and torchrun start processes without telling a plain `Trainer()`: each would be
    rank zero, train on all of the data and write over the other's files. Call it once the Trainer is built.
    """
    started = int(environment.get("WORLD_SIZE", "1"))
    if started > 1 and trainer_world_size == 1:
        raise UserError(
            f"{started} processes were started (WORLD_SIZE), but the Trainer knows of one: each would "
            f"train alone; give it devices={started}, or start it with lightning run --devices={started}."
        )


def _existing(word: str) -> Path:
    path = Path(word)
    if path.suffix not in (".py", ".yaml", ".yml"):
        raise UserError(f"the recipe {word!r} must be a .yaml or a .py file.")
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path()
        there = [str(other) for other in folder.iterdir() if other.suffix in (".py", ".yaml", ".yml")]
        raise UserError(f"there is no recipe {word!r} in {Path.cwd()}.{nearest(str(path), there)}")
    return path


def _checked(name: str, value: str) -> str:
    counts = [piece for piece in value.split(",") if piece]
    if name == "--devices" and value not in ("auto", "-1"):
        numbers = all(count.isdecimal() for count in counts)
        if not counts or not numbers or value == "0" or len(set(counts)) < len(counts):
            raise UserError(f"--devices is {value!r}; it must be auto, a number above 0, or a list like 0,3.")
    if name == "--num-nodes" and (not value.isdecimal() or int(value) < 1):
        raise UserError(f"--num-nodes is {value!r}; it must be a number above 0.")
    if name == "--accelerator" and value not in ACCELERATORS:
        raise UserError(
            f"--accelerator is {value!r}; it must be one of {', '.join(ACCELERATORS)}."
            + nearest(value, ACCELERATORS)
        )
    if not value:
        raise UserError(f"{name} needs a value, for example {name}={_example(name)}.")
    # Trainer reads "0,3" as a list only in brackets.
    return f"[{value.strip(',')}]" if name == "--devices" and "," in value else value


def _example(name: str) -> str:
    return {"--accelerator": "cpu", "--strategy": "ddp", "--precision": "bf16-mixed"}.get(name, "2")


def _under_torchrun(options: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """Complete the options of a process that torchrun started; refuse those that contradict it."""
    if "TORCHELASTIC_RUN_ID" not in environment:
        return dict(options)
    local = environment.get("LOCAL_WORLD_SIZE", "1")
    nodes = str(int(environment.get("WORLD_SIZE", local)) // int(local))
    for name, started in (("devices", local), ("num_nodes", nodes)):
        asked = options.get(name, started)
        if asked not in (started, "auto", "-1"):
            raise UserError(
                f"--{name.replace('_', '-')} is {asked}, but torchrun started {started}; leave it out."
            )
    return {**options, "devices": local, "num_nodes": nodes}


def _run_script(asked: Launch) -> int:
    """Run a Python recipe in this process, as `python SCRIPT` would, and return its exit status.

    The Trainer starts the other processes itself, by running the script again: they find the same options in
    the environment and never come by here.
    """
    _export(asked.options, os.environ)
    script = asked.recipe.resolve()
    # The Trainer repeats sys.argv for the other processes, from whatever directory the script is in by then.
    sys.argv = [str(script), *asked.overrides]
    sys.path.insert(0, str(script.parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as leave:
        if isinstance(leave.__context__, KeyboardInterrupt):
            return 130  # Lightning's answer to Ctrl-C
        if leave.code is None or isinstance(leave.code, int):
            return leave.code or 0
        print(leave.code, file=sys.stderr)
        return 1
    except (KeyboardInterrupt, UserError):
        raise
    except Exception as error:
        if type(error).__name__ == "MisconfigurationException":
            raise UserError(f"Lightning cannot do what {asked.recipe} asks: {error}") from error
        print(_short(error), file=sys.stderr, end="")
        return 1
    return 0


def _export(options: Mapping[str, str], environment: MutableMapping[str, str]) -> None:
    """Make the options the defaults of the Trainer (PL_TRAINER_*) and of Fabric (LT_*)."""
    for name, value in options.items():
        environment[f"PL_TRAINER_{name.upper()}"] = value
        environment[f"LT_{name.upper()}"] = value.strip("[]")


def _short(error: BaseException) -> str:
    """Return the traceback without the frames of this launcher and, but for the last, of packages."""
    frames = traceback.extract_tb(error.__traceback__)
    own = {__file__, runpy.__file__, "<frozen runpy>"}
    users = [f for f in frames if f.filename not in own and "site-packages" not in f.filename]
    if frames[-1] not in users:
        users.append(frames[-1])
    hidden = sum(frame.filename not in own for frame in frames) - len(users)
    lines = ["Traceback (most recent call last):\n", *traceback.format_list(users)]
    if hidden:
        lines.append(f"  ({hidden} frames of installed packages left out; python SCRIPT shows all)\n")
    return "".join([*lines, *traceback.format_exception_only(error)])


def _other(arguments: Sequence[str]) -> int:
    """Hand a command that is not `run` to lightning-sdk, or say in one sentence why not."""
    import importlib.metadata

    for entry in importlib.metadata.entry_points(group="console_scripts", name="lightning"):
        if entry.dist is not None and entry.dist.name.lower().replace("_", "-") == "lightning-sdk":
            sys.argv = ["lightning", *arguments]
            return int(entry.load()() or 0)
    hint = nearest(arguments[0], ["run"])
    print(
        f"error: lightning {arguments[0]} is a command of lightning-sdk, which is not installed; "
        f"here it is lightning run RECIPE.{hint}",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main())

"""What the commands do once the command line is understood."""

from __future__ import annotations

import atexit
import gc
import logging
import math
import os
import shutil
import sys
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from engram_lab.arguments import OverridesParser, whole
from engram_lab.budget.published import published_table
from engram_lab.dry_run import dry_run
from engram_lab.errors import UserError, nearest
from engram_lab.launcher import OPTIONS
from engram_lab.plain import field_names
from engram_lab.recipe import Recipe, run_directory
from engram_lab.recipe_file import read_recipe
from engram_lab.studies.progress import StudyProgress
from engram_lab.studies.runner import run_study
from engram_lab.text import TextConfig, TokenCorpus, look_ahead, prepare, split_warning
from engram_lab.wording import duration

console = Console()
WIDE = 1000  # columns: more than any row has


def run(file: Path, overrides: list[str]) -> int:
    """Train the recipe's model or run its study; returns the exit status.

    `--workers N` is short for `--study.workers=N`; `--dry-run` prints what would be run and stops;
    `--reports DIR` says where a study's report goes.
    """
    own = OverridesParser(prog="engram-lab run", fields=field_names(Recipe), beside=OPTIONS)
    own.add_argument("--workers", type=whole(1))
    own.add_argument("--dry-run", action="store_true")
    own.add_argument("--reports", type=Path, default=Path("reports"))
    options, rest = own.parse_known_args(overrides)
    atexit.register(gc.freeze)  # what is left then goes with the process; collecting it would take seconds
    recipe = read_recipe(file, rest)
    if options.workers is not None:
        if recipe.study is None or recipe.kind != "study":
            raise UserError(
                f"--workers is {options.workers}, but {str(file)!r} trains one model; leave it out."
            )
        recipe = recipe.override({"study.workers": options.workers})
    if options.dry_run:
        dry_run(recipe, prepare_shown(recipe.text))
        return 0
    if recipe.kind == "train":
        return _train(recipe)
    return _study(recipe, options.reports)


def prepare_shown(text: TextConfig) -> TokenCorpus:
    """Build or open the token shards; building shows its stages, in one line on a terminal."""
    corpus = _prepare_shown(text)
    if (warning := split_warning(corpus)) is not None:
        console.print(warning, highlight=False, soft_wrap=True)
    return corpus


def _prepare_shown(text: TextConfig) -> TokenCorpus:
    if console.is_terminal:
        with console.status("text") as live:
            return prepare(text, lambda stage, share: live.update(f"text: {stage} {share:.0%}"))
    seen: set[str] = set()

    def progress(stage: str, share: float) -> None:
        if stage not in seen:
            seen.add(stage)
            console.print(f"text: {stage}", highlight=False)

    return prepare(text, progress)


def _train(recipe: Recipe) -> int:
    from engram_lab.training.module import Diverged
    from engram_lab.training.run import train

    corpus = prepare_shown(recipe.text)
    try:
        result = train(recipe, corpus=corpus)
    except Diverged as error:
        print(f"error: the run diverged: {error}; it is marked failed.", file=sys.stderr)
        return 1
    again = " (finished before; nothing was trained)" if result.reused else ""
    console.print(
        f"validation loss {result.loss:.4f} nats/token, {result.bits_per_byte:.4f} bits/byte, "
        f"after {result.tokens:,} tokens in {result.seconds:,.0f} s{again}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"weights: {run_directory(recipe, result.identity) / 'model'}", highlight=False, soft_wrap=True
    )
    _say_where(recipe)
    return 0


def _study(recipe: Recipe, reports: Path) -> int:
    prepare_shown(recipe.text)
    with _Display() as display:
        result = run_study(recipe, reports=reports, show=display.show, say=display.say)
    failed = [cell for cell in result.cells if cell.state == "failed"]
    for cell in failed:
        console.print(f"failed: {cell.label}: {cell.reason}", highlight=False, markup=False)
    if result.report is None:
        print("error: no cell finished, so there is nothing to report.", file=sys.stderr)
        return 1
    console.print(f"\nreport: {result.report.resolve()}", highlight=False, soft_wrap=True)
    _say_where(recipe)
    return 1 if failed else 0


def _say_where(recipe: Recipe) -> None:
    uri = recipe.tracking.uri
    console.print(
        f"runs: {_command('engram-lab')} ui --uri {uri}\n"
        f"  or: {_command('mlflow')} ui --backend-store-uri {uri}",
        highlight=False,
        soft_wrap=True,
    )


def _command(name: str) -> str:
    """How to call a program of this environment from here: by name where it is on the path."""
    program = Path(sys.executable).with_name(name)
    found = shutil.which(name)
    if found is not None and Path(found).resolve() == program.resolve():
        return name
    return os.path.relpath(program) if program.is_relative_to(Path.cwd()) else str(program)


class _Display:
    """The progress of a study: a line that is rewritten on a terminal, a line every ten seconds elsewhere."""

    EVERY_SECONDS = 10.0

    def __init__(self) -> None:
        self._status: AbstractContextManager[Any] = nullcontext()
        self._live: Any = None
        self._last, self._said = -math.inf, ""

    def __enter__(self) -> _Display:
        if console.is_terminal:
            self._live = console.status("starting")
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, line: str) -> None:
        """Print a line that stays."""
        console.print(line, highlight=False, soft_wrap=True)

    def show(self, progress: StudyProgress) -> None:
        """Show how far the study is."""
        import time

        line = describe(progress)
        if self._live is not None:
            self._live.update(line)
        elif time.monotonic() - self._last >= self.EVERY_SECONDS and line != self._said:
            self._last, self._said = time.monotonic(), line
            self.say(line)


def describe(progress: StudyProgress) -> str:
    """One line: cells done, share of the tokens; speed and time left while tokens are left."""
    share = progress.tokens_done / progress.tokens if progress.tokens else 1.0
    failed = f", {progress.failed} failed" if progress.failed else ""
    done = f"{progress.finished}/{progress.cells} cells{failed}, {share:.0%} of the tokens"
    if progress.tokens_done >= progress.tokens:
        return done
    left = "" if progress.seconds_left is None else f", about {duration(progress.seconds_left)} left"
    return f"{done}, {progress.tokens_per_second:,.0f} tokens/s{left}"


def budget(words: list[str]) -> None:
    """Print the division of the parameters at every rho of the recipe `words[0]`, overrides after it.

    `--components` takes each network apart; `--published` prints the published models instead. No document
    is read.
    """
    own = OverridesParser(prog="engram-lab budget", fields=field_names(Recipe))
    own.add_argument("--components", action="store_true")
    own.add_argument("--published", action="store_true")
    options, rest = own.parse_known_args(words)
    if options.published:
        if rest or options.components:
            raise UserError(f"--published takes no recipe and no options, but got {' '.join(rest) or words}.")
        print(published_table())
        return
    if not rest or rest[0].startswith("-"):
        raise UserError("the recipe comes first: engram-lab budget RECIPE [--field.name=value ...].")
    recipe = read_recipe(Path(rest[0]), rest[1:])
    dry_run(recipe, look_ahead(recipe.text), components=options.components)


def _stored_recipe(name: str, directory: Path) -> Recipe:
    file = directory / "studies" / name / "recipe.yaml"
    if not file.is_file():
        known = [f.parent.name for f in sorted((directory / "studies").glob("*/recipe.yaml"))]
        listed = f" Known: {', '.join(known)}." if known else ""
        raise UserError(
            f"there is no study {name!r} in {str(directory)!r}.{nearest(name, known)}{listed} "
            "`engram-lab runs` lists the models trained on their own."
        )
    return Recipe.from_dict(yaml.safe_load(file.read_text(encoding="utf-8")))


def status(name: str, directory: Path) -> None:
    """Print every cell of a study and its state; `interrupted` is what waits, but has been begun."""
    from engram_lab.listing import saved_step
    from engram_lab.studies.extension import read_extension, study_directory
    from engram_lab.studies.queue import StudyQueue

    recipe = _stored_recipe(name, directory)
    queue = StudyQueue(study_directory(recipe), name)
    table = Table(Column("cell", no_wrap=True), "state", "loss", "run", "reason", box=None)
    counts: Counter[str] = Counter()
    queued = set()
    for cell in queue.states():
        loss = "" if cell.loss is None else f"{cell.loss:.4f}"
        step = saved_step(run_directory(recipe, cell.identity)) if cell.state == "waiting" else None
        state = cell.state if step is None else "interrupted"
        reason = cell.reason if step is None else f"saved at step {step}"
        table.add_row(cell.label, state, loss, cell.identity, escape(reason))
        counts[state] += 1
        queued.add(cell.label)
    for added in read_extension(queue.directory):
        label = f"rho {added.rho:g} seed {added.seed}"
        if label not in queued:
            table.add_row(label, "waiting", "", "", "added; the next run of the recipe trains it")
            counts["waiting"] += 1
    _print_lines(table)
    console.print(", ".join(f"{count} {state}" for state, count in counts.items()))


def _print_lines(table: Table) -> None:
    """Print a table, each row in a line where a program reads it."""
    # A console's own width bounds what `print` is given, and is 80 without a terminal.
    wide = console if console.is_terminal else Console(width=WIDE)
    wide.print(table, highlight=False)


def list_runs(directory: Path) -> None:
    """Print every run in `directory`, those of studies included, the newest last."""
    from engram_lab.listing import runs

    found = runs(directory)
    if not found:
        raise UserError(f"there are no runs in {str(directory)!r}; engram-lab run RECIPE trains one.")
    table = Table(
        Column("run", no_wrap=True), "name", Column("cell", no_wrap=True), "state", "loss", box=None
    )
    for run in found:
        saved = run.loss is None and run.saved_step is not None
        state = f"{run.state}, saved at step {run.saved_step}" if saved else run.state
        state += f": {escape(run.reason)}" if run.reason else ""
        loss = "" if run.loss is None else f"{run.loss:.4f}"
        table.add_row(run.identity, run.name, run.cell, state, loss)
    _print_lines(table)


def extend_study(name: str, directory: Path, count: int, cells: list[str]) -> None:
    """Add cells to a study: those given as `RHO:SEED`, or else the `count` shares that would say most."""
    from engram_lab.studies.extension import (
        ExtraCell,
        extend,
        propose,
        read_extension,
        settle,
        study_directory,
    )

    recipe = _stored_recipe(name, directory)
    try:
        chosen = [ExtraCell(rho=float(rho), seed=int(seed)) for rho, seed in (c.split(":") for c in cells)]
    except ValueError:
        raise UserError(
            f"--cells is {' '.join(cells)!r}; write each as RHO:SEED, for example 0.8:2."
        ) from None
    if any(not 0 <= cell.rho <= 1 or cell.seed < 0 for cell in chosen):
        raise UserError(f"--cells is {' '.join(cells)!r}; a share lies between 0 and 1, a seed is 0 or more.")
    folder = study_directory(recipe)
    new, there = settle(recipe, chosen or propose(recipe, count), read_extension(folder))
    for cell in there:
        console.print(f"there already: rho {cell.rho:g} seed {cell.seed}", highlight=False)
    added = extend(folder, new)
    for cell in added:
        console.print(f"added rho {cell.rho:g} seed {cell.seed}", highlight=False)
    if added:
        console.print("run the study's recipe again to train what was added", highlight=False)
    else:
        console.print("nothing was added", highlight=False)


def report(name: str, directory: Path, out: Path) -> None:
    """Write the report of a study from its MLflow runs."""
    from engram_lab.studies.report import write_study_report

    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    page = write_study_report(_stored_recipe(name, directory), out, say=console.print)
    console.print(f"report: {page.resolve()}", highlight=False, soft_wrap=True)

"""`engram-lab cache-curve`: text in; JSON, CSV, page and pictures out."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from engram_lab.caching.curves import cache_sizes
from engram_lab.caching.laws import BLOCKS
from engram_lab.caching.page import build
from engram_lab.caching.stream import Text
from engram_lab.caching.study import COLUMNS, CacheConfig, CacheStudy, Speeds, study_caches, to_plain, to_rows
from engram_lab.commands import prepare_shown
from engram_lab.errors import UserError
from engram_lab.files import write_atomically
from engram_lab.model.checkpoint import RECORD as NETWORK
from engram_lab.model.engram import EngramConfig
from engram_lab.recipe_file import read_recipe
from engram_lab.saved_model import RUNS
from engram_lab.text import TextConfig, TokenCorpus
from engram_lab.text.shards import RECORD as SHARDS
from engram_lab.wording import duration
from scaling.report.html import to_html
from scaling.report.numbers import short

STEM, FIGURES = "cache-curve", "figures"
ABOVE_SEEN = (
    "Seen before: n-grams of the second half that occur in the first. Hit rates may lie above it: n-grams "
    "share rows by hash, and the cache kept by recency goes on learning."
)
PAPER = EngramConfig(rows_per_head=2_262_400)
"""Where no recipe says otherwise, the table is as large as Engram-27B's (arXiv 2601.07372)."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is read, how much of it, and where the results go."""

    corpus: tuple[str, ...]
    """A folder of token shards, a recipe, or text files and folders."""
    out: Path
    tokens: int | None = None
    """Only so many, from the beginning."""
    tokenizer: str | None = None
    vocab_size: int | None = None
    cache_dir: str | None = None


def cache_curve(options: Options, config: CacheConfig, speeds: Speeds) -> None:
    """Measure, write the files and print a summary."""
    least = BLOCKS * config.sequences
    if options.tokens is not None and options.tokens < least:
        raise UserError(
            f"--tokens is {options.tokens}, but must be at least {least} where --sequences is "
            f"{config.sequences}."
        )
    _check_writable(options.out)
    console = Console(highlight=False)
    text = _text(options)
    study = study_caches(", ".join(options.corpus), text, config, speeds, _Progress(console))
    _write(study, options.out)
    console.print(_summary(study))
    console.print(f"page: {(options.out / f'{STEM}.html').resolve()}", soft_wrap=True)


def _text(options: Options) -> Text:
    corpus, engram = _open(options)
    ids = corpus.train[: options.tokens]
    rest = None if options.tokens is None else options.tokens - len(ids)
    if len(corpus.validation[:rest]):  # of shards that were made to be trained on
        ids = np.concatenate([ids, corpus.validation[:rest]])
    return Text(
        ids=ids,
        canonical=corpus.canonical,
        eos_id=corpus.eos_id,
        engram=engram,
    )


def _open(options: Options) -> tuple[TokenCorpus, EngramConfig]:
    """Return the tokens and the address rule that `options.corpus` stands for."""
    for name in options.corpus:
        _refuse_run(name)
    first = Path(options.corpus[0])
    cut = [name for name in ("tokenizer", "vocab_size") if getattr(options, name) is not None]
    if len(options.corpus) == 1 and (first / SHARDS).is_file():
        if cut:
            raise UserError(f"--{cut[0].replace('_', '-')} is given, but {str(first)!r} is cut into tokens.")
        return TokenCorpus(first), PAPER
    if len(options.corpus) == 1 and first.suffix in (".yaml", ".yml"):
        if cut:
            raise UserError(
                f"--{cut[0].replace('_', '-')} is given, but a recipe says it: change {str(first)!r}."
            )
        recipe = read_recipe(first, [])
        return prepare_shown(recipe.text), recipe.model.engram or PAPER
    given = {
        name: value
        for name in ("tokenizer", "vocab_size", "cache_dir")
        if (value := getattr(options, name)) is not None
    }
    return prepare_shown(TextConfig(source=options.corpus, validation_fraction=0.0, **given)), PAPER


def _refuse_run(name: str) -> None:
    """Refuse a run, named as the other commands take it: by its identity, its folder or the model in it."""
    given = Path(name)
    folder = given if given.exists() else RUNS / name
    run = folder.parent if folder.name == "model" else folder
    recipe = run / "recipe.yaml"
    if recipe.is_file() and ((run / "model").is_dir() or (run / "lock").is_file()):
        text = ", ".join(map(repr, read_recipe(recipe, []).text.sources))
        raise UserError(
            f"{name!r} is a run, but a text is wanted: give text files, folders of them or sotu; the run's "
            f"own, {text}, is measured by its recipe, {str(recipe)!r}."
        )
    if (folder / NETWORK).is_file():
        raise UserError(
            f"{name!r} is a trained network, but a text is wanted: give text files, folders of them or sotu."
        )


def _check_writable(out: Path) -> None:
    """Refuse a folder that cannot be written into before minutes are spent on what it would hold."""
    for folder in (out, out / FIGURES):
        there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
        try:
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            raise UserError(
                f"--out is {str(out)!r}, but {str(there)!r} takes no new files: {error.strerror}; choose "
                "another folder."
            ) from error


def _write(study: CacheStudy, out: Path) -> None:
    page = build(study)
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(to_rows(study))
    files = {
        f"{STEM}.json": json.dumps(to_plain(study), indent=1, allow_nan=False) + "\n",
        f"{STEM}.csv": table.getvalue(),
        f"{STEM}.html": to_html(page),
        **{f"{FIGURES}/{picture.name}.svg": picture.svg for picture in page.pictures()},
    }
    for name, content in files.items():
        try:
            write_atomically(out / name, content, durable=False)
        except OSError as error:
            raise UserError(f"--out is {str(out)!r}, which cannot be written: {error.strerror}.") from error


def _summary(study: CacheStudy) -> Table:
    """Hit rates of caches of about a thousandth, a hundredth and a tenth of the limited table."""
    rows = study.orders[0].table_rows
    grid = cache_sizes(rows)
    sizes = [int(grid[grid <= max(1, rows // part)][-1]) for part in (1000, 100, 10)]
    table = Table(
        title=f"hit rate by frequency / by recency, table of {rows:,} rows a head",
        caption=ABOVE_SEEN,
        caption_justify="left",
        box=None,
    )
    cached = [f"{short(size)} rows" for size in sizes]
    for column in ("order", *cached, "seen before", "Zipf s", "distinct"):
        table.add_column(column, justify="right")
    for result in study.orders:
        rates, cells = result.table, []
        for size in sizes:
            k = min(int(np.searchsorted(rates.sizes, size)), len(rates.sizes) - 1)
            pair = (rates.static[k], rates.lru[k])
            cells.append(" / ".join("–" if math.isnan(rate) else f"{rate:.0%}" for rate in pair))
        zipf = f"{result.zipf[0].exponent:.2f}" if result.zipf else "–"
        table.add_row(str(result.order), *cells, f"{result.ngrams.seen:.0%}", zipf, short(result.ngrams.rows))
    return table


class _Progress:
    """What is done and about how long the rest takes: one line that changes, or a line every ten seconds."""

    EVERY_SECONDS = 10.0
    MEASURED_SECONDS = 10.0  # of work, before what is left is told: compiling, once, is among the first

    def __init__(self, console: Console) -> None:
        self._console, self._last = console, -math.inf
        self._first: tuple[float, float] | None = None  # time and share of the first call

    def __call__(self, what: str, share: float) -> None:
        now = time.monotonic()
        # What came before the first call is start-up for the most part, and says nothing about what is left.
        self._first = self._first or (now, share)
        if now - self._last < (0.2 if self._console.is_terminal else self.EVERY_SECONDS) and share < 1:
            return
        self._last = now
        passed, done = now - self._first[0], share - self._first[1]
        known = passed >= self.MEASURED_SECONDS and done > 0 and share < 1
        left = f", about {duration(passed * (1 - share) / done)} left" if known else ""
        line = f"{what}: {share:.0%} of all{left}"
        if self._console.is_terminal:
            self._console.print(line.ljust(self._console.width - 1), end="\n" if share >= 1 else "\r")
        else:
            self._console.print(line)

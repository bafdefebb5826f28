"""The cache study of one text: for every order, hit rates with and without a limit on the table, and laws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from engram_lab.caching.curves import HitRates, hit_rates
from engram_lab.caching.laws import BLOCKS, HeapsLaw, ZipfLaw, fit_heaps, fit_zipf
from engram_lab.caching.stream import LookUps, Text, interleave, ngrams, table_rows_read
from engram_lab.errors import UserError

EXACT_LOOK_UPS = 200_000_000
"""Longer streams have their LRU curve sampled unless told otherwise: memory, 12 bytes a look-up and more."""
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """How fast rows are read where they may lie, in bytes a second of useful rows.

    Defaults: rows of 264 bytes (256 e4m3 values and 8 scales) on a machine with one H100, PCIe gen 5 and 16
    cores.
    """

    row_bytes: int = 264
    """Bytes of a row; it decides what a disk's reads a second are worth."""
    device: float = 2900e9
    """Device memory: a device-to-device copy counts 2.9-3.0 TB/s read plus written (docs/benchmarks.md)."""
    host: float = 19.6e9
    """Host memory to the device: random 256-byte rows gathered by 16 threads into pinned memory."""
    disk_reads: float = 77_000
    """Disk: random reads of 4 KiB a second past the page cache, 128 threads."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise UserError(f"{name} is {value}: a speed or size of rows must be above 0.")

    @property
    def disk(self) -> float:
        """Bytes of rows a second from the disk, one read a row."""
        return self.disk_reads * self.row_bytes

    @staticmethod
    def mixed(hit_rate: np.ndarray, fast: float, slow: float) -> np.ndarray:
        """Return bytes a second where hits come at `fast` and misses at `slow`, one after the other.

        Reading both at once can at best double it.
        """
        return 1.0 / (hit_rate / fast + (1.0 - hit_rate) / slow)


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """What is measured.

    Raises:
        UserError: a value outside its range.
    """

    orders: tuple[int, ...] = (2, 3, 4, 5)
    rows_per_head: int | None = None
    """Rows a head of the limited table; None takes the largest of the text's address rule."""
    sequences: int = 1
    """Sequences read side by side, as a serving batch does; it bears on the LRU cache alone."""
    sample: float | None = None
    """Share of the rows the LRU curve is made from; None: all, unless there are over 200 M look-ups."""

    def __post_init__(self) -> None:
        if not self.orders or list(self.orders) != sorted(set(self.orders)) or self.orders[0] < 1:
            raise UserError(f"orders is {self.orders}: list distinct n-gram lengths from 1 up, ascending.")
        if self.orders[-1] > 16:
            raise UserError(
                f"orders is {self.orders}: n-grams longer than 16 never come back; leave them out."
            )
        if self.rows_per_head is not None and self.rows_per_head < 2:
            raise UserError(f"rows_per_head is {self.rows_per_head}: a head needs at least 2 rows.")
        if self.sequences < 1:
            raise UserError(f"sequences is {self.sequences}: it must be at least 1.")
        if self.sample is not None and not 0 < self.sample <= 1:
            raise UserError(f"sample is {self.sample}: it is a share of the rows, above 0 and at most 1.")


@dataclass(frozen=True, eq=False, kw_only=True)
class OrderResult:
    """One order's curves and laws."""

    order: int
    ngrams: HitRates
    """Every distinct n-gram has a row."""
    table: HitRates
    """Rows are found by hash among `table_rows`."""
    table_rows: int
    zipf: tuple[ZipfLaw, ...]
    """Of distinct n-grams: the whole range of ranks, then every decade."""
    heaps: HeapsLaw | None


@dataclass(frozen=True, eq=False, kw_only=True)
class CacheStudy:
    """Everything measured on one text."""

    corpus: str
    tokens: int
    canonical_ids: int
    config: CacheConfig
    sample: float
    """Share of the rows that the LRU curves were made from."""
    speeds: Speeds
    orders: tuple[OrderResult, ...]


Report = Callable[[str, float], None]
"""Told what is being done and the share of all work that is done."""


def study_caches(
    corpus: str, text: Text, config: CacheConfig, speeds: Speeds, report: Report | None = None
) -> CacheStudy:
    """Measure every order on `text`.

    Raises:
        UserError: fewer tokens than the blocks that the laws' intervals come from.
    """
    if len(text.ids) < BLOCKS * config.sequences:
        raise UserError(
            f"the corpus has {len(text.ids)} tokens, but {config.sequences} sequence(s) need at least "
            f"{BLOCKS * config.sequences}: give more text."
        )
    sample = config.sample or min(1.0, EXACT_LOOK_UPS / len(text.ids))
    work = _Work(len(text.ids) * (config.orders[-1] + 5 * len(config.orders)), report)
    found = []
    for order, stream in ngrams(text, config.orders[-1], work.on("numbering n-grams", 1)):
        if order not in config.orders:
            continue
        whole = hit_rates(
            _read_by(stream, config.sequences), sample=sample, advance=work.on(f"{order}-grams", 2)
        )
        per_head = config.rows_per_head or max(text.engram.rows_by_order)
        rows = table_rows_read(text, order, per_head, work.on(f"{order}-grams, hashing", 1))
        limited = hit_rates(
            _read_by(rows, config.sequences), sample=sample, advance=work.on(f"{order}-grams, table", 2)
        )
        found.append(
            OrderResult(
                order=order,
                ngrams=whole,
                table=limited,
                table_rows=rows.distinct,
                zipf=fit_zipf(stream),
                heaps=fit_heaps(stream),
            )
        )
    return CacheStudy(
        corpus=corpus,
        tokens=len(text.ids),
        canonical_ids=int(text.rule((1,)).canonical.max()) + 1,
        config=config,
        sample=sample,
        speeds=speeds,
        orders=tuple(found),
    )


def _read_by(stream: LookUps, sequences: int) -> LookUps:
    return stream if sequences == 1 else replace(stream, ids=interleave(stream.ids, sequences))


class _Work:
    """Adds up what is done, each part weighted by about how long it takes."""

    def __init__(self, total: int, report: Report | None) -> None:
        self._total, self._done, self._report = total, 0, report

    def on(self, what: str, weight: int) -> Callable[[int], None]:
        def advance(look_ups: int) -> None:
            self._done += weight * look_ups
            if self._report is not None:
                self._report(what, self._done / self._total)

        return advance


def to_plain(study: CacheStudy) -> dict[str, Any]:
    """Return the study as plain values for a JSON file."""
    return {
        "format": FORMAT,
        "corpus": study.corpus,
        "tokens": study.tokens,
        "canonical_ids": study.canonical_ids,
        "config": asdict(study.config),
        "sample": study.sample,
        "speeds": asdict(study.speeds),
        "orders": [
            {
                "order": result.order,
                "ngrams": _plain_rates(result.ngrams),
                "table_rows": result.table_rows,
                "table": _plain_rates(result.table),
                "zipf": [asdict(law) for law in result.zipf],
                "heaps": None if result.heaps is None else asdict(result.heaps),
            }
            for result in study.orders
        ],
    }


def _plain_rates(rates: HitRates) -> dict[str, Any]:
    return {
        "look_ups": rates.look_ups,
        "rows": rates.rows,
        "sizes": rates.sizes.tolist(),
        "lru": _numbers(rates.lru),
        "lru_error": None if rates.lru_error is None else _numbers(rates.lru_error),
        "static": _numbers(rates.static),
        "seen": rates.seen,
    }


def _numbers(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


COLUMNS = (
    "order",
    "table",
    "table_rows",
    "cached_rows",
    "cached_share",
    "lru_hit_rate",
    "lru_error",
    "static_hit_rate",
    "lru_device_over_host",
    "static_device_over_host",
    "lru_host_over_disk",
    "static_host_over_disk",
)
"""Of the CSV file; the last four are effective bandwidths in bytes a second."""


def to_rows(study: CacheStudy) -> list[dict[str, Any]]:
    """Return one row for every order, table and cache size, with the columns `COLUMNS`."""
    speeds, rows = study.speeds, []
    for result in study.orders:
        for name, rates, size in (
            ("distinct n-grams", result.ngrams, result.ngrams.rows),
            ("hashed", result.table, result.table_rows),
        ):
            errors = np.zeros(len(rates.sizes)) if rates.lru_error is None else rates.lru_error
            pairs = [
                Speeds.mixed(rate, *ends)
                for ends in ((speeds.device, speeds.host), (speeds.host, speeds.disk))
                for rate in (rates.lru, rates.static)
            ]
            for k, cached in enumerate(rates.sizes.tolist()):
                values = (rates.lru[k], errors[k], rates.static[k], *(pair[k] for pair in pairs))
                plain = ("" if np.isnan(value) else round(float(value), 6) for value in values)
                rows.append(
                    dict(zip(COLUMNS, (result.order, name, size, cached, cached / size, *plain), strict=True))
                )
    return rows

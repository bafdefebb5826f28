"""The study as pictures and a page that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from engram_lab.caching.curves import HitRates
from engram_lab.caching.study import CacheStudy, OrderResult, Speeds
from scaling.report import theme
from scaling.report.document import Bullets, Facts, Page, Paragraph, Picture, Pictures, Section, Table
from scaling.report.drawing import log_ticks
from scaling.report.numbers import short, significant

Line = tuple[str, np.ndarray, np.ndarray]
"""A name, sizes and values."""
SMALLEST = 100
"""Rows of the smallest cache drawn; smaller ones serve nobody."""


def build(study: CacheStudy) -> Page:
    """Lay the study out."""
    config = study.config
    side = "" if config.sequences == 1 else f", {config.sequences} sequences read side by side"
    rows = study.orders[0].table_rows
    return Page(
        title="Rows in a cache",
        subtitle=f"{study.corpus}: {study.tokens:,} tokens, {study.canonical_ids:,} canonical ids{side}. "
        "One hash head of each order; every head of an order has the same curve.",
        sections=(
            Section(ident="unlimited", title="A row for every n-gram", blocks=(*_unlimited(study),)),
            Section(ident="table", title=f"A table of {rows:,} rows a head", blocks=(*_limited(study),)),
            Section(ident="bandwidth", title="Effective bandwidth", blocks=(*_bandwidth(study),)),
            Section(ident="laws", title="Zipf and Heaps", blocks=(*_laws(study),)),
            Section(ident="method", title="How it is measured", blocks=(_method(study),)),
        ),
        footer="Written by engram-lab cache-curve.",
    )


def _unlimited(study: CacheStudy) -> Sequence[Facts | Paragraph | Pictures | Table]:
    seen = tuple(
        (f"{result.order}-grams seen before", f"{result.ngrams.seen:.1%}", "of the second half, in the first")
        for result in study.orders
    )
    pictures = _both(
        study,
        "ngrams",
        lambda result: result.ngrams,
        lambda rates: rates.sizes,
        "rows cached of each head and order",
        "when every distinct n-gram has a row",
    )
    return (
        Facts(seen),
        Paragraph(
            "The share seen before bounds the cache kept by frequency; the one kept by recency also learns "
            "n-grams that come twice in the second half, and may lie above it."
        ),
        pictures,
        _table("Hit rate when every n-gram has a row", study, lambda result: result.ngrams),
    )


def _limited(study: CacheStudy) -> Sequence[Pictures | Table | Paragraph]:
    pictures = _both(
        study,
        "table",
        lambda result: result.table,
        lambda rates: 100 * rates.sizes / study.orders[0].table_rows,
        "share of the table cached (%)",
        f"in a table of {short(study.orders[0].table_rows)} rows a head",
    )
    note = Paragraph(
        "Rows are found by hash, so rare n-grams share rows: more look-ups hit than when each has its own, "
        "and a hit rate may lie above the share of n-grams seen before, since a new n-gram hits where "
        "another has read its row."
    )
    return (
        note,
        pictures,
        _table(
            "Hit rate in the limited table",
            study,
            lambda result: result.table,
            lambda result: result.table_rows,
        ),
    )


def _both(
    study: CacheStudy,
    name: str,
    rates: Callable[[OrderResult], HitRates],
    size: Callable[[HitRates], np.ndarray],
    axis: str,
    where: str,
) -> Pictures:
    """Draw the static and the LRU cache, a line for every order."""
    drawn = []
    for kind, title, caption in (
        ("static", "Kept by frequency", "The rows most frequent in the first half of the text are kept."),
        ("lru", "Kept by recency", "The least recently used row makes room; warmed by the first half."),
    ):
        lines = []
        for result in study.orders:
            found = rates(result)
            shown = _drawn(found)
            lines.append((f"{result.order}-grams", size(found)[shown], 100 * getattr(found, kind)[shown]))
        drawn.append(
            _picture(
                f"{name}-{kind}",
                title,
                lines,
                axis,
                "hit rate (%)",
                caption,
                f"Hit rate against cache size {where}, rows kept by "
                f"{'frequency' if kind == 'static' else 'recency'}, a line for each order.",
                (0.0, 100.0),
            )
        )
    return Pictures(tuple(drawn))


def _drawn(rates: HitRates) -> np.ndarray:
    """Return which cache sizes are drawn; of very few rows the largest one at least."""
    return rates.sizes >= min(SMALLEST, int(rates.sizes[-1]))


def _picture(
    name: str,
    title: str,
    lines: Sequence[Line],
    x: str,
    y: str,
    caption: str,
    alt: str,
    limits: tuple[float, float] | None = None,
) -> Picture:
    """Draw lines over a log axis; over two of them where `limits` of the upright axis are not given."""
    with theme.figure(2.7) as (drawn, axes):
        axes.set_xscale("log")
        if limits is None:
            axes.set_yscale("log")
        for number, (label, sizes, values) in enumerate(lines):
            style: dict[str, Any] = {"color": theme.SERIES[number % 6], "ls": theme.DASHES[number % 6]}
            axes.plot(sizes, values, marker=theme.MARKERS[number % 8], ms=3, label=label, **style)
        low = min(float(sizes.min()) for _, sizes, _ in lines)
        high = max(float(sizes.max()) for _, sizes, _ in lines)
        ticks = log_ticks(low, high)
        axes.set_xticks(ticks, [short(tick) for tick in ticks])
        if limits is None:
            values = np.concatenate([line for _, _, line in lines])
            ticks = log_ticks(float(np.nanmin(values)), float(np.nanmax(values)))
            axes.set_yticks(ticks, [short(tick) for tick in ticks])
        else:
            axes.set_ylim(*limits)
        axes.minorticks_off()
        axes.set(xlabel=x, ylabel=y)
        axes.set_title(title)
        theme.settle(drawn, axes)
        return Picture(name=name, svg=theme.to_svg(drawn, alt), alt=alt, caption=caption)


def _table(
    title: str,
    study: CacheStudy,
    rates: Callable[[OrderResult], HitRates],
    size: Callable[[OrderResult], int] | None = None,
) -> Table:
    """Write both caches' hit rates at every power of ten, and with every row that was read."""
    columns = ["order", "rows cached", "share", "by frequency", "by recency"]
    lines = []
    for result in study.orders:
        found = rates(result)
        whole = found.rows if size is None else size(result)
        errors = found.lru_error
        for k, cached in enumerate(found.sizes.tolist()):
            last = k == len(found.sizes) - 1
            if not last and (cached < SMALLEST or 10 ** (len(str(cached)) - 1) != cached):
                continue
            spread = "" if errors is None or np.isnan(errors[k]) else f" ± {errors[k]:.1%}"
            lru = "–" if np.isnan(found.lru[k]) else f"{found.lru[k]:.1%}{spread}"
            lines.append(
                (
                    str(result.order),
                    f"{cached:,}",
                    f"{significant(100 * cached / whole)} %",
                    f"{found.static[k]:.1%}",
                    lru,
                )
            )
    return Table(
        title=title,
        columns=tuple(columns),
        rows=tuple(lines),
        numeric=frozenset(columns),
        note="The last line of each order is a cache of every row that the text reads. "
        + ("" if study.sample >= 1 else "± is the standard error of a sampled curve."),
        long=True,
    )


def _bandwidth(study: CacheStudy) -> Sequence[Paragraph | Pictures]:
    speeds = study.speeds
    drawn = []
    for name, title, fast, slow, words in (
        (
            "device-host",
            "Cache on the device, table on the host",
            speeds.device,
            speeds.host,
            "device memory",
        ),
        ("host-disk", "Cache on the host, table on disk", speeds.host, speeds.disk, "host memory"),
    ):
        lines = []
        for result in study.orders:
            shown = _drawn(result.table)
            lines.append(
                (
                    f"{result.order}-grams",
                    100 * result.table.sizes[shown] / result.table_rows,
                    Speeds.mixed(result.table.static[shown], fast, slow) / 1e9,
                )
            )
        drawn.append(
            _picture(
                name,
                title,
                lines,
                "share of the table cached (%)",
                "rows read (GB/s)",
                f"Hits at {fast / 1e9:,.4g} GB/s, misses at {slow / 1e9:,.4g} GB/s, one after the other; "
                "rows kept by frequency.",
                f"Effective bandwidth against cache size, cache in {words}, a line for each order.",
            )
        )
    return (
        Paragraph(
            f"Rows of {speeds.row_bytes} bytes: device {speeds.device / 1e9:,.4g} GB/s, host "
            f"{speeds.host / 1e9:,.4g} GB/s, disk {speeds.disk_reads:,.0f} reads/s, that is "
            f"{speeds.disk / 1e9:.3g} GB/s of rows. These speeds are given, not measured here; reading hits "
            "and misses at once would at best double the result."
        ),
        Pictures(tuple(drawn)),
    )


def _laws(study: CacheStudy) -> Sequence[Paragraph | Table]:
    zipf = tuple(
        (
            str(result.order),
            f"{law.first:,} to {law.last:,}" + (" (all)" if number == 0 else ""),
            f"{law.exponent:.3f}",
            f"[{law.low:.3f}, {law.high:.3f}]",
        )
        for result in study.orders
        for number, law in enumerate(result.zipf)
    )
    heaps = tuple(
        (
            str(result.order),
            f"{result.heaps.look_ups[0]:,} to {result.heaps.look_ups[-1]:,}",
            f"{result.heaps.distinct[-1]:,.0f}",
            f"{result.heaps.exponent:.3f}",
            f"[{result.heaps.low:.3f}, {result.heaps.high:.3f}]",
        )
        for result in study.orders
        if result.heaps is not None
    )
    return (
        Paragraph(
            "Zipf: share of the look-ups that the row of rank r receives ~ r^-s. Where the decades of ranks "
            "disagree with each other beyond their intervals, no single exponent describes the text."
        ),
        Table(
            title="Zipf exponents of distinct n-grams",
            columns=("order", "ranks", "s", "95 % interval"),
            rows=zipf,
            numeric=frozenset(("order", "s", "95 % interval")),
            note="Ranks from the first half, look-ups from the second; maximum likelihood, interval from "
            "resampled blocks of text.",
        ),
        Table(
            title="Heaps: distinct n-grams ~ look-ups^b",
            columns=("order", "look-ups", "distinct", "b", "95 % of orders"),
            rows=heaps,
            numeric=frozenset(("order", "distinct", "b", "95 % of orders")),
            note="Blocks of the text read in random orders; the range holds 95 % of them.",
        ),
    )


def _method(study: CacheStudy) -> Bullets:
    how = (
        "The LRU curve is exact for every size, from one pass (stack distances)."
        if study.sample >= 1
        else f"The LRU curve comes from {study.sample:.1%} of the rows, chosen by hash, in eight groups "
        "whose scatter gives its standard error; caches too small for that are left out."
    )
    return Bullets(
        (
            "Both caches are measured on the second half of the text. The first half warms the LRU cache and "
            "decides which rows the static one keeps.",
            how,
            "The measured look-ups include n-grams never seen before, which no cache holds; a longer text "
            "before them would know more of them.",
            "Hit rates are of one hash head. A cache of c rows a head and order takes c x heads x row bytes.",
        )
    )

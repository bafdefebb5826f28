"""Rendering alone: made-up pages and pictures, no fits."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest

from scaling.report import checkplots, drawing, plots, theme
from scaling.report.document import (
    Bullets,
    Caution,
    Facts,
    Page,
    Paragraph,
    Picture,
    Pictures,
    Section,
    Table,
)
from scaling.report.html import to_html
from scaling.report.markdown import to_markdown
from scaling.report.numbers import duration, fixed, interval, p_value, short, significant
from scaling.report.stylesheet import stylesheet

NASTY = '<script>alert("&")</script> | *pipe* [x](y)'


def picture(name: str = "share") -> Picture:
    rho = np.array([0.0, 0.5, 0.8, 1.0, 0.0, 0.5, 0.8, 1.0])
    points = drawing.Points(x=rho, y=3 + (rho - 0.7) ** 2, seed=np.repeat([0.0, 1.0], 4))
    x = np.linspace(0, 1, 20)
    curve = drawing.Curve(name="quadratic", x=x, mean=3 + (x - 0.7) ** 2, low=3 + 0 * x, high=3.5 + 0 * x)
    return plots.allocation(
        drawing.Label(
            name=name,
            title="C = 1e15 FLOPs",
            caption=NASTY,
            alt=NASTY,
        ),
        points,
        [curve],
        optimum=drawing.Estimate(name="union", value=0.7, low=0.6, high=None),
        plateau=(0.6, 0.8),
    )


def page() -> Page:
    table = Table(
        title=NASTY,
        columns=("a", "b"),
        rows=((NASTY, "1"),) * 20,
        numeric=frozenset({"b"}),
        note=NASTY,
        long=True,
    )
    blocks = (
        Facts(((NASTY, NASTY, NASTY),)),
        Paragraph(NASTY),
        Caution(NASTY),
        Bullets((NASTY,)),
        Pictures((picture("one"), picture("two"))),
        table,
    )
    return Page(
        title=NASTY,
        subtitle=NASTY,
        sections=(Section(ident="summary", title=NASTY, blocks=blocks),),
        footer=NASTY,
    )


class Opened(HTMLParser):
    """Collects tags, ids and addresses, and checks that every tag is closed."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.stack.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.links.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def opened(html: str) -> Opened:
    parser = Opened()
    parser.feed(html)
    assert parser.stack == []
    return parser


def test_the_page_is_well_formed_and_needs_nothing_from_elsewhere() -> None:
    html = to_html(page())
    seen = opened(html)
    assert all(link.startswith("#") for link in seen.links)
    assert not {"script", "link", "img", "iframe", "object"} & set(seen.tags)
    assert not re.search(r"url\((?!#)|@import", html)
    assert seen.tags.count("svg") == 2


def test_ids_on_the_page_are_unique_and_every_reference_has_its_target() -> None:
    html = to_html(page())
    seen = opened(html)
    assert len(seen.ids) == len(set(seen.ids))
    assert {link[1:] for link in seen.links} <= set(seen.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(seen.ids)


def test_texts_are_shown_as_they_are_and_never_become_markup() -> None:
    html = to_html(page())
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    text = to_markdown(page())
    assert r"\<script\>" in text
    assert r"\| \*pipe\*" in text


def test_every_row_of_a_markdown_table_has_as_many_cells_as_its_head() -> None:
    lines = [line for line in to_markdown(page()).splitlines() if line.startswith("|")]
    assert len(lines) == 22
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {3}


def test_a_column_of_sentences_is_marked_so_that_a_phone_does_not_squeeze_it() -> None:
    rows = (("short", "7", "word " * 20), ("a", "8", "b"))
    table = Table(title="t", columns=("a", "n", "long"), rows=rows, numeric=frozenset({"n"}))
    page = Page(title="", subtitle="", sections=(Section(ident="s", title="", blocks=(table,)),), footer="")
    html = to_html(page)
    assert '<td>short</td><td class="n">7</td><td class="w">word' in html
    assert '<td class="w">b</td>' in html
    assert "td.w{min-width" in html


def test_a_long_hash_breaks_inside_its_cell_and_covers_no_other() -> None:
    rules = re.findall(r"^td\{([^}]*)\}", stylesheet(), re.MULTILINE)
    assert any("max-width" in rule and "overflow-wrap:break-word" in rule for rule in rules)


def test_a_picture_is_the_same_bytes_each_time_and_valid_svg() -> None:
    first, second = picture(), picture()
    assert first == second
    assert ET.fromstring(first.svg).tag.endswith("svg")
    assert "dc:date" not in first.svg


def test_every_colour_of_a_picture_is_in_the_palette_and_becomes_a_variable_on_the_page() -> None:
    drawn = picture()
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawn.svg)) <= set(theme.PALETTE)
    inside = theme.inline(drawn.svg, "share", "alt")
    assert not re.findall(r"#[0-9a-f]{6}\b", inside)
    assert "var(--ink)" in inside


def test_an_interval_without_an_upper_end_is_drawn_as_an_arrow() -> None:
    def markers(high: float | None) -> int:
        bar = drawing.Estimate(name="a", value=0.5, low=0.4, high=high)
        union = drawing.Estimate(name="union", value=0.5, low=0.4, high=0.6)
        drawn = checkplots.forest(
            drawing.Label(
                name="f",
                title="t",
                caption="",
                alt="",
            ),
            [bar],
            union,
            axis="x",
            within=(0.0, 1.0),
        )
        return len(re.findall(r"<use [^>]*#0072b2", drawn.svg))

    assert (markers(0.6), markers(None)) == (1, 2)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (2048, "2.05k"),
        (0, "0"),
        (0.25, "0.25"),
        (3.1e6, "3.1M"),
        (1e18, "1e18"),
        (None, "–"),
        (float("nan"), "–"),
    ],
)
def test_counts_are_short(value: float | None, said: str) -> None:
    assert short(value) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0, "0 s"),
        (54.6026, "54.6 s"),
        (119, "119 s"),
        (459, "7.65 min"),
        (3e4, "8.33 h"),
        (4.5e6, "1250 h"),
    ],
)
def test_times_carry_their_unit(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_ends_that_are_not_bounded_are_said_so() -> None:
    assert interval(None, None) == "unbounded"
    assert interval(0.5, None) == "[0.500, unbounded]"
    assert interval(0.5, 0.75, 2) == "[0.50, 0.75]"


def test_numbers_that_are_none_are_a_dash() -> None:
    assert fixed(None) == significant(None) == fixed(float("inf")) == "–"
    assert p_value(0.0004) == "p < 0.001"
    assert p_value(0.04321) == "p = 0.043"
    assert p_value(None) == "p not available"

"""A report as one HTML file that needs nothing beside it: style and pictures inside, no script."""

from __future__ import annotations

from html import escape

from scaling.report.document import (
    Block,
    Bullets,
    Caution,
    Code,
    Facts,
    Page,
    Paragraph,
    Picture,
    Pictures,
    Table,
)
from scaling.report.stylesheet import stylesheet
from scaling.report.theme import inline


def to_html(page: Page) -> str:
    """Return the page as HTML text."""
    links = "".join(f'<a href="#{s.ident}">{escape(s.title)}</a>' for s in page.sections)
    body = "\n".join(
        f'<section id="{s.ident}">\n<h2>{escape(s.title)}</h2>\n'
        + "\n".join(_block(block) for block in s.blocks)
        + "\n</section>"
        for s in page.sections
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(page.title)}</title>\n<style>\n{stylesheet()}\n</style>\n</head>\n<body>\n"
        f'<header><h1>{escape(page.title)}</h1><p class="subtitle">{escape(page.subtitle)}</p></header>\n'
        f'<nav aria-label="Sections"><div>{links}</div></nav>\n<main>\n{body}\n</main>\n'
        f"<footer>{escape(page.footer)}</footer>\n</body>\n</html>\n"
    )


def _block(block: Block) -> str:
    match block:
        case Paragraph(text):
            return f"<p>{escape(text)}</p>"
        case Caution(text):
            return f'<p class="caution" role="note">{escape(text)}</p>'
        case Code(title=title, text=text):
            return f'<h3>{escape(title)}</h3>\n<pre tabindex="0">{escape(text)}</pre>'
        case Bullets(items):
            return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"
        case Facts(items):
            return '<dl class="facts">' + "".join(_fact(*item) for item in items) + "</dl>"
        case Pictures(pictures):
            return '<div class="pictures">' + "".join(_picture(p) for p in pictures) + "</div>"
        case Table():
            return _table(block)


def _fact(name: str, value: str, remark: str) -> str:
    below = f"<dd>{escape(remark)}</dd>" if remark else ""
    return f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd>{below}</div>"


def _picture(picture: Picture) -> str:
    drawing = inline(picture.svg, picture.name, picture.alt)
    return f"<figure>{drawing}<figcaption>{escape(picture.caption)}</figcaption></figure>"


WIDE = 60
"""Letters from which on a cell's column must not be squeezed to a word's width on a phone."""


def _class(table: Table, place: int) -> str:
    if table.columns[place] in table.numeric:
        return ' class="n"'
    return ' class="w"' if any(len(row[place]) > WIDE for row in table.rows) else ""


def _table(table: Table) -> str:
    flush = [_class(table, place) for place in range(len(table.columns))]
    head = "".join(
        f'<th scope="col"{c}>{escape(name)}</th>' for c, name in zip(flush, table.columns, strict=True)
    )
    rows = "\n".join(
        "<tr>" + "".join(f"<td{c}>{escape(cell)}</td>" for c, cell in zip(flush, row, strict=True)) + "</tr>"
        for row in table.rows
    )
    # A box that scrolls takes the keyboard's focus, or those without a mouse could not read its end.
    box = "scroll long" if table.long and len(table.rows) > 15 else "scroll"
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f"<h3>{escape(table.title)}</h3>\n"
        f'<div class="{box}" tabindex="0" role="region" aria-label="{escape(table.title)}">'
        f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>{note}"
    )

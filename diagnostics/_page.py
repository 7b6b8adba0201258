"""One self-contained HTML page: sections of text, tables and figures. Every string that comes in is escaped."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diagnostics._page_style import STYLE
from diagnostics.verdicts import Level, Verdict

__all__ = ["Block", "Details", "Facts", "Gallery", "Page", "Plot", "Section", "Table", "Text", "page"]

DOTS = 150
"""Per inch, of what is drawn as dots because it has so many marks."""
WORDS = {Level.NOTE: "Note", Level.GOOD: "Good", Level.UNKNOWN: "Unknown", Level.CAUTION: "Caution", Level.BAD: "Bad"}


@dataclass(frozen=True)
class Text:
    """A paragraph.

    Attributes:
        text: plain.
    """

    text: str

    def html(self) -> str:
        """As HTML."""
        return f"<p>{escape(self.text)}</p>"


@dataclass(frozen=True)
class Facts:
    """Names and values.

    Attributes:
        rows: pairs.
    """

    rows: Sequence[tuple[str, str]]

    def html(self) -> str:
        """As HTML."""
        rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in self.rows)
        return f"<dl>{rows}</dl>"


@dataclass(frozen=True)
class Table:
    """A table that scrolls sideways where it is too wide; columns of numbers are right-aligned.

    Attributes:
        caption: what it shows.
        header: names of the columns.
        rows: cells.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def html(self) -> str:
        """As HTML."""
        kinds = ["" if _numeric(column) else ' class="text"' for column in zip(self.header, *self.rows, strict=True)]
        head = "".join(
            f'<th scope="col"{kind}>{escape(cell)}</th>' for kind, cell in zip(kinds, self.header, strict=True)
        )
        body = "".join(
            f'<tr><th scope="row">{escape(row[0])}</th>'
            + "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds[1:], row[1:], strict=True))
            + "</tr>"
            for row in self.rows
        )
        return (
            f'<div class="wide"><table><caption>{escape(self.caption)}</caption><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )


@dataclass(frozen=True, eq=False)
class Plot:
    """A figure, inline as SVG.

    Attributes:
        axes: what was drawn.
        caption: what it shows and how to read it; also its text for those who cannot see it.
    """

    axes: Axes | Figure
    caption: str

    def html(self) -> str:
        """As HTML."""
        figure = self.axes if isinstance(self.axes, Figure) else self.axes.get_figure(root=True)
        assert figure is not None
        width, _ = figure.get_size_inches()
        source = f"data:image/svg+xml;base64,{base64.b64encode(_svg(figure)).decode()}"
        picture = f'<img src="{source}" alt="{escape(self.caption)}" style="width: {width * 6:.0f}rem">'
        return f"<figure>{picture}<figcaption>{escape(self.caption)}</figcaption></figure>"


@dataclass(frozen=True, eq=False)
class Details:
    """Blocks that are folded until somebody opens them; on paper they stay folded.

    Attributes:
        summary: the line that opens them.
        blocks: what is inside.
    """

    summary: str
    blocks: Sequence[Block]

    def html(self) -> str:
        """As HTML."""
        inside = "".join(block.html() for block in self.blocks)
        return f"<details><summary>{escape(self.summary)}</summary>{inside}</details>"


@dataclass(frozen=True, eq=False)
class Gallery:
    """Figures side by side where there is room.

    Attributes:
        plots: the figures.
    """

    plots: Sequence[Plot]

    def html(self) -> str:
        """As HTML."""
        return f'<div class="gallery">{"".join(plot.html() for plot in self.plots)}</div>'


Block = Text | Facts | Table | Plot | Gallery | Details


@dataclass(frozen=True, eq=False)
class Section:
    """A part of the page.

    Attributes:
        title: its heading.
        verdicts: what its diagnostics come to; those that are not good are repeated on top of the page.
        blocks: its contents.
    """

    title: str
    verdicts: Sequence[Verdict]
    blocks: Sequence[Block]

    def html(self, anchor: str) -> str:
        """As HTML.

        Args:
            anchor: its id.
        """
        body = "".join(block.html() for block in self.blocks)
        return f'<section id="{anchor}"><h2>{escape(self.title)}</h2>{verdict_list(self.verdicts)}{body}</section>'


@dataclass(frozen=True)
class Page:
    """A finished page.

    Attributes:
        html: all of it.
        warnings: the verdicts on its top, the worst first.
    """

    html: str
    warnings: tuple[Verdict, ...]


def page(title: str, subtitle: str, sections: Sequence[Section], verdicts: Sequence[Verdict] = ()) -> Page:
    """The page: its warnings first, then the sections in order.

    Nothing is loaded from anywhere and nothing runs: the page's own security policy forbids it.

    Args:
        title: heading and name of the page.
        subtitle: a line beneath it.
        sections: the parts.
        verdicts: others than the parts' own, for the top.

    Returns:
        The page.

    >>> "&lt;b&gt;" in page("<b>", "", []).html and "<b>" not in page("<b>", "", []).html
    True
    """
    names = [f"part-{index}" for index in range(len(sections))]
    links = "".join(f'<a href="#{n}">{escape(s.title)}</a>' for n, s in zip(names, sections, strict=True))
    body = "".join(section.html(name) for name, section in zip(names, sections, strict=True))
    every = [*verdicts, *(verdict for section in sections for verdict in section.verdicts)]
    warnings = tuple(sorted((v for v in every if v.level > Level.GOOD), key=lambda verdict: -verdict.level))
    html = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>"
        f"{_warning_box(warnings)}<nav>{links}</nav>{body}</main></body></html>\n"
    )
    return Page(html, warnings)


def verdict_list(verdicts: Sequence[Verdict]) -> str:
    """Verdicts as a list, each with its level in words.

    Args:
        verdicts: in the order of the list.

    Returns:
        HTML, empty without verdicts.
    """
    items = "".join(
        f'<li class="{v.level.name.lower()}"><strong>{WORDS[v.level]}</strong> <em>{escape(v.about)}:</em> '
        f"{escape(v.text)}</li>"
        for v in verdicts
    )
    return f'<ul class="verdicts">{items}</ul>' if items else ""


def _warning_box(found: Sequence[Verdict]) -> str:
    if not found:
        return '<section class="warnings"><h2>No warnings</h2><p>Every check below came out well.</p></section>'
    title = "1 warning" if len(found) == 1 else f"{len(found)} warnings"
    return f'<section class="warnings"><h2>{title}</h2>{verdict_list(found)}</section>'


def _numeric(column: Sequence[str]) -> bool:
    """Whether the cells beneath a header start like numbers."""
    return all(not cell or re.match(r"[-+±(]?\d|nan", cell) for cell in column[1:])


def _svg(figure: Figure) -> bytes:
    """The same bytes for the same picture: no date, no random names; text as paths, which need no font."""
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "poe-merge", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", dpi=DOTS, metadata={"Date": None})
    return buffer.getvalue()

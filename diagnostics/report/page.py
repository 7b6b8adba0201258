"""One self-contained HTML page: sections of text, tables and figures. Every string that comes in is escaped."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import matplotlib as mpl
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Facts:
    """Names and values.

    Attributes:
        rows: pairs.
    """

    kind: ClassVar[str] = "facts"
    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """A table that scrolls sideways where it is too wide; columns of numbers are right-aligned.

    Attributes:
        caption: what it shows.
        header: names of the columns.
        rows: cells.
    """

    kind: ClassVar[str] = "table"
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers beneath their header."""
        columns = zip(*self.rows, strict=True) if self.rows else ((),) * len(self.header)
        return [all(not cell or re.match(r"[-+±(]?\d|nan", cell) for cell in column) for column in columns]


@dataclass(frozen=True, eq=False)
class Plot:
    """A figure, inline as SVG.

    Attributes:
        axes: what was drawn.
        caption: what it shows and how to read it; also its text for those who cannot see it.
    """

    kind: ClassVar[str] = "plot"
    axes: Axes | Figure
    caption: str

    @property
    def figure(self) -> Figure:
        """The figure that the axes belong to."""
        figure = self.axes if isinstance(self.axes, Figure) else self.axes.get_figure(root=True)
        assert figure is not None
        return figure

    @property
    def rem(self) -> str:
        """Width on the page in units of its font."""
        return f"{self.figure.get_size_inches()[0] * 6:.0f}"

    @property
    def base64(self) -> str:
        """The SVG: the same for the same picture, without date or random names; text as paths, which need no font."""
        buffer = io.BytesIO()
        with mpl.rc_context({"svg.hashsalt": "poe-merge", "svg.fonttype": "path"}):
            self.figure.savefig(buffer, format="svg", dpi=DOTS, metadata={"Date": None})
        return base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True, eq=False)
class Details:
    """Blocks that are folded until somebody opens them; on paper they stay folded.

    Attributes:
        summary: the line that opens them.
        blocks: what is inside.
    """

    kind: ClassVar[str] = "details"
    summary: str
    blocks: Sequence[Block]


@dataclass(frozen=True, eq=False)
class Gallery:
    """Figures side by side where there is room.

    Attributes:
        plots: the figures.
    """

    kind: ClassVar[str] = "gallery"
    plots: Sequence[Plot]


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
    every = [*verdicts, *(verdict for section in sections for verdict in section.verdicts)]
    warnings = tuple(sorted((v for v in every if v.level > Level.GOOD), key=lambda verdict: -verdict.level))
    template = Environment(
        loader=PackageLoader("diagnostics.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    ).get_template("page.html.jinja")
    html = template.render(title=title, subtitle=subtitle, sections=sections, warnings=warnings, words=WORDS)
    return Page(html, warnings)

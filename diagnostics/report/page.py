"""One self-contained HTML page of sections; ``page.html.jinja`` has the markup and escapes every string."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diagnostics.verdicts import Level, Verdict
from poe_models.printing import Brief, visible

DOTS = 150
"""Resolution per inch of marks that are drawn as dots because they are so many."""
WORDS = {Level.NOTE: "Note", Level.GOOD: "Good", Level.UNKNOWN: "Unknown", Level.CAUTION: "Caution", Level.BAD: "Bad"}


class _Block:
    """Base of the contents of a section; the template has a macro for each kind."""

    @property
    def kind(self) -> str:
        """Name of the macro."""
        return type(self).__name__.lower()


@dataclass(frozen=True)
class Text(_Block):
    """A paragraph of plain text."""

    text: str


@dataclass(frozen=True)
class Facts(_Block):
    """Pairs of names and values."""

    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table(_Block):
    """A table with a caption that scrolls sideways where it is too wide; columns of numbers are right-aligned."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def numeric(self) -> list[bool]:
        """Mask of the columns with nothing but numbers beneath their header."""
        columns = zip(*self.rows, strict=True) if self.rows else ((),) * len(self.header)
        return [all(not cell or re.match(r"[-+±(]?\d|nan", cell) for cell in column) for column in columns]


@dataclass(frozen=True, eq=False)
class Plot(_Block):
    """A figure, inline as SVG.

    Attributes:
        axes: Axes of the figure.
        caption: Explanation of the figure, which is also its text for those who cannot see it.
    """

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
        for axis in (axis for axes in self.figure.axes for axis in (axes.xaxis, axes.yaxis)):
            axis.get_ticklabels(which="both")  # only when asked for have ticks their labels
        for text in self.figure.findobj(mpl.text.Text):  # a name with dollars is no formula, as a log axis' ticks are
            if text.get_text() and not text.get_text().startswith(r"$\mathdefault"):
                text.set(parse_math=False, text="\n".join(map(visible, text.get_text().split("\n"))))
        with mpl.rc_context({"svg.hashsalt": "poe-merge", "svg.fonttype": "path"}):
            self.figure.savefig(buffer, format="svg", dpi=DOTS, metadata={"Date": None})
        return base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True, eq=False)
class Details(_Block):
    """Blocks that are folded beneath a summary until somebody opens them; on paper they stay folded."""

    summary: str
    blocks: Sequence[Block]


@dataclass(frozen=True, eq=False)
class Gallery(_Block):
    """Figures side by side where there is room."""

    plots: Sequence[Plot]


Block = Text | Facts | Table | Plot | Gallery | Details


@dataclass(frozen=True, eq=False)
class Section:
    """A part of the page.

    Attributes:
        title: Heading of the section.
        verdicts: Verdicts of its diagnostics; those that are not good are repeated on top of the page.
        blocks: Contents of the section.
    """

    title: str
    verdicts: Sequence[Verdict]
    blocks: Sequence[Block]


@dataclass(frozen=True, repr=False)
class Page(Brief):
    """A finished page.

    Attributes:
        html: The whole document.
        warnings: The verdicts on its top, one for each diagnostic, the worst first.
    """

    html: str
    warnings: tuple[Verdict, ...]


def _shown(value: object) -> object:
    """Text of the page without control characters but line breaks; markup of the template's own stays."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "\n".join(map(visible, value.split("\n")))


def _one_each(verdicts: Sequence[Verdict]) -> tuple[Verdict, ...]:
    """One verdict per diagnostic, at its worst level and with that reason first; the worst verdicts first."""
    of: dict[str, list[Verdict]] = {}
    for each in sorted(dict.fromkeys(verdicts), key=lambda verdict: -verdict.level):
        of.setdefault(each.about, []).append(each)
    return tuple(Verdict(about, same[0].level, " ".join(each.text for each in same)) for about, same in of.items())


def page(title: str, subtitle: str, sections: Sequence[Section], verdicts: Sequence[Verdict] = ()) -> Page:
    """The page: its warnings first, then the sections in order.

    Nothing is loaded from anywhere and nothing runs: the page's own security policy forbids it.

    Args:
        title: Heading and name of the page.
        subtitle: A line beneath it.
        sections: Parts of the page.
        verdicts: Other verdicts than the parts' own, for the top.

    >>> "&lt;b&gt;" in page("<b>", "", []).html and "<b>" not in page("<b>", "", []).html
    True
    """
    every = [*verdicts, *(verdict for section in sections for verdict in section.verdicts)]
    warnings = _one_each([verdict for verdict in every if verdict.level > Level.GOOD])
    template = Environment(
        loader=PackageLoader("diagnostics.report", "."),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    ).get_template("page.html.jinja")
    html = template.render(title=title, subtitle=subtitle, sections=sections, warnings=warnings, words=WORDS)
    return Page(html, warnings)

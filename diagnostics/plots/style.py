"""Style of all figures: lines and markers that differ in black and white too, axes, legends, labels of modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from poe_models.printing import visible

COLORS = ("#0072B2", "#D55E00", "#000000", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's, without yellow, which is lost on white."""
LINES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 3)))
MARKERS = ("o", "s", "^", "D", "v", "X", "P")
DEPTH = "cividis"
"""Colour map of ordered things: its lightness grows evenly, also for the colour-blind and in print."""
MOST_LABELS = 30
LONGEST_LABEL = 28


def axes_of(ax: Axes | None, size: tuple[float, float] = (6.4, 4.0), **options: Any) -> Axes:
    """The given axes, or new ones on a figure of their own, in inches, that no global state knows.

    The upper and the right frame are hidden.
    """
    if ax is None:
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        ax = figure.add_subplot(**options)
    for side in ("top", "right"):
        if side in ax.spines:
            ax.spines[side].set_visible(False)
    return ax


def line_style(index: int, marker: bool = True) -> dict[str, Any]:
    """Colour, line and (optional) marker of the n-th series; they differ together, so that each alone is enough."""
    style = {"color": COLORS[index % len(COLORS)], "linestyle": LINES[_turn(index)]}
    return style | ({"marker": MARKERS[_turn(index)], "markersize": 4} if marker else {})


def point_style(index: int) -> dict[str, Any]:
    """Colour and marker of the n-th set of points."""
    return {"color": COLORS[index % len(COLORS)], "marker": MARKERS[_turn(index)]}


def _turn(index: int) -> int:
    """Place of the line and the marker: shifted each time the colours begin again, so that 49 series differ."""
    return (index + index // len(COLORS)) % len(COLORS)


def shortened(name: str) -> str:
    """A long name without its beginning.

    >>> shortened("vision_model.encoder.layers.11.mlp.fc2")
    '…del.encoder.layers.11.mlp.fc2'
    """
    name = visible(name)
    return name if len(name) <= LONGEST_LABEL + 2 else "…" + name[-LONGEST_LABEL - 1 :]


def labelled(name: str) -> str:
    """A name for a legend, from which Matplotlib leaves out those that begin with an underscore.

    >>> labelled("_hidden"), labelled("mnist")
    (' _hidden', 'mnist')
    """
    return f" {visible(name)}" if name.startswith("_") else visible(name)


def distinct(names: Sequence[str]) -> list[str]:
    """Names without the parts at either end that all of them share, and shortened.

    >>> distinct(["model.layers.0.fc1.weight", "model.layers.1.fc1.weight"])
    ['0', '1']
    >>> distinct(["fc.weight"])
    ['fc.weight']
    """
    parts = [name.split(".") for name in names]
    fewest = min((len(each) for each in parts), default=1)
    front = next((i for i in range(fewest - 1) if len({each[i] for each in parts}) > 1), fewest - 1)
    back = next((i for i in range(fewest - 1 - front) if len({each[-1 - i] for each in parts}) > 1), fewest - 1 - front)
    if len(parts) < 2:
        return [shortened(name) for name in names]
    return [shortened(".".join(each[front : len(each) - back])) for each in parts]


def label_modules(ax: Axes, names: Sequence[str], axis: str = "x") -> None:
    """Name the modules at 0, 1, ... of an axis; every few of them if there are many."""
    labels = distinct(names)
    most = MOST_LABELS if axis == "x" else 3 * MOST_LABELS
    places = np.arange(0, len(names), max(1, -(-len(names) // most)))
    shown = [labels[place] for place in places]
    if axis == "x":
        ax.set_xticks(places, shown, rotation=90, fontsize=7)
    else:
        ax.set_yticks(places, shown, fontsize=7)


def finish(ax: Axes, title: str, columns: int = 4) -> Axes:
    """Add a title at the left, and between it and the axes a legend if anything has a label; return the axes."""
    labels = ax.get_legend_handles_labels()[1]
    rows = -(-len(labels) // columns)
    if labels:
        options = {"frameon": False, "fontsize": 8, "borderaxespad": 0.1, "columnspacing": 1.2, "handletextpad": 0.5}
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=min(columns, len(labels)), **options)
    ax.set_title(title, loc="left", pad=6 + 15 * rows, fontsize=11)
    return ax

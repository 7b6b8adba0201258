"""The comparison as bars."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.vision.report import EXPERTS, MEAN, Row

# Okabe and Ito's colours, chosen dark to light so that they also differ in grayscale; hatches say it once more.
STYLES = {
    "Gaussian": ("#0072B2", ""),
    "Cauchy": ("#E69F00", "//"),
    "Student-t(4)": ("#F0E442", ".."),
    "": ("#7f7f7f", ""),
}
LINES = {"base": ":", EXPERTS: "--"}


def bar_plot(rows: Sequence[Row]) -> Figure:
    """Mean test accuracy and calibration error of every merge, with base and own experts as lines.

    Args:
        rows: The methods, base and own experts among them.

    Returns:
        The figure, not shown and not saved.
    """
    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    merged = [row for row in rows if row.settings is not None]
    above, below = figure.subplots(2, 1, sharex=True)
    draw_bars(above, merged, [row.on(MEAN).accuracy for row in merged])
    draw_bars(below, merged, [row.on(MEAN).ece for row in merged])
    for row in rows:
        if row.name not in LINES:
            continue
        for axes, value in ((above, row.on(MEAN).accuracy), (below, row.on(MEAN).ece)):
            label = f"{row.name} ({value:.2f})"
            axes.axhline(value, color="black", linestyle=LINES[row.name], linewidth=1.2, label=label, zorder=0)
    tasks = ", ".join(merged[0].scores)
    above.set(ylabel="mean test accuracy", ylim=(0, 1), title=f"SqueezeNet v1.1 merged over {tasks}")
    below.set(ylabel="mean ECE, 20 bins (lower is better)")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return figure


def draw_bars(axes: Axes, rows: Sequence[Row], values: Sequence[float]) -> None:
    """One group of bars for each family, one bar for each energy in it, each with its value on top.

    Args:
        axes: Where to draw.
        rows: The methods.
        values: Heights, one for each row.
    """
    families = list(dict.fromkeys(row.family for row in rows))
    width = 0.27
    for energy, (color, hatch) in STYLES.items():
        chosen = [(row, value) for row, value in zip(rows, values, strict=True) if row.energy == energy]
        places = []
        for row, _ in chosen:
            members = [other.energy for other in rows if other.family == row.family]
            places.append(families.index(row.family) + width * (members.index(energy) - (len(members) - 1) / 2))
        heights = [value for _, value in chosen]
        if not heights:
            continue
        bars = axes.bar(places, heights, width, color=color, hatch=hatch, edgecolor="black", linewidth=0.6)
        bars.set_label(energy or "no experts")
        axes.bar_label(bars, [f"{value:.3f}" for value in heights], fontsize=7, padding=2)
    axes.set_xticks(np.arange(len(families)), families)

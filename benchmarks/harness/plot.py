"""The comparison as bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.harness.report import EXPERTS, MEAN, Row

# Okabe and Ito's colours, chosen dark to light so that they also differ in grayscale; hatches say it once more.
STYLES = {
    "Gaussian": ("#0072B2", ""),
    "Cauchy": ("#E69F00", "//"),
    "Student-t(4)": ("#F0E442", ".."),
    "": ("#7f7f7f", ""),
}
LINES = {"base": ":", EXPERTS: "--"}


def bar_plot(rows: Sequence[Row], tails: Sequence[tuple[Row, Row]] = (), network: str = "") -> Figure:
    """Mean test accuracy and calibration error of every merge, with base and own experts as lines.

    Args:
        rows: The methods, base and own experts among them.
        tails: Heavy-tailed rows, each with its Gaussian twin's, which is marked on the bar.
        network: What was merged, for the title.

    Returns:
        The figure, not shown and not saved.
    """
    merged = [row for row in rows if row.settings is not None]
    families = len({row.family for row in merged})
    figure = Figure(figsize=(max(8.0, 1.3 * families), 7), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    twins = {row.name: twin for row, twin in tails}
    for axes, metric in ((above, "accuracy"), (below, "ece")):
        values = {row.name: getattr(row.on(MEAN), metric) for row in merged}
        draw_bars(axes, merged, values, {name: getattr(twin.on(MEAN), metric) for name, twin in twins.items()})
    for row in rows:
        if row.name not in LINES:
            continue
        for axes, value in ((above, row.on(MEAN).accuracy), (below, row.on(MEAN).ece)):
            axes.axhline(value, color="black", linestyle=LINES[row.name], linewidth=1.2, label=row.name, zorder=0)
            axes.annotate(f"{value:.3f}", (1, value), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    tasks = ", ".join(merged[0].scores)
    above.set(ylabel="mean test accuracy", ylim=(0, 1), title=f"{network} merged over {tasks}")
    below.set(ylabel="mean ECE, 20 bins (lower is better)")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*above.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def draw_bars(axes: Axes, rows: Sequence[Row], values: Mapping[str, float], twins: Mapping[str, float]) -> None:
    """One group of bars for each family, one bar for each energy in it, each with its value on top.

    Args:
        axes: Where to draw.
        rows: The methods.
        values: Heights by name of the row.
        twins: Values of Gaussian twins at the same settings, by name of the row.
    """
    families = list(dict.fromkeys(row.family for row in rows))
    width = 0.27
    places: dict[str, float] = {}
    for i, family in enumerate(families):
        members = [row.name for row in rows if row.family == family]
        places |= {name: i + width * (j - (len(members) - 1) / 2) for j, name in enumerate(members)}
    for energy, (color, hatch) in STYLES.items():
        names = [row.name for row in rows if row.energy == energy]
        if not names:
            continue
        heights = [values[name] for name in names]
        bars = axes.bar([places[n] for n in names], heights, width, color=color, hatch=hatch, edgecolor="black", lw=0.6)
        bars.set_label(energy or "no experts")
        axes.bar_label(bars, [f"{height:.3f}".lstrip("0") for height in heights], fontsize=8, padding=4)
    if twins:
        x, y = [places[name] for name in twins], list(twins.values())
        axes.plot(x, y, "D", color="white", markeredgecolor="black", markersize=5, label="Gaussian twin, same λ and η")
    axes.set_xticks(np.arange(len(families)), families)

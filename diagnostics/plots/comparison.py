"""Figures that compare methods; each draws a result of ``diagnostics.predictions.comparison``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from diagnostics.plots.style import COLORS, axes_of, finish, line_style, point_style
from diagnostics.predictions.comparison import Comparison

__all__ = ["plot_pareto", "plot_radar"]


def plot_radar(result: Comparison, methods: Sequence[str] | None = None, ax: Axes | None = None) -> Axes:
    """One spoke for each task and one line for each method, as [BMM] shows accuracies by task.

    Accuracies are over those of the tasks' own experts, where the comparison has them.

    Args:
        result: Of ``compare_methods``, on three tasks or more.
        methods: Which to draw; the first seven by default.
        ax: Where to draw; polar.

    Returns:
        The axes.

    Raises:
        ValueError: If there are fewer than three tasks, or the axes are not polar.

    Example:
        ``plot_radar(compare_methods(predictions, labels, seed=0))``
    """
    if len(result.tasks) < 3:
        raise ValueError(
            f"`plot_radar(...)`: {len(result.tasks)} tasks. Give three or more; for fewer a table says it better."
        )
    ax = axes_of(ax, (5.6, 5.8), projection="polar")
    if ax.name != "polar":
        raise ValueError("`plot_radar(ax=...)`: a polar plot. Make the axes with `projection='polar'`.")
    angles = np.linspace(0, 2 * np.pi, len(result.tasks), endpoint=False)
    around = np.append(angles, angles[0])
    table = result.values["accuracy"] / (1 if result.experts is None else result.experts)
    for index, name in enumerate(result.methods[: len(COLORS)] if methods is None else methods):
        values = table[result.methods.index(name)].numpy()
        ax.plot(around, np.append(values, values[0]), linewidth=1.5, label=name, **line_style(index))
    ax.set_xticks(angles, list(result.tasks))
    ax.set(theta_offset=np.pi / 2, theta_direction=-1)
    ax.set_ylim(0, 1.02 * max(1.0, float(table.max())))
    ax.tick_params(axis="x", pad=8)
    ax.tick_params(axis="y", labelsize=7)
    finish(ax, "accuracy by task" if result.experts is None else "accuracy over the own expert's, by task")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3, frameon=False, fontsize=8)
    return ax


def plot_pareto(result: Comparison, series: Mapping[str, Sequence[str]] | None = None, ax: Axes | None = None) -> Axes:
    """Mean accuracy against mean ECE with their intervals: the counterpart of [BMM] Figure 4.

    The stepped line is the front: what no other method is as accurate as and as well calibrated as. [BMM] draws two
    paths over the temperature, draws of the posterior and white noise of the same size; give them as two series.

    Args:
        result: Of ``compare_methods``.
        series: Label to the methods that are joined by a line, in order; by default every method is a point of its own.
        ax: Where to draw.

    Returns:
        The axes.

    Example:
        ``plot_pareto(compare_methods(predictions, labels, seed=0))``
    """
    ax = axes_of(ax, (6.4, 4.8))
    groups = {method: [method] for method in result.methods} if series is None else series
    for index, (label, methods) in enumerate(groups.items()):
        estimates = [(result.mean(method), result.mean(method, "ece")) for method in methods]
        x, y = ([each.value for each in axis] for axis in zip(*estimates, strict=True))
        reach = [
            [[each.value - each.low for each in axis], [each.high - each.value for each in axis]]
            for axis in zip(*estimates, strict=True)
        ]
        style = line_style(index) if len(methods) > 1 else point_style(index) | {"linestyle": "none"}
        ax.errorbar(x, y, np.maximum(reach[1], 0), np.maximum(reach[0], 0), elinewidth=0.6, label=label, **style)
    front = sorted((result.mean(m).value, result.mean(m, "ece").value) for m in result.on_front())
    ax.step(*zip(*front, strict=True), where="pre", color="black", linewidth=0.8, zorder=0, label="Pareto front")
    ax.set(xlabel="mean accuracy (higher is better)", ylabel="mean ECE (lower is better)")
    return finish(ax, "accuracy and calibration", columns=3)

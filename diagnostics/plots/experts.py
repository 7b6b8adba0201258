"""Figures of how much each task is in a merge."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from diagnostics.plots.style import DEPTH, axes_of, finish, label_modules, point_style, shortened
from diagnostics.solver import CoefficientIntervals, FixedPointConvergence

__all__ = ["plot_expert_weights", "plot_forest"]

MOST_NUMBERS = 200
TALLEST, WIDEST = 30.0, 11.0
"""Inches."""


def plot_forest(result: CoefficientIntervals, ax: Axes | None = None) -> Axes:
    """Median and interval of every task's coefficient in every module; modules from top to bottom.

    Args:
        result: Of ``coefficient_intervals``.
        ax: Where to draw.

    Returns:
        The axes.

    Example:
        ``plot_forest(coefficient_intervals(draws))``
    """
    count, tasks = result.median.shape
    ax = axes_of(ax, (6.4, min(1.2 + 0.12 * count * (tasks + 1), TALLEST)))
    for index, name in enumerate(result.updates):
        place = np.arange(count) + 0.7 * (index - (tasks - 1) / 2) / tasks
        middle = result.median[:, index]
        reach = np.stack([middle - result.low[:, index], result.high[:, index] - middle])
        style = point_style(index)
        ax.errorbar(middle, place, xerr=reach, linestyle="none", markersize=4, linewidth=1.1, label=name, **style)
    ax.axvline(0, color="black", linewidth=0.8, linestyle=":")
    label_modules(ax, result.modules, "y")
    ax.set_ylim(count - 0.5, -0.5)
    ax.set(xlabel=f"coefficient, median and {result.confidence:.0%} interval")
    return finish(ax, "task coefficients by module")


def plot_expert_weights(result: FixedPointConvergence, ax: Axes | None = None) -> Axes:
    """Heat map of the experts' weights relative to their Gaussian twins', by module.

    Light is 1, a Gaussian's weight; dark experts were turned down by their tail. Hatched ones say nothing there.

    Args:
        result: Of a merge.
        ax: Where to draw.

    Returns:
        The axes.

    Example:
        ``plot_expert_weights(fixed_point_convergence(solution_records(solution, names)))``
    """
    weights = result.relative_weights.T
    experts, modules = weights.shape
    ax = axes_of(ax, (min(max(4.0, 1.6 + 0.26 * modules), WIDEST), 1.8 + 0.34 * experts))
    ax.set_facecolor("white")
    least, most = min(0.0, float(np.nanmin(weights, initial=0.0))), max(1.0, float(np.nanmax(weights, initial=1.0)))
    image = ax.imshow(np.ma.masked_invalid(weights), aspect="auto", cmap=DEPTH, vmin=least, vmax=most)
    ax.figure.colorbar(image, ax=ax, label="weight / Gaussian's")
    for row, column in np.argwhere(np.isnan(weights)):
        ax.fill_between([column - 0.5, column + 0.5], row - 0.5, row + 0.5, hatch="////", facecolor="white", lw=0)
    if weights.size <= MOST_NUMBERS:
        for (row, column), value in np.ndenumerate(weights):
            if np.isfinite(value):
                color = "black" if value > 0.55 * most else "white"
                ax.text(column, row, f"{value:.2f}".lstrip("0"), ha="center", va="center", fontsize=6, color=color)
    ax.set_yticks(np.arange(experts), [shortened(name) for name in result.experts], fontsize=8)
    label_modules(ax, result.modules)
    return finish(ax, "expert weights by module")

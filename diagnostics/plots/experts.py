"""Figures of single experts, and of the alignment of their updates with their tasks."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from diagnostics.alignment import LEVEL, Alignment
from diagnostics.experts import ExpertShares
from diagnostics.plots.style import axes_of, finish, label_modules, line_style, shortened

SIZE = (7.2, 3.4)


def plot_expert(result: ExpertShares, ax: Axes | None = None) -> Axes:
    """One expert in every module: share kept of its update, squared residual left, weight over a Gaussian's."""
    ax = axes_of(ax, SIZE)
    place = np.arange(len(result.modules))
    lines = (
        ("of its update kept", result.kept),
        ("of its squared residual left", result.residual_left),
        ("weight over a Gaussian's", result.relative_weights),
    )
    for index, (label, values) in enumerate(lines):
        if np.isfinite(values).any():
            ax.plot(place, values, label=label, linewidth=1, **line_style(index))
    ax.axhline(0, color="black", linewidth=0.8, linestyle=":")
    ax.set(ylabel="share")
    label_modules(ax, result.modules)
    return finish(ax, shortened(result.name), columns=3)


def plot_alignment(result: Alignment, ax: Axes | None = None) -> Axes:
    """Mean cosine of the updates with their own and with other tasks' moments, by module ([BMM] Figure 2).

    Filled squares mark modules in which at most one in twenty shuffles of the tasks is as alike.
    """
    ax = axes_of(ax, SIZE)
    place = np.arange(len(result.modules))
    own, others = (each.nanmean(-1).numpy() for each in (result.own, result.others))
    ax.plot(place, own, label=f"own task's {result.side}s", linewidth=1, **line_style(0))
    ax.plot(place, others, label="other tasks'", linewidth=1, **line_style(1))
    clear = result.p_values.numpy() <= LEVEL
    if clear.any():
        ax.plot(place[clear], own[clear], "s", color="black", markersize=6, label=f"p up to {LEVEL:g}")
    ax.set(ylabel="Frobenius cosine")
    label_modules(ax, result.modules)
    return finish(ax, "alignment of updates with their tasks", columns=3)

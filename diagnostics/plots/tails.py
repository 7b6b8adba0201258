"""Figures of residuals and their tails; each draws a result of ``diagnostics.tails``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from diagnostics.plots.style import axes_of, finish, label_modules, labelled, line_style
from diagnostics.residuals import Residuals, Unit
from diagnostics.tails import FAMILIES, Hill, LogDensity, Quantiles, TailComparison

BINS = 61
COVERAGE = 0.99
OBSERVED: dict[str, Any] = {"color": "black", "marker": "o", "markersize": 3, "linestyle": "none"}


def plot_residual_histogram(
    result: TailComparison, families: Sequence[str] = ("Gaussian", "Cauchy", "Student-t"), ax: Axes | None = None
) -> Axes:
    """Histogram of the residuals with fitted densities: the counterpart of [PoE] Figures 1 and 5.

    Densities are at the greatest likelihood; families that were not fitted are left out.
    """
    ax = axes_of(ax)
    end = float(np.quantile(np.abs(result.values), COVERAGE))
    edges = np.linspace(-end, end, BINS + 1)
    counts = np.histogram(result.values, edges)[0]
    heights = counts / (len(result.values) * np.diff(edges))
    ax.stairs(heights, edges, fill=True, color="#d0d0d0", edgecolor="black", label=f"{len(result.values)} residuals")
    points = np.linspace(-end, end, 401)
    fits = {each.name: each.fit for each in result.results}
    for name in (name for name in families if name in fits):
        style = line_style(_place(name), marker=False)
        ax.plot(points, np.exp(fits[name].log_density(points)), linewidth=1.6, label=name, **style)
    ax.set(xlabel="residual", ylabel="density")
    return finish(ax, "residuals and fitted densities")


def plot_log_density(curves: LogDensity, ax: Axes | None = None) -> Axes:
    """Log density of the residuals with fitted families: the counterpart of [PoE] Figures 1, 5 and 6.

    On this scale a Gaussian is a parabola and a Laplace a tent; bars are two standard errors of a bin's count.
    """
    ax = axes_of(ax)
    ax.errorbar(curves.centres, curves.observed, yerr=2 * curves.error, elinewidth=0.7, label="observed", **OBSERVED)
    for name, values in sorted(curves.fitted.items(), key=lambda item: _place(item[0])):
        ax.plot(curves.centres, values, linewidth=1.4, label=name, **line_style(_place(name), marker=False))
    low, high = np.nanmin(curves.observed), np.nanmax(curves.observed)
    ax.set_ylim(low - 0.25 * (high - low) - 0.5, high + 0.1 * (high - low) + 0.5)
    ax.set(xlabel=f"residual ({curves.outside:.1%} lie beyond)", ylabel="log density, nats")
    return finish(ax, "log density of the residuals")


def plot_quantiles(curves: Sequence[Quantiles], ax: Axes | None = None) -> Axes:
    """QQ plot: the residuals against the quantiles of one or several fitted families; a straight line fits.

    Both axes are compressed far out (linear up to about the median absolute residual, logarithmic beyond).
    """
    ax = axes_of(ax, (4.8, 4.8))
    unit = float(np.median(np.abs(curves[0].observed)))
    for index, each in enumerate(curves):
        style = line_style(_place(each.name)) | {"linestyle": "none", "markersize": 3, "rasterized": True}
        style |= {"markerfacecolor": "white"} if index % 2 else {}
        ax.plot(each.theoretical, each.observed, label=each.name, **style)
    end = 1.3 * float(np.abs(curves[0].observed).max())
    ax.plot([-end, end], [-end, end], color="black", linewidth=0.8)
    decades = 10.0 ** np.arange(np.ceil(np.log10(unit)), np.log10(end))
    ticks = [*-decades[::-1], 0.0, *decades]
    for axis in ("x", "y"):
        getattr(ax, f"set_{axis}scale")("asinh", linear_width=unit)
        getattr(ax, f"set_{axis}lim")(-end, end)
        getattr(ax, f"set_{axis}ticks")(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
        getattr(ax, f"set_{axis}ticks")([], minor=True)
    ax.set(xlabel="quantile of the fitted family", ylabel="residual")
    return finish(ax, "QQ plot")


def plot_hill(result: Hill, ax: Axes | None = None) -> Axes:
    """Hill's tail index over the number of largest residuals it is taken from; a plateau is a power law."""
    ax = axes_of(ax)
    ax.plot(result.k, result.index, label="Hill's estimate", **line_style(0, marker=False))
    ax.fill_between(result.k, result.low, result.high, color="#0072B2", alpha=0.2, linewidth=0, label="95 % interval")
    for place, name in ((1, "1: Cauchy"), (2, "2: variance ends")):
        ax.axhline(place, color="black", linewidth=0.7, linestyle=":")
        ax.annotate(name, (0.01, place), xycoords=("axes fraction", "data"), fontsize=7, va="bottom")
    settled = result.index[result.k >= min(20, result.k[-1])]
    ax.set_ylim(0, max(3.0, 1.6 * float(np.nanmax(settled))))
    ax.set(xlabel="k largest residuals", ylabel="tail index")
    return finish(ax, "Hill's estimator")


def plot_families(result: TailComparison, ax: Axes | None = None) -> Axes:
    """Elpd of each family less that of the best, with two standard errors; filled marks are tied with it."""
    ax = axes_of(ax, (6.4, 1.0 + 0.35 * len(result.results)))
    for row, each in enumerate(result.results):
        fill = "black" if each.tied else "white"
        reach = 2 * each.difference_error
        style: dict[str, Any] = {"color": "black", "markerfacecolor": fill, "marker": "o", "linewidth": 1.2}
        ax.errorbar(-each.difference, row, xerr=reach, **style)
    ax.axvline(0, color="black", linewidth=0.8, linestyle=":")
    ax.set_yticks(range(len(result.results)), [each.name for each in result.results])
    ax.set_ylim(len(result.results) - 0.5, -0.5)
    ax.set(xlabel="elpd less the best family's, nats (bars: two standard errors)")
    return finish(ax, "families compared by leave-one-out")


def plot_mean_squared_residuals(residuals: Mapping[str, Residuals], unit: Unit = "own", ax: Axes | None = None) -> Axes:
    """Mean squared residual of every module by method, on a logarithmic axis: the counterpart of [PoE] Figure 2.

    Args:
        residuals: Name of each method to its merge's residuals, of the same modules.
        unit: "raw" for ``q``, "scale" for ``q / s^2``, "own" for ``q / q(0)``: 1 is what merging nothing leaves.
        ax: Axes to draw into.

    Raises:
        ValueError: If there are none, or they are of different modules.
    """
    modules = next(iter(residuals.values())).modules if residuals else ()
    if not modules or any(each.modules != modules for each in residuals.values()):
        raise ValueError(
            f"`plot_mean_squared_residuals(...)`: {len(residuals)} methods of different modules. Give residuals of one "
            "or more merges of the same model."
        )
    ax = axes_of(ax, (7.2, 4.2))
    for index, (name, found) in enumerate(residuals.items()):
        column = found.mean_squared(unit)
        ax.plot(
            np.arange(len(modules)), np.where(column > 0, column, np.nan), label=labelled(name), **line_style(index)
        )
    name = {"raw": "mean q", "scale": "mean q / s²", "own": "mean q / q(0)"}[unit]
    ax.set(yscale="log", ylabel=name)
    label_modules(ax, modules)
    return finish(ax, "squared residuals by module")


def _place(family: str) -> int:
    """Number of a family's style, the same in every figure."""
    names = [each.name for each in FAMILIES]
    return names.index(family) if family in names else len(names)

"""Figures of the fixed point, the experts' weights, sensitivity and chains."""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator

from diagnostics.chains import ESS, R_HAT, ChainConvergence, CoefficientIntervals, Ranks
from diagnostics.plots.style import (
    DEPTH,
    LINES,
    MARKERS,
    axes_of,
    finish,
    label_modules,
    labelled,
    line_style,
    point_style,
    shortened,
)
from diagnostics.sensitivity import GammaSensitivity
from diagnostics.solver import FixedPointConvergence

ROUNDING = 1e-16
MOST_NUMBERS = 200
TALLEST, WIDEST = 30.0, 11.0
"""Inches."""


def plot_energy_traces(result: FixedPointConvergence, ax: Axes | None = None) -> Axes:
    """Energy after each step, per module: the counterpart of [PoE] Figure 3.

    The energy is shown above its final value and relative to it, on a logarithmic axis; a trace ends where rounding
    does, at 1e-16. Modules are coloured by depth, dark to light.
    """
    ax = axes_of(ax)
    count = len(result.traces)
    colors = colormaps[DEPTH](np.linspace(0, 0.9, count))
    for index, trace in enumerate(result.traces):
        gap = np.maximum((trace - trace[-1]) / max(abs(trace[-1]), np.finfo(float).tiny), ROUNDING)
        style = {"linestyle": LINES[index % 4], "marker": MARKERS[index % len(MARKERS)], "markersize": 3}
        ax.semilogy(np.arange(1, len(gap) + 1), gap, color=colors[index], linewidth=1, alpha=0.8, **style)
    ax.set(xlabel="step", ylabel="(E - E_final) / |E_final|")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if count > 1:
        scale = ScalarMappable(Normalize(1, 1 + (count - 1) / 0.9), DEPTH)
        bar = ax.figure.colorbar(scale, ax=ax, label="module, in order", boundaries=np.linspace(1, count, 256))
        bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    return finish(ax, "energy along the fixed point, per module")


def plot_contraction(result: FixedPointConvergence, ax: Axes | None = None) -> Axes:
    """Exact contraction rate and the bound L of every module: the counterpart of [PoE] Figure 4."""
    ax = axes_of(ax, (7.2, 4.2))
    place = np.arange(len(result.modules))
    for index, (name, values) in enumerate((("bound L ([PoE] Eq. 41)", result.bound), ("exact rate", result.rate))):
        ax.semilogy(place, np.maximum(values, ROUNDING), label=labelled(name), **line_style(index))
    ax.axhline(1, color="black", linewidth=1, linestyle=":", label="1: no contraction above")
    ax.set(ylabel="contraction per plain step")
    label_modules(ax, result.modules)
    return finish(ax, "contraction at the solution")


def plot_forest(result: CoefficientIntervals, ax: Axes | None = None) -> Axes:
    """Median and interval of every task's coefficient in every module; modules from top to bottom."""
    count, tasks = result.median.shape
    ax = axes_of(ax, (6.4, min(1.2 + 0.12 * count * (tasks + 1), TALLEST)))
    for index, name in enumerate(result.updates):
        place = np.arange(count) + 0.7 * (index - (tasks - 1) / 2) / tasks
        middle = result.median[:, index]
        reach = np.stack([middle - result.low[:, index], result.high[:, index] - middle])
        style = point_style(index)
        ax.errorbar(
            middle, place, xerr=reach, linestyle="none", markersize=4, linewidth=1.1, label=labelled(name), **style
        )
    ax.axvline(0, color="black", linewidth=0.8, linestyle=":")
    label_modules(ax, result.modules, "y")
    ax.set_ylim(count - 0.5, -0.5)
    ax.set(xlabel=f"coefficient, median and {result.confidence:.0%} interval")
    return finish(ax, "task coefficients by module")


def plot_expert_weights(result: FixedPointConvergence, ax: Axes | None = None) -> Axes:
    """Heat map of the experts' weights relative to their Gaussian twins', by module.

    Light is 1, a Gaussian's weight; dark experts were turned down by their tail. Hatched ones say nothing there.
    """
    weights = result.relative_weights.T
    experts, modules = weights.shape
    ax = axes_of(ax, (min(max(4.0, 1.6 + 0.26 * modules), WIDEST), 1.8 + 0.34 * experts))
    ax.set_facecolor("white")
    least, most = min(0.0, float(np.nanmin(weights, initial=0.0))), max(1.0, float(np.nanmax(weights, initial=1.0)))
    image = ax.imshow(np.ma.masked_invalid(weights), aspect="auto", cmap=DEPTH, vmin=least, vmax=most)
    ax.figure.colorbar(image, ax=ax)
    for row, column in np.argwhere(np.isnan(weights)):
        ax.fill_between([column - 0.5, column + 0.5], row - 0.5, row + 0.5, hatch="////", facecolor="white", lw=0)
    if weights.size <= MOST_NUMBERS:
        for (row, column), value in np.ndenumerate(weights):
            if np.isfinite(value):
                color = "black" if value > 0.55 * most else "white"
                ax.text(column, row, f"{value:.2f}".lstrip("0"), ha="center", va="center", fontsize=6, color=color)
    ax.set_yticks(np.arange(experts), [shortened(name) for name in result.experts], fontsize=8)
    label_modules(ax, result.modules)
    return finish(ax, "expert weights over a Gaussian's, by module")


def plot_gamma_moves(result: GammaSensitivity, ax: Axes | None = None) -> Axes:
    """Moves of the merge with gamma, and its distance from the Gaussian twin's.

    Lines are medians over modules, bands reach from the least to the most.
    """
    ax = axes_of(ax)
    reference = f"from gamma = {result.gammas[result.reference]:.3g}"
    for index, (name, values) in enumerate(
        ((reference, result.distance), ("from the Gaussian twin", result.from_twin))
    ):
        style = line_style(index)
        low, middle, high = np.nanmin(values, 1), np.nanmedian(values, 1), np.nanmax(values, 1)
        ax.plot(result.gammas, middle, label=labelled(name), **style)
        ax.fill_between(result.gammas, low, high, alpha=0.15, color=style["color"], linewidth=0)
    ax.set(xscale="log", xlabel="gamma", ylabel="relative distance of the merge")
    ax.set_ylim(bottom=0)
    return finish(ax, "sensitivity to gamma")


def plot_gamma_scores(result: GammaSensitivity, ax: Axes | None = None) -> Axes:
    """The score of the merge over gamma: the counterpart of [PoE] Figure 7.

    Raises:
        ValueError: If the result has no scores.
    """
    if result.scores is None:
        raise ValueError(
            "`plot_gamma_scores(...)`: the result has no scores. Give `gamma_sensitivity` a score, or draw "
            "`plot_gamma_moves`."
        )
    ax = axes_of(ax)
    ax.plot(result.gammas, result.scores, **line_style(0))
    best = int(result.scores.argmax())
    ax.plot(result.gammas[best], result.scores[best], "k*", markersize=12, label=f"best: {result.gammas[best]:.3g}")
    ax.set(xscale="log", xlabel="gamma", ylabel="score")
    return finish(ax, "score of the merge over gamma")


def plot_chain_traces(result: ChainConvergence, module: str, quantity: str, ax: Axes | None = None) -> Axes:
    """Trace of one quantity's draws in one module, chain by chain."""
    ax = axes_of(ax)
    values = _of(result, module, quantity)
    for index, chain in enumerate(values):
        style = line_style(index, marker=False)
        ax.plot(chain, linewidth=0.7, label=f"chain {index + 1}" if len(values) <= 8 else None, **style)
    ax.set(xlabel="draw", ylabel=quantity)
    return finish(ax, f"{quantity} in {module}")


def plot_ranks(ranks: Ranks, ax: Axes | None = None) -> Axes:
    """Rank plot: a row of bars for each chain, all alike if chains agree; the band holds 95 % of independent draws."""
    ax = axes_of(ax)
    chains, bins = ranks.counts.shape
    height = max(float(ranks.counts.max()), ranks.high) * 1.15
    for chain, counts in enumerate(ranks.counts):
        floor = (chains - 1 - chain) * height
        ax.bar(np.arange(bins), counts, 1, floor, color="#9ecae1", edgecolor="black", linewidth=0.5)
        ax.hlines(floor + ranks.expected, -0.5, bins - 0.5, color="black", linewidth=1)
        for edge in (ranks.low, ranks.high):
            ax.hlines(floor + edge, -0.5, bins - 0.5, color="black", linewidth=0.7, linestyle="--")
    floors = (chains - 1 - np.arange(chains)) * height
    ax.set_yticks(floors + ranks.expected, [f"chain {chain + 1}" for chain in range(chains)])
    ax.set_xticks([-0.5, bins - 0.5], ["lowest", "highest"])
    ax.set(xlabel="rank among the draws of all chains")
    return finish(ax, "ranks by chain")


def plot_r_hat(result: ChainConvergence, ax: Axes | None = None) -> Axes:
    """R-hat of every quantity in every module, with the limits of the verdict."""
    ax = _by_quantity(result, result.summary.r_hat, axes_of(ax, (7.2, 4.2)))
    _limits(ax, R_HAT)
    ax.set(ylabel="R-hat")
    return finish(ax, "agreement of the chains (1 is perfect)")


def plot_effective_sizes(result: ChainConvergence, ax: Axes | None = None) -> Axes:
    """The smaller of bulk and tail effective sample size of every quantity in every module."""
    sizes = np.fmin(result.summary.ess_bulk, result.summary.ess_tail)
    ax = _by_quantity(result, sizes, axes_of(ax, (7.2, 4.2)))
    _limits(ax, ESS)
    ax.set(yscale="log", ylabel="effective sample size")
    return finish(ax, f"effective sample sizes of {result.num_chains * result.num_draws} draws")


def _by_quantity(result: ChainConvergence, values: np.ndarray, ax: Axes) -> Axes:
    count = len(result.quantities)
    for index, (name, column) in enumerate(zip(result.quantities, values.T, strict=True)):
        offset = 0.5 * (index - (count - 1) / 2) / count
        place = np.arange(len(result.modules)) + offset
        ax.scatter(place, column, s=18, label=labelled(name), **point_style(index))
    label_modules(ax, result.modules)
    return ax


def _limits(ax: Axes, limits: tuple[float, float]) -> None:
    for limit, style in zip(limits, ("--", ":"), strict=True):
        ax.axhline(limit, color="black", linewidth=0.9, linestyle=style)
        ax.annotate(f"{limit:g}", (1, limit), xycoords=("axes fraction", "data"), fontsize=7, va="center")


def _of(result: ChainConvergence, module: str, quantity: str) -> np.ndarray:
    if module not in result.modules or quantity not in result.quantities:
        raise ValueError(
            f"`plot_chain_traces({module!r}, {quantity!r})`: no such draws. Modules: {', '.join(result.modules[:3])}, "
            f"...; quantities: {', '.join(result.quantities)}."
        )
    values: np.ndarray = result.values[..., result.modules.index(module), result.quantities.index(quantity)]
    return values

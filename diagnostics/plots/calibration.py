"""Figures of calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes

from diagnostics.plots.style import axes_of, finish, line_style
from diagnostics.predictions.reliability import Reliability
from diagnostics.predictions.selective import RiskCoverage
from diagnostics.predictions.shift import Corrupted

__all__ = ["plot_corruptions", "plot_reliability", "plot_risk_coverage"]


def plot_reliability(result: Reliability, name: str = "", ax: Axes | None = None) -> Axes:
    """Reliability diagram: accuracy over confidence with its bootstrap band, and how many examples each bin has.

    Hollow points have too few examples for their band to be trusted. The gray bars below are the bins' shares of the
    examples, on the same axis.

    Args:
        result: Of ``reliability``.
        name: What made the predictions; for the title.
        ax: Where to draw.

    Returns:
        The axes.

    Example:
        ``plot_reliability(reliability(probabilities, labels, seed=0), "merge")``
    """
    ax = axes_of(ax, (4.4, 4.4))
    edges = result.edges.numpy()
    shares = result.counts.double().numpy() / float(result.counts.sum())
    ax.bar(edges[:-1], shares, np.diff(edges), align="edge", color="#dddddd", label="share of examples")
    ax.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle="--", label="calibrated")
    filled = result.counts.numpy() > 0
    x, y, low, high, trusted = (
        each.numpy()[filled] for each in (result.confidence, result.accuracy, result.low, result.high, result.trusted)
    )
    reach = np.clip(np.stack([y - low, high - y]), 0, None)
    ax.errorbar(x, y, yerr=reach, color="#0072B2", linewidth=1.2, label=f"accuracy, {result.level:.0%} band")
    for kept, face in ((trusted, "#0072B2"), (~trusted, "white")):
        ax.plot(x[kept], y[kept], "o", color="#0072B2", markerfacecolor=face, markersize=4.5)
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy", aspect="equal")
    return finish(ax, f"reliability{f' of {name}' if name else ''}", columns=2)


def plot_risk_coverage(curves: Mapping[str, RiskCoverage], ax: Axes | None = None) -> Axes:
    """Risk over the share of examples that are kept, of several methods, each with its bootstrap band.

    Args:
        curves: Name of the method to what ``risk_coverage`` gave.
        ax: Where to draw.

    Returns:
        The axes.

    Example:
        ``plot_risk_coverage({"merge": risk_coverage(confidence, wrong, seed=0)})``
    """
    ax = axes_of(ax)
    for index, (name, curve) in enumerate(curves.items()):
        style = line_style(index, marker=False)
        ax.plot(curve.coverage, curve.risk, linewidth=1.5, label=f"{name} (AURC {curve.aurc.value:.3f})", **style)
        ax.fill_between(curve.coverage, curve.low, curve.high, color=style["color"], alpha=0.12, linewidth=0)
    ax.set(xlim=(0, 1), xlabel="coverage: share of examples that are answered", ylabel="risk among them")
    ax.set_ylim(bottom=0)
    return finish(ax, "selective prediction", columns=2)


def plot_corruptions(
    results: Mapping[str, Sequence[Corrupted]],
    score: Literal["accuracy", "nll", "brier", "ece"] = "ece",
    ax: Axes | None = None,
) -> Axes:
    """A score over the severity of corruption, the mean over kinds; bars reach from the mildest to the worst kind.

    Args:
        results: Name of the method to what ``under_corruption`` gave.
        score: Which.
        ax: Where to draw.

    Returns:
        The axes.

    Example:
        ``plot_corruptions({"merge": under_corruption(predict, images, labels, seed=0)}, "accuracy")``
    """
    ax = axes_of(ax, (5.0, 4.0))
    severities = sorted({each.severity for found in results.values() for each in found})
    for index, (name, found) in enumerate(results.items()):
        values = [[each.calibration.scores[score].value for each in found if each.severity == s] for s in severities]
        means = np.array([np.mean(kinds) for kinds in values])
        reach = np.abs(np.array([[min(kinds), max(kinds)] for kinds in values]).T - means)
        places = np.arange(len(severities)) + 0.08 * (index - (len(results) - 1) / 2)
        ax.errorbar(places, means, reach, elinewidth=0.7, label=name, **line_style(index))
    ax.set_xticks(range(len(severities)), ["clean" if s == 0 else str(s) for s in severities])
    label = {"accuracy": "accuracy", "nll": "NLL, nats", "brier": "Brier score", "ece": "ECE"}[score]
    ax.set(xlabel="severity of the corruption", ylabel=label)
    return finish(ax, f"{label} under corruption")

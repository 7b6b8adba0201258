"""Figures of predictions: calibration, selective prediction, corruption, and methods compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes

from diagnostics.plots.style import COLORS, axes_of, finish, labelled, line_style, point_style
from diagnostics.predictions.comparison import Comparison
from diagnostics.predictions.reliability import Reliability
from diagnostics.predictions.selective import RiskCoverage
from diagnostics.predictions.shift import Corrupted


def plot_reliability(result: Reliability, name: str = "", ax: Axes | None = None) -> Axes:
    """Reliability diagram: accuracy over confidence with its bootstrap band, and how many examples each bin has.

    Hollow points have too few examples for their band to be trusted. The gray bars below are the bins' shares of the
    examples, on the same axis.
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
    """Risk over the share of examples that are kept, of several methods, each with its bootstrap band."""
    ax = axes_of(ax)
    for index, (name, curve) in enumerate(curves.items()):
        style = line_style(index, marker=False)
        ax.plot(
            curve.coverage, curve.risk, linewidth=1.5, label=labelled(f"{name} (AURC {curve.aurc.value:.3f})"), **style
        )
        ax.fill_between(curve.coverage, curve.low, curve.high, color=style["color"], alpha=0.12, linewidth=0)
    ax.set(xlim=(0, 1), xlabel="coverage: share of examples that are answered", ylabel="risk among them")
    ax.set_ylim(bottom=0)
    return finish(ax, "selective prediction", columns=2)


def plot_corruptions(
    results: Mapping[str, Sequence[Corrupted]],
    score: Literal["accuracy", "nll", "brier", "ece"] = "ece",
    ax: Axes | None = None,
) -> Axes:
    """A score over the severity of corruption, the mean over kinds; bars reach from the mildest to the worst kind."""
    ax = axes_of(ax, (5.0, 4.0))
    severities = sorted({each.severity for found in results.values() for each in found})
    for index, (name, found) in enumerate(results.items()):
        values = [[each.calibration.scores[score].value for each in found if each.severity == s] for s in severities]
        means = np.array([np.mean(kinds) for kinds in values])
        reach = np.abs(np.array([[min(kinds), max(kinds)] for kinds in values]).T - means)
        places = np.arange(len(severities)) + 0.08 * (index - (len(results) - 1) / 2)
        ax.errorbar(places, means, reach, elinewidth=0.7, label=labelled(name), **line_style(index))
    ax.set_xticks(range(len(severities)), ["clean" if s == 0 else str(s) for s in severities])
    label = {"accuracy": "accuracy", "nll": "NLL, nats", "brier": "Brier score", "ece": "ECE"}[score]
    ax.set(xlabel="severity of the corruption", ylabel=label)
    return finish(ax, f"{label} under corruption")


def plot_radar(result: Comparison, methods: Sequence[str] | None = None, ax: Axes | None = None) -> Axes:
    """One spoke for each task and one line for each method, as [BMM] shows accuracies by task.

    Accuracies are over those of the tasks' own experts, where the comparison has them. The first seven methods are
    drawn by default, on polar axes.

    Raises:
        ValueError: If there are fewer than three tasks, or the axes are not polar.
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
        ax.plot(around, np.append(values, values[0]), linewidth=1.5, label=labelled(name), **line_style(index))
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
        result: The comparison.
        series: Label to the methods that are joined by a line, in order; by default every method is a point of its own.
        ax: Axes to draw into.
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
        ax.errorbar(
            x, y, np.maximum(reach[1], 0), np.maximum(reach[0], 0), elinewidth=0.6, label=labelled(label), **style
        )
    front = sorted((result.mean(m).value, result.mean(m, "ece").value) for m in result.on_front())
    ax.step(*zip(*front, strict=True), where="pre", color="black", linewidth=0.8, zorder=0, label="Pareto front")
    ax.set(xlabel="mean accuracy (higher is better)", ylabel="mean ECE (lower is better)")
    return finish(ax, "accuracy and calibration", columns=3)

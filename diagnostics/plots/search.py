"""Figure of searches: the best score so far along their trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from diagnostics.plots.style import axes_of, finish, labelled, line_style
from inference.search import SearchResult


def plot_search(results: Mapping[str, SearchResult | Sequence[SearchResult]], ax: Axes | None = None) -> Axes:
    """Best score so far after each trial, one line for each search ([BMM] Figure 3).

    Args:
        results: Label to a search, or to the searches of several seeds, whose mean is the line and whose range the
            band. Searches of other samplers, of other shares of the validation data, or of other design spaces.
        ax: Axes to draw into.

    Raises:
        ValueError: If there is no search, or some maximise and some minimise their score.
    """
    lines = {label: [each] if isinstance(each, SearchResult) else list(each) for label, each in results.items()}
    directions = {found.minimize for searches in lines.values() for found in searches}
    if len(directions) != 1:
        raise ValueError(
            f"`plot_search(...)`: {sum(map(len, lines.values()))} searches, of {len(directions)} directions. Give one "
            "or more that all maximise, or all minimise, their score."
        )
    ax = axes_of(ax)
    for index, (label, searches) in enumerate(lines.items()):
        fewest = min(len(found.trials) for found in searches)
        best = np.stack([_best_so_far(found)[:fewest] for found in searches])
        trials = np.arange(1, fewest + 1)
        style = line_style(index, marker=False)
        ax.plot(trials, best.mean(0), label=labelled(label), linewidth=1.4, **style)
        if len(searches) > 1:
            ax.fill_between(trials, best.min(0), best.max(0), color=style["color"], alpha=0.15, linewidth=0)
    ax.set(xlabel="trials", ylabel="best score so far")
    return finish(ax, "searches")


def _best_so_far(found: SearchResult) -> np.ndarray:
    """Best score after each trial, ``(trials,)``; nan before the first that did not fail."""
    worst = np.inf if found.minimize else -np.inf
    scores = np.array([trial.score if not np.isnan(trial.score) else worst for trial in found.trials])
    best = (np.minimum if found.minimize else np.maximum).accumulate(scores)
    return np.where(np.isfinite(best), best, np.nan)

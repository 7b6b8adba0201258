"""The table of a set-up: scores measured here, and below each what was published."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.papers.published import BASE, OWN, published
from benchmarks.papers.setups import SETUPS, Setup
from diagnostics.predictions.model_scores import ModelScores

MAIN = ("exact_match", "accuracy", "spearman")
"""The score of a task is the first of these that it has."""


@dataclass(frozen=True)
class Measured:
    """Scores of a table.

    Args:
        setup: The table.
        scores: Of base and merges, with the tasks' own experts.
        configurations: Merge to its settings.
        about: How it was run, one sentence each.
    """

    setup: Setup
    scores: ModelScores
    configurations: Mapping[str, Mapping[str, Any]]
    about: Sequence[str] = ()

    def score(self, model: str, task: str) -> float:
        """Score of a model, or of the tasks' own experts, on a task, in percent."""
        metric = next(metric for metric in MAIN if (task, metric) in self.scores.values)
        if model == OWN:
            return 100 * float(self.scores.experts[task, metric][0])
        return 100 * self.scores.score(model, metric, task).value

    def mean(self, model: str) -> float:
        """Mean score over the tasks, in percent."""
        return sum(self.score(model, task) for task in self.setup.tasks) / len(self.setup.tasks)

    def normalised(self, model: str) -> float:
        """Mean over the tasks of the score divided by that of the task's own expert, in percent; NaN if one has 0."""
        pairs = [(self.score(model, task), self.score(OWN, task)) for task in self.setup.tasks]
        return 100 * sum(one / own if own else math.nan for one, own in pairs) / len(pairs)


def page(measured: Measured) -> str:
    """The table as Markdown, in percent; a published cell is empty where its number was not at hand."""
    setup, tasks = measured.setup, measured.setup.tasks
    lines = [f"# {setup.name}: {setup.about}", "", *measured.about, ""]
    lines += table(("method", "source", *tasks, "mean", "normalised", "NLL", "ECE"), _rows(measured))
    lines += ["", "Settings, as `poe-merge merge` takes them:", ""]
    lines += [f"- {name}: `{json.dumps(each)}`" for name, each in measured.configurations.items()]
    return "\n".join(lines) + "\n"


def _rows(measured: Measured) -> list[tuple[str, ...]]:
    rows = []
    for model in (BASE, OWN, *(name for name in measured.scores.models if name != BASE)):
        found = [_shown(measured.score(model, task)) for task in measured.setup.tasks]
        calibration = [_mean_of(measured.scores, model, metric) for metric in ("nll", "ece")]
        ends = _shown(measured.mean(model)), _shown(measured.normalised(model))
        rows += [(model, "here", *found, *ends, *calibration), *_published(measured.setup, model)]
    others = [name for name in ("BMM, best",) if published(measured.setup.name, name)]
    return rows + [row for name in others for row in _published(measured.setup, name)]


def _shown(percent: float) -> str:
    return "undefined" if math.isnan(percent) else f"{percent:.1f}"


def _published(setup: Setup, model: str) -> list[tuple[str, ...]]:
    found = []
    for row in published(setup.name, model):
        cells = [f"{row.scores[task]:.1f}" if task in row.scores else "" for task in setup.tasks]
        mean = "" if row.mean is None or setup.tasks != SETUPS[setup.name].tasks else f"{row.mean:.1f}"
        found.append((model, row.source, *cells, mean, "", "", ""))
    return found or [(model, "published", *[""] * (len(setup.tasks) + 4))]


def _mean_of(scores: ModelScores, model: str, metric: str) -> str:
    cells = [cell for cell in scores.values if cell[1] == metric]
    if not cells:
        return ""
    if model == OWN:
        return f"{sum(float(scores.experts[cell][0]) for cell in cells) / len(cells):.3f}"
    return f"{scores.score(model, metric).value:.3f}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table in Markdown, of which the first two columns are names.

    Args:
        heads: Of the columns.
        rows: Cells.

    >>> table(("task", "metric", "base"), [("gsm8k", "acc", ".5")])[1]
    '| --- | --- | ---: |'
    """
    bar = ["---", "---", *["---:"] * (len(heads) - 2)]
    return [f"| {' | '.join(cells)} |" for cells in (heads, bar, *rows)]

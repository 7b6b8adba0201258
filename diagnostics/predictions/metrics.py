r"""Metrics of a model on a task, as statistics of weighted examples, of a few numbers kept for each example or token.

Of class predictions four numbers are kept for each row that counts, whatever the size of the vocabulary; rows are
examples, or the tokens of examples. Resamples are of examples, whose tokens stay together.

>>> rows = class_rows_kept(torch.tensor([[0.9, 0.1], [0.4, 0.6]], dtype=torch.float64).log(), torch.tensor([0, 0]))
>>> kept = Kept.of_classes(rows, torch.tensor([0, 1]))
>>> METRICS["accuracy"].statistic(kept)(torch.tensor([[1.0, 1.0], [2.0, 0.0]], dtype=torch.float64))
tensor([0.5000, 1.0000], dtype=torch.float64)
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diagnostics.estimates import Interval, Statistic
from diagnostics.predictions.binning import Binning
from inference.scores import ECE_BINS, brier_each, equal_width_bins, nll_each, top_label

__all__ = ["METRICS", "Kept", "Metric", "class_rows_kept", "metrics_named"]

Kind = Literal["classes", "values"]
COLUMNS = ("nll", "brier", "confidence", "right")
"""Numbers that are kept of a row of class probabilities."""


def class_rows_kept(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """``COLUMNS`` of rows of class predictions, ``(n, 4)``, of log probabilities ``(n, classes)`` and ``(n,)``."""
    probabilities = log_probabilities.double().exp()
    confidence, right = top_label(probabilities, labels)
    return torch.stack([nll_each(log_probabilities, labels), brier_each(probabilities, labels), confidence, right], 1)


@dataclass(frozen=True, eq=False)
class Kept:
    """Numbers for each example or token of a model's predictions on a task with ``n`` examples.

    Attributes:
        rows: ``(r, 4)`` by ``COLUMNS``, or ``(n, 2)`` predicted and true values.
        examples: ``(r,)`` int64, the example of each row, 0 to ``n - 1``.
        size: Number of examples ``n``.
    """

    rows: Tensor
    examples: Tensor
    size: int

    @classmethod
    def of_logits(cls, logits: Tensor, labels: Tensor) -> Kept:
        """Numbers of one prediction for each example, of logits ``(n, classes)`` and ``(n,)``."""
        rows = class_rows_kept(logits.double().log_softmax(1), labels).cpu()
        return cls(rows, torch.arange(len(labels)), len(labels))

    @classmethod
    def of_classes(cls, rows: Tensor, examples: Tensor) -> Kept:
        """Rows of ``class_rows_kept``; examples without a row that counts are left out."""
        used, places = examples.unique(return_inverse=True)
        return cls(rows, places, len(used))

    def column(self, name: str) -> Tensor:
        """One of ``COLUMNS``, ``(r,)``."""
        return self.rows[:, COLUMNS.index(name)]


@dataclass(frozen=True)
class Metric:
    """A score of a model on a task.

    Attributes:
        name: Its name.
        statistic: Makes of what is kept a function of weights ``(batch, n)`` of examples to values ``(batch,)``.
        kind: Whether it is about class predictions or real values.
        higher: Whether higher is better.
        bounds: Its range.
        interval: The kind of its bootstrap interval.
    """

    name: str
    statistic: Callable[[Kept], Statistic]
    kind: Kind = "classes"
    higher: bool = False
    bounds: tuple[float, float] = (0.0, math.inf)
    interval: Interval = "percentile"

    def value(self, kept: Kept) -> float:
        """The score itself, every example counted once."""
        return float(self.statistic(kept)(torch.ones(1, kept.size, dtype=torch.float64)))


def _row_mean(column: str) -> Callable[[Kept], Statistic]:
    """Mean over the rows of all examples."""

    def statistic(kept: Kept) -> Statistic:
        sums, counts = kept.rows.new_zeros(2, kept.size)
        sums.index_add_(0, kept.examples, kept.column(column))
        counts.index_add_(0, kept.examples, torch.ones_like(kept.column(column)))
        return lambda weights: weights @ sums / (weights @ counts)

    return statistic


def _perplexity(kept: Kept) -> Statistic:
    nll = _row_mean("nll")(kept)
    return lambda weights: nll(weights).exp()


def _exact_match(kept: Kept) -> Statistic:
    """Share of examples of which every row is right."""
    right = kept.rows.new_ones(kept.size).scatter_reduce_(0, kept.examples, kept.column("right"), "amin")
    return lambda weights: weights @ right / weights.sum(1)


def _ece(kept: Kept) -> Statistic:
    confidence = kept.column("confidence")
    gap = (kept.column("right") - confidence).unsqueeze(1)
    binning = Binning(equal_width_bins(confidence).unsqueeze(1), ECE_BINS, kept.examples, kept.size)
    return lambda weights: binning.sums(gap, weights).abs().sum(1) / binning.counts(weights).sum(1)


def _spearman(kept: Kept) -> Statistic:
    predicted, true = kept.rows.unbind(1)

    def statistic(weights: Tensor) -> Tensor:
        one, two = (_midranks(values, weights) for values in (predicted, true))
        total = weights.sum(1, keepdim=True)
        one, two = (ranks - (weights * ranks).sum(1, keepdim=True) / total for ranks in (one, two))
        products = [(weights * a * b).sum(1) for a, b in ((one, two), (one, one), (two, two))]
        return products[0] / (products[1] * products[2]).sqrt()

    return statistic


def _midranks(values: Tensor, weights: Tensor) -> Tensor:
    """Ranks ``(batch, n)`` of values ``(n,)`` among as many copies as the weights say; ties share their mean rank."""
    groups = values.unique(return_inverse=True)[1]
    inside = weights.new_zeros(len(weights), int(groups.max()) + 1).index_add_(1, groups, weights)
    return (inside.cumsum(1) - inside / 2 + 0.5)[:, groups]


_SHARE = (0.0, 1.0)
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", _row_mean("right"), higher=True, bounds=_SHARE),
        Metric("exact_match", _exact_match, higher=True, bounds=_SHARE),
        Metric("nll", _row_mean("nll")),
        Metric("perplexity", _perplexity, bounds=(1.0, math.inf)),
        Metric("brier", _row_mean("brier"), bounds=(0.0, 2.0)),
        Metric("ece", _ece, bounds=_SHARE, interval="normal"),
        Metric("spearman", _spearman, kind="values", higher=True, bounds=(-1.0, 1.0)),
    )
}
"""By name. ``accuracy``, ``nll`` (nats), ``brier`` and ``ece`` as in :mod:`inference.scores`, means over rows;
``perplexity``, the exponential of the mean NLL of a token; ``exact_match``, the share of examples of which every token
that counts has the largest probability given the true ones before it: those that greedy decoding gets right as a whole;
``spearman``, the rank correlation of predicted and true values."""


def metrics_named(names: Sequence[str], called: str) -> tuple[Metric, ...]:
    """Metrics by name, of one kind.

    Raises:
        ValueError: If a name is unknown, there is none, or class predictions are mixed with values.

    >>> [metric.name for metric in metrics_named(["nll"], "evaluate")]
    ['nll']
    """
    for name in names:
        if name not in METRICS:
            near = difflib.get_close_matches(name.lower().replace("-", "_"), METRICS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"`{called}(metrics=...)`: unknown metric {name!r}; {hint}Known: {', '.join(METRICS)}.")
    found = tuple(METRICS[name] for name in dict.fromkeys(names))
    if len({metric.kind for metric in found}) != 1:
        raise ValueError(
            f"`{called}(metrics=...)`: {', '.join(names) or 'none'}: give metrics of class predictions or of values, "
            "one at least; a task may have its own, `Task(metrics=...)`."
        )
    return found

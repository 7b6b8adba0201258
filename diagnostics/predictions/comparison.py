r"""Methods compared over tasks and seeds, on the same resampled examples.

Tasks are taken as given: intervals say how the numbers would move with other test examples and, where several seeds are
given, with other seeds, and not with other tasks.

The interval to read depends on how a pair came to be looked at. One pair, named before its scores were seen or chosen
on other data such as validation: ``Comparison.difference``. Several such pairs, of which some stand out by chance:
``Comparison.differences``. The winner and the others, where these scores made it the winner:
``Comparison.against_best``.

>>> labels = {"digits": torch.tensor([0, 1] * 20), "letters": torch.tensor([0, 0, 1, 0] * 10)}
>>> sure = {task: torch.nn.functional.one_hot(y, 2) * 0.8 + 0.1 for task, y in labels.items()}
>>> guess = {task: torch.full((len(y), 2), 0.5) for task, y in labels.items()}
>>> found = compare_methods({"average": guess, "product": sure}, labels, seed=0)
>>> print(found.mean("average"), "|", found.worst("average"), "|", found.rank("product"))
0.625 [0.525, 0.725] | 0.500 [0.339, 0.661] | 1 [1, 1]
>>> found.front()
{'average': 0.059, 'product': 1.0}
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diagnostics.estimates import Estimate, Interval, estimate_of, interval_columns, interval_ends, resamples
from diagnostics.predictions.agreement import hypervolume, pareto_front
from diagnostics.predictions.binning import Binning, check_bins
from diagnostics.predictions.inputs import Array, Labelled, labelled
from inference.scores import ECE_BINS, brier_each, equal_width_bins, nll_each, top_label
from poe_models.printing import Brief

if TYPE_CHECKING:
    import pandas as pd


BySeed = Array | Sequence[Array]
"""Probabilities ``(n, classes)``, or one such table for each seed."""
SCORES = ("accuracy", "nll", "brier", "ece")
FEWEST_SEEDS = 5


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Brief):
    """Scores of M methods on K tasks with B resamples, from which every comparison is made.

    Attributes:
        methods: Names.
        tasks: Names.
        values: Score -> ``(M, K)``, means over seeds.
        replicates: Score -> ``(B, M, K)``; the same resamples for all methods.
        experts: Accuracy of each task's own expert, ``(K,)``, or None.
        expert_replicates: The same in resamples, ``(B, K)``, or None.
        confidence: Level of the intervals.
        warnings: Sources of variation that the intervals leave out.
    """

    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    values: dict[str, Tensor]
    replicates: dict[str, Tensor]
    experts: Tensor | None
    expert_replicates: Tensor | None
    confidence: float
    warnings: tuple[str, ...]

    def mean(self, method: str, score: str = "accuracy") -> Estimate:
        """Mean over tasks of one of ``SCORES``."""
        value, replicates = self._of(method, score)
        return self._estimate(value.mean(), replicates.mean(1), score)

    def on_task(self, method: str, task: str, score: str = "accuracy") -> Estimate:
        """One of ``SCORES`` on one task."""
        value, replicates = self._of(method, score)
        place = _place(task, self.tasks, "task")
        return self._estimate(value[place], replicates[:, place], score)

    def worst_task(self, method: str) -> str:
        """The task with the lowest accuracy."""
        return self.tasks[int(self._of(method, "accuracy")[0].argmin())]

    def worst(self, method: str) -> Estimate:
        """Accuracy on the worst task, which may be another one in each resample."""
        value, replicates = self._of(method, "accuracy")
        return self._estimate(value.min(), replicates.amin(1), "accuracy", "normal")

    def normalised(self, method: str) -> Estimate:
        """Mean over tasks of the accuracy divided by that of the task's own expert, on the same examples.

        Raises:
            ValueError: If no experts were given.
        """
        if self.experts is None or self.expert_replicates is None:
            raise ValueError(
                "`Comparison.normalised(...)`: no experts to divide by. Give `compare_methods(experts=...)`."
            )
        value, replicates = self._of(method, "accuracy")
        shares = (replicates / self.expert_replicates).mean(1)
        return self._estimate((value / self.experts).mean(), shares, "accuracy", bounded=False)

    def rank(self, method: str, score: str = "accuracy") -> Estimate:
        """Mean over tasks of the rank among the methods: 1 is best, ties share the mean of their ranks."""
        place = _place(method, self.methods, "method")
        _place(score, SCORES, "score")
        sign = -1.0 if score == "accuracy" else 1.0
        everything = torch.cat([self.values[score].unsqueeze(0), self.replicates[score]]) * sign
        own = everything[:, place : place + 1]
        ranks = (everything < own).sum(1) + ((everything == own).sum(1) + 1) / 2
        return estimate_of(float(ranks[0].mean()), ranks[1:].mean(1), self.confidence)

    def difference(self, first: str, second: str, score: str = "accuracy") -> Estimate:
        """Mean over tasks of the first method's score less the second's, paired over examples and seeds.

        The interval is for one pair that was named without looking at these scores.
        """
        (one, ones), (two, twos) = (self._of(method, score) for method in (first, second))
        return self._estimate((one - two).mean(), (ones - twos).mean(1), score, bounded=False)

    def differences(self, pairs: Sequence[tuple[str, str]], score: str = "accuracy") -> dict[tuple[str, str], Estimate]:
        r"""Differences of several pairs by intervals that hold for all of them together.

        With the level's probability *every* interval covers, so that each claim may be made whatever the others show.
        They are ``value -+ c error`` with one ``c``: the level's quantile over resamples of the largest
        ``|difference - mean| / error`` among the pairs, which uses how the pairs move together (Romano and Wolf, 2005,
        Econometrica 73(4)). The pairs must not have been picked by these scores: for the winner see ``against_best``.

        Args:
            pairs: Names of two methods each; of one against all others, these are the comparisons of Dunnett (1955).
            score: One of ``SCORES``.

        Returns:
            By pair the mean over tasks of the first method's score less the second's.
        """
        names = {name: self._of(name, score) for pair in pairs for name in pair}
        value = torch.stack([(names[one][0] - names[two][0]).mean() for one, two in pairs])
        moved = torch.stack([(names[one][1] - names[two][1]).mean(1) for one, two in pairs], 1)
        error = moved.std(0)
        reach = error * _largest(moved, error).quantile(self.confidence)
        ends = zip(value.tolist(), (value - reach).tolist(), (value + reach).tolist(), error.tolist(), strict=True)
        return {pair: Estimate(*each, self.confidence) for pair, each in zip(pairs, ends, strict=True)}

    def best(self, score: str = "accuracy") -> str:
        """The method with the best mean over tasks: the highest accuracy, or the lowest of another score."""
        means = torch.stack([self._of(method, score)[0].mean() for method in self.methods])
        return self.methods[int(means.argmax() if score == "accuracy" else means.argmin())]

    def of(self, methods: Sequence[str]) -> Comparison:
        """The comparison of some of the methods, on the same resamples: a smaller family."""
        places = [_place(method, self.methods, "method") for method in methods]
        values = {score: rows[places] for score, rows in self.values.items()}
        replicates = {score: rows[:, places] for score, rows in self.replicates.items()}
        return replace(self, methods=tuple(methods), values=values, replicates=replicates)

    def against_best(self, score: str = "accuracy") -> dict[str, Estimate]:
        r"""The winner's score less each other method's, where these same scores made it the winner.

        Of ten equal methods the winner "beats" some other by 95 % intervals of single pairs in more than half of all
        data sets. Any pair might have been the one, so these intervals hold for all pairs of methods together (Tukey's
        comparisons, by resamples as in ``differences``). They say *which methods the winner beats*; "multiple
        comparisons with the best" (Hsu, 1984, Annals of Statistics 12(3)) say *which may be the best*: of equal methods
        they rule some out too often.

        Returns:
            By the name of the other method; empty if there is none.
        """
        winner = self.best(score)
        others = [method for method in self.methods if method != winner]
        if not others:
            return {}
        rest = [(one, two) for i, one in enumerate(others) for two in others[i + 1 :]]
        found = self.differences([*((winner, other) for other in others), *rest], score)
        return {other: found[winner, other] for other in others}

    def front(self, score: str = "ece") -> dict[str, float]:
        """Share of resamples in which each method is on the Pareto front of mean accuracy and another score."""
        _place(score, SCORES, "score")
        shares = pareto_front(self.replicates["accuracy"].mean(2), self.replicates[score].mean(2)).double().mean(0)
        return dict(zip(self.methods, shares.tolist(), strict=True))

    def on_front(self, score: str = "ece") -> tuple[str, ...]:
        """Methods on the Pareto front of the data as they are."""
        _place(score, SCORES, "score")
        best = pareto_front(self.values["accuracy"].mean(1), self.values[score].mean(1))
        return tuple(method for method, on in zip(self.methods, best.tolist(), strict=True) if on)

    def hypervolume(self, series: Sequence[Sequence[str]], reference: tuple[float, float]) -> list[Estimate]:
        """Area that each series of methods dominates in mean accuracy and mean ECE, and of each the first's less it.

        Args:
            series: Names of methods, such as draws at several temperatures, then noise of the same sizes.
            reference: Accuracy and ECE that are the worst to count, such as those of the point they surround.

        Returns:
            The area of the first series, then the first's less each other's, paired over examples and seeds.
        """
        places = [[_place(name, self.methods, "method") for name in names] for names in series]
        every = {s: torch.cat([self.values[s].unsqueeze(0), self.replicates[s]]).mean(2) for s in ("accuracy", "ece")}
        first, *others = (hypervolume(every["accuracy"][:, p], every["ece"][:, p], reference) for p in places)
        return [estimate_of(float(a[0]), a[1:], self.confidence) for a in (first, *(first - other for other in others))]

    def summary(self, method: str) -> dict[str, Estimate]:
        """Estimates of one method over all tasks; ``normalised`` is there if there are experts.

        Returns:
            ``accuracy``, ``worst``, ``normalised``, ``nll``, ``brier``, ``ece`` and ``rank``.
        """
        normalised = {} if self.experts is None else {"normalised": self.normalised(method)}
        others = {score: self.mean(method, score) for score in ("nll", "brier", "ece")}
        accuracies = {"accuracy": self.mean(method), "worst": self.worst(method)}
        return {**accuracies, **normalised, **others, "rank": self.rank(method)}

    def to_dataframe(self) -> pd.DataFrame:
        """One row per method: its summary with ends of intervals, its worst task, and its share of the Pareto front."""
        import pandas as pd

        front = self.front()
        rows = [
            {**interval_columns(self.summary(name)), "worst_task": self.worst_task(name), "front": front[name]}
            for name in self.methods
        ]
        return pd.DataFrame(rows, pd.Index(self.methods, name="method"))

    def _of(self, method: str, score: str) -> tuple[Tensor, Tensor]:
        """``(K,)`` and ``(B, K)``."""
        place = _place(method, self.methods, "method")
        _place(score, SCORES, "score")
        return self.values[score][place], self.replicates[score][:, place]

    def _estimate(
        self, value: Tensor, replicates: Tensor, score: str, interval: Interval = "percentile", bounded: bool = True
    ) -> Estimate:
        """ECE has a normal interval, and with accuracy is between 0 and 1."""
        interval = "normal" if score == "ece" else interval
        inside = (0.0, 1.0) if score in ("accuracy", "ece") and bounded else (-torch.inf, torch.inf)
        return estimate_of(float(value), replicates, self.confidence, interval=interval, bounds=inside)


def compare_methods(
    predictions: Mapping[str, Mapping[str, BySeed]],
    labels: Mapping[str, Array],
    *,
    seed: int,
    experts: Mapping[str, BySeed] | None = None,
    bins: int = ECE_BINS,
    num_resamples: int = 1000,
    confidence: float = 0.95,
) -> Comparison:
    """Score all methods on all tasks, on the same resamples of examples and seeds.

    Args:
        predictions: Method -> task -> probabilities ``(n, classes)``, or a list of these, one for each seed. Seeds at
            the same place belong together in all tasks and in all methods that have as many.
        labels: Task -> ``(n,)`` integers.
        seed: Seed of the resamples.
        experts: Task -> probabilities of the task's own expert, or a list by seed.
        bins: Number of bins of the calibration error.
        num_resamples: Number of resamples.
        confidence: Level of the intervals.

    Raises:
        ValueError: If there is no method or no task, tasks or numbers of seeds differ, tables are no probabilities, or
            the level is none.
    """
    check_bins(bins, "compare_methods")
    interval_ends(confidence, "compare_methods")
    if not predictions or not labels:
        raise ValueError(
            f"`compare_methods(...)`: {len(predictions)} methods and {len(labels)} tasks. Give one of both at least."
        )
    everything = [*predictions.items(), *([] if experts is None else [("own experts", experts)])]
    tables = [_tables(method, by_task, labels) for method, by_task in everything]
    seeds = [len(next(iter(by_task.values()))) for by_task in tables]
    mixing = [torch.cat(list(_weights(count, num_resamples, seed))) / count for count in seeds]
    by_task = []
    for number, task in enumerate(labels):
        columns = _Columns([pair for tasks in tables for pair in tasks[task]], bins)
        weights = _weights(len(labels[task]), num_resamples, seed + 1 + number)
        by_task.append(columns.over_seeds(weights, mixing))
    found = {score: torch.stack([each[score] for each in by_task], -1) for score in SCORES}
    methods = len(predictions)
    own = None if experts is None else found["accuracy"][:, methods]
    return Comparison(
        tuple(predictions),
        tuple(labels),
        {score: rows[0, :methods] for score, rows in found.items()},
        {score: rows[1:, :methods] for score, rows in found.items()},
        None if own is None else own[0],
        None if own is None else own[1:],
        confidence,
        _doubts(max(seeds[:methods]), min(len(each) for each in labels.values())),
    )


class _Columns:
    """Predictions of all methods and seeds on one task, scored at once."""

    def __init__(self, pairs: Sequence[Labelled], bins: int) -> None:
        tops = [top_label(pair.probabilities, pair.labels) for pair in pairs]
        confidence, right = (torch.stack(each, 1).cpu() for each in zip(*tops, strict=True))
        self._means = {
            "accuracy": right,
            "nll": torch.stack([nll_each(pair.probabilities.log(), pair.labels).cpu() for pair in pairs], 1),
            "brier": torch.stack([brier_each(pair.probabilities, pair.labels).cpu() for pair in pairs], 1),
        }
        self._gap, self._bins = right - confidence, bins
        self._binning = Binning.of(equal_width_bins(confidence, bins), bins)

    def scores(self, weights: Tensor) -> dict[str, Tensor]:
        """Score -> ``(batch, columns)`` for weights ``(batch, n)``."""
        size = weights.shape[1]
        found = {score: weights @ each / size for score, each in self._means.items()}
        gaps = self._binning.sums(self._gap, weights).abs().unflatten(1, (-1, self._bins))
        return found | {"ece": gaps.sum(2) / size}

    def over_seeds(self, weights: Iterable[Tensor], mixing: Sequence[Tensor]) -> dict[str, Tensor]:
        """Score -> ``(B, methods)``: weighted means over the seeds of each method, weights ``(B, seeds)``."""
        batches = [self.scores(each) for each in weights]
        counts = [each.shape[1] for each in mixing]
        found = {}
        for score in SCORES:
            parts = torch.cat([batch[score] for batch in batches]).split(counts, 1)
            found[score] = torch.stack([(own * mix).sum(1) for own, mix in zip(parts, mixing, strict=True)], 1)
        return found


def _largest(moved: Tensor, error: Tensor) -> Tensor:
    """In each resample the largest deviation ``(B,)``, in units of its error, of differences ``(B, pairs)``.

    Pairs that never move, such as a method with itself, have no deviation.
    """
    return torch.where(error > 0, (moved - moved.mean(0)).abs() / error, 0.0).amax(1)


def _weights(size: int, num_resamples: int, seed: int) -> Iterator[Tensor]:
    """The data as they are, then their resamples.

    Yields:
        ``(batch, size)``; the first has one row of ones.
    """
    yield torch.ones(1, size, dtype=torch.float64)
    yield from resamples(size, num_resamples, seed=seed)


def _tables(method: str, by_task: Mapping[str, BySeed], labels: Mapping[str, Array]) -> dict[str, list[Labelled]]:
    """Checked predictions of one method by task, in the order of the labels."""
    if set(by_task) != set(labels):
        raise ValueError(
            f"`compare_methods(...)`: {method} has tasks {', '.join(by_task)}; labels are of {', '.join(labels)}. Give "
            "every method the same tasks."
        )
    found = {}
    for task, own in labels.items():
        given = by_task[task]
        every = list(given) if isinstance(given, Sequence) else [given]
        found[task] = [labelled(table, own, f"compare_methods: {method}, {task}") for table in every]
    counts = {task: len(every) for task, every in found.items()}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        raise ValueError(
            f"`compare_methods(...)`: {method} has {counts} seeds. Give the same number for every task, at least one."
        )
    return found


def _doubts(seeds: int, smallest: int) -> tuple[str, ...]:
    doubts = []
    if seeds == 1:
        doubts.append("one seed: intervals are over test examples only")
    elif seeds < FEWEST_SEEDS:
        doubts.append(f"{seeds} seeds: intervals are too narrow over seeds")
    if smallest < 20:
        doubts.append(f"a task with {smallest} examples")
    return tuple(doubts)


def _place(name: str, names: Sequence[str], what: str) -> int:
    if name not in names:
        raise ValueError(f"`Comparison`: no {what} {name!r}. Give one of {', '.join(names)}.")
    return names.index(name)

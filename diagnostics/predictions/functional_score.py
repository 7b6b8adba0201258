"""The functional score: how far a merge's predictions are from each task's own expert's, without labels.

The mean ``KL(p_i || p_Z)`` on inputs of task ``i`` judges any merge: a folder, a state dict, an ensemble. On inputs
that a fit has seen it is too low, as a training loss is; give held-out ones.

>>> own = {"task": torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)}
>>> merges = {"near": own, "far": {"task": torch.full((2, 2), 0.5, dtype=torch.float64)}}
>>> score = functional_score(merges, own, seed=0)
>>> score.ranking
('near', 'far')
>>> round(score.mean("far").value, 4)
0.2804
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diagnostics.estimates import Estimate, estimate_of, interval_columns, resamples
from diagnostics.predictions.inputs import Array, checked_probabilities
from poe_models.printing import Brief

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class FunctionalScore(Brief):
    """Mean divergences of M merges from the experts on K tasks in nats, with B resamples of the inputs.

    Attributes:
        merges: Names, in the order in which they were given.
        tasks: Names.
        values: ``(M, K)``.
        replicates: ``(B, M, K)``; the same resamples for all merges.
        confidence: Level of the intervals.
    """

    merges: tuple[str, ...]
    tasks: tuple[str, ...]
    values: Tensor
    replicates: Tensor
    confidence: float

    def mean(self, merge: str) -> Estimate:
        """Mean over tasks, in nats per input; lower is better."""
        place = self._place(merge)
        return self._estimate(self.values[place].mean(), self.replicates[:, place].mean(1))

    def on_task(self, merge: str, task: str) -> Estimate:
        """Mean on one task, in nats per input."""
        place, column = self._place(merge), self.tasks.index(task)
        return self._estimate(self.values[place, column], self.replicates[:, place, column])

    def difference(self, first: str, second: str) -> Estimate:
        """Mean over tasks of the first merge's score less the second's, paired over inputs."""
        one, two = self._place(first), self._place(second)
        replicates = self.replicates[:, one] - self.replicates[:, two]
        return self._estimate((self.values[one] - self.values[two]).mean(), replicates.mean(1))

    @property
    def ranking(self) -> tuple[str, ...]:
        """Names of the merges, the nearest to the experts first."""
        order = torch.argsort(self.values.mean(1), stable=True).tolist()
        return tuple(self.merges[place] for place in order)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per merge with its mean and the ends of the interval."""
        import pandas as pd

        rows = [interval_columns({"kl": self.mean(merge)}) for merge in self.merges]
        return pd.DataFrame(rows, pd.Index(self.merges, name="merge"))

    def _place(self, merge: str) -> int:
        if merge not in self.merges:
            raise ValueError(f"`FunctionalScore`: no merge {merge!r} among {', '.join(self.merges)}.")
        return self.merges.index(merge)

    def _estimate(self, value: Tensor, replicates: Tensor) -> Estimate:
        return estimate_of(float(value), replicates, self.confidence)


def functional_score(
    predictions: Mapping[str, Mapping[str, Array]],
    experts: Mapping[str, Array],
    *,
    seed: int,
    logits: bool = False,
    num_resamples: int = 1000,
    confidence: float = 0.95,
) -> FunctionalScore:
    """Judge merges by the mean Kullback-Leibler divergence from each task's own expert, without labels.

    Args:
        predictions: Merge to task to its class probabilities ``(n, classes)``; of an ensemble the members' mean.
        experts: Task to the probabilities ``(n, classes)`` of its own expert on the same inputs.
        seed: Of the bootstrap over inputs.
        logits: The tables are logits or log probabilities, which keep what float32 probabilities round to zero.
        num_resamples: Number of resamples.
        confidence: Level of the intervals.

    Raises:
        ValueError: If there is no merge or no task, tasks or shapes differ, or tables are no probabilities.
    """
    if not predictions or not experts:
        raise ValueError(
            f"`functional_score(...)`: {len(predictions)} merges and {len(experts)} tasks. Give one of both at least."
        )
    values, replicates = [], []
    for number, (task, own) in enumerate(experts.items()):
        target = _log_probabilities(own, f"functional_score: own expert, {task}", logits)
        costs = torch.stack([_divergences(name, given, task, target, logits) for name, given in predictions.items()])
        weights = torch.cat(list(resamples(len(target), num_resamples, seed=seed + number)))
        values.append(costs.mean(1))
        replicates.append(_means(weights, costs))
    return FunctionalScore(
        tuple(predictions), tuple(experts), torch.stack(values, 1), torch.stack(replicates, 2), confidence
    )


def _divergences(merge: str, given: Mapping[str, Array], task: str, target: Tensor, logits: bool) -> Tensor:
    """``KL(p_i || p_Z)`` of each input, ``(n,)``; infinite where a merge excludes what the expert holds possible."""
    if task not in given:
        raise ValueError(f"`functional_score(...)`: {merge!r} has no predictions on {task!r}. Give all tasks.")
    table = _log_probabilities(given[task], f"functional_score: {merge}, {task}", logits)
    if table.shape != target.shape:
        raise ValueError(
            f"`functional_score(...)`: {merge!r} has a table {tuple(table.shape)} on {task!r}, the expert "
            f"{tuple(target.shape)}. Give predictions on the same inputs by the same head."
        )
    return torch.where(target.isneginf(), 0.0, target.exp() * (target - table)).sum(1)


def _log_probabilities(table: Array, called: str, logits: bool) -> Tensor:
    """Log probabilities ``(n, classes)`` float64, on the CPU, of logits or of probabilities."""
    if not logits:
        return checked_probabilities(table, called).cpu().log()
    values = torch.as_tensor(table).detach().cpu().double()
    if values.ndim != 2 or not bool((values < torch.inf).all()):
        raise ValueError(f"`{called}`: expected logits (n, classes) without NaN or +inf, got {tuple(values.shape)}.")
    return values.log_softmax(1)


def _means(weights: Tensor, costs: Tensor) -> Tensor:
    """Weighted means ``(B, M)`` of costs ``(M, n)``; infinite where a cost that counts is."""
    infinite = costs.isinf()
    found = weights @ torch.where(infinite, 0.0, costs).T / costs.shape[1]
    return torch.where(weights @ infinite.double().T > 0, torch.inf, found)

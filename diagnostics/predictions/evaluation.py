"""Evaluation of the predictions of several methods on several tasks: calibration, selective prediction, comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diagnostics.estimates import interval_columns, z_of
from diagnostics.predictions.calibration import Calibration, calibration
from diagnostics.predictions.comparison import Comparison, compare_methods
from diagnostics.predictions.files import Predictions
from diagnostics.predictions.reliability import Reliability, reliability
from diagnostics.predictions.selective import RiskCoverage, risk_coverage
from diagnostics.verdicts import Level, Verdict
from inference.scores import top_label
from poe_models.printing import Brief

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["OWN_EXPERTS", "Evaluation", "evaluate_predictions"]

OWN_EXPERTS = "own experts"
"""Name of the method that gives each task the predictions of its own fine-tune."""
SHOWN = ("accuracy", "nll", "brier", "ece", "ece_if_calibrated")
"""Scores whose warnings become verdicts."""
OFF = 0.02
"""Gap between mean confidence and accuracy from which a method is called too sure or not sure enough."""


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation(Brief):
    """Calibration of every method on every task, and the comparison of the methods.

    Attributes:
        tasks: Names of the tasks.
        calibrations: Method, then task, to its scores.
        reliability: Method to the diagram of all tasks' examples together.
        selective: Method to the risk (error rate) over coverage, ranked by the largest probability, of all tasks'
            examples together.
        comparison: Comparison of all methods, over the tasks' own experts where ``OWN_EXPERTS`` is among the methods.
    """

    tasks: tuple[str, ...]
    calibrations: Mapping[str, Mapping[str, Calibration]]
    reliability: Mapping[str, Reliability]
    selective: Mapping[str, RiskCoverage]
    comparison: Comparison

    def to_dataframe(self) -> pd.DataFrame:
        """One row per method and task, with every score and the ends of its interval."""
        import pandas as pd

        rows = [
            {"method": method, "task": task, "examples": found.num_examples} | interval_columns(found.scores)
            for method, by_task in self.calibrations.items()
            for task, found in by_task.items()
        ]
        return pd.DataFrame(rows)

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """Methods grouped by how their confidence is off, then every reason not to trust the numbers."""
        groups: dict[tuple[Level, str], list[str]] = {}
        for method in self.calibrations:
            groups.setdefault(self._kind(method), []).append(self._described(method))
        calibrated = [Verdict("calibration", level, f"{kind}: {'; '.join(m)}.") for (level, kind), m in groups.items()]
        return (*calibrated, *self._doubts())

    @property
    def winner(self) -> Verdict:
        """The method of the largest mean accuracy, and the methods that cannot be told from it.

        These examples made it the winner, so that the intervals of its lead hold for all pairs of methods together.
        """
        found = self.comparison
        best, gaps = found.best(), found.against_best()
        tied = [method for method, gap in gaps.items() if not gap.low > 0]
        text = f"{best} has the largest mean accuracy, {found.mean(best)}"
        how = f"paired over examples, for all pairs of the {len(found.methods)} methods together"
        if tied:
            text += f"; {how}, {', '.join(tied)} cannot be told from it"
        elif gaps:
            second, gap = min(gaps.items(), key=lambda item: item[1].value)
            text += f", {gap} above {second}, the next, {how}"
        doubts = f" ({'; '.join(found.warnings)})" if found.warnings else ""
        return Verdict("comparison", Level.NOTE, f"{text}{doubts}.")

    def _kind(self, method: str) -> tuple[Level, str]:
        """Calibrated, too sure or not sure enough: ECE against its distribution if calibrated, all tasks together.

        Task by task, one of many would be called off by chance.
        """
        found = self.calibrations[method].values()
        excess = sum(each.ece.value - each.ece_if_calibrated.value for each in found)
        if excess <= z_of(0.95) * math.sqrt(sum(each.ece_if_calibrated.error**2 for each in found)):
            return Level.GOOD, "no more ECE than calibrated predictions as sure as these would show"
        gap = self._gap(method)
        lean = (
            "too sure" if gap > OFF else "not sure enough" if gap < -OFF else "too sure here and not sure enough there"
        )
        return Level.CAUTION, f"{lean} (scale the logits on validation data, or predict with an ensemble)"

    def _described(self, method: str) -> str:
        found = self.calibrations[method].values()
        mean = sum(each.ece.value for each in found) / len(found)
        return f"{method} (mean ECE {mean:.3f}, confidence less accuracy {self._gap(method):+.3f})"

    def _gap(self, method: str) -> float:
        """Mean confidence less accuracy over all examples."""
        curve = self.reliability[method]
        weight = curve.counts.double() / curve.counts.sum()
        return float((weight * (curve.confidence - curve.accuracy)).nansum())

    def _doubts(self) -> list[Verdict]:
        whose: dict[str, list[str]] = {}
        for method, by_task in self.calibrations.items():
            for task, found in by_task.items():
                warnings = [*found.warnings, *(text for name in SHOWN for text in found.scores[name].warnings)]
                for warning in dict.fromkeys(warnings):
                    whose.setdefault(f"{task}: {warning}", []).append(method)
        named = {
            doubt: "" if len(methods) == len(self.calibrations) else f" ({', '.join(methods)})"
            for doubt, methods in whose.items()
        }
        return [Verdict("predictions", Level.CAUTION, f"not to be trusted: {d}{named[d]}.") for d in sorted(named)]


def evaluate_predictions(predictions: Predictions, *, seed: int, num_resamples: int = 1000) -> Evaluation:
    """Score the predictions of all methods, with bootstrap intervals.

    Args:
        predictions: Predictions of all methods; accuracies are divided by those of ``OWN_EXPERTS`` if they are there.
        seed: Seed of the resamples.
        num_resamples: Number of resamples.

    >>> from diagnostics.predictions.files import predictions_of
    >>> table = torch.tensor([[0.75, 0.25]] * 40)
    >>> found = evaluate_predictions(predictions_of({"coin": [0, 0, 0, 1] * 10}, {"fair": {"coin": table}}), seed=0)
    >>> found.verdicts[0].level.name
    'GOOD'
    """
    labels = predictions.labels
    calibrations = {
        method: {
            task: calibration(by_task[task], labels[task], seed=seed, num_resamples=num_resamples) for task in labels
        }
        for method, by_task in predictions.probabilities.items()
    }
    merges = {method: by_task for method, by_task in predictions.probabilities.items() if method != OWN_EXPERTS}
    experts = predictions.probabilities.get(OWN_EXPERTS)
    pooled = {method: _pooled(by_task, labels) for method, by_task in predictions.probabilities.items()}
    return Evaluation(
        predictions.tasks,
        calibrations,
        {method: reliability(*pair, seed=seed, num_resamples=num_resamples) for method, pair in pooled.items()},
        {method: _selective(*pair, seed, num_resamples) for method, pair in pooled.items()},
        compare_methods(
            merges or predictions.probabilities, labels, seed=seed, experts=experts, num_resamples=num_resamples
        ),
    )


def _pooled(by_task: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """All tasks one after another, classes that a task does not have filled up with zeros."""
    classes = max(table.shape[1] for table in by_task.values())
    tables = [torch.nn.functional.pad(by_task[task], (0, classes - by_task[task].shape[1])) for task in labels]
    return torch.cat(tables), torch.cat(list(labels.values()))


def _selective(probabilities: Tensor, labels: Tensor, seed: int, num_resamples: int) -> RiskCoverage:
    confidence, right = top_label(probabilities, labels)
    return risk_coverage(confidence, 1 - right, seed=seed, num_resamples=num_resamples)

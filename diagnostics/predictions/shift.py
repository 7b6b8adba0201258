r"""Predictions under shift: corrupted images, and inputs of another task that a model should not be sure of.

>>> inside, outside = torch.arange(40.0), torch.arange(20.0, 60.0)
>>> print(auroc(inside, outside, seed=0))
0.875 [0.794, 0.933]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import override

from diagnostics.estimates import FEWEST, Estimate, Scores, Statistic, bootstrap, interval_columns
from diagnostics.predictions.binning import Binning
from diagnostics.predictions.calibration import Calibration, calibration
from diagnostics.predictions.corruptions import CORRUPTIONS, SEVERITIES, Corruption, corrupt
from diagnostics.predictions.inputs import Array, checked_probabilities
from inference.models.ensemble import Prediction

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Corrupted:
    """Scores on one kind of corrupted images.

    Attributes:
        kind: Kind of corruption; "clean" for none.
        severity: 1 to 3; 0 for none.
        calibration: All scores.
    """

    kind: str
    severity: int
    calibration: Calibration


class CorruptionScores(tuple[Corrupted, ...]):
    """Scores on clean images, then on corrupted ones by kind and severity."""

    __slots__ = ()

    def to_dataframe(self) -> pd.DataFrame:
        """One row per kind and severity, with every score and the ends of its interval."""
        import pandas as pd

        rows = [{"kind": r.kind, "severity": r.severity} | interval_columns(r.calibration.scores) for r in self]
        return pd.DataFrame(rows)


@dataclass(frozen=True)
class ShiftDetection(Scores):
    """Areas under the ROC curve of uncertainty as a detector of another task's inputs: 0.5 is chance, 1 is always.

    Attributes:
        entropy: AUROC of the entropy of the (mean) probabilities.
        mutual_information: AUROC of the disagreement between members; 0.5 for a single model, which has none.
    """

    entropy: Estimate
    mutual_information: Estimate


@dataclass(frozen=True)
class ShiftComparison(Scores):
    """MAP against ensemble on the same inputs; differences are paired, and above 0 where the ensemble is better.

    Attributes:
        point: Detection by the MAP.
        ensemble: Detection by the ensemble.
        entropy_gain: AUROC of the ensemble's entropy less that of the MAP's.
        mutual_information_gain: AUROC of the ensemble's mutual information less that of the MAP's entropy.
    """

    point: ShiftDetection
    ensemble: ShiftDetection
    entropy_gain: Estimate
    mutual_information_gain: Estimate

    @property
    @override
    def scores(self) -> dict[str, Estimate]:
        """The MAP's entropy, then each score of the ensemble with its gain over that."""
        return {
            "point_entropy": self.point.entropy,
            "ensemble_entropy": self.ensemble.entropy,
            "entropy_gain": self.entropy_gain,
            "ensemble_mutual_information": self.ensemble.mutual_information,
            "mutual_information_gain": self.mutual_information_gain,
        }


def point_prediction(probabilities: Array) -> Prediction:
    """A single model's probabilities ``(n, classes)`` as a prediction: its own entropy, and no disagreement.

    >>> point_prediction(torch.tensor([[1.0, 0.0]])).entropy
    tensor([0.], dtype=torch.float64)
    """
    table = checked_probabilities(probabilities, "point_prediction")
    return Prediction(table, torch.special.entr(table).sum(1), table.new_zeros(len(table)), 1, None)


def auroc(inside: Array, outside: Array, *, seed: int, num_resamples: int = 1000, confidence: float = 0.95) -> Estimate:
    """Probability that a score outside is larger than one inside, ties half: the area under the ROC curve.

    Args:
        inside: ``(n,)`` scores of the model's own inputs.
        outside: ``(m,)`` scores of other inputs.
        seed: Seed of the resamples; both samples keep their sizes.
        num_resamples: Number of resamples.
        confidence: Level of the interval.

    Raises:
        ValueError: If a sample is empty or has NaN.
    """
    ranks = _Ranks(inside, outside, "auroc")
    return ranks.estimate(ranks.area, _resampled(seed, num_resamples, confidence))


def detect_shift(
    inside: Prediction, outside: Prediction, *, seed: int, num_resamples: int = 1000, confidence: float = 0.95
) -> ShiftDetection:
    """Measure how well a model's uncertainty finds inputs of another task.

    Args:
        inside: Prediction for the model's own inputs; ``point_prediction`` makes one of a single model.
        outside: Prediction for other inputs.
        seed: Seed of the resamples.
        num_resamples: Number of resamples.
        confidence: Level of the intervals.

    Raises:
        ValueError: If a prediction is empty or has NaN.

    >>> shares = torch.linspace(0.0, 0.4, 41).unsqueeze(1)
    >>> own, other = (point_prediction(torch.cat([1 - p, p], 1)) for p in (shares, 0.1 + shares))
    >>> print(detect_shift(own, other, seed=0).entropy)
    0.714 [0.592, 0.817]
    """
    entropy, disagreement = _ranks(inside, outside, "detect_shift")
    resampled = _resampled(seed, num_resamples, confidence)
    return ShiftDetection(
        entropy.estimate(entropy.area, resampled),
        disagreement.estimate(disagreement.area, resampled, _doubts(inside, outside)),
    )


def compare_detection(
    point: tuple[Prediction, Prediction],
    ensemble: tuple[Prediction, Prediction],
    *,
    seed: int,
    num_resamples: int = 1000,
    confidence: float = 0.95,
) -> ShiftComparison:
    """Compare how well the MAP and an ensemble find another task's inputs.

    Args:
        point: The MAP's predictions for its own inputs and for others, by ``point_prediction``.
        ensemble: The ensemble's predictions for the same inputs in the same order.
        seed: Seed of the resamples.
        num_resamples: Number of resamples.
        confidence: Level of the intervals.

    Returns:
        Both, and their paired differences.

    Raises:
        ValueError: If the inputs are not the same in number, or predictions are empty or have NaN.

    >>> shares = torch.linspace(0.0, 0.4, 41).unsqueeze(1)
    >>> point = [point_prediction(torch.cat([1 - p, p], 1)) for p in (shares, 0.1 + shares)]
    >>> disagreement = [torch.zeros(41, dtype=torch.float64), 0.2 * torch.ones(41, dtype=torch.float64)]
    >>> ensemble = [Prediction(p.probabilities, p.entropy, m, 5, None) for p, m in zip(point, disagreement)]
    >>> found = compare_detection(tuple(point), tuple(ensemble), seed=0)
    >>> found.entropy_gain.value, found.mutual_information_gain.low > 0
    (0.0, True)
    """
    sizes = [[len(each.entropy) for each in pair] for pair in (point, ensemble)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"`compare_detection(...)`: the MAP saw {sizes[0]} examples and the ensemble {sizes[1]}. Give both the "
            "same inputs."
        )
    before, _ = _ranks(*point, "compare_detection")
    entropy, disagreement = _ranks(*ensemble, "compare_detection")
    resampled = _resampled(seed, num_resamples, confidence)
    return ShiftComparison(
        detect_shift(*point, seed=seed, num_resamples=num_resamples, confidence=confidence),
        detect_shift(*ensemble, seed=seed, num_resamples=num_resamples, confidence=confidence),
        before.estimate(lambda w: entropy.area(w) - before.area(w), resampled),
        before.estimate(lambda w: disagreement.area(w) - before.area(w), resampled, _doubts(*ensemble)),
    )


def under_corruption(
    predict: Callable[[Tensor], Array],
    images: Tensor,
    labels: Array,
    *,
    seed: int,
    kinds: Sequence[Corruption] = CORRUPTIONS,
    severities: Sequence[int] = SEVERITIES,
    num_resamples: int = 1000,
    confidence: float = 0.95,
) -> CorruptionScores:
    """Scores on clean images and on every kind of corrupted ones.

    Args:
        predict: Maps images ``(n, channels, height, width)`` uint8 to probabilities ``(n, classes)``.
        images: The clean images.
        labels: ``(n,)`` integers.
        seed: Seed of noise and resamples; the same for every kind, so that two models see the same images.
        kinds: Kinds of corruption.
        severities: Some of 1, 2, 3.
        num_resamples: Number of resamples.
        confidence: Level of the intervals.

    Returns:
        The clean scores first, then by kind and severity.

    >>> images = torch.arange(32, dtype=torch.uint8).view(32, 1, 1, 1).expand(-1, 1, 4, 4)
    >>> found = under_corruption(lambda x: torch.full((len(x), 2), 0.5), images, torch.arange(32) % 2, seed=0,
    ...     kinds=["contrast"])
    >>> [(each.kind, each.severity) for each in found]
    [('clean', 0), ('contrast', 1), ('contrast', 2), ('contrast', 3)]
    """

    def scored(kind: str, severity: int, shown: Tensor) -> Corrupted:
        found = calibration(predict(shown), labels, seed=seed, num_resamples=num_resamples, confidence=confidence)
        return Corrupted(kind, severity, found)

    rows = [scored("clean", 0, images)]
    for kind in kinds:
        rows += [scored(kind, severity, corrupt(images, kind, severity, seed=seed)) for severity in severities]
    return CorruptionScores(rows)


def _resampled(seed: int, num_resamples: int, confidence: float) -> partial[Estimate]:
    return partial(bootstrap, seed=seed, num_resamples=num_resamples, confidence=confidence)


def _doubts(inside: Prediction, outside: Prediction) -> tuple[str, ...]:
    """Reasons why mutual information may say nothing."""
    single = min(inside.num_members, outside.num_members) < 2
    return ("one member has no mutual information",) if single else ()


class _Ranks:
    """Area under the ROC curve for weights ``(batch, n + m)`` of the examples inside, then outside."""

    def __init__(self, inside: Array, outside: Array, called: str) -> None:
        low, high = (torch.as_tensor(each).detach().double().cpu() for each in (inside, outside))
        shaped = low.ndim == high.ndim == 1 and min(len(low), len(high)) >= 1
        if not shaped or bool(torch.cat([low, high]).isnan().any()):
            raise ValueError(
                f"`{called}(...)`: scores {tuple(low.shape)} inside and {tuple(high.shape)} outside. Give (n,) and "
                "(m,) with one score each at least, and without NaN."
            )
        groups = torch.cat([low, high]).unique(return_inverse=True)[1]
        self._binning = Binning.of(groups, int(groups.max()) + 1)
        self._outside = torch.cat([torch.zeros_like(low), torch.ones_like(high)]).unsqueeze(1)
        self._sizes = len(low), len(high)

    def area(self, weights: Tensor) -> Tensor:
        """``sum_g outside_g (inside below g + inside_g / 2) / (n m)``."""
        outside = self._binning.sums(self._outside, weights)
        inside = self._binning.counts(weights) - outside
        return (outside * (inside.cumsum(1) - inside / 2)).sum(1) / (self._sizes[0] * self._sizes[1])

    def estimate(self, of: Statistic, resampled: partial[Estimate], warnings: tuple[str, ...] = ()) -> Estimate:
        few, total = min(self._sizes), sum(self._sizes)
        doubts = list(warnings)
        if float(self.area(torch.ones(1, total, dtype=torch.float64))) in (0.0, 1.0):
            doubts.append("samples do not overlap: resamples cannot differ")
        if few < FEWEST <= total:
            doubts.append(f"only {few} examples on one side")
        return resampled(of, total, strata=self._outside[:, 0].long(), warnings=doubts)


def _ranks(inside: Prediction, outside: Prediction, called: str) -> tuple[_Ranks, _Ranks]:
    """Ranks by entropy and by mutual information."""
    return (
        _Ranks(inside.entropy, outside.entropy, called),
        _Ranks(inside.mutual_information, outside.mutual_information, called),
    )

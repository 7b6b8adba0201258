r"""Selective prediction: the risk-coverage curve of a model that answers only the examples it is surest of.

>>> score = torch.tensor([0.9, 0.8, 0.7, 0.6] * 10)
>>> wrong = torch.tensor([0, 0, 1, 0] * 10)
>>> curve = risk_coverage(score, wrong, seed=0)
>>> curve.coverage.tolist(), [round(risk, 3) for risk in curve.risk.tolist()]
([0.25, 0.5, 0.75, 1.0], [0.0, 0.0, 0.333, 0.25])
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diagnostics.estimates import Estimate, bootstrap, interval_ends, resamples, weighted_mean
from diagnostics.predictions.binning import Binning
from diagnostics.predictions.inputs import Array
from poe_models.printing import Brief

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class RiskCoverage(Brief):
    """Risk among the examples that are kept, for every threshold on the score.

    Attributes:
        thresholds: Distinct scores, highest first, ``(m,)``; examples of at least this score are kept.
        coverage: Share of examples that are kept, ``(m,)``, ascending to 1.
        risk: Mean loss of these, ``(m,)``.
        low: Lower end of the bootstrap band of the risk at these thresholds, ``(m,)``; point by point.
        high: Upper end.
        aurc: Area under the curve, the mean over examples of the risk at their own score (Geifman and El-Yaniv, 2017,
            arXiv 1705.08500; Geifman et al., 2019, arXiv 1805.08206).
        aurc_of_chance: Area under the curve of scores that say nothing, the risk of all examples.
        aurc_of_perfect: Area under the curve of scores that sort by the loss.
        confidence: Level of the band and the intervals.
    """

    thresholds: Tensor
    coverage: Tensor
    risk: Tensor
    low: Tensor
    high: Tensor
    aurc: Estimate
    aurc_of_chance: Estimate
    aurc_of_perfect: Estimate
    confidence: float

    def to_dataframe(self) -> pd.DataFrame:
        """One row per threshold: threshold, coverage, risk and the ends of its band."""
        import pandas as pd

        columns = {"threshold": self.thresholds, "coverage": self.coverage, "risk": self.risk}
        columns |= {"low": self.low, "high": self.high}
        return pd.DataFrame({name: column.numpy() for name, column in columns.items()})


def risk_coverage(
    score: Array,
    loss: Array,
    *,
    seed: int,
    points: int = 500,
    num_resamples: int = 1000,
    confidence: float = 0.95,
) -> RiskCoverage:
    """The risk-coverage curve with its area; examples of equal score are kept or left together.

    Args:
        score: ``(n,)`` confidence in each example, for instance the largest probability or minus the entropy.
        loss: ``(n,)``, not negative: 1 where the prediction is wrong, or any other loss.
        seed: Seed of the resamples.
        points: Largest number of points of the curve; of more distinct scores some are left out. The areas are of all.
        num_resamples: Number of resamples.
        confidence: Level of band and intervals.

    Raises:
        ValueError: If the two do not fit or have NaN, there is no point, or the level is none.
    """
    sure, wrong = _checked(score, loss, "risk_coverage")
    if points < 1:
        raise ValueError(f"`risk_coverage(points={points})`: give at least one point; 500 are enough for a figure.")
    ends = interval_ends(confidence, "risk_coverage")
    ranked, optimal = _Ranked(sure, wrong), _Ranked(-wrong, wrong)
    thresholds = sure.unique().flip(0)
    ones = torch.ones(1, len(sure), dtype=torch.float64)
    chosen = torch.linspace(len(thresholds) - 1, 0, min(points, len(thresholds))).long().flip(0)
    kept, lost = (each[0, chosen] for each in ranked.cumulative(ones))
    curves = []
    for weights in resamples(len(sure), num_resamples, seed=seed):
        count, total = ranked.cumulative(weights)
        curves.append(total[:, chosen] / count[:, chosen])
    low, high = torch.cat(curves).nanquantile(ends, dim=0)
    resampled = partial(bootstrap, size=len(sure), seed=seed, num_resamples=num_resamples, confidence=confidence)
    aurc, chance, perfect = map(resampled, (ranked.area, weighted_mean(wrong), optimal.area_one_by_one))
    return RiskCoverage(thresholds[chosen], kept / len(sure), lost / kept, low, high, aurc, chance, perfect, confidence)


class _Ranked:
    """Losses in groups of equal score, surest first, for weights ``(batch, n)``."""

    def __init__(self, score: Tensor, loss: Tensor) -> None:
        self.size = len(score)
        groups = (-score).unique(return_inverse=True)[1]
        self._binning = Binning.of(groups, int(groups.max()) + 1)
        self._loss = loss.unsqueeze(1)

    def cumulative(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Number and summed loss of the examples down to each group, ``(batch, groups)``."""
        return self._binning.counts(weights).cumsum(1), self._binning.sums(self._loss, weights).cumsum(1)

    def area(self, weights: Tensor) -> Tensor:
        """``sum_g n_g risk_g / n``."""
        count, total = self.cumulative(weights)
        own = self._binning.counts(weights)
        return (own * total / count.clamp_min(1)).sum(1) / self.size

    def area_one_by_one(self, weights: Tensor) -> Tensor:
        """The same if examples of one group, of equal loss, are kept one after another.

        With C examples of summed loss L before a group of c examples of loss l, the j-th of them adds
        ``(L + j l) / (C + j) = l + (L - C l) / (C + j)``.
        """
        count, total = self.cumulative(weights)
        own, lost = self._binning.counts(weights), self._binning.sums(self._loss, weights)
        each = lost / own.clamp_min(1)
        before, lost_before = count - own, total - lost
        harmonic = torch.digamma(count + 1) - torch.digamma(before + 1)
        return (own * each + (lost_before - before * each) * harmonic).sum(1) / self.size


def _checked(score: Array, loss: Array, called: str) -> tuple[Tensor, Tensor]:
    sure, wrong = (torch.as_tensor(each).detach().double().cpu() for each in (score, loss))
    if sure.ndim != 1 or sure.shape != wrong.shape or len(sure) < 1:
        raise ValueError(
            f"`{called}(...)`: scores {tuple(sure.shape)} and losses {tuple(wrong.shape)}. Give (n,) of both."
        )
    if bool(sure.isnan().any()) or not bool((wrong >= 0).all()):
        raise ValueError(f"`{called}(...)`: scores or losses have NaN, or a loss is negative. Leave such examples out.")
    return sure, wrong

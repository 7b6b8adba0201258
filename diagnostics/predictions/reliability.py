r"""The reliability diagram and the decomposition of the Brier score."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diagnostics.estimates import Estimate, Scores, bootstrap, interval_ends, resamples, weighted_mean
from diagnostics.predictions.binning import Binning, check_bins, equal_mass_bins, equal_mass_edges
from diagnostics.predictions.inputs import Array, Labelled, labelled
from diagnostics.printing import Brief
from inference.scores import ECE_BINS, brier_each, equal_width_bins, top_label

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["BrierParts", "Reliability", "brier_parts", "reliability"]

FEWEST_IN_BIN = 10
"""Below so many examples the band of a bin is not to be trusted: few outcomes resample to too few values."""


@dataclass(frozen=True, eq=False, repr=False)
class Reliability(Brief):
    """A reliability diagram of the largest probability (DeGroot and Fienberg, 1983; Guo et al., 2017).

    Empty bins have a count of 0 and NaN elsewhere.

    Attributes:
        edges: Edges of the bins, ``(bins + 1,)``.
        counts: Examples in each bin, ``(bins,)`` int64.
        confidence: Mean largest probability, ``(bins,)``.
        accuracy: Share of correct predictions, ``(bins,)``.
        low: Lower end of the bootstrap band of the accuracy, ``(bins,)``; bin by bin, not for all at once.
        high: Upper end.
        level: Level of the band.
    """

    edges: Tensor
    counts: Tensor
    confidence: Tensor
    accuracy: Tensor
    low: Tensor
    high: Tensor
    level: float

    @property
    def trusted(self) -> Tensor:
        """Mask of the bins that have enough examples for their band, ``(bins,)``."""
        return self.counts >= FEWEST_IN_BIN

    def to_dataframe(self) -> pd.DataFrame:
        """One row per bin: left and right edge, count, mean confidence, accuracy and the ends of its band."""
        import pandas as pd

        names = ("confidence", "accuracy", "low", "high")
        table = {"left": self.edges[:-1], "right": self.edges[1:], "count": self.counts}
        table |= {name: getattr(self, name) for name in names}
        return pd.DataFrame({name: column.numpy() for name, column in table.items()})


@dataclass(frozen=True)
class BrierParts(Scores):
    """``brier = reliability - resolution + uncertainty + binning``, exactly; all summed over classes.

    Attributes:
        brier: Mean Brier score, 0 to 2.
        reliability: Squared gap between probability and frequency in the bins; 0 is best. Noise pushes it up.
        resolution: How far the frequencies in the bins are from those of all; larger is better. Noise pushes it up.
        uncertainty: Brier score of always predicting the frequencies.
        binning: Loss by bins of finite width: variance of the probabilities within bins less twice their covariance
            with the outcomes.
    """

    brier: Estimate
    reliability: Estimate
    resolution: Estimate
    uncertainty: Estimate
    binning: Estimate


def reliability(
    probabilities: Array,
    labels: Array,
    *,
    seed: int,
    bins: int = ECE_BINS,
    equal_mass: bool = False,
    num_resamples: int = 1000,
    confidence: float = 0.95,
) -> Reliability:
    """The reliability diagram of predictions.

    Args:
        probabilities: ``(n, classes)``.
        labels: ``(n,)`` integers.
        seed: Seed of the resamples.
        bins: Number of bins.
        equal_mass: True for bins of about as many examples each instead of equal width; ties leave some empty.
        num_resamples: Number of resamples.
        confidence: Level of the band.

    Returns:
        The diagram.

    Raises:
        ValueError: If probabilities or labels are not valid, there is no bin, or the level is none.

    >>> table = torch.tensor([[0.3, 0.7]] * 10)
    >>> diagram = reliability(table, torch.tensor([1, 1, 1, 1, 1, 0, 0, 0, 0, 0]), seed=0, bins=4)
    >>> diagram.counts.tolist(), float(diagram.accuracy[2])
    ([0, 0, 10, 0], 0.5)
    """
    pair = labelled(probabilities, labels, "reliability")
    check_bins(bins, "reliability")
    ends = interval_ends(confidence, "reliability")
    top, right = (each.cpu() for each in top_label(pair.probabilities, pair.labels))
    index = equal_mass_bins(top, bins) if equal_mass else equal_width_bins(top, bins)
    binning, stacked = Binning.of(index, bins), torch.stack([top, right]).unsqueeze(-1)
    ones = torch.ones(1, len(pair), dtype=torch.float64)
    counts = binning.counts(ones)[0]
    replicates = torch.cat(
        [binning.sums(stacked[1], w) / binning.counts(w) for w in resamples(len(pair), num_resamples, seed=seed)]
    )
    low, high = replicates.nanquantile(ends, dim=0)
    mean_top, mean_right = (binning.sums(each, ones)[0] / counts for each in stacked)
    edges = equal_mass_edges(top, bins) if equal_mass else torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    return Reliability(edges, counts.long(), mean_top, mean_right, low, high, confidence)


def brier_parts(
    probabilities: Array,
    labels: Array,
    *,
    seed: int,
    bins: int = ECE_BINS,
    num_resamples: int = 1000,
    confidence: float = 0.95,
) -> BrierParts:
    """Decomposition of the Brier score, each class's probability in bins of equal width.

    References: Murphy, *A new vector partition of the probability score*, 1973; Stephenson et al., *Two extra
    components in the Brier score decomposition*, 2008, for what is lost within bins.

    Args:
        probabilities: ``(n, classes)``.
        labels: ``(n,)`` integers.
        seed: Seed of the resamples.
        bins: Number of bins of each class.
        num_resamples: Number of resamples.
        confidence: Level of the intervals.

    Returns:
        The parts.

    Raises:
        ValueError: If probabilities or labels are not valid, or there is no bin.

    >>> print(brier_parts(torch.tensor([[0.3, 0.7]] * 20), torch.tensor([1, 0] * 10), seed=0).uncertainty)
    0.500 [0.375, 0.500]
    """
    pair = labelled(probabilities, labels, "brier_parts")
    check_bins(bins, "brier_parts")

    resampled = partial(
        bootstrap,
        size=len(pair),
        seed=seed,
        num_resamples=num_resamples,
        confidence=confidence,
        warnings=pair.warnings,
    )
    parts = _Parts(pair, bins)
    return BrierParts(
        brier=resampled(weighted_mean(parts.each), bounds=(0.0, 2.0)),
        reliability=resampled(parts.reliability, bounds=(0.0, 2.0), interval="normal"),
        resolution=resampled(parts.resolution, bounds=(0.0, 2.0), interval="normal"),
        uncertainty=resampled(parts.uncertainty, bounds=(0.0, 1.0)),
        binning=resampled(parts.binning, interval="normal"),
    )


class _Parts:
    """The parts as functions of weights ``(batch, n)`` that sum to n."""

    def __init__(self, pair: Labelled, bins: int) -> None:
        self._p = pair.probabilities.cpu()
        self._y = torch.nn.functional.one_hot(pair.labels.cpu(), self._p.shape[1]).double()
        self.each = brier_each(pair.probabilities, pair.labels).cpu()
        self._binning = Binning.of(equal_width_bins(self._p, bins), bins)

    def reliability(self, weights: Tensor) -> Tensor:
        count, p, y = self._sums(weights)
        return ((p - y).square() / count).sum(1) / len(self.each)

    def resolution(self, weights: Tensor) -> Tensor:
        count, _, y = self._sums(weights)
        return (y.square() / count).sum(1) / len(self.each) - self._frequencies(weights).square().sum(1)

    def uncertainty(self, weights: Tensor) -> Tensor:
        frequency = self._frequencies(weights)
        return (frequency * (1 - frequency)).sum(1)

    def binning(self, weights: Tensor) -> Tensor:
        """Within bins: ``sum (p - mean p)^2 - 2 sum (p - mean p)(y - mean y)``."""
        count, p, y = self._sums(weights)
        within = weights @ (self._p * (self._p - 2 * self._y)).sum(1)
        return (within - ((p - 2 * y) * p / count).sum(1)) / len(self.each)

    def _sums(self, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Count (1 in empty bins), sum of probabilities and number of outcomes of each bin."""
        count = self._binning.counts(weights).clamp_min(1)
        return count, self._binning.sums(self._p, weights), self._binning.sums(self._y, weights)

    def _frequencies(self, weights: Tensor) -> Tensor:
        return weights @ self._y / len(self.each)

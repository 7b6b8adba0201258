"""The reliability diagram: accuracy over confidence in bins, with bootstrap bands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diagnostics.estimates import interval_ends, resamples
from diagnostics.predictions.binning import Binning, check_bins, equal_mass_bins, equal_mass_edges
from diagnostics.predictions.inputs import Array, labelled
from inference.scores import ECE_BINS, equal_width_bins, top_label
from poe_models.printing import Brief

if TYPE_CHECKING:
    import pandas as pd


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

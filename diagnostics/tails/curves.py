"""Curves of tails: Hill's estimator, quantiles, log densities ([PoE] Figures 1, 5 and 6)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diagnostics.estimates import Estimate, z_of
from diagnostics.tails.families import Array
from diagnostics.tails.fits import Fit
from diagnostics.tails.samples import Values, sample_of
from poe_models.printing import Brief


@dataclass(frozen=True, eq=False, repr=False)
class Hill(Brief):
    r"""Hill's estimate of the tail index from the ``k`` largest residuals, for every ``k``.

    A plateau is a power law ``P(|x| > r) ~ r^-index``; for Student-t the index is ``nu``. A Gaussian has none: its
    estimate keeps growing as ``k`` falls.

    Attributes:
        k: Numbers of largest residuals, ``(K,)``.
        index: Estimates, ``(K,)``.
        low: Lower ends of their 95 % intervals, ``(K,)``.
        high: Upper ends, ``(K,)``.
        warnings: Reasons not to trust it; empty if there are none.
    """

    k: Array
    index: Array
    low: Array
    high: Array
    warnings: tuple[str, ...]

    def at(self, k: int) -> Estimate:
        """The index with its 95 % interval from the ``k`` largest residuals, or from as many as there are."""
        at = int(np.abs(self.k - k).argmin())
        error = float(self.index[at]) / math.sqrt(self.k[at])
        return Estimate(float(self.index[at]), float(self.low[at]), float(self.high[at]), error, warnings=self.warnings)


@dataclass(frozen=True, eq=False, repr=False)
class Quantiles(Brief):
    """Quantile-quantile data.

    Attributes:
        name: Name of the family.
        theoretical: Quantiles of the fitted family at ``(j - 1/2) / n``, ``(n,)``.
        observed: Sorted residuals, ``(n,)``.
    """

    name: str
    theoretical: Array
    observed: Array


@dataclass(frozen=True, eq=False, repr=False)
class LogDensity(Brief):
    """Log densities of a histogram and of fitted families.

    Attributes:
        centres: ``(B,)`` centres of the bins.
        observed: ``(B,)`` nats; nan where a bin is empty.
        error: ``(B,)`` standard error of a count, ``sqrt((1 - p) / count)``, nats.
        fitted: Name of each family to its log density at the centres.
        outside: Share of the residuals beyond the bins.
    """

    centres: Array
    observed: Array
    error: Array
    fitted: dict[str, Array]
    outside: float


def hill(values: Values, largest: float = 0.5) -> Hill:
    r"""Hill's estimator, ``1 / index = mean_{j<=k} log(|x|_(j) / |x|_(k+1))``, with its stability plot.

    Reference: Hill, 1975, Annals of Statistics 3(5). The interval is that of ``k`` exponential variables,
    ``index (1 ± 1.96 / sqrt(k))``; it knows nothing of the bias, which the plot shows.

    Args:
        values: Signed residuals of any shape.
        largest: Largest share of the residuals that is taken for a tail.

    Returns:
        The estimates for every ``k``.

    Raises:
        ValueError: If the share is not in (0, 1].

    >>> pareto = np.random.default_rng(0).random(4000) ** (-1 / 3.0)
    >>> print(hill(pareto).at(1000))
    2.935 [2.753, 3.116]
    """
    if not 0 < largest <= 1:
        raise ValueError(f"`hill(largest={largest})`: a share in (0, 1] is wanted, such as 0.2.")
    sample = sample_of(values)
    sizes = np.sort(np.abs(sample.scaled[sample.scaled != 0]))[::-1]
    k = np.arange(2, max(3, min(len(sizes) - 1, int(largest * len(sizes))) + 1))
    logs = np.log(sizes)
    excess = np.cumsum(logs)[k - 1] / k - logs[k]
    positive = excess > 0
    index = np.where(positive, 1 / np.where(positive, excess, 1.0), np.nan)
    half = z_of(0.95) / np.sqrt(k)
    return Hill(k.astype(np.float64), index, index * np.maximum(1 - half, 0), index * (1 + half), sample.warnings)


def quantiles(values: Values, fit: Fit) -> Quantiles:
    """Residuals of any shape against the quantiles of a fitted family: the data of a QQ plot.

    >>> from diagnostics.tails.families import GAUSSIAN
    >>> from diagnostics.tails.fits import maximum_likelihood
    >>> data = [-2.0, -1.0, 0.5, 1.0, 1.5]
    >>> quantiles(data, maximum_likelihood(data, GAUSSIAN)).theoretical.round(2)
    array([-1.67, -0.68,  0.  ,  0.68,  1.67])
    """
    observed = np.sort(sample_of(values).values)
    probabilities = (np.arange(len(observed)) + 0.5) / len(observed)
    shape = 1.0 if fit.shape is None else fit.shape
    theoretical: Array = fit.family.distribution(fit.scale, shape).ppf(probabilities)
    return Quantiles(fit.family.name, theoretical, observed)


def log_density(values: Values, fits: Sequence[Fit] = (), *, bins: int = 61, coverage: float = 0.99) -> LogDensity:
    """The residuals' histogram on a log scale, where a Gaussian is a parabola, a Laplace a tent.

    Args:
        values: Signed residuals of any shape.
        fits: Fitted families to show beside it.
        bins: Number of equally wide bins, symmetric around zero.
        coverage: Share of the residuals in the bins.

    Raises:
        ValueError: If the share is not in (0, 1], or there are no bins.

    >>> curves = log_density(np.linspace(-1.0, 1.0, 1001), bins=4, coverage=1.0)
    >>> curves.observed.round(2)
    array([-0.69, -0.69, -0.69, -0.69])
    """
    if not 0 < coverage <= 1 or bins < 1:
        raise ValueError(f"`log_density(bins={bins}, coverage={coverage})`: at least one bin, and a share in (0, 1].")
    sample = sample_of(values)
    end = float(np.quantile(np.abs(sample.values), coverage))
    edges = np.linspace(-end, end, bins + 1)
    counts = np.histogram(sample.values, edges)[0].astype(np.float64)
    total, width = len(sample.values), 2 * end / bins
    filled = np.where(counts > 0, counts, np.nan)
    centres = (edges[1:] + edges[:-1]) / 2
    return LogDensity(
        centres,
        np.log(filled / (total * width)),
        np.sqrt((1 - filled / total) / filled),
        {fit.family.name: fit.log_density(centres) for fit in fits},
        float(1 - counts.sum() / total),
    )

r"""Numbers with their uncertainty: bootstrap intervals with an explicit seed.

Resamples are counts: in a resample example ``i`` appears ``w_i`` times, ``w ~ Multinomial(n, 1 / n)``, so that a
statistic written for weights is evaluated on many resamples at once. What shares the weights is paired.

>>> right = torch.tensor([1.0, 1.0, 1.0, 0.0] * 100, dtype=torch.float64)
>>> print(bootstrap_mean(right, seed=0))
0.750 [0.708, 0.792]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor
from typing_extensions import override

__all__ = [
    "Binning",
    "Estimate",
    "bootstrap",
    "bootstrap_mean",
    "bootstrap_samples",
    "check_bins",
    "equal_mass_bins",
    "equal_mass_edges",
    "estimate_of",
    "interval_ends",
    "resamples",
]


@dataclass(frozen=True, eq=False)
class Binning:
    """Which bin each value of each example falls into.

    Attributes:
        index: ``(n, k)`` int64 on the CPU; an example may have several values, for instance one for each class.
        size: Number of bins.

    >>> binning = Binning(torch.tensor([[0], [1], [1]]), 2)
    >>> values = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    >>> binning.sums(values, torch.tensor([[1.0, 1.0, 1.0], [0.0, 3.0, 0.0]], dtype=torch.float64))
    tensor([[1., 5.],
            [0., 6.]], dtype=torch.float64)
    """

    index: Tensor
    size: int

    def sums(self, values: Tensor, weights: Tensor) -> Tensor:
        """Weighted sums of values in each bin.

        Args:
            values: ``(n, k)`` float64.
            weights: ``(batch, n)`` float64 of the examples.

        Returns:
            ``(batch, size)``.
        """
        examples, each = self.index.shape
        rows, columns = self.index.flatten().numpy(), np.repeat(np.arange(examples), each)
        table = csr_matrix((values.flatten().numpy(), (rows, columns)), shape=(self.size, examples))
        return torch.from_numpy(np.ascontiguousarray((table @ weights.numpy().T).T))

    def counts(self, weights: Tensor) -> Tensor:
        """Number of values in each bin, ``(batch, size)``."""
        return self.sums(torch.ones(self.index.shape, dtype=torch.float64), weights)

    @classmethod
    def of(cls, index: Tensor, size: int) -> Binning:
        """One value for each example, or one for each example and class with bins of its own.

        Args:
            index: ``(n,)`` bins, or ``(n, classes)`` bins of each class.
            size: Number of bins, of each class.

        Returns:
            A binning with ``size`` or ``classes * size`` bins, those of the first class first.
        """
        index = index.detach().cpu()
        if index.ndim == 1:
            return cls(index.unsqueeze(1), size)
        classes = index.shape[1]
        return cls(index + size * torch.arange(classes), classes * size)


def equal_mass_bins(values: Tensor, bins: int) -> Tensor:
    """Index of each value's bin among bins of about as many values each; equal values share a bin.

    Args:
        values: ``(n,)``.
        bins: Number of bins; ties and few values leave some empty.

    Returns:
        ``(n,)`` int64.

    >>> equal_mass_bins(torch.tensor([0.1, 0.9, 0.2, 0.9, 0.8, 0.3]), 3)
    tensor([0, 2, 0, 2, 1, 1])
    """
    return torch.searchsorted(equal_mass_edges(values, bins)[1:-1], values.contiguous(), right=True)


def equal_mass_edges(values: Tensor, bins: int) -> Tensor:
    """Edges of these bins of values ``(n,)`` between 0 and 1; ``(bins + 1,)``, the first 0 and the last 1.

    Args:
        values: ``(n,)``.
        bins: Number of bins.

    Returns:
        Ascending edges; a bin has its left edge.

    >>> equal_mass_edges(torch.tensor([0.2, 0.9, 0.5, 0.8]), 2)
    tensor([0.0000, 0.8000, 1.0000])
    """
    place = torch.arange(1, bins, device=values.device) * len(values) // bins
    return torch.cat([values.new_zeros(1), values.sort().values[place], values.new_ones(1)])


def check_bins(bins: int, called: str) -> None:
    """Refuse to have no bins.

    Args:
        bins: Number of bins.
        called: The public call, for the message.

    Raises:
        ValueError: If there is none.
    """
    if bins < 1:
        raise ValueError(f"`{called}(bins={bins})`: give at least one bin; 20 is usual.")


FEWEST = 20
"""Below so many examples bootstrap intervals are too narrow to be trusted."""
BATCH = 1 << 22
"""Entries of a batch of counts: 32 MB."""

Interval = Literal["percentile", "normal"]


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes:
        value: On the data as they are.
        low: Lower end of the interval.
        high: Upper end.
        error: Standard error.
        confidence: Level of the interval.
        warnings: Why it is not to be trusted; empty if it is.

    >>> print(Estimate(0.687, 0.661, 0.712, 0.013))
    0.687 [0.661, 0.712]
    >>> print(Estimate(2.0, 2.0, 2.0, 0.0, warnings=("one example",)))
    2 [2, 2] (not to be trusted: one example)
    """

    value: float
    low: float
    high: float
    error: float
    confidence: float = 0.95
    warnings: tuple[str, ...] = ()

    @property
    def trusted(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.warnings

    @override
    def __str__(self) -> str:
        decimals = 1 - math.floor(math.log10(self.error)) if 0 < self.error < math.inf else 99
        form = f".{max(decimals, 0)}f" if -5 <= decimals <= 6 else ".4g"
        doubt = f" (not to be trusted: {'; '.join(self.warnings)})" if self.warnings else ""
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]{doubt}"


def resamples(size: int, num_resamples: int, *, seed: int, strata: Tensor | None = None) -> Iterator[Tensor]:
    """Counts of every example in bootstrap resamples, in batches.

    Args:
        size: Number of examples n.
        num_resamples: How many resamples in all.
        seed: Of the random numbers; the same seed gives the same resamples whatever is computed on them.
        strata: ``(n,)`` integers; every stratum keeps its size. None for one stratum.

    Yields:
        ``(batch, n)`` float64; rows sum to n.

    Raises:
        ValueError: If there are no examples, no resamples, or ``strata`` has another length.

    >>> next(resamples(3, 2, seed=0)).sum(1)
    tensor([3., 3.], dtype=torch.float64)
    """
    if size < 1 or num_resamples < 2 or (strata is not None and strata.shape != (size,)):
        shape = None if strata is None else tuple(strata.shape)
        raise ValueError(
            f"`resamples({size}, {num_resamples}, strata={shape})`: give at least one example, two resamples, and "
            "one stratum for each example."
        )
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(size, dtype=torch.int64) if strata is None else strata.cpu()
    groups = [torch.nonzero(labels == label).squeeze(1) for label in labels.unique()]
    step = max(1, BATCH // size)
    for start in range(0, num_resamples, step):
        batch = min(step, num_resamples - start)
        counts = torch.zeros(batch, size, dtype=torch.float64)
        for members in groups:
            drawn = members[torch.randint(len(members), (batch, len(members)), generator=generator)]
            counts.scatter_add_(1, drawn, torch.ones((), dtype=torch.float64).expand(drawn.shape))
        yield counts


def bootstrap(
    statistic: Callable[[Tensor], Tensor],
    size: int,
    *,
    seed: int,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    strata: Tensor | None = None,
    interval: Interval = "percentile",
    bounds: tuple[float, float] = (-math.inf, math.inf),
    warnings: Sequence[str] = (),
) -> Estimate:
    """Interval of a statistic of weighted examples.

    Args:
        statistic: Maps weights ``(batch, n)`` float64 to values ``(batch,)``; weights of one are the data themselves.
        size: Number of examples n.
        seed: Of the resamples.
        num_resamples: How many.
        confidence: Level of the interval.
        strata: ``(n,)`` integers; every stratum keeps its size.
        interval: See ``estimate_of``.
        bounds: See ``estimate_of``.
        warnings: See ``estimate_of``; that there are few examples is added.

    Returns:
        The estimate.

    >>> values = torch.arange(100.0, dtype=torch.float64)
    >>> print(bootstrap(lambda w: w @ values / w.sum(1), 100, seed=0))
    49.5 [43.5, 55.3]
    """
    value = float(statistic(torch.ones(1, size, dtype=torch.float64)))
    replicates = torch.cat([statistic(w) for w in resamples(size, num_resamples, seed=seed, strata=strata)])
    doubts = [*warnings, *([f"only {size} examples"] if size < FEWEST else [])]
    return estimate_of(value, replicates, confidence, interval=interval, bounds=bounds, warnings=doubts)


def bootstrap_mean(values: Tensor, *, seed: int, num_resamples: int = 1000, confidence: float = 0.95) -> Estimate:
    """Mean of examples ``(n,)``; of the differences of two methods on the same examples it is the paired comparison."""
    values = values.detach().double().cpu()
    return bootstrap(
        lambda w: w @ values / len(values), len(values), seed=seed, num_resamples=num_resamples, confidence=confidence
    )


def bootstrap_samples(
    statistic: Callable[..., float],
    *samples: Tensor,
    seed: int,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    interval: Interval = "percentile",
) -> Estimate:
    """Interval of any function of samples; slower than ``bootstrap``, for statistics that take no weights.

    Args:
        statistic: Maps tensors like ``samples`` to a number.
        *samples: ``(n, ...)`` each; rows of the same place are drawn together.
        seed: Of the resamples.
        num_resamples: How many.
        confidence: Level of the interval.
        interval: See ``estimate_of``.

    Returns:
        The estimate.

    Raises:
        ValueError: If the samples differ in length.

    >>> print(bootstrap_samples(lambda x: float(x.median()), torch.arange(101.0), seed=0, num_resamples=200))
    50.0 [40.0, 59.0]
    """
    if not samples or len({len(sample) for sample in samples}) != 1:
        raise ValueError(
            f"`bootstrap_samples(...)`: samples have {[len(sample) for sample in samples]} rows. Give one or more "
            "samples of the same length, whose rows belong together."
        )
    size = len(samples[0])
    everything = torch.arange(size)

    def of_weights(weights: Tensor) -> Tensor:
        rows = (everything.repeat_interleave(row.long()) for row in weights)
        return torch.tensor([statistic(*(s[r] for s in samples)) for r in rows], dtype=torch.float64)

    return bootstrap(of_weights, size, seed=seed, num_resamples=num_resamples, confidence=confidence, interval=interval)


def estimate_of(
    value: float,
    replicates: Tensor,
    confidence: float = 0.95,
    *,
    interval: Interval = "percentile",
    bounds: tuple[float, float] = (-math.inf, math.inf),
    warnings: Sequence[str] = (),
) -> Estimate:
    r"""The estimate that bootstrap replicates give.

    The percentile interval is ``[Q(a/2), Q(1 - a/2)]`` of the replicates; the normal interval is ``value`` plus and
    minus ``z`` standard errors. Noise pushes statistics such as ECE to one side, and resampling adds noise to data that
    have some: their replicates lie to the side of the value, and only the normal interval covers what the statistic
    is on average over data of this size. Reference: Davison and Hinkley, *Bootstrap Methods and their Application*,
    1997, chapter 5.

    Args:
        value: The statistic of the data.
        replicates: ``(B,)`` of resamples; those that are not finite are left out with a warning.
        confidence: Level of the interval.
        interval: Which of the two.
        bounds: What the statistic can be; the interval is cut there.
        warnings: What else speaks against it.

    Returns:
        The estimate; its ends are NaN if no replicate is finite.

    Raises:
        ValueError: If the level is not between 0 and 1.

    >>> print(estimate_of(1.0, torch.tensor([1.0, 2.0, 3.0]), 0.5, interval="normal"))
    1.0 [0.3, 1.7]
    """
    ends = interval_ends(confidence, "estimate_of")
    replicates = replicates.detach().double().cpu()
    finite = replicates[replicates.isfinite()]
    doubts = list(warnings)
    if len(finite) < len(replicates):
        doubts.append(f"undefined in {len(replicates) - len(finite)} of {len(replicates)} resamples")
    if len(finite) < 2 or not math.isfinite(value):
        return Estimate(value, math.nan, math.nan, math.nan, confidence, tuple(doubts or ["undefined"]))
    error = float(finite.std())
    if interval == "normal":
        reach = NormalDist().inv_cdf((1 + confidence) / 2) * error
        low, high = (min(max(end, bounds[0]), bounds[1]) for end in (value - reach, value + reach))
    else:
        low, high = finite.quantile(ends).clamp(*bounds).tolist()
    return Estimate(value, low, high, error, confidence, tuple(doubts))


def interval_ends(confidence: float, called: str) -> Tensor:
    """Which quantiles a central interval ends at.

    Args:
        confidence: Its level.
        called: The public call, for the message.

    Returns:
        ``(2,)`` float64.

    Raises:
        ValueError: If the level is not between 0 and 1.

    >>> interval_ends(0.5, "bootstrap")
    tensor([0.2500, 0.7500], dtype=torch.float64)
    """
    if not 0 < confidence < 1:
        raise ValueError(f"`{called}(confidence={confidence})`: give a level between 0 and 1, such as 0.95.")
    return torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)

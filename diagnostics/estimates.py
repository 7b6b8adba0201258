r"""Numbers with their uncertainty: bootstrap intervals with an explicit seed, and records of such numbers.

Resamples are counts: in a resample example ``i`` appears ``w_i`` times, ``w ~ Multinomial(n, 1 / n)``, so that a
statistic written for weights is evaluated on many resamples at once. What shares the weights is paired.

>>> right = torch.tensor([1.0, 1.0, 1.0, 0.0] * 100, dtype=torch.float64)
>>> print(bootstrap(weighted_mean(right), 400, seed=0))
0.750 [0.708, 0.792]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from typing_extensions import override

if TYPE_CHECKING:
    import pandas as pd


FEWEST = 20
"""Below so many examples bootstrap intervals are too narrow to be trusted."""
BATCH = 1 << 22
"""Entries of a batch of counts: 32 MB."""

Interval = Literal["percentile", "normal"]
Statistic = Callable[[Tensor], Tensor]
"""Maps weights ``(batch, n)`` float64 of examples to values ``(batch,)``; weights of one are the data themselves."""


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes:
        value: The number, on the data as they are.
        low: Lower end of the interval.
        high: Upper end.
        error: Standard error.
        confidence: Level of the interval.
        warnings: Reasons not to trust it; empty if there are none.

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
        """Whether there are no warnings."""
        return not self.warnings

    @override
    def __str__(self) -> str:
        decimals = 1 - math.floor(math.log10(self.error)) if 0 < self.error < math.inf else 99
        form = f".{max(decimals, 0)}f" if -5 <= decimals <= 6 else ".4g"
        doubt = f" (not to be trusted: {'; '.join(self.warnings)})" if self.warnings else ""
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]{doubt}"


class Scores:
    """Base of records of estimates: by name, as a table with one row per score, and printed one per line."""

    @property
    def scores(self) -> dict[str, Estimate]:
        """The estimates by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Estimate)}

    def to_dataframe(self) -> pd.DataFrame:
        """One row per score: value, ends of the interval, standard error, and warnings."""
        import pandas as pd

        rows = [
            {"value": e.value, "low": e.low, "high": e.high, "error": e.error, "warnings": "; ".join(e.warnings)}
            for e in self.scores.values()
        ]
        return pd.DataFrame(rows, pd.Index(self.scores, name="score"))

    @override
    def __str__(self) -> str:
        return "\n".join(f"{name}: {estimate}" for name, estimate in self.scores.items())


def interval_columns(estimates: Mapping[str, Estimate]) -> dict[str, float]:
    """Values and ends of intervals as columns of one row of a table: ``name``, ``name_low`` and ``name_high``.

    >>> interval_columns({"ece": Estimate(0.1, 0.0, 0.2, 0.05)})
    {'ece': 0.1, 'ece_low': 0.0, 'ece_high': 0.2}
    """
    return {
        f"{name}{end}": number
        for name, each in estimates.items()
        for end, number in (("", each.value), ("_low", each.low), ("_high", each.high))
    }


def weighted_mean(values: Tensor) -> Statistic:
    """Mean of examples ``(n,)``; of differences of two methods on the same examples it is the paired comparison."""
    values = values.detach().double().cpu()
    return lambda weights: weights @ values / len(values)


def resamples(size: int, num_resamples: int, *, seed: int, strata: Tensor | None = None) -> Iterator[Tensor]:
    """Counts of every example in bootstrap resamples, in batches.

    Args:
        size: Number of examples n.
        num_resamples: Number of resamples.
        seed: Seed of the random numbers; the resamples do not depend on the statistic.
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
    statistic: Statistic,
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
    """Bootstrap interval of a statistic of weighted examples.

    Args:
        statistic: Maps weights ``(batch, n)`` to values ``(batch,)``.
        size: Number of examples n.
        seed: Seed of the resamples.
        num_resamples: Number of resamples.
        confidence: Level of the interval.
        strata: ``(n,)`` integers; every stratum keeps its size.
        interval: See :func:`estimate_of`.
        bounds: See :func:`estimate_of`.
        warnings: See :func:`estimate_of`; a warning about few examples is added.

    >>> values = torch.arange(100.0, dtype=torch.float64)
    >>> print(bootstrap(lambda w: w @ values / w.sum(1), 100, seed=0))
    49.5 [43.5, 55.3]
    """
    value = float(statistic(torch.ones(1, size, dtype=torch.float64)))
    replicates = torch.cat([statistic(w) for w in resamples(size, num_resamples, seed=seed, strata=strata)])
    doubts = [*warnings, *([f"only {size} examples"] if size < FEWEST else [])]
    return estimate_of(value, replicates, confidence, interval=interval, bounds=bounds, warnings=doubts)


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
    have some: their replicates lie to the side of the value, and only the normal interval covers the mean of the
    statistic over data sets of this size. Reference: Davison and Hinkley, *Bootstrap Methods and their Application*,
    1997, chapter 5.

    Args:
        value: The statistic of the data.
        replicates: ``(B,)`` of resamples; those that are not finite are left out with a warning.
        confidence: Level of the interval.
        interval: The kind of interval.
        bounds: Range of the statistic; the interval is cut there.
        warnings: Other reasons not to trust it.

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
        reach = z_of(confidence) * error
        low, high = (min(max(end, bounds[0]), bounds[1]) for end in (value - reach, value + reach))
    else:
        low, high = finite.quantile(ends).clamp(*bounds).tolist()
    return Estimate(value, low, high, error, confidence, tuple(doubts))


def z_of(confidence: float) -> float:
    """Standard errors on either side of a normal interval of this level.

    >>> round(z_of(0.95), 3)
    1.96
    """
    return NormalDist().inv_cdf((1 + confidence) / 2)


def interval_ends(confidence: float, called: str) -> Tensor:
    """Probabilities ``(2,)`` of the quantiles at the ends of a central interval.

    Raises:
        ValueError: If the level is not between 0 and 1.

    >>> interval_ends(0.5, "bootstrap")
    tensor([0.2500, 0.7500], dtype=torch.float64)
    """
    if not 0 < confidence < 1:
        raise ValueError(f"`{called}(confidence={confidence})`: give a level between 0 and 1, such as 0.95.")
    return torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)

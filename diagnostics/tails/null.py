"""The null control of a heavy tail: a test against merges of Gaussian updates of the same sizes.

Residuals of a merge of exactly Gaussian updates are heavy-tailed as soon as rows differ in size, and they depend on
each other, for all of them share the merged update. So the null hypothesis is about the updates: independent Gaussian
entries with the rows' and columns' own sizes, as correlated between experts as the real ones. Such surrogates went
through the same merge and the same residual map (``diagnostics.tails.surrogates``), and here the same statistic is
computed for all: the gain in log likelihood of a Student-t over a Gaussian, of residuals less their group's robust
location and over its robust scale (a group is a module and an expert). The p-value is the rank of the real gain among
the surrogates'.

A small p means that entries (with shared sizes: entries or rows) are heavier-tailed than Gaussian in a way that reaches
the residuals; a large one, that sizes explain the tail. A gain far *below* the surrogates' means that real updates
differ from Gaussians in something else: a few directions that carry most of an update make the parts of its residual
alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from diagnostics.residuals import Residuals, Unit
from diagnostics.tails.families import GAUSSIAN, STUDENT_T, Array
from diagnostics.tails.fits import profile
from diagnostics.tails.samples import Values, as_array, sample_of
from diagnostics.tails.sizes import Sizes
from diagnostics.tails.surrogates import Surrogates
from poe_models.printing import Brief

Groups = Sequence[Values] | Mapping[str, Values]
"""Signed residuals of several groups, in each of which they share a location and a scale."""
SMALLEST_GROUP = 3
"""Residuals over the scale of one or two of them say nothing about a tail."""
DEGREES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Degrees of freedom at which the Student-t likelihood is profiled; a finer grid does not change the test."""
MEDIAN_OF_NORMAL = float(norm.ppf(0.75))


def named_groups(groups: Groups) -> dict[str, Array]:
    """Groups of signed residuals as arrays by name, or by position.

    Raises:
        ValueError: If a residual is NaN or infinite.
    """
    named = dict(groups) if isinstance(groups, Mapping) else {str(i): group for i, group in enumerate(groups)}
    arrays = {name: as_array(group) for name, group in named.items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ValueError(
                f"`groups`: {int((~np.isfinite(array)).sum())} of {len(array)} residuals of group {name!r} are NaN or "
                "infinite. Look for where they come from, or leave them out: `values[np.isfinite(values)]`."
            )
    return arrays


def usable_groups(groups: Groups) -> tuple[dict[str, Array], tuple[str, ...]]:
    """Groups of at least three residuals and a positive scale, and warnings about the others.

    Raises:
        ValueError: If a residual is NaN or infinite, no group is left, or they cannot be fitted together.
    """
    arrays = named_groups(groups)
    usable = {n: g for n, g in arrays.items() if len(g) >= SMALLEST_GROUP and location_and_scale(g)[1] > 0}
    if not usable:
        raise ValueError(
            f"`groups`: none of {len(arrays)} groups has {SMALLEST_GROUP} residuals that differ, so that scales of "
            "groups are not known. Give rows or columns (Gram maps), or larger groups."
        )
    sample = sample_of(np.concatenate(list(usable.values())))
    left_out = len(arrays) - len(usable)
    lost = (f"{left_out} of {len(arrays)} groups left out: too few residuals that differ",) if left_out else ()
    return usable, (*sample.warnings, *lost)


def location_and_scale(values: Array) -> tuple[float, float]:
    """Interquartile mean, and the standard deviation of the Gaussian with the same median distance from it.

    >>> location, scale = location_and_scale(np.array([1.0, 3.0, 1.0, 3.0, -50.0, 70.0]))
    >>> location, round(scale, 4)
    (2.0, 1.4826)
    """
    cut = len(values) // 4
    location = float(np.sort(values)[cut : len(values) - cut].mean())
    return location, float(np.median(np.abs(values - location))) / MEDIAN_OF_NORMAL


def standardised(groups: Sequence[Array]) -> Array:
    """Residuals less their group's robust location and over its robust scale, pooled.

    >>> standardised([np.array([0.0, 1.0, 5.0]), np.array([7.0, 17.0, 57.0])]).round(3)
    array([-0.674, -0.337,  1.012, -0.674, -0.337,  1.012])
    """
    pooled = []
    for group in groups:
        location, scale = location_and_scale(group)
        pooled.append((group - location) / scale)
    return np.concatenate(pooled)


def student_gain(values: Array) -> float:
    """Greatest log likelihood of a Student-t over that of a Gaussian, both centred at zero, in nats.

    >>> student_gain(np.linspace(-1, 1, 101)) < 0 < student_gain(np.linspace(-1, 1, 101) ** 9)
    True
    """
    sizes = np.abs(values) / np.median(np.abs(values))
    return max(profile(sizes, STUDENT_T, df)[1] for df in DEGREES) - profile(sizes, GAUSSIAN, 1.0)[1]


HELD = {
    "own": "each expert's own row and column sizes",
    "shared": "the row and column sizes that the experts share",
}


@dataclass(frozen=True, eq=False, repr=False)
class NullControl(Brief):
    """Test of the tails of residuals against those of the same merge of Gaussian updates.

    Attributes:
        gain: Log likelihood of Student-t over Gaussian, nats, of the residuals within their groups.
        surrogate_gains: The same of every surrogate, ``(K,)``.
        pooled_gain: The same of the residuals as they are, all groups together.
        surrogate_pooled_gains: The same of every surrogate, ``(K,)``.
        level: Level of the test.
        sizes: Row and column sizes of the surrogates: each expert's own, or shared.
        row_spread: Median standard deviation of the log row sizes of the updates.
        warnings: Reasons not to trust it; empty if there are none.
    """

    gain: float
    surrogate_gains: Array
    pooled_gain: float
    surrogate_pooled_gains: Array
    level: float
    sizes: Sizes
    row_spread: float
    warnings: tuple[str, ...]

    @property
    def p_value(self) -> float:
        """Share of at least this gain among surrogates and the real updates: the test."""
        return _share_above(self.gain, self.surrogate_gains)

    @property
    def p_pooled(self) -> float:
        """The same of the pooled residuals."""
        return _share_above(self.pooled_gain, self.surrogate_pooled_gains)

    @property
    def p_lighter(self) -> float:
        """Share of at most this gain: the test on the other side."""
        return _share_above(-self.gain, -self.surrogate_gains)

    @property
    def heavy_tailed(self) -> bool:
        """Whether residuals are heavier-tailed than the surrogates', at the level of the test."""
        return self.p_value <= self.level

    @property
    def lighter(self) -> bool:
        """Whether they are lighter-tailed than the surrogates'; at the level, by itself."""
        return self.p_lighter <= self.level

    @property
    def verdict(self) -> str:
        """The control in a sentence."""
        low, middle, high = np.quantile(self.surrogate_gains, (0.0, 0.5, 1.0))
        evidence = (
            f"within modules a Student-t gains {self.gain:.1f} nats, in {len(self.surrogate_gains)} merges of Gaussian "
            f"updates with {HELD[self.sizes]} {middle:.1f} ({low:.1f} to {high:.1f}): p = {self.p_value:.3g}; the log "
            f"sizes of rows have a standard deviation of {self.row_spread:.2g}"
        )
        if self.heavy_tailed:
            text = f"heavier-tailed than Gaussian updates of the same sizes ({evidence})"
        elif self.lighter:
            text = f"not heavy-tailed but lighter-tailed than Gaussian updates of the same sizes ({evidence})"
        else:
            text = f"no heavier-tailed than Gaussian updates of the same sizes ({evidence})"
        return text + (f" (not to be trusted: {'; '.join(self.warnings)})" if self.warnings else "")


def null_control(
    residuals: Residuals, surrogates: Surrogates, *, unit: Unit = "scale", level: float = 0.05
) -> NullControl:
    """Test residuals of a merge against those of the same merge of Gaussian updates.

    Args:
        residuals: Residuals of the real merge, or some of them, by the experts that measured the surrogates.
        surrogates: Surrogates of the same merge.
        unit: Unit of the residuals.
        level: Level of the test.

    Raises:
        ValueError: If the level cannot be reached with so few surrogates, there is nothing to test, a residual is NaN
            or infinite, or the surrogates are of another merge.
    """
    count = len(surrogates.residuals)
    if not 1 / (count + 1) <= level < 1:
        raise ValueError(
            f"`null_control(level={level})`: with {count} surrogates p-values are 1/{count + 1} or above, which never "
            "reaches the level. Make more surrogates."
        )
    made = [_alike(residuals, each, unit) for each in surrogates.of(residuals).residuals]
    usable, warnings = usable_groups(residuals.groups(unit))
    names = [name for name in usable if all(location_and_scale(groups[name])[1] > 0 for groups in made)]
    gains = np.array([_gains(groups, names) for groups in [usable, *made]])
    return NullControl(
        gain=float(gains[0, 0]),
        surrogate_gains=gains[1:, 0],
        pooled_gain=float(gains[0, 1]),
        surrogate_pooled_gains=gains[1:, 1],
        level=level,
        sizes=surrogates.sizes,
        row_spread=surrogates.row_spread,
        warnings=(*warnings, *surrogates.notes),
    )


def _alike(residuals: Residuals, surrogate: Residuals, unit: Unit) -> dict[str, Array]:
    groups, wanted = surrogate.groups(unit), residuals.groups(unit)
    different = [name for name, group in wanted.items() if name not in groups or len(groups[name]) != len(group)]
    if different:
        raise ValueError(
            f"`null_control(...)`: the surrogates have other residuals of {different[0]!r}. Measure both by the same "
            "experts, with the same task vectors."
        )
    return groups


def _gains(groups: Mapping[str, Array], names: list[str]) -> tuple[float, float]:
    """Gain within groups, and of all of them pooled."""
    chosen = [groups[name] for name in names]
    return student_gain(standardised(chosen)), student_gain(np.concatenate(chosen))


def _share_above(observed: float, others: Array) -> float:
    return (1 + int((others >= observed).sum())) / (1 + len(others))

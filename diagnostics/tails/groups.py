"""Residuals in groups of their own location and scale: a module and an expert, a row of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import norm

from diagnostics.tails.families import GAUSSIAN, STUDENT_T, Array
from diagnostics.tails.fits import profile
from diagnostics.tails.samples import Values, as_array, sample_of

__all__ = ["Groups", "location_and_scale", "named_groups", "standardised", "student_gain", "usable_groups"]

Groups = Sequence[Values] | Mapping[str, Values]
"""Signed residuals of several groups, in each of which they share a location and a scale."""
SMALLEST_GROUP = 3
"""Residuals over the scale of one or two of them say nothing about a tail."""
DEGREES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Where the Student-t likelihood is profiled; a finer grid changes the gain little, and its test not at all."""
MEDIAN_OF_NORMAL = float(norm.ppf(0.75))


def named_groups(groups: Groups) -> dict[str, Array]:
    """Groups as arrays by name; their positions if they have none.

    Args:
        groups: signed residuals.

    Returns:
        Name to float64 values.

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
    """Groups with a scale, and warnings about those without.

    Args:
        groups: signed residuals of each group.

    Returns:
        The groups of at least three residuals and a positive scale, and what was left out.

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

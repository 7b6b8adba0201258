r"""Is it the tail, or are modules of different scales pooled? The null control of a heavy tail.

A mixture of Gaussians of different scales is heavy-tailed without any of them being so; and at a merge that is shrunk
every expert's residuals lie around an offset of their own. Under the null hypothesis every group (a module and an
expert) is Gaussian with a location and a scale of its own. Its residuals, less the group's robust location and over its
robust scale, then have a distribution that depends on neither, so that simulated groups of the same sizes, treated
alike, give an exact test: the gain in log likelihood of Student-t over Gaussian is compared with the simulated ones.

What it cannot see: under heavy-tailed experts a MAP shrinks small residuals more than large ones, so that such a merge
makes its own residuals look heavier. Look at the residuals of a merge without a tail (an average) as well. And
residuals of one module are taken as independent, though they share the merged update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from diagnostics.tails.families import GAUSSIAN, STUDENT_T, Array
from diagnostics.tails.fits import profile
from diagnostics.tails.samples import Values, as_array, sample_of

__all__ = ["Groups", "NullControl", "location_and_scale", "null_control", "simulated", "standardised"]

Groups = Sequence[Values] | Mapping[str, Values]
"""Signed residuals of several groups, in each of which they share a scale."""
SMALLEST_GROUP = 3
"""Residuals over the scale of one or two of them say nothing about a tail."""
DEGREES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Where the Student-t likelihood is profiled; any statistic gives an exact test."""
MEDIAN_OF_NORMAL = float(norm.ppf(0.75))


@dataclass(frozen=True, eq=False)
class NullControl:
    """Whether residuals are heavier-tailed than Gaussians of each group's own scale.

    Attributes:
        gain: log likelihood of Student-t over Gaussian, nats, of the pooled residuals.
        simulated_gains: the same of pooled Gaussians with each group's location and scale, ``(S,)``.
        standardised_gain: of residuals less their group's robust location, over its robust scale.
        simulated_standardised_gains: the same of the Gaussians, ``(S,)``.
        level: of the test.
        warnings: why it is not to be trusted; empty if it is.
    """

    gain: float
    simulated_gains: Array
    standardised_gain: float
    simulated_standardised_gains: Array
    level: float
    warnings: tuple[str, ...]

    @property
    def p_pooled(self) -> float:
        """Share of simulations with at least the gain of the pooled residuals, themselves included."""
        return _p_value(self.gain, self.simulated_gains)

    @property
    def p_value(self) -> float:
        """The same of the standardised residuals: the test."""
        return _p_value(self.standardised_gain, self.simulated_standardised_gains)

    @property
    def heavy_tailed(self) -> bool:
        """Whether groups are heavy-tailed themselves, at the level of the test."""
        return self.p_value <= self.level

    @property
    def verdict(self) -> str:
        """The control in a sentence."""
        evidence = f"Student-t gains {self.standardised_gain:.1f} nats within groups, p = {self.p_value:.3g}"
        if self.heavy_tailed:
            text = f"heavy-tailed beyond groups of different location and scale ({evidence})"
        elif self.gain > 2.0:
            text = f"not heavy-tailed: pooling different groups gives {self.gain:.1f} nats, but {evidence}"
        else:
            text = f"not heavy-tailed ({evidence})"
        return text + (f" (not to be trusted: {'; '.join(self.warnings)})" if self.warnings else "")


def null_control(
    groups: Groups,
    *,
    num_simulations: int = 199,
    level: float = 0.01,
    seed: int = 0,
) -> NullControl:
    """Test residuals of several groups against Gaussians of each group's own location and scale.

    Args:
        groups: signed residuals of each group, for instance the rows of one module under one expert.
        num_simulations: how many sets of Gaussians are made; p-values are at least one over one more.
        level: of the test.
        seed: of the simulations.

    Returns:
        The control.

    Raises:
        ValueError: If a residual is NaN or infinite, no group has three residuals, or the level cannot be reached with
            so few simulations.

    >>> rng = np.random.default_rng(0)
    >>> null_control([scale * rng.normal(size=100) for scale in (0.1, 1.0, 10.0)]).heavy_tailed
    False
    """
    if not 1 / (num_simulations + 1) <= level < 1:
        raise ValueError(
            f"`null_control(num_simulations={num_simulations}, level={level})`: p-values are 1/{num_simulations + 1} "
            "or above, which never reaches the level. Simulate more."
        )
    usable, warnings = usable_groups(groups)
    rng = np.random.default_rng(seed)
    gains = np.empty((num_simulations, 2))
    for row in gains:
        made = simulated(usable, rng)
        row[:] = _gain(np.concatenate(made)), _gain(standardised(made))
    return NullControl(
        _gain(np.concatenate(usable)), gains[:, 0], _gain(standardised(usable)), gains[:, 1], level, warnings
    )


def usable_groups(groups: Groups) -> tuple[list[Array], tuple[str, ...]]:
    """Groups with a scale, and warnings about those without.

    Args:
        groups: signed residuals of each group.

    Returns:
        The groups of at least three residuals and a positive scale, and what was left out.

    Raises:
        ValueError: If a residual is NaN or infinite, no group is left, or they cannot be fitted together.
    """
    arrays = [as_array(group) for group in members(groups)]
    _require_finite(groups, arrays)
    usable = [group for group in arrays if len(group) >= SMALLEST_GROUP and location_and_scale(group)[1] > 0]
    if not usable:
        raise ValueError(
            f"`null_control(...)`: none of {len(arrays)} groups has {SMALLEST_GROUP} residuals that differ, so "
            "that scales of groups are not known. Give rows or columns (Gram maps), or larger groups."
        )
    sample = sample_of(np.concatenate(usable))
    left_out = len(arrays) - len(usable)
    lost = (f"{left_out} of {len(arrays)} groups left out: too few residuals that differ",) if left_out else ()
    return usable, (*sample.warnings, *lost)


def _require_finite(groups: Groups, arrays: Sequence[Array]) -> None:
    names = list(groups) if isinstance(groups, Mapping) else range(len(arrays))
    for name, array in zip(names, arrays, strict=True):
        if not np.isfinite(array).all():
            raise ValueError(
                f"`null_control(...)`: {int((~np.isfinite(array)).sum())} of {len(array)} residuals of group {name!r} "
                "are NaN or infinite. Look for where they come from, or leave them out: `values[np.isfinite(values)]`."
            )


def members(groups: Groups) -> Sequence[Values]:
    """The groups without their names."""
    return list(groups.values()) if isinstance(groups, Mapping) else groups


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


def simulated(groups: Sequence[Array], rng: np.random.Generator) -> list[Array]:
    """Gaussian residuals of the same numbers, robust locations and scales.

    >>> [len(group) for group in simulated([np.ones(3), np.ones(5)], np.random.default_rng(0))]
    [3, 5]
    """
    return [rng.normal(*location_and_scale(group), len(group)) for group in groups]


def _gain(values: Array) -> float:
    """Greatest log likelihood of Student-t over that of the Gaussian, nats."""
    sizes = np.abs(values) / np.median(np.abs(values))
    return max(profile(sizes, STUDENT_T, df)[1] for df in DEGREES) - profile(sizes, GAUSSIAN, 1.0)[1]


def _p_value(observed: float, simulations: Array) -> float:
    return (1 + int((simulations >= observed).sum())) / (1 + len(simulations))

"""Bounds of tests whose data are random: each is passed by chance alone but once in a million runs."""

from __future__ import annotations

import math

import scipy.stats
from torch import Tensor

LEVEL = 1e-6
Z = float(scipy.stats.norm.isf(LEVEL / 2))
"""So many standard errors: 4.9."""


def binomial_range(trials: int, least: float, most: float) -> tuple[float, float]:
    """Fewest and most successes in so many trials, if their probability is between `least` and `most`."""
    return float(scipy.stats.binom.ppf(LEVEL / 2, trials, least)), float(scipy.stats.binom.isf(LEVEL / 2, trials, most))


def chi_squared_bound(degrees: int, tests: int = 1) -> float:
    """Largest of so many chi-squared statistics."""
    return float(scipy.stats.chi2.isf(LEVEL / tests, degrees))


def deviation_error(draws: int) -> float:
    """Relative bound of a standard deviation that is taken from so many normal draws."""
    return Z / math.sqrt(2 * draws)


def inverse_temperature_error(logits: Tensor, inverse: float) -> float:
    """Bound of an inverse temperature that is fitted to labels drawn at `inverse`, by the Fisher information."""
    p = (inverse * logits).softmax(-1)
    variance = (p * logits.square()).sum(-1) - (p * logits).sum(-1).square()
    return Z / math.sqrt(float(variance.sum()))

r"""Fits of greatest likelihood.

With ``u = |x| / s`` the score of the log scale vanishes where the family's influence averages one,
``sum_j u_j h'(u_j; shape) = n``. The left side decreases in ``s``: a bracketed root. A shape is found by a bounded
search of the likelihood profiled over the scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq, minimize_scalar

from diagnostics.tails.families import Array, Family
from diagnostics.tails.samples import Values, sample_of


@dataclass(frozen=True)
class Fit:
    """A family at its greatest likelihood.

    Attributes:
        family: The family.
        scale: Scale ``s``, in the units of the residuals.
        shape: The shape; None for scale families.
        log_likelihood: Summed log likelihood in nats.
        at_bound: True if the likelihood still grew at the end of the range of the shape, as it does for the ``nu`` of a
            sample whose tails are no heavier than a Gaussian's.
    """

    family: Family
    scale: float
    shape: float | None
    log_likelihood: float
    at_bound: bool

    def log_density(self, values: Array) -> Array:
        """Log density in nats, of the shape of ``values``."""
        return self.family.log_density(values, self.scale, 1.0 if self.shape is None else self.shape)


def maximum_likelihood(values: Values, family: Family) -> Fit:
    """Fit a family by maximum likelihood to independent signed residuals of any shape.

    >>> from diagnostics.tails.families import LAPLACE
    >>> round(maximum_likelihood([1.0, -2.0, 3.0, -4.0, 5.0], LAPLACE).scale, 9)  # the mean absolute value
    3.0
    """
    sample = sample_of(values)
    sizes = np.abs(sample.scaled)
    if family.shape is None:
        scale, total = profile(sizes, family, 1.0)
        shape, at_bound = None, False
    else:
        bounds = np.log(family.shape.bounds)
        found = minimize_scalar(
            lambda log_shape: -profile(sizes, family, math.exp(log_shape))[1],
            bounds=bounds,
            method="bounded",
            options={"xatol": 1e-7},
        )
        shape = math.exp(found.x)
        scale, total = profile(sizes, family, shape)
        at_bound = bool(np.abs(bounds - found.x).min() < 1e-3)
    return Fit(family, scale * sample.unit, shape, total - len(sizes) * math.log(sample.unit), at_bound)


def profile(sizes: Array, family: Family, shape: float) -> tuple[float, float]:
    """Scale of greatest likelihood of sizes ``|x|`` at a shape, and the summed log likelihood there in nats."""
    parameter = np.float64(shape)

    def excess(log_scale: float) -> float:
        return float(family.influence(sizes * math.exp(-log_scale), parameter).mean()) - 1.0

    low, high = -1.0, 1.0
    while excess(low) < 0:
        low -= 2.0
    while excess(high) > 0:
        high += 2.0
    scale = math.exp(brentq(excess, low, high, xtol=1e-12))
    return scale, float(family.log_density(sizes, scale, parameter).sum())

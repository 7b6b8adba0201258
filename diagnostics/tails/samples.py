"""Validation of residuals before a fit: finite, not all zero, not all equal."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from diagnostics.tails.families import Array

FEWEST = 5
"""Two parameters, and something to judge them by."""
TRUSTED = 50
"""With fewer residuals hardly any two families can be told apart."""
MOST_ZEROS = 0.05
"""A larger share of exact zeros is an atom, at which a Student-t with ``nu`` near zero has infinite likelihood."""

Values = Tensor | npt.ArrayLike


@dataclass(frozen=True, eq=False)
class Sample:
    """Residuals that can be fitted.

    Attributes:
        values: Signed residuals, ``(n,)`` float64.
        unit: Median absolute value, positive.
        warnings: Reasons not to trust a fit.
    """

    values: Array
    unit: float
    warnings: tuple[str, ...]

    @property
    def scaled(self) -> Array:
        """The values in units of ``unit``."""
        return self.values / self.unit

    def limited(self, limit: int | None, seed: int) -> Sample:
        """At most so many of the values, drawn without replacement."""
        if limit is None or len(self.values) <= limit:
            return self
        chosen = np.random.default_rng(seed).choice(len(self.values), limit, replace=False)
        return sample_of(self.values[np.sort(chosen)])


def as_array(values: Values) -> Array:
    """Values of any kind as one-dimensional float64."""
    plain = values.detach().double().cpu().numpy() if isinstance(values, Tensor) else values
    return np.asarray(plain, dtype=np.float64).reshape(-1)


def sample_of(values: Values) -> Sample:
    """Check signed residuals of any shape before a fit.

    Raises:
        ValueError: If there are fewer than five, one is NaN or infinite, more than 5 % are exactly zero, or all have
            the same absolute value.

    >>> sample_of([1.0, -2.0, 3.0, -4.0, 5.0]).warnings
    ('only 5 residuals',)
    """
    array = as_array(values)
    if len(array) < FEWEST:
        raise ValueError(
            f"`sample_of(...)`: {len(array)} residuals; a fit of tails needs at least {FEWEST}, and {TRUSTED} to be "
            "trusted. Pool modules or experts, or give the residuals of rows."
        )
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise ValueError(
            f"`sample_of(...)`: {bad} of {len(array)} residuals are NaN or infinite. Look for where they come from, or "
            "leave them out: `values[np.isfinite(values)]`."
        )
    sizes = np.abs(array)
    unit = float(np.median(sizes))
    zeros = int((sizes == 0).sum())
    if zeros > MOST_ZEROS * len(array):
        raise ValueError(
            f"`sample_of(...)`: {zeros} of {len(array)} residuals are exactly zero, an atom that no density has. Leave "
            "out modules or experts that nothing was merged from: `values[values != 0]`."
        )
    if sizes.max() - sizes.min() <= 1e-12 * unit:
        raise ValueError(
            f"`sample_of(...)`: all {len(array)} residuals have the absolute value {unit:g}, which has no tail. Were "
            "they divided by themselves?"
        )
    warnings = (f"only {len(array)} residuals",) if len(array) < TRUSTED else ()
    return Sample(array, unit, warnings)

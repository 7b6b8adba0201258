"""Tails of residuals: families fitted and compared, and a null control by merges of Gaussian surrogates.

``fit_tails(values)`` fits six families by maximum likelihood and by their exact posterior, compares them by PSIS-LOO
and says which are tied. ``surrogate_residuals(task_vectors, merge)`` merges Gaussian updates of the same sizes, and
``null_control(residuals, surrogates)`` asks whether the real residuals are heavier-tailed than theirs;
``pooled_tails(residuals, surrogates=...)`` does all of it. ``hill``, ``quantiles`` and ``log_density`` give the
curves of the figures.
"""

from diagnostics.tails.comparison import FamilyResult, TailComparison, fit_tails
from diagnostics.tails.curves import Hill, LogDensity, Quantiles, hill, log_density, quantiles
from diagnostics.tails.families import FAMILIES, Family
from diagnostics.tails.fits import Fit, maximum_likelihood
from diagnostics.tails.null import NullControl, null_control
from diagnostics.tails.pooled import PooledTails, pooled_tails
from diagnostics.tails.posteriors import TailPosterior, tail_posterior
from diagnostics.tails.sizes import FittedSizes, Sizes, fit_sizes
from diagnostics.tails.surrogates import Merge, MergeModule, Surrogates, surrogate_residuals

__all__ = [
    "FAMILIES",
    "Family",
    "FamilyResult",
    "Fit",
    "FittedSizes",
    "Hill",
    "LogDensity",
    "Merge",
    "MergeModule",
    "NullControl",
    "PooledTails",
    "Quantiles",
    "Sizes",
    "Surrogates",
    "TailComparison",
    "TailPosterior",
    "fit_sizes",
    "fit_tails",
    "hill",
    "log_density",
    "maximum_likelihood",
    "null_control",
    "pooled_tails",
    "quantiles",
    "surrogate_residuals",
    "tail_posterior",
]

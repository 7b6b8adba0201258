"""How heavy the tails of residuals are, and how sure that is.

``fit_tails(values)`` fits six families by maximum likelihood and by their exact posterior, compares them by PSIS-LOO
and says which are tied; ``null_control(groups)`` asks whether the tail is more than pooled Gaussians of different
scales; ``pooled_tails(residuals)`` does both for the residuals of a merge. ``hill``, ``quantiles`` and ``log_density``
are what pictures are drawn from, and ``nuts_posterior`` is the same posterior in Pyro.
"""

from diagnostics.tails.comparison import FamilyResult, TailComparison, fit_tails
from diagnostics.tails.curves import Hill, LogDensity, Quantiles, hill, log_density, quantiles
from diagnostics.tails.families import FAMILIES, Family
from diagnostics.tails.fits import Fit, maximum_likelihood
from diagnostics.tails.null import NullControl, null_control
from diagnostics.tails.pooled import PooledTails, pooled_tails, tails_by
from diagnostics.tails.posteriors import TailPosterior, tail_posterior
from diagnostics.tails.program import TailDraws, nuts_posterior, tail_program

__all__ = [
    "FAMILIES",
    "Family",
    "FamilyResult",
    "Fit",
    "Hill",
    "LogDensity",
    "NullControl",
    "PooledTails",
    "Quantiles",
    "TailComparison",
    "TailDraws",
    "TailPosterior",
    "fit_tails",
    "hill",
    "log_density",
    "maximum_likelihood",
    "null_control",
    "nuts_posterior",
    "pooled_tails",
    "quantiles",
    "tail_posterior",
    "tail_program",
    "tails_by",
]

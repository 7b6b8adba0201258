r"""Evidence of functional experts: how well the weight-space posterior predicts what they say.

With the weight-space posterior ``p(x)`` of a design in its span, and the functional experts' summed energy ``D(x)``,

    log E_p exp(-D(x) / T) = log int exp(-(E(x) + D(x)) / T) dx - log int exp(-E(x) / T) dx,

a difference of two integrals over the same coordinates, so that neither needs a normaliser of the weight-space energies
and designs can be compared. Both are by Laplace's method, the first with the Gauss-Newton matrix of ``D``: exact for
Gaussian experts and Gaussian residuals of outputs that are linear in the coefficients. A fit stops near the mode and
not at it; the integral there is that of the quadratic model, whose minimum is Newton's decrement lower.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from inference.functional.fit import joint_gradient
from inference.functional.gauss_newton import functional_laplace
from inference.laplace import laplace
from inference.solution import FitInfo, Solution
from poe_models.posterior import Posterior

FAR = 3.0
"""Nats below a point, by its quadratic model, from which its evidence comes with a warning."""


def functional_evidence(
    posterior: Posterior, at: Solution[FitInfo] | Tensor, progress: Callable[[int, int], None] | None = None
) -> float:
    """Log evidence of the functional experts under the product in weight space, in nats.

    Designs, centres and importances are compared by it as long as the functional experts and the temperature are the
    same: it is the log of the mean of ``exp(-D / T)`` over draws of the design's own posterior in the span. Since
    divergences are not negative, it is at most 0; a warning says where Laplace's method gave more, and where the point
    is far from a minimum.

    Args:
        posterior: Of :meth:`SpanModel.posterior`.
        at: The MAP as :func:`fit` finds it, or its latents, ``(M, K, 1)``.
        progress: Called with the batches of examples that are done and their number.

    Raises:
        ValueError: If no factor is a sum over examples, or a Hessian is not positive definite.
    """
    sums = [factor for factor in posterior.factors if factor.per_example is not None]
    if not sums or len(sums) < len(posterior.factors):
        raise ValueError(
            "`functional_evidence(...)`: every factor expert must be a sum over examples, and there must be one. Make "
            "the posterior by `SpanModel.posterior(...)` with functional experts."
        )
    both = functional_laplace(posterior, at, progress)
    falls = both.decrement(joint_gradient(posterior, both.mode.double()))
    alone = laplace(replace(posterior, factors=())).log_integral().sum()
    evidence = float(both.log_integral() + falls - alone)
    _warn(evidence, falls)
    return evidence


def _warn(evidence: float, falls: float) -> None:
    """Say where Laplace's method is not to be trusted."""
    if falls > FAR:
        warnings.warn(
            f"`functional_evidence(...)`: the point is {falls:.3g} nats above the minimum of its quadratic model, "
            "whose evidence this is. `fit` with more steps for one to rely on.",
            stacklevel=3,
        )
    if evidence > 0:
        warnings.warn(
            f"`functional_evidence(...)`: {evidence:.3g} nats, and no evidence of divergences is above 0: the "
            "posterior is too far from a Gaussian for Laplace's method. Judge this design by `functional_score`.",
            stacklevel=3,
        )

"""Anchor precision, share and noise by the marginal likelihood of the regression behind the merge, without labels.

[BMM] sees a module's experts as observations of one regression: for every input ``x`` of expert ``i`` the output
``U_i x`` is ``Z x`` plus noise of precision ``beta``, and the rows of ``Z`` have the prior
``N(z_0, I / (beta lambda))``. Integrating ``Z`` out gives, with the eigenvalues ``g_k`` of ``sum_i w_i P_i`` and the
least ``R = sum_i w_i q_i + lambda |Z - Z_0|^2`` over ``Z``,

    log p = d_out / 2 sum_k log(lambda / (lambda + g_k)) + n d_out / 2 log(beta / 2 pi) - beta / 2 R,

whose best ``beta`` is ``n d_out / R`` (MacKay, 1992, Bayesian interpolation). Everything comes from one
eigendecomposition, so that the search is exact and costs nothing beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from inference.search.ridge import Ridge

BOUNDS = (1e-8, 1e4)
"""Anchor precisions that are looked at, relative to the experts' curvature."""


@dataclass(frozen=True)
class EmpiricalBayes:
    """Maximum of the marginal likelihood of a group of modules.

    Attributes:
        eta: Anchor precision, relative to the experts' curvature.
        noise_precision: ``beta`` of the residuals as the product weighs them: that of ``q_i`` alone is ``beta w_i``,
            ``w_i = a_i / (2 s_i^2)``.
        log_evidence: Log marginal likelihood there, in nats.
        at_bound: Whether the best precision lies at a bound: then the updates do not determine it.
    """

    eta: float
    noise_precision: float
    log_evidence: float
    at_bound: bool


def regression_evidence(
    ridges: Sequence[Ridge], observations: Sequence[int], eta: float, noise_precision: float | None = None
) -> tuple[float, float]:
    """Log marginal likelihood of modules that share a precision and a noise.

    Args:
        ridges: Regressions of batches of modules.
        observations: ``n`` of each batch's modules: inputs of all experts together, each weighted by one.
        eta: Anchor precision, relative to the experts' curvature.
        noise_precision: ``beta``; the best one if not given.

    Returns:
        The log evidence in nats, and ``beta``.

    Raises:
        ValueError: If ``eta`` or the noise's precision is not positive, or there is no observation.
    """
    if not eta > 0 or (noise_precision is not None and not noise_precision > 0):
        raise ValueError(f"`regression_evidence(eta={eta}, noise_precision={noise_precision})`: both must be positive.")
    if len(ridges) != len(observations) or any(count < 1 for count in observations):
        raise ValueError(f"`regression_evidence(observations={list(observations)})`: one positive count a batch.")
    outputs = [_outputs(ridge) for ridge in ridges]
    numbers = sum(n * d * len(r.values) for r, n, d in zip(ridges, observations, outputs, strict=True))
    residual = sum(float(ridge.residual(eta * ridge.curvature).sum()) for ridge in ridges)
    beta = numbers / max(residual, torch.finfo(torch.float64).tiny) if noise_precision is None else noise_precision
    occam = sum(d / 2 * _log_shrinkage(ridge, eta) for ridge, d in zip(ridges, outputs, strict=True))
    return occam + numbers / 2 * math.log(beta / (2 * math.pi)) - beta / 2 * residual, beta


def empirical_bayes(ridges: Sequence[Ridge], observations: Sequence[int]) -> EmpiricalBayes:
    """The anchor precision and noise that the marginal likelihood prefers, for modules that share them.

    Args:
        ridges: Regressions of batches of modules.
        observations: Inputs of all experts together, of each batch's modules.

    Raises:
        ValueError: If there is no observation.
    """
    low, high = (math.log(bound) for bound in BOUNDS)
    found = minimize_scalar(
        lambda log_eta: -regression_evidence(ridges, observations, math.exp(log_eta))[0],
        bounds=(low, high),
        method="bounded",
        options={"xatol": 1e-6},
    )
    eta = math.exp(float(found.x))
    evidence, beta = regression_evidence(ridges, observations, eta)
    return EmpiricalBayes(eta, beta, evidence, not low + 1e-3 < float(found.x) < high - 1e-3)


def _outputs(ridge: Ridge) -> int:
    """Numbers that share a spectrum: rows of an operator on the right, columns of one on the left."""
    d_out, d_in = ridge.quadratic.shape
    return d_out if ridge.side == "right" else d_in


def _log_shrinkage(ridge: Ridge, eta: float) -> float:
    """``sum_k log(lambda / (lambda + g_k))`` over the eigenvalues of all modules."""
    precision = (eta * ridge.curvature).unsqueeze(-1)
    shrinkage: Tensor = (precision / (precision + ridge.values)).log()
    return float(shrinkage.sum())

r"""Laplace's approximation of a posterior with functional experts, by the Gauss-Newton matrix in the span.

With outputs ``f(x)`` of an example and its energy ``D(f)``, the Hessian of a sum over examples is
``sum J^T (d^2 D / df^2) J`` plus a term with the network's second derivatives, which Gauss-Newton leaves out
(Schraudolph, 2002, Neural Computation 14(7)). For the Kullback-Leibler divergence the middle is
``diag(p_Z) - p_Z p_Z^T``, Fisher's information. ``J`` takes one forward-mode product for each latent and
is held for one batch of examples, ``batch_size`` times the outputs times the latents; the middle is never formed. The
rest of the energy keeps its Hessian.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from inference.functional.expert import OutputEnergy
from inference.laplace import DenseLaplace
from inference.solution import FitInfo, Solution
from poe_models.posterior import BoundFactor, Posterior
from poe_models.program import log_density


def functional_laplace(
    posterior: Posterior, at: Solution[FitInfo] | Tensor, progress: Callable[[int, int], None] | None = None
) -> DenseLaplace:
    """``N(x*, T H^-1)`` over all modules together, with the Gauss-Newton matrix of the sums over examples.

    Args:
        posterior: Of :meth:`SpanModel.posterior`.
        at: The MAP as :func:`fit` finds it, with a warning if it had not converged; or its latents, ``(M, K, 1)``.
        progress: Called with the batches of examples that are done and their number.

    Returns:
        The approximation: draws and log density. Its ``log_integral`` is that of ``exp(-E / T)``; the weight-space
        product has no normaliser, so that it does not compare designs.

    Raises:
        ValueError: If a factor over examples has no outputs to differentiate, or the matrix is not positive definite.
    """
    sums = [factor for factor in posterior.factors if factor.per_example is not None]
    others = tuple(factor for factor in posterior.factors if factor.per_example is None)
    density = log_density(replace(posterior, factors=others), joint=True)
    mode = _mode(at).double()
    hessian = torch.func.hessian(lambda x: -density(x.view(mode.shape)))(mode.flatten())
    known = _known(posterior)
    batches = [(factor, rows) for factor in sums for rows in _batches(factor)]
    for done, (factor, rows) in enumerate(batches):
        energy = _outputs_of(factor)
        block = gauss_newton(posterior, energy, mode, rows.to(mode.device), known)
        hessian[known.unsqueeze(1), known] += block / posterior.fixed_temperature
        if progress is not None:
            progress(done + 1, len(batches))
    return DenseLaplace(posterior, mode.to(posterior.dtype), hessian)


def gauss_newton(posterior: Posterior, energy: OutputEnergy, mode: Tensor, rows: Tensor, known: Tensor) -> Tensor:
    """``sum J^T (d^2 D / df^2) J`` over some examples, ``(D, D)`` float64.

    Args:
        posterior: Whose latents the columns of ``J`` are.
        energy: Outputs of examples and their cost.
        mode: Latents ``(M, K, 1)``.
        rows: The examples.
        known: Positions of the ``D`` latents among all ``M K``.
    """
    outputs, jacobian = _jacobian(posterior, energy, mode, rows, known)

    def slope(at: Tensor) -> Tensor:
        return torch.func.grad(lambda f: energy.cost(f, rows).sum())(at)

    moved = [torch.func.jvp(slope, (outputs,), (column,))[1] for column in jacobian]  # the middle is never formed
    left, right = (torch.stack([each.flatten().double() for each in part]) for part in (jacobian, moved))
    return left @ right.T


def _jacobian(
    posterior: Posterior, energy: OutputEnergy, mode: Tensor, rows: Tensor, known: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Outputs ``(n, ..., C)`` in float64 and their derivative in each of the known latents, of the same shape."""

    def outputs(x: Tensor) -> Tensor:
        return energy.outputs(posterior.coefficients(x), rows).double()

    columns = []
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward mode
        for place in known.tolist():
            tangent = torch.zeros_like(mode).flatten()
            tangent[place] = 1.0
            value, moved = torch.func.jvp(outputs, (mode,), (tangent.view(mode.shape),))[:2]
            columns.append(moved)
    return value, columns


def _mode(at: Solution[FitInfo] | Tensor) -> Tensor:
    if isinstance(at, Tensor):
        return at
    if not at.converged:
        warnings.warn(
            f"`functional_laplace(at=...)`: the MAP had not converged ({at.status[0]}), so that the approximation is "
            "centred beside the mode.",
            stacklevel=3,
        )
    return at.value


def _known(posterior: Posterior) -> Tensor:
    """Positions of the latents that the span has; the others are padding that moves nothing."""
    assert posterior.span is not None
    return posterior.span.known.flatten().nonzero().flatten()


def _batches(factor: BoundFactor) -> tuple[Tensor, ...]:
    assert factor.expert is not None
    count = factor.expert.examples
    return torch.arange(count).split(factor.expert.batch_size or count)


def _outputs_of(factor: BoundFactor) -> OutputEnergy:
    assert factor.expert is not None
    energy = factor.expert.function
    if not isinstance(energy, OutputEnergy):
        raise ValueError(
            f"`functional_laplace(...)`: factor {factor.name!r} is a sum over examples without outputs. Make it by "
            "`prediction_expert` or `functional`, or use `DenseLaplace`, which differentiates twice."
        )
    return energy

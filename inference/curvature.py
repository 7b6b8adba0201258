"""Least curvature of an energy at a stationary point, from gradients alone: is it a minimum or a saddle?

>>> gradient = lambda x: torch.tensor([2.0, -1.0, 0.5]) * x                         # of x1^2 - x2^2 / 2 + x3^2 / 4
>>> ratio, direction = least_curvature(gradient, torch.zeros(1, 3))
>>> round(float(ratio), 3), direction.abs().round(decimals=3)
(-0.5, tensor([[0., 1., 0.]]))
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LANCZOS = 16
"""Directions in which the curvature is measured, at most."""
NUDGE = {torch.float32: 1e-4, torch.float64: 1e-6}
"""Step of the differences of gradients."""
NEGATIVE = {torch.float32: 1e-2, torch.float64: 1e-5}
"""Curvature below zero, relative to the largest, that is more than rounding in these differences."""


def least_curvature(
    gradient: Callable[[Tensor], Tensor], x: Tensor, noise: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """Least curvature over the largest, and its direction, by Lanczos with full orthogonalisation.

    Products with the Hessian are central differences of the gradient, so that energies need one derivative. The value
    is an upper bound: what is negative is a direction of descent, whether or not there are steeper ones.

    Args:
        gradient: Maps points like ``x`` to the gradients of an energy that is a sum over the first dimension.
        x: The point, ``(M, *event)``, in units over which the energy changes.
        noise: Length of the gradient's error by rounding, ``(M,)``: less curvature than it can fake is none.

    Returns:
        The ratio, ``(M,)`` float64, and unit vectors like ``x``; 0 where nothing is known, as beside values that are
        not finite.
    """
    generator = torch.Generator().manual_seed(0)
    count = x[0].numel()
    basis: list[Tensor] = []
    products: list[Tensor] = []
    for _ in range(min(LANCZOS, count)):
        drawn = torch.randn(len(x), count, generator=generator, dtype=torch.float64).to(x.device)
        along = products[-1] if products else drawn
        left = _orthogonal(along, basis)
        exhausted = left.norm(dim=-1) <= 1e-8 * along.norm(dim=-1)
        left = torch.where(exhausted.unsqueeze(-1), _orthogonal(drawn, basis), left)
        basis.append(left / left.norm(dim=-1, keepdim=True))
        products.append(_product(gradient, x, basis[-1]))
    directions = torch.stack(basis, 1)
    projected = directions @ torch.stack(products, 1).mT
    known = projected.isfinite().all(-1).all(-1)
    directions, projected = (torch.where(known[:, None, None], each, 0.0) for each in (directions, projected))
    curvatures, vectors = torch.linalg.eigh((projected + projected.mT) / 2)
    direction = (vectors[..., :1].mT @ directions).squeeze(-2)
    # Measured along it: at a kink products are not linear, but along one direction a convex energy never curves down.
    least = (direction * _product(gradient, x, direction)).sum(-1).nan_to_num(0.0)
    largest = curvatures.abs().amax(-1).clamp(min=torch.finfo(torch.float64).tiny)
    ratio = torch.where(least.abs() > noise / NUDGE[x.dtype], least / largest, 0.0)
    return ratio, direction.reshape(x.shape).to(x.dtype)


def _product(gradient: Callable[[Tensor], Tensor], x: Tensor, vectors: Tensor) -> Tensor:
    """Products of the Hessian with vectors ``(M, D)``, ``(M, D)`` float64."""
    nudge = (NUDGE[x.dtype] * vectors).reshape(x.shape).to(x.dtype)
    change = gradient(x + nudge).double() - gradient(x - nudge).double()
    return change.reshape(vectors.shape) / (2 * NUDGE[x.dtype])


def _orthogonal(vectors: Tensor, basis: list[Tensor]) -> Tensor:
    """Vectors ``(M, D)`` without their parts along orthonormal ones; twice, for rounding."""
    for each in basis + basis:
        vectors = vectors - (vectors * each).sum(-1, keepdim=True) * each
    return vectors

"""A check of the solver by other means: the energy's gradient by automatic differentiation, in float64."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from inference.solution import FixedPointInfo, Solution, Status
from poe_models.posterior import Posterior
from poe_models.weights.batches import mapped

LARGEST = 1e-3
"""Norm of the gradient at a minimum, relative to the sum of the norms of its parts, that rounding may leave."""
FLOOR = 1e-3
"""Share of the parts at the start, 0, below which they count as vanished: every expert is satisfied there."""


def relative_gradient(posterior: Posterior, value: Tensor) -> Tensor:
    """Norm of the energy's gradient relative to the sum of those of the experts' and the anchor's.

    At a minimum the parts cancel. The energies are differentiated as they are written, so that neither their weights
    nor the solver's equations are trusted.

    Args:
        posterior: The posterior.
        value: Points ``(M, a, b)`` in its coordinates.

    Returns:
        ``(M,)`` float64, between 0 and 1; 0 where nothing pulls.
    """
    return torch.stack([_of_module(posterior.module(i), value[i : i + 1].double()) for i in range(len(value))])


def _of_module(posterior: Posterior, value: Tensor) -> Tensor:
    gradient, size = _parts(posterior, value)
    if gradient.norm() > LARGEST * size:  # perhaps only because all parts have vanished
        size = torch.maximum(size, FLOOR * _parts(posterior, torch.zeros_like(value))[1])
    return gradient.norm() / size if size > 0 else size


def _parts(posterior: Posterior, value: Tensor) -> tuple[Tensor, Tensor]:
    """The energy's gradient, and the sum of the norms of its parts; one expert is in float64 at a time."""
    total, size = torch.zeros_like(value), value.new_zeros(())
    anchor = replace(posterior, experts=())
    for part in (*posterior.experts, anchor):
        point = value.detach().requires_grad_()
        wide = mapped(_wide, part)
        energy = wide.anchor_energy(point) if part is anchor else wide.energy(point)
        if not energy.requires_grad:
            continue
        found = torch.autograd.grad(energy.sum(), point, allow_unused=True)[0]
        if found is not None:
            total.add_(found)
            size = size + found.norm()
    return total, size


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def judged(posterior: Posterior, solution: Solution[FixedPointInfo]) -> Solution[FixedPointInfo]:
    """The solution, with what the solver called converged called otherwise where the gradient says so."""
    size = relative_gradient(posterior, solution.value)
    status = tuple(
        Status.NO_MINIMUM if each.converged and not found <= LARGEST else each
        for each, found in zip(solution.status, size.tolist(), strict=True)
    )
    return replace(solution, status=status)

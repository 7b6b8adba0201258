"""Independent check of the solver: the energy's gradient by automatic differentiation, in float64.

Where the energies' derivatives in their residuals, by automatic differentiation, are the weights that the solver used,
the gradient that it measured is the energy's, and is small enough or not. Only where that does not settle it are the
energies differentiated in the merged update itself, expert by expert.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from inference.solution import FixedPointInfo, Solution, Status
from inference.units import own_units
from poe_models.posterior import Posterior
from poe_models.weights.batches import mapped

LARGEST = 1e-3
"""Norm of the gradient at a minimum, relative to the sum of the norms of its parts, that rounding may leave."""
FLOOR = 1e-3
"""Share of the parts at the start, 0, below which they count as vanished: every expert is satisfied there."""


SAME = 1e-6
"""Largest difference of a weight from the energy's own derivative, relative to it, that is rounding."""

CHUNK = 2**16
"""Entries up to which modules are checked together."""


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
    own = own_units(posterior, "relative_gradient")
    value, step = own.latents(value), modules_at_once(value[0].numel())
    chunks = [slice(first, first + step) for first in range(0, len(value), step)]
    return torch.cat([_of_modules(own.posterior.part(some), value[some].double()) for some in chunks])


def modules_at_once(entries: int) -> int:
    """Number of modules of so many entries that are checked together: one, unless they are small."""
    return max(1, CHUNK // entries)


def _of_modules(posterior: Posterior, value: Tensor) -> Tensor:
    gradient, size = _parts(posterior, value)
    if bool((gradient > LARGEST * size).any()):  # perhaps only because all parts have vanished
        floor = FLOOR * _parts(posterior, torch.zeros_like(value))[1]
        size = torch.where(gradient > LARGEST * size, torch.maximum(size, floor), size)
    return torch.where(size > 0, gradient / size, size)


def _parts(posterior: Posterior, value: Tensor) -> tuple[Tensor, Tensor]:
    """Norm of the energy's gradient, and the sum of those of its parts, ``(M,)``; one expert in float64 at a time."""
    total, size = torch.zeros_like(value), value.new_zeros(len(value))
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
            size = size + found.flatten(1).norm(dim=1)
    return total.flatten(1).norm(dim=1), size


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def settled(posterior: Posterior, info: FixedPointInfo) -> Tensor:
    """Mask of the modules whose gradient is small for all that the solver knows of it, ``(M,)``.

    The experts' parts sum up to the anchor's at a minimum, so that all parts together are twice that at least.
    """
    scales = torch.stack([expert.scale_squared for expert in posterior.experts], -1)
    q = (info.residuals * scales).detach().requires_grad_()
    energy = posterior.energy_of(q)
    if not energy.requires_grad:
        return torch.zeros_like(info.energy, dtype=torch.bool)
    (slopes,) = torch.autograd.grad(energy.sum(), q)
    right = ((slopes - info.weights).abs() <= SAME * info.weights).all(-1)
    return right & (info.gradient_norm <= LARGEST * info.anchor_share)


def judged(posterior: Posterior, solution: Solution[FixedPointInfo]) -> Solution[FixedPointInfo]:
    """The solution, its status corrected where the gradient contradicts that the solver converged."""
    if bool(settled(posterior, solution.info).all()):
        return solution
    size = relative_gradient(posterior, solution.value)
    status = tuple(
        Status.NO_MINIMUM if each.converged and not found <= LARGEST else each
        for each, found in zip(solution.status, size.tolist(), strict=True)
    )
    return replace(solution, status=status)

"""Updates of extreme size: a posterior in units of its modules' own, and answers back in those of the updates.

Under the Gram maps residuals are fourth powers of updates and curvatures their squares, which leave the range of
floating point long before the merge does. Where a design is scale-equivariant, ``E(c Z; c U) = E(Z; U)``, as relative
scales and precisions make it, solvers and samplers work on ``U / c`` for one power of two ``c`` a module, and multiply
what they find by it. Elsewhere such updates are refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from inference.draws import Draws
from inference.solution import FixedPointInfo, InfoT, Solution
from poe_models.posterior import BoundExpert, Posterior
from poe_models.records import with_tensors
from poe_models.sums import largest_entry
from poe_models.updates import over_units

ROOM = 2.0**100
"""Weights and precisions within this factor of one leave single precision room for the sizes of modules."""
COMFORTABLE = 2.0**20
"""Updates whose largest entry is within this factor of one are near it."""
_FACTOR = 8.0
"""Two sizes of the same updates, at which a design is compared with itself, are this factor apart."""


@dataclass(frozen=True, eq=False)
class OwnUnits:
    """A posterior whose numbers are in the range of its dtype, and the way back from its coordinates.

    Attributes:
        posterior: Of ``Z / c``, in float64 where its weights leave the range of single precision.
        changed: Whether these are other units than the updates'.
        units: ``c``, ``(M,)`` float64; 1 in modules of ordinary size.
        weights: Factors of the experts' weights, ``(M, E)``: how they depend on ``c``.
        precision: That of the anchor's precision, ``(M,)``.
        dtype: Of latents in the units of the updates.
    """

    posterior: Posterior
    changed: bool
    units: Tensor
    weights: Tensor
    precision: Tensor
    dtype: torch.dtype

    def latents(self, z: Tensor) -> Tensor:
        """Latents ``(*S, M, *event)`` in own units."""
        z = z.to(self.posterior.dtype) if self._wider else z
        return over_units(z.movedim(-3, 0), self.units).movedim(0, -3) if self.changed else z

    def back(self, z: Tensor) -> Tensor:
        """Latents ``(*S, M, *event)`` in own units in those of the updates."""
        given = z.double() * self.units[:, None, None].to(z.device) if self.changed else z
        return given.to(self.dtype if self._wider else z.dtype)

    @property
    def _wider(self) -> bool:
        return self.posterior.dtype != self.dtype

    def solution(self, found: Solution[InfoT]) -> Solution[InfoT]:
        """A solution in the units of the updates."""
        if not self.changed:
            return replace(found, value=self.back(found.value))
        return in_given_units(replace(found, value=self.back(found.value)), self.units, self.weights, self.precision)

    def draws(self, found: Draws) -> Draws:
        """Draws in the units of the updates."""
        make, units = found.regenerate, self.units.tolist()
        if not self.changed and not self._wider:
            return found
        if make is None:
            return replace(found, numbers=self.back(found.numbers))

        def again(module: int, weights: Tensor, seed: int) -> Tensor:
            made = units[module] * make(module, weights, seed)
            return made.to(self.dtype) if self._wider else made

        return replace(found, regenerate=again)


def in_given_units(found: Solution[InfoT], units: Tensor, weights: Tensor, precision: Tensor) -> Solution[InfoT]:
    """The record of a solution in own units in those of the updates; its ``value`` is left as it is.

    Args:
        found: The solution.
        units: ``c``, ``(M,)``.
        weights: Factors of the experts' weights, ``(M, E)``.
        precision: That of the anchor's precision, ``(M,)``.
    """
    info, kept = found.info, found.info.retention
    norms = kept.update_norms * units.unsqueeze(-1).to(kept.update_norms)
    changed: dict[str, Any] = {"retention": replace(kept, norm=kept.norm * units.to(kept.norm), update_norms=norms)}
    if isinstance(info, FixedPointInfo):
        changed |= {"weights": info.weights * weights, "anchor_precision": info.anchor_precision * precision}
    return replace(found, info=replace(info, **changed))


def powers_of_two(sizes: Tensor, odd: Tensor) -> Tensor:
    """Units that bring sizes to about one where they are odd, and 1 elsewhere; float64, of the same shape."""
    return torch.where(odd, torch.where(odd, sizes.double(), 1.0).log2().round().exp2(), 1.0)


def own_units(posterior: Posterior, function: str, *, equivariant: bool = True, near: bool = False) -> OwnUnits:
    """A posterior as it is where its numbers are in range, and in units of its modules' own elsewhere.

    Weights and precisions of settings far from one need float64, in whatever units.

    Args:
        posterior: Any posterior.
        function: Name of the algorithm, for the message.
        equivariant: Whether the algorithm's own settings allow for other units.
        near: Whether it is at its best near size one, and wants other units long before numbers are out of range.

    Raises:
        ValueError: If updates are out of range, and their design or the settings are about absolute sizes.
    """
    odd, lost = _odd(posterior, near)
    if bool(odd.any()):
        sizes = torch.stack([largest_entry(expert.update) for expert in posterior.experts], -1)
        largest = torch.where(_speak(posterior), sizes, 0.0).amax(-1)
        found = _rebound(posterior, powers_of_two(largest, odd.any(-1))) if equivariant else None
        if found is not None and not bool(_odd(found.posterior, False)[1].any()):
            return replace(found, posterior=_wide_enough(found.posterior))
        if bool(lost.any()):
            module, expert = lost.nonzero()[0].tolist()
            raise ValueError(_refusal(posterior, function, module, expert, float(sizes[module, expert])))
    ones = torch.ones_like(posterior.anchor_precision)
    factors = torch.ones_like(odd, dtype=torch.float64)
    return OwnUnits(_wide_enough(posterior), False, ones, factors, ones, posterior.dtype)


def _wide_enough(posterior: Posterior) -> Posterior:
    """The posterior in float64 if precisions ``sum_i w_i P_i + eta I`` may leave the range of single precision.

    The largest of the weights and the anchor's precision counts, at rest and where nothing is merged.
    """
    if posterior.dtype != torch.float32 or posterior.span is not None:
        return posterior
    at_zero = [expert.residual_at_zero for expert in posterior.experts]
    columns = [posterior.weights(torch.stack(q, -1)) for q in ([0 * each for each in at_zero], at_zero) if q]
    columns = [torch.where(each.isfinite(), each, 0.0).amax(-1) for each in columns] or [posterior.anchor_precision]
    largest = torch.maximum(torch.stack(columns), posterior.anchor_precision)
    sizes = torch.stack([largest, largest / float(posterior.temperature)])  # of a MAP, and of draws
    if not bool(((sizes > 0) & ((sizes < 1 / ROOM) | (sizes > ROOM))).any()):
        return posterior
    center = None if posterior.center is None else posterior.center.double()
    return replace(posterior, experts=tuple(map(_wide, posterior.experts)), center=center)


def _wide(expert: BoundExpert) -> BoundExpert:
    """An expert in float64, without the products that were rounded to less."""
    wide = with_tensors(lambda value: value.double() if value.is_floating_point() else value, expert)
    factors = None if expert.low_rank is None else (expert.low_rank[0].double(), expert.low_rank[1].double())
    operator = expert.operator.to(torch.float64)
    return replace(wide, operator=operator, low_rank=factors, pull=None, pull_squared=None)


def _odd(posterior: Posterior, near: bool) -> tuple[Tensor, Tensor]:
    """Masks of updates of extreme size, and of those whose numbers are out of range, ``(M, E)``."""
    columns = [_odd_and_lost(expert, near) for expert in posterior.experts]
    if not columns:
        none = posterior.anchor_precision.new_zeros(posterior.num_modules, 0, dtype=torch.bool)
        return none, none
    odd, lost = (torch.stack(each, -1) & _speak(posterior) for each in zip(*columns, strict=True))
    return odd, lost


def _speak(posterior: Posterior) -> Tensor:
    """Mask of the experts that count, ``(M, E)``: one that is rounding beside the others drops out."""
    return posterior.active | ~posterior.active.any(-1, keepdim=True)


def _odd_and_lost(expert: BoundExpert, near: bool) -> tuple[Tensor, Tensor]:
    """Whether fourth powers of the update, squared by curvatures, leave the range, and so its residual; ``(M,)``.

    Curvatures are divided by the square of a squared scale, which is always float64.
    """
    limits, widest = torch.finfo(expert.update.dtype), torch.finfo(torch.float64)
    low, high = max(limits.tiny**0.25, widest.tiny**0.125), min(limits.max**0.25, widest.max**0.125)
    smallest, largest = (max(low, 1 / COMFORTABLE), min(high, COMFORTABLE)) if near else (low, high)
    norm, scale = expert.norm_squared.sqrt(), expert.scale_squared
    squared = (scale == 0) | ((scale >= widest.tiny**0.5) & (scale <= widest.max**0.5))
    if bool((squared & (norm >= smallest * expert.update[0].numel() ** 0.5) & (norm <= largest)).all()):
        none = torch.zeros_like(norm, dtype=torch.bool)  # so is the largest entry in range, and need not be looked for
        return none, none
    size, residual = largest_entry(expert.update), expert.residual_at_zero.double()
    held = (residual >= max(limits.tiny, widest.tiny**0.5)) & (residual <= min(limits.max, widest.max**0.5))
    odd = (size > 0) & ((size < low) | (size > high) | ~squared)
    far = (size > 0) & ((size < smallest) | (size > largest) | ~squared)
    return far if near else odd, odd & ~(held & squared)


def _refusal(posterior: Posterior, function: str, module: int, expert: int, size: float) -> str:
    name, dtype = posterior.experts[expert].name, posterior.experts[expert].update.dtype
    seen = "statistics or factor experts see" if posterior.in_units is None else "its design or a setting is about"
    return (
        f"`{function}(...)`: the update of expert {name!r} in {posterior.label(module)} has entries of up to "
        f"{size:.1e}, whose fourth power {dtype} cannot hold, or not its square, and {seen} absolute sizes. Bind the "
        "updates themselves, with the scale `Balanced()` or `Relative()` and the anchor's precision "
        "`RelativePrecision()`, which are about none. Or divide all updates by one such number, and multiply what is "
        "found by it."
    )


def _rebound(posterior: Posterior, units: Tensor) -> OwnUnits | None:
    """The posterior in these units; None if it cannot be had, or its energy depends on them."""
    one, other = _in_units(posterior, units), _in_units(posterior, units / _FACTOR)
    if one is None or other is None:
        return None
    point = torch.stack([(0.3 + 0.1 * i) * expert.update for i, expert in enumerate(one.experts)]).sum(0)
    if not torch.allclose(_terms(one, point), _terms(other, _FACTOR * point), rtol=1e-6, atol=0.0):
        return None
    scales = [torch.stack([expert.scale_squared for expert in each.experts], -1) for each in (one, other)]
    column = units.unsqueeze(-1)
    return OwnUnits(
        one,
        True,
        units,
        torch.where(column == 1, 1.0, column.pow(-_degree(*scales))),
        torch.where(units == 1, 1.0, units.pow(_degree(one.anchor_precision, other.anchor_precision))),
        posterior.dtype,
    )


def _in_units(posterior: Posterior, units: Tensor) -> Posterior | None:
    """The experts that a posterior has, at its temperature, in other units."""
    if posterior.in_units is None:
        return None
    bound, names = posterior.in_units(units), {expert.name for expert in posterior.experts}
    experts = tuple(expert for expert in bound.experts if expert.name in names)
    return replace(bound, experts=experts, temperature=posterior.temperature, modules=posterior.modules, in_units=None)


def _terms(posterior: Posterior, z: Tensor) -> Tensor:
    """Energies of experts and anchor at a point ``(M, *event)``, ``(M, E + 1)``."""
    return torch.stack([*(expert.energy(z) for expert in posterior.experts), posterior.anchor_energy(z)], -1)


def _degree(one: Tensor, other: Tensor) -> Tensor:
    """Power of the size with which a number grows, from its values at two sizes; 0 of one that is zero."""
    return ((other / one).log2() / torch.tensor(_FACTOR).log2()).nan_to_num(0.0, 0.0, 0.0).round()

"""Updates as designs take them: tensors, or modules that carry names; checked before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from poe_models.experts import Expert, NamedCenter
from poe_models.module_names import module_label

if TYPE_CHECKING:
    from poe_models.experts import Anchor, ProductOfExperts

Factors = tuple[Tensor, Tensor]
"""Low-rank factors ``(..., N, d_out, r)`` and ``(..., N, r, d_in)`` of updates, as adapters have them."""


class NamedUpdates(Protocol):
    """One module's updates with names, such as :class:`~poe_models.weights.task_vectors.ModuleUpdates`.

    Attributes:
        name: Name of the module.
        names: Names of the task vectors.
        updates: ``(N, d_out, d_in)``, in the order of ``names``.
        low_rank: Factors of the updates, if all are adapters'.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def names(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def updates(self) -> Tensor: ...  # noqa: D102
    @property
    def low_rank(self) -> Factors | None: ...  # noqa: D102


class Batch(NamedTuple):
    """Updates of ``M`` modules of equal shape in the order of a product's task vectors.

    Attributes:
        poe: The product, bound to the modules' names.
        updates: ``(M, N, d_out, d_in)`` in a dtype to compute in.
        low_rank: Factors of the updates, or None.
        modules: Names of the modules; numbers where none are known.
    """

    poe: ProductOfExperts
    updates: Tensor
    low_rank: Factors | None
    modules: tuple[str, ...]


def divided(batch: Batch, units: Tensor) -> Batch:
    """The batch in units of each module's own, ``(M,)``: updates, one factor of each pair and a given centre."""
    poe, factors = batch.poe, batch.low_rank
    if isinstance(poe.anchor.center, Tensor):
        center = over_units(poe.anchor.center.expand(len(units), *poe.anchor.center.shape[-2:]), units)
        poe = replace(poe, anchor=replace(poe.anchor, center=center))
    return batch._replace(
        poe=poe,
        updates=over_units(batch.updates, units),
        low_rank=None if factors is None else (over_units(factors[0], units), factors[1]),
    )


def over_units(tensor: Tensor, units: Tensor) -> Tensor:
    """A tensor ``(M, ...)`` over units, ``(M,)`` float64; in its own dtype, exact for powers of two."""
    return (tensor.double() / units.reshape(-1, *[1] * (tensor.ndim - 1)).to(tensor.device)).to(tensor.dtype)


def batch_of(
    poe: ProductOfExperts, updates: Tensor | NamedUpdates | Sequence[NamedUpdates], low_rank: Factors | None = None
) -> Batch:
    """Updates, and factors beside a tensor, checked and brought into the order of the product's task vectors.

    Raises:
        ValueError: If shapes, names or values do not fit.
    """
    if isinstance(updates, Tensor):
        checked = check_updates(updates, poe.update_names)
        factors = None if low_rank is None else _check_factors(low_rank, checked)
        return Batch(poe, checked, factors, tuple(map(str, range(len(checked)))))
    modules: Sequence[NamedUpdates] = updates if isinstance(updates, Sequence) else (updates,)
    if low_rank is not None:
        raise ValueError(f"`low_rank=...` beside {modules[0].name!r}: a module brings its own factors. Leave them out.")
    names = tuple(module.name for module in modules)
    ordered = [(module, _order(poe, module)) for module in modules]
    stacked = torch.stack([module.updates[order] for module, order in ordered])
    checked = check_updates(stacked, poe.update_names, names)
    left, right = (
        [module.low_rank[side][order] for module, order in ordered if module.low_rank is not None] for side in (0, 1)
    )
    factors = None
    if len(left) == len(modules) and len({each.shape for each in left}) == 1:  # of equal rank
        factors = _check_factors((torch.stack(left), torch.stack(right)), checked)
    return Batch(poe.for_modules(names), checked, factors, names)


def _order(poe: ProductOfExperts, module: NamedUpdates) -> list[int]:
    missing = [name for name in poe.update_names if name not in module.names]
    if missing:
        raise ValueError(
            f"module {module.name!r}: the product is about {missing[0]!r}, but the task vectors are "
            f"{', '.join(module.names)}. Give the experts these names, or set `update=`."
        )
    return [module.names.index(name) for name in poe.update_names]


def check_updates(updates: Tensor, names: Sequence[str], modules: Sequence[str] | None = None) -> Tensor:
    """Updates as ``(M, N, d_out, d_in)`` in a dtype to compute in; errors name the modules if they have names.

    Raises:
        ValueError: If the shape does not fit ``names``, or a value is not finite.
    """
    if updates.ndim == 3:
        updates = updates.unsqueeze(0)
    if updates.ndim != 4 or updates.shape[1] != len(names):
        raise ValueError(
            f"`updates` has shape {tuple(updates.shape)}, but the product is about {len(names)} task vectors "
            f"({', '.join(names)}). Give (N, d_out, d_in) or (M, N, d_out, d_in) with N = {len(names)}."
        )
    if not updates.is_floating_point():
        raise ValueError(f"`updates` are {updates.dtype}. Give floating-point updates, W_i - W_0.")
    if updates.dtype not in (torch.float32, torch.float64):
        updates = updates.float()
    if updates.numel() and not all(map(math.isfinite, updates.aminmax())):
        finite = torch.isfinite(updates).flatten(2).all(-1)
        module, expert = (~finite).nonzero()[0].tolist()
        where = module_label(modules or [], module)
        raise ValueError(
            f"`updates` of {names[expert]!r} ({where}) has NaN or infinite values. "
            "Leave the expert out, or look at the checkpoint it came from."
        )
    return updates


def _check_factors(low_rank: tuple[Tensor, Tensor], updates: Tensor) -> tuple[Tensor, Tensor]:
    left, right = (factor.unsqueeze(0) if factor.ndim == 3 else factor for factor in low_rank)
    modules, num_updates, d_out, d_in = updates.shape
    rank = left.shape[-1]
    if tuple(left.shape) != (modules, num_updates, d_out, rank) or right.shape != (modules, num_updates, rank, d_in):
        raise ValueError(
            f"`low_rank` has shapes {tuple(left.shape)} and {tuple(right.shape)}, which do not multiply to the "
            f"updates' {tuple(updates.shape)}. Give (M, N, d_out, r) and (M, N, r, d_in)."
        )
    return left.to(updates), right.to(updates)


def above_rounding(experts: Sequence[Expert], mean_curvatures: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Mean curvatures ``(M,)`` of the experts, zero where ``P_i`` is rounding beside those of its map's others.

    Norms are squares, so rounding of updates of a dtype is ``eps^2`` of the largest. It is judged where the updates
    are at hand, so that an expert drops out of Full and of Span coordinates, which are in float64, alike.
    """
    curvatures = torch.stack(list(mean_curvatures), -1)
    largest = torch.stack([curvatures[..., group].amax(-1) for group in same_map(experts)], -1)
    told = curvatures > torch.finfo(dtype).eps ** 2 * largest
    return list(torch.where(told, curvatures, 0.0).unbind(-1))


def same_map(experts: Sequence[Expert]) -> list[list[int]]:
    """For every expert the experts with the same residual map, whose residuals have the same units."""
    return [[j for j, other in enumerate(experts) if other.residual_map == e.residual_map] for e in experts]


def center_of(anchor: Anchor, updates: Tensor, low_rank: tuple[Tensor, Tensor] | None = None) -> Tensor | None:
    """The anchor's centre as ``(M, d_out, d_in)``, or None for zero; a merging method makes use of adapters' factors.

    Raises:
        ValueError: If the centre does not have the shape of the updates.
    """
    center = anchor.center
    if center is None:
        return None
    if not isinstance(center, Tensor):
        center = center(updates, low_rank) if isinstance(center, NamedCenter) else center(updates)
    center = center.to(updates)
    if center.ndim == 2:
        center = center.unsqueeze(0)
    if not bool(center.isfinite().all()):
        raise ValueError("`Anchor(center=...)` has NaN or infinite values. Look at where it comes from.")
    expected = (updates.shape[0], *updates.shape[2:])
    if tuple(center.shape) != expected:
        raise ValueError(
            f"`Anchor(center=...)` has shape {tuple(center.shape)}, but the merged updates have {expected}. "
            "Give one centre per module of the batch, or a function of the updates."
        )
    return center

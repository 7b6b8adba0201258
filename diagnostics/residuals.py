r"""What is left of every expert's wish at a merge: residuals of any merged checkpoint against any experts.

An expert's squared residual is ``q = |L (Z - U)|^2`` with ``P = L^T L``. Under a Gram map it falls apart into the rows
(``InputGram``, ``Activation``) or columns (``OutputGram``) of the merged update, ``q = sum_j |r_j|^2``; ``Directional``
is one number. A part's *signed* residual is its component along the expert's own part ``u_j = (L U)_j``,

    signed_j = <r_j, u_j> / |u_j|,

between plus and minus the part's length: negative where the merge falls short of the expert, positive where it
overshoots, and ``<Z - U, U>`` under ``Directional``. Fits of tails take these. Real merges shrink, so that they lie
around an offset below zero, which ``diagnostics.tails.pooled_tails`` takes out group by group.

Merges may come from anywhere: a folder, a file, a state dict, another tool's output. One module is in memory at a time.

>>> from poe_models.residual_maps import Directional
>>> base, one, two = ({"fc.weight": torch.tensor(w)} for w in ([[0.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]))
>>> vectors = TaskVectors(base, {"one": one, "two": two})
>>> found = residuals({"fc.weight": torch.tensor([[0.5, 0.5]])}, vectors, Directional())
>>> [(entry.expert, entry.signed.tolist()) for entry in found.entries]
[('one', [-0.5]), ('two', [-0.5])]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from diagnostics.residual_sets import ExpertResiduals, Residuals, Unit
from inference.inputs import unpack
from poe_models.energies import Gaussian
from poe_models.experts import Anchor, ProductOfExperts
from poe_models.operators import Gram, Operator, RankOne
from poe_models.posterior import BoundExpert, full_posterior
from poe_models.residual_maps import ResidualMap
from poe_models.weights.loading import open_checkpoint, same_weights
from poe_models.weights.task_vectors import ModuleUpdates, Source, TaskVectors

__all__ = ["ExpertResiduals", "Experts", "Residuals", "Unit", "module_residuals", "residuals"]

Experts = ResidualMap | ProductOfExperts
"""Who measures: a residual map for every task vector, at the scale ``q(0)``, or a product of experts."""


def residuals(
    merged: Source,
    task_vectors: TaskVectors,
    experts: Experts | Callable[[str], Experts],
    *,
    scaling: float | Callable[[str], float] = 1.0,
) -> Residuals:
    """Residuals of a merged checkpoint, one tensor at a time.

    A merge that was saved in half precision has its rounding in ``Z``, too: compare residuals with that, where updates
    are small.

    Args:
        merged: A folder, a file, a state dict or an open checkpoint; its tensors are those of the base.
        task_vectors: Base and experts; their rules say what is a module.
        experts: Who measures, or a function from the tensor's name. Energies matter for the effective weights only.
        scaling: ``λ`` in ``W_merged = W_0 + λ Z``, or a function from the tensor's name.

    Returns:
        The residuals of all modules that are merged.

    Raises:
        ValueError: If nothing is merged, or λ is not a positive finite number.
    """
    found = list(_streamed(merged, task_vectors, experts, scaling))
    if not found:
        raise ValueError(
            "`residuals(...)`: the rules merge no tensor, so that there are no modules. Look at `task_vectors."
            "treatments`."
        )
    return Residuals(tuple(found))


def module_residuals(
    merged: Tensor, updates: ModuleUpdates, experts: Experts, *, scaling: float = 1.0
) -> tuple[ExpertResiduals, ...]:
    """Residuals of one module that is in memory.

    Args:
        merged: The update times λ, ``W_merged - W_0``, ``(d_out, d_in)``.
        updates: The experts' updates.
        experts: Who measures.
        scaling: ``λ``.

    Returns:
        One per expert.

    Raises:
        ValueError: If shapes do not fit, a value is not finite, or λ is not a positive finite number.

    >>> from poe_models.residual_maps import Directional
    >>> one = ModuleUpdates("fc", "fc", ("one",), torch.zeros(2, 2), torch.eye(2).unsqueeze(0))
    >>> module_residuals(torch.zeros(2, 2), one, Directional())[0].signed
    array([-2.])
    """
    if not 0 < scaling < math.inf:
        raise ValueError(f"`residuals(scaling={scaling})`: λ must be a positive finite number.")
    if merged.shape != updates.base.shape or not bool(merged.isfinite().all()):
        raise ValueError(
            f"`residuals(...)`: the merged update of {updates.name!r} is {tuple(merged.shape)}, the module "
            f"{tuple(updates.base.shape)}, and every value must be finite. Give `W_merged - W_0`."
        )
    if isinstance(experts, ResidualMap):
        experts = ProductOfExperts.of(updates.names, experts, Gaussian())
    poe, stacked, low_rank = unpack(replace(experts, anchor=Anchor()), updates, None)
    factors = None if low_rank is None else (low_rank[0].unsqueeze(0), low_rank[1].unsqueeze(0))
    posterior = full_posterior(poe, stacked.unsqueeze(0), factors)
    z = (merged.double() / scaling).to(posterior.dtype).unsqueeze(0)
    return tuple(_of_expert(expert, z, updates) for expert in posterior.experts)


def _streamed(
    merged: Source,
    task_vectors: TaskVectors,
    experts: Experts | Callable[[str], Experts],
    scaling: float | Callable[[str], float],
) -> Iterator[ExpertResiduals]:
    merge = _as_expert(merged, task_vectors)
    for tensor, treatment in task_vectors.treatments.items():
        if treatment.action == "merge":
            here = experts if isinstance(experts, ResidualMap | ProductOfExperts) else experts(tensor)
            factor = scaling(tensor) if callable(scaling) else scaling
            for module, z in _pairs(task_vectors, merge, tensor):
                yield from module_residuals(z, module, here, scaling=factor)


def _as_expert(merged: Source, task_vectors: TaskVectors) -> TaskVectors | None:
    """The merge as a fine-tune of the base, which it is read and checked like; None if it is the base itself."""
    checkpoint = open_checkpoint(merged, base=task_vectors.base)
    if same_weights(checkpoint, task_vectors.base):
        return None
    return TaskVectors(
        task_vectors.base, {"merged": checkpoint}, task_vectors.rules, task_vectors.dtype, task_vectors.device
    )


def _pairs(task_vectors: TaskVectors, merge: TaskVectors | None, tensor: str) -> Iterable[tuple[ModuleUpdates, Tensor]]:
    """Modules of a tensor and what the merge added to them; an adapter that leaves the tensor alone added nothing."""
    modules = task_vectors.modules(tensor)
    if merge is None or merge.treatments[tensor].action != "merge":
        return [(module, torch.zeros_like(module.updates[0])) for module in modules]
    return [(m, added.updates[0]) for m, added in zip(modules, merge.modules(tensor), strict=True)]


def _of_expert(expert: BoundExpert, z: Tensor, module: ModuleUpdates) -> ExpertResiduals:
    root = expert.operator.root(z - expert.update).squeeze(0).double()
    own = expert.operator.root(expert.update).squeeze(0).double()
    along, axis = _parts(expert.operator)
    lengths, own_lengths = root.square().sum(axis).sqrt(), own.square().sum(axis).sqrt()
    signed = torch.where(own_lengths > 0, (root * own).sum(axis) / own_lengths, math.nan)
    q = expert.residual(z)
    relative = expert.weight(q) / expert.weight(torch.zeros_like(q))
    return ExpertResiduals(
        module=module.name,
        tensor=module.tensor,
        expert=expert.name,
        along=along,
        lengths=lengths.cpu().numpy(),
        signed=signed.cpu().numpy(),
        own=own_lengths.cpu().numpy(),
        scale=math.sqrt(float(expert.scale_squared)),
        weight=float(relative),
        active=bool(expert.active),
    )


def _parts(operator: Operator) -> tuple[Literal["whole", "rows", "columns"], int]:
    """What a residual falls apart into, and the dimension of ``L x`` to sum over."""
    if isinstance(operator, RankOne):
        return "whole", -1
    if isinstance(operator, Gram) and operator.side == "left":
        return "columns", -2
    return "rows", -1

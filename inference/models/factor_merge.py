"""Merges of adapters in factor space: the merged update as two factors, and no matrix of the module's size.

With all updates ``U_i = B_i A_i``, what a Gram map, ``Directional`` or ``Identity`` sees of ``Z`` is the same in
orthonormal bases of the stacked ``B`` and ``A``; outside of them only the anchor acts, and holds ``Z`` at zero. So the
MAP is ``Q_B Z' Q_A`` with ``Z'`` the MAP of the updates' coordinates, at most ``N r x N r``, and has rank ``N r`` at
most. It is not so for maps and centres that know the axes of the matrix (Fisher, Activation, TIES), or a centre of
full rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from inference.models.method_design import AnyDesign, MethodDesign
from inference.models.plan import TensorPlan
from poe_models.methods import Average, ModuleBatch, TaskArithmetic
from poe_models.operators import Gram, Operator, ScaledIdentity
from poe_models.residual_maps import Directional, Identity, InputGram, OutputGram, ResidualMap
from poe_models.weights.factors import FactorSpace
from poe_models.weights.task_vectors import TaskVectors, block_names

__all__ = ["averaged_factors", "merged_factors", "refuse_axes"]

_MAPS = (Identity, Directional, OutputGram, InputGram)
_METHODS = (Average, TaskArithmetic)
Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class InFactorSpace(ResidualMap):
    """A residual map on updates in orthonormal bases of a subspace, with the curvature and rank of the whole.

    Attributes:
        residual_map: The map.
        whole: Shape ``(d_out, d_in)`` of the updates.
    """

    residual_map: ResidualMap
    whole: tuple[int, int]

    @override
    def operator(self, update: Tensor) -> Operator:
        found = self.residual_map.operator(update)
        if isinstance(found, Gram):
            return replace(found, whole=self.whole)
        return replace(found, shape=self.whole) if isinstance(found, ScaledIdentity) else found


def refuse_axes(tensor: str, design: AnyDesign) -> None:
    """Refuse a design whose merge of adapters is no adapter.

    Raises:
        ValueError: If it is one; names what makes it so.
    """
    if isinstance(design, MethodDesign):
        wrong = None if isinstance(design.method, _METHODS) else repr(design.method)
    else:
        maps = [e.residual_map for e in design.poe.experts if type(e.residual_map) not in _MAPS]
        center = design.poe.anchor.center
        centered = design.center is not None or not (center is None or isinstance(center, _METHODS))
        anchor = design.center.source if design.center is not None else repr(center)
        wrong = repr(maps[0]) if maps else f"an anchor at {anchor}" if centered else None
    if wrong is not None:
        known = ", ".join(each.__name__ for each in (*_MAPS, *_METHODS))
        raise ValueError(
            f"tensor {tensor!r}: with {wrong} the merge of adapters is not of their rank, and no adapter. Write a "
            f"whole model (`output: model`), or use {known} with the anchor at zero or at one of the last two."
        )


def merged_factors(task_vectors: TaskVectors, tensor: TensorPlan) -> tuple[Factors, list[dict[str, Any]]] | None:
    """The merged update ``λ Z`` of one tensor, as it is stored, as two factors, with a record for each matrix.

    Args:
        task_vectors: Base and experts, all of them adapters.
        tensor: A tensor that is merged.

    Returns:
        Factors ``(rows, k)`` and ``(k, columns)`` float64, ``k <= N r``, and records; None if an adapter replaces the
        tensor as a whole.

    Raises:
        ValueError: If the design's merge is no adapter, or cannot be solved.
    """
    view, design = tensor.treatment.view, tensor.design
    assert view is not None
    assert design is not None
    refuse_axes(tensor.name, design)
    given = task_vectors.low_rank(tensor.name)
    known = [pair for pair in given if pair is not None]
    if len(known) < len(given):
        return None
    parts, records = [], []
    for label, pair in zip(block_names(tensor.name, len(known)), known, strict=True):
        space = FactorSpace.of(*pair)
        merged, record = _solved(space, design, task_vectors.names, label)
        parts.append(space.left @ merged)
        records.append(record)
    left, right = torch.cat(parts), space.right  # row blocks of one tensor have their right factors in common
    return ((right.mT, left.mT) if view.transpose else (left, right)), records


def averaged_factors(task_vectors: TaskVectors, tensor: TensorPlan) -> Factors | None:
    """The averaged update ``λ Σ ω_i B_i A_i / Σ ω_i`` of one tensor as two factors; otherwise as ``merged_factors``."""
    average, (pair,) = tensor.average, task_vectors.low_rank(tensor.name)
    assert average is not None
    if pair is None:
        return None
    left, right = (each.double() for each in pair)
    weights = torch.tensor(average.importance, dtype=torch.float64, device=left.device)
    weights = average.scaling * weights / (weights.sum() or 1.0)
    return (left * weights[:, None, None]).movedim(0, 1).flatten(1), right.flatten(0, 1)


def _solved(space: FactorSpace, design: AnyDesign, names: tuple[str, ...], label: str) -> tuple[Tensor, dict[str, Any]]:
    """``λ Z'`` in the bases of the factors, and its record."""
    order = design.order(names)
    cores = space.cores[order].unsqueeze(0)
    if isinstance(design, MethodDesign):
        found = design.solve(ModuleBatch.of(cores, [label], names, None))
        return _recorded(found, design.scaling, label)
    whole = (int(space.left.shape[0]), int(space.right.shape[1]))
    experts = tuple(replace(e, residual_map=InFactorSpace(e.residual_map, whole)) for e in design.poe.experts)
    inside = replace(design, poe=replace(design.poe, experts=experts))
    return _recorded(inside.for_modules([label]).solve(cores), design.scaling, label)


def _recorded(solution: Any, scaling: float, label: str) -> tuple[Tensor, dict[str, Any]]:
    kept = solution.info.retention.scaled(scaling)
    record = {"module": label, "status": solution.status[0].name.lower(), **solution.info.record(0)}
    return scaling * solution.value[0], {**record, "retention": kept.record(0)}

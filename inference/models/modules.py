"""Modules of a whole model with everything that their posteriors need: updates, product of experts, centre."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from inference.gradient_check import judged
from inference.map import fixed_point
from inference.models.design import Design, require_alike
from inference.models.one_row import require_matrices
from inference.reweighting import SolverOptions
from poe_models.experts import ProductOfExperts
from poe_models.posterior import Posterior
from poe_models.printing import Brief
from poe_models.sums import sum_of_squares
from poe_models.updates import center_of
from poe_models.weights.loading import CheckpointError
from poe_models.weights.task_vectors import ModuleUpdates, TaskVectors, block_names


@dataclass(frozen=True, eq=False, repr=False)
class Module(Brief):
    """A matrix of a checkpoint with its product of experts and the anchor's centre.

    Attributes:
        name: Its name, as ``ModuleUpdates`` has it.
        poe: The design's product; a checkpoint as the anchor's centre is a tensor in it.
        base: ``W_0``, ``(d_out, d_in)``.
        updates: ``(N, d_out, d_in)`` in the order of ``poe.update_names``.
        low_rank: Factors of the updates in the same order, if all are adapters'.
        options: Settings of the solver, for the MAP.
        known_mode: The MAP in Full coordinates, if it has been solved for before.
    """

    name: str
    poe: ProductOfExperts
    base: Tensor
    updates: Tensor
    low_rank: tuple[Tensor, Tensor] | None
    options: SolverOptions = field(default_factory=SolverOptions)
    known_mode: Tensor | None = None

    @cached_property
    def mode(self) -> Tensor:
        """The MAP in Full coordinates, ``(d_out, d_in)``; it is the same at every temperature."""
        if self.known_mode is not None:
            return self.known_mode
        solution = judged(self.posterior, fixed_point(self.posterior, **vars(self.options)))
        if not solution.status[0].converged:
            warnings.warn(f"the MAP of {self.name!r}: {solution.status[0]}", stacklevel=2)
        return solution.value[0]

    @property
    def center(self) -> Tensor | None:
        """``Z_0``, ``(d_out, d_in)``; None for zero."""
        center = center_of(self.poe.anchor, self.updates.unsqueeze(0), self._factors)
        return None if center is None else center.squeeze(0)

    @property
    def squared_norms(self) -> Tensor:
        """``|B_j|^2`` of the updates and the centre, ``(N + 1,)`` float64 on the CPU; draws are checked by it."""
        center = self.center
        last = self.updates.new_zeros((), dtype=torch.float64) if center is None else sum_of_squares(center)
        return torch.cat([sum_of_squares(self.updates), last.reshape(1)]).cpu()

    @property
    def posterior(self) -> Posterior:
        """The posterior of its merged update, a batch of one."""
        bound = self.poe.bind(self.updates.unsqueeze(0), low_rank=self._factors)
        return replace(bound, modules=(self.name,))

    @property
    def _factors(self) -> tuple[Tensor, Tensor] | None:
        return None if self.low_rank is None else (self.low_rank[0].unsqueeze(0), self.low_rank[1].unsqueeze(0))


def merged_update(module: Module, design: Design) -> Tensor:
    """Merged update of a module, ``(d_out, d_in)``: the MAP in the coordinates of its design."""
    if design.coordinates == "full":
        return module.mode
    solution = replace(design, poe=module.poe, center=None).solve(module.updates.unsqueeze(0))
    if not solution.status[0].converged:
        warnings.warn(f"the MAP of {module.name!r}: {solution.status[0]}", stacklevel=2)
    return solution.value[0]


def read_modules(task_vectors: TaskVectors, tensor: str, design: Design) -> list[Module]:
    """Read one merged tensor of every model.

    Args:
        task_vectors: Base and experts.
        tensor: Name of the tensor.
        design: Its design.

    Returns:
        Its matrices.

    Raises:
        CheckpointError: If a value is not finite, or the anchor's checkpoint lacks the tensor.
        ValueError: If the product is about task vectors that are not there.
    """
    order = [task_vectors.names.index(name) for name in checked_names(task_vectors, tensor, design)]
    centers = anchor_blocks(task_vectors, tensor, design)
    modules = []
    for index, read in enumerate(task_vectors.modules(tensor)):
        each = selected(read, order)
        anchor = design.poe.anchor
        if centers:
            anchor = replace(anchor, center=centers[index] - each.base)
        poe = replace(design.poe, anchor=anchor).for_modules([each.name])
        modules.append(Module(each.name, poe, each.base, each.updates, each.low_rank, design.options))
    return modules


def selected(module: ModuleUpdates, order: Sequence[int]) -> ModuleUpdates:
    """A module with the task vectors at some positions only, in their order; itself if these are all."""
    places = list(order)
    if places == list(range(len(module.names))):
        return module
    low_rank = module.low_rank
    return replace(
        module,
        names=tuple(module.names[place] for place in places),
        updates=module.updates[places],
        low_rank=None if low_rank is None else (low_rank[0][places], low_rank[1][places]),
    )


def checked_names(task_vectors: TaskVectors, tensor: str, design: Design) -> tuple[str, ...]:
    """Names of the task vectors that the design of a tensor is about.

    Raises:
        ValueError: If there are none, some are not there, or the design needs matrices and the tensor is one row.
    """
    view, names = task_vectors.treatments[tensor].view, design.poe.update_names
    if view is not None:
        require_matrices(tensor, view, design)
    missing = [name for name in names if name not in task_vectors.names]
    if missing or not names:
        what = f"{missing[0]!r}" if missing else "no task vector (factor experts only)"
        raise ValueError(
            f"the design of tensor {tensor!r} is about {what}; the task vectors are {', '.join(task_vectors.names)}. "
            "Give the experts these names, or set `update=`."
        )
    return names


def module_names(task_vectors: TaskVectors, tensor: str) -> list[str]:
    """Names of the matrices of one tensor, from headers; empty if it is not merged."""
    view = task_vectors.treatments[tensor].view
    if view is None:
        return []
    return block_names(tensor, len(view.block_shapes(task_vectors.base.tensors[tensor].shape)))


def merged_tensors(task_vectors: TaskVectors) -> list[str]:
    """Names of the tensors that are merged, not averaged or kept.

    Raises:
        ValueError: If there is none.
    """
    merged = [name for name, treatment in task_vectors.treatments.items() if treatment.action == "merge"]
    if not merged:
        raise ValueError(
            "no tensor of the base is merged, so there is no module. `poe-merge plan` (or `TaskVectors.treatments`) "
            "says what happens to each and why; a rule can merge it."
        )
    return merged


def feed(digest: Any, name: str, *tensors: Tensor | None) -> None:
    """Add a module's name and tensors to a checksum."""
    for tensor in tensors:
        if tensor is not None:
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())


def anchor_blocks(task_vectors: TaskVectors, tensor: str, design: Design) -> list[Tensor]:
    """Read the matrices ``(d_out, d_in)`` of a tensor of the anchor's checkpoint; none if the centre is no checkpoint.

    Raises:
        CheckpointError: If the checkpoint lacks the tensor, or it is not finite.
    """
    view = task_vectors.treatments[tensor].view
    if design.center is None or view is None:
        return []
    require_alike(design.center, "anchor", task_vectors.base, tensor)
    weights = design.center.read(tensor).to(task_vectors.dtype)
    if not bool(weights.isfinite().all()):
        raise CheckpointError(
            f"anchor {design.center.source}: tensor {tensor!r} has values that are NaN or infinite. Give another "
            "checkpoint."
        )
    return [block.to(task_vectors.device) for block in view.split(weights)]

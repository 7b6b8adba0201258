"""What merging methods make of a module in the members of an ensemble, at one seed after another."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from inference._digest import Silent
from inference.method_design import AnyDesign, MethodDesign, prepare_designs
from poe_models.anchors import ModuleBatch
from poe_models.task_vectors import ModuleUpdates, TaskVectors

_ReadyDesigns = Callable[[str], AnyDesign]


class MethodMembers:
    """Merges modules by the methods of a table of designs, which see the whole model once for every seed.

    Args:
        task_vectors: Base and experts.
        design_of: The design of each tensor.
    """

    def __init__(self, task_vectors: TaskVectors, design_of: Callable[[str], AnyDesign]) -> None:
        self._task_vectors, self._design_of = task_vectors, design_of
        self._own: _ReadyDesigns | None = None
        self._last: tuple[int, _ReadyDesigns] | None = None

    def weights(self, module: ModuleUpdates, seed: int | None) -> Tensor:
        """``W_0 + λ Z`` of one module.

        Args:
            module: Its updates.
            seed: Of the member; None for the method's own.

        Returns:
            The merged matrix, ``(d_out, d_in)``.
        """
        design = (self._at_own_seeds() if seed is None else self._at(seed))(module.tensor)
        assert isinstance(design, MethodDesign)
        z = design.solve(ModuleBatch.of_module(module)).value[0]
        return torch.add(module.base, z, alpha=design.scaling)

    def _at_own_seeds(self) -> _ReadyDesigns:
        if self._own is None:
            self._own = self._ready(self._design_of)
        return self._own

    def _at(self, seed: int) -> _ReadyDesigns:
        """Only the last seed's is kept: members are made one after another."""
        if self._last is None or self._last[0] != seed:
            self._last = None
            self._last = (seed, self._ready(lambda tensor: _at_seed(self._design_of(tensor), seed)))
        return self._last[1]

    def _ready(self, designs: _ReadyDesigns) -> _ReadyDesigns:
        return prepare_designs(self._task_vectors, designs, Silent())


def _at_seed(design: AnyDesign, seed: int) -> AnyDesign:
    return design.at_seed(seed) if isinstance(design, MethodDesign) else design

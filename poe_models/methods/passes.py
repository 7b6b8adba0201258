"""Modules as a method sees them when it looks at a whole model: at least one, and in a dtype to compute in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from poe_models.weights.task_vectors import ModuleUpdates, TaskVectors


def passes(method: str, modules: TaskVectors | Iterable[ModuleUpdates]) -> TaskVectors | Iterable[ModuleUpdates]:
    """The modules of a model, for any number of passes.

    Args:
        method: Name of the method, for messages.
        modules: What ``prepare`` was given.

    Returns:
        The task vectors as they are; other modules with half precision as float32, as ``MergingMethod.merge`` has them.

    Raises:
        ValueError: If the task vectors merge nothing.
    """
    if not isinstance(modules, TaskVectors):
        return _Passes(method, modules)
    if not modules.views:
        raise ValueError(_nothing(method))
    return modules


@dataclass(frozen=True)
class _Passes:
    """Modules that are not those of ``TaskVectors``."""

    method: str
    modules: Iterable[ModuleUpdates]

    def __iter__(self) -> Iterator[ModuleUpdates]:
        """Start a pass.

        Yields:
            Each module.

        Raises:
            ValueError: If there is none.
        """
        empty = True
        for module in self.modules:
            empty = False
            factors = module.low_rank
            low_rank = None if factors is None else (_computed(factors[0]), _computed(factors[1]))
            yield replace(module, updates=_computed(module.updates), low_rank=low_rank)
            del module, factors, low_rank  # memory is one module's, not two
        if empty:
            raise ValueError(_nothing(self.method))


def _computed(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _nothing(method: str) -> str:
    return f"`{method}.prepare(modules)`: there are no modules. Give those of the whole model."

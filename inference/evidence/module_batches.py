"""A whole model as batches of modules of equal shape, for methods that look at the updates of all modules."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from poe_models.experts import ProductOfExperts
from poe_models.module_names import left_out
from poe_models.printing import Brief
from poe_models.weights.task_vectors import ModuleUpdates

Updates = Tensor | ModuleUpdates | Iterable[ModuleUpdates]
"""``(N, d_out, d_in)`` or ``(M, N, d_out, d_in)`` in the order of ``poe.update_names``, one module, or many modules of
any shapes, for instance a :class:`~poe_models.weights.task_vectors.TaskVectors`."""

MOST_NUMBERS = 2**24
"""Numbers of a batch, at most, unless it is one module."""


@dataclass(frozen=True, eq=False, repr=False)
class UpdateBatch(Brief):
    """Updates of named modules of equal shape, as :meth:`~poe_models.experts.ProductOfExperts.bind` takes them."""

    names: tuple[str, ...]
    updates: Tensor | tuple[ModuleUpdates, ...]


def module_batches(updates: Updates, designs: Collection[ProductOfExperts]) -> Iterator[UpdateBatch]:
    """Group modules by shape, holding a limited number of them at a time.

    Of several modules those are left out, with a warning, that no update changes and about which one of the designs
    says nothing.

    Args:
        updates: The modules.
        designs: What they are batched for.

    Yields:
        Batches; modules of a tensor are named by their numbers.
    """
    if isinstance(updates, Tensor):
        batch = updates.unsqueeze(0) if updates.ndim == 3 else updates
        yield UpdateBatch(tuple(map(str, range(len(batch)))), batch)
        return
    waiting: dict[torch.Size, list[ModuleUpdates]] = defaultdict(list)
    alone, silent = isinstance(updates, ModuleUpdates), []
    for module in (updates,) if isinstance(updates, ModuleUpdates) else updates:
        if not alone and not bool(module.updates.any()) and any(bool(poe.bind(module).undetermined) for poe in designs):
            silent.append(module.name)
            continue
        group = waiting[module.updates.shape]
        group.append(module)
        if len(group) * module.updates.numel() >= MOST_NUMBERS:
            yield _batch(group)
            group.clear()
    for group in waiting.values():
        if group:
            yield _batch(group)
    if silent:
        warnings.warn(left_out(silent), stacklevel=3)


def _batch(modules: list[ModuleUpdates]) -> UpdateBatch:
    return UpdateBatch(tuple(module.name for module in modules), tuple(modules))

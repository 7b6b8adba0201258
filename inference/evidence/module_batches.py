"""A whole model as batches of modules of equal shape, for methods that look at the updates of all modules."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inference.inputs import unpack
from poe_models.experts import ProductOfExperts
from poe_models.posterior import Posterior, full_posterior
from poe_models.weights.task_vectors import ModuleUpdates

Updates = Tensor | ModuleUpdates | Iterable[ModuleUpdates]
"""``(N, d_out, d_in)`` or ``(M, N, d_out, d_in)`` in the order of ``poe.update_names``, one module, or many modules of
any shapes, for instance a :class:`~poe_models.weights.task_vectors.TaskVectors`."""

MOST_NUMBERS = 2**24
"""Numbers of a batch, at most, unless it is one module."""


@dataclass(frozen=True, eq=False)
class UpdateBatch:
    """Updates of ``M`` modules of equal shape.

    Attributes:
        names: of the modules.
        source: what was given.
    """

    names: tuple[str, ...]
    source: Tensor | tuple[ModuleUpdates, ...]

    def bind(self, poe: ProductOfExperts) -> Posterior:
        """The posterior of a design in Full coordinates.

        Args:
            poe: the design.
        """
        if isinstance(self.source, Tensor):
            return full_posterior(poe, self.source)
        unpacked = [unpack(poe, module, None) for module in self.source]
        factors = [each for _, _, each in unpacked if each is not None]
        low_rank = None
        if len(factors) == len(unpacked) and len({left.shape for left, _ in factors}) == 1:
            low_rank = torch.stack([left for left, _ in factors]), torch.stack([right for _, right in factors])
        updates = torch.stack([each for _, each, _ in unpacked])
        return full_posterior(poe.for_modules(self.names), updates, low_rank)


def module_batches(updates: Updates) -> Iterator[UpdateBatch]:
    """Group modules by shape, holding a limited number of them at a time.

    Args:
        updates: of one module, of a batch, or of many modules.

    Yields:
        Batches; modules of a tensor are named by their numbers.
    """
    if isinstance(updates, Tensor):
        batch = updates.unsqueeze(0) if updates.ndim == 3 else updates
        yield UpdateBatch(tuple(map(str, range(len(batch)))), batch)
        return
    waiting: dict[torch.Size, list[ModuleUpdates]] = defaultdict(list)
    for module in (updates,) if isinstance(updates, ModuleUpdates) else updates:
        group = waiting[module.updates.shape]
        group.append(module)
        if len(group) * module.updates.numel() >= MOST_NUMBERS:
            yield _batch(group)
            group.clear()
    for group in waiting.values():
        if group:
            yield _batch(group)


def _batch(modules: Sequence[ModuleUpdates]) -> UpdateBatch:
    return UpdateBatch(tuple(module.name for module in modules), tuple(modules))

"""What every solver and sampler takes: updates as a tensor, or one module of a checkpoint's task vectors."""

from __future__ import annotations

from torch import Tensor

from poe_models.experts import ProductOfExperts
from poe_models.weights.task_vectors import ModuleUpdates


def unpack(
    poe: ProductOfExperts, updates: Tensor | ModuleUpdates, low_rank: tuple[Tensor, Tensor] | None
) -> tuple[ProductOfExperts, Tensor, tuple[Tensor, Tensor] | None]:
    """The product in this module, updates, and low-rank factors if there are any, in the order of ``poe.update_names``.

    Args:
        poe: the design.
        updates: a tensor in that order already, or a module with names.
        low_rank: factors beside a tensor.

    Returns:
        The product, with residual maps on given statistics bound to the module's; updates ``(..., N, d_out, d_in)``;
        factors or None.

    Raises:
        ValueError: the product is about a task vector that the module does not have, or factors are given twice.
    """
    if isinstance(updates, Tensor):
        return poe, updates, low_rank
    if low_rank is not None:
        raise ValueError(f"`low_rank=...` beside {updates.name!r}: a module brings its own factors. Leave them out.")
    missing = [name for name in poe.update_names if name not in updates.names]
    if missing:
        raise ValueError(
            f"module {updates.name!r}: the product is about {missing[0]!r}, but the task vectors are "
            f"{', '.join(updates.names)}. Give the experts these names, or set `update=`."
        )
    index = [updates.names.index(name) for name in poe.update_names]
    factors = updates.low_rank
    here = poe.for_modules([updates.name])
    return here, updates.updates[index], None if factors is None else (factors[0][index], factors[1][index])

"""Merge a model into a state dict, without a folder."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from inference.models.digest import Silent
from inference.models.method_design import AnyDesigns, as_any_function
from inference.models.plan import BATCH_BYTES, plan
from inference.models.preparing import prepare_designs
from inference.models.tensor_batches import merge_batch
from inference.retention import concerns, totals_of
from poe_models.weights.task_vectors import TaskVectors


def merge(
    task_vectors: TaskVectors,
    design: AnyDesigns,
    *,
    out_dtype: torch.dtype | None = None,
    batch_bytes: int = BATCH_BYTES,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Merge a model in memory: the tensors that ``merge_checkpoint`` with the same arguments would write.

    Args:
        task_vectors: Base and experts.
        design: One product, method or design for all tensors, or a function from the name of a merged tensor.
        out_dtype: Dtype of floating tensors in the result; the base's own by default.
        batch_bytes: Byte budget of the updates that are solved as one batch.
        seed: Of torch's generators while a batch is solved, for energies and centres that draw.

    Returns:
        The merged tensors by name on the CPU, in the order of the base, for ``load_state_dict``; the names of a tied
        tensor have the same one.

    Warns:
        UserWarning: If the merge is little more than the base, or than one of its experts.

    Raises:
        CheckpointError: If an input cannot be read, has values that are not finite, or is a copy of the base.
        ValueError: If the design cannot be solved.

    >>> base, tuned = {"fc.weight": torch.zeros(2, 2)}, {"fc.weight": torch.eye(2)}
    >>> from poe_models import TaskArithmetic
    >>> merge(TaskVectors(base, {"tuned": tuned}), TaskArithmetic(0.5))
    {'fc.weight': tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]])}
    """
    planned = plan(task_vectors, design, out_dtype=out_dtype, batch_bytes=batch_bytes)
    task_vectors.refuse_copies()
    if any(each.method is not None and not each.method.ready for each in planned.designs):
        ready = prepare_designs(task_vectors, as_any_function(design), Silent())
        planned = plan(task_vectors, ready, out_dtype=out_dtype, batch_bytes=batch_bytes)
    made: dict[str, Tensor] = {}
    records: list[dict[str, Any]] = []
    for batch in planned.batches:
        kept = batch.tensors[0].treatment.action == "base"  # these may be the caller's own memory
        tensors, done = merge_batch(task_vectors, batch, planned.designs, seed)
        made |= {name: tensor.clone() if kept else tensor for name, tensor in tensors.items()}
        records += done
    for text in concerns(totals_of({"tensors": records})):
        warnings.warn(text, stacklevel=2)
    names = [(name, tensor) for tensor in task_vectors.base.tensors for name in task_vectors.base.tied_names(tensor)]
    return {name: made[tensor] for name, tensor in names}

"""Merging within a budget of memory: batches as large as it allows, or a refusal that says what it would take."""

from __future__ import annotations

import torch

from inference.models.method_design import AnyDesigns
from inference.models.plan import BATCH_BYTES, Plan, plan
from poe_models.printing import size_text
from poe_models.weights.task_vectors import TaskVectors

INTERPRETER = (480 if torch.version.cuda else 320) * 2**20
"""Bytes beside tensors: Python with its libraries, 190 MiB, or 320 where torch is built for CUDA, and freed memory that
the C library holds on to. A number for each build rather than a measured one, so that a resumed merge has the same
batches."""
WORKSPACE = 40 * 2**20
"""Bytes of a GPU's memory that cuBLAS keeps for itself, 32 MiB on Hopper, and what torch rounds up."""
SLACK = 1.1
"""Peak of tensors beside the predicted one."""


class BudgetError(ValueError):
    """A budget of memory that is too small for a merge; the message says what it would take."""


def memory_of(planned: Plan, device: torch.device) -> int:
    """Most memory that a merge takes: of the process on the CPU, of the device elsewhere."""
    return int(SLACK * planned.peak_bytes) + (INTERPRETER if device.type == "cpu" else WORKSPACE)


def batch_bytes_within(
    budget: int,
    task_vectors: TaskVectors,
    design: AnyDesigns,
    *,
    out_dtype: torch.dtype | None = None,
    batch_bytes: int = BATCH_BYTES,
) -> int:
    """Find the largest batches that a budget of memory allows; nothing but headers is read.

    Args:
        budget: Bytes that the merge may take.
        task_vectors: Base and experts.
        design: What they are merged with, as for :func:`~inference.models.plan.plan`.
        out_dtype: Dtype of floating tensors in the output; the base's own by default.
        batch_bytes: Most bytes of the updates that are solved as one batch.

    Returns:
        ``batch_bytes``, halved as often as it takes.

    Raises:
        BudgetError: If even one tensor at a time takes more.
    """

    def planned(size: int) -> Plan:
        return plan(task_vectors, design, out_dtype=out_dtype, batch_bytes=size)

    halvings = [batch_bytes >> count for count in range(batch_bytes.bit_length())]
    low, high = 0, len(halvings) - 1
    least = planned(halvings[high])
    if memory_of(least, task_vectors.device) > budget:
        raise BudgetError(_refusal(budget, least, task_vectors.device))
    while low < high:  # smaller batches never take more
        middle = (low + high) // 2
        if memory_of(planned(halvings[middle]), task_vectors.device) <= budget:
            high = middle
        else:
            low = middle + 1
    return halvings[high]


def _refusal(budget: int, least: Plan, device: torch.device) -> str:
    largest = max(least.batches, key=lambda batch: batch.peak_bytes)
    needed = memory_of(least, device)
    beside = (
        f", {size_text(INTERPRETER)} of it for Python and its libraries"
        if device.type == "cpu"
        else f", {size_text(WORKSPACE)} of it for cuBLAS"
    )
    return (
        f"`memory_budget`: {size_text(budget)}, but merging one tensor at a time takes {size_text(needed)} for "
        f"{largest.tensors[0].name!r}{beside}. Give --memory-budget {-(-needed // 10**6)}MB, average that tensor by a "
        "rule ({match: NAME, action: average}), or take a residual map with smaller operators (Directional)."
    )

"""Predicted peak memory of a batch of modules, from shapes alone.

Counted in copies of one merged matrix, as the solver allocates them: each Gram expert keeps its Gram matrix, its pull,
force and curvature terms, on the side compressed to the directions in which anything happens. A test holds the
prediction against measured memory. Adapters, which compress further, are predicted as if they had full rank: an upper
bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from inference.models.design import Design
from inference.models.method_design import AnyDesign, MethodDesign
from poe_models.printing import size_text
from poe_models.residual_maps import (
    Activation,
    Directional,
    Fisher,
    Identity,
    InputGram,
    Mixed,
    OutputGram,
    ResidualMap,
)

_TEMPORARIES = 8  # of the iteration: candidate, gradient, and sums of squares in float64, which count double
TOGETHER = 2 * 2**20
"""Bytes of updates that a processor solves for together; more would leave its cache between two steps."""


class OutOfMemory(RuntimeError):
    """There was not enough memory; the message says for what, how much it takes, and what helps."""


@contextmanager
def memory_errors(tensors: Sequence[str], needed: int, device: torch.device) -> Iterator[None]:
    """Within the block running out of memory raises ``OutOfMemory``, which says what was needed and what helps.

    Args:
        tensors: Names of the tensors that are worked on together.
        needed: Predicted bytes.
        device: Device that they are worked on.

    Yields:
        Nothing.

    Raises:
        OutOfMemory: If there is not enough.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        more = f" and {len(tensors) - 1} more tensors" if len(tensors) > 1 else ""
        text = str(error).rpartition("DefaultCPUAllocator: ")[2]  # which follows a place in torch's sources
        smaller = "Lower --batch-bytes (`batch_bytes`)" if more else "Free memory, or take a larger machine"
        elsewhere = "" if device.type == "cpu" else ", or --device cpu"
        raise OutOfMemory(
            f"out of memory on {device} at {tensors[0]!r}{more}, which take {size_text(needed)} "
            f"({text.partition('. ')[0] or type(error).__name__}). {smaller}{elsewhere}; what is finished is kept."
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of Python or torch is about a lack of memory."""
    text = str(error).lower()
    said = ("out of memory", "can't allocate memory", "_status_alloc_failed")  # the last by CUDA's libraries
    return isinstance(error, MemoryError) or any(each in text for each in said)


def solve_floats(design: Design, experts: int, shape: tuple[int, int]) -> int:
    """Numbers in the compute dtype that solving one module holds at its peak, the given updates not counted."""
    d_out, d_in = shape
    entries = d_out * d_in
    maps = [expert.residual_map for expert in design.poe.experts]
    if design.coordinates == "span":
        return (3 * experts + 6) * entries
    if any(isinstance(each, Fisher) for each in maps):
        return (4 * len(maps) + 7) * entries
    if all(isinstance(each, Identity | Directional) for each in maps):
        if not any(isinstance(each, Directional) for each in maps):
            return (2 * len(maps) + 7) * entries
        centered = design.center is not None or design.poe.anchor.center is not None
        return (3 + centered * len(maps)) * entries
    return _gram_floats(maps, d_out, d_in)


def _gram_floats(maps: Sequence[ResidualMap], d_out: int, d_in: int) -> int:
    """Numbers held for Gram experts; a user's map counts as a Gram on both sides."""
    given = sum(isinstance(each, Activation | Mixed) for each in maps)
    left = sum(not isinstance(each, InputGram | Identity | Activation | Mixed) for each in maps)
    right = sum(not isinstance(each, OutputGram | Identity) for each in maps)
    columns = len(maps) * min(d_out, d_in)
    rows, cols = (min(d_out, columns) if left else d_out, min(d_in, columns) if right and not given else d_in)
    grams = left * rows**2 + right * cols**2
    bases = (rows < d_out) * d_out * rows + (cols < d_in) * d_in * cols
    compressed = rows * cols
    targets = len(maps) * compressed if bases else 0
    sums = 2 * (rows**2 * (left > 0) + cols**2 * (right > 0))
    iteration = grams + sums + (3 * len(maps) + _TEMPORARIES) * compressed + targets + bases
    decomposing = given * d_in**2 + 8 * d_in**2 * (given > 0)  # one root at a time, in float64
    return max(iteration, 4 * d_out * d_in + 2 * bases, decomposing) + d_out * d_in


def together(count: int, experts: int, shape: tuple[int, int], itemsize: int, device: torch.device) -> int:
    """Number of a batch's modules that are solved together: those that a processor's cache holds, or all on a GPU.

    Args:
        count: Modules of the batch that have this shape.
        experts: Number of updates of each.
        shape: ``(d_out, d_in)``.
        itemsize: Bytes of a number.
        device: What solves.

    >>> [together(50, 4, (side, side), 4, torch.device(name)) for name in ("cpu", "cuda") for side in (768, 64)]
    [1, 32, 50, 50]
    """
    if device.type != "cpu":
        return count
    return min(count, max(1, TOGETHER // (experts * shape[0] * shape[1] * itemsize)))


def merged_bytes(
    design: AnyDesign, experts: int, matrices: Sequence[Sequence[tuple[int, int]]], itemsize: int, device: torch.device
) -> int:
    """Peak memory of solving some tensors as one batch on a device, given the shapes of the modules of each tensor."""
    shapes = [shape for tensor in matrices for shape in tensor]
    entries = [sum(d_out * d_in for d_out, d_in in tensor) for tensor in matrices]
    total, reading = sum(entries), (experts + 4) * max(entries)
    if isinstance(design, MethodDesign):
        held = (experts + 2) * total
        solving = max(design.method.working_floats(shapes.count(one), experts, one) for one in set(shapes))
        return itemsize * (held + max(reading, solving))
    held = (len(design.poe.update_names) + 1 + (design.center is not None)) * total
    solving = max(
        together(shapes.count(one), experts, one, itemsize, device) * solve_floats(design, experts, one)
        for one in set(shapes)
    )
    beside = 0 if len(shapes) == 1 else held  # the only module of a batch is not copied into it
    return itemsize * max(beside + reading, held + solving)


def averaged_bytes(shape_entries: int, itemsize: int) -> int:
    """Peak memory of averaging one tensor beside what is finished: base, sum, one expert's weights and its update."""
    return 4 * shape_entries * itemsize

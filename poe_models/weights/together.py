"""Many small tensors of one shape, read and subtracted together: the work for each is then little beside reading it."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from poe_models.weights.checkpoint import Checkpoint
from poe_models.weights.finite import all_finite
from poe_models.weights.fitting import keys_of
from poe_models.weights.lora import LoraCheckpoint
from poe_models.weights.task_vectors import ModuleUpdates, TaskVectors, block_names
from poe_models.weights.transfer import sent

_BYTES = 2**20
"""Of the updates that are held at once."""


def modules_of(task_vectors: TaskVectors, tensors: Sequence[str]) -> Iterator[list[ModuleUpdates]]:
    """Read merged tensors of every model as matrices.

    Args:
        task_vectors: Base and experts.
        tensors: Names of tensors that are merged.

    Yields:
        What ``TaskVectors.modules`` gives of each, in their order.
    """
    for run in _runs(task_vectors, tensors):
        read = _read(task_vectors, run)
        if read is None:
            yield from map(task_vectors.modules, run)
            continue
        base, updates = read
        view = task_vectors.treatments[run[0]].view
        assert view is not None
        bases = [block.clone(memory_format=torch.contiguous_format) for block in view.split_each(base)]
        blocks = [torch.stack(parts, 1) for parts in zip(*map(view.split_each, updates), strict=True)]
        for place, name in enumerate(run):
            parts = zip(block_names(name, len(bases)), bases, blocks, strict=True)
            yield [ModuleUpdates(label, name, task_vectors.names, b[place], u[place]) for label, b, u in parts]


def averages_of(
    task_vectors: TaskVectors, tensors: Sequence[str], importance: Sequence[float], scaling: float
) -> Iterator[Tensor]:
    """Read tensors of every model and add the mean updates to the base's.

    Args:
        task_vectors: Base and experts.
        tensors: Names of tensors that are merged or averaged.
        importance: Weight of each expert in the mean.
        scaling: Factor of the mean.

    Yields:
        What ``TaskVectors.average`` gives of each, in their order.
    """
    for run in _runs(task_vectors, tensors):
        read = _read(task_vectors, run)
        if read is None:
            yield from (task_vectors.average(name, importance, scaling) for name in run)
            continue
        base, updates = read
        for place in range(len(run)):  # each by itself: rounding may depend on the length of what is added
            total = torch.zeros_like(base[place])
            for update, weight in zip(updates, importance, strict=True):
                total.add_(update[place], alpha=weight)
            yield total.mul_(scaling / (sum(importance) or 1.0)).add_(base[place])


def runs(names: Iterable[str], kind: Callable[[str], Hashable], nbytes: Callable[[str], int]) -> Iterator[list[str]]:
    """Divide names into runs of neighbours that are worked on together.

    Args:
        names: Names of tensors.
        kind: What those of a run have in common.
        nbytes: Bytes that each takes.

    Yields:
        Names of one kind that fit into a small budget, or a single one.
    """
    for _, alike in groupby(names, kind):
        run: list[str] = []
        room = 0
        for name in alike:
            size = nbytes(name)
            if run and size > room:
                yield run
                run = []
            room = (room if run else _BYTES) - size
            run.append(name)
        yield run


def _runs(task_vectors: TaskVectors, tensors: Iterable[str]) -> Iterator[list[str]]:
    """Divide names into runs of one shape, view and dtype.

    Yields:
        Names of tensors whose updates fit into the budget, or of a single one.
    """
    infos, treatments = task_vectors.base.tensors, task_vectors.treatments
    each = len(task_vectors.names) * task_vectors.dtype.itemsize
    yield from runs(
        tensors,
        lambda name: (infos[name].shape, infos[name].dtype, treatments[name].view),
        lambda name: math.prod(infos[name].shape) * each,
    )


def _read(task_vectors: TaskVectors, run: Sequence[str]) -> tuple[Tensor, list[Tensor]] | None:
    """The base's tensors and the updates of each expert, (T, *shape); None if they are to be read one by one."""
    experts = list(task_vectors.experts.values())
    if len(run) == 1 or any(isinstance(each, LoraCheckpoint) for each in (task_vectors.base, *experts)):
        return None
    base, updates = _stacked(task_vectors, task_vectors.base, run), []
    for expert in experts:
        keys = [keys_of(task_vectors.base, expert, name) for name in run]
        if any(len(each) != 1 for each in keys):
            return None  # names that are tied in the base and stored apart here are compared
        updates.append(_stacked(task_vectors, expert, [key for (key,) in keys]).sub_(base))
    return (base, updates) if all(map(all_finite, (base, *updates))) else None  # the tensor at fault is named


def _stacked(task_vectors: TaskVectors, checkpoint: Checkpoint, names: Sequence[str]) -> Tensor:
    return sent(torch.stack(checkpoint.read_each(names)), task_vectors.device, task_vectors.dtype)

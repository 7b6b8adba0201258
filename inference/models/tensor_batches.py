"""Work on one batch of tensors: read, solve at once, add to the base, round to the output's dtype."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor

from inference.models.memory import together
from inference.models.method_design import AnyDesign, MethodDesign
from inference.models.modules import anchor_blocks, selected
from inference.models.plan import TensorBatch, TensorPlan
from inference.solution import FixedPointInfo, MethodInfo, Solution
from poe_models.methods import ModuleBatch
from poe_models.module_names import with_names
from poe_models.updates import center_of
from poe_models.weights.finite import all_finite
from poe_models.weights.loading import Checkpoint, CheckpointError
from poe_models.weights.task_vectors import ModuleUpdates, TaskVectors
from poe_models.weights.together import averages_of, modules_of, runs
from poe_models.weights.transfer import sent

HALF = (torch.bfloat16, torch.float16)
_Made = tuple[TensorPlan, Tensor, list[dict[str, Any]]]


def merge_batch(
    task_vectors: TaskVectors, batch: TensorBatch, designs: Sequence[AnyDesign], seed: int
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Make the tensors of one batch in their output dtype on the CPU, and a record for each.

    Args:
        task_vectors: Base and experts.
        batch: Tensors with the same treatment; merged ones share a design and shapes.
        designs: The designs of the whole merge; records name theirs by its position.
        seed: Of torch's generators while the batch is solved, for energies and centres that draw.

    Returns:
        Tensors by name, and their records.

    Raises:
        CheckpointError: If a value is not finite, in an input or once rounded to the output's dtype.
    """
    first = batch.tensors[0]
    made: Iterable[_Made]
    if first.design is not None:
        with _seeded(seed, task_vectors.device):
            made = _solved(task_vectors, batch.tensors, first.design)
    elif first.average is not None:
        made = _averaged(task_vectors, batch.tensors)
    else:
        made = _kept(task_vectors, batch.tensors)
    tensors: dict[str, Tensor] = {}
    records: list[dict[str, Any]] = []
    results = iter(made)
    for run in _runs(task_vectors, batch.tensors):
        values, modules = zip(*((value, own) for _, value, own in islice(results, len(run))), strict=True)
        rounded, found = _rounded(task_vectors, run, _stacked_values(values))
        tensors |= zip((tensor.name for tensor in run), (each.cpu() for each in rounded), strict=True)
        records += [_record(*each, designs) for each in zip(run, found, modules, strict=True)]
    return tensors, records


def _runs(task_vectors: TaskVectors, tensors: Sequence[TensorPlan]) -> Iterator[list[TensorPlan]]:
    """Divide tensors into runs of one shape and dtype.

    Yields:
        Small neighbours, or a single one.
    """
    infos, of = task_vectors.base.tensors, {tensor.name: tensor for tensor in tensors}
    for run in runs(of, lambda name: (of[name].shape, infos[name].dtype), lambda name: of[name].nbytes):
        yield [of[name] for name in run]


def _stacked_values(values: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape as one, ``(T, *shape)``; one alone is not copied."""
    return torch.stack(list(values)) if len(values) > 1 else values[0].unsqueeze(0)


def _kept(task_vectors: TaskVectors, tensors: Sequence[TensorPlan]) -> Iterator[_Made]:
    for run in _runs(task_vectors, tensors):
        values = task_vectors.base.read_each([tensor.name for tensor in run])
        yield from ((tensor, value, []) for tensor, value in zip(run, values, strict=True))


def _averaged(task_vectors: TaskVectors, tensors: Sequence[TensorPlan]) -> Iterator[_Made]:
    for average, alike in groupby(tensors, lambda tensor: tensor.average):
        assert average is not None
        planned = list(alike)
        names = [tensor.name for tensor in planned]
        values = averages_of(task_vectors, names, average.importance, average.scaling)
        yield from ((tensor, value, []) for tensor, value in zip(planned, values, strict=True))


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@dataclass
class _Batch:
    """A batch of modules of equal shape that is filled module by module."""

    updates: Tensor
    bases: list[Tensor]
    places: list[tuple[int, int]]  # position of the tensor in the batch, of the module in the tensor
    labels: list[str]
    factors: list[tuple[Tensor, Tensor] | None]
    centers: list[Tensor]


def _solved(task_vectors: TaskVectors, tensors: Sequence[TensorPlan], design: AnyDesign) -> list[_Made]:
    order = design.order(task_vectors.names)
    batches = _empty_batches(task_vectors, tensors[0].matrices, len(tensors), order)
    read = modules_of(task_vectors, [tensor.name for tensor in tensors])
    for position, (tensor, modules) in enumerate(zip(tensors, read, strict=True)):
        _fill(batches, position, modules, order, _centers(task_vectors, tensor.name, design))
    values: dict[tuple[int, int], Tensor] = {}
    records: dict[tuple[int, int], dict[str, Any]] = {}
    while batches:
        _, batch = batches.popitem()
        for part in _parts(batch, design):
            merged, found = _solve(part, design, task_vectors.names)
            values |= dict(zip(part.places, merged, strict=True))
            records |= dict(zip(part.places, found, strict=True))
        del batch, part
    made = []
    for position, tensor in enumerate(tensors):
        assert tensor.treatment.view is not None
        places = [(position, index) for index in range(len(tensor.matrices))]
        value = tensor.treatment.view.join([values.pop(place) for place in places], tensor.shape)
        made.append((tensor, value, [records[place] for place in places]))
    return made


def _empty_batches(
    task_vectors: TaskVectors, matrices: Sequence[tuple[int, int]], tensors: int, order: Sequence[int]
) -> dict[tuple[int, int], _Batch]:
    batches = {}
    for shape in dict.fromkeys(matrices):
        count = tensors * matrices.count(shape)
        size = (count, len(order), *shape)
        updates = torch.empty(size if count > 1 else (0,), dtype=task_vectors.dtype, device=task_vectors.device)
        batches[shape] = _Batch(updates, [], [], [], [], [])
    return batches


def _fill(
    batches: dict[tuple[int, int], _Batch],
    position: int,
    modules: list[ModuleUpdates],
    order: list[int],
    centers: Sequence[Tensor],
) -> None:
    for index, read in enumerate(modules):
        module = selected(read, order)
        batch = batches[(module.base.shape[0], module.base.shape[1])]
        if batch.updates.ndim == 1:  # the only one of its shape needs no copy
            batch.updates = module.updates.unsqueeze(0)
        else:
            batch.updates[len(batch.places)] = module.updates
        batch.factors.append(module.low_rank)
        batch.bases.append(module.base)
        batch.places.append((position, index))
        batch.labels.append(module.name)
        if centers:
            batch.centers.append(centers[index] - module.base)


def _parts(batch: _Batch, design: AnyDesign) -> Iterator[_Batch]:
    """Cut a batch into what is solved together: on a processor no more than its cache holds, for a product of experts.

    Yields:
        Batches of one module at least; methods and other devices have the whole.
    """
    count, (_, experts, d_out, d_in) = len(batch.places), batch.updates.shape
    whole = isinstance(design, MethodDesign)
    step = count if whole else together(count, experts, (d_out, d_in), batch.updates.itemsize, batch.updates.device)
    for first in range(0, count, step):
        some = slice(first, first + step)
        yield _Batch(
            batch.updates[some],
            batch.bases[some],
            batch.places[some],
            batch.labels[some],
            batch.factors[some],
            batch.centers[some],
        )


def _centers(task_vectors: TaskVectors, tensor: str, design: AnyDesign) -> list[Tensor]:
    return [] if isinstance(design, MethodDesign) else anchor_blocks(task_vectors, tensor, design)


def _solve(batch: _Batch, design: AnyDesign, names: Sequence[str]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    factors, center = _stacked(batch.factors), None
    solution: Solution[FixedPointInfo] | Solution[MethodInfo]
    if isinstance(design, MethodDesign):
        solution = design.solve(ModuleBatch.of(batch.updates, batch.labels, names, factors))
    else:
        own = design.for_modules(batch.labels)
        center = torch.stack(batch.centers) if batch.centers else center_of(own.poe.anchor, batch.updates, factors)
        try:
            solution = own.solve(batch.updates, factors, center)
        except CheckpointError:
            raise
        except ValueError as error:
            raise with_names(error, batch.labels) from error
    merged = [base.add_(z, alpha=design.scaling) for base, z in zip(batch.bases, solution.value, strict=True)]
    kept = solution.info.retention.scaled(design.scaling)  # of what is written
    records = [
        {"module": label, "status": status.name.lower(), **solution.info.record(index), "retention": kept.record(index)}
        for index, (label, status) in enumerate(zip(batch.labels, solution.status, strict=True))
    ]
    for index, record in enumerate(records):
        if not isinstance(design, MethodDesign):
            record["center_norm"] = 0.0 if center is None else float(center[index].double().norm())
    return merged, records


def _stacked(factors: Sequence[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor] | None:
    """Low-rank factors of a batch, smaller ranks filled up with zeros; None unless every module has them."""
    known = [pair for pair in factors if pair is not None]
    if len(known) < len(factors):
        return None
    rank = max(right.shape[-2] for _, right in known)
    left = [torch.nn.functional.pad(b, (0, rank - b.shape[-1])) for b, _ in known]
    right = [torch.nn.functional.pad(a, (0, 0, 0, rank - a.shape[-2])) for _, a in known]
    return torch.stack(left), torch.stack(right)


def _rounded(
    task_vectors: TaskVectors, run: Sequence[TensorPlan], values: Tensor
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Tensors of one shape and dtype in their output dtype, and what their records say about rounding.

    Args:
        task_vectors: Base and experts.
        run: The tensors.
        values: What they are before rounding, ``(T, *shape)``.
    """
    rounded = values.to(run[0].dtype).contiguous()
    for tensor, value, each in _suspicious(run, values, rounded):
        kept = tensor.treatment.action == "base"
        where = "the base" if kept else "the merge"
        _refuse_negative(tensor.name, value)
        refuse_overflow(f"tensor {tensor.name!r} of {where}", value if kept else None, each)
    if run[0].treatment.action == "base":
        return _apart(rounded), [{} for _ in run]
    stored = _stacked_values(task_vectors.base.read_each([tensor.name for tensor in run]))
    before = sent(stored, values.device, stored.dtype)
    found = _roundings(before, values, rounded)
    same = _alike(values, before)
    if bool(same.any()):  # no update: the base's very bits, the sign of zero among them
        rounded[same] = before[same].to(rounded)
    for record, equal in zip(found, _alike(rounded, before).tolist(), strict=True):
        record |= {"equals_base": True} if equal else {}
    return _apart(rounded), found


def _alike(values: Tensor, before: Tensor) -> Tensor:
    """Mask of the tensors ``(T, *shape)`` that are others rounded to their dtype, ``(T,)``."""
    return (values == before.to(values)).reshape(len(values), -1).all(1)


def _suspicious(
    run: Sequence[TensorPlan], values: Tensor, rounded: Tensor
) -> Iterator[tuple[TensorPlan, Tensor, Tensor]]:
    """Pick the tensors that may have to be refused.

    Yields:
        Those that have variances or values that are not finite, before and after rounding.
    """
    whole = not rounded.dtype.is_floating_point or all_finite(rounded)
    for tensor, value, each in zip(run, values, rounded, strict=True) if not whole else ():
        yield tensor, value, each
    for place, tensor in enumerate(run):
        if whole and tensor.name.endswith("running_var"):
            yield tensor, values[place], rounded[place]


def _apart(tensors: Tensor) -> list[Tensor]:
    """The tensors of a stack, ``(T, *shape)``, each in memory of its own."""
    return [each.clone() for each in tensors] if len(tensors) > 1 else [tensors[0]]


def _refuse_negative(name: str, value: Tensor) -> None:
    """Refuse variances below zero, which λ above 1 makes of those of BatchNorm: the network would give nan."""
    if name.rpartition(".")[2] == "running_var" and bool((value < 0).any()):
        raise CheckpointError(
            f"{name!r}: {int((value < 0).sum()):,} of its variances are negative in the merge, which goes beyond the "
            "experts' (scaling above 1, or importance below 0). Keep running statistics at the base's by the rule "
            "{match: running_, action: base}, or lower the scaling; `poe-merge batch-norm` estimates them again."
        )


def refuse_overflow(what: str, kept: Tensor | None, rounded: Tensor) -> None:
    """Refuse a tensor that its output dtype cannot hold.

    Args:
        what: Name of the tensor and its model, for the message.
        kept: The base's values if the tensor stays the base's: those that are not finite there may stay so (the -inf
            of an attention mask).
        rounded: The tensor in its output dtype.

    Raises:
        CheckpointError: If a value is not finite, and not the base's.
    """
    if not rounded.dtype.is_floating_point:
        return
    bad = ~rounded.isfinite()
    if kept is not None:
        bad &= kept.isfinite()
    if bool(bad.any()):
        raise CheckpointError(
            f"{what} has values that are not finite as {rounded.dtype}, {int(bad.sum()):,} of them. Write a dtype of "
            "wider range: bfloat16 and float32 in place of float16, float64 in place of those (`out_dtype`, "
            "`--out-dtype`)."
        )


def rounding_of_tensor(base: Checkpoint, name: str, value: Tensor, rounded: Tensor) -> dict[str, int] | None:
    """Count entries that the merge changed, and those that rounding to half precision took back to the base's value."""
    if rounded.dtype not in HALF:
        return None
    (found,) = _roundings(base.read(name).unsqueeze(0), value.unsqueeze(0), rounded.unsqueeze(0))
    return found["rounding"]


def _roundings(before: Tensor, values: Tensor, rounded: Tensor) -> list[dict[str, Any]]:
    """Counts of :func:`rounding_of_tensor` for the record of each tensor, ``(T, *shape)``; nothing in other dtypes."""
    if rounded.dtype not in HALF:
        return [{} for _ in values]
    updated = values != before.to(values.dtype)
    unchanged = updated & (rounded == before.to(rounded.dtype))
    counts = zip(*(each.reshape(len(values), -1).sum(1).tolist() for each in (updated, unchanged)), strict=True)
    return [{"rounding": {"updated": changed, "rounded_back": back}} for changed, back in counts]


def _record(
    tensor: TensorPlan, rounding: Mapping[str, Any], modules: Sequence[dict[str, Any]], designs: Sequence[AnyDesign]
) -> dict[str, Any]:
    record: dict[str, Any] = {
        "tensor": tensor.name,
        "aliases": list(tensor.aliases),
        "action": tensor.treatment.action,
        "view": None if tensor.treatment.view is None else str(tensor.treatment.view),
        "reason": tensor.treatment.reason,
        "shape": list(tensor.shape),
        "matrices": [list(shape) for shape in tensor.matrices],
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "numel": math.prod(tensor.shape),
        **rounding,
    }
    if tensor.average is not None:
        record |= {"importance": list(tensor.average.importance), "scaling": tensor.average.scaling}
    if tensor.design is not None:
        record |= {"design": designs.index(tensor.design), "modules": modules}
    return record

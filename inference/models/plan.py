"""Plan of a merge from headers alone: treatments, batches, bytes, peak memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from typing_extensions import override

from inference.models.averages import Average, averages_of
from inference.models.design import Design, require_alike
from inference.models.digest import UNDER, nbytes_of, with_models
from inference.models.folder import weight_files
from inference.models.memory import averaged_bytes, merged_bytes
from inference.models.method_design import AnyDesign, AnyDesigns, MethodDesign, as_any_function
from inference.models.one_row import require_matrices
from poe_models.methods import MergingMethod
from poe_models.weights.fitting import keys_of
from poe_models.weights.loading import Checkpoint, same_weights
from poe_models.weights.lora import LoraCheckpoint
from poe_models.weights.rules import NO_WEIGHTS, Treatment
from poe_models.weights.task_vectors import TaskVectors, block_names

BATCH_BYTES = 64 * 2**20
"""Default byte budget of the updates that are solved as one batch."""
ALL = "all tensors"
"""Words for the merged part where no floating tensor is averaged or left out."""


@dataclass(frozen=True)
class TensorPlan:
    """Treatment of one tensor.

    Attributes:
        name: Its name in the base.
        aliases: Further names it is tied to.
        copies: Those of them that are written with equal values; the others are names in the file's metadata.
        treatment: Merged, averaged or kept, with the reason.
        shape: Its shape as stored.
        matrices: Shapes ``(d_out, d_in)`` of the matrices it is seen as; empty if it is not merged.
        dtype: Dtype it is written in.
        design: The design of a merged tensor.
        average: How an averaged tensor is averaged.
    """

    name: str
    aliases: tuple[str, ...]
    treatment: Treatment
    shape: tuple[int, ...]
    matrices: tuple[tuple[int, int], ...]
    dtype: torch.dtype
    design: AnyDesign | None
    average: Average | None = None
    copies: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes written for it, copies not counted."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class TensorBatch:
    """Tensors that are finished together: merged ones of the same shapes and design, solved as one batch.

    Attributes:
        tensors: In the order of the shard.
        peak_bytes: Predicted peak memory while it is worked on.
    """

    tensors: tuple[TensorPlan, ...]
    peak_bytes: int

    @property
    def modules(self) -> int:
        """Number of matrices that are solved."""
        return sum(len(tensor.matrices) for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes written for its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def cost(self) -> float:
        """Work on it in multiplications, roughly: a Gram matrix of every matrix, and every byte a few times."""
        grams = sum(a * b * min(a, b) for tensor in self.tensors for a, b in tensor.matrices)
        return float(grams + 10 * self.nbytes)


@dataclass(frozen=True)
class Shard:
    """Weight file of the output.

    Attributes:
        file: Its name.
        batches: Its tensors, in batches.
    """

    file: str
    batches: tuple[TensorBatch, ...]

    @cached_property
    def tensors(self) -> list[TensorPlan]:
        """Its tensors."""
        return [tensor for batch in self.batches for tensor in batch.tensors]

    @property
    def aliases(self) -> dict[str, str]:
        """Further names of its tied tensors, to the names they are tied to."""
        return {alias: tensor.name for tensor in self.tensors for alias in tensor.aliases}

    @cached_property
    def headers(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each tensor that the file holds, copies of tied ones included."""
        return {name: (t.dtype, t.shape) for t in self.tensors for name in (t.name, *t.copies)}

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that the file holds."""
        return sum(t.nbytes * (1 + len(t.copies)) for t in self.tensors)


@dataclass(frozen=True, repr=False)
class Plan:
    """Plan of a merge.

    Attributes:
        shards: Output files with their batches of tensors.
        designs: The distinct designs.
        peak_bytes: Predicted peak memory of tensors, on top of the interpreter with its libraries and of mapped file
            pages, which the system takes back as it needs them.
        read_bytes: Bytes read: every input once for its checksum, and what is merged once more; the passes in which a
            merging method looks at the whole model come on top.
        write_bytes: Bytes of the merged weights.
        disk_bytes: Space needed while merging: the weights, and the parts of the largest shard.
    """

    shards: tuple[Shard, ...]
    designs: tuple[AnyDesign, ...]
    peak_bytes: int
    read_bytes: int
    write_bytes: int
    disk_bytes: int

    @property
    def batches(self) -> list[TensorBatch]:
        """All batches, in order."""
        return [batch for shard in self.shards for batch in shard.batches]

    @cached_property
    def tensors(self) -> list[TensorPlan]:
        """All tensors, in the order they are worked on."""
        return [tensor for batch in self.batches for tensor in batch.tensors]

    @property
    def averages(self) -> set[Average]:
        """The distinct averages."""
        return {tensor.average for tensor in self.tensors if tensor.average is not None}

    @property
    def modules(self) -> int:
        """Number of matrices that are solved."""
        return sum(batch.modules for batch in self.batches)

    def share(self, action: str) -> float:
        """Share of the parameters that are merged, averaged, or kept from the base."""
        sizes = [(tensor.treatment.action, math.prod(tensor.shape)) for tensor in self.tensors]
        return sum(size for own, size in sizes if own == action) / (sum(size for _, size in sizes) or 1)

    @property
    def reach(self) -> str:
        """The merged tensors in words, matrices or all of them, with what happens to the other floating ones."""
        merged = [t for t in self.tensors if t.treatment.view is not None]
        rows = any(t.treatment.view is not None and t.treatment.view.vector for t in merged)
        weights = [t for t in self.tensors if t.dtype.is_floating_point and t.treatment.reason not in NO_WEIGHTS]
        averaged, kept = (sum(t.treatment.action == action for t in weights) for action in ("average", "base"))
        rest = [f"{n} {word}" for n, word in ((averaged, "averaged"), (kept, "kept from the base")) if n]
        if rows and not rest:
            return ALL
        return "; ".join([f"{len(merged)} of {len(weights)} tensors" if rows else "matrices", *rest])

    def count(self, action: str) -> int:
        """Number of tensors that are merged, averaged, or kept from the base."""
        return sum(tensor.treatment.action == action for tensor in self.tensors)

    @override
    def __repr__(self) -> str:
        kinds = ", ".join(f"{self.count(action)} {action}" for action in ("merge", "average", "base"))
        return (
            f"Plan({len(self.tensors)} tensors ({kinds}), {self.modules} matrices in {len(self.batches)} batches, "
            f"{len(self.shards)} files, {len(self.designs)} designs; memory {self.peak_bytes / 1e6:.3g} MB, "
            f"disk {self.disk_bytes / 1e6:.3g} MB)"
        )


def plan(
    task_vectors: TaskVectors,
    design: AnyDesigns,
    *,
    out_dtype: torch.dtype | None = None,
    batch_bytes: int = BATCH_BYTES,
) -> Plan:
    """The plan of ``merge_checkpoint`` with the same arguments, from headers alone.

    Args:
        task_vectors: Base and experts.
        design: One product, method or design for all tensors, or a function from the name of a merged tensor.
        out_dtype: Dtype of floating tensors in the output; the base's own by default.
        batch_bytes: Byte budget of the updates that are solved as one batch; a larger tensor is a batch of its own.

    Returns:
        The plan.

    Raises:
        ValueError: If a design is about other task vectors, cannot be solved, or needs matrices where there are none.
        CheckpointError: If an anchor's checkpoint lacks a tensor.
    """
    for_tensor, averages = as_any_function(design), averages_of(task_vectors, design)
    tensors = {
        name: _tensor_plan(task_vectors, name, for_tensor, averages, out_dtype) for name in task_vectors.treatments
    }
    designs = tuple({id(t.design): t.design for t in tensors.values() if t.design is not None}.values())
    for each in designs:
        each.check(task_vectors.names)
    _given(task_vectors, designs, _modules_by_design(list(tensors.values())))
    shards = tuple(
        Shard(file, tuple(_batches(task_vectors, [tensors[name] for name in names], batch_bytes)))
        for file, names in weight_files(task_vectors.base).items()
    )
    written = sum(shard.nbytes for shard in shards)
    return Plan(
        shards=shards,
        designs=designs,
        peak_bytes=max((batch.peak_bytes for shard in shards for batch in shard.batches), default=0),
        read_bytes=_read_bytes(task_vectors, designs, list(tensors.values())),
        write_bytes=written,
        disk_bytes=written + max(shard.nbytes for shard in shards),
    )


def inputs_of(task_vectors: TaskVectors, designs: Sequence[AnyDesign]) -> dict[str, Checkpoint]:
    """Every checkpoint that is read, by its role; the models under adapters too, where they are not the base."""
    centers: dict[str, Checkpoint] = {}
    for center in (design.center for design in _products(designs) if design.center is not None):
        _refuse_two_models(centers.setdefault(f"anchor {center.source}", center), center)
    experts = {f"expert {name}": checkpoint for name, checkpoint in task_vectors.experts.items()}
    found = {"base": task_vectors.base, **experts, **centers, **_given(task_vectors, designs, {})}
    return with_models(found, task_vectors.base)


def _refuse_two_models(one: Checkpoint, other: Checkpoint) -> None:
    """Refuse an adapter that is the centre of two anchors on different models: inputs are told apart by its name."""
    if isinstance(one, LoraCheckpoint) and isinstance(other, LoraCheckpoint) and not same_weights(one.base, other.base):
        raise ValueError(
            f"{one.source} is the centre of two anchors, on {one.base.source} and on {other.base.source}. Copy the "
            "adapter, and give one of them the copy."
        )


def _products(designs: Sequence[AnyDesign]) -> list[Design]:
    """The designs that are products of experts."""
    return [design for design in designs if isinstance(design, Design)]


def _given(
    task_vectors: TaskVectors, designs: Sequence[AnyDesign], modules: Mapping[int, Mapping[str, tuple[int, int]]]
) -> dict[str, Checkpoint]:
    """Inputs of residual maps and methods by their role, checked for modules by the ``id`` of their design."""
    found: dict[str, Checkpoint] = {}
    for design in designs:
        here = modules.get(id(design), {})
        if isinstance(design, MethodDesign):
            found |= design.method.inputs(task_vectors.names, here)
            continue
        center = design.poe.anchor.center
        if isinstance(center, MergingMethod):
            found |= center.inputs(design.poe.update_names, here)
        for expert in design.poe.experts:
            found |= expert.residual_map.inputs(expert.update_name, here)
    return found


def _tensor_plan(
    task_vectors: TaskVectors,
    name: str,
    for_tensor: Callable[[str], AnyDesign],
    averages: Callable[[str], Average],
    out_dtype: torch.dtype | None,
) -> TensorPlan:
    base, treatment = task_vectors.base, task_vectors.treatments[name]
    info, aliases = base.tensors[name], base.tied_names(name)[1:]
    design = for_tensor(name) if treatment.action == "merge" else None
    if design is not None and treatment.view is not None:
        require_matrices(name, treatment.view, design)
    if isinstance(design, Design) and design.center is not None:
        require_alike(design.center, "anchor", base, name)
    return TensorPlan(
        name=name,
        aliases=aliases,
        treatment=treatment,
        shape=info.shape,
        matrices=() if treatment.view is None else tuple(treatment.view.block_shapes(info.shape)),
        dtype=out_dtype if out_dtype is not None and info.dtype.is_floating_point else info.dtype,
        design=design,
        average=averages(name) if treatment.action == "average" else None,
        copies=tuple(alias for alias in aliases if alias in base.apart),
    )


def _modules_by_design(tensors: Sequence[TensorPlan]) -> dict[int, dict[str, tuple[int, int]]]:
    """Names and shapes of the modules of each design, by its ``id``."""
    modules: dict[int, dict[str, tuple[int, int]]] = {}
    for tensor in tensors:
        if tensor.design is not None:
            names = block_names(tensor.name, len(tensor.matrices))
            modules.setdefault(id(tensor.design), {}).update(zip(names, tensor.matrices, strict=True))
    return modules


def _batches(task_vectors: TaskVectors, tensors: Sequence[TensorPlan], budget: int) -> list[TensorBatch]:
    """Tensors that fit together, at most ``budget`` bytes of updates each, in the order of their first tensor."""
    alike: dict[tuple[object, ...], list[TensorPlan]] = {}
    for tensor in tensors:
        alike.setdefault((tensor.treatment.action, id(tensor.design), tensor.matrices), []).append(tensor)
    batches: list[list[TensorPlan]] = []
    for members in alike.values():
        filled = math.inf  # the first tensor opens a batch, whatever its size
        for tensor in members:
            copies = len(task_vectors.names) if tensor.design is not None else 1
            size = math.prod(tensor.shape) * copies * task_vectors.dtype.itemsize
            if filled + size > budget:
                batches.append([])
                filled = 0
            batches[-1].append(tensor)
            filled += size
    return [TensorBatch(tuple(batch), _peak_bytes(task_vectors, batch)) for batch in batches]


def _read_bytes(task_vectors: TaskVectors, designs: Sequence[AnyDesign], tensors: Sequence[TensorPlan]) -> int:
    """Every input once for its checksum; once more the base, and of the others what is merged or averaged."""
    checkpoints = inputs_of(task_vectors, designs)
    total = sum(nbytes_of(checkpoint) for checkpoint in checkpoints.values())
    base = task_vectors.base
    total += sum(info.nbytes for info in base.tensors.values())
    used = [tensor.name for tensor in tensors if tensor.treatment.action != "base"]
    for role, checkpoint in checkpoints.items():
        if isinstance(checkpoint, LoraCheckpoint):
            total += nbytes_of(checkpoint)
        elif role.startswith(("expert ", "anchor ", UNDER)):
            keys = [key for name in used for key in keys_of(base, checkpoint, name)]
            total += sum(checkpoint.tensors[key].nbytes for key in keys)
    return total


def _peak_bytes(task_vectors: TaskVectors, tensors: Sequence[TensorPlan]) -> int:
    """Predicted peak while a batch is made; its finished tensors are held until all of them are saved."""
    design, itemsize = tensors[0].design, task_vectors.dtype.itemsize
    finished = sum(tensor.nbytes for tensor in tensors)
    if design is not None:
        shapes, device = [tensor.matrices for tensor in tensors], task_vectors.device
        work = merged_bytes(design, len(task_vectors.names), shapes, itemsize, device)
        entries = [math.prod(tensor.shape) for tensor in tensors]
        return max(work, sum(entries) * itemsize + finished + 2 * max(entries))
    if tensors[0].treatment.action == "average":
        return finished + averaged_bytes(max(math.prod(tensor.shape) for tensor in tensors), itemsize)
    return finished

"""Merge adapters into one adapter: a PEFT folder of rank ``N r`` at most, or cut to a rank with the error stated."""

from __future__ import annotations

import json
import math
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from inference.models.artifacts import matmul_precision, versions
from inference.models.digest import Progress, Silent, check_unchanged, digest_inputs, files_of
from inference.models.factor_merge import averaged_factors, merged_factors, refuse_axes
from inference.models.folder import RECORD
from inference.models.method_design import AnyDesigns
from inference.models.plan import Plan, TensorBatch, TensorPlan, inputs_of, plan
from inference.models.staging import Staging, check_output
from inference.models.tensor_batches import merge_batch
from inference.retention import ExpertRetention, concerns, totals_of
from poe_models.weights.checkpoint import CheckpointError, read_json
from poe_models.weights.factors import cut
from poe_models.weights.lora import AdapterPlace, LoraCheckpoint
from poe_models.weights.task_vectors import TaskVectors

__all__ = ["AdapterReport", "adapter_bytes", "merge_adapters", "refuse_no_adapter"]

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_CLEARED = ("layers_to_transform", "layers_pattern", "exclude_modules", "eva_config", "corda_config", "loftq_config")


@dataclass(frozen=True, repr=False)
class AdapterReport:
    """Report of a merge of adapters.

    Attributes:
        out: The folder.
        modules: Number of modules with factors.
        ranks: Rank of each module's factors, by the name of its tensor.
        replaced: Names of the tensors that the adapter replaces whole, such as heads.
        error: Relative Frobenius error of all merged updates together from cutting them to the rank; 0 if none was.
        status: Number of matrices per status of the solver.
        experts: How much the merge kept of every expert, over all matrices, before they were cut to a rank.
        nbytes: Bytes of weights written.
        seconds: Wall time.
    """

    out: Path
    modules: int
    ranks: Mapping[str, int]
    replaced: tuple[str, ...]
    error: float
    status: Mapping[str, int]
    experts: tuple[ExpertRetention, ...]
    nbytes: int
    seconds: float

    @override
    def __repr__(self) -> str:
        ranks = sorted(set(self.ranks.values()))
        spread = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        return (
            f"AdapterReport({self.out}: {self.modules} modules of {spread}, {len(self.replaced)} tensors replaced; "
            f"relative error {self.error:.3g}; {self.nbytes / 1e6:.3g} MB)"
        )

    @property
    def concerns(self) -> list[str]:
        """Warnings about a merge that is little more than the base, or than one of its experts."""
        return concerns(self.experts)


@dataclass(frozen=True)
class _Form:
    """Largest rank and dtype of the factors; None for their own."""

    rank: int | None
    dtype: torch.dtype | None


@dataclass
class _Merged:
    """Contents of the adapter, as they are made."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    squares: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def saved(self) -> dict[str, Tensor]:
        """Tensors of the file; PEFT has the biases of modules with factors in their ``base_layer``."""
        adapted = set(self.modules.values())

        def key(name: str) -> str:
            module, _, last = name.rpartition(".")
            return f"base_model.model.{module}.base_layer.{last}" if module in adapted else f"base_model.model.{name}"

        return {**self.tensors, **{key(name): value.contiguous() for name, value in self.replaced.items()}}

    @property
    def error(self) -> float:
        """Relative Frobenius error of cutting."""
        return math.sqrt(self.squares[1] / self.squares[0]) if self.squares[0] else 0.0


def merge_adapters(
    task_vectors: TaskVectors,
    design: AnyDesigns,
    out: str | Path,
    *,
    rank: int | None = None,
    out_dtype: torch.dtype | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    code: Sequence[Path] = (),
    resume: bool = False,
    progress: Progress | None = None,
) -> AdapterReport:
    """Merge adapters of one base into a folder that PEFT's ``PeftModel.from_pretrained`` loads on that base.

    Merges are solved in the space of the factors (:mod:`inference.models.factor_merge`), in float64. What an adapter
    replaces whole (``modules_to_save``, trained biases) is merged or averaged as in a whole model, and replaced; of a
    tensor that the base does not have, such as a new head, nothing is written.

    Args:
        task_vectors: Base and experts, all of them adapters on it.
        design: As of ``merge_checkpoint``: maps in {Identity, Directional, OutputGram, InputGram} with the anchor at
            zero, an average or task arithmetic; or one of the last two.
        out: The folder to make.
        rank: Largest rank of a module's factors; by default none is cut, and ranks are at most the sum of the experts'.
        out_dtype: Dtype of the adapter; by default that of the experts' factors, of replaced tensors the base's.
        seed: Of torch's generators while a tensor is solved, for energies that draw.
        settings: What the merge was configured with, for the record.
        code: Source files that decide what comes out; their digests are recorded.
        resume: Start anew in what an interrupted merge of the same inputs and settings left.
        progress: Told how far the merge is.

    Raises:
        CheckpointError: If an expert is no adapter on this base, or their modules are named differently.
        ValueError: If the rank is below one, or a design's merge is no adapter.
        OutputError: If the folder exists, or the disk is full.
    """
    began, progress = time.monotonic(), progress or Silent()
    if rank is not None and rank < 1:
        raise ValueError(f"`merge_adapters(rank={rank})`: give a rank of at least 1, or none to cut nothing.")
    planned = plan(task_vectors, design, out_dtype=out_dtype)
    adapters = refuse_no_adapter(task_vectors, planned)
    checkpoints = inputs_of(task_vectors, planned.designs)
    staging = Staging(
        check_output(Path(out), [file for each in checkpoints.values() for file in files_of(each)], resume=resume),
        "merge",
    )
    staging.check(resume)
    state = {
        "kind": "adapter",
        "settings": dict(settings or {}),
        "seed": seed,
        "rank": rank,
        "matmul_precision": matmul_precision(),
        "out_dtype": None if out_dtype is None else str(out_dtype).removeprefix("torch."),
        "designs": [each.describe() for each in planned.designs],
        "rules": task_vectors.rules.to_dicts(),
        "inputs": digest_inputs(checkpoints, code, progress),
        "versions": versions(),
    }
    with staging.begin(state, partial(check_unchanged, checkpoints.values())):
        if not staging.published:
            made = _merge(task_vectors, planned, adapters, _Form(rank, out_dtype), seed, progress)
            staging.save(_WEIGHTS, made.saved(), {"format": "pt"})
            staging.write_json(_CONFIG, _config(adapters, made))
            staging.write_json(RECORD, {**state, "error": made.error, "whole": made.whole, "tensors": made.records})
        staging.publish()
    return _report(staging.out, time.monotonic() - began)


def refuse_no_adapter(task_vectors: TaskVectors, planned: Plan) -> list[LoraCheckpoint]:
    """Refuse, from headers, a merge that is no adapter.

    Args:
        task_vectors: Base and experts.
        planned: The plan of the merge.

    Returns:
        The experts, which all are adapters.

    Raises:
        CheckpointError: If an expert is none.
        ValueError: If a design's merge of adapters is none.
    """
    for tensor in planned.tensors:
        if tensor.design is not None:
            refuse_axes(tensor.name, tensor.design)
    found = []
    for name, expert in task_vectors.experts.items():
        if not isinstance(expert, LoraCheckpoint):
            raise CheckpointError(
                f"expert {name!r} ({expert.source}) is no adapter, and the merge of one with others is none. Write a "
                "whole model (`output: model`), or extract an adapter from it first."
            )
        found.append(expert)
    return found


def adapter_bytes(
    planned: Plan, adapters: Sequence[LoraCheckpoint], rank: int | None, dtype: torch.dtype | None
) -> int:
    """Bytes of weights that a merge of adapters writes at most, from headers.

    Args:
        planned: The plan of the merge.
        adapters: The experts.
        rank: Largest rank of a module's factors; None cuts nothing.
        dtype: Dtype of the adapter; None for the experts'.
    """
    total = 0
    for tensor in planned.tensors:
        places = [place for place in (each.place(tensor.name) for each in adapters) if place is not None]
        size = math.prod(tensor.shape)
        if places:
            rows = tensor.shape[0]
            most = min(sum(place.rank for place in places), rows, size // rows, rank or size)
            total += most * (rows + size // rows) * (dtype or places[0].dtype).itemsize
        elif any(each.whole(tensor.name) is not None for each in adapters):
            total += size * tensor.dtype.itemsize
    return total


def _merge(
    task_vectors: TaskVectors,
    planned: Plan,
    adapters: Sequence[LoraCheckpoint],
    form: _Form,
    seed: int,
    progress: Progress,
) -> _Merged:
    changed = [tensor for tensor in planned.tensors if tensor.treatment.action != "base"]
    progress.begin("merging", len(changed), sum(tensor.nbytes for tensor in changed))
    made = _Merged()
    for tensor in changed:
        with torch.random.fork_rng(devices=[task_vectors.device] if task_vectors.device.type == "cuda" else []):
            torch.manual_seed(seed)
            merging = tensor.treatment.action == "merge"
            merged = merged_factors(task_vectors, tensor) if merging else None
            factors = averaged_factors(task_vectors, tensor) if not merging else merged and merged[0]
        if factors is None:
            _add_whole(made, task_vectors, tensor, planned, adapters, seed)
        else:
            _add_factors(made, tensor, factors, merged[1] if merged else [], adapters, form)
        progress.advance(1, tensor.nbytes)
    return made


def _add_factors(
    made: _Merged,
    tensor: TensorPlan,
    factors: tuple[Tensor, Tensor],
    modules: list[dict[str, Any]],
    adapters: Sequence[LoraCheckpoint],
    form: _Form,
) -> None:
    place = _place(tensor.name, adapters)
    found = cut(factors[0].cpu(), factors[1].cpu(), form.rank)
    made.tensors |= place.tensors(found.left, found.right, form.dtype)
    made.ranks[tensor.name], made.modules[tensor.name] = found.left.shape[1], place.module
    made.squares[0] += found.squared_norm
    made.squares[1] += found.squared_error
    error = math.sqrt(found.squared_error / found.squared_norm) if found.squared_norm else 0.0
    made.records.append(
        {
            "tensor": tensor.name,
            "action": tensor.treatment.action,
            "rank": found.left.shape[1],
            "error": error,
            "modules": modules,
        }
    )


def _place(tensor: str, adapters: Sequence[LoraCheckpoint]) -> AdapterPlace:
    places = [place for place in (adapter.place(tensor) for adapter in adapters) if place is not None]
    modules = {place.module for place in places}
    if len(modules) > 1:
        raise CheckpointError(
            f"tensor {tensor!r} is the module {' and '.join(map(repr, sorted(modules)))} of the adapters, which were "
            "trained on models that name it differently. Write a whole model (`output: model`)."
        )
    return places[0]


def _add_whole(
    made: _Merged,
    task_vectors: TaskVectors,
    tensor: TensorPlan,
    planned: Plan,
    adapters: Sequence[LoraCheckpoint],
    seed: int,
) -> None:
    """Add a tensor that is replaced whole: merged or averaged as in a whole model."""
    name = next(found for found in (adapter.whole(tensor.name) for adapter in adapters) if found is not None)
    if any(adapter.place(tensor.name) is not None for adapter in adapters):
        raise CheckpointError(
            f"tensor {tensor.name!r} has factors in one adapter and is replaced whole by another. Write a whole model "
            "(`output: model`)."
        )
    tensors, records = merge_batch(task_vectors, TensorBatch((tensor,), 0), planned.designs, seed)
    made.whole[tensor.name], made.replaced[name] = name, tensors[tensor.name]
    made.records += records


def _config(adapters: Sequence[LoraCheckpoint], made: _Merged) -> dict[str, Any]:
    """The configuration of the merged adapter: the first one's, with factors that need no scaling."""
    configs = [read_json(Path(adapter.source) / _CONFIG) for adapter in adapters]
    ranks = {made.modules[name]: rank for name, rank in made.ranks.items()}
    largest = max(ranks.values(), default=1)
    others = sorted((name for name, rank in ranks.items() if rank != largest), key=len, reverse=True)
    pattern = {re.escape(name): ranks[name] for name in others}
    asked = sorted({name for config in configs for name in config.get("modules_to_save") or ()})
    saved = [name for name in asked if any(f".{name}." in f".{whole}" for whole in made.replaced)]
    kinds = {str(config.get("bias", "none")) for config in configs}
    return {
        **{key: value for key, value in configs[0].items() if key not in _CLEARED},
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "use_rslora": False,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "inference_mode": True,
        "target_modules": sorted(ranks),
        "modules_to_save": saved or None,
        "bias": next(kind for kind in ("all", "lora_only", "none") if kind in kinds),
    }


def _report(out: Path, seconds: float) -> AdapterReport:
    record = json.loads((out / RECORD).read_text(encoding="utf-8"))
    modules = [module for tensor in record["tensors"] for module in tensor.get("modules", ())]
    ranks = {tensor["tensor"]: tensor["rank"] for tensor in record["tensors"] if "rank" in tensor}
    return AdapterReport(
        out=out,
        modules=len(ranks),
        ranks=ranks,
        replaced=tuple(record["whole"]),
        error=record["error"],
        status=dict(Counter(module["status"] for module in modules)),
        experts=totals_of(record),
        nbytes=(out / _WEIGHTS).stat().st_size,
        seconds=seconds,
    )

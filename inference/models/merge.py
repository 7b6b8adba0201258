"""Merge a whole checkpoint, shard by shard, into a Hugging Face folder.

Tensors are worked on in batches; a finished batch is saved at once, so that memory stays at a few tensors and an
interrupted merge goes on where it was. Nothing is in the output folder's place before everything is done.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from inference.models.artifacts import matmul_precision, versions
from inference.models.design import Design
from inference.models.digest import Progress, Silent, check_unchanged, digest_inputs, files_of
from inference.models.disk import OutputError, check_space, real_path
from inference.models.folder import RECORD, companion_files, left_out, rounding_of, summary_of, write_companions
from inference.models.memory import memory_errors
from inference.models.method_design import AnyDesigns, MethodDesign, as_any_function
from inference.models.model_card import model_card
from inference.models.plan import BATCH_BYTES, Plan, TensorBatch, inputs_of, plan
from inference.models.preparing import prepare_designs
from inference.models.ranks import ALONE, Ranks, require_same_files, require_same_state
from inference.models.staging import Finished, Staging, check_output
from inference.models.tensor_batches import merge_batch
from inference.retention import ExpertRetention, concerns, totals
from inference.solution import Status
from poe_models.weights.loading import Checkpoint
from poe_models.weights.task_vectors import TaskVectors
from poe_models.weights.transfer import ReadAhead

__all__ = ["Design", "MergeReport", "MethodDesign", "OutputError", "Plan", "Progress", "merge_checkpoint", "plan"]


@dataclass(frozen=True, repr=False)
class MergeReport:
    """Report of a merge: tensors per treatment, statuses of the solver, what was kept of every expert.

    Attributes:
        out: The folder.
        tensors: Number of tensors per action: merge, average, base.
        modules: Number of matrices solved.
        status: Number of matrices per status of the solver.
        not_converged: Names of the matrices whose solve did not converge.
        experts: How much the merge kept of every expert, over all matrices.
        updated: Entries of half-precision tensors that the merge changed, before rounding; 0 without such tensors.
        rounded_back: How many of them rounding to half precision took back to the base's value.
        equal_to_base: Merged or averaged tensors that came out as the base's.
        nbytes: Bytes of weights written.
        copied: Names of the files of the base's folder that came along.
        left_out: Names of those that were left there: links out of it, and files of unknown kinds.
        resumed_batches: Batches that an interrupted run had finished before.
        seconds: Wall time of this run.
    """

    out: Path
    tensors: Mapping[str, int]
    modules: int
    status: Mapping[str, int]
    not_converged: tuple[str, ...]
    experts: tuple[ExpertRetention, ...]
    updated: int
    rounded_back: int
    equal_to_base: int
    nbytes: int
    copied: tuple[str, ...]
    left_out: tuple[str, ...]
    resumed_batches: int
    seconds: float

    @override
    def __repr__(self) -> str:
        kinds = ", ".join(f"{count} {action}" for action, count in self.tensors.items())
        lines = [
            f"MergeReport({self.out}: {sum(self.tensors.values())} tensors ({kinds}), {self.nbytes / 1e6:.3g} MB",
            f"  {self.modules} matrices: {', '.join(f'{n} {status}' for status, n in self.status.items()) or 'none'}",
            *(f"  {expert.name}: {expert.kept_percent} kept" for expert in self.experts),
            *(f"  warning: {text}" for text in self.concerns),
        ]
        return "\n".join(lines) + f"; {self.seconds:.3g} s)"

    @property
    def concerns(self) -> list[str]:
        """Warnings about a merge that is little more than the base, or than one of its experts."""
        return concerns(self.experts)


def merge_checkpoint(
    task_vectors: TaskVectors,
    design: AnyDesigns,
    out: str | Path,
    *,
    out_dtype: torch.dtype | None = None,
    batch_bytes: int = BATCH_BYTES,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    code: Sequence[Path] = (),
    resume: bool = False,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> MergeReport:
    """Merge a checkpoint into a new folder.

    The folder has the base's shards, config and tokenizer files, a model card, and ``poe_merge.json`` with the digests
    of all inputs and of the weights that were written, versions, settings, and what happened to each tensor. Merged
    tensors are ``W_0 + λ Z``, averaged ones ``W_0 + λ Σ ω_i U_i / Σ ω_i`` with the experts' importances ω. The work is
    done in ``OUT.partial`` beside it, which an interrupted merge leaves behind.

    On a GPU stored tensors of the next batch are read into pinned memory while one is solved. Products of float32
    matrices are full float32 unless ``torch.set_float32_matmul_precision`` was told otherwise, which is recorded too.

    Args:
        task_vectors: Base and experts.
        design: One product, method or design for all tensors, or a function from the name of a merged tensor.
        out: The folder to make.
        out_dtype: Dtype of floating tensors in the output; the base's own by default.
        batch_bytes: Byte budget of the updates that are solved as one batch.
        seed: Of torch's generators while a batch is solved, for energies and centres that draw; methods have their own.
        settings: What the merge was configured with, for the record.
        code: Source files that decide what comes out, such as a user's energy; their digests are recorded.
        resume: Go on with an interrupted merge of the same inputs and settings.
        progress: Told how far the merge is.
        ranks: The processes that share the work; each calls this with the same arguments. The output is that of one.

    Returns:
        What was done.

    Raises:
        OutputError: If the folder exists or would overwrite an input, the disk is full, or the interrupted merge was
            another one.
        CheckpointError: If an input cannot be read, has values that are not finite, or is a copy of the base; batches
            that are finished stay in ``OUT.partial``.
        ValueError: If the design cannot be solved.
    """
    began, progress = time.monotonic(), progress or Silent()
    planned = plan(task_vectors, design, out_dtype=out_dtype, batch_bytes=batch_bytes)
    staging = _checked(task_vectors, planned, Path(out), resume) if ranks.first else _joined(Path(out))
    checkpoints = inputs_of(task_vectors, planned.designs)
    inputs = _digests(task_vectors, checkpoints, code, progress) if ranks.first else {}
    state = {
        "settings": dict(settings or {}),
        "seed": seed,
        **_state(task_vectors, planned),
        "out_dtype": None if out_dtype is None else str(out_dtype).removeprefix("torch."),
        "batch_bytes": batch_bytes,
        "inputs": inputs,
        "versions": versions(),
    }
    resumed, written = len(planned.batches), None
    with staging.shared(ranks, state, partial(check_unchanged, checkpoints.values())):
        require_same_files(ranks, checkpoints.values())
        require_same_state(ranks, state)
        if not ranks.gather(staging.published)[0]:
            if any(each.method is not None and not each.method.ready for each in planned.designs):
                ready = prepare_designs(task_vectors, as_any_function(design), progress)
                planned = plan(task_vectors, ready, out_dtype=out_dtype, batch_bytes=batch_bytes)
            resumed = _write_shards(task_vectors, planned, staging, seed, progress, ranks)
            if ranks.first:
                written = _write_rest(task_vectors.base, planned, staging, out_dtype, state)
        if ranks.first:
            staging.publish()
    written = written or json.loads((staging.out / RECORD).read_text(encoding="utf-8"))
    return _report(task_vectors.base, staging.out, planned, written, resumed, time.monotonic() - began)


def _state(task_vectors: TaskVectors, planned: Plan) -> dict[str, Any]:
    """Dtype, device, designs, averages and rules of a merge as plain data, for the record."""
    return {
        "compute_dtype": str(task_vectors.dtype).removeprefix("torch."),
        "matmul_precision": matmul_precision(),
        "device": task_vectors.device.type,
        "designs": [each.describe() for each in planned.designs],
        "averages": sorted({(each.scaling, *each.importance) for each in planned.averages}),
        "rules": task_vectors.rules.to_dicts(),
    }


def _digests(
    task_vectors: TaskVectors, checkpoints: Mapping[str, Checkpoint], code: Sequence[Path], progress: Progress
) -> dict[str, Any]:
    """Digests of all inputs, once it is clear that no expert is the base."""
    inputs = digest_inputs(checkpoints, code, progress)
    task_vectors.refuse_copies()
    return inputs


def _joined(out: Path) -> Staging:
    """The staging folder as the other ranks see it, which the first one checks and begins."""
    return Staging(real_path(out.expanduser()), "merge")


def _checked(task_vectors: TaskVectors, planned: Plan, out: Path, resume: bool) -> Staging:
    """The staging folder, once it is clear that the output can be written there."""
    checkpoints = inputs_of(task_vectors, planned.designs).values()
    sources = [Path(checkpoint.source) for checkpoint in checkpoints if checkpoint.files]
    inputs = [*sources, *(file for checkpoint in checkpoints for file in files_of(checkpoint))]
    staging = Staging(check_output(out, inputs, resume=resume), "merge")
    staging.check(resume)
    companions = sum(path.stat().st_size for path, _ in companion_files(task_vectors.base))
    if not staging.published:
        check_space(staging.folder, planned.disk_bytes + companions - staging.nbytes())
    return staging


def _write_shards(
    task_vectors: TaskVectors, planned: Plan, staging: Staging, seed: int, progress: Progress, ranks: Ranks
) -> int:
    """Write this rank's share of every shard; returns how many batches of all ranks were there already."""
    costs = {each.file: [batch.cost for batch in each.batches] for each in planned.shards}
    mine = [each.batches[place] for each in planned.shards for place in sorted(ranks.share(costs[each.file]))]
    places = {id(batch): place for place, batch in enumerate(mine)}
    progress.begin("merging", sum(batch.modules for batch in mine), sum(batch.nbytes for batch in mine))

    def make(batch: TensorBatch) -> Finished:
        ahead.begin(places[id(batch)])
        with memory_errors([tensor.name for tensor in batch.tensors], batch.peak_bytes, task_vectors.device):
            return merge_batch(task_vectors, batch, planned.designs, seed)

    def done(batch: TensorBatch) -> None:
        progress.advance(batch.modules, batch.nbytes)

    with ReadAhead(task_vectors, [[tensor.name for tensor in batch.tensors] for batch in mine]) as ahead:
        there = sum(
            staging.write_shard(
                each.file, each.batches, make, each.aliases, each.headers, done, ranks, costs[each.file]
            )
            for each in planned.shards
        )
    return sum(ranks.gather(there))  # waits for the last file, too


def _write_rest(
    base: Checkpoint, planned: Plan, staging: Staging, dtype: torch.dtype | None, state: Mapping[str, Any]
) -> dict[str, Any]:
    """Write everything but the weights; returns the record."""
    records = staging.records([shard.file for shard in planned.shards])
    experts = [each.record() for each in _retention(records)]
    record = {
        **state,
        "designs": [each.describe() for each in planned.designs],
        "summary": {**summary_of(records), "reach": planned.reach, "experts": experts},
        "tensors": records,
    }
    files = {shard.file: list(shard.headers) for shard in planned.shards}
    record["written"] = staging.digests(list(files))
    record["copied"] = write_companions(staging, base, files, planned.write_bytes, dtype, record)
    staging.write("README.md", lambda path: path.write_text(str(model_card(base, record)), encoding="utf-8"))
    return record


def _retention(records: Sequence[Mapping[str, Any]]) -> tuple[ExpertRetention, ...]:
    """Share of every expert that all matrices together kept."""
    return totals(module["retention"] for record in records for module in record.get("modules", ()))


def _report(
    base: Checkpoint, out: Path, planned: Plan, record: Mapping[str, Any], resumed: int, seconds: float
) -> MergeReport:
    records = record["tensors"]
    modules = [module for record in records for module in record.get("modules", ())]
    updated, rounded_back = rounding_of(records)
    return MergeReport(
        out=out,
        tensors={action: planned.count(action) for action in ("merge", "average", "base")},
        modules=len(modules),
        status=dict(Counter(module["status"] for module in modules)),
        not_converged=tuple(m["module"] for m in modules if not Status[m["status"].upper()].converged),
        experts=tuple(map(ExpertRetention.of_record, record["summary"]["experts"])),
        updated=updated,
        rounded_back=rounded_back,
        equal_to_base=sum("equals_base" in record for record in records),
        nbytes=planned.write_bytes,
        copied=tuple(record["copied"]),
        left_out=tuple(left_out(base)),
        resumed_batches=resumed,
        seconds=seconds,
    )

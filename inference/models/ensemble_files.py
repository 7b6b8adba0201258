"""Write the members of an ensemble as checkpoint folders or as float32 deltas, a few tensors in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference.models.artifacts import versions
from inference.models.design import design_text
from inference.models.digest import Progress, Silent, check_unchanged, digest_inputs, files_of
from inference.models.disk import check_space, real_path
from inference.models.folder import weight_files, write_companions
from inference.models.member_tensors import MemberTensors
from inference.models.method_design import MethodDesign
from inference.models.model_draws import ModelDraws
from inference.models.ranks import Ranks, require_same_files, require_same_state
from inference.models.staging import Finished, Headers, Staging, check_output
from inference.models.tensor_batches import rounding_of_tensor
from poe_models.weights.loading import Checkpoint, open_checkpoint

_DELTA = "delta.safetensors"
_PART_BYTES = 32 * 2**20
_Make = Callable[[str], tuple[Tensor, dict[str, Any]]]


def save_members(
    tensors: MemberTensors,
    out: Path,
    kind: str,
    resume: bool,
    progress: Progress | None,
    extras: Callable[[Staging], None] | None,
    ranks: Ranks,
) -> Path:
    """Write all members; see ``MergedEnsemble.save``.

    Raises:
        ValueError: If the kind is neither "checkpoints" nor "deltas".
        OutputError: If the processes have drawn other members.
    """
    if kind not in ("checkpoints", "deltas"):
        raise ValueError(f"`save(format={kind!r})`: unknown. Give 'checkpoints' or 'deltas'.")
    checkpoints = tensors.inputs
    inputs = [file for checkpoint in checkpoints.values() for file in files_of(checkpoint)]
    if ranks.first:
        staging = Staging(check_output(out, inputs, resume=resume))
        staging.check(resume)
    else:
        staging = Staging(real_path(out.expanduser()))
    progress = progress or Silent()
    digests = ranks.gather(digest_inputs(checkpoints, (), progress) if ranks.first else {})[0]
    writer = _Writer(tensors, staging, kind, progress, digests, ranks)
    if ranks.first and not staging.published:
        check_space(staging.folder, writer.needed() - staging.nbytes())
    with staging.shared(ranks, writer.state, partial(check_unchanged, checkpoints.values())):
        require_same_files(ranks, checkpoints.values())
        require_same_state(ranks, writer.state)
        if not ranks.gather(staging.published)[0]:
            if ranks.first and extras is not None:
                extras(staging)
            writer.write()
            if not ranks.first:  # the first one does as it publishes
                staging.read_back()
        ranks.wait()
        if ranks.first:
            staging.publish()
    return staging.out


class _Writer:
    """Writer of all members of an ensemble into one output."""

    def __init__(
        self,
        tensors: MemberTensors,
        staging: Staging,
        kind: str,
        progress: Progress,
        inputs: Mapping[str, Any],
        ranks: Ranks,
    ) -> None:
        self.tensors, self.staging, self.kind, self.progress = tensors, staging, kind, progress
        self.inputs, self.ranks = inputs, ranks
        self.base, self.sampled, self.layout = tensors.base, tensors.sampled, weight_files(tensors.base)
        treatments = tensors.task_vectors.treatments
        self.changed = [
            name
            for name in tensors.shared
            if self.base.tensors[name].dtype.is_floating_point
            and (tensors.elsewhere is not None or treatments[name].action != "base")
        ]

    @cached_property
    def state(self) -> dict[str, Any]:
        """Description of the output, as plain data: a resumed save must have the same."""
        tensors, dtype = self.tensors, self.tensors.out_dtype
        treatments = tensors.task_vectors.treatments
        return {
            "kind": "ensemble",
            "format": self.kind,
            "members": len(tensors.draws),
            "sampled": list(tensors.draws.modules),
            "draws": tensors.draws.digest(),
            "source": tensors.draws.source,
            "out_dtype": None if dtype is None else str(dtype).removeprefix("torch."),
            "designs": list(dict.fromkeys(self._design(name) for name in treatments if treatments[name].view)),
            "base": self.base.source,
            "experts": {name: checkpoint.source for name, checkpoint in tensors.task_vectors.experts.items()},
            "elsewhere": None if tensors.elsewhere is None else tensors.elsewhere.source,
            "inputs": self.inputs,
            "versions": versions(),
        }

    def write(self) -> None:
        """Write this process's members, those that are finished excepted; what all share is the first one's."""
        draws, nbytes = self.tensors.draws, sum(self.base.tensors[name].nbytes for name in self.sampled)
        own = sorted(self.ranks.share([1.0] * len(draws)))  # member 0 is the first process's
        self.progress.begin("members", len(own) * len(draws.modules), len(own) * nbytes)
        if self.ranks.first:
            if self.kind == "deltas" and self.changed:
                self._weight_file(f"shared/{_DELTA}", self.changed, {}, partial(self._delta, None))
            self._member(own.pop(0))
        if self.kind == "checkpoints":
            self.ranks.wait()  # for what the others read back
        for index in own:
            self._member(index)
        if self.ranks.first:
            names = {"sampled_tensors": list(self.sampled), "tied": dict(self.base.aliases)}
            self.staging.write_record("ensemble.json", {**self.state, **names}, list(names))

    def _member(self, index: int) -> None:
        """Write one member; checkpoints read what all share back from the first."""
        draws, member = self.tensors.draws, f"member-{index:03d}"
        draw = draws[index]
        if self.kind == "deltas":
            self._weight_file(f"{member}/{_DELTA}", self.sampled, {}, partial(self._delta, draw))
        else:
            self._checkpoint(member, draw, first=index == 0)
        nbytes = sum(self.base.tensors[name].nbytes for name in self.sampled)
        self.progress.advance(len(draws.modules), nbytes)

    def needed(self) -> int:
        """Bytes on the disk, the parts of one folder included."""
        checkpoints = self.kind == "checkpoints"
        copies = len(self.tensors.draws) + 1
        if checkpoints:
            return copies * self._nbytes()
        nbytes = {name: 4 * math.prod(info.shape) for name, info in self.base.tensors.items()}
        return sum(nbytes[name] for name in self.changed) + copies * sum(nbytes[name] for name in self.sampled)

    def _nbytes(self) -> int:
        """Bytes of the tensors of a member."""
        sizes = {n: math.prod(i.shape) * self.tensors.dtype_of(n).itemsize for n, i in self.base.tensors.items()}
        return sum(sizes.values()) + sum(sizes[self.base.aliases[name]] for name in self.base.apart)

    def _design(self, tensor: str) -> str:
        design = self.tensors.design_of(tensor)
        text = repr(design.method) if isinstance(design, MethodDesign) else design_text(design, solver=True)
        return f"{text} lambda={design.scaling:g}"

    def _checkpoint(self, member: str, draw: ModelDraws, *, first: bool) -> None:
        """Write a member's folder: weights, config and tokenizer of the base, and where the member comes from."""
        like = None if first else open_checkpoint(self.staging.content / "member-000")
        files: dict[str, list[str]] = {}
        for file, names in self.layout.items():
            own = {alias: target for alias, target in self.base.aliases.items() if target in names}
            self._weight_file(f"{member}/{file}", names, own, partial(self._weights, draw, like))
            files[file] = [*names, *(alias for alias in own if alias in self.base.apart)]
        record = {**self.state, "kind": "member of an ensemble", "member": member}
        if rounded := [each for each in self.staging.records([f"{member}/{file}" for file in files]) if each]:
            record["rounding"] = {key: sum(each[key] for each in rounded) for key in rounded[0]}
        write_companions(
            self.staging, self.base, files, self._nbytes(), self.tensors.out_dtype, record, prefix=f"{member}/"
        )

    def _weight_file(self, name: str, names: Sequence[str], aliases: Mapping[str, str], make: _Make) -> None:
        def batch(names: list[str]) -> Finished:
            made = {tensor: make(tensor) for tensor in names}
            return {tensor: value for tensor, (value, _) in made.items()}, [record for _, record in made.values()]

        self.staging.write_shard(name, self._batches(names), batch, aliases, self._headers(names, aliases))

    def _headers(self, names: Sequence[str], aliases: Mapping[str, str]) -> Headers:
        """Dtype and shape of the tensors of a weight file."""
        deltas, tensors = self.kind == "deltas", self.base.tensors
        own = {name: torch.float32 if deltas else self.tensors.dtype_of(name) for name in names}
        return {
            name: (own[target], tensors[target].shape)
            for name, target in [*((name, name) for name in names), *aliases.items()]
            if name == target or name in self.base.apart
        }

    def _weights(self, draw: ModelDraws, like: Checkpoint | None, tensor: str) -> tuple[Tensor, dict[str, Any]]:
        """A tensor of a member; those that members share are read back from the first one."""
        if like is not None and tensor not in self.sampled:
            return like.read(tensor), {}
        value = self.tensors.value(tensor, draw)
        rounded = self.tensors.rounded(tensor, value)
        record = rounding_of_tensor(self.base, tensor, value, rounded) if tensor in self.sampled else None
        return rounded, record or {}

    def _delta(self, draw: ModelDraws | None, tensor: str) -> tuple[Tensor, dict[str, Any]]:
        value = self.tensors.value(tensor, draw).to(self.tensors.task_vectors.dtype)
        return (value - self.base.read(tensor).to(value.dtype)).float().contiguous(), {}

    def _batches(self, names: Sequence[str]) -> list[list[str]]:
        """Tensors that are made and saved together: one, or several small ones."""
        batches: list[list[str]] = []
        room = 0
        for name in names:
            size = self.base.tensors[name].nbytes
            if not batches or size > room:
                batches.append([])
                room = _PART_BYTES
            batches[-1].append(name)
            room -= size
        return batches

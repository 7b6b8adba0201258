"""Write the members of an ensemble as checkpoint folders or as float32 deltas, a few tensors in memory at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference.models.artifacts import versions
from inference.models.design import design_text
from inference.models.digest import Progress, Silent, files_of
from inference.models.folder import RECORD, companion_files
from inference.models.member_tensors import MemberTensors
from inference.models.method_design import MethodDesign
from inference.models.model_draws import ModelDraws
from inference.models.staging import OutputError, Staging, check_output, check_space
from poe_models.weights.loading import Checkpoint, open_checkpoint

_INDEX = "model.safetensors.index.json"
_STATE, _BEGUN = "ensemble.json", "ensemble_state.json"
_DELTA = "delta.safetensors"
_PART_BYTES = 32 * 2**20
_HALF = (torch.bfloat16, torch.float16)
_Make = Callable[[str], tuple[Tensor, dict[str, Any]]]


def save_members(
    tensors: MemberTensors,
    out: Path,
    kind: str,
    resume: bool,
    progress: Progress | None,
    extras: Callable[[Path], None] | None,
) -> Path:
    """Write all members; see `MergedEnsemble.save`.

    Args:
        tensors: Makes the members.
        out: The folder to make.
        kind: "checkpoints" or "deltas".
        resume: Go on with an interrupted save.
        progress: Told how far it is.
        extras: Writes further files into the folder before the first member is made.

    Returns:
        The folder.

    Raises:
        ValueError: If `kind` is unknown.
    """
    if kind not in ("checkpoints", "deltas"):
        raise ValueError(f"`save(format={kind!r})`: unknown. Give 'checkpoints' or 'deltas'.")
    return _Writer(tensors, out, kind, progress or Silent()).write(resume, extras)


def check_begun(partial: Path, resume: bool) -> None:
    """Refuse to run over an interrupted save unasked.

    Args:
        partial: `OUT.partial`.
        resume: Whether to go on with it.

    Raises:
        OutputError: If it is there and `resume` is false.
    """
    if partial.exists() and not resume:
        raise OutputError(
            f"{partial} is left from an interrupted save. Go on with it (`resume=True`, or `--resume` on the command "
            "line), or remove that folder to start again."
        )


class _Writer:
    """One save."""

    def __init__(self, tensors: MemberTensors, out: Path, kind: str, progress: Progress) -> None:
        self.tensors, self.kind, self.progress = tensors, kind, progress
        self.base, self.sampled, experts = tensors.base, tensors.sampled, tensors.task_vectors.experts
        self.out = check_output(out, [file for c in (self.base, *experts.values()) for file in files_of(c)])
        self.partial = self.out.with_name(self.out.name + ".partial")
        treatments = tensors.task_vectors.treatments
        self.changed = [
            name
            for name in tensors.shared
            if self.base.tensors[name].dtype.is_floating_point
            and (tensors.elsewhere is not None or treatments[name].action != "base")
        ]
        dtype = tensors.out_dtype
        self.state: dict[str, Any] = {
            "kind": "ensemble",
            "format": kind,
            "members": len(tensors.draws),
            "sampled": list(tensors.draws.modules),
            "draws": tensors.draws.digest(),
            "source": tensors.draws.source,
            "out_dtype": None if dtype is None else str(dtype).removeprefix("torch."),
            "designs": list(dict.fromkeys(self._design(name) for name in treatments if treatments[name].view)),
            "base": self.base.source,
            "experts": {name: checkpoint.source for name, checkpoint in experts.items()},
            "elsewhere": None if tensors.elsewhere is None else tensors.elsewhere.source,
            "versions": versions(),
        }

    def write(self, resume: bool, extras: Callable[[Path], None] | None) -> Path:
        """Write everything, then move it into place."""
        self._begin(resume)
        if extras is not None:
            extras(self.partial)
        draws, nbytes = self.tensors.draws, sum(self.base.tensors[name].nbytes for name in self.sampled)
        self.progress.begin("members", len(draws) * len(draws.modules), len(draws) * nbytes)
        if self.kind == "deltas" and self.changed:
            self._folder("shared", {_DELTA: tuple(self.changed)}, {}, self._delta(None))
        for index, draw in enumerate(draws):
            name = f"member-{index:03d}"
            if self.kind == "deltas":
                self._folder(name, {_DELTA: self.sampled}, {}, self._delta(draw))
            else:
                first = None if index == 0 else open_checkpoint(self.partial / "member-000")
                self._folder(name, self._layout(), self.base.aliases, self._weights(draw, first))
            self.progress.advance(len(draws.modules), nbytes)
        names = {"sampled_tensors": list(self.sampled), "tied": dict(self.base.aliases)}
        self._write_state(_STATE, {**self.state, **names})
        (self.partial / _BEGUN).unlink()
        if self.out.exists():
            raise OutputError(f"{self.out} has appeared in the meantime. All members are in {self.partial}: move it.")
        self.partial.rename(self.out)
        return self.out

    def _begin(self, resume: bool) -> None:
        """Start the folder, or go on with one that is about the same ensemble."""
        begun = self.partial / _BEGUN
        check_begun(self.partial, resume)
        same = begun.exists() and json.loads(begun.read_text(encoding="utf-8")) == self.state
        if self.partial.exists() and not same:
            raise OutputError(
                f"{self.partial} was begun with another ensemble, format or library. Remove that folder to start again."
            )
        there = sum(path.stat().st_size for path in self.partial.rglob("*") if path.is_file())
        check_space(self.partial, self._needed() - there)
        self.partial.mkdir(parents=True, exist_ok=True)
        self._write_state(_BEGUN, self.state)

    def _write_state(self, name: str, data: Mapping[str, Any]) -> None:
        temporary = self.partial / f"{name}.tmp"
        temporary.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(self.partial / name)

    def _design(self, tensor: str) -> str:
        design = self.tensors.design_of(tensor)
        text = repr(design.method) if isinstance(design, MethodDesign) else design_text(design, solver=True)
        return f"{text} lambda={design.scaling:g}"

    def _folder(
        self, name: str, layout: Mapping[str, tuple[str, ...]], aliases: Mapping[str, str], make: _Make
    ) -> None:
        """Write one folder unless it is there."""
        staging = Staging(self.partial / name)
        if staging.out.exists():
            return
        with staging.begin({**self.state, "folder": name}):
            for shard, (file, names) in enumerate(layout.items()):
                if not staging.has_shard(shard, file):
                    groups = self._groups(names)
                    for number, group in enumerate(groups):
                        if not staging.has_part(shard, number, group):
                            made = {tensor: make(tensor) for tensor in group}
                            values = {tensor: value for tensor, (value, _) in made.items()}
                            staging.save_part(shard, number, values, [record for _, record in made.values()])
                    own = {alias: target for alias, target in aliases.items() if target in names}
                    staging.finish_shard(shard, file, len(groups), own)
                staging.drop_parts(shard)
            if self.kind == "checkpoints":
                self._companions(staging, layout)
            staging.publish()

    def _weights(self, draw: ModelDraws, first: Checkpoint | None) -> _Make:
        """Makes tensors of a member; those that members share are read back from the first one."""

        def make(tensor: str) -> tuple[Tensor, dict[str, Any]]:
            if first is not None and tensor not in self.sampled:
                return first.read(tensor), {}
            value = self.tensors.value(tensor, draw)
            rounded = self.tensors.rounded(tensor, value)
            return rounded, self._rounding(tensor, value, rounded)

        return make

    def _delta(self, draw: ModelDraws | None) -> _Make:
        def make(tensor: str) -> tuple[Tensor, dict[str, Any]]:
            value = self.tensors.value(tensor, draw).to(self.tensors.task_vectors.dtype)
            return (value - self.base.read(tensor).to(value.dtype)).float().contiguous(), {}

        return make

    def _rounding(self, tensor: str, value: Tensor, rounded: Tensor) -> dict[str, Any]:
        if rounded.dtype not in _HALF or tensor not in self.sampled:
            return {}
        base = self.base.read(tensor)
        updated = value != base.to(value.dtype)
        back = updated & (rounded == base.to(rounded.dtype))
        return {"updated": int(updated.sum()), "rounded_back": int(back.sum())}

    def _companions(self, staging: Staging, layout: Mapping[str, tuple[str, ...]]) -> None:
        """Config and tokenizer of the base, an index of several shards, and where the member comes from."""
        for path, name in companion_files(self.base):
            staging.copy(path, name)
        if self.tensors.out_dtype is not None and self.base.config is not None:
            staging.write_json("config.json", _with_dtype(self.base.config, self.state["out_dtype"]))
        if len(layout) > 1:
            files = {tensor: file for file, names in layout.items() for tensor in names}
            files |= {alias: files[target] for alias, target in self.base.aliases.items()}
            total = sum((staging.folder / "model" / file).stat().st_size for file in layout)
            staging.write_json(_INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))})
        record = {**self.state, "kind": "member of an ensemble", "member": staging.out.name}
        if rounded := [each for each in staging.records() if each]:
            record["rounding"] = {key: sum(each[key] for each in rounded) for key in rounded[0]}
        staging.write_json(RECORD, record)

    def _groups(self, names: Sequence[str]) -> list[list[str]]:
        """Tensors that are made and saved together: one, or several small ones."""
        groups: list[list[str]] = []
        room = 0
        for name in names:
            size = self.base.tensors[name].nbytes
            if size > room:
                groups.append([])
                room = _PART_BYTES
            groups[-1].append(name)
            room -= size
        return groups

    def _layout(self) -> dict[str, tuple[str, ...]]:
        return {_file_name(file): names for file, names in self.base.layout.items()}

    def _needed(self) -> int:
        """Bytes on the disk, the parts of one folder included."""
        checkpoints, dtype_of = self.kind == "checkpoints", self.tensors.dtype_of
        nbytes = {
            name: math.prod(info.shape) * (dtype_of(name).itemsize if checkpoints else 4)
            for name, info in self.base.tensors.items()
        }
        copies = len(self.tensors.draws) + 1
        if checkpoints:
            return copies * sum(size * len(self.base.tied_names(name)) for name, size in nbytes.items())
        return sum(nbytes[name] for name in self.changed) + copies * sum(nbytes[name] for name in self.sampled)


def _file_name(file: str) -> str:
    """The name of a weight file once it is safetensors."""
    path = Path(file)
    return file if path.suffix == ".safetensors" else f"{path.stem.replace('pytorch_model', 'model')}.safetensors"


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config whose dtype entries, those of its parts included, say what is in the weights."""
    changed = {key: _with_dtype(value, dtype) if isinstance(value, Mapping) else value for key, value in config.items()}
    return changed | {key: dtype for key in ("dtype", "torch_dtype") if isinstance(config.get(key), str)}

"""The interface of checkpoints, whatever their files: named tensors that are read one at a time."""

from __future__ import annotations

import difflib
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from poe_models.weights.json_files import read_object


class CheckpointError(ValueError):
    """An error in an input file, its tensors, or how two of them fit together."""


class InputChanged(CheckpointError):
    """An input file is not what it was when it was opened."""


Stamp = tuple[int, int, int, int]


def stamp_of(path: Path) -> Stamp:
    """Inode, size and times of a file, which stay equal until it is written to, truncated or replaced.

    Raises:
        InputChanged: If the file is not there.
    """
    try:
        found = os.stat(path)
    except OSError as error:
        raise InputChanged(f"{path}: not there any more ({error.strerror}). Put it back and run again.") from error
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def check_stamp(path: Path, stamp: Stamp, tensor: str | None = None) -> None:
    """Refuse a file that is not what it was when its stamp was taken; the tensor, if one is read, is named.

    Raises:
        InputChanged: If it was written to, replaced or removed.
    """
    if stamp_of(path) != stamp:
        where = f"{path}: " if tensor is None else f"{path}: tensor {tensor!r}: "
        raise InputChanged(f"{where}the file changed while it was in use. Run again once nothing writes to it.")


@dataclass(frozen=True)
class TensorInfo:
    """The header of one tensor.

    Args:
        name: Name of the tensor in its checkpoint.
        shape: Its shape as stored.
        dtype: Its dtype as stored.
        file: The file that holds it; None for tensors in memory.

    >>> TensorInfo("fc.weight", (3, 2), torch.bfloat16).nbytes
    12
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path | None = None

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data as stored, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint(ABC):
    """Named tensors; opening reads headers only, :meth:`read` reads one tensor.

    Attributes:
        source: The path it was opened from, or ``"<memory>"``.
        tensors: Name to header, in the order of the files; a tied tensor appears once, under its canonical name.
        aliases: Further name of a tied tensor to its canonical name. Known from shared storage (PyTorch files, state
            dicts in memory) and from the metadata that safetensors' ``save_model`` writes.
        apart: Those aliases that the files store by themselves, or that a config says are not tied: a merge writes them
            once more, since a reader of the base finds them there. The others share memory; they are names in the
            file's metadata only, as safetensors' ``save_model`` writes them.
        config: The folder's parsed ``config.json``, or None.
        files: The weight files, in order.
        layout: File name to the names of the tensors it holds; ``"model.safetensors"`` for single files and memory.
        metadata: The ``__metadata__`` of safetensors files.
        stamps: Files that were read, configs included, with their stamps from before.
    """

    source: str
    tensors: Mapping[str, TensorInfo]
    aliases: Mapping[str, str]
    apart: Collection[str] = frozenset()
    config: dict[str, Any] | None
    files: tuple[Path, ...]
    layout: Mapping[str, tuple[str, ...]]
    metadata: Mapping[str, str]
    stamps: Mapping[Path, Stamp] = MappingProxyType({})
    _tied: tuple[Mapping[str, str], Mapping[str, Sequence[str]]] | None = None

    def check_unchanged(self) -> None:
        """Refuse to go on with files that are not what they were when they were opened.

        Raises:
            CheckpointError: If one was written to, replaced or removed; names it.
        """
        for path, stamp in self.stamps.items():
            check_stamp(path, stamp)

    @abstractmethod
    def _read(self, name: str) -> Tensor:
        """Read the tensor of a canonical name."""

    def read(self, name: str) -> Tensor:
        """Read one tensor.

        Args:
            name: Canonical name or alias.

        Returns:
            The tensor on the CPU in the checkpoint's own dtype. It may share memory with the file or with the caller's
            state dict: never write into it.

        Raises:
            CheckpointError: If there is no such tensor, or its data cannot be read.
        """
        return self._read(self._canonical(name))

    def read_each(self, names: Sequence[str]) -> list[Tensor]:
        """Read several tensors; what is looked up once for all of them makes small ones cheap.

        Args:
            names: Canonical names or aliases.

        Returns:
            What ``read`` gives of each, in their order.

        Raises:
            CheckpointError: If one is not there, or its data cannot be read.
        """
        return self._read_each([self._canonical(name) for name in names])

    def _read_each(self, names: Sequence[str]) -> list[Tensor]:
        """Read the tensors of canonical names."""
        return [self._read(name) for name in names]

    def read_ahead(self, names: Sequence[str], pool: Executor) -> None:  # noqa: B027 (nothing, by itself)
        """Begin to read tensors into pinned memory, for :meth:`read` to give until they are forgotten.

        Args:
            names: Canonical names. Tensors that are in no file, or in one that cannot be read in parallel, are read
                when they are asked for.
            pool: What reads.
        """

    def forget(self, names: Sequence[str]) -> None:  # noqa: B027 (nothing, by itself)
        """Let go of tensors that were read ahead.

        Args:
            names: Canonical names.
        """

    def _canonical(self, name: str) -> str:
        canonical = self.aliases.get(name, name)
        if canonical not in self.tensors:
            near = difflib.get_close_matches(name, [*self.tensors, *self.aliases], n=1)
            hint = f"the nearest name is {near[0]!r}" if near else "`tensors` lists the names"
            raise CheckpointError(f"`read({name!r})`: {self.source} has no such tensor; {hint}.")
        return canonical

    def tied_names(self, name: str) -> tuple[str, ...]:
        """All names of the tensor called ``name``, the canonical one first; more than one if it is tied."""
        if not self.aliases:
            return (name,)
        canonical = self.aliases.get(name, name)
        return (canonical, *self._further_names().get(canonical, ()))

    def _further_names(self) -> Mapping[str, Sequence[str]]:
        """Canonical names of tied tensors to their others; counted anew where ``aliases`` is another mapping."""
        if self._tied is None or self._tied[0] is not self.aliases:
            names: dict[str, list[str]] = {}
            for alias, target in self.aliases.items():
                names.setdefault(target, []).append(alias)
            self._tied = self.aliases, names
        return self._tied[1]

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.source!r}, {len(self.tensors)} tensors)"


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a message about a name that is not there: the most similar one, or nothing.

    >>> nearest("fc.wieght", ["fc.weight", "head.bias"])
    "; the nearest is 'fc.weight'"
    """
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; the nearest is {near[0]!r}" if near else ""


def find_aliases(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Later name to first name of tied tensors: the same memory, offset, shape and strides; other views are not tied.

    >>> w = torch.zeros(2, 2)
    >>> find_aliases({"wte": w, "lm_head": w, "row": w[:1]})
    {'lm_head': 'wte'}
    """
    first: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0 or tensor.is_meta or tensor.layout != torch.strided:
            continue
        view = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if view in first:
            aliases[name] = first[view]
        else:
            first[view] = name
    return aliases


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that must hold a JSON object; a ``CheckpointError`` says so if it does not."""
    try:
        return read_object(path)
    except ValueError as error:
        raise CheckpointError(f"{error} Copy the file anew.") from error


# Ends of names that only a quantiser writes, and the format they belong to.
_MARKERS = {
    **{f"{dot}{end}": "GPTQ or AWQ" for end in ("qweight", "qzeros", "g_idx") for dot in ("", ".")},
    **{f".{end}": "bitsandbytes 4-bit" for end in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")},
    **{f"{dot}{end}": "bitsandbytes int8" for end in ("SCB", "weight_format") for dot in ("", ".")},
    **dict.fromkeys(("weight_packed", ".weight_packed"), "compressed-tensors"),
    ".weight_scale_inv": "block-scaled fp8",
    **dict.fromkeys(("W_q", ".W_q"), "HQQ"),
}
_QUANT_STATE = ".quant_state."  # and whatever follows, of bitsandbytes 4-bit
_SUB_BYTE = re.compile(r"\.(u?int[1-7]$|qu?int|bits)")
_PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Integer tensors with two or more axes are packed weights under the names of weights, if they are of one byte or have
# scales beside them; others are tables, codes and masks. Nothing packs into eight bytes.
_WEIGHT = re.compile(r"(^|_)(weight|kernel|proj|packed|blocks)$", re.IGNORECASE)
_SCALED = re.compile(r"(^|_)(weight|kernel|proj|packed|blocks|data|w\d?)$", re.IGNORECASE)
_SCALES = [
    f"{start}{end}"
    for start in ("", "_", "q", "weight_", "w_")
    for end in ("scale", "scales", "zero", "zeros", "zero_point", "zero_points", "scale_and_zero", "absmax", "SCB")
]
_FACTOR = re.compile(r"lora_|\.lora\.|modules_to_save|\.alpha$|_alpha$")


def refuse_adapter(source: str, names: Iterable[str], folder: Path | None = None) -> None:
    """Refuse tensors that are all those of a LoRA adapter, in a file given by itself; ``folder`` is where it lies."""
    own = list(names)
    if not any("lora_" in name for name in own) or not all(_FACTOR.search(name) for name in own):
        return
    if folder is not None and (folder / "adapter_config.json").is_file():
        way = f"Give its folder, {folder}, which has its config."
    else:
        way = (
            "Without PEFT's adapter_config.json its scaling is not known: give the folder that PEFT saved, or merge it "
            "into its model with the tool that trained it and give the merged model."
        )
    raise CheckpointError(f"{source}: a LoRA adapter, not a model: it holds factors such as {own[0]!r}. {way}")


def refuse_quantised(source: str, tensors: Iterable[TensorInfo], config: dict[str, Any] | None) -> None:
    """Refuse a checkpoint, called ``source``, whose headers or config say that its weights are quantised.

    Integer buffers (position ids, counters, masks) are no weights and pass.
    """

    def error(what: str) -> CheckpointError:
        return CheckpointError(
            f"`open_checkpoint({source!r})`: {what}: quantised weights cannot be merged. Give the checkpoint in a "
            "floating dtype (float32, bfloat16 or float16), for instance the one it was quantised from."
        )

    if config is not None and config.get("quantization_config"):
        settings = config["quantization_config"]
        method = settings.get("quant_method", "unnamed") if isinstance(settings, dict) else settings
        raise error(f"config.json has `quantization_config` (method {method!r})")
    own = list(tensors)
    names = {info.name for info in own}
    for info in own:
        kind = quantisation_of(info, names)
        if kind is not None:
            raise error(f"tensor {info.name!r} ({str(info.dtype).removeprefix('torch.')}) is {kind}")


def quantisation_of(info: TensorInfo, names: Collection[str] = ()) -> str | None:
    """Kind of quantisation that a tensor belongs to; None for ordinary weights and for integer buffers.

    Args:
        info: The tensor.
        names: Names of the tensors beside it: scales and zeros tell packed weights from tables of integers.

    >>> quantisation_of(TensorInfo("fc.weight", (4, 4), torch.int8))
    'packed integer weights'
    >>> quantisation_of(TensorInfo("fc.weight", (4, 4), torch.int32)) is None
    True
    >>> quantisation_of(TensorInfo("fc.weight", (4, 4), torch.int32), {"fc.weight", "fc.scales"})
    'packed integer weights'
    """
    stem, dot, end = info.name.rpartition(".")
    if f"{dot}{end}" in _MARKERS or _QUANT_STATE in info.name:
        return _MARKERS.get(f"{dot}{end}", "bitsandbytes 4-bit")
    if info.dtype in _PLAIN:
        return None
    dtype = str(info.dtype)
    if "float8" in dtype or "float4" in dtype:
        return "fp8 or fp4 weights"
    if _SUB_BYTE.search(dtype):
        return "packed integer weights"
    integer = not (info.dtype.is_floating_point or info.dtype.is_complex or info.dtype == torch.bool)
    if not integer or info.dtype.itemsize > 4 or len(info.shape) < 2 or 0 in info.shape:
        return None
    places = (f"{stem}{dot}", f"{info.name}.", f"{info.name}_")
    if any(f"{place}{scale}" in names for place in places for scale in _SCALES):
        packed = _SCALED.search(end) is not None
    else:
        packed = info.dtype.itemsize == 1 and _WEIGHT.search(end) is not None
    return "packed integer weights" if packed else None

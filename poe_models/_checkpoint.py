"""What every checkpoint looks like, whatever file it came from: named tensors that are read one at a time."""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override


class CheckpointError(ValueError):
    """Something is wrong with an input file, its tensors, or how two of them fit together."""


@dataclass(frozen=True)
class TensorInfo:
    """What the header of a file says about one tensor.

    Args:
        name: name of the tensor in its checkpoint.
        shape: its shape as stored.
        dtype: its dtype as stored.
        file: the file that holds it; None for tensors in memory.

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
    """Named tensors; opening reads headers only, `read` reads one tensor.

    Attributes:
        source: the path it was opened from, or `"<memory>"`.
        tensors: name to `TensorInfo`, in the order of the files; a tied tensor appears once, under its canonical name.
        aliases: further name of a tied tensor to its canonical name. Known from shared storage (PyTorch files, state
            dicts in memory) and from the metadata that safetensors' `save_model` writes.
        config: the folder's parsed `config.json`, or None.
        files: the weight files, in order (what a checksum of the checkpoint covers).
        layout: file name to the names of the tensors it holds; `"model.safetensors"` for single files and memory.
        metadata: the `__metadata__` of safetensors files.
    """

    source: str
    tensors: Mapping[str, TensorInfo]
    aliases: Mapping[str, str]
    config: dict[str, Any] | None
    files: tuple[Path, ...]
    layout: Mapping[str, tuple[str, ...]]
    metadata: Mapping[str, str]

    @abstractmethod
    def _read(self, name: str) -> Tensor:
        """Read the tensor of a canonical name."""

    def read(self, name: str) -> Tensor:
        """Read one tensor.

        Args:
            name: canonical name or alias.

        Returns:
            The tensor on the CPU in the checkpoint's own dtype. It may share memory with the file or with the caller's
            state dict: never write into it.

        Raises:
            CheckpointError: if there is no such tensor, or its data cannot be read.
        """
        canonical = self.aliases.get(name, name)
        if canonical not in self.tensors:
            near = difflib.get_close_matches(name, [*self.tensors, *self.aliases], n=1)
            hint = f"the nearest name is {near[0]!r}" if near else "`tensors` lists the names"
            raise CheckpointError(f"`read({name!r})`: {self.source} has no such tensor; {hint}.")
        return self._read(canonical)

    def tied_names(self, name: str) -> tuple[str, ...]:
        """Return all names of the tensor called `name`, the canonical one first.

        Args:
            name: canonical name or alias.

        Returns:
            One name for an ordinary tensor, more for a tied one.
        """
        canonical = self.aliases.get(name, name)
        return (canonical, *(alias for alias, target in self.aliases.items() if target == canonical))

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.source!r}, {len(self.tensors)} tensors)"


def find_aliases(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Find tied tensors: the same memory seen with the same offset, shape and strides.

    Args:
        tensors: name to tensor.

    Returns:
        Every later name to the first name of the same tensor. Other overlapping views are tensors of their own.

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

"""Open checkpoints lazily: Hugging Face folders, weight files, PEFT LoRA adapters, state dicts in memory.

:func:`open_checkpoint` reads headers; a tensor's data is read when it is asked for. Supported:

- a folder with ``model.safetensors``, ``model.safetensors.index.json`` and its shards, ``pytorch_model.bin``, or
  ``pytorch_model.bin.index.json`` and its shards, looked for in this order, and ``config.json`` if there is one;
- one ``.safetensors`` file;
- one PyTorch state dict (``.pt``, ``.pth``, ``.bin``, ``.ckpt``), loaded without running code: a dict of tensors, or
  one nested under ``"state_dict"``, ``"model"`` and the like provided that every leaf of it is a tensor;
- a PEFT LoRA folder (``adapter_config.json``) on top of its base, see :mod:`poe_models.weights.lora`;
- a mapping of names to tensors;
- ``MODEL+ADAPTER``, each of the above or below: the adapter on that model;
- a model id of the Hugging Face hub, ``org/name`` or ``org/name@revision``, downloaded with ``huggingface_hub``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from itertools import groupby
from pathlib import Path
from typing import Any

import huggingface_hub
from torch import Tensor
from typing_extensions import override

from poe_models.weights.checkpoint import (
    Checkpoint,
    CheckpointError,
    TensorInfo,
    find_aliases,
    nearest,
    read_json,
    refuse_adapter,
    refuse_quantised,
    stamp_of,
)
from poe_models.weights.shards import open_shards, open_single, weight_file
from poe_models.weights.tied import tied_copies, untied_names
from poe_models.weights.weight_files import WeightFile, check_plain

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_KNOWN = (*_WEIGHTS, "config.json", "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def open_checkpoint(
    source: str | Path | Mapping[str, Tensor] | Checkpoint, base: Checkpoint | None = None
) -> Checkpoint:
    """Open a checkpoint by its headers.

    Args:
        source: A folder, a weight file, a hub id, or name to tensor; an open checkpoint is returned as it is.
        base: The model that an adapter was trained on; only adapter folders need it.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: If ``source`` does not exist, is incomplete, corrupt, quantised, holds code, or is an adapter
            of an unsupported kind.

    >>> import torch
    >>> checkpoint = open_checkpoint({"fc.weight": torch.zeros(2, 3)})
    >>> checkpoint.tensors["fc.weight"].shape
    (2, 3)
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, Mapping):
        return MemoryCheckpoint(source)
    if not isinstance(source, (str, Path)):
        raise CheckpointError(
            f"`open_checkpoint(...)`: got {type(source).__name__}; expected a path, a hub id, or a mapping of names to "
            "tensors such as `model.state_dict()`."
        )
    path = Path(source).expanduser()
    parts = model_and_adapter(str(source))
    if parts is not None:
        return open_checkpoint(parts[1], base=open_checkpoint(parts[0], base))
    if not path.exists():
        path = _download(str(source))
    if path.is_file():
        return FileCheckpoint(path, [weight_file(path)])
    return _open_folder(path, base)


def model_and_adapter(source: str, folder: Path = Path()) -> tuple[str, str] | None:
    """The two parts of ``MODEL+ADAPTER``, mergekit's way to write an adapter on a model; None for what is no such text.

    Args:
        source: A path, a model id, or two of them. It is cut at the first plus sign with something that exists before
            it, else at the first.
        folder: What relative paths are relative to.

    >>> model_and_adapter("org/model+org/adapter"), model_and_adapter("org/model")
    (('org/model', 'org/adapter'), None)
    """

    def there(text: str) -> bool:
        return (folder / Path(text).expanduser()).exists()

    cuts = [place for place, letter in enumerate(source) if letter == "+"]
    if not cuts or there(source):
        return None
    cut = next((place for place in cuts if there(source[:place] or "+")), cuts[0])
    return source[:cut], source[cut + 1 :]


class FileCheckpoint(Checkpoint):
    """A checkpoint in one or more weight files.

    Args:
        path: The folder or the file it was opened from.
        parts: Its weight files.
        config: Its ``config.json``, or None.

    Raises:
        CheckpointError: If two files hold a tensor of the same name, or the weights are quantised.
    """

    def __init__(self, path: Path, parts: Sequence[WeightFile], config: dict[str, Any] | None = None) -> None:
        self.source = str(path)
        self.config = config
        self.files = tuple(part.path for part in parts)
        configs = [path / "config.json"] if config is not None else []
        self.stamps = {**{part.path: part.stamp for part in parts}, **{each: stamp_of(each) for each in configs}}
        self.layout = {
            "model.safetensors" if len(parts) == 1 else part.path.name: tuple(part.tensors) for part in parts
        }
        self.metadata = {key: value for part in parts for key, value in part.metadata.items()}
        self.aliases = {name: target for part in parts for name, target in part.aliases.items()}
        self._parts: dict[str, WeightFile] = {}
        for part in parts:
            for name in part.tensors:
                if name in self._parts:
                    raise CheckpointError(
                        f"{path}: tensor {name!r} is in both {self._parts[name].path.name} and {part.path.name}. "
                        "Remove the files of another save from the folder."
                    )
                self._parts[name] = part
        self.tensors = {name: part.tensors[name] for part in parts for name in part.tensors}
        self._last: WeightFile | None = None
        refuse_adapter(self.source, self.tensors, path.parent if path.is_file() else None)
        refuse_quantised(self.source, self.tensors.values(), config)
        copies = tied_copies(self)
        if copies:
            self._tie(copies)
        self.apart = untied_names(self) | set(copies)

    def _tie(self, aliases: Mapping[str, str]) -> None:
        """Treat tensors that are stored apart as further names of others."""
        self.aliases = {**self.aliases, **aliases}
        self.tensors = {name: info for name, info in self.tensors.items() if name not in aliases}
        self.layout = {f: tuple(name for name in names if name not in aliases) for f, names in self.layout.items()}

    @override
    def _read(self, name: str) -> Tensor:
        return self._read_each([name])[0]

    @override
    def _read_each(self, names: Sequence[str]) -> list[Tensor]:
        tensors = []
        for part, run in groupby(names, self._parts.__getitem__):
            if self._last is not None and self._last is not part:
                self._last.release()  # one open file at a time
            self._last = part
            tensors += part.read_each(list(run))
        return tensors

    @override
    def read_ahead(self, names: Sequence[str], pool: Executor) -> None:
        for name in names:
            self._parts[name].read_ahead(name, pool)

    @override
    def forget(self, names: Sequence[str]) -> None:
        for name in names:
            self._parts[name].forget(name)


class MemoryCheckpoint(Checkpoint):
    """A state dict in memory; its tensors are never written to.

    Args:
        tensors: Name to tensor, on any device.
        config: Content of ``config.json``, or None.

    Raises:
        CheckpointError: If a value is not an ordinary dense tensor, or the weights are quantised.
    """

    def __init__(self, tensors: Mapping[str, Tensor], config: dict[str, Any] | None = None) -> None:
        self.source = "<memory>"
        odd = [f"{name!r} ({type(value).__name__})" for name, value in tensors.items() if not isinstance(value, Tensor)]
        if odd or not tensors:
            raise CheckpointError(
                f"`open_checkpoint(mapping)`: {', '.join(odd[:5]) or 'the mapping is empty'}: every value must be a "
                "tensor, as in `model.state_dict()`. Pass the inner dict if the state dict is nested."
            )
        self._tensors = {name: tensor.detach() for name, tensor in check_plain(tensors, self.source).items()}
        self.config = config
        self.files = ()
        self.metadata = {}
        self.aliases = find_aliases(self._tensors)
        self.tensors = {
            name: TensorInfo(name, tuple(tensor.shape), tensor.dtype)
            for name, tensor in self._tensors.items()
            if name not in self.aliases
        }
        self.apart = untied_names(self)
        self.layout = {"model.safetensors": tuple(self.tensors)}
        refuse_adapter(self.source, self.tensors)
        refuse_quantised(self.source, self.tensors.values(), config)

    @property
    def addresses(self) -> dict[str, int]:
        """Memory address of each tensor with data."""
        return {name: tensor.data_ptr() for name, tensor in self._tensors.items() if tensor.numel()}

    @override
    def _read(self, name: str) -> Tensor:
        return self._tensors[name].cpu()


def same_weights(one: Checkpoint, other: Checkpoint) -> bool:
    """Return whether two checkpoints are the same files, or the same memory; copies are not, contents aren't read."""
    if one is other:
        return True
    if isinstance(one, MemoryCheckpoint) and isinstance(other, MemoryCheckpoint):
        return one.addresses == other.addresses
    plain = isinstance(one, FileCheckpoint) and isinstance(other, FileCheckpoint)
    return plain and {path.resolve() for path in one.files} == {path.resolve() for path in other.files}


def _open_folder(folder: Path, base: Checkpoint | None) -> Checkpoint:
    _refuse_broken_links(folder)
    weights = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if (folder / "adapter_config.json").is_file():
        from poe_models.weights.lora import LoraCheckpoint  # adapters are checkpoints themselves

        if weights is not None:
            raise CheckpointError(
                f"{folder}: holds both an adapter (adapter_config.json) and a whole model ({weights.name}). Move one "
                "of them to a folder of its own."
            )
        if base is None:
            raise CheckpointError(
                f"`open_checkpoint({str(folder)!r})`: an adapter needs the model it was trained on: "
                "`open_checkpoint(adapter, base=open_checkpoint(model))`."
            )
        return LoraCheckpoint(folder, base)
    if weights is None:
        inner = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
        if inner:
            raise CheckpointError(f"{folder}: no weights; the adapter is in {inner[0]}/. Give {folder / inner[0]}.")
        found = sorted(entry.name for entry in folder.iterdir())
        raise CheckpointError(
            f"{folder}: no weights: looked for {', '.join(_WEIGHTS)} and adapter_config.json, found "
            f"{', '.join(found[:10]) or 'an empty folder'}{', ...' if len(found) > 10 else ''}. Name the weight file "
            "itself if it has another name."
        )
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    return FileCheckpoint(folder, open_shards(weights) if weights.suffix == ".json" else open_single(weights), config)


def _refuse_broken_links(folder: Path) -> None:
    """Refuse a folder where a link of a known name leads nowhere: without that file it would be another model."""
    for path in (folder / name for name in _KNOWN):
        if path.is_symlink() and not path.exists():
            raise CheckpointError(
                f"{path}: a link to {os.readlink(path)}, which is not there. Download the file again, or remove the "
                "link if the folder is complete without it."
            )


def _download(source: str) -> Path:
    """Download ``org/name`` or ``org/name@revision``, safetensors if it has them, and return the folder."""
    hub = _HUB_ID.fullmatch(source)
    if hub is None:
        raise CheckpointError(
            f"`open_checkpoint({source!r})`: no such file or folder: {_end_of(Path(source).expanduser())}. Give a "
            "folder, a weight file, or a hub id 'org/name'."
        )
    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    try:
        folder = Path(_snapshot(hub["repo"], hub["revision"], patterns))
        if not any((folder / name).is_file() for name in _SAFETENSORS):
            folder = Path(_snapshot(hub["repo"], hub["revision"], [*patterns, "*.bin"]))
    except Exception as error:  # network, cache, authorisation: one message for all
        where = _end_of(Path(source))
        if Path(source).parent.is_dir():  # it was meant as a path
            raise CheckpointError(
                f"`open_checkpoint({source!r})`: no such file or folder: {where}. Give a folder, a weight file, or the "
                "id of a model that the hub has."
            ) from error
        reason = (str(error).splitlines() or [""])[0].partition(". ")[0]
        raise CheckpointError(
            f"`open_checkpoint({source!r})`: no such file or folder: {where}. Nor can it be downloaded as the id of a "
            f"model of the hub ({type(error).__name__}: {reason}). Check the path, or the id and the connection."
        ) from error
    return folder


def _end_of(path: Path) -> str:
    """The first part of a path that is not there, with the nearest name that is."""
    parent = next(each for each in path.parents if each.exists())
    part = path.relative_to(parent).parts[0]
    if not parent.is_dir():
        return f"{parent} is a file"
    try:
        names = [each.name for each in parent.iterdir()]
    except OSError:
        names = []
    return f"{parent if parent.parts else 'the current folder'} has no {part!r}{nearest(part, names)}"


def _snapshot(repo: str, revision: str | None, patterns: list[str]) -> str:
    return huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"])

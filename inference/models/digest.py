"""Checksums of everything that decides what a merge gives."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import torch

from poe_models.weights.loading import Checkpoint, same_weights
from poe_models.weights.lora import LoraCheckpoint

_BLOCK = 2**20
_CONFIGS = ("config.json", "adapter_config.json")
UNDER = "model under "
"""Before the role of an adapter, the role of the model that it was trained on."""


class Progress(Protocol):
    """Listener to the progress of a merge; the command line draws bars with it."""

    def begin(self, stage: str, modules: int, nbytes: int) -> None:
        """Hear that a stage begins, with the matrices it will solve and the bytes it will read or write."""

    def advance(self, modules: int, nbytes: int) -> None:
        """Hear how many matrices and bytes are done since the last call."""


class Silent:
    """No progress shown."""

    def begin(self, stage: str, modules: int, nbytes: int) -> None:
        """Show nothing."""

    def advance(self, modules: int, nbytes: int) -> None:
        """Show nothing."""


def digest_inputs(checkpoints: Mapping[str, Checkpoint], code: Sequence[Path], progress: Progress) -> dict[str, Any]:
    """Sha256 of every input file, read in blocks; of tensors in memory, their names, dtypes, shapes and bytes.

    Args:
        checkpoints: Role ("base", "expert mnist") to checkpoint.
        code: Source files that decide what comes out, such as a user's energy.
        progress: Told about the bytes.

    Returns:
        For each role its source and the digests of its files.

    Raises:
        CheckpointError: If a file is not what it was when it was opened.
    """
    progress.begin("checksums", 0, sum(nbytes_of(checkpoint) for checkpoint in checkpoints.values()))
    known = _file_digests([path for checkpoint in checkpoints.values() for path in files_of(checkpoint)], progress)
    inputs: dict[str, Any] = {}
    for role, checkpoint in checkpoints.items():
        files = {path.name: known[path.resolve()] for path in files_of(checkpoint)}
        inputs[role] = {
            "source": checkpoint.source,
            "sha256": files or {"memory": _memory_digest(checkpoint, progress)},
        }
        checkpoint.check_unchanged()  # the digests are those of the files whose headers were read
    if code:
        inputs["code"] = {"sha256": {str(path): file_digest(path) for path in code}}
    return inputs


def _file_digests(paths: Sequence[Path], progress: Progress) -> dict[Path, str]:
    """Digests by real paths, several files at a time: as many as torch has threads, and eight at most."""
    files, told = {path.resolve(): path for path in paths}, _Shared(progress)
    with ThreadPoolExecutor(min(8, torch.get_num_threads())) as pool:
        found = {real: pool.submit(file_digest, path, told) for real, path in files.items()}
        try:
            digests = {real: each.result() for real, each in found.items()}
        finally:
            told.stopped = True
            pool.shutdown(wait=False, cancel_futures=True)
    again = sum(path.stat().st_size for path in paths) - sum(path.stat().st_size for path in files.values())
    progress.advance(0, again)
    return digests


class _Shared:
    """A progress that several threads tell, each of which ends once it is stopped."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._lock, self.stopped = progress, Lock(), False

    def begin(self, stage: str, modules: int, nbytes: int) -> None:
        """Pass it on."""
        self._progress.begin(stage, modules, nbytes)

    def advance(self, modules: int, nbytes: int) -> None:
        """Pass it on, or end the thread."""
        if self.stopped:
            raise CancelledError
        with self._lock:
            self._progress.advance(modules, nbytes)


def with_models(checkpoints: Mapping[str, Checkpoint], base: Checkpoint) -> dict[str, Checkpoint]:
    """The same checkpoints, and the models under adapters, which are read as well, as inputs of their own.

    Args:
        checkpoints: By their role.
        base: The base; an adapter that is on it needs no other.
    """
    found = dict(checkpoints)
    for first, checkpoint in checkpoints.items():
        role, model = first, checkpoint
        while isinstance(model, LoraCheckpoint) and not same_weights(model.base, base):
            role, model = UNDER + role, model.base
            found[role] = model
    return found


def check_unchanged(checkpoints: Iterable[Checkpoint]) -> None:
    """Refuse to go on with checkpoints whose files are not what they were when they were opened.

    Raises:
        CheckpointError: If a file was written to, replaced or removed; names it.
    """
    for checkpoint in checkpoints:
        checkpoint.check_unchanged()


def files_of(checkpoint: Checkpoint) -> list[Path]:
    """Weight files of a checkpoint, and the configs beside them that decide how they are understood."""
    folders = list(dict.fromkeys(path.parent for path in checkpoint.files))
    whole = [folder for folder in folders if Path(checkpoint.source).is_dir()]
    return [*checkpoint.files, *(folder / name for folder in whole for name in _CONFIGS if (folder / name).is_file())]


def nbytes_of(checkpoint: Checkpoint) -> int:
    """Bytes of a checkpoint's files, or of its tensors in memory."""
    files = files_of(checkpoint)
    return sum(path.stat().st_size for path in files) if files else sum(i.nbytes for i in checkpoint.tensors.values())


def file_digest(path: Path, progress: Progress | None = None) -> str:
    """Sha256 of a file, 64 hexadecimal digits; the progress is told about the bytes."""
    progress = progress or Silent()
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            progress.advance(0, len(block))
    return digest.hexdigest()


def difference(before: Any, now: Any) -> list[tuple[str, str, str]]:
    """Places where two pieces of plain data differ.

    Args:
        before: One.
        now: The other.

    Returns:
        For each its dotted place and both values as JSON, "missing" where there is none.

    >>> difference({"a": {"b": 1}, "c": [2]}, {"a": {"b": 1}, "c": [3]})
    [('c[0]', '2', '3')]
    """
    old, new = dict(_leaves(before)), dict(_leaves(now))
    pairs = [
        (place, *(json.dumps(each[place]) if place in each else "missing" for each in (old, new)))
        for place in {**old, **new}
    ]
    return [(place, one, other) for place, one, other in pairs if one != other]


def _leaves(data: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(data, Mapping) and data:
        for key, value in data.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(data, list | tuple) and data:
        for index, value in enumerate(data):
            yield from _leaves(value, f"{prefix}[{index}]")
    else:
        yield prefix, data


def _memory_digest(checkpoint: Checkpoint, progress: Progress) -> str:
    digest = hashlib.sha256()
    for name, block in _memory_blocks(checkpoint):
        digest.update(name.encode())
        digest.update(block)
        progress.advance(0, len(block))
    return digest.hexdigest()


def _memory_blocks(checkpoint: Checkpoint) -> Iterator[tuple[str, memoryview]]:
    for name, info in sorted(checkpoint.tensors.items()):
        data = checkpoint.read(name).contiguous().reshape(-1).view(torch.uint8)
        yield f"{name}{info.dtype}{info.shape}", memoryview(data.numpy())  # type: ignore[arg-type]

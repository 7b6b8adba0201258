"""Small results as a folder of one safetensors file and one JSON file: written whole or not at all, read with care."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from inference.models.digest import file_digest
from inference.models.places import resolved
from inference.models.record_shapes import require_artifact
from inference.models.staging import Staging, check_output
from poe_models.weights.json_files import read_object
from poe_models.weights.loading import CheckpointError

_RENAMED = {"(statistics=": "(moments=", "ModuleStatistics(": "ModuleMoments("}
"""Texts in records of earlier versions, of residual maps on moments, and what they are now."""
_NO_PATHS = ("modules", "updates", "experts", "expert", "followers", "beside")
"""Keys of records whose texts are names."""


def versions() -> dict[str, str]:
    """Versions of the libraries that numbers come from."""
    libraries = ("poe-merge", "torch", "safetensors", "numpy")
    found = {name: version(name) for name in libraries} | {"python": platform.python_version()}
    return found | {"torch": str(torch.__version__)}  # with its build, which the package's metadata may lack


def matmul_precision() -> str:
    """Precision of float32 matrix products in this process, in the words of the setting that was used, old or new."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # one of torch.backends' own was set, and may differ from the others
        return str(torch.backends.cuda.matmul.fp32_precision)


def write_artifact(out: str | Path, kind: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> Path:
    """Write a folder ``OUT/KIND.safetensors`` and ``OUT/KIND.json``.

    Args:
        out: The folder to make.
        kind: What it holds, "statistics" or "draws": the name of its files.
        tensors: Its tensors.
        record: Plain data.

    Returns:
        The folder's absolute path.

    Raises:
        OutputError: If it exists, or appears in the meantime.
    """
    staging = Staging(check_output(Path(out), []), f"folder of {kind}", "run again")
    staging.check(resume=True)  # an interrupted one is written over: its tensors are here
    try:
        with staging.begin({"kind": kind}):
            add_artifact(staging, "", kind, tensors, record)
            staging.publish()
    except BaseException:
        staging.abandon()
        raise
    return staging.out


def add_artifact(
    staging: Staging, prefix: str, kind: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]
) -> None:
    """Write both files below a prefix of a larger output, the JSON last: it says that the tensors are there.

    Paths in the record are as seen from the folder, which can be moved together with what it refers to; those of what
    shares no folder with it stay absolute.
    """
    staging.save(
        f"{prefix}{kind}.safetensors", {name: each.detach().cpu().contiguous() for name, each in tensors.items()}
    )
    digest = file_digest(staging.content / f"{prefix}{kind}.safetensors")
    told = {"kind": kind, "sha256": digest, "versions": versions(), **record}
    staging.write_record(f"{prefix}{kind}.json", told, _NO_PATHS, foreign=False)


def read_record(path: str | Path, kind: str) -> dict[str, Any]:
    """Read the JSON part of a folder that should hold one kind of result; its paths are absolute again.

    Raises:
        CheckpointError: If it is missing, corrupt, or about something else.
    """
    file = Path(path).expanduser() / f"{kind}.json"
    if not file.is_file():
        raise CheckpointError(f"{path}: no {kind} here, {kind}.json is missing. Give the folder that was saved.")
    try:
        record = read_object(file)
    except ValueError as error:
        raise CheckpointError(f"{error} Make the {kind} again.") from error
    if record.get("kind") != kind:
        raise CheckpointError(f"{file}: not the {kind} of a merge. Give the folder that was saved.")
    try:
        require_artifact(kind, record, f"{file}: incomplete {kind}")
    except ValueError as error:
        raise CheckpointError(f"{error} Make the {kind} again.") from error
    names = {key: value for key, value in record.items() if key in _NO_PATHS}
    return {**resolved(renamed(record), file.parent), **names}


def renamed(record: dict[str, Any]) -> dict[str, Any]:
    """A record with the names that maps on moments had in earlier versions brought up to date.

    >>> renamed({"residual_map": "Fisher(statistics='moments', floor=0.0)"})
    {'residual_map': "Fisher(moments='moments', floor=0.0)"}
    """
    return json.loads(reduce(lambda text, old: text.replace(old, _RENAMED[old]), _RENAMED, json.dumps(record)))


def read_artifact(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the record that ``write_artifact`` wrote; nothing in the folder is executed.

    Raises:
        CheckpointError: If anything about it is wrong.
    """
    record = read_record(path, kind)
    file = Path(path).expanduser() / f"{kind}.safetensors"
    try:
        content = file.read_bytes()
        if hashlib.sha256(content).hexdigest() != record.get("sha256"):
            raise ValueError("it is not the file that was saved with its JSON")
        return load(content), record
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}. Make the {kind} again.") from error

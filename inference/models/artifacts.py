"""Small results as a folder of one safetensors file and one JSON file: written whole or not at all, read with care."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from inference.models.staging import OutputError, check_output
from poe_models.weights.loading import CheckpointError

LIBRARIES = ("poe-merge", "torch", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Versions of what numbers come from."""
    return {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()}


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
    target = check_output(Path(out), [])
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".partial", dir=target.parent))
    try:
        weights = partial / f"{kind}.safetensors"
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, weights)
        data = {"kind": kind, "sha256": _digest(weights.read_bytes()), "versions": versions(), **record}
        text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        (partial / f"{kind}.json").write_text(text, encoding="utf-8")
        for path in partial.iterdir():
            path.chmod(0o644)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        partial.chmod(0o755)
        partial.rename(target)
    except OSError as error:
        if target.exists():
            raise OutputError(f"{out} has appeared in the meantime. Choose another name.") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def read_record(path: str | Path, kind: str) -> dict[str, Any]:
    """Read the JSON part.

    Args:
        path: The folder.
        kind: What it should hold.

    Returns:
        The record.

    Raises:
        CheckpointError: If it is missing, corrupt, or about something else.
    """
    file = Path(path).expanduser() / f"{kind}.json"
    if not file.is_file():
        raise CheckpointError(f"{path}: no {kind} here, {kind}.json is missing. Give the folder that was saved.")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error}). Make the {kind} again.") from error
    if not isinstance(record, dict) or record.get("kind") != kind:
        raise CheckpointError(f"{file}: not the {kind} of a merge. Give the folder that was saved.")
    return record


def read_artifact(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a folder that `write_artifact` made; nothing in it is executed.

    Args:
        path: The folder.
        kind: What it should hold.

    Returns:
        Its tensors and its record.

    Raises:
        CheckpointError: If anything about it is wrong.
    """
    record = read_record(path, kind)
    file = Path(path).expanduser() / f"{kind}.safetensors"
    try:
        content = file.read_bytes()
        if _digest(content) != record.get("sha256"):
            raise ValueError("it is not the file that was saved with its JSON")
        return load(content), record
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}. Make the {kind} again.") from error


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

"""Models of the Hugging Face hub as folders on disk."""

from __future__ import annotations

import re
from pathlib import Path

import huggingface_hub

from poe_models._checkpoint import CheckpointError

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


def download(source: str) -> Path:
    """Download a model or an adapter, safetensors if it has them.

    Args:
        source: `org/name` or `org/name@revision`.

    Returns:
        The folder with its files.

    Raises:
        CheckpointError: if `source` is no such id, or the download fails.
    """
    hub = _HUB_ID.fullmatch(source)
    if hub is None:
        raise CheckpointError(
            f"`open_checkpoint({source!r})`: no such file or folder. Give a folder, a weight file, or a hub id "
            "'org/name'."
        )
    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    try:
        folder = Path(_snapshot(hub["repo"], hub["revision"], patterns))
        if not any((folder / name).is_file() for name in _SAFETENSORS):
            folder = Path(_snapshot(hub["repo"], hub["revision"], [*patterns, "*.bin"]))
    except Exception as error:  # network, cache, authorisation: one message for all
        raise CheckpointError(
            f"`open_checkpoint({source!r})`: no such file or folder here, and downloading it from the hub failed: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''} Give a local folder, or check "
            "the id and the connection."
        ) from error
    return folder


def _snapshot(repo: str, revision: str | None, patterns: list[str]) -> str:
    return huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"])

"""Finished parts of a weight file: their digests, their records, and the further names of tied tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from inference.models.digest import file_digest


def intact(file: Path, record: Path) -> bool:
    """True if a file has the digest that was recorded when it was written."""
    try:
        return bool(json.loads(record.read_text(encoding="utf-8"))["sha256"] == file_digest(file))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def records_of(path: Path) -> list[Any]:
    """The records of a part or weight file from the JSON beside it."""
    return list(json.loads(path.read_text(encoding="utf-8"))["records"])


def tied_tensors(path: Path, aliases: Mapping[str, str]) -> dict[str, Tensor]:
    """Further names of the tensors of a part, each from a map of its own: safetensors saves no memory twice."""
    found: dict[str, Tensor] = {}
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
    left = {alias: target for alias, target in aliases.items() if target in names}
    while left:
        first = {target: alias for alias, target in reversed(left.items())}
        with safe_open(path, framework="pt") as file:
            found |= {alias: file.get_tensor(target) for target, alias in first.items()}
        left = {alias: target for alias, target in left.items() if alias not in found}
    return found

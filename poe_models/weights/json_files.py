"""Reading of untrusted JSON files: an object of bounded size and depth, or one error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LARGEST, DEEPEST = 2**30, 64
"""Most bytes of a file, and most levels of nesting in it."""


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that must hold a JSON object.

    Raises:
        ValueError: If it cannot be read, is too large or too deep, or holds something else.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes")
        value = json.loads(path.read_bytes().decode("utf-8"))
        _require_shallow(value)
    except RecursionError:
        raise ValueError(f"{path}: not readable as JSON (nested more than {DEEPEST} levels deep).") from None
    except (OSError, ValueError, MemoryError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}.")
    return value


def _require_shallow(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        inner = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level = [item for items in inner for item in items]
        if not level:
            return
    raise RecursionError

"""Read the JSON files that lie beside weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from poe_models._checkpoint import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file.

    Returns:
        The object.

    Raises:
        CheckpointError: if the file is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}). Copy the file anew.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}. Copy the file anew.")
    return value

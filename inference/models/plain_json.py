"""Plain data as JSON that every reader takes: numbers that JSON lacks become null."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def json_text(data: Any, indent: int | None = None) -> str:
    """JSON of plain data; mappings need not be dicts.

    >>> json_text({"a": float("nan")})
    '{"a": null}'
    """
    return plain(data, indent)[0]


def plain(data: Any, indent: int | None = None) -> tuple[str, Any]:
    """JSON of plain data, and the data as they are read back but for tuples, which stay."""
    try:
        return json.dumps(data, indent=indent, ensure_ascii=False, allow_nan=False), data
    except (TypeError, ValueError):  # mappings that are no dict, numbers that JSON lacks
        data = finite(data)
        return json.dumps(data, indent=indent, ensure_ascii=False), data


def finite(data: Any) -> Any:
    """The same data with None for NaN and infinity, in dicts and lists."""
    if isinstance(data, Mapping):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not (abs(data) < float("inf")) else data

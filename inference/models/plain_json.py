"""Plain data as JSON that every reader takes: numbers that JSON lacks become null."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any


class Encoded(list[Any]):
    """Plain data in a list, with the JSON of each, which is not made again: of very many it takes long.

    Args:
        data: The data, which are not changed any more.
        lines: The JSON of each, in one line.

    >>> json_text({"a": 1, "b": Encoded([2.0, 3.0], ["2.0", "3.0"])})
    '{"a": 1, "b": [2.0, 3.0]}'
    """

    def __init__(self, data: Iterable[Any], lines: Iterable[str]) -> None:
        super().__init__(data)
        self.lines = list(lines)

    @classmethod
    def joined(cls, parts: Iterable[Encoded]) -> Encoded:
        """The data of all parts, in order."""
        known = list(parts)
        return cls([data for part in known for data in part], [line for part in known for line in part.lines])


def json_text(data: Any, indent: int | None = None) -> str:
    """JSON of plain data; mappings need not be dicts.

    >>> json_text({"a": float("nan")})
    '{"a": null}'
    """
    if indent is None and isinstance(data, Encoded):
        return f"[{', '.join(data.lines)}]"
    if indent is None and isinstance(data, Mapping) and any(isinstance(value, Encoded) for value in data.values()):
        return f"{{{', '.join(f'{json_text(key)}: {json_text(value)}' for key, value in data.items())}}}"
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

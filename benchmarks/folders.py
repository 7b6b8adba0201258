"""Folders that suites keep in the cache: named by what decides their contents, whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def key_of(*parts: object) -> str:
    """A short name for plain data, the same in every run: 16 hexadecimal digits.

    >>> key_of(1, {"a": 2, "b": 3}) == key_of(1, {"b": 3, "a": 2}) != key_of(2, {"a": 2, "b": 3})
    True
    """
    return hashlib.sha256(json.dumps(list(parts), sort_keys=True).encode()).hexdigest()[:16]


def move_into_place(made: Path, folder: Path) -> None:
    """Rename a finished folder; one that another run has made meanwhile is kept.

    Args:
        made: The finished folder.
        folder: Its place.

    Raises:
        OSError: If it cannot be renamed, and nobody else has made it.
    """
    try:
        os.rename(made, folder)
    except OSError:
        if not folder.exists():
            raise


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """Plain data from a JSON file, made and written there, whole or not at all, if there is none.

    Args:
        path: Of the file.
        make: Called without arguments if it is not there.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(make(), indent=1), encoding="utf-8")
        os.replace(part, path)
    return json.loads(path.read_text(encoding="utf-8"))


def write_page(path: Path, text: str) -> None:
    """Write a page of results, in a folder that is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")

"""The shape of ``poe_merge.json``, checked before anything in it is believed: a folder may be a stranger's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

LARGEST = 1e30
"""Largest number that a record may hold: none that a merge writes comes near."""
Count = Annotated[int, Field(ge=0, le=2**53)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Module(_Part):
    module: str
    status: str


class _Tensor(_Part):
    tensor: str
    aliases: list[str]
    action: Literal["merge", "average", "base"]
    view: str | None
    reason: str
    shape: list[Count]
    dtype: str
    numel: Count
    design: Count = 0
    modules: list[_Module] = []


class _Input(_Part):
    sha256: dict[str, str]


class _Record(_Part):
    tensors: list[_Tensor]
    inputs: dict[str, _Input]
    designs: list[dict[str, Any]]
    versions: dict[str, str]
    rules: list[dict[str, Any]]
    compute_dtype: Literal["float32", "float64"]
    settings: dict[str, Any] = {}


def require_shape(path: Path, record: dict[str, Any]) -> None:
    """Refuse a record of another shape.

    Raises:
        ValueError: If a field has another type than a merge writes, or a number no merge can have; names it.
    """
    try:
        _Record.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path}: `{place}`: {first['msg']}. Merge again.") from error
    used = [tensor.get("design", 0) for tensor in record["tensors"] if "modules" in tensor]
    if any(index >= len(record["designs"]) for index in used):
        raise ValueError(
            f"{path}: `designs` has {len(record['designs'])} entries, fewer than tensors use. Merge again."
        )
    if any(not abs(number) <= LARGEST for number in _numbers(record["tensors"])):
        raise ValueError(f"{path}: `tensors` has a number beyond {LARGEST:g}. Merge again.")


@contextmanager
def understood(path: Path) -> Iterator[None]:
    """Turn what a record's deeper parts may do to code that reads them into an error about the record.

    Yields:
        Nothing.

    Raises:
        ValueError: If a field is missing or of another type.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        told = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: a part of it is not as a merge writes it ({told}). Merge again.") from error


def _numbers(value: Any) -> Iterator[float]:
    # Every number in nested data; NaN, which a merge writes where something is not known, is none.
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)
    elif isinstance(value, int | float) and not (isinstance(value, float) and math.isnan(value)):
        yield value

"""Slicing, concatenating and mixing of frozen dataclasses whose tensors have modules as their first dimension."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = TypeVar("Record", bound="DataclassInstance")
"""Any dataclass."""


def with_tensors(change: Callable[..., Tensor], record: Record, *others: Record) -> Record:
    """The record with a function applied to its tensors, and to the same fields of others; scalars stay."""
    changed = {}
    for field in fields(record):
        values = [getattr(each, field.name) for each in (record, *others)]
        if isinstance(values[0], Tensor) and values[0].ndim:
            changed[field.name] = change(*values)
    return replace(record, **changed) if changed else record


def joined(*records: Record) -> Record:
    """The first record with the tensors of all concatenated over modules."""
    return with_tensors(lambda *values: torch.cat(values), *records)


def choose(where: Tensor, one: Record, other: Record) -> Record:
    """Per module (and chain), ``one`` where true and ``other`` elsewhere."""

    def mixed(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(where[(..., *(None,) * (a.ndim - where.ndim))], a, b)

    return with_tensors(mixed, one, other)

"""Prompts of a task, and what the blocks before the first tuned one make of them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

from torch import Tensor
from typing_extensions import override

from benchmarks.language import tasks


@dataclass(frozen=True)
class Split(tasks.Split):
    """Prompts of one split; further arguments are those of `benchmarks.language.tasks.Split`.

    Args:
        hidden: (n, longest, hidden), states before the first block that is tuned; None runs all blocks.
    """

    hidden: Tensor | None = None

    @override
    def take(self, rows: Tensor) -> Self:
        """The prompts in these rows."""
        values = (getattr(self, field.name) for field in fields(self))
        taken: list[Any] = [None if value is None else value[rows] for value in values]
        return type(self)(*taken)

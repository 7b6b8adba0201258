"""Validation of class probabilities and labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from poe_models.weights.batches import require_classes

Array = Tensor | NDArray[Any]
TOLERANCE, HALF_TOLERANCE = 1e-3, 2e-2
"""Largest distance of the sum of a row from one; the second for 16-bit floats, whose rounding adds up over classes."""


@dataclass(frozen=True, eq=False)
class Labelled:
    """Class probabilities with their labels.

    Attributes:
        probabilities: ``(n, classes)`` float64; rows sum to one.
        labels: ``(n,)`` int64 on the same device.
    """

    probabilities: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Reasons not to trust scores of these."""
        return ("all labels are of one class",) if len(self) > 1 and len(self.labels.unique()) == 1 else ()


def checked_probabilities(probabilities: Array, called: str) -> Tensor:
    """Probabilities ``(n, classes)`` in float64 on their device, rows divided by their sums, which rounding moved.

    Raises:
        ValueError: If they are complex, no table of at least one row and two classes, have NaN or negative entries, or
            have rows that do not sum to one.

    >>> checked_probabilities(torch.tensor([[2.0, 1.0]]), "score")
    Traceback (most recent call last):
        ...
    ValueError: `score(probabilities=...)`: row 0 sums to 3, not to 1. Give probabilities: `logits.softmax(-1)`.
    """
    table = _tensor(probabilities, f"{called}(probabilities=...)", "probabilities in float32 or float64")
    if table.is_complex():
        raise ValueError(
            f"`{called}(probabilities=...)`: {table.dtype}. Probabilities are real numbers: give `logits.softmax(-1)`."
        )
    tolerance = HALF_TOLERANCE if table.dtype in (torch.float16, torch.bfloat16) else TOLERANCE
    table = table.double()
    if table.ndim != 2 or table.shape[0] < 1 or table.shape[1] < 2:
        raise ValueError(
            f"`{called}(probabilities=...)`: shape {tuple(table.shape)}. Give (n, classes) with one example and two "
            "classes at least; for one sigmoid output stack `1 - p` and `p`."
        )
    wrong = (~(table >= 0)).any(1)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"`{called}(probabilities=...)`: row {row} has NaN or a negative entry ({int(wrong.sum())} rows do). "
            "Give probabilities: `logits.softmax(-1)` of finite logits."
        )
    total = table.sum(1, keepdim=True)
    off = ~((total - 1).abs() <= tolerance)
    if bool(off.any()):
        row = int(off.nonzero()[0, 0])
        raise ValueError(
            f"`{called}(probabilities=...)`: row {row} sums to {float(total[row]):.4g}, not to 1. Give probabilities: "
            "`logits.softmax(-1)`."
        )
    return table / total


def checked_labels(labels: Array, shape: tuple[int, int], called: str) -> Tensor:
    """Labels ``(n,)`` as int64, for probabilities of the shape ``(n, classes)``.

    Raises:
        ValueError: If they are no integers, not n, or out of range.
    """
    values = _tensor(labels, f"{called}(labels=...)", "labels in int64")
    size, classes = shape
    if values.shape != (size,) or values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(
            f"`{called}(labels=...)`: {values.dtype} of shape {tuple(values.shape)} for {size} rows of probabilities. "
            "Give one integer for each row."
        )
    values = values.long()
    require_classes(values, classes, f"`{called}(labels=...)`")
    return values


def _tensor(values: Array, where: str, wanted: str) -> Tensor:
    """An array as a tensor, also of dtypes that torch lacks: other byte orders, long double, lists of numbers."""
    if isinstance(values, Tensor):
        kind = "complex" if values.is_complex() else ""
    else:
        values = np.asarray(values)
        native = values.dtype.newbyteorder("=")
        kind = "" if native.kind in "biuf" else f"dtype {values.dtype}"
        values = values.astype(np.float64 if native == np.longdouble else native, copy=False)
    if kind:
        raise ValueError(f"`{where}`: {kind}. Give {wanted}.")
    return torch.as_tensor(values).detach()


def labelled(probabilities: Array, labels: Array, called: str) -> Labelled:
    """Check probabilities ``(n, classes)`` with their labels ``(n,)``, which go to the same device.

    >>> len(labelled(torch.tensor([[0.5, 0.5]]), torch.tensor([1]), "score"))
    1
    """
    table = checked_probabilities(probabilities, called)
    own = checked_labels(labels, (table.shape[0], table.shape[1]), called)
    return Labelled(table, own.to(table.device))

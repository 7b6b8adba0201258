"""The heart of TIES: trim each expert, elect a sign for each entry, merge what agrees (Yadav et al., 2023, Section 3).

The experts come one by one and are trimmed again when needed, so that memory is a few copies of one expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

Combine = Literal["mean", "sum", "max"]


def trimmed(values: Tensor, threshold: float) -> Tensor:
    """The entries whose magnitude reaches the threshold, zero elsewhere."""
    return torch.where(values.abs() >= threshold, values, 0)


def elected_sum(experts: Iterable[tuple[Tensor, float]]) -> Tensor:
    """The sum of the trimmed experts, whose sign is elected.

    Float64 makes the sum of a few float32 numbers exact, so that the election does not depend on the order of experts.

    Args:
        experts: values ``(...)`` and threshold of each.

    Returns:
        Float64, ``(...)``.
    """
    total: Tensor | None = None
    for values, threshold in experts:
        kept = trimmed(values, threshold)
        total = kept.double() if total is None else total.add_(kept)
    assert total is not None
    return total


def merged_by_sign(experts: Sequence[tuple[Tensor, float]], combine: Combine, majority: int) -> Tensor:
    """Merge the trimmed entries that have the elected sign.

    Args:
        experts: values ``(...)`` and threshold of each.
        combine: the mean over the experts that agree, their sum, or the one of largest magnitude.
        majority: the sign, 1, 0 or -1, where the trimmed experts cancel; 0 counts as -1.

    Returns:
        The merged values, ``(...)``.
    """
    total = elected_sum(experts)
    positive = (total > 0) | ((total == 0) & (majority > 0))
    del total
    merged = torch.zeros_like(experts[0][0])
    count = torch.zeros_like(merged)
    for values, threshold in experts:
        kept = trimmed(values, threshold)
        kept = torch.where(positive == (kept > 0), kept, 0)
        if combine == "max":
            merged = torch.where(kept.abs() > merged.abs(), kept, merged)
        else:
            merged += kept
            count += kept != 0
    return merged / count.clamp(min=1) if combine == "mean" else merged

"""Checks that tensors are finite, and the error about one that is not."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from poe_models.weights.checkpoint import CheckpointError
from poe_models.weights.fitting import suggested_rule


def all_finite(tensor: Tensor) -> bool:
    """Return whether every entry is finite, without a temporary of the tensor's size."""
    return not tensor.numel() or all(math.isfinite(end) for end in tensor.aminmax())


def finite(tensor: Tensor, owner: str, name: str, stored: Tensor | None = None) -> Tensor:
    """Refuse a tensor that is not finite.

    Args:
        tensor: The tensor.
        owner: Whose it is, for the message.
        name: Its name, for the message.
        stored: What it was made of, in a dtype of its own.

    Returns:
        The same tensor.

    Raises:
        CheckpointError: If a value is NaN or infinite.
    """
    if not all_finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        beyond = stored is not None and bool(torch.isfinite(stored).all())
        what = f"too large for {tensor.dtype}" if beyond else f"NaN or infinite (as {tensor.dtype})"
        way = "Compute in float64 (`dtype: float64`)" if beyond else "Save it from an earlier step"
        raise CheckpointError(
            f"`TaskVectors`: {owner}: tensor {name!r} has {bad:,} values that are {what}. {way}, or keep the base's "
            f"tensor with the rule {suggested_rule(name)}."
        )
    return tensor

"""Exact order statistics of more numbers than fit into memory: radix selection on the bits of their magnitudes.

The bits of a non-negative IEEE float, read as an integer, are in the order of the floats. A histogram of the leading
bits says which values share them with the k-th smallest one; among those the next bits decide. Float32 takes two passes
of 16 bits, float64 four, and memory is one histogram for each expert, however many values are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

Passes = Callable[[], Iterable[Tensor]]
"""Starts another pass over the values of all experts: tensors ``(N, L)``, with any ``L``."""

_DIGIT = 16
_CHUNK = 2**22


def magnitude_thresholds(values: Passes, density: float) -> tuple[float, ...]:
    """The magnitude from which on an entry is among an expert's largest: the ``n - int(n density)``-th smallest.

    So ``int(n density) + 1`` entries reach it, or more if some are equal, as in TIES' released code. At density 1 it is
    0.

    Args:
        values: float32 or float64 tensors ``(N, L)``; all passes give the same.
        density: share of the entries to keep, in (0, 1].

    Returns:
        One threshold for each expert.

    >>> magnitude_thresholds(lambda: [torch.tensor([[1.0, -4.0, 2.0]]), torch.tensor([[3.0]])], 0.5)
    (2.0,)
    """
    first = next(iter(values()))
    experts = len(first)
    if density == 1:
        return (0.0,) * experts
    prefixes, ranks = torch.zeros(experts, dtype=torch.int64), torch.zeros(experts, dtype=torch.int64)
    top = 8 * first.element_size() - _DIGIT
    for shift in range(top, -1, -_DIGIT):
        counts = _histograms(values, prefixes, shift, top)
        if shift == top:
            size = int(counts[0].sum())
            ranks += size - int(size * density)
        below = counts.cumsum(1)
        digits = torch.searchsorted(below, ranks.unsqueeze(1))
        ranks -= (below - counts).gather(1, digits).squeeze(1)
        prefixes = (prefixes << _DIGIT) | digits.squeeze(1)
    return tuple(prefixes.to(_integer(first.dtype)).view(first.dtype).tolist())


def _histograms(values: Passes, prefixes: Tensor, shift: int, top: int) -> Tensor:
    """How many values with each expert's prefix have each next digit, ``(N, 2^16)``."""
    counts = torch.zeros(len(prefixes), 1 << _DIGIT, dtype=torch.int64)
    for value in values():
        for expert, bits in _bits(value):
            digits = bits >> shift
            if shift < top:
                digits = digits[digits >> _DIGIT == int(prefixes[expert])] & ((1 << _DIGIT) - 1)
            counts[expert] += torch.bincount(digits, minlength=1 << _DIGIT).cpu()
    return counts


def _bits(value: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Take the magnitudes' bits as integers, a chunk at a time.

    Yields:
        Position of the expert, and bits of some of its values.
    """
    for expert, row in enumerate(value):
        for chunk in row.split(_CHUNK):
            yield expert, chunk.abs().view(_integer(value.dtype))


def _integer(dtype: torch.dtype) -> torch.dtype:
    return torch.int32 if dtype == torch.float32 else torch.int64

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
_JOINED = 2**16


def magnitude_thresholds(values: Passes, density: float) -> tuple[float, ...]:
    """Smallest magnitude among an expert's largest entries: the ``n - int(n density)``-th smallest.

    So ``int(n density) + 1`` entries reach it, or more if some are equal, as in TIES' released code. At density 1 it is
    0.

    Args:
        values: Float32 or float64 tensors ``(N, L)``; all passes give the same.
        density: Share of the entries to keep, in (0, 1].

    Returns:
        One threshold for each expert.

    >>> magnitude_thresholds(lambda: [torch.tensor([[1.0, -4.0, 2.0]]), torch.tensor([[3.0]])], 0.5)
    (2.0,)
    """
    if density == 1:
        return (0.0,) * len(next(iter(values())))
    return _selected(lambda: joined(values()), density)


def joined(values: Iterable[Tensor]) -> Iterator[Tensor]:
    """Put small tensors ``(N, L)`` together, so that a pass over many modules costs what their entries do.

    Yields:
        The same values in the same order, in fewer tensors.
    """
    waiting: list[Tensor] = []
    length = 0
    for value in values:
        waiting.append(value)
        length += value.shape[1]
        if length >= _JOINED:
            yield torch.cat(waiting, 1) if len(waiting) > 1 else value
            waiting, length = [], 0
    if waiting:
        yield torch.cat(waiting, 1)


def _selected(values: Passes, density: float) -> tuple[float, ...]:
    counts, dtype = _leading(values)
    size = int(counts[0].sum())
    ranks = torch.full((len(counts), 1), size - int(size * density))
    prefixes, ranks = _narrowed(torch.zeros_like(ranks), ranks, counts)
    for position in range(_width(dtype) - 2 * _DIGIT, -1, -_DIGIT):
        prefixes, ranks = _narrowed(prefixes, ranks, _following(values, prefixes, position))
    return tuple(prefixes.flatten().to(_integer(dtype)).view(dtype).tolist())


def _narrowed(prefixes: Tensor, ranks: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The next digit of each expert's value of a given rank, and its rank among those that share it, all ``(N, 1)``."""
    below = counts.cumsum(1)
    digits = torch.searchsorted(below, ranks)
    return (prefixes << _DIGIT) | digits, ranks - (below - counts).gather(1, digits)


def _leading(values: Passes) -> tuple[Tensor, torch.dtype]:
    """Number of values of each expert with each leading digit, ``(N, 2^16)``, and the dtype of the values."""
    total, dtype = torch.zeros(0, 1 << _DIGIT, dtype=torch.int64), torch.float32
    for value in values():
        if len(total) == 0:
            total, dtype = total.new_zeros(len(value), 1 << _DIGIT), value.dtype
        for expert, bits in _bits(value):
            total[expert] += _histogram(bits >> (_width(dtype) - _DIGIT))
    return total, dtype


def _following(values: Passes, prefixes: Tensor, position: int) -> Tensor:
    """Number of values with each expert's prefix and each next digit, ``(N, 2^16)``."""
    total = torch.zeros(len(prefixes), 1 << _DIGIT, dtype=torch.int64)
    for value in values():
        for expert, bits in _bits(value):
            digits = bits >> position
            shared = digits[digits >> _DIGIT == int(prefixes[expert])]
            total[expert] += _histogram(shared & ((1 << _DIGIT) - 1))
    return total


def _histogram(digits: Tensor) -> Tensor:
    return torch.bincount(digits, minlength=1 << _DIGIT).cpu()


def _bits(value: Tensor) -> Iterator[tuple[int, Tensor]]:
    # Position of an expert and the bits of the magnitudes of some of its values, as integers, a chunk at a time.
    for expert, row in enumerate(value):
        for chunk in row.split(_CHUNK):
            yield expert, chunk.abs().view(_integer(value.dtype))


def _integer(dtype: torch.dtype) -> torch.dtype:
    return torch.int32 if dtype == torch.float32 else torch.int64


def _width(dtype: torch.dtype) -> int:
    return 8 * dtype.itemsize

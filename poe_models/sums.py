"""Sums over the entries of matrices in float64, a few rows at a time, and Gram matrices by half."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

BLOCK = {"cpu": 2**16, "cuda": 2**22}
"""Entries that are multiplied at once in float64: what stays in a processor's cache; what fills a GPU."""

UNDERFLOW = 1e-30
"""Size of a float32 sum, for each entry, above which products that underflow (1e-38) are below its rounding."""

BANDS = 8
"""Bands of rows in which a Gram matrix is made, each up to its diagonal."""


def row_blocks(*tensors: Tensor) -> Iterator[slice]:
    """Cut rows so that ``BLOCK`` entries of a tensor are worked on at once on its device.

    Yields:
        The rows of each block; one at least.
    """
    block = BLOCK.get(tensors[0].device.type, BLOCK["cpu"])
    height = max(1, block // max(1, *(each[..., :1, :].numel() for each in tensors)))
    for first in range(0, max(tensors[0].shape[-2], 1), height):
        yield slice(first, first + height)


def inner(left: Tensor, right: Tensor) -> Tensor:
    """Inner products over the last two dimensions, summed in float64, shape ``(...,)``; see :func:`inner_each`."""
    if max(left.numel(), right.numel()) <= BLOCK["cpu"]:  # one block: nothing to cut or to add up
        return _product(left, right)
    if (found := _in_float32(left, [right])) is not None:
        return found[..., 0]
    parts = []
    for rows in row_blocks(left, right):
        own = left[..., rows, :]
        parts.append(_product(own, own if left is right else right[..., rows, :]))
    return torch.stack(parts).sum(0)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Inner products over the last two dimensions, by one product of rows with columns in float64."""
    wide = left.double().flatten(-2)
    other = wide if left is right else right.double().flatten(-2)
    return (wide.unsqueeze(-2) @ other.unsqueeze(-1)).squeeze((-2, -1))


def inner_each(x: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Inner products of a tensor with ``N`` of its shape over the last two dimensions, ``(..., N)`` float64.

    Some rows at a time, so that what is made in float64 stays in a processor's cache, and is made in one place again
    and again, unless a gradient is asked for. Of large float32 matrices on a processor, products are summed up in
    float32 within a block and in float64 over blocks: that rounds less than the entries, and nothing is widened.
    """
    if torch.is_grad_enabled() and any(each.requires_grad for each in (x, *others)):
        return torch.stack([inner(x, each) for each in others], -1)
    if (found := _in_float32(x, others)) is not None:
        return found
    parts, (own, room) = [], (_room(x) for _ in range(2))
    for rows in row_blocks(x):
        wide, row = _widened(x, rows, own), []
        for other in others:
            row.append((wide if other is x else _widened(other, rows, room)).unsqueeze(-2) @ wide.unsqueeze(-1))
        parts.append(torch.cat(row, -1).squeeze(-2))
    return torch.stack(parts).sum(0)


def _in_float32(x: Tensor, others: Sequence[Tensor]) -> Tensor | None:
    """:func:`inner_each` in float32 within blocks; None where that is no way, or leaves the range of float32."""
    tensors = (x, *others) if x.stride(-1) == 1 else (x.mT, *(each.mT for each in others))  # as it lies in memory
    plain = all(each.dtype == torch.float32 and each.is_cpu and each.shape == tensors[0].shape for each in tensors)
    differentiated = torch.is_grad_enabled() and any(each.requires_grad for each in tensors)
    a, b = tensors[0].shape[-2:]
    if not plain or a * b <= BLOCK["cpu"] or differentiated or peek_interpreter_stack() is not None:
        return None
    height = max(1, BLOCK["cpu"] // b)  # whatever else is in the batch: sums do not depend on that
    modules = zip(*(each.reshape(-1, a, b).unbind() for each in tensors), strict=True)
    found = torch.tensor([_block_sums(own, rest, height) for own, *rest in modules], dtype=torch.float64)
    if not bool((found.isfinite() & (found.abs() >= UNDERFLOW * a * b)).all()):
        return None
    return found.reshape(*x.shape[:-2], len(others))


def _block_sums(x: Tensor, others: Sequence[Tensor], height: int) -> list[float]:
    """Inner products of matrices, each block of rows in their own dtype, where :func:`torch.sum` adds up in pairs."""
    totals, room = [0.0] * len(others), x.new_empty(x[:height].numel())
    for first in range(0, len(x), height):
        rows = slice(first, first + height)
        own = x[rows].reshape(-1)
        for place, y in enumerate(others):
            totals[place] += torch.mul(own, y[rows].reshape(-1), out=room[: len(own)]).sum().item()
    return totals


def inner_by_blocks(vectors: Tensor, x: Tensor) -> Tensor:
    """Inner products of stacked tensors ``(..., E, a, b)`` with ``x``, ``(..., a, b)``: ``(..., E)`` float64.

    Faster than :func:`inner_each`: within a block the precision is the tensors', blocks are summed up in float64.
    """
    parts = []
    for rows in row_blocks(x):
        column = x[..., rows, :].flatten(-2).unsqueeze(-1)
        parts.append((vectors[..., rows, :].flatten(-2) @ column).squeeze(-1).double())
    return torch.stack(parts).sum(0)


def _room(x: Tensor) -> Tensor:
    """Memory for the largest block of a tensor's rows in float64."""
    first = next(row_blocks(x))
    return torch.empty_like(x[..., first, :], dtype=torch.float64, memory_format=torch.contiguous_format)


def _widened(x: Tensor, rows: slice, room: Tensor) -> Tensor:
    """A block of rows in float64, ``(..., r b)``, made in the room for it."""
    block = x[..., rows, :]
    return room[..., : block.shape[-2], :].copy_(block).flatten(-2)


def gram_matrix(factor: Tensor) -> Tensor:
    """``F F^T``, exactly symmetric, ``(..., d, r)`` to ``(..., d, d)``: blocks above the diagonal are copied.

    >>> gram_matrix(torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
    tensor([[5., 6.],
            [6., 9.]])
    """
    side = factor.shape[-2]
    result = factor.new_empty(*factor.shape[:-1], side)
    step = max(1, -(-side // BANDS))
    for first in range(0, side, step):
        last = min(first + step, side)
        band = factor[..., first:last, :] @ factor[..., :last, :].mT
        result[..., first:last, :last] = band
        result[..., :first, first:last] = band[..., :first].mT
    return result


def sum_of_squares(x: Tensor) -> Tensor:
    """Squared Frobenius norm over the last two dimensions, summed in float64, shape ``(...,)``."""
    return inner(x, x)


def inner_products(vectors: Sequence[Tensor]) -> Tensor:
    """Gram matrix of ``N`` tensors ``(..., a, b)`` over their last two, summed in float64: ``(..., N, N)``."""
    parts = []
    for rows in row_blocks(*vectors):
        wide = wide_rows(vectors, rows)
        parts.append(wide @ wide.mT)
    total = torch.stack(parts).sum(0)
    return (total + total.mT) / 2


def wide_rows(tensors: Sequence[Tensor], rows: slice) -> Tensor:
    """Some rows of ``N`` tensors ``(..., a, b)`` in float64, ``(..., N, r b)``."""
    return torch.stack([each[..., rows, :].flatten(-2) for each in tensors], -2).double()


def largest_entry(x: Tensor) -> Tensor:
    """Largest magnitude of an entry over the last two dimensions, ``(...,)`` float64; faster than as a norm."""
    return torch.maximum(x.amax((-2, -1)), -x.amin((-2, -1))).double()

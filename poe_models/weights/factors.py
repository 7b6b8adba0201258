"""Low-rank updates as pairs of factors: stacked, in coordinates of their common subspace, and cut to a rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CutFactors", "FactorSpace", "cut", "padded"]


@dataclass(frozen=True, eq=False)
class FactorSpace:
    """The subspaces that the factors of N updates span, and the updates in orthonormal bases of them.

    ``U_i = left @ cores[i] @ right``. Whatever is a function of the updates alone and does not know the axes of the
    matrix, such as the MAP of Gram maps with the anchor at zero, is ``left @ Z @ right`` of what it is of the cores.

    Attributes:
        left: ``(d_out, k_out)``, orthonormal columns, ``k_out <= N r``.
        cores: ``(N, k_out, k_in)`` float64.
        right: ``(k_in, d_in)``, orthonormal rows, ``k_in <= N r``.

    >>> b, a = torch.randn(2, 7, 3), torch.randn(2, 3, 9)
    >>> space = FactorSpace.of(b, a)
    >>> torch.allclose(space.left @ space.cores @ space.right, (b @ a).double(), atol=1e-5)
    True
    """

    left: Tensor
    cores: Tensor
    right: Tensor

    @classmethod
    def of(cls, left: Tensor, right: Tensor) -> FactorSpace:
        """The space of factors ``(N, d_out, r)`` and ``(N, r, d_in)``."""
        count, rank = left.shape[0], left.shape[-1]
        rows, small_left = torch.linalg.qr(left.double().movedim(0, 1).flatten(1))
        columns, small_right = torch.linalg.qr(right.double().flatten(0, 1).mT)
        parts = (each.unflatten(1, (count, rank)).movedim(1, 0) for each in (small_left, small_right))
        one, other = parts
        return cls(rows, one @ other.mT, columns.mT)


@dataclass(frozen=True, eq=False)
class CutFactors:
    """A matrix of low rank by its largest singular values, ``left @ right``, both with a root of them.

    Attributes:
        left: ``(rows, r)`` float64.
        right: ``(r, columns)`` float64.
        squared_norm: Squared Frobenius norm of the whole matrix.
        squared_error: That of what was cut off.
    """

    left: Tensor
    right: Tensor
    squared_norm: float
    squared_error: float


def cut(left: Tensor, right: Tensor, rank: int | None = None) -> CutFactors:
    """Cut ``left @ right`` to a rank, by its singular value decomposition, without forming it (Eckart and Young, 1936).

    Args:
        left: ``(rows, k)``.
        right: ``(k, columns)``.
        rank: Largest rank; by default the matrix's own, to rounding. It is one at least.

    >>> found = cut(torch.eye(3) * torch.tensor([3.0, 4.0, 0.0]), torch.eye(3), 1)
    >>> found.left.shape, found.squared_norm, found.squared_error
    (torch.Size([3, 1]), 25.0, 9.0)
    """
    (rows, small_left), (columns, small_right) = (torch.linalg.qr(each.double()) for each in (left, right.mT))
    u, singular, v = torch.linalg.svd(small_left @ small_right.mT)
    least = torch.finfo(torch.float64).eps * max(left.shape[0], right.shape[1]) * singular[0]
    kept = max(1, min(int((singular > least).sum()), rank or len(singular)))
    root = singular[:kept].sqrt()
    squares = singular.square()
    return CutFactors(
        rows @ u[:, :kept] * root,
        root.unsqueeze(1) * (v[:kept] @ columns.mT),
        float(squares.sum()),
        float(squares[kept:].sum()),
    )


def padded(factors: Sequence[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor]:
    """Stack factors of different rank, filled up with zeros; None stands for an update of rank 0."""
    left, right = next(pair for pair in factors if pair is not None)
    rank = max(pair[0].shape[1] for pair in factors if pair is not None)
    b = left.new_zeros(len(factors), left.shape[0], rank)
    a = right.new_zeros(len(factors), rank, right.shape[1])
    for i, pair in enumerate(factors):
        if pair is not None:
            b[i, :, : pair[0].shape[1]] = pair[0]
            a[i, : pair[1].shape[0]] = pair[1]
    return b, a

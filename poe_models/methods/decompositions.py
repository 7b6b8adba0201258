"""Singular value decompositions without vectors of the null space.

Singular vectors of a zero singular value are arbitrary: noise of 1e-7 turns them around, and a rule that gives them
weight moves with it. Here a singular value counts if it is above a tolerance times the largest Frobenius norm of the
module's updates; vectors of the others are zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from poe_models.methods.method import ModuleBatch

RANK_TOLERANCE = 1e-5
"""Default of the methods: far above the rounding of float32 updates, far below anything that matters in a merge."""

SVD_FLOATS = 12
"""Copies of a matrix that a decomposition of it, masked and put together again, holds at its peak."""


@dataclass(frozen=True, eq=False)
class Compressed:
    """Updates in orthonormal bases of the span of all experts' factors, ``U_i = left core_i right^T``.

    Attributes:
        cores: Coordinates ``(M, N, p, q)``.
        left: Basis ``(M, d_out, p)``, or None for the identity.
        right: Basis ``(M, d_in, q)``, or None for the identity.
    """

    cores: Tensor
    left: Tensor | None
    right: Tensor | None

    def lift(self, core: Tensor) -> Tensor:
        """``left core right^T``, ``(M, p, q)`` to ``(M, d_out, d_in)``."""
        tall = core if self.left is None else self.left @ core
        return tall if self.right is None else tall @ self.right.mT


def compressed(batch: ModuleBatch) -> Compressed:
    """Updates of adapters in bases of their factors' span; any other updates as they are.

    Singular values and products of matrices are the same in the cores, and cost what the ranks cost.
    """
    if batch.low_rank is None:
        return Compressed(batch.updates, None, None)
    b, a = batch.low_rank
    left = _basis(b.transpose(1, 2).flatten(2))
    right = _basis(a.flatten(1, 2).mT)
    b = b if left is None else left.mT.unsqueeze(1) @ b
    a = a if right is None else a @ right.unsqueeze(1)
    return Compressed(b @ a, left, right)


def _basis(stacked: Tensor) -> Tensor | None:
    """An orthonormal basis of the columns ``(M, d, N r)``, or None where there are too many to gain anything."""
    return torch.linalg.qr(stacked).Q if stacked.shape[-1] < stacked.shape[-2] else None


@dataclass(frozen=True, eq=False)
class SVD:
    """Singular triplets in descending order; those below the tolerance are zero.

    Attributes:
        left: Left vectors ``(..., d_out, k)``.
        values: Singular values ``(..., k)``.
        right: Right vectors ``(..., d_in, k)``.
    """

    left: Tensor
    values: Tensor
    right: Tensor

    @property
    def counted(self) -> Tensor:
        """Number of triplets that are not zero, ``(...,)``."""
        return (self.values > 0).sum(-1)

    def first(self, count: int) -> SVD:
        """The ``count`` largest, or as many as there are."""
        left, right = self.left[..., :count].clone(), self.right[..., :count].clone()  # the others can be let go of
        return SVD(left, self.values[..., :count], right)


def frobenius(updates: Tensor) -> Tensor:
    """The largest Frobenius norm of each module's updates, ``(M, N, d_out, d_in)`` to ``(M,)``."""
    return torch.linalg.matrix_norm(updates).amax(-1)


def guarded_svd(x: Tensor, floor: Tensor) -> SVD:
    """The thin decomposition of ``(..., d_out, d_in)``; singular values up to ``floor``, ``(...,)``, do not count."""
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    counts = values > floor.unsqueeze(-1)
    columns = counts.unsqueeze(-2)
    return SVD(torch.where(columns, left, 0), torch.where(counts, values, 0), torch.where(columns, right.mT, 0))


def nearest_orthogonal(columns: Tensor, tolerance: float) -> Tensor:
    """The orthogonal factor ``P Q^T`` of ``columns = P S Q^T``, ``(..., d, k)``, on the span of the columns.

    Directions whose singular value is up to ``tolerance`` times the largest do not count.
    """
    svd = guarded_svd(columns, columns.new_zeros(columns.shape[:-2]))
    keep = (svd.values > tolerance * svd.values[..., :1]).unsqueeze(-2)
    return torch.where(keep, svd.left, 0) @ svd.right.mT


def concatenated(parts: list[SVD]) -> SVD:
    """Triplets of several decompositions side by side."""
    columns = zip(*((part.left, part.values, part.right) for part in parts), strict=True)
    return SVD(*(torch.cat(each, -1) for each in columns))


def inverse_norms(updates: Tensor, tolerance: float) -> Tensor:
    """``1 / |U_i|``, ``(M, N)``, or 0 where the norm is up to ``tolerance`` times the module's largest."""
    norms = torch.linalg.matrix_norm(updates)
    return torch.where(norms > tolerance * norms.amax(1, keepdim=True), 1 / norms, 0)

"""Orthonormal coordinates of the few directions in which experts act."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from poe_models.operators import RANK_TOLERANCE, Gram, Operator, RankOne, ScaledIdentity, vector_lengths
from poe_models.printing import Brief
from poe_models.sums import inner_each, inner_products, row_blocks, wide_rows

PARALLEL = 1e-7
"""Eigenvalues of unit vectors' Gram matrix below this share of the largest have lost half of their digits."""


@dataclass(frozen=True, eq=False, repr=False)
class FlatBasis(Brief):
    """Orthonormal directions ``Q = V K`` of matrices taken as vectors, combinations of ``N`` given ones.

    Attributes:
        vectors: ``V``, ``(M, d_out, d_in)`` each.
        gram: Their inner products, ``(M, N, N)`` float64.
        mixing: ``K``, ``(M, N, N)`` float64; a column is zero for each direction that the vectors lack.
    """

    vectors: tuple[Tensor, ...]
    gram: Tensor
    mixing: Tensor

    @classmethod
    def of(cls, vectors: Sequence[Tensor]) -> FlatBasis:
        """The basis of the span of vectors of any lengths.

        Products lose half of the digits in which nearly parallel vectors differ: these are made orthogonal first.
        """
        gram = inner_products(vectors)
        lengths = vector_lengths(gram)
        sizes, turn = torch.linalg.eigh(gram / (lengths.unsqueeze(-1) * lengths.unsqueeze(-2)))
        lacking = (gram.diagonal(dim1=-2, dim2=-1) == 0).sum(-1)
        if bool(((sizes < PARALLEL * sizes[..., -1:]).sum(-1) > lacking).any()):
            columns = orthonormal(torch.stack([vector.double().flatten(-2) for vector in vectors], -1))
            return cls.of([column.unflatten(-1, vectors[0].shape[-2:]) for column in columns.unbind(-1)])
        inverse = torch.where(sizes > RANK_TOLERANCE * sizes[..., -1:], sizes.rsqrt(), 0.0)
        return cls(tuple(vectors), gram, turn * inverse.unsqueeze(-2) / lengths.unsqueeze(-1))

    def compress(self, x: Tensor) -> Tensor:
        """``Q^T vec(x)``, ``(..., M, d_out, d_in)`` to ``(..., M, N, 1)``; known for one of the vectors."""
        known = [self.gram[..., j] for j, vector in enumerate(self.vectors) if vector is x]
        along = known[0] if known else inner_each(x, [vector.expand_as(x) for vector in self.vectors])
        return (self.mixing.mT @ along.unsqueeze(-1)).to(x.dtype)

    def lift(self, x: Tensor) -> Tensor:
        """``Q x`` as matrices, ``(..., M, N, 1)`` to ``(..., M, d_out, d_in)``, summed in float64."""
        factors, like = (self.mixing @ x.double()).mT, self.vectors[0]
        result = x.new_empty(*x.shape[:-2], *like.shape[-2:])
        for rows in row_blocks(*self.vectors):
            part = (factors @ wide_rows(self.vectors, rows)).squeeze(-2)
            result[..., rows, :] = part.unflatten(-1, (-1, like.shape[-1])).to(x.dtype)
        return result

    def dense(self) -> Tensor:
        """``Q``, ``(M, d_out d_in, N)`` float64."""
        return torch.stack([vector.flatten(-2) for vector in self.vectors], -1).double() @ self.mixing


@dataclass(frozen=True, eq=False, repr=False)
class Compression(Brief):
    """Orthonormal coordinates of the directions that matter: ``x = Q_out^T X Q_in``, or ``Q^T vec(X)``.

    Attributes:
        left: ``Q_out``, ``(M, d_out, a)``; None for all directions.
        right: ``Q_in``, ``(M, d_in, b)``; None for all directions.
        flat: ``Q`` for matrices taken as vectors; excludes the other two.
    """

    left: Tensor | None = None
    right: Tensor | None = None
    flat: FlatBasis | None = None

    @property
    def trivial(self) -> bool:
        """Whether nothing is compressed."""
        return self.left is None and self.right is None and self.flat is None

    def compress(self, x: Tensor) -> Tensor:
        """``(..., M, d_out, d_in)`` to ``(..., M, a, b)``."""
        if self.flat is not None:
            return self.flat.compress(x)
        x = x if self.left is None else self.left.mT @ x
        return x if self.right is None else x @ self.right

    def lift(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
        """``(..., M, a, b)`` back to ``(..., M, d_out, d_in)``, orthogonal to everything that was left out."""
        if self.flat is not None:
            return self.flat.lift(x)
        x = x if self.left is None else self.left @ x
        return x if self.right is None else x @ self.right.mT

    def operator(self, operator: Operator, like: Tensor) -> Operator:
        """An operator in these coordinates; ``like`` is any compressed tensor ``(M, a, b)``."""
        shape = (int(like.shape[-2]), int(like.shape[-1]))
        if isinstance(operator, RankOne) and self.flat is not None:
            return Gram(self.compress(operator.vector), "left", shape)
        if isinstance(operator, ScaledIdentity):
            return ScaledIdentity(shape, like)
        if isinstance(operator, Gram):
            basis = self.left if operator.side == "left" else self.right
            if self.trivial:
                return operator
            return Gram(operator.factor if basis is None else basis.mT @ operator.factor, operator.side, shape)
        return operator


def orthonormal(columns: Tensor) -> Tensor:
    """Orthonormal basis whose range holds the columns, ``(M, d, k)`` to ``(M, d, k)``, by QR."""
    return torch.linalg.qr(columns).Q

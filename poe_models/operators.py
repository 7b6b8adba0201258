"""Positive semi-definite operators ``P`` on matrices: what a residual map makes of an update.

Each operator acts on ``(..., d_out, d_in)`` and keeps a factor ``L`` with ``P = L^T L`` rather than ``P``
itself, so that ``q = |L x|^2`` can never be negative. Leading dimensions are modules of equal shape.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from typing_extensions import override

from poe_models.printing import Brief
from poe_models.records import with_tensors
from poe_models.sums import gram_matrix, inner, inner_products, row_blocks, sum_of_squares

RANK_TOLERANCE = 1e-10
"""Eigenvalues of unit vectors' Gram matrix below this share of the largest are rounding, not directions."""


class kept(cached_property[Tensor]):
    """A tensor that is made once, on first use; anew under ``torch.func``: its tensors must not outlive a transform."""

    @override
    def __get__(self, instance: Any, owner: type[Any] | None = None) -> Any:
        made = instance is None or self.attrname in instance.__dict__ or peek_interpreter_stack() is None
        return super().__get__(instance, owner) if made else self.func(instance)


class Operator(Brief, ABC):
    """A positive semi-definite operator on matrices ``(d_out, d_in)``, batched over modules: a dataclass of tensors."""

    @abstractmethod
    def root(self, x: Tensor) -> Tensor:
        """``L x`` for ``x`` of shape ``(..., d_out, d_in)``; the result has two trailing dimensions."""

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """``P x``, shape ``(..., d_out, d_in)``."""

    @abstractmethod
    def mean_curvature(self, directions: Tensor | float) -> Tensor:
        """``tr(P) / d`` in float64, shape ``(...,)``, what a relative anchor precision is relative to.

        For a Gram map trace and ``d`` are the Gram's; for diagonal maps ``d`` is the number of entries; for a
        rank-one map it is the number of directions in which the product's rank-one maps act together.

        Args:
            directions: That number, ``(...,)``; see :func:`mean_curvatures`.
        """

    @abstractmethod
    def dimension(self) -> Tensor:
        """Rank of ``P`` on ``vec(Z)`` in float64, shape ``(...,)``: the dimension of the residual."""

    @abstractmethod
    def log_pseudo_determinant(self) -> Tensor:
        """Log of the product of the nonzero eigenvalues of ``P`` on ``vec(Z)`` in float64, shape ``(...,)``.

        These are the eigenvalues that :meth:`dimension` counts; the value is 0 where ``P = 0``.
        """

    def module(self, one: slice) -> Self:
        """The operator of some modules of the batch."""
        return with_tensors(lambda value: value[one], self)  # type: ignore[type-var]

    def to(self, dtype: torch.dtype) -> Self:
        """The operator in another dtype."""
        return with_tensors(lambda value: value.to(dtype), self)  # type: ignore[type-var]

    def apply_exactly(self, x: Tensor) -> Tensor:
        """``P x`` in float64, of ``x`` in float64, ``(..., d_out, d_in)``."""
        return self.to(torch.float64).apply(x)

    def quadratic(self, x: Tensor) -> Tensor:
        """``<x, P x>``, summed in float64, shape ``(...,)``."""
        return sum_of_squares(self.root(x))


@dataclass(frozen=True, eq=False, repr=False)
class ScaledIdentity(Operator):
    """``P = I`` on matrices ``(d_out, d_in)``, batched and on the device like any tensor ``(..., d_out, d_in)``."""

    shape: tuple[int, int]
    like: Tensor

    @override
    def root(self, x: Tensor) -> Tensor:
        return x

    @override
    def apply(self, x: Tensor) -> Tensor:
        return x

    @override
    def mean_curvature(self, directions: Tensor | float) -> Tensor:
        return self.like.new_ones(self.like.shape[:-2], dtype=torch.float64)

    @override
    def dimension(self) -> Tensor:
        return self.mean_curvature(1) * (self.shape[0] * self.shape[1])

    @override
    def log_pseudo_determinant(self) -> Tensor:
        return torch.zeros_like(self.mean_curvature(1))


@dataclass(frozen=True, eq=False, repr=False)
class Diagonal(Operator):
    """``P x = values * x`` elementwise, ``values >= 0`` of shape ``(..., d_out, d_in)``."""

    values: Tensor

    @override
    def root(self, x: Tensor) -> Tensor:
        return self.values.sqrt() * x

    @override
    def apply(self, x: Tensor) -> Tensor:
        return self.values * x

    @override
    def mean_curvature(self, directions: Tensor | float) -> Tensor:
        return self.values.double().mean((-2, -1))

    @override
    def dimension(self) -> Tensor:
        return (self.values > 0).double().sum((-2, -1))

    @override
    def log_pseudo_determinant(self) -> Tensor:
        return torch.where(self.values > 0, self.values, 1).double().log().sum((-2, -1))


@dataclass(frozen=True, eq=False, repr=False)
class Gram(Operator):
    """``P x = F F^T x`` (``side="left"``) or ``x F F^T`` (``side="right"``).

    Args:
        factor: ``F`` of shape ``(..., d, r)`` with ``d`` the side it acts on.
        side: Which side of the matrix it acts on.
        shape: ``(d_out, d_in)``.
        whole: Shape of the matrices that these are in orthonormal bases of, if they are; ``tr(P) / d`` and the
            dimension are those on the whole ones.
    """

    factor: Tensor
    side: Literal["left", "right"]
    shape: tuple[int, int]
    whole: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.factor.shape[-2] != self._lengths[0]:
            raise ValueError(
                f"`Gram(factor={tuple(self.factor.shape)}, side={self.side!r})`: the factor needs {self._lengths[0]} "
                f"rows to act on matrices of shape {self.shape} from the {self.side}."
            )

    @property
    def _lengths(self) -> tuple[int, int]:
        """Length of the side it acts on, and of the other one."""
        return self.shape if self.side == "left" else (self.shape[1], self.shape[0])

    @property
    def _whole_lengths(self) -> tuple[int, int]:
        rows, columns = self.whole or self.shape
        return (rows, columns) if self.side == "left" else (columns, rows)

    @kept
    def gram(self) -> Tensor:
        """``F F^T``, ``(..., d, d)``; made once, on first use."""
        return gram_matrix(self.factor)

    @kept
    def squared_size(self) -> Tensor:
        """``|F|^2``, ``(...,)`` float64; made once, on first use."""
        return sum_of_squares(self.factor)

    @kept
    def narrow(self) -> Tensor:
        """A factor of the same ``P`` with at most as many columns as rows; made once, on first use."""
        return thin(self.factor)

    @override
    def root(self, x: Tensor) -> Tensor:
        return self.narrow.mT @ x if self.side == "left" else x @ self.narrow

    @override
    def apply(self, x: Tensor) -> Tensor:
        if self._gram_is_cheaper(x.shape[-1] if self.side == "left" else x.shape[-2]):
            return self.gram @ x if self.side == "left" else x @ self.gram
        if self.side == "left":
            return self.factor @ (self.factor.mT @ x)
        return (x @ self.factor) @ self.factor.mT

    @override
    def apply_exactly(self, x: Tensor) -> Tensor:
        if self._gram_is_cheaper(x.shape[-1] if self.side == "left" else x.shape[-2]):
            return super().apply_exactly(x)
        turned, total = x.mT if self.side == "left" else x, torch.zeros_like(x)
        for columns in row_blocks(self.factor.mT):  # few of them in float64 at a time
            wide = self.factor[..., columns].double()
            part = (turned @ wide) @ wide.mT
            total += part.mT if self.side == "left" else part
        return total

    def _gram_is_cheaper(self, vectors: int) -> bool:
        """Whether ``F F^T``, which takes half a product to make, times so many vectors is less than ``F`` and ``F^T``.

        By shapes alone, whether it is made already or not: rounding must not depend on what was computed before.
        """
        side, columns = self.factor.shape[-2:]
        return side * (columns + 2 * vectors) < 4 * columns * vectors

    @override
    def mean_curvature(self, directions: Tensor | float) -> Tensor:
        return self.squared_size / self._whole_lengths[0]

    @override
    def dimension(self) -> Tensor:
        return matrix_rank(self.narrow) * self._whole_lengths[1]

    @override
    def log_pseudo_determinant(self) -> Tensor:
        singular = torch.linalg.svdvals(self.narrow.double())  # in descending order
        counted = torch.arange(singular.shape[-1]).to(singular) < matrix_rank(self.narrow).unsqueeze(-1)
        return 2 * self._whole_lengths[1] * torch.where(counted, singular, 1.0).log().sum(-1)


@dataclass(frozen=True, eq=False, repr=False)
class RankOne(Operator):
    """``P x = v <v, x>`` with ``v`` of shape ``(..., d_out, d_in)``; never a matrix on ``vec(x)``."""

    vector: Tensor

    @override
    def root(self, x: Tensor) -> Tensor:
        return inner(self.vector, x)[..., None, None]

    @override
    def apply(self, x: Tensor) -> Tensor:
        return (self.vector.double() * self.root(x)).to(x.dtype)

    @override
    def mean_curvature(self, directions: Tensor | float) -> Tensor:
        return sum_of_squares(self.vector) / directions

    @override
    def dimension(self) -> Tensor:
        return (sum_of_squares(self.vector) > 0).double()

    @override
    def log_pseudo_determinant(self) -> Tensor:
        length_squared = sum_of_squares(self.vector)
        return torch.where(length_squared > 0, length_squared, 1.0).log()


def matrix_rank(factor: Tensor) -> Tensor:
    """Rank of matrices ``(..., d, r)`` to the rounding of their dtype, ``(...,)`` float64.

    Singular values of float32 matrices are the roots of eigenvalues in float64 well beyond their own rounding.
    """
    if factor.dtype == torch.float64:
        return torch.linalg.matrix_rank(factor).double()
    longest, shortest = max(factor.shape[-2:]), min(factor.shape[-2:])
    wide = factor.double()
    gram = wide.mT @ wide if factor.shape[-1] == shortest else wide @ wide.mT
    eigenvalues = torch.linalg.eigvalsh(gram)
    rounding = (longest * torch.finfo(factor.dtype).eps) ** 2 * eigenvalues[..., -1:]
    return (eigenvalues > rounding).double().sum(-1)


def mean_curvatures(operators: Sequence[Operator]) -> list[Tensor]:
    """``tr(P_i) / d_i`` of a product's operators, ``(M,)`` float64 each.

    Rank-one operators act in as many directions as their vectors span, so that a vector given twice counts as one of
    twice the importance.
    """
    vectors = [operator.vector for operator in operators if isinstance(operator, RankOne)]
    directions = span_rank(inner_products(vectors)).clamp(min=1) if vectors else 1
    return [operator.mean_curvature(directions) for operator in operators]


def span_rank(gram: Tensor) -> Tensor:
    """Dimension of the span of vectors of any lengths, from their inner products ``(M, N, N)``: ``(M,)`` float64."""
    lengths = vector_lengths(gram)
    eigenvalues = torch.linalg.eigvalsh(gram / (lengths.unsqueeze(-1) * lengths.unsqueeze(-2)))
    return (eigenvalues > RANK_TOLERANCE * eigenvalues[:, -1:].clamp(min=0)).double().sum(-1)


def vector_lengths(gram: Tensor) -> Tensor:
    """Lengths of vectors from their inner products, ``(M, N, N)`` to ``(M, N)``; 1 of a zero vector, to divide by."""
    lengths = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    return torch.where(lengths > 0, lengths, 1.0)


def thin(factor: Tensor) -> Tensor:
    """A factor with the same Gram matrix ``F F^T`` and at most as many columns as rows.

    >>> wide = torch.randn(3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> thin(wide).shape, torch.allclose(thin(wide) @ thin(wide).mT, wide @ wide.mT)
    (torch.Size([3, 3]), True)
    """
    if factor.shape[-1] <= factor.shape[-2]:
        return factor
    return torch.linalg.qr(factor.mT, mode="r").R.mT


def root_of(matrix: Tensor, computed_in: torch.dtype | None = None) -> Tensor:
    """A factor ``F`` with ``F F^T`` equal to positive semi-definite matrices ``(..., d, d)``, computed in float64.

    By Cholesky where every matrix is well within rank ``d``, by eigenvalues where some are not: those within rounding
    of zero are dropped. Rounding is judged with a unit diagonal, so that small inputs beside large ones are kept.

    Args:
        matrix: ``(..., d, d)``.
        computed_in: The dtype whose rounding they have; their own by default.

    Raises:
        ValueError: If an eigenvalue is clearly negative.

    >>> root_of(torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
    tensor([[0., 2.],
            [0., 0.]], dtype=torch.float64)
    """
    rounding = moment_rounding(matrix.shape[-1], computed_in or matrix.dtype)
    unit, sizes = unit_diagonal(matrix)
    factor, failed = torch.linalg.cholesky_ex(unit)
    if not bool(failed.any()) and bool((factor.diagonal(dim1=-2, dim2=-1).square() > rounding).all()):
        return sizes.unsqueeze(-1) * factor
    eigenvalues, vectors = torch.linalg.eigh((unit + unit.mT) / 2)
    if bool((eigenvalues < -1e3 * rounding).any()):
        raise ValueError(
            f"a matrix of second moments, scaled to a unit diagonal, has the eigenvalue {float(eigenvalues.amin()):.2e}"
            f" beside a largest one of {float(eigenvalues.amax()):.2e}: it is not positive semi-definite. Collect the "
            "statistics again."
        )
    roots = torch.where(eigenvalues > rounding, eigenvalues, 0.0).sqrt()
    return sizes.unsqueeze(-1) * vectors * roots.unsqueeze(-2)


def moment_rounding(side: int, dtype: torch.dtype) -> float:
    """Bound on the rounding of eigenvalues of ``d x d`` second moments of unit diagonal, summed up in a dtype.

    An error of one unit in every entry moves eigenvalues by up to ``d`` units; the margin is for sums and scaling.

    >>> moment_rounding(256, torch.float64) == 2.0**-42
    True
    """
    return 4 * side * torch.finfo(dtype).eps


def unit_diagonal(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric matrices ``(..., d, d)`` scaled to a unit diagonal in float64, and the divisors ``(..., d)``.

    Rows and columns are divided by the roots of the diagonal's magnitudes, and by 1 where it is zero.

    >>> unit_diagonal(torch.tensor([[4.0, 1.0], [1.0, 1.0]]))
    (tensor([[1.0000, 0.5000],
            [0.5000, 1.0000]], dtype=torch.float64), tensor([2., 1.], dtype=torch.float64))
    """
    matrix = matrix.double()
    sizes = matrix.diagonal(dim1=-2, dim2=-1).abs().sqrt()
    sizes = torch.where(sizes > 0, sizes, 1.0)
    return matrix / sizes.unsqueeze(-1) / sizes.unsqueeze(-2), sizes

"""Precision matrices ``H = sum_i w_i P_i + shift I``, factored once and then used.

The three shapes that a product of experts can take: one side of the matrix, both sides, or elementwise. Leading
dimensions ``(...)`` are modules and, in samplers, chains. Every class has a square root ``H = L L^T``, so that
``L^-T`` turns white noise into draws of ``N(0, H^-1)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override


class Precision(ABC):
    """A symmetric positive definite operator on matrices ``(..., a, b)``."""

    @abstractmethod
    def solve(self, b: Tensor) -> Tensor:
        """``H^-1 b``, ``(..., a, b)``."""

    @abstractmethod
    def whiten(self, x: Tensor) -> Tensor:
        """``L^-1 x``, ``(..., a, b)``: white if ``x`` has covariance ``H``."""

    @abstractmethod
    def sample(self, noise: Tensor) -> Tensor:
        """``L^-T noise``, ``(..., a, b)``: a draw of ``N(0, H^-1)`` from standard normal noise."""

    @abstractmethod
    def logdet(self) -> Tensor:
        """Log determinant of ``H`` on all ``a * b`` entries, float64, ``(...)``."""

    @abstractmethod
    def inverse_diagonal(self) -> Tensor:
        """Marginal variances: the diagonal of ``H^-1``, ``(..., a, b)``."""


class GramPrecision(Precision):
    """``H x = A x`` (left) or ``x A`` (right) with ``A`` of shape ``(..., d, d)``, by Cholesky.

    Args:
        matrix: ``A``.
        side: the side it acts on.
        shape: ``(a, b)``.

    Raises:
        ValueError: ``A`` is not positive definite in its dtype.
    """

    def __init__(self, matrix: Tensor, side: Literal["left", "right"], shape: tuple[int, int]) -> None:
        self.side = side
        self.shape = shape
        self.factor, failed = torch.linalg.cholesky_ex(matrix)
        if bool(failed.any()):
            raise ValueError(
                f"the precision of module {failed.nonzero()[0].tolist()[-1]} of the batch is not positive definite in "
                f"{matrix.dtype}: the experts leave some direction undetermined. Raise the anchor's precision, or "
                "compute in float64."
            )

    @override
    def solve(self, b: Tensor) -> Tensor:
        return self._turn(torch.cholesky_solve(self._turn(b), self.factor))

    @override
    def whiten(self, x: Tensor) -> Tensor:
        return self._turn(torch.linalg.solve_triangular(self.factor, self._turn(x), upper=False))

    @override
    def sample(self, noise: Tensor) -> Tensor:
        return self._turn(torch.linalg.solve_triangular(self.factor.mT, self._turn(noise), upper=True))

    @override
    def logdet(self) -> Tensor:
        copies = self.shape[1] if self.side == "left" else self.shape[0]
        return 2 * copies * self.factor.diagonal(dim1=-2, dim2=-1).double().log().sum(-1)

    @override
    def inverse_diagonal(self) -> Tensor:
        one_side = torch.cholesky_inverse(self.factor).diagonal(dim1=-2, dim2=-1)
        column = one_side.unsqueeze(-1) if self.side == "left" else one_side.unsqueeze(-2)
        return column.expand(*one_side.shape[:-1], *self.shape)

    def _turn(self, x: Tensor) -> Tensor:
        return x if self.side == "left" else x.mT


class KroneckerSum(Precision):
    """``H x = A x + x B + shift x``, by an eigendecomposition of each side.

    Args:
        left: ``A``, ``(..., a, a)``.
        right: ``B``, ``(..., b, b)``.
        shift: ``(..., 1, 1)``.

    Raises:
        ValueError: ``H`` is not positive definite.
    """

    def __init__(self, left: Tensor, right: Tensor, shift: Tensor) -> None:
        left_values, self.left = torch.linalg.eigh(left)
        right_values, self.right = torch.linalg.eigh(right)
        self.values = left_values.clamp(min=0).unsqueeze(-1) + right_values.clamp(min=0).unsqueeze(-2) + shift
        if not bool((self.values > 0).all()):
            raise ValueError(
                "the precision is not positive definite: the experts leave some direction undetermined. "
                "Raise the anchor's precision."
            )

    @override
    def solve(self, b: Tensor) -> Tensor:
        return self.left @ ((self.left.mT @ b @ self.right) / self.values) @ self.right.mT

    @override
    def whiten(self, x: Tensor) -> Tensor:
        return (self.left.mT @ x @ self.right) / self.values.sqrt()

    @override
    def sample(self, noise: Tensor) -> Tensor:
        return self.left @ (noise / self.values.sqrt()) @ self.right.mT

    @override
    def logdet(self) -> Tensor:
        return self.values.double().log().sum((-2, -1))

    @override
    def inverse_diagonal(self) -> Tensor:
        return self.left.square() @ self.values.reciprocal() @ self.right.mT.square()


class DiagonalPrecision(Precision):
    """``H x = values * x``.

    Args:
        values: the diagonal, broadcastable to ``(..., a, b)``.
        shape: ``(a, b)``.

    Raises:
        ValueError: an entry is not positive.
    """

    def __init__(self, values: Tensor, shape: tuple[int, int]) -> None:
        self.values = values.expand(*values.shape[:-2], *shape)
        if not bool((values > 0).all()):
            raise ValueError(
                "the precision is not positive definite: some entry has neither an expert nor an anchor. "
                "Raise the anchor's precision."
            )

    @override
    def solve(self, b: Tensor) -> Tensor:
        return b / self.values

    @override
    def whiten(self, x: Tensor) -> Tensor:
        return x / self.values.sqrt()

    @override
    def sample(self, noise: Tensor) -> Tensor:
        return noise / self.values.sqrt()

    @override
    def logdet(self) -> Tensor:
        return self.values.double().log().sum((-2, -1))

    @override
    def inverse_diagonal(self) -> Tensor:
        return self.values.reciprocal()

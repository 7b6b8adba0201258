"""Precision matrices ``H = sum_i w_i P_i + shift I`` of a batch of modules, factored once and then used.

The three shapes that a product of experts can take: one side of the matrix, both sides, or elementwise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from typing_extensions import override


class Precision(ABC):
    """A symmetric positive definite operator on matrices ``(M, d_out, d_in)``."""

    @abstractmethod
    def solve(self, b: Tensor) -> Tensor:
        """``H^-1 b`` for ``b`` of shape ``(M, d_out, d_in)``."""


class GramPrecision(Precision):
    """``H x = A x`` (left) or ``x A`` (right) with ``A`` of shape ``(M, d, d)``, by Cholesky.

    Args:
        matrix: ``A``.
        side: the side it acts on.

    Raises:
        ValueError: ``A`` is not positive definite in its dtype.
    """

    def __init__(self, matrix: Tensor, side: str) -> None:
        self.side = side
        self.factor, failed = torch.linalg.cholesky_ex(matrix)
        if bool(failed.any()):
            raise ValueError(
                f"the precision of module {failed.nonzero()[0].item()} of the batch is not positive definite in "
                f"{matrix.dtype}: the experts leave some direction undetermined. Raise the anchor's precision, or "
                "compute in float64."
            )

    @override
    def solve(self, b: Tensor) -> Tensor:
        if self.side == "left":
            return torch.cholesky_solve(b, self.factor)
        return torch.cholesky_solve(b.mT, self.factor).mT


class KroneckerSum(Precision):
    """``H x = A x + x B + shift x``, by an eigendecomposition of each side.

    Args:
        left: ``A``, ``(M, d_out, d_out)``.
        right: ``B``, ``(M, d_in, d_in)``.
        shift: ``(M,)``.

    Raises:
        ValueError: ``H`` is not positive definite.
    """

    def __init__(self, left: Tensor, right: Tensor, shift: Tensor) -> None:
        left_values, self.left = torch.linalg.eigh(left)
        right_values, self.right = torch.linalg.eigh(right)
        total = left_values.clamp(min=0).unsqueeze(-1) + right_values.clamp(min=0).unsqueeze(-2)
        self.values = total + shift.to(total.dtype)[:, None, None]
        if not bool((self.values > 0).all()):
            raise ValueError(
                "the precision is not positive definite: the experts leave some direction undetermined. "
                "Raise the anchor's precision."
            )

    @override
    def solve(self, b: Tensor) -> Tensor:
        return self.left @ ((self.left.mT @ b @ self.right) / self.values) @ self.right.mT


class DiagonalPrecision(Precision):
    """``H x = values * x`` with ``values`` broadcastable to ``(M, d_out, d_in)``.

    Args:
        values: the diagonal.

    Raises:
        ValueError: an entry is not positive.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        if not bool((values > 0).all()):
            raise ValueError(
                "the precision is not positive definite: some entry has neither an expert nor an anchor. "
                "Raise the anchor's precision."
            )

    @override
    def solve(self, b: Tensor) -> Tensor:
        return b / self.values

"""Precision matrices ``H = sum_i w_i P_i + ridge I``, factored once and then used.

The three shapes that a product of experts can take: one side of the matrix, both sides, or elementwise. Leading
dimensions ``(...)`` are modules and, in samplers, chains. Every class has a square root ``H = L L^T``, so that
``L^-T`` turns white noise into draws of ``N(0, H^-1)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from poe_models.operators import RANK_TOLERANCE, vector_lengths
from poe_models.sums import inner_by_blocks, inner_products


class NotPositiveDefiniteError(ValueError):
    """A precision matrix that is not positive definite in its dtype."""


class Precision(ABC):
    """A symmetric positive definite operator on matrices ``(..., a, b)``."""

    shape: tuple[int, int]
    """``(a, b)``."""
    dtype: torch.dtype

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
    def standardize(self, x: Tensor) -> Tensor:
        """``L^T x``, ``(..., a, b)``: white if ``x`` has covariance ``H^-1``; its squared norm is ``<x, H x>``."""

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
        side: The side it acts on.
        shape: ``(a, b)``.

    Raises:
        NotPositiveDefiniteError: If ``A`` is not positive definite in its dtype.
    """

    def __init__(self, matrix: Tensor, side: Literal["left", "right"], shape: tuple[int, int]) -> None:
        self.side = side
        self.shape, self.dtype = shape, matrix.dtype
        self.factor, failed = torch.linalg.cholesky_ex(matrix)
        # A pivot that is only rounding passes the factorisation and would return noise.
        pivots = self.factor.diagonal(dim1=-2, dim2=-1).square()
        failed = (failed > 0) | (pivots.amin(-1) < 4 * torch.finfo(matrix.dtype).eps * pivots.amax(-1))
        if bool(failed.any()):
            raise NotPositiveDefiniteError(
                f"the precision of module {failed.nonzero()[0].tolist()[-1]} of the batch is not positive definite in "
                f"{matrix.dtype}: the experts leave some direction undetermined. Raise the anchor's precision"
                f"{', or compute in float64' if matrix.dtype != torch.float64 else ''}."
            )

    @override
    def solve(self, b: Tensor) -> Tensor:
        # Two solves from the right in place of `cholesky_solve`: its right-hand sides would be copied to columns first.
        triangle, rows = self.factor, b if self.side == "right" else b.mT
        half = torch.linalg.solve_triangular(triangle.mT, rows, upper=True, left=False)
        solved = torch.linalg.solve_triangular(triangle, half, upper=False, left=False)
        return (solved if self.side == "right" else solved.mT).contiguous()

    @override
    def whiten(self, x: Tensor) -> Tensor:
        if self.side == "left":
            return torch.linalg.solve_triangular(self.factor, x, upper=False)
        return torch.linalg.solve_triangular(self.factor.mT, x, upper=True, left=False)

    @override
    def sample(self, noise: Tensor) -> Tensor:
        if self.side == "left":
            return torch.linalg.solve_triangular(self.factor.mT, noise, upper=True)
        return torch.linalg.solve_triangular(self.factor, noise, upper=False, left=False)

    @override
    def standardize(self, x: Tensor) -> Tensor:
        return self.factor.mT @ x if self.side == "left" else x @ self.factor

    @override
    def logdet(self) -> Tensor:
        copies = self.shape[1] if self.side == "left" else self.shape[0]
        return 2 * copies * self.factor.diagonal(dim1=-2, dim2=-1).double().log().sum(-1)

    @override
    def inverse_diagonal(self) -> Tensor:
        one_side = self.side_covariance().diagonal(dim1=-2, dim2=-1)
        column = one_side.unsqueeze(-1) if self.side == "left" else one_side.unsqueeze(-2)
        return column.expand(*one_side.shape[:-1], *self.shape)

    def side_covariance(self) -> Tensor:
        """``A^-1``, ``(..., d, d)``."""
        return torch.cholesky_inverse(self.factor)


class SpectralPrecision(Precision):
    """A precision whose eigenvalues are known.

    Its root is the symmetric one, which does not depend on the signs and bases of eigenvectors: a draw made again from
    its seed is the same draw.
    """

    values: Tensor
    """The eigenvalues, ``(..., a, b)``."""

    @abstractmethod
    def power(self, x: Tensor, exponent: Literal[-2, -1, 1]) -> Tensor:
        """``H^(exponent / 2) x``, ``(..., a, b)``."""

    def _require_positive(self, reason: str) -> None:
        if not bool((self.values > 0).all()):
            raise NotPositiveDefiniteError(
                f"the precision is not positive definite: {reason}. Raise the anchor's precision."
            )

    @override
    def solve(self, b: Tensor) -> Tensor:
        return self.power(b, -2)

    @override
    def whiten(self, x: Tensor) -> Tensor:
        return self.power(x, -1)

    @override
    def sample(self, noise: Tensor) -> Tensor:
        return self.power(noise, -1)

    @override
    def standardize(self, x: Tensor) -> Tensor:
        return self.power(x, 1)

    @override
    def logdet(self) -> Tensor:
        return self.values.double().log().sum((-2, -1))


class KroneckerSum(SpectralPrecision):
    """``H x = A x + x B + ridge x``, by an eigendecomposition of each side.

    Args:
        left: ``A``, ``(..., a, a)``.
        right: ``B``, ``(..., b, b)``.
        ridge: ``(..., 1, 1)``.

    Raises:
        NotPositiveDefiniteError: If ``H`` is not positive definite.
    """

    def __init__(self, left: Tensor, right: Tensor, ridge: Tensor) -> None:
        left_values, self.left = torch.linalg.eigh(left)
        right_values, self.right = torch.linalg.eigh(right)
        self.values = left_values.clamp(min=0).unsqueeze(-1) + right_values.clamp(min=0).unsqueeze(-2) + ridge
        self.shape, self.dtype = (int(left.shape[-1]), int(right.shape[-1])), left.dtype
        self._require_positive("the experts leave some direction undetermined")

    @override
    def power(self, x: Tensor, exponent: Literal[-2, -1, 1]) -> Tensor:
        factors = {-2: torch.reciprocal, -1: torch.rsqrt, 1: torch.sqrt}[exponent](self.values)
        return self.left @ ((self.left.mT @ x @ self.right) * factors) @ self.right.mT

    @override
    def inverse_diagonal(self) -> Tensor:
        return self.left.square() @ self.values.reciprocal() @ self.right.mT.square()


class DiagonalPrecision(SpectralPrecision):
    """``H x = values * x``.

    Args:
        values: The diagonal, broadcastable to ``(..., a, b)``.
        shape: ``(a, b)``.

    Raises:
        NotPositiveDefiniteError: If an entry is not positive.
    """

    def __init__(self, values: Tensor, shape: tuple[int, int]) -> None:
        self.values = values.expand(*values.shape[:-2], *shape)
        self.shape, self.dtype = shape, values.dtype
        self._require_positive("some entry has neither an expert nor an anchor")

    @override
    def power(self, x: Tensor, exponent: Literal[-2, -1, 1]) -> Tensor:
        if exponent == -2:
            return x / self.values
        return x * self.values.sqrt() if exponent == 1 else x / self.values.sqrt()

    @override
    def inverse_diagonal(self) -> Tensor:
        return self.values.reciprocal()


class LowRankUpdate(Precision):
    """``H = H_0 + sum_k c_k v_k v_k^T``: another precision with a few rank-one terms of either sign.

    With ``H_0 = L L^T`` and ``W = L^-1 [v_1 ... v_E]``, ``H = L (I + W C W^T) L^T``. The Gram matrix of ``W`` tells its
    orthonormal directions ``W K``, and ``I + W C W^T`` in them is an ``E x E`` eigenproblem.

    Args:
        base: ``H_0``.
        vectors: ``v_k``, ``(..., a, b)`` each, taken one after another.
        coefficients: ``c_k``, ``(..., E)`` float64.

    Raises:
        NotPositiveDefiniteError: If ``H`` is not positive definite.
    """

    def __init__(self, base: Precision, vectors: Iterable[Tensor], coefficients: Tensor) -> None:
        self.base = base
        self.shape, self.dtype = base.shape, base.dtype
        self.white = _stacked(map(base.whiten, vectors), coefficients.shape[-1])
        gram = inner_products(self.white.unbind(-3))
        lengths = vector_lengths(gram)
        sizes, turn = torch.linalg.eigh(gram / (lengths.unsqueeze(-1) * lengths.unsqueeze(-2)))
        root = torch.where(sizes > RANK_TOLERANCE * sizes[..., -1:], sizes, 0.0).sqrt()
        small = root.unsqueeze(-1) * (turn.mT @ ((coefficients * lengths**2).unsqueeze(-1) * turn)) * root.unsqueeze(-2)
        self.values, rotation = torch.linalg.eigh(small + torch.eye(small.shape[-1]).to(small))
        inverse = torch.where(root > 0, 1 / root, 0.0).unsqueeze(-2)
        self.mixing = (turn * inverse) @ rotation / lengths.unsqueeze(-1)
        if not bool((self.values > 0).all()):
            worst = self.values.amin(-1).flatten()
            raise NotPositiveDefiniteError(
                f"module {int(worst.argmin())} of the batch is not at a minimum: the Hessian there has a negative "
                f"direction (relative curvature {float(worst.min()):.3g}). Converge the fixed point first, or start it "
                "elsewhere."
            )

    @override
    def solve(self, b: Tensor) -> Tensor:
        return self.sample(self.whiten(b))

    @override
    def whiten(self, x: Tensor) -> Tensor:
        return self._scale(self.base.whiten(x), -0.5)

    @override
    def sample(self, noise: Tensor) -> Tensor:
        return self.base.sample(self._scale(noise, -0.5))

    @override
    def standardize(self, x: Tensor) -> Tensor:
        return self._scale(self.base.standardize(x), 0.5)

    @override
    def logdet(self) -> Tensor:
        return self.base.logdet() + self.values.log().sum(-1)

    @override
    def inverse_diagonal(self) -> Tensor:
        return self.base.inverse_diagonal() + self.inverse_diagonal_change(lambda x: x)

    def inverse_diagonal_change(self, lift: Callable[[Tensor], Tensor]) -> Tensor:
        """Change of the marginal variances by the rank-one terms, in coordinates that ``lift`` leads to."""
        moved = torch.stack([lift(self.base.sample(v)) for v in self.white.unbind(-3)], -1).double()
        along = moved @ self.mixing.unsqueeze(-3)
        return (along.square() * (1 / self.values - 1)[..., None, None, :]).sum(-1)

    def _scale(self, x: Tensor, power: float) -> Tensor:
        """``(I + W K (values^power - 1) (W K)^T) x``: the symmetric power of the middle factor."""
        middle = (self.mixing * (self.values**power - 1).unsqueeze(-2)) @ self.mixing.mT
        factors = (middle @ inner_by_blocks(self.white, x).unsqueeze(-1)).squeeze(-1).to(x.dtype)
        terms = zip(self.white.unbind(-3), factors[..., None, None].unbind(-3), strict=True)
        result = torch.addcmul(x, *next(terms))
        for v, factor in terms:
            result.addcmul_(v, factor)
        return result


def _stacked(vectors: Iterable[Tensor], count: int) -> Tensor:
    """So many tensors ``(..., a, b)`` as one, ``(..., E, a, b)``, filled as they come."""
    stacked = None
    for place, each in zip(range(count), vectors, strict=True):
        if stacked is None:
            stacked = each.new_empty(*each.shape[:-2], count, *each.shape[-2:])
        stacked[..., place, :, :] = each
    assert stacked is not None
    return stacked

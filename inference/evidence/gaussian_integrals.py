r"""The merged update integrated out, given the weights of the experts: one Gaussian integral per module, in Full.

Given weights ``w_i`` every expert is the Gaussian ``exp(-w_i q_i(Z))``, and so is the anchor ``N(Z_0, I / (2 sigma))``
with ``sigma = eta / T``. With ``H(w) = sum_i w_i P_i + sigma I``, in ``n`` coordinates, and ``Z(w)`` the minimum,

    log int N(Z; Z_0, I / (2 sigma)) exp(-sum_i w_i q_i(Z)) dZ = -log det(H / sigma) / 2 - m(w)
    m(w) = min_Z sum_i w_i q_i(Z) + sigma |Z - Z_0|^2
    d / dw_i = -q_i(Z(w)) - tr(H^-1 P_i) / 2 = -E[q_i]

The slope is minus the mean squared residual under the Gaussian. What no expert sees integrates to one and is left out.

Experts that act on one side of the matrix (and Identity, which acts on any) need a Cholesky factorisation of that side,
or of the directions that any of them sees, whichever is smaller; the other side only counts how often. Evidence is a
difference of large numbers, so everything is in float64 whatever the updates are in.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import override

from poe_models.least_squares import Quadratic, quadratic_of
from poe_models.operators import Diagonal, Gram, Operator, RankOne, ScaledIdentity
from poe_models.posterior import Posterior
from poe_models.precisions import KroneckerSum
from poe_models.sums import sum_of_squares


class GaussianIntegral(ABC):
    """Log of the integral over the merged update as a function of the experts' weights.

    Attributes:
        ridge: ``sigma = eta / T``, ``(M,)``.
        size: Numbers that one set of weights of one module needs in memory.
    """

    ridge: Tensor
    size: int

    @abstractmethod
    def value(self, weights: Tensor) -> Tensor:
        """The log integral in nats, ``(*S, M, E)`` to ``(*S, M)``; ``-inf`` where ``H`` cannot be factored."""

    @abstractmethod
    def value_and_slope(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The log integral and its derivatives in the weights, ``(*S, M, E)`` to ``(*S, M)`` and ``(*S, M, E)``."""


class OneSided(GaussianIntegral):
    """Experts that act on one side: ``H = A (x) I`` with ``A(w) = sum_i w_i G_i + sigma I`` of ``k`` directions.

    Args:
        grams: ``G_i``, ``(M, E, k, k)``.
        targets: ``U_i - Z_0`` with the acting side last, ``(M, E, r, k)``.
        copies: Length of the other side: how many rows ``A`` acts on.
        ridge: ``sigma``, ``(M,)``.
    """

    def __init__(self, grams: Tensor, targets: Tensor, copies: int, ridge: Tensor) -> None:
        self.grams, self.copies, self.ridge = grams, copies, ridge
        pulls = targets @ grams
        self.at_zero = (pulls * targets).sum((-2, -1))
        self.pulls = _fewer_rows(pulls)
        self.size = 3 * grams.shape[-1] ** 2 + 2 * self.pulls.shape[-2] * grams.shape[-1]

    @override
    def value(self, weights: Tensor) -> Tensor:
        factor, failed, pull = self._factored(weights)
        white = torch.linalg.solve_triangular(factor, pull.mT, upper=False)
        value = (weights * self.at_zero).sum(-1).neg() + sum_of_squares(white) - self._half_log_determinant(factor)
        return torch.where(failed, -math.inf, value)

    @override
    def value_and_slope(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        factor, failed, pull = self._factored(weights)
        x = torch.cholesky_solve(pull.mT, factor)  # (*S, M, k, r)
        along = (pull.mT * x).sum((-2, -1))
        value = along - (weights * self.at_zero).sum(-1) - self._half_log_determinant(factor)
        # E[q_i] = <x x^T + copies A^-1 / 2, G_i> - 2 <b_i, x> + q_i(0)
        moment = x @ x.mT + self.copies / 2 * torch.cholesky_inverse(factor)
        inside = _contract(moment, self.grams)
        residuals = inside - 2 * _contract(x.mT, self.pulls) + self.at_zero
        return torch.where(failed, -math.inf, value), -residuals

    def _factored(self, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        matrix = _mix(weights, self.grams)
        matrix.diagonal(dim1=-2, dim2=-1).add_(self.ridge.unsqueeze(-1))
        factor, failed = torch.linalg.cholesky_ex(matrix)
        return factor, failed > 0, _mix(weights, self.pulls)

    def _half_log_determinant(self, factor: Tensor) -> Tensor:
        diagonal = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return self.copies * (diagonal - factor.shape[-1] / 2 * self.ridge.log())


class Elementwise(GaussianIntegral):
    """Experts that weigh entries: ``H = sum_i w_i F_i + sigma`` elementwise.

    Args:
        values: ``F_i``, ``(M, E, D)``.
        targets: ``U_i - Z_0``, ``(M, E, D)``.
        ridge: ``sigma``, ``(M,)``.
    """

    def __init__(self, values: Tensor, targets: Tensor, ridge: Tensor) -> None:
        self.values, self.targets, self.ridge = values, targets, ridge
        self.pulls = values * targets
        self.size = 4 * values.shape[-1]

    @override
    def value(self, weights: Tensor) -> Tensor:
        return self._solved(weights)[2]

    @override
    def value_and_slope(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        precision, x, value = self._solved(weights)
        spread = 0.5 / precision
        mean = [
            (self.values[:, i] * ((x - self.targets[:, i]).square() + spread)).sum(-1)
            for i in range(self.values.shape[1])
        ]
        return value, -torch.stack(mean, -1)

    def _solved(self, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``H``, the minimum's displacement from the centre and the log integral."""
        precision = torch.einsum("...me,med->...md", weights, self.values) + self.ridge.unsqueeze(-1)
        x = torch.einsum("...me,med->...md", weights, self.pulls) / precision
        least = self.ridge * x.square().sum(-1)
        for i in range(self.values.shape[1]):
            least = least + weights[..., i] * (self.values[:, i] * (x - self.targets[:, i]).square()).sum(-1)
        ratio = precision / self.ridge.unsqueeze(-1)
        return precision, x, -0.5 * ratio.log().sum(-1) - least


class TwoSided(GaussianIntegral):
    """Experts on both sides: a Kronecker sum, by an eigendecomposition of each side, in float64."""

    def __init__(self, quadratic: Quadratic, ridge: Tensor) -> None:
        self.quadratic, self.ridge = quadratic, ridge
        a, b = quadratic.event_shape
        self.pulls = torch.stack(quadratic.pulls(), 1)
        self.size = 2 * (a * a + b * b) + 4 * a * b

    @override
    def value(self, weights: Tensor) -> Tensor:
        return self._solved(weights)[2]

    @override
    def value_and_slope(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        precision, residuals, value = self._solved(weights)
        inverse = precision.values.reciprocal()
        traces = torch.stack([_trace(operator, precision, inverse) for operator in self.quadratic.operators], -1)
        return value, -residuals - traces / 2

    def _solved(self, weights: Tensor) -> tuple[KroneckerSum, Tensor, Tensor]:
        precision = self.quadratic.precision(weights, self.ridge.expand(weights.shape[:-1]))
        assert isinstance(precision, KroneckerSum)
        x = precision.solve(_mix(weights, self.pulls))
        residuals = self.quadratic.residuals(x)
        least = (weights * residuals).sum(-1) + self.ridge * sum_of_squares(x)
        entries = math.prod(self.quadratic.event_shape)
        return precision, residuals, -0.5 * (precision.logdet() - entries * self.ridge.log()) - least


def in_float64(posterior: Posterior) -> Posterior:
    """The same posterior in double precision."""
    experts = tuple(
        replace(e, operator=e.operator.to(torch.float64), update=e.update.double(), low_rank=None)
        for e in posterior.experts
    )
    return replace(posterior, experts=experts, center=None if posterior.center is None else posterior.center.double())


def gaussian_integral(posterior: Posterior) -> GaussianIntegral:
    """The integral over the merged updates of a posterior in Full coordinates, with an anchor in every module.

    It is a function of the experts' weights, in the order of ``posterior.experts``.

    Raises:
        ValueError: If the operators of one module do not share a factorisation.
    """
    posterior = in_float64(posterior)
    ridge = posterior.anchor_precision / posterior.fixed_temperature
    kinds = {type(expert.operator) for expert in posterior.experts}
    if kinds == {RankOne, ScaledIdentity}:
        raise ValueError(
            "experts of one module are Directional and Identity: with both the evidence has no closed form in few "
            "directions. Use one kind per module."
        )
    quadratic = quadratic_of(posterior, for_draws=True)
    if Diagonal in kinds:
        return _elementwise(quadratic, ridge)
    sides = {operator.side for operator in quadratic.operators if isinstance(operator, Gram)}
    return TwoSided(quadratic, ridge) if len(sides) == 2 else _one_sided(quadratic, ridge)


def _one_sided(quadratic: Quadratic, ridge: Tensor) -> OneSided:
    """The integral of experts on one side; Identity alone is a 1 x 1 Gram that acts on every entry."""
    targets = torch.stack(quadratic.targets, 1)
    grams = [operator for operator in quadratic.operators if isinstance(operator, Gram)]
    if not grams:
        targets = targets.flatten(-2).unsqueeze(-1)
    elif grams[0].side == "left":
        targets = targets.mT
    eye = torch.eye(targets.shape[-1]).to(targets).expand(len(targets), -1, -1)
    forms = [operator.gram if isinstance(operator, Gram) else eye for operator in quadratic.operators]
    return OneSided(torch.stack(forms, 1), targets, int(targets.shape[-2]), ridge)


def _elementwise(quadratic: Quadratic, ridge: Tensor) -> Elementwise:
    targets = torch.stack(quadratic.targets, 1).flatten(-2)
    values = [
        operator.values.flatten(-2) if isinstance(operator, Diagonal) else torch.ones_like(targets[:, i])
        for i, operator in enumerate(quadratic.operators)
    ]
    return Elementwise(torch.stack(values, 1), targets, ridge)


def _fewer_rows(pulls: Tensor) -> Tensor:
    """``P_i U_i`` turned by one rotation of their rows, ``(M, E, r, k)``: at most ``E k`` rows are needed."""
    modules, experts, rows, k = pulls.shape
    if rows <= experts * k:
        return pulls
    stacked = pulls.transpose(1, 2).reshape(modules, rows, experts * k)
    triangle = torch.linalg.qr(stacked, mode="r").R
    return triangle.reshape(modules, -1, experts, k).transpose(1, 2).contiguous()


def _mix(weights: Tensor, matrices: Tensor) -> Tensor:
    """``sum_i w_i B_i`` for weights ``(*S, M, E)`` and matrices ``(M, E, r, k)``."""
    flat = torch.einsum("...me,mek->...mk", weights, matrices.flatten(-2))
    return flat.unflatten(-1, matrices.shape[-2:])


def _contract(one: Tensor, matrices: Tensor) -> Tensor:
    """``<X, B_i>`` for ``X`` of shape ``(*S, M, r, k)`` and matrices ``(M, E, r, k)``, ``(*S, M, E)``."""
    return torch.einsum("...mk,mek->...me", one.flatten(-2), matrices.flatten(-2))


def _trace(operator: Operator, precision: KroneckerSum, inverse: Tensor) -> Tensor:
    """``tr(H^-1 P_i)`` in the eigenbases of both sides."""
    if not isinstance(operator, Gram):
        return inverse.sum((-2, -1))
    basis, others = (precision.left, -1) if operator.side == "left" else (precision.right, -2)
    seen = (operator.factor.mT @ basis).square().sum(-2)  # the Gram's diagonal in the eigenbasis
    return (seen * inverse.sum(others)).sum(-1)

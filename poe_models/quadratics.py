"""The experts' squared residuals of a batch of modules as one weighted least-squares problem.

Given weights ``w_i`` the merged update minimises ``sum_i w_i q_i(Z) + shift |Z - Z_0|^2``, whatever the energies
are. The problem is written for the displacement ``x = Z - Z_0`` and, where the experts' operators span few
directions, in an orthonormal basis of those: ``Z = Z_0 + Q_out x Q_in^T``. That reaches the same solution as
Woodbury's identity on the stacked updates without its cancellation at a small anchor, and makes Directional
experts (vectors in ``d_out d_in`` dimensions) an ordinary Gram problem of ``N`` dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from poe_models.operators import Diagonal, Gram, Operator, RankOne, ScaledIdentity
from poe_models.posterior import BoundExpert, Posterior
from poe_models.precision import DiagonalPrecision, GramPrecision, KroneckerSum, Precision


@dataclass(frozen=True, eq=False)
class Quadratic:
    """Weighted least squares over ``x = Z - Z_0`` in compressed coordinates ``(M, a, b)``.

    Attributes:
        operators: ``P_i`` in these coordinates, one per expert.
        targets: ``U_i - Z_0`` in these coordinates, ``(M, a, b)`` each.
        lift: maps ``(M, a, b)`` back to a displacement ``(M, d_out, d_in)``.
    """

    operators: tuple[Operator, ...]
    targets: tuple[Tensor, ...]
    lift: Callable[[Tensor], Tensor]

    def residuals(self, x: Tensor) -> Tensor:
        """Squared residuals ``q_i``, ``(M, E)`` float64."""
        pairs = zip(self.operators, self.targets, strict=True)
        return torch.stack([operator.quadratic(x - target) for operator, target in pairs], -1)

    def forces(self, x: Tensor) -> list[Tensor]:
        """``P_i (x - target_i)`` per expert, ``(M, a, b)`` each: half the gradients of ``q_i``."""
        return [operator.apply(x - target) for operator, target in zip(self.operators, self.targets, strict=True)]

    def pulls(self) -> list[Tensor]:
        """``P_i target_i`` per expert: the right-hand sides of the normal equations before weighting."""
        return [operator.apply(target) for operator, target in zip(self.operators, self.targets, strict=True)]

    def precision(self, weights: Tensor, shift: Tensor) -> Precision:
        """``H = sum_i w_i P_i + shift I``, factored, for weights ``(M, E)`` and a shift ``(M,)``."""
        left, right, diagonal = self._assemble(weights, shift)
        if left is not None and right is not None:
            return KroneckerSum(left, right, diagonal.flatten())
        if left is not None:
            return GramPrecision(_add_diagonal(left, diagonal), "left")
        if right is not None:
            return GramPrecision(_add_diagonal(right, diagonal), "right")
        return DiagonalPrecision(diagonal)

    def apply(self, weights: Tensor, shift: Tensor, x: Tensor) -> Tensor:
        """``H x`` for the same ``H``, ``(M, a, b)`` to ``(M, a, b)``."""
        left, right, diagonal = self._assemble(weights, shift)
        result = diagonal * x
        if left is not None:
            result = result + left @ x
        return result if right is None else result + x @ right

    def _assemble(self, weights: Tensor, shift: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """The weighted sums of what acts on the left, on the right and elementwise."""
        dtype = self.targets[0].dtype
        sides: dict[str, Tensor] = {}
        diagonal = shift.to(dtype)[:, None, None]
        for i, operator in enumerate(self.operators):
            weight = weights[:, i].to(dtype)[:, None, None]
            if isinstance(operator, Gram):
                term = weight * operator.gram
                sides[operator.side] = sides[operator.side].add_(term) if operator.side in sides else term
            elif isinstance(operator, Diagonal):
                diagonal = diagonal + weight * operator.values
            else:
                diagonal = diagonal + weight
        return sides.get("left"), sides.get("right"), diagonal


def quadratic_of(posterior: Posterior) -> Quadratic:
    """The least-squares problem behind a posterior, in the smallest coordinates that hold its MAP.

    Args:
        posterior: of a batch of modules, without factor experts.

    Returns:
        The problem; ``lift(x) + Z_0`` is exact for every minimiser, because no expert acts outside the basis.

    Raises:
        ValueError: the operators of one module do not share a factorisation.
    """
    kinds = {type(expert.operator) for expert in posterior.experts} - {ScaledIdentity}
    if len(kinds) > 1:
        names = " and ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(
            f"one module mixes experts whose operators do not share a factorisation ({names}; Directional is RankOne, "
            "the Gram maps are Gram, Fisher is Diagonal). Use coordinates='span', or one kind per module."
        )
    center = posterior.center
    targets = [e.update if center is None else e.update - center for e in posterior.experts]
    operators = [expert.operator for expert in posterior.experts]
    if kinds == {RankOne}:
        return _flattened(operators, targets, posterior.event_shape)
    if kinds == {Gram}:
        return _two_sided(posterior.experts, targets, displaced=center is not None)
    return Quadratic(tuple(operators), tuple(targets), lambda x: x)


def _flattened(operators: list[Operator], targets: list[Tensor], shape: tuple[int, int]) -> Quadratic:
    """Directional experts: vectors in the basis of the updates, and of the targets of Identity experts."""
    columns = [op.vector if isinstance(op, RankOne) else t for op, t in zip(operators, targets, strict=True)]
    basis = orthonormal(torch.stack([column.flatten(1) for column in columns], -1))
    size = basis.shape[-1]
    targets = [basis.mT @ target.flatten(1).unsqueeze(-1) for target in targets]
    reduced: list[Operator] = [
        Gram(basis.mT @ op.vector.flatten(1).unsqueeze(-1), "left", (size, 1))
        if isinstance(op, RankOne)
        else ScaledIdentity((size, 1), targets[0])
        for op in operators
    ]
    return Quadratic(tuple(reduced), tuple(targets), lambda x: (basis @ x).unflatten(1, shape).squeeze(-1))


def _two_sided(experts: tuple[BoundExpert, ...], targets: list[Tensor], displaced: bool) -> Quadratic:
    """Gram experts: compress each side to the directions in which anything happens, where these are few."""
    left = _basis(experts, targets, "left", displaced)
    right = _basis(experts, targets, "right", displaced)

    def compress(x: Tensor) -> Tensor:
        x = x if left is None else left.mT @ x
        return x if right is None else x @ right

    def lift(x: Tensor) -> Tensor:
        x = x if left is None else left @ x
        return x if right is None else x @ right.mT

    targets = [compress(target) for target in targets]
    shape = (int(targets[0].shape[-2]), int(targets[0].shape[-1]))
    reduced: list[Operator] = []
    for expert in experts:
        operator = expert.operator
        if isinstance(operator, Gram):
            basis = left if operator.side == "left" else right
            factor = operator.factor if basis is None else basis.mT @ operator.factor
            reduced.append(Gram(factor, operator.side, shape))
        else:
            reduced.append(ScaledIdentity(shape, targets[0]))
    return Quadratic(tuple(reduced), tuple(targets), lift)


def _basis(
    experts: tuple[BoundExpert, ...], targets: list[Tensor], side: Literal["left", "right"], displaced: bool
) -> Tensor | None:
    """Orthonormal directions of one side that a minimiser can move in; None where they are all of them.

    These are the range of the operators that act on this side and, for the others, the targets themselves.
    """
    columns = []
    for expert, target in zip(experts, targets, strict=True):
        if isinstance(expert.operator, Gram) and expert.operator.side == side:
            columns.append(expert.operator.factor)
        elif expert.low_rank is not None and not displaced:
            columns.append(expert.low_rank[0] if side == "left" else expert.low_rank[1].mT)
        else:
            columns.append(target if side == "left" else target.mT)
    length = columns[0].shape[-2]
    if sum(column.shape[-1] for column in columns) >= length:
        return None
    return orthonormal(torch.cat(columns, -1))


def _add_diagonal(matrix: Tensor, diagonal: Tensor) -> Tensor:
    matrix.diagonal(dim1=-2, dim2=-1).add_(diagonal.squeeze(-1))
    return matrix


def orthonormal(columns: Tensor) -> Tensor:
    """Orthonormal basis whose range holds the columns, ``(M, d, k)`` to ``(M, d, k)``, by QR."""
    return torch.linalg.qr(columns).Q

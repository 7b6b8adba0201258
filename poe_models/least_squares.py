"""The experts' squared residuals of a batch of modules as one weighted least-squares problem.

Given weights ``w_i`` the merged update minimises ``sum_i w_i q_i(Z) + ridge |Z - Z_0|^2``, whatever the energies
are. The problem is written for the displacement ``x = Z - Z_0`` and, where the experts' operators span few
directions, in an orthonormal basis of those: ``Z = Z_0 + Q_out x Q_in^T``. That reaches the same solution as
Woodbury's identity on the stacked updates without its cancellation at a small anchor, and makes Directional
experts (vectors in ``d_out d_in`` dimensions) an ordinary Gram problem of ``N`` dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from poe_models.compression import Compression, FlatBasis, orthonormal
from poe_models.module_names import naming
from poe_models.operators import Diagonal, Gram, Operator, RankOne, ScaledIdentity
from poe_models.posterior import BoundExpert, Posterior
from poe_models.precisions import DiagonalPrecision, GramPrecision, KroneckerSum, Precision
from poe_models.printing import Brief


@dataclass(frozen=True, eq=False, repr=False)
class NormalMatrix(Brief):
    """``H = sum_i w_i P_i + ridge I``, summed up and not factored; batched as weights and ridge were.

    Attributes:
        left: What acts on the left, ``(*S, M, a, a)``; None if nothing does.
        right: What acts on the right, ``(*S, M, b, b)``; None if nothing does.
        diagonal: What acts elementwise, the ridge included, broadcastable to ``(*S, M, a, b)``.
        event_shape: ``(a, b)``.
        modules: Names of the modules, for errors.
    """

    left: Tensor | None
    right: Tensor | None
    diagonal: Tensor
    event_shape: tuple[int, int]
    modules: tuple[str, ...] = ()

    def factored(self) -> Precision:
        """``H`` factored; a ``NotPositiveDefiniteError`` if it cannot be."""
        with naming(self.modules):
            if self.left is not None and self.right is not None:
                return KroneckerSum(self.left, self.right, self.diagonal)
            if self.left is not None:
                return GramPrecision(_add_diagonal(self.left, self.diagonal), "left", self.event_shape)
            if self.right is not None:
                return GramPrecision(_add_diagonal(self.right, self.diagonal), "right", self.event_shape)
            return DiagonalPrecision(self.diagonal, self.event_shape)

    def apply(self, x: Tensor) -> Tensor:
        """``H x``, ``(*S, M, a, b)``."""
        result = self.diagonal * x
        if self.left is not None:
            result += self.left @ x
        if self.right is not None:
            result += x @ self.right
        return result


@dataclass(frozen=True, eq=False, repr=False)
class Quadratic(Brief):
    """Weighted least squares over ``x = Z - Z_0`` in compressed coordinates ``(M, a, b)``.

    Points, weights and shifts may have leading dimensions ``(*S)`` before ``M`` (chains of a sampler).

    Attributes:
        operators: ``P_i`` in these coordinates, one per expert.
        targets: ``U_i - Z_0`` in these coordinates, ``(M, a, b)`` each.
        compression: The change of coordinates.
        shape: ``(d_out, d_in)`` of the merged update.
        modules: Names of the modules, for errors.
        known_pulls: ``P_i target_i`` where they were made before.
    """

    operators: tuple[Operator, ...]
    targets: tuple[Tensor, ...]
    compression: Compression
    shape: tuple[int, int]
    modules: tuple[str, ...] = ()
    known_pulls: tuple[Tensor | None, ...] = ()

    @property
    def event_shape(self) -> tuple[int, int]:
        """``(a, b)``."""
        return int(self.targets[0].shape[-2]), int(self.targets[0].shape[-1])

    def lift(self, x: Tensor) -> Tensor:
        """Displacement ``Z - Z_0`` of ``x``, ``(*S, M, a, b)`` to ``(*S, M, d_out, d_in)``."""
        return self.compression.lift(x, self.shape)

    def lift_draws(self, x: Tensor, noise: Tensor, white: Tensor, spread: Tensor) -> Tensor:
        """Displacement of draws ``x`` with the noise that its compression ``white`` leaves out, of spread ``(M,)``."""
        z = self.lift(x)
        if self.compression.trivial:
            return z
        return z + (noise - self.lift(white)) * spread.to(z.dtype)[:, None, None]

    def residuals(self, x: Tensor) -> Tensor:
        """Squared residuals ``q_i``, ``(*S, M, E)`` float64."""
        pairs = zip(self.operators, self.targets, strict=True)
        return torch.stack([operator.quadratic(x - target) for operator, target in pairs], -1)

    def forces(self, x: Tensor) -> Iterator[Tensor]:
        """Half the gradients of the residuals ``q_i`` at ``x``, made one at a time.

        Yields:
            ``P_i (x - target_i)``, ``(*S, M, a, b)``, of one expert after another.
        """
        for operator, target in zip(self.operators, self.targets, strict=True):
            yield operator.apply(x - target)

    def pulls(self) -> list[Tensor]:
        """``P_i target_i`` per expert, ``(M, a, b)``: right-hand sides of the normal equations before weighting."""
        known = self.known_pulls or (None,) * len(self.operators)
        return [
            operator.apply(target) if pull is None else pull
            for operator, target, pull in zip(self.operators, self.targets, known, strict=True)
        ]

    def precision(self, weights: Tensor, ridge: Tensor) -> Precision:
        """``H = sum_i w_i P_i + ridge I``, factored, for weights ``(*S, M, E)`` and a ridge ``(*S, M)``."""
        return self.normal(weights, ridge).factored()

    def normal(self, weights: Tensor, ridge: Tensor) -> NormalMatrix:
        """The same ``H``, summed up only."""
        left, right, diagonal = self._assemble(weights, ridge)
        return NormalMatrix(left, right, diagonal, self.event_shape, self.modules)

    def exact_half_gradient(self, weights: Tensor, ridge: Tensor, x: Tensor) -> Tensor:
        """``H x - b`` in float64, expert by expert, so that only one of them is held in float64 at a time.

        All are ``(M, ...)``; ``x`` is float64.
        """
        total = ridge[:, None, None] * x
        for i, (operator, target) in enumerate(zip(self.operators, self.targets, strict=True)):
            force = operator.apply_exactly(x - target)
            total.add_(force.mul_(weights[:, i, None, None]))  # rounded each: opposite forces cancel exactly
        return total

    def picked(self, count: int, x: Tensor) -> tuple[Quadratic, Tensor] | None:
        """The problem of a few rows of ``x`` alone, or columns, evenly spaced, and these ``(M, count, b)``.

        Given the weights, rows do not meet where every Gram acts on the right. None where both sides are acted on, or
        none is.
        """
        sides = {each.side for each in self.operators if isinstance(each, Gram)}
        if len(sides) != 1:
            return None
        axis = -1 if sides == {"left"} else -2
        places = torch.arange(0, x.shape[axis], -(-x.shape[axis] // count), device=x.device)
        targets = tuple(target.index_select(axis, places) for target in self.targets)
        shape = int(targets[0].shape[-2]), int(targets[0].shape[-1])
        operators = tuple(
            replace(each, shape=shape) if isinstance(each, Gram) else ScaledIdentity(shape, targets[0])
            for each in self.operators
        )
        return replace(self, operators=operators, targets=targets, known_pulls=()), x.index_select(axis, places)

    def _assemble(self, weights: Tensor, ridge: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """The weighted sums of what acts on the left, on the right and elementwise."""
        dtype = self.targets[0].dtype
        sides: dict[str, Tensor] = {}
        diagonal = ridge.to(dtype)[..., None, None]
        for i, operator in enumerate(self.operators):
            weight = weights[..., i].to(dtype)[..., None, None]
            if isinstance(operator, Gram):
                if operator.side in sides:
                    sides[operator.side].addcmul_(weight, operator.gram)
                else:
                    sides[operator.side] = weight * operator.gram
            elif isinstance(operator, Diagonal):
                diagonal = diagonal + weight * operator.values
            elif isinstance(operator, ScaledIdentity):
                diagonal = diagonal + weight
            else:
                raise TypeError(
                    f"`{type(operator).__name__}` is an operator that no factorisation in Full coordinates knows. "
                    "Return a Gram, Diagonal, RankOne or ScaledIdentity, or use coordinates='span'."
                )
        return sides.get("left"), sides.get("right"), diagonal


def quadratic_of(posterior: Posterior, for_draws: bool = False) -> Quadratic:
    """The least-squares problem behind a posterior in few coordinates; ``lift(x) + Z_0`` is exact for every minimiser.

    Args:
        posterior: Factor experts do not count.
        for_draws: Leave out only directions that no expert sees, where the posterior is the anchor's alone. A MAP
            needs fewer: it does not move where experts see something but pull nowhere.

    Raises:
        ValueError: If the operators of one module do not share a factorisation (or their draws do not).
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
    compression = Compression()
    if kinds == {RankOne}:
        compression = Compression(flat=_flat_basis(posterior.experts, targets, for_draws))
    elif kinds == {Gram}:
        compression = Compression(
            left=_side_basis(posterior.experts, targets, "left", center is not None, for_draws),
            right=_side_basis(posterior.experts, targets, "right", center is not None, for_draws),
        )
    reduced = tuple(compression.compress(target) for target in targets)
    operators = tuple(compression.operator(expert.operator, reduced[0]) for expert in posterior.experts)
    same = compression.trivial and center is None
    pulls = tuple(expert.pull for expert in posterior.experts) if same else ()
    return Quadratic(operators, reduced, compression, posterior.event_shape, posterior.modules, pulls)


def _flat_basis(experts: tuple[BoundExpert, ...], targets: list[Tensor], for_draws: bool) -> FlatBasis:
    """Basis of ``vec(Z - Z_0)`` for Directional and Identity experts, whose span holds that of every MAP."""
    if for_draws and any(isinstance(e.operator, ScaledIdentity) for e in experts):
        raise ValueError(
            "draws in Full coordinates cannot mix Directional with Identity experts: every entry of the merged update "
            "would need a dense covariance. Use coordinates='span'."
        )
    pairs = zip(experts, targets, strict=True)
    return FlatBasis.of([e.operator.vector if isinstance(e.operator, RankOne) else t for e, t in pairs])


def _side_basis(
    experts: tuple[BoundExpert, ...],
    targets: list[Tensor],
    side: Literal["left", "right"],
    displaced: bool,
    for_draws: bool,
) -> Tensor | None:
    """Orthonormal directions of one side that matter; None where they are all of them.

    These are the range of the operators that act on this side and, for the others, the targets themselves. Draws also
    move in the latter's complement, so for draws every expert must act on this side. A side on which none acts is not
    factored and costs little as it is: there only factors of low rank are worth a basis.
    """
    columns = []
    for expert, target in zip(experts, targets, strict=True):
        if isinstance(expert.operator, Gram) and expert.operator.side == side:
            columns.append(expert.operator.factor)
        elif for_draws:
            return None
        elif expert.low_rank is not None and not displaced:
            columns.append(expert.low_rank[0] if side == "left" else expert.low_rank[1].mT)
        else:
            columns.append(target if side == "left" else target.mT)
    columns = list({(c.data_ptr(), c.shape, c.stride()): c for c in columns}.values())  # both sides share an update
    length, other = targets[0].shape[-2:] if side == "left" else targets[0].shape[:-3:-1]
    count = sum(column.shape[-1] for column in columns)
    acts = any(isinstance(expert.operator, Gram) and expert.operator.side == side for expert in experts)
    if count >= length or (not acts and count > other / 2):
        return None
    return orthonormal(torch.cat(columns, -1))


def _add_diagonal(matrix: Tensor, diagonal: Tensor) -> Tensor:
    total = matrix.clone()
    total.diagonal(dim1=-2, dim2=-1).add_(diagonal.squeeze(-1))
    return total

"""MAP of Gaussian experts for any anchor precision, from one eigendecomposition.

With Gaussian experts the MAP is a ridge regression, ``Z = Z_0 + A^-1(eta) b`` with ``A(eta) = sum_i w_i P_i + eta I``
and weights that no precision changes ([BMM] Theorem 2). In the eigenvectors of ``sum_i w_i P_i`` every ``eta`` then
costs a division and the product back, and the residual's sum of squares, which empirical Bayes needs, not even that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from poe_models.energy import Gaussian
from poe_models.experts import ProductOfExperts
from poe_models.least_squares import Quadratic, quadratic_of
from poe_models.operators import Gram
from poe_models.scales import RelativePrecision


@dataclass(frozen=True, eq=False)
class Ridge:
    """Ridge regressions of ``M`` modules with their spectra.

    Attributes:
        values: Eigenvalues of ``sum_i w_i P_i``, ``(M, d)`` float64.
        vectors: Its eigenvectors, ``(M, d, d)`` float64.
        pull: ``sum_i w_i P_i (U_i - Z_0)`` in these, ``(M, a, b)`` float64.
        curvature: What a relative precision is relative to, ``(M,)``.
        side: The side that the operators act on.
        quadratic: The change of coordinates.
        center: ``Z_0``, ``(M, d_out, d_in)``, or None for zero.
        at_center: ``sum_i w_i q_i(Z_0)``, ``(M,)``: twice the experts' energy of the centre.
    """

    values: Tensor
    vectors: Tensor
    pull: Tensor
    curvature: Tensor
    side: Literal["left", "right"]
    quadratic: Quadratic
    center: Tensor | None
    at_center: Tensor

    @classmethod
    def of(cls, poe: ProductOfExperts, updates: Tensor) -> Self | None:
        """The regressions of updates ``(M, N, d_out, d_in)``; None for other experts than Gaussian ones on one side.

        The product's own anchor precision does not matter.
        """
        if poe.factors or not all(isinstance(expert.energy, Gaussian) for expert in poe.experts):
            return None
        unit = replace(poe, anchor=replace(poe.anchor, precision=RelativePrecision(1.0)))
        posterior = unit.bind(updates)
        sides = {e.operator.side if isinstance(e.operator, Gram) else None for e in posterior.experts}
        if sides != {"left"} and sides != {"right"}:
            return None
        quadratic = quadratic_of(posterior)
        at_center = torch.zeros_like(posterior.anchor_precision)
        weights = posterior.weights(at_center.unsqueeze(-1).expand(-1, len(posterior.experts)))  # whatever the residual
        summed = pull = torch.zeros(())
        for i, (operator, target) in enumerate(zip(quadratic.operators, quadratic.targets, strict=True)):
            wide, weight = operator.to(torch.float64), weights[:, i, None, None]
            assert isinstance(wide, Gram)
            summed = summed + weight * wide.gram
            pull = pull + weight * wide.apply(target.double())
            at_center = at_center + weights[:, i] * wide.quadratic(target.double())
        values, vectors = torch.linalg.eigh(summed)
        side: Literal["left", "right"] = "left" if sides == {"left"} else "right"
        rotated = vectors.mT @ pull if side == "left" else pull @ vectors
        return cls(
            values=values.clamp(min=0),
            vectors=vectors,
            pull=rotated,
            curvature=posterior.anchor_precision,
            side=side,
            quadratic=quadratic,
            center=posterior.center,
            at_center=at_center,
        )

    def at(self, eta: Tensor) -> Tensor:
        """MAP ``(M, d_out, d_in)`` at absolute precisions ``eta``, ``(M,)``, in the dtype of the updates.

        A direction that no expert sees stays the centre's, also at ``eta = 0``.
        """
        x = self.pull * self._along(self._inverse(eta))
        x = self.vectors @ x if self.side == "left" else x @ self.vectors.mT
        displacement = self.quadratic.lift(x.to(self.quadratic.targets[0]))
        return displacement if self.center is None else displacement + self.center

    def residual(self, eta: Tensor) -> Tensor:
        """Least ``sum_i w_i q_i(Z) + eta |Z - Z_0|^2`` over ``Z``, ``(M,)``, at absolute precisions ``(M,)``."""
        gain = (self.pull.square() * self._along(self._inverse(eta))).sum((-2, -1))
        return (self.at_center - gain).clamp(min=0)

    def _inverse(self, eta: Tensor) -> Tensor:
        total = self.values + eta.double().unsqueeze(-1)
        return torch.where(total > 0, 1 / torch.where(total > 0, total, 1.0), 0.0)

    def _along(self, values: Tensor) -> Tensor:
        """A value for each eigenvector, ``(M, d)``, as a factor of the pull."""
        return values.unsqueeze(-1) if self.side == "left" else values.unsqueeze(-2)

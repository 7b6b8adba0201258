"""Squared residuals of all experts at one point from one Gram matrix of the point."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from poe_models.least_squares import Quadratic
from poe_models.operators import Gram
from poe_models.posterior import Posterior
from poe_models.sums import gram_matrix, inner, inner_each

CANCELLED = 1e-3
"""Share of a sum's terms below which too much of it has cancelled, and its rounding might come near the solver's
tolerance."""


class SummedResiduals:
    """``q_i(x) = <x^T x, P_i> - 2 <x, P_i t_i> + <t_i, P_i t_i>``, summed in float64 (of ``P_i`` on the right).

    ``x^T x`` serves all experts, where ``(x - t_i) F_i`` is a product for each. Where the three terms cancel, and where
    the Gram matrix would cost more, the latter are taken.

    Attributes:
        sides: The sides on which residuals are summed up.
        summed: Mask of the experts whose residuals are, ``(E,)``.
        at_zero: ``<t_i, P_i t_i>``, ``(M, E)`` float64.

    Args:
        posterior: The posterior.
        quadratic: Its least-squares problem.
        pulls: ``P_i t_i``, ``(M, a, b)`` each.
    """

    def __init__(self, posterior: Posterior, quadratic: Quadratic, pulls: Sequence[Tensor]) -> None:
        self.quadratic = quadratic
        self.pulls = pulls
        self.sides = [side for side in ("left", "right") if self._pays(side)]
        own = bool(quadratic.known_pulls) or not self.sides  # in the posterior's own coordinates, or not asked for
        at_zero = [
            expert.residual_at_zero if own else inner(target, pull)
            for expert, target, pull in zip(posterior.experts, quadratic.targets, pulls, strict=True)
        ]
        self.at_zero = torch.stack(at_zero, -1)
        sides = [isinstance(each, Gram) and each.side in self.sides for each in quadratic.operators]
        self.summed = torch.tensor(sides, device=self.at_zero.device)

    def _pays(self, side: str) -> bool:
        """Whether the Gram matrix of a point costs less than a product for each expert on this side."""
        factors = [each.factor for each in self.quadratic.operators if isinstance(each, Gram) and each.side == side]
        return bool(factors) and factors[0].shape[-2] < sum(min(each.shape[-2:]) for each in factors)

    def at(self, x: Tensor) -> Tensor:
        """``q_i``, ``(M, a, b)`` to ``(M, E)`` float64."""
        if not self.sides:
            return self.quadratic.residuals(x)
        along, own = inner_each(x, self.pulls).unbind(-1), self._own(x)
        return torch.stack([self._of(i, x, own.get(i), each) for i, each in enumerate(along)], -1)

    def _own(self, x: Tensor) -> dict[int, Tensor]:
        """``<x, P_i x>`` of the experts that are summed up, ``(M,)`` each, by their places."""
        found: dict[int, Tensor] = {}
        for side in self.sides:
            operators = enumerate(self.quadratic.operators)
            grams = {i: each.gram for i, each in operators if isinstance(each, Gram) and each.side == side}
            square = gram_matrix(x if side == "left" else x.mT)
            found |= zip(grams, inner_each(square, list(grams.values())).unbind(-1), strict=True)
        return found

    def _of(self, i: int, x: Tensor, own: Tensor | None, along: Tensor) -> Tensor:
        """The residual of one expert, ``(M,)``, given ``<x, P_i x>`` if it is summed up, and ``<x, P_i t_i>``."""
        operator, target, at_zero = self.quadratic.operators[i], self.quadratic.targets[i], self.at_zero[..., i]
        if own is None:
            return operator.quadratic(x - target)
        q = own - 2 * along + at_zero
        lost = ~(q >= CANCELLED * (own + 2 * along.abs() + at_zero))
        return torch.where(lost, operator.quadratic(x - target), q) if bool(lost.any()) else q

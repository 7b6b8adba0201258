"""WUDI: the merged update that differs least from each expert along the expert's own input directions.

    minimise  sum_i |(Z - U_i) U_i^T|^2 / |U_i|^2        (Cheng et al., 2025, arXiv 2503.08099)

This is the product of Gaussian experts with ``InputGram`` and ``NormScaled(1)``, without an anchor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from poe_models.methods.arguments import require_count, require_number, require_share
from poe_models.methods.decompositions import RANK_TOLERANCE, compressed, inverse_norms
from poe_models.methods.method import About, MergingMethod, ModuleBatch

_CITATION = "Cheng et al., 2025, Whoever started the interference should end it, arXiv 2503.08099"


@dataclass(frozen=True)
class Wudi(MergingMethod):
    """The minimiser of WUDI's objective, ``(sum_i U_i C_i) (sum_i C_i)^+`` with ``C_i = U_i^T U_i / |U_i|^2``.

    Of all minimisers it is the smallest: directions in which no expert has any input stay at zero.

    Args:
        rank_tolerance: Input directions that the updates, scaled to norm 1, reach by no more than this stay at zero.

    >>> Wudi()(torch.stack([torch.diag(torch.tensor([2.0, 0.0])), torch.diag(torch.tensor([0.0, 5.0]))]))
    tensor([[2., 0.],
            [0., 5.]])
    """

    about = About("WUDI", _CITATION, matrices=True)

    rank_tolerance: float = RANK_TOLERANCE

    def __post_init__(self) -> None:
        require_share(self, "rank_tolerance", one=False)

    @override
    def working_floats(self, modules: int, experts: int, shape: tuple[int, int]) -> int:
        return (8 + modules) * shape[0] * shape[1] + 10 * shape[1] ** 2

    @override
    def merged(self, batch: ModuleBatch) -> Tensor:
        space = compressed(batch)
        return space.lift(torch.cat([self._core(cores) for cores in space.cores.split(1)]))

    def _core(self, cores: Tensor) -> Tensor:
        """Merge one module, ``(1, N, p, q)`` to ``(1, p, q)``."""
        gram, pull = normal_equations(cores, self.rank_tolerance)
        values, vectors = torch.linalg.eigh(gram)
        inverse = torch.where(values > self.rank_tolerance**2, 1 / values, 0).unsqueeze(-2)
        return (((pull @ vectors) * inverse) @ vectors.mT).to(cores.dtype)


@dataclass(frozen=True)
class WudiAdam(MergingMethod):
    """WUDI's objective as published: a number of Adam's steps from the sum of the updates.

    Kept to compare with: it has not converged when it stops, and its result depends on the size of the updates.

    Args:
        steps: Number of steps.
        learning_rate: Learning rate of Adam.

    >>> WudiAdam(steps=0)(torch.tensor([1.0, 3.0])[:, None, None])
    tensor([[4.]])
    """

    about = About(
        "WUDI, iterative",
        _CITATION,
        matrices=True,
        exceptions={
            "one expert": "it stops before it has converged",
            "identical experts": "it stops on the way from the sum",
            "scale equivariance": "Adam's steps have a length of their own",
        },
    )

    steps: int = 300
    learning_rate: float = 1e-5

    def __post_init__(self) -> None:
        require_count(self, "steps", 0)
        require_number(self, "learning_rate", 0)

    @override
    def working_floats(self, modules: int, experts: int, shape: tuple[int, int]) -> int:
        return (10 + modules) * shape[0] * shape[1] + 6 * shape[1] ** 2

    @override
    def merged(self, batch: ModuleBatch) -> Tensor:
        return torch.cat([self._module(updates) for updates in batch.updates.split(1)])

    def _module(self, updates: Tensor) -> Tensor:
        """Merge one module, ``(1, N, d_out, d_in)`` to ``(1, d_out, d_in)``."""
        gram, pull = (part.to(updates.dtype) for part in normal_equations(updates, RANK_TOLERANCE))
        z = updates.sum(1)
        optimizer = torch.optim.Adam([z], lr=self.learning_rate)
        for _ in range(self.steps):
            z.grad = 2 * (z @ gram - pull)
            optimizer.step()
        return z


def normal_equations(updates: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """``sum_i C_i``, ``(M, d_in, d_in)``, and ``sum_i U_i C_i``, ``(M, d_out, d_in)``, in float64.

    Experts whose norm is up to ``tolerance`` times the module's largest are left out.
    """
    gram = updates.new_zeros(len(updates), updates.shape[3], updates.shape[3], dtype=torch.float64)
    pull = updates.new_zeros(len(updates), *updates.shape[2:], dtype=torch.float64)
    for update, factor in zip(updates.unbind(1), inverse_norms(updates, tolerance).double().unbind(1), strict=True):
        unit = update.double() * factor[:, None, None]
        own = unit.mT @ unit
        gram += own
        pull += update.double() @ own
    return gram, pull

"""Importance sampling: the mean of weights, its error, and whether either can be trusted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FEWEST_EFFECTIVE = 50.0
"""Fewest effective samples for which a standard error means something."""
LARGEST_PARETO_K = 0.7
"""Above it the error shrinks too slowly with the number of samples (Vehtari et al., 2024, JMLR 25(72))."""
ROUNDS = 8
"""Most rounds of samples, each from a better proposal."""
GOOD_K, GOOD_SHARE = 0.5, 0.1
"""Pareto shape and share of effective samples with which a proposal is good enough."""


@dataclass(frozen=True, eq=False)
class ImportanceMean:
    """Log of a mean of importance weights, per module.

    Attributes:
        value: Log of the mean in nats, ``(M,)``.
        standard_error: Of ``value``, by the delta method, ``(M,)``.
        effective_samples: Kish's effective number of samples, ``(M,)``.
        pareto_k: Shape of the weights' upper tail, ``(M,)``; below 1/2 their variance is finite.
        count: Number of samples.
    """

    value: Tensor
    standard_error: Tensor
    effective_samples: Tensor
    pareto_k: Tensor
    count: int

    @property
    def good(self) -> bool:
        """Whether the proposal needs no further component in any module."""
        effective = self.effective_samples > GOOD_SHARE * self.count
        return bool(((self.pareto_k < GOOD_K) & effective).all())

    @property
    def trusted(self) -> Tensor:
        """Modules whose value and error can be trusted, ``(M,)`` bool."""
        return trusted(self.pareto_k, self.effective_samples)


def trusted(pareto_k: Tensor, effective_samples: Tensor) -> Tensor:
    """Mask of the means of importance weights that can be trusted, with their standard errors."""
    return (pareto_k <= LARGEST_PARETO_K) & (effective_samples >= FEWEST_EFFECTIVE)


def importance_mean(log_weights: Tensor) -> ImportanceMean:
    """Log mean of independent importance weights, from log weights ``(S, M)`` in nats, with error and diagnostics."""
    count = len(log_weights)
    value = torch.logsumexp(log_weights, 0) - math.log(count)
    relative = (log_weights - value).exp()
    error = relative.std(0) / math.sqrt(count)
    return ImportanceMean(value, error, count**2 / relative.square().sum(0), pareto_k(log_weights), count)


def pareto_k(log_weights: Tensor) -> Tensor:
    """Shape of a generalised Pareto distribution fitted to the largest weights (Vehtari et al., 2024, JMLR 25(72)).

    From log weights ``(S, M)`` in nats, ``(M,)``; ``-inf`` where the largest weights are equal.

    >>> normal = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> narrow, heavy = 0.1 * normal, 8 * normal
    >>> bool(pareto_k(narrow) < 0.5), bool(pareto_k(heavy) > 0.7)
    (True, True)
    """
    count = len(log_weights)
    tail = min(math.ceil(count / 5), math.ceil(3 * math.sqrt(count)))
    largest = (log_weights - log_weights.amax(0)).sort(0).values[-tail - 1 :]
    excess = largest[1:].exp() - largest[0].exp()
    return torch.stack([_pareto_shape(column) for column in excess.mT.contiguous()])


def _pareto_shape(excess: Tensor) -> Tensor:
    """Zhang and Stephens (2009, Technometrics 51(3)) with the weak prior of PSIS, from ``n`` sorted excesses."""
    n = len(excess)
    quartile = excess[int(n / 4 + 0.5) - 1]
    if n < 5 or not bool(quartile > 0):
        return excess.new_tensor(-math.inf if n >= 5 else math.inf)
    points = 30 + int(math.sqrt(n))
    grid = torch.arange(1, points + 1, dtype=excess.dtype, device=excess.device)
    theta = 1 / excess[-1] + (1 - (points / (grid - 0.5)).sqrt()) / (3 * quartile)
    shapes = torch.log1p(-theta.unsqueeze(-1) * excess).mean(-1)
    likelihood = n * ((-theta / shapes).log() - shapes - 1)
    mean = (torch.softmax(likelihood, 0) * theta).sum()
    shape = torch.log1p(-mean * excess).mean()
    return (n * shape + 5) / (n + 10)

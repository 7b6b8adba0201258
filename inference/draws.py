"""Posterior draws: what every sampler returns.

Leading dimensions are ``(chain, draw)``, as ArviZ has them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override


class Draws(ABC):
    """Draws of a posterior over ``M`` modules, in the posterior's own coordinates."""

    @property
    @abstractmethod
    def num_chains(self) -> int:
        """Number of chains ``C``."""

    @property
    @abstractmethod
    def num_draws(self) -> int:
        """Draws per chain ``S``."""

    @property
    @abstractmethod
    def stats(self) -> Mapping[str, Tensor]:
        """Statistics of the sampler by ArviZ's names (``lp``, ``diverging``, ...), ``(C, S, M)`` each."""

    @property
    @abstractmethod
    def sampler(self) -> str | None:
        """Name of the function that made them; None if nobody said."""

    @property
    @abstractmethod
    def temperature(self) -> float | None:
        """Temperature of the posterior; None if nobody said."""

    @abstractmethod
    def latents(self, chain: int, draw: int) -> Tensor:
        """One draw of all modules, ``(M, *event)``."""


@dataclass(frozen=True, eq=False)
class StoredDraws(Draws):
    """Draws that are kept as they are: Span coordinates, where each is a few numbers.

    Attributes:
        values: ``(C, S, M, *event)``.
        statistics: see :attr:`Draws.stats`.
        made_by: see :attr:`Draws.sampler`.
        heat: see :attr:`Draws.temperature`.
    """

    values: Tensor
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    made_by: str | None = None
    heat: float | None = None

    @property
    @override
    def sampler(self) -> str | None:
        return self.made_by

    @property
    @override
    def temperature(self) -> float | None:
        return self.heat

    @property
    @override
    def num_chains(self) -> int:
        return self.values.shape[0]

    @property
    @override
    def num_draws(self) -> int:
        return self.values.shape[1]

    @property
    @override
    def stats(self) -> Mapping[str, Tensor]:
        return self.statistics

    @override
    def latents(self, chain: int, draw: int) -> Tensor:
        return self.values[chain, draw]


@dataclass(frozen=True, eq=False)
class RegeneratedDraws(Draws):
    """Draws that are made again when needed: Full coordinates, where each is as large as the modules.

    Attributes:
        weights: mixture weights ``w_i`` of every draw, ``(C, S, M, E)``; ``E = 0`` where a seed is enough (Laplace).
        seeds: seed of every draw's noise, ``(C, S, M)`` int64.
        regenerate: maps a module's index, its weights ``(E,)`` and a seed to its ``Z``, ``(d_out, d_in)``.
        statistics: see :attr:`Draws.stats`.
        made_by: see :attr:`Draws.sampler`.
        heat: see :attr:`Draws.temperature`.
    """

    weights: Tensor
    seeds: Tensor
    regenerate: Callable[[int, Tensor, int], Tensor]
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    made_by: str | None = None
    heat: float | None = None

    @property
    @override
    def sampler(self) -> str | None:
        return self.made_by

    @property
    @override
    def temperature(self) -> float | None:
        return self.heat

    @property
    @override
    def num_chains(self) -> int:
        return self.weights.shape[0]

    @property
    @override
    def num_draws(self) -> int:
        return self.weights.shape[1]

    @property
    @override
    def stats(self) -> Mapping[str, Tensor]:
        return self.statistics

    @override
    def latents(self, chain: int, draw: int) -> Tensor:
        weights, seeds = self.weights[chain, draw], self.seeds[chain, draw].tolist()
        return torch.stack([self.regenerate(m, weights[m], seed) for m, seed in enumerate(seeds)])

"""Posterior draws: what every sampler returns.

Leading dimensions are ``(chain, draw)``, as ArviZ has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override


@dataclass(frozen=True, eq=False)
class Draws:
    """Draws of a posterior over ``M`` modules in its own coordinates, kept or made again when needed.

    In Span coordinates a draw is a few numbers, and is kept. In Full coordinates it is as large as the modules: its
    mixture weights and its seed are kept, and ``regenerate`` makes it again, bit for bit.

    Attributes:
        numbers: The draws themselves, ``(C, S, M, *event)``; with ``regenerate`` the mixture weights ``w_i`` that they
            are made from, ``(C, S, M, E)``, where ``E = 0`` if a seed is enough (Laplace).
        stats: Statistics of the sampler by ArviZ's names (``lp``, ``diverging``, ...), ``(C, S, M)`` each.
        sampler: Name of the function that made them; None if it is not known.
        temperature: Temperature of the posterior; None if it is not known.
        seeds: Seed of every draw's noise, ``(C, S, M)`` int64; empty for draws that are kept.
        regenerate: Maps a module's index, its weights ``(E,)`` and a seed to its ``Z``, ``(d_out, d_in)``.

    >>> Draws(torch.zeros(4, 100, 2, 3, 1), sampler="slice", temperature=1.0)
    Draws(slice, 4 chains of 100 draws, 2 modules, temperature 1.0, kept)
    """

    numbers: Tensor
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    sampler: str | None = None
    temperature: float | None = None
    seeds: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64), kw_only=True)
    regenerate: Callable[[int, Tensor, int], Tensor] | None = field(default=None, kw_only=True)

    @property
    def num_chains(self) -> int:
        """Number of chains ``C``."""
        return self.numbers.shape[0]

    @property
    def num_draws(self) -> int:
        """Draws per chain ``S``."""
        return self.numbers.shape[1]

    @property
    def num_modules(self) -> int:
        """Number of modules ``M``."""
        return self.numbers.shape[2]

    @property
    def values(self) -> Tensor:
        """All draws at once, ``(C, S, M, *event)``; those of Full coordinates may be too large for the memory."""
        if self.regenerate is None:
            return self.numbers
        chains = range(self.num_chains)
        return torch.stack([torch.stack([self.latents(c, s) for s in range(self.num_draws)]) for c in chains])

    @property
    def weights(self) -> Tensor:
        """Mixture weights that draws are made again from, ``(C, S, M, E)``.

        Raises:
            TypeError: If the draws themselves are kept.
        """
        if self.regenerate is None:
            raise TypeError("`Draws.weights`: these draws are kept as they are. Use `values`.")
        return self.numbers

    def latents(self, chain: int, draw: int) -> Tensor:
        """Draw of all modules at a chain and a position, ``(M, *event)``."""
        if self.regenerate is None:
            return self.numbers[chain, draw]
        return torch.stack([self.module_latents(chain, draw, module) for module in range(self.num_modules)])

    def module_latents(self, chain: int, draw: int, module: int) -> Tensor:
        """Draw of one module, ``(*event)``."""
        if self.regenerate is None:
            return self.numbers[chain, draw, module]
        place = (chain, draw, module)
        return self.regenerate(module, self.numbers[place], int(self.seeds[place]))

    @override
    def __repr__(self) -> str:
        size = f"{self.num_chains} chains of {self.num_draws} draws, {self.num_modules} modules"
        how = "kept" if self.regenerate is None else "made again when needed"
        return f"Draws({self.sampler}, {size}, temperature {self.temperature}, {how})"

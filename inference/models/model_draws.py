"""Draws of a whole model, by the names of its modules: what files hold and ensembles are made of.

A sampler's :class:`~inference.draws.Draws` are latents of one batch. Here they are freed from it:

>>> from poe_models import ProductOfExperts, span_posterior, span_statistics
>>> from inference.gibbs import gibbs_posterior
>>> poe = ProductOfExperts.of(["a", "b"])
>>> statistics = span_statistics(poe, torch.eye(4, dtype=torch.float64).reshape(1, 2, 2, 4), ["fc.weight"])
>>> posterior, coordinates = span_posterior(poe, statistics)
>>> draws = gibbs_posterior(posterior, 100, generator=torch.Generator().manual_seed(0))
>>> named = SpanDraws.of(draws, coordinates, statistics)
>>> named.modules, len(named), len(named.thinned(10)), named.coefficients.shape
(('fc.weight',), 400, 10, torch.Size([4, 100, 1, 3]))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from inference.draws import Draws
from inference.gibbs import GibbsKernel, seeded_noise
from inference.laplace import Laplace
from inference.merge_distance import span_distance
from inference.models.modules import Module
from inference.models.named_draws import ModelDraws, PosteriorDraws
from inference.models.statistics_files import statistics_digest
from poe_models.span import SpanCoordinates, SpanStatistics
from poe_models.span_labels import CENTER, basis_names

__all__ = ["FullDraws", "ModelDraws", "PosteriorDraws", "SpanDraws"]


@dataclass(frozen=True, eq=False)
class SpanDraws(PosteriorDraws):
    """Coefficients on the experts' updates, the anchor's centre, and the merge if the span goes through it.

    Attributes:
        updates: names of the task vectors, the order of the first ``N`` coefficients.
        coefficients: ``c``, ``(C, S, M, K)`` with ``K = N + 1``, or ``N + 2`` through a merge.
        designs: text of the design whose merge the span goes through, for each module; none without one.
        made_by: see :attr:`PosteriorDraws.sampler`.
        temperature: of the posterior; None if nobody said.
    """

    updates: tuple[str, ...]
    coefficients: Tensor
    designs: tuple[str, ...] = ()
    made_by: str | None = None
    temperature: float | None = None

    @classmethod
    def of(cls, draws: Draws, coordinates: SpanCoordinates, statistics: SpanStatistics) -> SpanDraws:
        """Name the draws of a Span posterior, and measure how far they are from a merge that the span goes through.

        Args:
            draws: latents ``(M, K, 1)`` each.
            coordinates: what `span_posterior` returned beside the posterior.
            statistics: what it was made from.

        Returns:
            The coefficients.
        """
        latents = [
            torch.stack([draws.latents(chain, draw) for draw in range(draws.num_draws)])
            for chain in range(draws.num_chains)
        ]
        coefficients = coordinates.coefficients(torch.stack(latents))
        return cls(
            modules=statistics.modules,
            squared_norms=statistics.gram.diagonal(dim1=-2, dim2=-1).clone(),
            source=statistics_digest(statistics),
            stats=dict(draws.stats),
            from_merge=span_distance(statistics, coefficients),
            updates=statistics.updates,
            coefficients=coefficients,
            designs=statistics.through or (),
            made_by=draws.sampler,
            temperature=draws.temperature,
        )

    @property
    def through_merge(self) -> bool:
        """Whether the last coefficient is that of the merge."""
        return bool(self.designs)

    @property
    def basis(self) -> tuple[str, ...]:
        """Names of the coefficients, ``K`` of them."""
        return basis_names(self.updates, self.through_merge)

    @property
    def varying(self) -> list[int]:
        """Positions of the coefficients that can vary: all but that of a centre that is zero everywhere."""
        centered = bool((self.squared_norms[:, len(self.updates)] > 0).any())
        return [place for place, name in enumerate(self.basis) if name != CENTER or centered]

    @property
    @override
    def surrounds(self) -> Literal["span", "full"]:
        return "full" if self.through_merge else "span"

    @property
    @override
    def uses_modes(self) -> bool:
        return self.through_merge

    @property
    @override
    def sampler(self) -> str | None:
        return self.made_by

    @property
    @override
    def temperatures(self) -> tuple[float, ...]:
        return () if self.temperature is None else (self.temperature,)

    @property
    @override
    def coordinates(self) -> Literal["span", "full"]:
        return "span"

    @property
    @override
    def num_chains(self) -> int:
        return self.coefficients.shape[0]

    @property
    @override
    def num_draws(self) -> int:
        return self.coefficients.shape[1]

    @property
    @override
    def numbers(self) -> dict[str, Tensor]:
        return {"coefficients": self.coefficients}

    @property
    @override
    def labels(self) -> tuple[str, ...]:
        return (*self.updates, *self.designs)

    @override
    def update(self, module: Module, member: int) -> Tensor:
        """``sum_j c_j U_j + c_0 Z_0``, and ``c_* Z_*`` through a merge."""
        coefficients = self.coefficients[member // self.num_draws, member % self.num_draws, self.index(module.name)]
        return self.combined(module, coefficients)

    def combined(self, module: Module, coefficients: Tensor) -> Tensor:
        """The merged update that coefficients stand for, ``(d_out, d_in)``.

        Args:
            module: a module whose name is among ``modules``.
            coefficients: ``(K,)``.
        """
        own, count = coefficients.to(module.updates), len(self.updates)
        update = torch.tensordot(own[:count], module.updates, dims=1)
        if (center := module.center) is not None:
            update = update + own[count] * center
        return update + own[count + 1] * module.mode if self.through_merge else update

    @override
    def _only(self, chains: Tensor, draws: Tensor) -> SpanDraws:
        stats = {name: value[chains, draws].unsqueeze(0) for name, value in self.stats.items()}
        return replace(self, stats=stats, coefficients=self.coefficients[chains, draws].unsqueeze(0))

    @override
    def _modules(self, kept: Sequence[int]) -> SpanDraws:
        return replace(
            self,
            modules=tuple(self.modules[index] for index in kept),
            squared_norms=self.squared_norms[kept],
            stats={name: value[:, :, kept] for name, value in self.stats.items()},
            from_merge=None if self.from_merge is None else self.from_merge.select(kept),
            coefficients=self.coefficients[:, :, kept],
            designs=tuple(self.designs[index] for index in kept if self.designs),
        )


@dataclass(frozen=True, eq=False)
class FullDraws(PosteriorDraws):
    """What Full draws are made again from: mixture weights and seeds, with the design.

    Attributes:
        method: ``"gibbs"``; ``"laplace"``, whose draws need no weights but the mode; or ``"noise"``, white noise
            around the mode.
        weights: ``(C, S, M, E)``, filled up with zeros where a module has fewer experts; ``E = 0`` for Laplace; the
            length ``|Z - Z*|`` for noise, ``E = 1``.
        seeds: ``(C, S, M)`` int64.
        temperature: of each module's posterior, ``(M,)`` float64.
        designs: for each module what its design is, as text; draws are refused under another one.
        environment: where they were made: device type, torch version, threads, compute dtype.
    """

    method: Literal["gibbs", "laplace", "noise"]
    weights: Tensor
    seeds: Tensor
    temperature: Tensor
    designs: tuple[str, ...]
    environment: Mapping[str, str]

    @property
    @override
    def coordinates(self) -> Literal["span", "full"]:
        return "full"

    @property
    @override
    def surrounds(self) -> Literal["span", "full"]:
        return "full"

    @property
    @override
    def sampler(self) -> str | None:
        return self.method

    @property
    @override
    def temperatures(self) -> tuple[float, ...]:
        return tuple(dict.fromkeys(self.temperature.tolist()))

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
    def independent(self) -> bool:
        return self.method == "noise" or super().independent

    @property
    @override
    def uses_modes(self) -> bool:
        return self.independent

    @property
    @override
    def numbers(self) -> dict[str, Tensor]:
        return {"weights": self.weights, "seeds": self.seeds, "temperature": self.temperature}

    @property
    @override
    def labels(self) -> tuple[str, ...]:
        return (self.method, *self.designs)

    @override
    def update(self, module: Module, member: int) -> Tensor:
        """The draw, made again from its weights and its seed."""
        index = self.index(module.name)
        place = (member // self.num_draws, member % self.num_draws, index)
        seed = int(self.seeds[place])
        if self.method == "noise":
            noise = seeded_noise(seed, (module.updates.shape[-2], module.updates.shape[-1]), module.mode)
            return module.mode + noise * float(self.weights[place][0] / noise.double().norm())
        posterior = replace(module.posterior, temperature=float(self.temperature[index]))
        if self.method == "laplace":
            return Laplace(posterior, module.mode.unsqueeze(0)).draw(seed)
        weights = self.weights[place][: len(posterior.experts)].to(posterior.anchor_precision)
        return GibbsKernel(posterior, regenerable=True).regenerate(weights, seed)

    @override
    def _only(self, chains: Tensor, draws: Tensor) -> FullDraws:
        stats = {name: value[chains, draws].unsqueeze(0) for name, value in self.stats.items()}
        weights, seeds = (value[chains, draws].unsqueeze(0) for value in (self.weights, self.seeds))
        return replace(self, stats=stats, weights=weights, seeds=seeds)

    @override
    def _modules(self, kept: Sequence[int]) -> FullDraws:
        return replace(
            self,
            modules=tuple(self.modules[index] for index in kept),
            squared_norms=self.squared_norms[kept],
            stats={name: value[:, :, kept] for name, value in self.stats.items()},
            from_merge=None if self.from_merge is None else self.from_merge.select(kept),
            weights=self.weights[:, :, kept],
            seeds=self.seeds[:, :, kept],
            temperature=self.temperature[kept],
            designs=tuple(self.designs[index] for index in kept),
        )

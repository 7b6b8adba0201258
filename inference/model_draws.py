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

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import torch
from torch import Tensor
from typing_extensions import override

from inference._modules import Module
from inference.draws import Draws
from inference.gibbs import GibbsKernel, seeded_noise
from inference.laplace import Laplace
from inference.statistics_files import statistics_digest
from poe_models.span import SpanCoordinates, SpanStatistics

__all__ = ["FullDraws", "ModelDraws", "PosteriorDraws", "SpanDraws"]


@dataclass(frozen=True, eq=False)
class ModelDraws(ABC):
    """Draws of the modules of a model. Their ``len`` counts all chains; iterating gives one draw at a time.

    Attributes:
        modules: names of the modules, ``M`` of them.
        squared_norms: ``|B_j|^2`` of the updates and the centre, ``(M, K)``, filled up with zeros: an ensemble checks
            its weights against them.
        source: digest of the statistics or inputs that the draws are about.
        stats: statistics of the sampler by ArviZ's names, ``(C, S, M)`` each.
    """

    modules: tuple[str, ...]
    squared_norms: Tensor
    source: str
    stats: Mapping[str, Tensor] = field(kw_only=True, default_factory=dict)

    @property
    @abstractmethod
    def coordinates(self) -> Literal["span", "full", "seeds"]:
        """What the draws are draws of: coefficients, the merged update itself, or a random method's seed."""

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
    def numbers(self) -> dict[str, Tensor]:
        """What decides the draws, by name: the tensors that a file keeps."""

    @property
    @abstractmethod
    def labels(self) -> tuple[str, ...]:
        """What decides the draws besides numbers."""

    @abstractmethod
    def _only(self, chains: Tensor, draws: Tensor) -> Self:
        """The draws at these places, ``(n,)`` each, as one chain."""

    @abstractmethod
    def _modules(self, kept: Sequence[int]) -> Self:
        """The draws of some modules."""

    def __len__(self) -> int:
        return self.num_chains * self.num_draws

    def __getitem__(self, member: int) -> Self:
        if not 0 <= member < len(self):
            raise IndexError(f"draw {member} of {len(self)}")
        return self._only(torch.tensor([member // self.num_draws]), torch.tensor([member % self.num_draws]))

    def __iter__(self) -> Iterator[Self]:
        return (self[member] for member in range(len(self)))

    def thinned(self, count: int) -> Self:
        """A few draws from all chains, evenly spaced along each.

        Args:
            count: how many.

        Returns:
            The draws, as one chain.

        Raises:
            ValueError: there are not so many.
        """
        if not 1 <= count <= len(self):
            raise ValueError(
                f"`thinned({count})`: there are {len(self)} draws. Ask for 1 to {len(self)}, or draw more."
            )
        places = []
        for chain in range(self.num_chains):
            share = len(range(chain, count, self.num_chains))
            places += [(chain, int((i + 0.5) * self.num_draws / share)) for i in range(share)]
        return self._only(*torch.tensor(places).unbind(-1))

    def restrict(self, pattern: str) -> Self:
        r"""The draws of the modules whose names a regular expression finds.

        Args:
            pattern: for instance ``r"layers\.11\.mlp"``.

        Raises:
            ValueError: it finds none.
        """
        kept = [index for index, name in enumerate(self.modules) if re.search(pattern, name)]
        if not kept:
            raise ValueError(
                f"`restrict({pattern!r})`: fits none of the {len(self.modules)} modules that were drawn "
                f"({', '.join(self.modules[:3])}{', ...' if len(self.modules) > 3 else ''})."
            )
        return self._modules(kept)

    def digest(self) -> str:
        """Sha256 of what the draws are about and of every number: draws with the same digest are the same."""
        digest = hashlib.sha256(repr((self.modules, self.source, self.labels)).encode())
        for name, values in self.numbers.items():
            digest.update(f"{name}{tuple(values.shape)}{values.dtype}".encode())
            digest.update(values.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def index(self, module: str) -> int:
        """Position of a module among the draws.

        Args:
            module: its name.
        """
        return self.modules.index(module)


@dataclass(frozen=True, eq=False)
class PosteriorDraws(ModelDraws):
    """Draws of the posterior of each module, which make its merged update from the module alone."""

    @property
    @abstractmethod
    @override
    def coordinates(self) -> Literal["span", "full"]:
        """What the draws are draws of."""

    @property
    def uses_modes(self) -> bool:
        """Whether making a draw needs the module's MAP, which is then worth keeping."""
        return False

    @abstractmethod
    def update(self, module: Module, member: int) -> Tensor:
        """The merged update of one module in one draw, ``(d_out, d_in)``.

        Args:
            module: a module whose name is among ``modules``.
            member: number of the draw, chain after chain.
        """


@dataclass(frozen=True, eq=False)
class SpanDraws(PosteriorDraws):
    """Coefficients on the experts' updates and the anchor's centre.

    Attributes:
        updates: names of the task vectors, the order of the first ``N`` coefficients.
        coefficients: ``c``, ``(C, S, M, N + 1)``.
    """

    updates: tuple[str, ...]
    coefficients: Tensor

    @classmethod
    def of(cls, draws: Draws, coordinates: SpanCoordinates, statistics: SpanStatistics) -> SpanDraws:
        """Name the draws of a Span posterior.

        Args:
            draws: latents ``(M, N + 1, 1)`` each.
            coordinates: what `span_posterior` returned beside the posterior.
            statistics: what it was made from.

        Returns:
            The coefficients.
        """
        latents = [
            torch.stack([draws.latents(chain, draw) for draw in range(draws.num_draws)])
            for chain in range(draws.num_chains)
        ]
        return cls(
            modules=statistics.modules,
            squared_norms=statistics.gram.diagonal(dim1=-2, dim2=-1).clone(),
            source=statistics_digest(statistics),
            stats=dict(draws.stats),
            updates=statistics.updates,
            coefficients=coordinates.coefficients(torch.stack(latents)),
        )

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
        return self.updates

    @override
    def update(self, module: Module, member: int) -> Tensor:
        """``sum_j c_j U_j + c_0 Z_0``."""
        coefficients = self.coefficients[member // self.num_draws, member % self.num_draws, self.index(module.name)]
        own = coefficients.to(module.updates)
        center = module.center
        update = torch.tensordot(own[:-1], module.updates, dims=1)
        return update if center is None else update + own[-1] * center

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
            coefficients=self.coefficients[:, :, kept],
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
    def num_chains(self) -> int:
        return self.weights.shape[0]

    @property
    @override
    def num_draws(self) -> int:
        return self.weights.shape[1]

    @property
    @override
    def uses_modes(self) -> bool:
        return self.method != "gibbs"

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
            weights=self.weights[:, :, kept],
            seeds=self.seeds[:, :, kept],
            temperature=self.temperature[kept],
            designs=tuple(self.designs[index] for index in kept),
        )

"""Draws of a whole model, by the names of its modules: what files hold and ensembles are made of.

A sampler's :class:`~inference.draws.Draws` are latents of one batch. Here they are freed from it:

>>> from poe_models import ProductOfExperts, span_statistics
>>> from inference.gibbs import gibbs
>>> poe = ProductOfExperts.of(["a", "b"])
>>> statistics = span_statistics(poe, torch.eye(4, dtype=torch.float64).reshape(1, 2, 2, 4), ["fc.weight"])
>>> draws = gibbs(poe.bind(statistics), 100, generator=torch.Generator().manual_seed(0))
>>> SpanDraws.of(draws, poe.bind(statistics)).thinned(10)
SpanDraws(gibbs draws in Span coordinates around the MAP of the span at temperature 1, 1 x 10, 1 module: fc.weight)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from typing_extensions import override

from inference.draws import Draws
from inference.gibbs import GibbsKernel, seeded_noise
from inference.laplace import Laplace
from inference.merge_distance import span_distance
from inference.models.modules import Module
from inference.models.named_draws import ModelDraws
from inference.models.statistics_files import statistics_digest
from poe_models.posterior import Posterior
from poe_models.records import with_tensors
from poe_models.span import SpanStatistics
from poe_models.span_labels import CENTER, basis_names

__all__ = ["FullDraws", "ModelDraws", "PosteriorDraws", "SpanDraws"]


@dataclass(frozen=True, eq=False, repr=False)
class SpanDraws(ModelDraws):
    """Coefficients on the experts' updates, the anchor's centre, and the merge if the span goes through it.

    Their ``designs`` are those whose merge the span goes through; empty without one.

    Attributes:
        updates: Names of the task vectors, the order of the first ``N`` coefficients.
        coefficients: ``c``, ``(C, S, M, K)`` with ``K = N + 1``, or ``N + 2`` through a merge.
        followers: Averaged tensors that have the coefficients of a module, such as its bias, to the module's name; the
            merge's update of them is the mean. The others are the merge's in every draw.
    """

    updates: tuple[str, ...]
    coefficients: Tensor
    followers: Mapping[str, str] = field(kw_only=True, default_factory=dict)

    kind = "span"
    own = ("coefficients",)

    @classmethod
    def of(cls, draws: Draws, posterior: Posterior) -> SpanDraws:
        """Name the draws of a Span posterior, and measure how far they are from a merge that the span goes through.

        Args:
            draws: Latents ``(M, K, 1)`` each.
            posterior: The posterior that they are draws of, in Span coordinates.

        Returns:
            The coefficients, on the CPU wherever they were drawn.

        Raises:
            ValueError: If the posterior is in Full coordinates.
        """
        if posterior.span is None:
            raise ValueError(
                "`SpanDraws.of(...)`: the posterior is in Full coordinates. `sample_full` names its draws."
            )
        statistics = with_tensors(Tensor.cpu, posterior.span.statistics)
        return cls.named(statistics, posterior.coefficients(draws.values).cpu(), draws)

    @classmethod
    def named(
        cls,
        statistics: SpanStatistics,
        coefficients: Tensor,
        draws: Draws,
        merge: Tensor | None = None,
        followers: Mapping[str, str] | None = None,
    ) -> SpanDraws:
        """Name coefficients that draws stand for.

        Args:
            statistics: Of the modules, on the CPU.
            coefficients: ``(C, S, M, K)``, on the CPU.
            draws: What their statistics, sampler and temperature are taken from.
            merge: Coefficients of the merge that they are to surround, ``(M, K)``; by default the one that the span
                goes through.
            followers: As the attribute.
        """
        heat = draws.temperature
        return cls(
            modules=statistics.modules,
            squared_norms=statistics.gram.diagonal(dim1=-2, dim2=-1).clone(),
            source=statistics_digest(statistics),
            designs=statistics.through or (),
            stats={name: values.cpu() for name, values in draws.stats.items()},
            sampler=draws.sampler,
            temperature=None if heat is None else torch.full((len(statistics.modules),), heat, dtype=torch.float64),
            from_merge=span_distance(statistics, coefficients, merge),
            updates=statistics.updates,
            coefficients=coefficients,
            followers=followers or {},
        )

    @property
    def through_merge(self) -> bool:
        """True if the last coefficient is that of the merge."""
        return bool(self.designs)

    @property
    def uses_modes(self) -> bool:
        """True if making a draw needs the module's MAP, which is then worth keeping."""
        return self.through_merge

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
    def labels(self) -> tuple[str, ...]:
        return (*self.updates, *(f"{tensor} follows {module}" for tensor, module in self.followers.items()))

    @override
    def select(self, kept: Sequence[int]) -> SpanDraws:
        some = super().select(kept)
        own = {tensor: module for tensor, module in self.followers.items() if module in some.modules}
        return replace(some, followers=own)

    def shares(self, tensor: str, member: int, means: Sequence[float]) -> list[float]:
        """Coefficients of the experts' updates of a tensor that follows a module, in one draw.

        Args:
            tensor: One of ``followers``.
            member: Number of the draw, chain after chain.
            means: Share of each expert in the merge's update, in the order of ``updates``; they sum to 1.

        Returns:
            ``c_i + c_* mean_i``, one for each of ``updates``.
        """
        own = self.coefficients[*self.place(member), self.index(self.followers[tensor])].tolist()
        merged = own[-1] if self.through_merge else 0.0
        return [each + merged * mean for each, mean in zip(own, means, strict=False)]

    def update(self, module: Module, member: int) -> Tensor:
        """The merged update of one module in one draw, ``sum_j c_j U_j + c_0 Z_0``, and ``c_* Z_*`` through a merge.

        Args:
            module: A module whose name is among ``modules``.
            member: Number of the draw, chain after chain.

        Returns:
            ``Z``, ``(d_out, d_in)``.
        """
        return self.combined(module, self.coefficients[*self.place(member), self.index(module.name)])

    def combined(self, module: Module, coefficients: Tensor) -> Tensor:
        """The merged update ``(d_out, d_in)`` that coefficients ``(K,)`` stand for."""
        own, count = coefficients.to(module.updates), len(self.updates)
        update = torch.tensordot(own[:count], module.updates, dims=1)
        if (center := module.center) is not None:
            update = update + own[count] * center
        return update + own[count + 1] * module.mode if self.through_merge else update


@dataclass(frozen=True, eq=False, repr=False)
class FullDraws(ModelDraws):
    """Mixture weights and seeds from which draws in Full coordinates are made again, under the design they are of.

    Their ``sampler`` is ``"gibbs"``; ``"laplace"``, whose draws need no weights but the mode; or ``"noise"``, white
    noise around the mode.

    Attributes:
        weights: ``(C, S, M, E)``, filled up with zeros where a module has fewer experts; ``E = 0`` for Laplace; the
            length ``|Z - Z*|`` for noise, ``E = 1``.
        seeds: ``(C, S, M)`` int64.
        environment: Where they were made: device type, torch version, threads, compute dtype.
    """

    weights: Tensor
    seeds: Tensor
    environment: Mapping[str, str]

    kind = "full"
    own = ("weights", "seeds")

    @property
    @override
    def independent(self) -> bool:
        return self.sampler == "noise" or super().independent

    @property
    def uses_modes(self) -> bool:
        """True if making a draw needs the module's MAP, which is then worth keeping."""
        return self.independent

    def update(self, module: Module, member: int) -> Tensor:
        """The merged update of one module in one draw, made again from its weights and its seed.

        Args:
            module: A module whose name is among ``modules``.
            member: Number of the draw, chain after chain.

        Returns:
            ``Z``, ``(d_out, d_in)``.
        """
        return self.maker(module)(member)

    def maker(self, module: Module) -> Callable[[int], Tensor]:
        """A function from the number of a draw to ``update`` of one module; what its draws share is computed once.

        Args:
            module: A module whose name is among ``modules``.
        """
        index = self.index(module.name)

        def numbers(member: int) -> tuple[int, Tensor]:
            place = (*self.place(member), index)
            return int(self.seeds[place]), self.weights[place]

        if self.sampler == "noise":
            return lambda member: _noisy(module, *numbers(member))
        posterior = self.posterior(module)
        if self.sampler == "laplace":
            fitted = Laplace(posterior, module.mode.unsqueeze(0))
            return lambda member: fitted.draw(numbers(member)[0])
        kernel, active = GibbsKernel(posterior), len(posterior.experts)

        def regenerated(member: int) -> Tensor:
            seed, weights = numbers(member)
            return kernel.regenerate(weights[:active].to(posterior.anchor_precision), seed)

        return regenerated

    def posterior(self, module: Module) -> Posterior:
        """The posterior of a module at the temperature of its draws."""
        assert self.temperature is not None
        return replace(module.posterior, temperature=float(self.temperature[self.index(module.name)]))


def _noisy(module: Module, seed: int, length: Tensor) -> Tensor:
    """The mode and white noise of this length, ``(1,)``."""
    noise = seeded_noise(seed, (module.updates.shape[-2], module.updates.shape[-1]), module.mode)
    return module.mode + noise * float(length[0] / noise.double().norm())


PosteriorDraws = SpanDraws | FullDraws
"""Draws of the posterior of each module, which make its merged update from the module alone."""

"""Draws by the names of their modules: what those of every kind have in common, and those of a posterior."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Self

import torch
from torch import Tensor
from typing_extensions import override

from inference.merge_distance import FAR, MergeDistance
from inference.models.modules import Module
from inference.samplers import SAMPLERS


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
    def independent(self) -> bool:
        """Whether the draws are independent of each other, so that there are no chains to judge."""

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
    """Draws of the posterior of each module, which make its merged update from the module alone.

    Attributes:
        from_merge: how far their centre is from the merge that they are to surround; None if it has not been found out,
            which `distance_from_merge` does.
    """

    from_merge: MergeDistance | None = field(kw_only=True, default=None)

    @property
    @abstractmethod
    @override
    def coordinates(self) -> Literal["span", "full"]:
        """What the draws are draws of."""

    @property
    @abstractmethod
    def surrounds(self) -> Literal["span", "full"]:
        """Coordinates of the merge that they are drawn around: of the MAP among all updates, or in the span only."""

    @property
    @abstractmethod
    def sampler(self) -> str | None:
        """What made them; None if nobody said."""

    @property
    @abstractmethod
    def temperatures(self) -> tuple[float, ...]:
        """Each temperature of their posteriors once; none if nobody said."""

    @property
    @override
    def independent(self) -> bool:
        return self.sampler in SAMPLERS and SAMPLERS[self.sampler].independent

    @property
    def about(self) -> str:
        """Sampler, coordinates and temperature in words."""
        places = {
            ("full", "full"): "Full coordinates",
            ("span", "full"): "Span coordinates through the merge",
            ("span", "span"): "Span coordinates around the MAP of the span",
        }
        heat = ", ".join(f"{value:g}" for value in self.temperatures) or "that nobody said"
        where = places[self.coordinates, self.surrounds]
        return f"{self.sampler or 'unnamed'} draws in {where} at temperature {heat}"

    @property
    def far_from_merge(self) -> str | None:
        """What to say if the draws do not surround the merge; None if they do, or if that is not known."""
        if self.from_merge is None or not self.from_merge.beyond:
            return None
        modules, share = len(self.from_merge.beyond), self.from_merge.share
        return (
            f"{self.about}: {self.from_merge}; {modules} of {len(self.modules)} modules are beyond {FAR:g}, and the "
            f"displacement has {share:.0%} of the merge's length. These draws do not surround the merge, and what "
            "holds of it need not hold of them: see that the chains agree, lower the temperature, or draw around it."
        )

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

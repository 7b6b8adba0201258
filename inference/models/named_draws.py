"""Draws by the names of their modules: what those of every kind have in common."""

from __future__ import annotations

import hashlib
from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from typing_extensions import override

from inference.merge_distance import FAR, MergeDistance
from inference.samplers import SAMPLERS
from poe_models.weights.patterns import pattern as regular

_PLACES = {
    ("full", "full"): "Full coordinates",
    ("span", "full"): "Span coordinates through the merge",
    ("span", "span"): "Span coordinates around the MAP of the span",
}


@dataclass(frozen=True, eq=False, repr=False)
class ModelDraws(ABC):
    """Draws of the modules of a model. Their ``len`` counts all chains; iterating gives one draw at a time.

    Attributes:
        modules: Names of the modules, ``M`` of them.
        squared_norms: ``|B_j|^2`` of the updates and the centre, ``(M, K)``, filled up with zeros: an ensemble checks
            its weights against them.
        source: Digest of the statistics or inputs that the draws are about.
        designs: For each module its design as text, where draws are refused under another one; else empty.
        stats: Statistics of the sampler by ArviZ's names, ``(C, S, M)`` each.
        sampler: Name of what made them; None if it is not known.
        temperature: Temperature of each module's posterior, ``(M,)`` float64; None if it is not known.
        from_merge: Distance of their centre from the merge that they are to surround; None if it is not known, and
            ``distance_from_merge`` finds it out.
    """

    modules: tuple[str, ...]
    squared_norms: Tensor
    source: str
    designs: tuple[str, ...] = field(kw_only=True, default=())
    stats: Mapping[str, Tensor] = field(kw_only=True, default_factory=dict)
    sampler: str | None = field(kw_only=True, default=None)
    temperature: Tensor | None = field(kw_only=True, default=None)
    from_merge: MergeDistance | None = field(kw_only=True, default=None)

    kind: ClassVar[Literal["span", "full", "seeds"]]
    """Coefficients, the merged update itself, or a random method's seed."""
    own: ClassVar[tuple[str, ...]]
    """Names of the tensors that a draw is made from, ``(C, S, ...)`` each; a third dimension is that of modules."""

    @property
    def numbers(self) -> dict[str, Tensor]:
        """The tensors that a draw is made from, by name."""
        return {name: getattr(self, name) for name in self.own}

    @property
    def num_chains(self) -> int:
        """Number of chains ``C``."""
        return self.numbers[self.own[0]].shape[0]

    @property
    def num_draws(self) -> int:
        """Draws per chain ``S``."""
        return self.numbers[self.own[0]].shape[1]

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Each temperature once; none if they are not known."""
        return () if self.temperature is None else tuple(dict.fromkeys(self.temperature.tolist()))

    @property
    def surrounds(self) -> Literal["span", "full"]:
        """Coordinates of the merge that they are drawn around: the MAP among all updates, or that of the span."""
        return "span" if self.kind == "span" and not self.designs else "full"

    @property
    def independent(self) -> bool:
        """Whether the draws are independent of each other, so that there are no chains to judge."""
        return self.sampler in SAMPLERS and SAMPLERS[self.sampler].independent

    @property
    def about(self) -> str:
        """Sampler, coordinates and temperature in words."""
        if self.kind == "seeds":
            return "merges at the seeds of a random method"
        heat = ", ".join(f"{value:g}" for value in self.temperatures) or "that nobody said"
        return f"{self.sampler or 'unnamed'} draws in {_PLACES[self.kind, self.surrounds]} at temperature {heat}"

    @property
    def far_from_merge(self) -> str | None:
        """A warning if the draws do not surround the merge; None if they do, or if that is not known."""
        if self.from_merge is None or not self.from_merge.beyond:
            return None
        modules, share = len(self.from_merge.beyond), self.from_merge.share
        return (
            f"{self.about}: {self.from_merge}; {modules} of {len(self.modules)} modules are beyond {FAR:g}, and the "
            f"displacement has {share:.0%} of the merge's length. These draws do not surround the merge, and what "
            "holds of it need not hold of them: see that the chains agree, lower the temperature, or draw around it."
        )

    def __len__(self) -> int:
        return self.num_chains * self.num_draws

    def __getitem__(self, member: int) -> Self:
        if not 0 <= member < len(self):
            raise IndexError(f"draw {member} of {len(self)}")
        return self._only([self.place(member)])

    def __iter__(self) -> Iterator[Self]:
        return (self[member] for member in range(len(self)))

    @override
    def __repr__(self) -> str:
        shown = ", ".join(self.modules[:3]) + (", ..." if len(self.modules) > 3 else "")
        count = f"{len(self.modules)} module{'s' if len(self.modules) > 1 else ''}"
        return f"{type(self).__name__}({self.about}, {self.num_chains} x {self.num_draws}, {count}: {shown})"

    def place(self, member: int) -> tuple[int, int]:
        """Chain and draw of a member; members are counted chain after chain."""
        return member // self.num_draws, member % self.num_draws

    def index(self, module: str) -> int:
        """Position of a module among the draws."""
        return self.modules.index(module)

    def thinned(self, count: int) -> Self:
        """A few draws from all chains, evenly spaced along each.

        Args:
            count: Number of draws.

        Returns:
            The draws, as one chain.

        Raises:
            ValueError: If there are not so many.
        """
        if not 1 <= count <= len(self):
            raise ValueError(
                f"`thinned({count})`: there are {len(self)} draws. Ask for 1 to {len(self)}, or draw more."
            )
        places = []
        for chain in range(self.num_chains):
            share = len(range(chain, count, self.num_chains))
            places += [(chain, int((i + 0.5) * self.num_draws / share)) for i in range(share)]
        return self._only(places)

    def restrict(self, pattern: str) -> Self:
        r"""The draws of the modules whose names a regular expression finds.

        Args:
            pattern: For instance ``r"layers\.11\.mlp"``.

        Returns:
            As many draws of fewer modules.

        Raises:
            ValueError: If it finds none.
        """
        kept = [index for index, name in enumerate(self.modules) if regular(pattern).search(name)]
        if not kept:
            raise ValueError(
                f"`restrict({pattern!r})`: fits none of the {len(self.modules)} modules that were drawn "
                f"({', '.join(self.modules[:3])}{', ...' if len(self.modules) > 3 else ''})."
            )
        return self.select(kept)

    def select(self, kept: Sequence[int]) -> Self:
        """The draws of the modules at some positions, in their order."""
        places = list(kept)
        parts: dict[str, Any] = {n: v[:, :, places] for n, v in self.numbers.items() if v.ndim > 2}
        return replace(
            self,
            modules=tuple(self.modules[place] for place in places),
            squared_norms=self.squared_norms[places],
            designs=tuple(self.designs[place] for place in places if self.designs),
            stats={name: value[:, :, places] for name, value in self.stats.items()},
            temperature=None if self.temperature is None else self.temperature[places],
            from_merge=None if self.from_merge is None else self.from_merge.select(places),
            **parts,
        )

    @classmethod
    def joined(cls, parts: Sequence[Self], source: str) -> Self:
        """Join draws of different modules, as many of each and by one sampler; the digest is of what all are about."""
        first, distances = parts[0], [part.from_merge for part in parts if part.from_merge is not None]
        own: dict[str, Any] = {name: _joined([part.numbers[name] for part in parts], 2) for name in cls.own}
        heats = [part.temperature for part in parts if part.temperature is not None]
        return replace(
            first,
            modules=tuple(name for part in parts for name in part.modules),
            squared_norms=_joined([part.squared_norms for part in parts], 0),
            source=source,
            designs=tuple(text for part in parts for text in part.designs),
            stats={name: _joined([part.stats[name] for part in parts], 2) for name in first.stats},
            temperature=torch.cat(heats) if len(heats) == len(parts) else None,
            from_merge=MergeDistance.joined(distances) if len(distances) == len(parts) else None,
            **own,
        )

    def digest(self) -> str:
        """Sha256 of what the draws are about and of every number: draws with the same digest are the same."""
        digest = hashlib.sha256(repr((self.modules, self.source, self.sampler, *self.labels, *self.designs)).encode())
        tensors = self.numbers if self.temperature is None else {**self.numbers, "temperature": self.temperature}
        for name, values in tensors.items():
            digest.update(f"{name}{tuple(values.shape)}{values.dtype}".encode())
            digest.update(values.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the task vectors, where their order decides a draw."""
        return ()

    def _only(self, places: Sequence[tuple[int, int]]) -> Self:
        """The draws at these chains and positions, as one chain."""
        at = torch.tensor(places).unbind(-1)
        stats = {name: value[at].unsqueeze(0) for name, value in self.stats.items()}
        own: dict[str, Any] = {name: value[at].unsqueeze(0) for name, value in self.numbers.items()}
        return replace(self, stats=stats, **own)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Tensors of several groups of modules as one on the CPU, their last dimension filled up with zeros."""
    if parts[0].ndim > dim + 1:
        most = max(part.shape[-1] for part in parts)
        parts = [torch.nn.functional.pad(part, (0, most - part.shape[-1])) for part in parts]
    return torch.cat(list(parts), dim).cpu()

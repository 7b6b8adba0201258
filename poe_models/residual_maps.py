"""Residual maps: the directions of the merged update in which an expert's residual is measured.

A residual map turns an update ``U_i`` into the operator ``P_i`` of its squared residual
``q_i(Z) = <Z - U_i, P_i (Z - U_i)>``. A new map is one method that returns an operator.

>>> class RowMeans(ResidualMap):
...     "Only the sums over output rows matter."
...     def operator(self, update):
...         ones = torch.ones_like(update[..., :, :1])
...         return Gram(ones, "left", tuple(update.shape[-2:]))
>>> import torch
>>> RowMeans().operator(torch.ones(2, 3)).quadratic(torch.ones(2, 3))
tensor(12., dtype=torch.float64)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from typing_extensions import override

from poe_models.operators import Diagonal, Gram, Operator, RankOne, ScaledIdentity, root_of, thin

MomentKind = Literal["fisher", "activations"]
"""Diagonal Fisher information of the weights, ``(d_out, d_in)``; or ``X X^T / n`` of the inputs, ``(d_in, d_in)``."""


class Moments(Protocol):
    """Moments of the experts' data, by the names of experts and modules."""

    def read(self, expert: str, modules: Sequence[str], shape: Sequence[int]) -> Tensor:
        """Moments of ``M`` modules of equal shape: ``(M, d_out, d_in)`` or ``(M, d_in, d_in)``, by their kind."""
        ...

    def inputs(self, expert: str, modules: Mapping[str, tuple[int, int]]) -> Mapping[str, Any]:
        """The checkpoint to be read, by its role; a ``ValueError`` if it lacks one of the modules."""
        ...


@runtime_checkable
class MomentsSource(Protocol):
    """Moments in memory or a folder of some; :mod:`poe_models.weights.moments` has both."""

    def opened(self, kind: MomentKind, experts: Sequence[str]) -> Moments:
        """The moments of these experts at least; a ``TypeError`` or ``ValueError`` if they are of another kind."""
        ...


class ResidualMap(ABC):
    """A function from the update of an expert to the operator ``P_i`` of its squared residual."""

    common_units: ClassVar[bool] = False
    """Whether operators are in units that all experts share, so that a smaller one is information.

    Not where they are made from the update and grow with its length. :class:`~poe_models.scales.Balanced` asks.
    """
    matrices: ClassVar[bool] = False
    """Whether operators act on a side of the matrix, so that a tensor seen as one row has none."""

    @override
    def __repr__(self) -> str:
        """The map and its settings, by which statistics and merges record it."""
        return f"{type(self).__qualname__}()"

    @abstractmethod
    def operator(self, update: Tensor) -> Operator:
        """The operator ``P_i`` of ``U_i``, ``(..., d_out, d_in)``; leading dimensions are modules."""

    def operator_of_factors(self, left: Tensor, right: Tensor) -> Operator:
        """The operator of ``U_i = left @ right``, ``(..., d_out, r)`` and ``(..., r, d_in)``; cheaper for some maps."""
        return self.operator(left @ right)

    def checked_operator(self, update: Tensor, low_rank: tuple[Tensor, Tensor] | None = None) -> Operator:
        """The operator of an update or of its factors, refused if it is none.

        Raises:
            ValueError: If the map returns something else, such as a tensor.
        """
        found: Any = self.operator(update) if low_rank is None else self.operator_of_factors(*low_rank)
        if isinstance(found, Operator):
            return found
        got = f"a tensor {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"`{type(self).__name__}.operator(update)`: it returned {got}, expected an operator. Return a `Gram`, "
            "which is `P = F F^T` on one side: `Gram(F, 'left', tuple(update.shape[-2:]))`, or a `Diagonal`, `RankOne` "
            "or `ScaledIdentity`, from `poe_models`."
        )

    def for_modules(self, update: str, modules: Sequence[str]) -> ResidualMap:
        """The map of one expert, named by its task vector, for a batch of named modules; equal to this one.

        Only a map on given moments differs from module to module.
        """
        return self

    def inputs(self, update: str, modules: Mapping[str, tuple[int, int]]) -> Mapping[str, Any]:
        """Checkpoints, by their role, that an expert's map reads besides the updates of modules ``(d_out, d_in)``.

        None, but for maps on given moments, which check them by their headers.
        """
        return {}

    def stand_in(self) -> ResidualMap:
        """A map with the same kind of operator that needs nothing but updates, to try a design with."""
        return self


@dataclass(frozen=True)
class Identity(ResidualMap):
    """``q = |Z - U|^2``: every entry counts alike; averaging ([PoE] Eq. 13)."""

    common_units: ClassVar[bool] = True

    @override
    def operator(self, update: Tensor) -> Operator:
        return ScaledIdentity(_shape(update), update)


@dataclass(frozen=True)
class Directional(ResidualMap):
    """``q = <Z - U, U>^2``: only the length along the update itself ([PoE] Eq. 17-24 as printed).

    With independent updates and a vanishing anchor every residual can be zero at once, so the MAP hardly
    depends on the energy: tails matter for the Gram maps. A relative anchor counts the directions of the product's
    updates: exact copies are one, copies that differ by a millionth of their length or more are several.
    """

    @override
    def operator(self, update: Tensor) -> Operator:
        return RankOne(update)


@dataclass(frozen=True)
class OutputGram(ResidualMap):
    """``q = |U^T (Z - U)|^2``: ``U U^T`` on the output side ([PoE]'s released code)."""

    matrices: ClassVar[bool] = True

    @override
    def operator(self, update: Tensor) -> Operator:
        return Gram(update, "left", _shape(update))

    @override
    def operator_of_factors(self, left: Tensor, right: Tensor) -> Operator:
        return Gram(left @ thin(right), "left", (left.shape[-2], right.shape[-1]))


@dataclass(frozen=True)
class InputGram(ResidualMap):
    """``q = |(Z - U) U^T|^2``: ``U^T U`` on the input side ([BMM] Eq. 15, data-free; WUDI's objective)."""

    matrices: ClassVar[bool] = True

    @override
    def operator(self, update: Tensor) -> Operator:
        return Gram(update.mT, "right", _shape(update))

    @override
    def operator_of_factors(self, left: Tensor, right: Tensor) -> Operator:
        return Gram(right.mT @ thin(left.mT), "right", (left.shape[-2], right.shape[-1]))


@dataclass(frozen=True)
class MomentsMap(ResidualMap):
    """A residual map on ``ModuleMoments`` or a ``MomentsFolder``, looked up by names of expert and modules."""

    common_units: ClassVar[bool] = True
    kind: ClassVar[MomentKind]
    """Kind of the moments."""
    moments: MomentsSource

    def __post_init__(self) -> None:
        require_source(self)
        for name in ("share", "off_diagonal"):  # shares, of the maps that have them
            if not 0 <= getattr(self, name, 0) <= 1:
                raise ValueError(
                    f"`{type(self).__name__}({name}={getattr(self, name)})`: expected a number between 0 and 1."
                )

    @abstractmethod
    def operator_from(self, given: Tensor, update: Tensor) -> Operator:
        """The operator for given Fisher information ``(M, d_out, d_in)`` or second moments ``(M, d_in, d_in)``."""

    def source(self, update: str) -> Moments:
        """The moments, of this expert at least; of a folder its header is read anew."""
        return self.moments.opened(self.kind, [update])

    @override
    def operator(self, update: Tensor) -> Operator:
        raise ValueError(
            f"`{type(self).__name__}(...)`: got updates without the names of their modules, and moments go by name. "
            "Give a `ModuleUpdates`, or name the modules of the batch: `poe.for_modules([...])`."
        )

    @override
    def for_modules(self, update: str, modules: Sequence[str]) -> ResidualMap:
        return _OfModules(self, update, tuple(modules), self.source(update))

    @override
    def inputs(self, update: str, modules: Mapping[str, tuple[int, int]]) -> Mapping[str, Any]:
        return self.source(update).inputs(update, modules)

    @override
    def stand_in(self) -> ResidualMap:
        return _Squares() if self.kind == "fisher" else InputGram()


@dataclass(frozen=True, repr=False)
class _OfModules(ResidualMap):
    """A map on given moments in named modules; equal to, and written as, the map without the names."""

    common_units: ClassVar[bool] = True
    map: MomentsMap
    update: str = field(compare=False)
    modules: tuple[str, ...] = field(compare=False)
    source: Moments = field(compare=False)

    @override
    def __repr__(self) -> str:
        return repr(self.map)

    @override
    def operator(self, update: Tensor) -> Operator:
        if update.ndim != 3 or len(update) != len(self.modules):
            raise ValueError(
                f"`for_modules(...)`: got updates {tuple(update.shape)} for the {len(self.modules)} modules "
                f"{', '.join(self.modules)}. Name each module of the batch once."
            )
        given = self.source.read(self.update, self.modules, update.shape[-2:])
        try:
            return self.map.operator_from(given.to(update.device), update)
        except ValueError as error:
            raise ValueError(f"expert {self.update!r}, modules {', '.join(self.modules)}: {error}") from error

    @override
    def for_modules(self, update: str, modules: Sequence[str]) -> ResidualMap:
        return self.map.for_modules(update, modules)

    @override
    def stand_in(self) -> ResidualMap:
        return self.map.stand_in()


@dataclass(frozen=True)
class Fisher(MomentsMap):
    """``q = sum F_i (Z - U_i)^2`` entry by entry: the diagonal Fisher information ([PoE] Eq. 14).

    With Gaussian experts at an absolute scale and a vanishing anchor the MAP is Fisher-weighted averaging (Matena &
    Raffel, 2022, arXiv 2111.09832).

    Args:
        moments: Fisher information of every expert.
        floor: Added to every entry, so that entries that no example depends on are averaged.
    """

    floor: float = 0.0

    kind: ClassVar[MomentKind] = "fisher"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.floor < math.inf:
            raise ValueError(f"`Fisher(floor={self.floor})`: a floor must be a finite number, zero or above.")

    @override
    def operator_from(self, given: Tensor, update: Tensor) -> Operator:
        return Diagonal(given.to(update.dtype) + self.floor)


@dataclass(frozen=True)
class Activation(MomentsMap):
    """``q = |(Z - U) X|^2 / n``: the change on an expert's own inputs (RegMean; [PoE] Eq. 15-16, [BMM] Eq. 8).

    With Gaussian experts at an absolute scale and a vanishing anchor the MAP is RegMean's (Jin et al., 2023,
    arXiv 2212.09849).

    Args:
        moments: Second moments ``X X^T / n`` of every expert.
        off_diagonal: Factor on their off-diagonal entries, between 0 and 1; RegMean recommends 0.9.
    """

    off_diagonal: float = 1.0

    kind: ClassVar[MomentKind] = "activations"
    matrices: ClassVar[bool] = True

    @override
    def operator_from(self, given: Tensor, update: Tensor) -> Operator:
        factor = root_of(scaled_off_diagonal(given, self.off_diagonal))
        return Gram(factor.to(update.dtype), "right", _shape(update))


@dataclass(frozen=True)
class Mixed(MomentsMap):
    """``share * Activation + (1 - share) * InputGram``: data where there are some, updates elsewhere ([BMM] Eq. 35).

    Args:
        moments: Second moments ``X X^T / n`` of every expert.
        share: Share of the activations, between 0 and 1.
        off_diagonal: Factor on the off-diagonal entries of the activations.
        unit_trace: Scale both to unit mean trace first; a zero Gram stays zero. [BMM] mixes them as they are.
    """

    share: float = 0.5
    off_diagonal: float = 1.0
    unit_trace: bool = True

    kind: ClassVar[MomentKind] = "activations"
    matrices: ClassVar[bool] = True

    @override
    def operator_from(self, given: Tensor, update: Tensor) -> Operator:
        activations = scaled_off_diagonal(given.double(), self.off_diagonal)
        gram = update.double().mT @ update.double()
        if self.unit_trace:
            activations, gram = _unit_trace(activations), _unit_trace(gram)
        factor = root_of(self.share * activations + (1 - self.share) * gram, given.dtype)
        return Gram(factor.to(update.dtype), "right", _shape(update))


@dataclass(frozen=True)
class _Squares(ResidualMap):
    """A diagonal map that needs no moments, to try a design with."""

    @override
    def operator(self, update: Tensor) -> Operator:
        return Diagonal(update.square())


def scaled_off_diagonal(matrix: Tensor, factor: float) -> Tensor:
    """A matrix ``(..., d, d)`` with its off-diagonal entries scaled, as RegMean regularises its Gram matrices."""
    return factor * matrix + (1 - factor) * torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1))


RESIDUAL_MAPS: dict[str, type[ResidualMap]] = {
    cls.__name__: cls for cls in (Identity, Directional, OutputGram, InputGram, Fisher, Activation, Mixed)
}


def require_source(owner: Any) -> None:
    """Refuse a map or method whose ``moments`` are none, such as a path.

    Raises:
        TypeError: If they are none.
    """
    if not isinstance(owner.moments, MomentsSource):
        raise TypeError(
            f"`{type(owner).__name__}(moments={owner.moments!r})`: expected the moments themselves, "
            f"`ModuleMoments({owner.kind!r}, ...)`, or a folder of some, `MomentsFolder(path)`."
        )


def _unit_trace(gram: Tensor) -> Tensor:
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return gram / torch.where(mean > 0, mean, 1.0)


def _shape(update: Tensor) -> tuple[int, int]:
    d_out, d_in = update.shape[-2:]
    return int(d_out), int(d_in)

"""Residual maps: which directions of the merged update an expert cares about.

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

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from poe_models.operators import Gram, Operator, RankOne, ScaledIdentity, thin


class ResidualMap(ABC):
    """Makes the operator ``P_i`` of an expert from its update."""

    @override
    def __repr__(self) -> str:
        """The map and its settings; statistics remember by it what they were made with."""
        return f"{type(self).__qualname__}()"

    @abstractmethod
    def operator(self, update: Tensor) -> Operator:
        """``P_i`` from ``U_i`` of shape ``(..., d_out, d_in)``, leading dimensions being modules."""

    def operator_of_factors(self, left: Tensor, right: Tensor) -> Operator:
        """``P_i`` of ``U_i = left @ right``, ``(..., d_out, r)`` and ``(..., r, d_in)``; cheaper for some maps."""
        return self.operator(left @ right)


@dataclass(frozen=True)
class Identity(ResidualMap):
    """``q = |Z - U|^2``: every entry counts alike; averaging ([PoE] Eq. 13)."""

    @override
    def operator(self, update: Tensor) -> Operator:
        return ScaledIdentity(_shape(update), update)


@dataclass(frozen=True)
class Directional(ResidualMap):
    """``q = <Z - U, U>^2``: only the length along the update itself ([PoE] Eq. 17-24 as printed).

    With independent updates and a vanishing anchor every residual can be zero at once, so the MAP hardly
    depends on the energy: tails matter for the Gram maps.
    """

    @override
    def operator(self, update: Tensor) -> Operator:
        return RankOne(update)


@dataclass(frozen=True)
class OutputGram(ResidualMap):
    """``q = |U^T (Z - U)|^2``: ``U U^T`` on the output side (what [PoE]'s released code runs)."""

    @override
    def operator(self, update: Tensor) -> Operator:
        return Gram(update, "left", _shape(update))

    @override
    def operator_of_factors(self, left: Tensor, right: Tensor) -> Operator:
        return Gram(left @ thin(right), "left", (left.shape[-2], right.shape[-1]))


@dataclass(frozen=True)
class InputGram(ResidualMap):
    """``q = |(Z - U) U^T|^2``: ``U^T U`` on the input side ([BMM] Eq. 15, data-free; WUDI's objective)."""

    @override
    def operator(self, update: Tensor) -> Operator:
        return Gram(update.mT, "right", _shape(update))

    @override
    def operator_of_factors(self, left: Tensor, right: Tensor) -> Operator:
        return Gram(right.mT @ thin(left.mT), "right", (left.shape[-2], right.shape[-1]))


RESIDUAL_MAPS: dict[str, type[ResidualMap]] = {
    cls.__name__: cls for cls in (Identity, Directional, OutputGram, InputGram)
}


def _shape(update: Tensor) -> tuple[int, int]:
    d_out, d_in = update.shape[-2:]
    return int(d_out), int(d_in)

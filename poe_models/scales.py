"""Scales of experts and precisions of the anchor: the units in which residuals and distances are measured."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override


class Scale(ABC):
    """The squared scale ``s_i**2`` of an expert, computed once from its update."""

    @abstractmethod
    def squared(self, norm_squared: Tensor, residual_at_zero: Tensor) -> Tensor:
        """Squared scale in the units of ``q_i``.

        Args:
            norm_squared: ``|U_i|^2``, shape ``(...,)``.
            residual_at_zero: ``q_i(0)``, the squared residual of merging nothing, shape ``(...,)``.

        Returns:
            ``s_i**2``, shape ``(...,)``; zero where the rule gives none (the caller falls back).
        """


@dataclass(frozen=True)
class Absolute(Scale):
    """``s^2 = gamma^2`` ([PoE] Eq. 18): the same for every module, in the units of the residual."""

    gamma: float

    def __post_init__(self) -> None:
        _require_positive("Absolute", "gamma", self.gamma)

    @override
    def squared(self, norm_squared: Tensor, residual_at_zero: Tensor) -> Tensor:
        return torch.full_like(residual_at_zero, self.gamma**2)


@dataclass(frozen=True)
class NormScaled(Scale):
    """``s^2 = gamma * |U_i|^2`` ([PoE] Algorithm 1, Table 5 and released code).

    It compares a fourth power of the update (``q`` under the Gram maps) with a second power: where
    ``q << gamma |U_i|^2`` every energy is a Gaussian in disguise. Report the spread of the weights.
    """

    gamma: float

    def __post_init__(self) -> None:
        _require_positive("NormScaled", "gamma", self.gamma)

    @override
    def squared(self, norm_squared: Tensor, residual_at_zero: Tensor) -> Tensor:
        return self.gamma * norm_squared


@dataclass(frozen=True)
class Relative(Scale):
    """``s^2 = gamma^2 * q_i(0)``: free of units; an expert that is not merged at all has ``q / s^2 = 1 / gamma^2``."""

    gamma: float = 1.0

    def __post_init__(self) -> None:
        _require_positive("Relative", "gamma", self.gamma)

    @override
    def squared(self, norm_squared: Tensor, residual_at_zero: Tensor) -> Tensor:
        return self.gamma**2 * residual_at_zero


class AnchorPrecision(ABC):
    """The anchor's ``eta`` in ``eta * |Z - Z_0|^2``; the anchor's Gaussian has precision ``2 eta``."""

    @abstractmethod
    def value(self, mean_curvature: Tensor) -> Tensor:
        """``eta`` per module.

        Args:
            mean_curvature: ``sum_i a_i tr(P_i) / (d_i s_i^2)``, shape ``(...,)``, from the updates alone.

        Returns:
            ``eta``, shape ``(...,)``.
        """


@dataclass(frozen=True)
class AbsolutePrecision(AnchorPrecision):
    """``eta`` as it stands, as in [PoE] Table 5."""

    eta: float

    def __post_init__(self) -> None:
        _require_not_negative("AbsolutePrecision", "eta", self.eta)

    @override
    def value(self, mean_curvature: Tensor) -> Tensor:
        return torch.full_like(mean_curvature, self.eta)


@dataclass(frozen=True)
class RelativePrecision(AnchorPrecision):
    """``eta`` times the experts' mean curvature, so that one number suits modules of every size.

    It is computed once from the updates and not from the current weights: the posterior is one fixed
    density. With :class:`Relative` scales the merge of ``c U_i`` is ``c`` times the merge of ``U_i``. The mean is a sum
    over experts and, with those scales, an expert counts as one over its squared size: an expert that hardly changed a
    module strengthens the anchor there, and draws the other experts' merge to the centre. Watch ``anchor_precision``
    in the solution's info where updates differ much in size.
    """

    eta: float = 0.1

    def __post_init__(self) -> None:
        _require_not_negative("RelativePrecision", "eta", self.eta)

    @override
    def value(self, mean_curvature: Tensor) -> Tensor:
        return self.eta * mean_curvature


SCALES: dict[str, type[Scale]] = {cls.__name__: cls for cls in (Absolute, NormScaled, Relative)}
PRECISIONS: dict[str, type[AnchorPrecision]] = {cls.__name__: cls for cls in (AbsolutePrecision, RelativePrecision)}


def _require_positive(owner: str, name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"`{owner}({name}={value})`: a scale must be a positive finite number.")


def _require_not_negative(owner: str, name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"`{owner}({name}={value})`: a precision must be a finite number, zero or above.")
